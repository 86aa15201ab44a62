"""Fits, comparisons and crossings in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from manyform.errors import ManyformError
from manyform.scaling.identify import WIDE
from manyform.scaling.table import short

if TYPE_CHECKING:
    from manyform.scaling.approaches import Approach
    from manyform.scaling.families import Crossing, Families
    from manyform.scaling.fit import Fit
    from manyform.scaling.laws import Optimum


def summary(fit: Fit) -> str:
    """Several lines of text."""
    runs, law = fit.runs, fit.law
    clusters = int(runs.clusters.max()) + 1
    counted = {"given": "FLOPs as given", "6ND": "FLOPs counted as 6 * params * tokens",
               "mixed": "FLOPs partly given, partly 6 * params * tokens"}[runs.flops_from]
    lines = [
        f"{law.formula}",
        f"{len(runs)} points of {clusters} runs, {short(runs.params.min())} to "
        f"{short(runs.params.max())} parameters ({runs.convention}), "
        f"{short(runs.tokens.min())} to {short(runs.tokens.max())} tokens, {counted}, up to "
        f"{runs.flops.max():.3g}; loss in {_metric(runs.metric)}", ""]
    names = [*law.names(), *(n for n in ("a", "b") if hasattr(type(law), n))]
    words = {"a": "best size ~ C^a", "b": "best tokens ~ C^b"}
    for name in names:
        text = f"  {name:<8}{getattr(fit, name):<12.5g}"
        if fit.draws:
            low, high = fit.interval(name)
            text += f"[{low:.4g}, {high:.4g}]"
        lines.append(f"{text:<46}{words.get(name, '')}".rstrip())
    if fit.draws:
        how = {"pairs": "runs drawn with replacement",
               "noise": "errors drawn anew, for there are few runs"}
        lines.append(f"  {fit.level:.0%} intervals of {len(fit.draws):,} bootstraps "
                     f"({how[fit.resample]})")
    lines += ["", f"Scatter around the law: {100 * fit.sigma:.2g}% of the loss."]
    if fit.held_out:
        h = fit.held_out
        lines.append(f"Held out: {h.rows} points from {h.smallest_held:.3g} FLOPs up, predicted by "
                     f"the others (up to {h.largest_fitted:.3g}): {100 * h.error:+.2f}% on "
                     f"average, {100 * h.worst:+.2f}% at worst.")
    else:
        lines.append("Held out: nothing, for the smaller budgets alone cannot carry the law.")
    if fit.outliers:
        residuals = fit.residuals()
        lines.append(f"{len(fit.outliers)} outliers, farther than 5 robust standard deviations:")
        lines += [f"  row {i + 1}: {runs.name(i)}, loss {runs.loss[i]:.4g}, "
                  f"{100 * np.expm1(residuals[i]):+.1f}%" for i in fit.outliers[:10]]
        if len(fit.outliers) > 10:
            lines.append(f"  and {len(fit.outliers) - 10} more")
        if fit.without_outliers is not None:
            other = fit.without_outliers
            lines.append("  without them: " + ", ".join(
                f"{n} {getattr(other, n):.4g}" for n in names))
    lines += fit.statements()
    return "\n".join(lines)


def _metric(metric: str) -> str:
    return "the table's unit" if metric == "loss" else metric


def approaches_table(found: list[Approach]) -> str:
    """The routes side by side and their spread."""
    from manyform.scaling.approaches import spread
    lines = ["Exponent of the best size, by three routes:"]
    for x in found:
        if not np.isfinite(x.a):
            lines.append(f"  {x.name:<28}none: {x.note}")
            continue
        interval = f"[{x.low:.3f}, {x.high:.3f}]" if np.isfinite(x.low) else ""
        size = f"best size at the middle budget {short(x.reference)}"
        if np.isfinite(x.low_reference):
            size += f" [{short(x.low_reference)}, {short(x.high_reference)}]"
        lines.append(f"  {x.name:<28}{x.a:.3f} {interval:<18}{size}"
                     + (f"; {x.note}" if x.note else ""))
    if sum(np.isfinite(x.a) for x in found) > 1:
        lines.append(f"  spread: {spread(found):.3f}")
    return "\n".join(lines)


def countings_table(found: Mapping[str, Fit]) -> str:
    """The exponent of the best size under each way of counting; "" where the table has one."""
    from manyform.scaling.counting import size_exponent
    if len(found) < 2:
        return ""
    lines = ["The same runs, counted otherwise:"]
    words = {"as given": "total parameters, FLOPs as given",
             "total": "total parameters, FLOPs 6 N D",
             "non-embedding": "non-embedding parameters, FLOPs 6 N D"}
    lines += [f"  {words[name]:<40}best size ~ C^{size_exponent(f):.3f}"
              for name, f in found.items()]
    return "\n".join(lines)


def families_table(found: Families) -> str:
    """Free and shared exponents of several architectures, who is ahead, and where they cross."""
    lines = [exponents_table(found)]
    if len(found.free) > 1 and all(f.draws for f in found.free.values()):
        crossings = found.crossings()
        lines += ["", *headline(found, crossings), *caveats(found, crossings), "",
                  "Which is ahead, each at the best size that its runs cover:"]
        lines += [f"  {crossing_text(c)}" for c in crossings]
    return "\n".join(lines)


def exponents_table(found: Families) -> str:
    """Free and shared exponents of several architectures."""
    wide = max(18, *(len(name) + 1 for name in found.free))
    lines = [f"Several architectures; shared: {', '.join(found.share) or 'nothing'}",
             f"  {'':<{wide}}{'alpha':>7} {'beta':>7} {'a':>7}   | {'shared: A':>10} {'B':>10} "
             f"{'a':>7}"]
    for name, free in found.free.items():
        both = found.shared[name]
        lines.append(f"  {name:<{wide}}{free.alpha:>7.3f} {free.beta:>7.3f} {free.a:>7.3f}   | "
                     f"{both.A:>10.4g} {both.B:>10.4g} {both.a:>7.3f}")
    word = "as well as" if found.evidence >= 0 else "less well than"
    lines.append(f"  Shared, the coefficients explain the runs {word} free ones (BIC "
                 f"{found.evidence:+.1f}).")
    lines += [f"  {name}: no law, for {why}" for name, why in found.refused.items()]
    return "\n".join(lines)


def headline(found: Families, crossings: Sequence[Crossing]) -> list[str]:
    """What several architectures come to, a sentence each: who is ahead at the largest budget that
    was measured for all, its runs without a law, and what crosses within the measured budgets."""
    return [_ahead(found), *_runs(found, crossings), _within(crossings)]


def caveats(found: Families, crossings: Sequence[Crossing]) -> list[str]:
    """What several architectures do not show, a sentence each: crossings where nothing was run, and
    exponents that are not determined."""
    return [*_beyond(crossings), *_exponents(found)]


def _ahead(found: Families) -> str:
    try:
        s = found.standing()
    except ManyformError as error:
        return f"{str(error)[0].upper()}{str(error)[1:]}."
    metric = next(iter(found.free.values())).runs.metric
    unit = "" if metric == "loss" else f" {metric}"
    second = next((n for n in s.losses if n != s.first), None)
    if second is None:
        return f"Only {s.first} has a law at {s.flops:.2g} FLOPs, the largest budget measured."
    text = (f"At {s.flops:.2g} FLOPs, the largest budget measured for all, {{verb}}: "
            f"{s.losses[s.first]:.3f}{unit}, {s.losses[second] - s.losses[s.first]:.3f} below "
            f"{second}")
    if not s.close:
        low, high = s.gaps[second]
        return (text.format(verb=f"{s.first} is ahead") + f" ({low:.3f} to {high:.3f}; chance to "
                f"be ahead of it {chance(s.chance[second])}).")
    rest = [f"{n} ({chance(p)})" for n, p in s.chance.items() if n not in s.close]
    return (text.format(verb=f"{s.first} has the least loss") + ", but the laws cannot tell it "
            f"from {listed([f'{n} (chance to be ahead {chance(s.chance[n])})' for n in s.close])}"
            + (f"; it is ahead of {listed(rest)}" if rest else "") + ".")


def _runs(found: Families, crossings: Sequence[Crossing]) -> list[str]:
    """The runs themselves: the best of each within the budget, and the first against each other
    at the same size and tokens."""
    try:
        s = found.standing()
    except ManyformError:
        return []
    order = sorted(s.runs, key=lambda n: s.runs[n])
    out = ["Without a law, the best run within that budget: "
           f"{listed([f'{n} {s.runs[n]:.3f}' for n in order])}."]
    parts = []
    for c in crossings:
        if s.first in (c.a, c.b) and c.cells:
            other, won = (c.b, c.ahead) if s.first == c.a else (c.a, c.cells - c.ahead)
            parts.append(f"{other} in {won} of {c.cells}")
    if parts:
        out.append(f"At the same size and tokens, run against run, {s.first} is ahead of "
                   f"{listed(parts)}.")
    return out


def _within(crossings: Sequence[Crossing]) -> str:
    sure = [c for c in crossings if c.passes]
    open_ = [c for c in crossings if c.flops is not None and not c.passes]
    if sure:
        some = listed([f"{c.last} passes {c.first} at {c.flops:.2g} FLOPs{_span(c)}"
                       for c in sure])
        return f"Within the measured budgets {some}."
    if open_:
        pairs = f"{len(open_)} pair{'s' if len(open_) > 1 else ''}"
        return (f"Within the measured budgets the fitted laws of {pairs} cross, but the bootstraps "
                "do not settle that one passes the other.")
    return "Within the measured budgets no two cross."


def _beyond(crossings: Sequence[Crossing]) -> list[str]:
    later = [c for c in crossings if c.beyond is not None]
    if not later:
        return []
    some = listed([f"{c.a} and {c.b} at {c.beyond:.2g} FLOPs" for c in later[:3]])
    more = f", and {len(later) - 3} more pairs within ten times the largest" if len(later) > 3 \
        else ""
    return [f"Beyond them, where nothing was run, the laws would cross for {some}{more}: an "
            "extrapolation, not a finding."]


def _exponents(found: Families) -> list[str]:
    spans = {n: f.interval("a") for n, f in found.free.items() if f.draws}
    wide = {n: s for n, s in spans.items() if not s[1] - s[0] <= WIDE}
    if not wide:
        return []
    which = "any architecture" if len(wide) == len(found.free) > 1 else listed(list(wide))
    low, high = min(s[0] for s in wide.values()), max(s[1] for s in wide.values())
    return [f"How the best size grows with compute is not determined for {which}: the exponent's "
            f"intervals reach from {low:.2f} to {high:.2f}."]


def chance(p: float) -> str:
    """A share of bootstraps, never "100%", and never rounded up to a certainty it has not."""
    if p > 0.99:
        return "over 99%"
    if p < 0.01:
        return "under 1%"
    return f"{(math.floor if p > 0.5 else math.ceil)(round(100 * p, 6))}%"


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _span(c: Crossing) -> str:
    return f" [{c.low:.2g}, {c.high:.2g}]" if c.low is not None else ""


def crossing_text(c: Crossing) -> str:
    """Two architectures in one sentence: who is ahead, how surely, and where they cross."""
    if c.smallest > c.largest:
        return f"{c.a} and {c.b}: no budget was measured for both"
    lower = c.b if c.first == c.a else c.a
    other = c.b if c.last == c.a else c.a
    sure = c.chance_high if c.last == c.a else 1 - c.chance_high
    by = f"by {abs(c.gap):.3f} at {c.largest:.2g} FLOPs (chance {chance(sure)})"
    if c.passes:
        text = f"{c.last} passes {c.first} at {c.flops:.2g}{_span(c)} FLOPs and is ahead {by}"
    elif c.sure_high:
        text = f"{c.last} is ahead of {other} {by}"
        if c.sure_low and c.first == c.last and c.flops is None:
            text = f"{c.last} is ahead of {other} throughout, {by}"
        elif not c.sure_low:
            text += "; at the smallest budget the laws cannot tell"
    else:
        text = (f"{c.last} or {other}: the laws cannot tell at {c.largest:.2g} FLOPs (chance that "
                f"{c.last} is ahead {chance(sure)})")
        if c.sure_low:
            text += f"; at {c.smallest:.2g} FLOPs {c.first} is ahead of {lower}"
    if c.flops is not None and not c.passes:
        text += (f"; the fitted laws cross at {c.flops:.2g} FLOPs, {chance(c.crossed)} of the "
                 "bootstraps do within the measured budgets")
    if c.beyond is not None:
        text += (f"; they would cross at {c.beyond:.2g} FLOPs, {c.beyond / c.largest:.1f} times "
                 "the largest budget: an extrapolation")
    if c.cells:
        won = c.ahead if c.last == c.a else c.cells - c.ahead
        text += (f"; run against run at the same size and tokens {c.last} is ahead in {won} of "
                 f"{c.cells}")
    return text


def winners(found: Families, optima: Mapping[str, Optimum], loss: float | None) -> str:
    """Which architecture wins at a planned budget or loss."""
    if loss is not None:
        cheapest = min(optima, key=lambda n: optima[n].flops)
        return "\n".join([f"cheapest way to a loss of {loss:g}: {cheapest}", *(
            f"  {n:<18}{o.flops / optima[cheapest].flops:.2f} times its FLOPs"
            for n, o in optima.items())])
    budget = next(iter(optima.values())).flops
    chances = found.chances([budget])
    return "\n".join([f"chance to have the least loss at {budget:.3g} FLOPs:", *(
        f"  {n:<18}{chance(float(c[0]))}" for n, c in chances.items())])


def history_table() -> str:
    """GPT-3, Gopher and Chinchilla under each published rule."""
    from manyform.scaling.planning import HISTORY, history
    lines = []
    for model, (params, tokens) in HISTORY.items():
        lines.append(f"{model}: {short(params)} parameters on {short(tokens)} tokens, "
                     f"{6 * params * tokens:.3g} FLOPs")
        for v in (v for v in history() if v.model == model):
            if abs(np.log(v.too_large)) < np.log(1.1):
                verdict = "as it was"
            elif v.too_large > 1:
                verdict = (f"{v.too_large:.1f} times too large, {v.too_little:.1f} times too few "
                           "tokens")
            else:
                verdict = (f"{1 / v.too_large:.1f} times too small, {1 / v.too_little:.1f} times "
                           "too many tokens")
            lines.append(f"  {v.rule:<18}{short(v.params):<8} on {short(v.tokens):<8} -> {verdict}")
    return "\n".join(lines)
