"""The scaling report: one HTML file with the law, its intervals, its charts and a planner.

It stands in the same frame as the comparison's report (`lab.frame`); the charts and the planner are
drawn by report_assets/scaling.js from the runs, the laws and the bootstraps embedded in the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import manyform
from manyform.errors import ManyformError
from manyform.lab.frame import asset, chart, chip, escape, fill, looks, scrolling, swatch
from manyform.lab.tasks import write_atomically
from manyform.scaling.approaches import Approach, compare, profiles
from manyform.scaling.emergence import Emergence
from manyform.scaling.families import Families
from manyform.scaling.fit import Fit
from manyform.scaling.laws import Chinchilla
from manyform.scaling.summary import approaches_table, crossing_text, families_table
from manyform.scaling.table import Array, short

DRAWS = 200
"""Bootstraps that the page keeps for its planner."""


@dataclass(frozen=True, eq=False)
class Jump:
    """Exact match of one architecture over scale (n,), with its continuous twin, mean nats of a
    token; length: tokens that must all be right; found: the test of `scaling.emergence`."""

    scale: Array
    exact: Array
    nats: Array
    length: int
    found: Emergence


def write_report(found: Fit | Families, path: str | Path, *, title: str = "", command: str = "",
                 jumps: Mapping[str, Jump] | None = None) -> Path:
    """Write the page for a fit, or for several architectures, to `path` (a file).

    jumps: an accuracy-like figure by architecture, drawn beside its continuous twin. Raises
    ManyformError where a law is not of parameters and tokens (chinchilla, overtraining).
    """
    target = Path(path)
    if target.is_dir():
        target = target / "scaling.html"
    write_atomically(target, page(found, title=title, command=command, jumps=jumps))
    return target


def page(found: Fit | Families, *, title: str = "", command: str = "",
         jumps: Mapping[str, Jump] | None = None) -> str:
    """The whole page."""
    jumps = jumps or {}
    fits = dict(found.free) if isinstance(found, Families) else {
        found.runs.archs[0] if found.runs.archs else "": found}
    for fitted in fits.values():
        if not isinstance(fitted.law, Chinchilla):
            raise ManyformError("the report draws laws of parameters and tokens (chinchilla, "
                                f"overtraining), not {fitted.name}")
    styles = looks(fits)
    routes = {name: compare(f) for name, f in fits.items()}
    several = found if isinstance(found, Families) and len(fits) > 1 else None
    planner = asset("planner.html").replace("{{choice}}", _choice(fits))
    return fill(
        kind="scaling", title=title or "Scaling law",
        question=title or "How does the loss fall with compute?", summary=_summary(fits, several),
        facts=_facts(fits), sections={"law": "Law", "plan": "Planner", "charts": "Charts",
                                      "words": "In words"},
        before=f'<section id="law"><h2>The law</h2>{_law(fits, styles)}</section>\n{planner}',
        legend="".join(chip(n, styles[n], n or "runs") for n in fits),
        charts=_charts(fits, several, jumps),
        after='<section id="words"><h2>In words</h2>'
              f"{_words(fits, routes, found, jumps)}</section>",
        footer=_footer(fits, command), figures=payload(fits, styles, routes, several, jumps),
        scripts=["scaling.js"], styles=["scaling.css"])


def payload(fits: dict[str, Fit], styles: dict[str, Any], routes: dict[str, list[Approach]],
            several: Families | None, jumps: Mapping[str, Jump]) -> dict[str, Any]:
    """What the charts and the planner are drawn from."""
    smallest = min(float(f.runs.flops.min()) for f in fits.values())
    largest = max(f.largest for f in fits.values())
    budgets = np.geomspace(smallest, largest * 100, 61)
    chances = several.chances(budgets) if several and _drawn(fits) else {}
    first = next(iter(fits.values()))
    return {"metric": "loss" if first.runs.metric == "loss" else first.runs.metric,
            "level": first.level, "smallest": smallest, "largest": largest,
            "budgets": budgets.tolist(), "order": list(fits), "archs": {
                name: {**styles[name], **_arch(f, budgets, routes[name]),
                       "chance": _plain(chances[name]) if name in chances else [],
                       "jump": _jump(jumps[name]) if name in jumps else None}
                for name, f in fits.items()}}


def _arch(f: Fit, budgets: Any, routes: list[Approach]) -> dict[str, Any]:
    runs = f.runs
    best, drawn = f.frontier(budgets)
    frontier: dict[str, Any] = {"flops": budgets.tolist(), "loss": _plain(best)}
    if len(drawn):
        tail = (1 - f.level) / 2
        low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
        frontier |= {"low": _plain(low), "high": _plain(high)}
    shown = []
    for p in profiles(runs):
        sizes = np.geomspace(runs.params[p.rows].min(), runs.params[p.rows].max(), 40)
        product = float(np.exp(np.log(runs.params[p.rows] * runs.tokens[p.rows]).mean()))
        shown.append({"flops": p.flops, "params": runs.params[p.rows].tolist(),
                      "loss": runs.loss[p.rows].tolist(), "curve_params": sizes.tolist(),
                      "curve_loss": np.polyval(p.curve, np.log10(sizes)).tolist(),
                      "law_loss": _plain(f.law.predict(sizes, product / sizes))})
    return {"params": runs.params.tolist(), "tokens": runs.tokens.tolist(),
            "loss": runs.loss.tolist(), "flops": runs.flops.tolist(),
            "residuals": _plain(f.residuals()), "frontier": frontier, "profiles": shown,
            "per_token": f.per_token, "largest": f.largest, "law": _five(f.law),
            "draws": [_five(d) for d in f.draws[:DRAWS]],
            "approaches": [{"name": x.name, "a": _number(x.a), "low": _number(x.low),
                            "high": _number(x.high)} for x in routes]}


def _jump(jump: Jump) -> dict[str, Any]:
    order = np.argsort(jump.scale)
    smooth = jump.found.smooth.predict(jump.scale[order])
    return {"scale": jump.scale[order].tolist(), "exact": jump.exact[order].tolist(),
            "expected": jump.found.expected.tolist(), "nats": jump.nats[order].tolist(),
            "smooth": smooth.tolist()}


def _five(law: Any) -> list[float | None]:
    return [_number(getattr(law, n)) for n in ("E", "A", "B", "alpha", "beta")]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(values: Any) -> list[float | None]:
    return [_number(float(v)) for v in values]


def _drawn(fits: dict[str, Fit]) -> bool:
    return all(f.draws for f in fits.values())


# Words

def _summary(fits: dict[str, Fit], several: Families | None) -> str:
    if several is None:
        name, f = next(iter(fits.items()))
        text = f"The best size grows as C^{f.a:.2f}"
        if f.draws:
            low, high = f.interval("a")
            text += f" (between {low:.2f} and {high:.2f})"
        try:
            best = f.counted(f.law, f.largest)
            text += (f"; at the largest measured budget it is {short(best.params)} parameters on "
                     f"{short(best.tokens)} tokens")
        except ManyformError as error:
            text = str(error)
        return escape(f"{name + ': ' if name else ''}{text}.")
    crossings = several.crossings() if _drawn(fits) else []
    found = [c for c in crossings if c.flops is not None]
    if found:
        return escape(". ".join(crossing_text(c).split(";")[0] for c in found[:3]) + ".")
    largest = max(f.largest for f in fits.values())
    losses = {n: float(f.frontier([largest])[0][0]) for n, f in fits.items()}
    ahead = min(losses, key=lambda n: losses[n])
    return escape(f"At the largest measured budget {ahead} has the least loss, each architecture "
                  "at its best size; the fitted frontiers do not cross within ten times of it.")


def _facts(fits: dict[str, Fit]) -> list[tuple[str, str]]:
    runs = [f.runs for f in fits.values()]
    return [("points", str(sum(len(r) for r in runs))),
            ("runs", str(sum(int(r.clusters.max()) + 1 for r in runs))),
            ("parameters", f"{short(min(r.params.min() for r in runs))} to "
                           f"{short(max(r.params.max() for r in runs))} ({runs[0].convention})"),
            ("tokens", f"{short(min(r.tokens.min() for r in runs))} to "
                       f"{short(max(r.tokens.max() for r in runs))}"),
            ("largest budget", f"{max(r.flops.max() for r in runs):.2g} FLOPs"),
            ("FLOPs", {"given": "as given", "6ND": "6 N D"}.get(runs[0].flops_from, "mixed"))]


def _law(fits: dict[str, Fit], styles: dict[str, Any]) -> str:
    names = ("E", "A", "B", "alpha", "beta", "a")
    head = "".join(f'<th scope="col" class="n">{n}</th>' for n in names)
    body = ""
    for arch, f in fits.items():
        cells = ""
        for n in names:
            text = f"{getattr(f, n):.4g}"
            if f.draws:
                low, high = f.interval(n)
                text += f'<br><span class="none">{low:.3g} to {high:.3g}</span>'
            cells += f'<td class="n">{text}</td>'
        held = "–" if f.held_out is None else (
            f"{100 * f.held_out.error:+.2f}%<br><span class=\"none\">{f.held_out.rows} points, "
            f"{100 * f.held_out.worst:+.2f}% at worst</span>")
        name = f"{swatch(styles[arch])}<span>{escape(arch or 'runs')}</span>"
        body += (f'<tr><th scope="row">{name}</th>{cells}'
                 f'<td class="n">{held}</td><td class="n">{100 * f.sigma:.2g}%</td></tr>')
    top = (f'<tr><th scope="col">L = E + A / N^alpha + B / D^beta</th>{head}'
           '<th scope="col" class="n">held out</th><th scope="col" class="n">scatter</th></tr>')
    return (scrolling("Coefficients", top, body)
            + '<p class="note">Small figures are intervals of the bootstraps. A and B trade off '
            "against the exponents: their digits are not knowledge, the exponents, the optimum and "
            "the loss are. Held out: the largest budgets, predicted by the others.</p>")


def _choice(fits: dict[str, Fit]) -> str:
    if len(fits) == 1:
        return ""
    options = "".join(f'<option value="{escape(n)}">{escape(n)}</option>' for n in fits)
    return f'<label>Architecture <select id="arch">{options}</select></label>'


def _charts(fits: dict[str, Fit], several: Families | None, jumps: Mapping[str, Jump]) -> str:
    charts = [("frontier", "Loss against compute", "Each point a run; the line is the law at the "
               "best size for the compute, the band its interval.", "wide")]
    if any(profiles(f.runs) for f in fits.values()):
        charts.append(("profiles", "IsoFLOP profiles", "Sizes at one budget. Solid: the parabola "
                       "of approach 2; dotted: the law.", ""))
    charts += [("residuals", "Residuals", "What the law leaves; the colour of a point is its size. "
                "A trend would mean that the law is of the wrong form.", ""),
               ("exponents", "Exponents by approach", "Envelope of the curves, isoFLOP "
                "parabolas (plain and corrected for their bias), and the law.", "")]
    if several is not None and _drawn(fits):
        charts.append(("chances", "Which architecture wins", "The share of the bootstraps in which "
                       "each has the least loss, at its best size. Right of the dotted line "
                       "nothing was measured.", ""))
    if jumps:
        length = next(iter(jumps.values())).length
        charts += [("exact", "Exact match", f"The share of {length} tokens in a row that are all "
                    "the most likely ones; the line is p^L with p from the smooth law of the "
                    "chart beside it. Runs stand at the compute whose best model equals them.",
                    ""),
                   ("twin", "Its continuous twin", "Mean nats of a token of the same text, and a "
                    "smooth law through them. A jump is real only if it breaks here too.", "")]
    return "".join(chart(*each) for each in charts)


def _words(fits: dict[str, Fit], routes: dict[str, list[Approach]],
           found: Fit | Families, jumps: Mapping[str, Jump]) -> str:
    out = "" if isinstance(found, Fit) else f"<pre>{escape(families_table(found))}</pre>"
    for name, f in fits.items():
        heading = f"<h3>{escape(name)}</h3>" if name else ""
        out += (f"{heading}<pre>{escape(f.summary())}\n\n{escape(approaches_table(routes[name]))}"
                "</pre>")
        if name in jumps:
            out += f"<p>{escape(jumps[name].found.text)}</p>"
    return out


def _footer(fits: dict[str, Fit], command: str) -> str:
    source = next(iter(fits.values())).runs.source
    return (f"manyform {escape(manyform.__version__)}. Runs: {escape(Path(source).name or source)}."
            + (f" Command: <code>{escape(command)}</code>" if command else ""))
