"""The scaling report: one HTML file with the law, its intervals, its charts and a planner.

It stands in the same frame as the comparison's report (`lab.frame`); the charts and the planner are
drawn by report_assets/scaling.js from the runs, the laws and the bootstraps embedded in the page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import manyform
from manyform.errors import ManyformError
from manyform.lab.frame import asset, chart, chip, escape, fill, looks, scrolling, swatch
from manyform.lab.tasks import write_atomically
from manyform.scaling.approaches import Approach, compare, profiles
from manyform.scaling.best import best
from manyform.scaling.emergence import Emergence
from manyform.scaling.families import Crossing, Families
from manyform.scaling.fit import FAR, Fit
from manyform.scaling.laws import Chinchilla
from manyform.scaling.summary import (
    approaches_table,
    caveats,
    chance,
    exponents_table,
    headline,
)
from manyform.scaling.table import Array, short

LOOSE = 100.0
"""An interval whose ends are so many times apart has no digits worth printing."""


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
                 jumps: Mapping[str, Jump] | None = None, notes: Sequence[str] = ()) -> Path:
    """Write the page for a fit, or for several architectures, to `path` (a file).

    jumps: an accuracy-like figure by architecture, drawn beside its continuous twin. notes: what to
    know of the runs, a sentence each. Raises ManyformError where a law is not of parameters and
    tokens (chinchilla, overtraining).
    """
    target = Path(path)
    if target.is_dir():
        target = target / "scaling.html"
    write_atomically(target, page(found, title=title, command=command, jumps=jumps, notes=notes))
    return target


def page(found: Fit | Families, *, title: str = "", command: str = "",
         jumps: Mapping[str, Jump] | None = None, notes: Sequence[str] = ()) -> str:
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
    crossings, said, warned = [], [_alone(fits)], list(notes)
    first = next(iter(fits))
    if several is not None and _drawn(fits):
        crossings = several.crossings()
        said = headline(several, crossings)
        warned = [*caveats(several, crossings), *notes]
        if several.common[0] <= several.common[1]:
            first = several.standing().first
    planner = asset("planner.html").replace("{{choice}}", _choice(fits, first)).replace(
        "{{level}}", f"{next(iter(fits.values())).level:.0%}")
    ahead = _pairs(crossings, styles, several) if several is not None and crossings else ""
    sections = {"ahead": "Who is ahead"} if ahead else {}
    return fill(
        kind="scaling", title=title or "Scaling law",
        question=title or "How does the loss fall with compute?", summary=_named(said[0], fits),
        notice="".join(f'<p class="said">{_named(n, fits)}</p>' for n in said[1:]) + (
            f'<div class="notice">{"".join(f"<p>{_named(n, fits)}</p>" for n in warned)}</div>'
            if warned else ""),
        facts=_facts(fits), sections=sections | {"law": "Law", "plan": "Planner",
                                                 "charts": "Charts", "words": "In words"},
        before=f'{ahead}<section id="law"><h2>The law</h2>{_law(fits, styles)}</section>\n'
               f"{planner}",
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
    budgets = np.geomspace(smallest, largest * FAR, 61)
    chances = several.chances(budgets) if several and _drawn(fits) else {}
    first = next(iter(fits.values()))
    return {"metric": "loss" if first.runs.metric == "loss" else first.runs.metric,
            "level": first.level, "smallest": smallest, "largest": largest, "far": FAR,
            "common": several.common[1] if several else largest,
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
            "per_token": f.per_token, "smallest": float(runs.flops.min()), "largest": f.largest,
            "law": _five(f.law), "draws": [_five(d, 9) for d in f.draws],
            "approaches": [{"name": x.name, "a": _number(x.a), "low": _number(x.low),
                            "high": _number(x.high)} for x in routes]}


def _jump(jump: Jump) -> dict[str, Any]:
    order = np.argsort(jump.scale)
    smooth = jump.found.smooth.predict(jump.scale[order])
    return {"scale": jump.scale[order].tolist(), "exact": jump.exact[order].tolist(),
            "expected": jump.found.expected.tolist(), "nats": jump.nats[order].tolist(),
            "smooth": smooth.tolist()}


def _five(law: Any, digits: int = 17) -> list[float | None]:
    """The coefficients; so many digits of them, for a page holds a thousand bootstraps."""
    return [_number(float(f"{getattr(law, n):.{digits}g}"))
            for n in ("E", "A", "B", "alpha", "beta")]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(values: Any) -> list[float | None]:
    return [_number(float(v)) for v in values]


def _drawn(fits: dict[str, Fit]) -> bool:
    return all(f.draws for f in fits.values())


# Words

def _named(text: str, fits: dict[str, Fit]) -> str:
    """Markup of a sentence, in which the names of architectures stand out."""
    names = sorted(filter(None, (escape(n) for n in fits)), key=len, reverse=True)
    if not names:
        return escape(text)
    found = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)")
    return found.sub(r'<b class="arch">\1</b>', escape(text))


def _alone(fits: dict[str, Fit]) -> str:
    """One law, or several without bootstraps, in a sentence."""
    if len(fits) > 1:
        high = min(f.largest for f in fits.values())
        losses = {n: float(f.frontier([high])[0][0]) for n, f in fits.items()}
        ahead = min(losses, key=lambda n: losses[n])
        return (f"At {high:.2g} FLOPs {ahead} has the least loss, {losses[ahead]:.3f}; without "
                "bootstraps nothing says how surely.")
    name, f = next(iter(fits.items()))
    text = f"{name + ': ' if name else ''}The best size grows as C^{f.a:.2f}"
    if f.draws:
        low, high = f.interval("a")
        text += f" (between {low:.2f} and {high:.2f})"
    found = best(f, f.largest)
    if not found.determined:
        return (f"{text}; at the largest measured budget, {f.largest:.2g} FLOPs, it is not "
                "determined by these runs.")
    o = found.optimum
    return (f"{text}; at the largest measured budget, {f.largest:.2g} FLOPs, it is "
            f"{short(o.params)} parameters on {short(o.tokens)} tokens.")


def _pairs(crossings: Sequence[Crossing], styles: dict[str, Any], several: Families) -> str:
    """Each two architectures over the budgets that were measured for both, by who is ahead."""
    high = several.common[1]
    losses = {n: float(own[0]) for n, (own, _) in several.frontiers([high]).items()}
    rank = {n: i for i, n in enumerate(sorted(losses, key=lambda n: losses[n]))}
    paired = any(c.cells for c in crossings)
    body = "".join(_pair(c, styles, paired) for c in sorted(
        crossings, key=lambda c: sorted((rank[c.a], rank[c.b]))))
    heads = ('<tr><th scope="col">lower loss</th><th scope="col">chance</th>'
             '<th scope="col" class="n">by (90% interval)</th>'
             '<th scope="col" class="n">at FLOPs</th><th scope="col">the laws cross, FLOPs</th>'
             + ('<th scope="col" class="n">run against run</th>' if paired else "") + "</tr>")
    last = (" Run against run: at the same size and tokens, without a law, how often the first has "
            "the lower loss." if paired else "")
    return ('<section id="ahead"><h2>Who is ahead</h2><p class="note">At the same training FLOPs, '
            "at the largest budget that was measured for both, each at the best size that its runs "
            "cover. Chance: the share of the laws’ bootstraps; between 5% and 95% they cannot tell."
            f'{last}</p>{scrolling("Who is ahead", heads, body)}</section>')


def _pair(c: Crossing, styles: dict[str, Any], paired: bool) -> str:
    other = c.b if c.last == c.a else c.a
    if c.smallest > c.largest:
        cells = "<td>no budget was measured for both</td><td></td><td></td><td></td>"
    else:
        sure = c.chance_high if c.last == c.a else 1 - c.chance_high
        low, high = sorted((c.gap_low, c.gap_high) if c.last == c.b else
                           (-c.gap_low, -c.gap_high))
        where = "no" if c.flops is None else f"at {c.flops:.2g}" + ("" if c.passes else
                                                                    ", not settled")
        if c.passes and c.low is not None:
            where += f'<br><span class="none">{c.low:.2g} to {c.high:.2g}</span>'
        if c.beyond is not None:
            where += (f'<br><span class="none">extrapolated: {c.beyond:.2g}, '
                      f"{c.beyond / c.largest:.1f} times the largest</span>")
        tag, verdict = ("shown", "") if c.sure_high else ("tie", ": cannot tell")
        cells = (f'<td><span class="tag {tag}">{chance(sure)}{verdict}</span></td>'
                 f'<td class="n">{abs(c.gap):.3f}<br><span class="none">{low:.3f} to {high:.3f}'
                 f'</span></td><td class="n">{c.largest:.2g}</td><td>{where}</td>')
    if paired:
        count = c.ahead if c.last == c.a else c.cells - c.ahead
        cells += f'<td class="n">{f"{count} of {c.cells}" if c.cells else "–"}</td>'
    return (f'<tr><th scope="row" class="pair">{swatch(styles[c.last])}{escape(c.last)}<br>'
            f'<span class="none">over</span> {swatch(styles[other])}{escape(other)}</th>{cells}'
            "</tr>")


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
    names = {"E": "floor", "A": "of size", "B": "of tokens", "alpha": "size exponent",
             "beta": "token exponent", "a": "best size ~ C^a"}
    head = "".join(f'<th scope="col" class="n">{n}<br>{words}</th>' for n, words in names.items())
    body = ""
    for arch, f in fits.items():
        cells = ""
        for n in names:
            text = f"{getattr(f, n):.3g}"
            if f.draws:
                low, high = f.interval(n)
                loose = n != "E" and n != "a" and not high < LOOSE * low
                span = "not determined" if loose else f"{short(low)} to {short(high)}"
                text += f'<br><span class="none">{span}</span>'
            cells += f'<td class="n">{text}</td>'
        held = "–" if f.held_out is None else (
            f"{100 * f.held_out.error:+.1f}%<br><span class=\"none\">worst "
            f"{100 * f.held_out.worst:+.1f}%</span>")
        name = f"{swatch(styles[arch])}<span>{escape(arch or 'runs')}</span>"
        body += (f'<tr><th scope="row">{name}</th>{cells}'
                 f'<td class="n">{held}</td><td class="n">{100 * f.sigma:.1g}%</td></tr>')
    top = (f'<tr><th scope="col"></th>{head}'
           '<th scope="col" class="n">held out</th><th scope="col" class="n">scatter</th></tr>')
    level = f"{next(iter(fits.values())).level:.0%}"
    return ('<p class="note">L = E + A / N^alpha + B / D^beta: the loss of N parameters trained on '
            "D tokens. Below each figure its "
            f"{level} interval over the bootstraps; “not determined” where its ends are more than "
            f"{LOOSE:.0f} times apart. A and B trade off against the exponents, so read the "
            "exponents, the optimum and the loss. Held out: the runs of the largest budgets, "
            "predicted by a law of the others. Scatter: of the runs around the law.</p>"
            + scrolling("Coefficients", top, body))


def _choice(fits: dict[str, Fit], first: str) -> str:
    if len(fits) == 1:
        return ""
    options = "".join(f'<option value="{escape(n)}"{" selected" if n == first else ""}>'
                      f"{escape(n)}</option>" for n in fits)
    return f'<label>Architecture <select id="arch">{options}</select></label>'


def _charts(fits: dict[str, Fit], several: Families | None, jumps: Mapping[str, Jump]) -> str:
    charts = [("frontier", "Loss against compute", "Each point a run; the line is the law at the "
               "best size that the runs cover at the compute, the band its interval. In the shaded "
               "part, up to ten times the largest budget, nothing was run.", "wide")]
    if any(profiles(f.runs) for f in fits.values()):
        charts.append(("profiles", "IsoFLOP profiles", "Sizes at one budget. Solid: the parabola "
                       "of approach 2; dotted: the law.", ""))
    charts += [("residuals", "Residuals", "How far each run lies from its law; a larger mark is a "
                "larger model. A trend would mean that the law is of the wrong form.", ""),
               ("exponents", "How the best size grows", "Exponent a of the best size, C^a, with "
                "its interval, by each approach that the runs allow (1 envelope of the curves, 2 "
                "isoFLOP parabolas, 3 the fitted law). A long bar: not determined.", "")]
    if several is not None and _drawn(fits):
        charts.append(("chances", "Which architecture wins", "The share of the bootstraps in which "
                       "each has the least loss, at the best size that its runs cover. In the "
                       "shaded part not all of them were run.", ""))
    if jumps:
        length = next(iter(jumps.values())).length
        absent = [n for n in fits if n not in jumps]
        missing = "" if not absent else (
            f" Not here: {', '.join(absent)}, whose law gives the runs no such compute near the "
            "measured budgets.")
        charts += [("exact", "Exact match", f"The share of {length} tokens in a row that are all "
                    "the most likely ones; the line is p^L with p from the smooth law of the "
                    "chart beside it. Runs stand at the compute whose best model equals them."
                    + missing, ""),
                   ("twin", "Its continuous twin", "Mean nats of a token of the same text, and a "
                    "smooth law through them. A jump is real only if it breaks here too.", "")]
    return "".join(chart(*each) for each in charts)


def _words(fits: dict[str, Fit], routes: dict[str, list[Approach]],
           found: Fit | Families, jumps: Mapping[str, Jump]) -> str:
    out = "" if isinstance(found, Fit) else f"<pre>{escape(exponents_table(found))}</pre>"
    for name, f in fits.items():
        text = f"<pre>{escape(f.summary())}\n\n{escape(approaches_table(routes[name]))}</pre>"
        if name in jumps:
            text += f"<p>{escape(jumps[name].found.text)}</p>"
        out += text if len(fits) == 1 else (
            f'<details class="each"><summary>The law of {escape(name)} in full</summary>{text}'
            "</details>")
    return out


def _footer(fits: dict[str, Fit], command: str) -> str:
    source = next(iter(fits.values())).runs.source
    return (f"manyform {escape(manyform.__version__)}. Runs: {escape(Path(source).name or source)}."
            + (f" Command: <code>{escape(command)}</code>" if command else ""))
