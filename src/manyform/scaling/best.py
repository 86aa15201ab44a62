"""The best size at a budget, as far as the runs determine it.

A fitted law names a best size everywhere, also where nothing was run. At each budget the runs cover
a range of sizes: those whose parameters, tokens and tokens per parameter lie within the measured
ones (`Fit.covered`). A best size inside is a number with its interval; outside it comes with its
distance; where one of the three is more than ten times outside it is not determined, nor is an
interval's end there, nor any best size beyond the largest budget where that at the largest is not.
The planner of the report (lab/report_assets/scaling.js) does the same arithmetic, and a test holds
the two to the same words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manyform.errors import ManyformError
from manyform.scaling.fit import FAR, Fit, FittedOptimum
from manyform.scaling.laws import Chinchilla, Law, Optimum
from manyform.scaling.table import Array, short

UNKNOWN = "not determined"
Row = tuple[str, str, str]
"""What, its value, its interval ("" where there is none)."""


@dataclass(frozen=True)
class Best:
    """The best model for a budget. law: the fitted law's own. nearest: the nearest to it that the
    runs cover, with its loss. covered: sizes that they cover at this budget. limits: sizes beyond
    which nothing is determined. determined: False where the runs do not say the best size. sizes:
    its interval, cut off at the limits; losses: of the law's model, and of the nearest (None
    without bootstraps). notes: what to know of these numbers, one sentence each."""

    law: Optimum
    nearest: Optimum
    covered: tuple[float, float]
    limits: tuple[float, float]
    determined: bool
    sizes: tuple[float, float] | None
    losses: tuple[tuple[float, float], tuple[float, float]] | None
    notes: tuple[str, ...]

    @property
    def optimum(self) -> FittedOptimum:
        """What to train: the law's best where it is determined, else the nearest covered. An
        interval ends at 0 or infinity where the runs do not determine its end."""
        chosen = self.law if self.determined else self.nearest
        spans: dict[str, tuple[float, float]] = {}
        if self.sizes and self.losses:
            product = chosen.params * chosen.tokens
            low, high = self.sizes
            first = 0.0 if self.open(low) else low
            last = math.inf if self.open(high) else high
            spans = {"params": (first, last),
                     "tokens": (product / last, product / first if first else math.inf),
                     "tokens_per_param": (product / last**2,
                                          product / first**2 if first else math.inf),
                     "loss": self.losses[0 if self.determined else 1]}
        return FittedOptimum(chosen.params, chosen.tokens, chosen.flops, chosen.loss, spans,
                             "; ".join(self.notes))

    def open(self, size: float) -> bool:
        """Whether a size is beyond what the runs can say."""
        return not self.limits[0] * (1 + 1e-9) < size < self.limits[1] * (1 - 1e-9)

    def rows(self) -> list[Row]:
        """The model in words: parameters, tokens, tokens per parameter and loss."""
        product = self.law.params * self.law.tokens
        out = []
        for what, number in (("parameters", lambda n: n), ("tokens", lambda n: product / n),
                             ("tokens per parameter", lambda n: product / n**2)):
            value = short(number(self.law.params)) if self.determined else UNKNOWN
            out.append((what, value, self._span(number)))
        if self.determined:
            out.append(("loss", f"{self.law.loss:.3f}", self._losses(0)))
        if not self.determined or self.nearest != self.law:
            out.append((f"loss nearest to the runs: {short(self.nearest.params)} on "
                        f"{short(self.nearest.tokens)} tokens", f"{self.nearest.loss:.3f}",
                        self._losses(1)))
        return out

    def _span(self, number: Any) -> str:
        if self.sizes is None:
            return ""
        ends = sorted((number(size), self.open(size)) for size in self.sizes)
        words = [f"{prefix if is_open else ''}{short(value)}"
                 for (value, is_open), prefix in zip(ends, ("under ", "over "), strict=True)]
        return " to ".join(words)

    def _losses(self, which: int) -> str:
        return "" if self.losses is None else "{:.3f} to {:.3f}".format(*self.losses[which])


def best(fit: Fit, flops: float) -> Best:
    """The best model for these training FLOPs.

    Raises ManyformError for a budget that is not positive, a law of another form, and, without
    bootstraps, beyond ten times the largest measured budget.
    """
    if not all(isinstance(law, Chinchilla) for law in (fit.law, *fit.draws)):
        raise ManyformError(f"the law {fit.name} has no best size that the runs could determine")
    if not flops > 0 or not math.isfinite(flops):
        raise ManyformError(f"flops must be positive, not {flops!r}")
    if fit.extrapolation(flops) and not fit.draws:
        raise ManyformError(f"{fit.extrapolation(flops)}; a number without an interval is not "
                            "given there: fit with bootstraps")
    found = _found(fit, flops)
    if found.determined and flops > fit.largest and not _found(fit, fit.largest).determined:
        found = replace(found, determined=False)
    return replace(found, notes=tuple(_notes(fit, flops, found)))


def _found(fit: Fit, flops: float) -> Best:
    """What this budget alone says."""
    product = flops / fit.per_token
    low, high = (float(edge[0]) for edge in fit.covered(np.array([product])))
    limits = tuple(float(edge[0]) for edge in fit.covered(np.array([product]), FAR))
    ends = np.log(limits)
    own, *drawn = log_sizes([fit.law, *fit.draws], product)
    size = math.exp(float(np.clip(np.nan_to_num(own, nan=-np.inf), *ends)))
    law = _model(fit.law, size, product, flops)
    nearest = law if low <= size <= high else _model(fit.law, min(max(size, low), high), product,
                                                     flops)
    sizes = losses = None
    kept = np.array([d for d in drawn if not np.isnan(d)])
    if len(kept):
        tails = (1 - fit.level) / 2, (1 + fit.level) / 2
        first, last = np.exp(np.quantile(np.clip(kept, *ends), tails)).tolist()
        sizes = first, last
        at = [np.quantile([d.predict(o.params, o.tokens) for d in fit.draws], tails).tolist()
              for o in (law, nearest)]
        losses = (at[0][0], at[0][1]), (at[1][0], at[1][1])
    found = Best(law, nearest, (low, high), (limits[0], limits[1]), True, sizes, losses, ())
    vague = sizes is not None and found.open(sizes[0]) and found.open(sizes[1])
    return replace(found, determined=not (found.open(size) or vague))


def log_sizes(laws: Any, product: float) -> Array:
    """The logarithm of each law's best size; infinite for one that does not bend."""
    E, A, B, alpha, beta = np.array([[getattr(law, n) for n in ("E", "A", "B", "alpha", "beta")]
                                     for law in laws]).T
    with np.errstate(all="ignore"):
        found: Array = (np.log(alpha * A) - np.log(beta * B) + beta * np.log(product)) \
            / (alpha + beta)
    return found


def _model(law: Law, size: float, product: float, flops: float) -> Optimum:
    return Optimum(size, product / size, flops, float(law.predict(size, product / size)))


def _notes(fit: Fit, flops: float, found: Best) -> list[str]:
    note = budget_note(flops, float(fit.runs.flops.min()), fit.largest)
    out = [note] if note else []
    low, high = found.covered
    if not found.determined:
        out.append(f"the best size at this budget is {UNKNOWN} by these runs; the loss is that of "
                   "the size nearest to them")
    elif found.nearest != found.law:
        size = found.law.params
        far, where = (size / high, "above") if size > high else (low / size, "below")
        scope = "that the runs cover at this budget" if flops <= 1.05 * fit.largest else \
            "of the runs, grown with the budget"
        cover = short(high) if high < 1.05 * low else f"{short(low)} to {short(high)}"
        out.append(f"the best size is {times(far)} times {where} the sizes {scope} ({cover})")
    return out


def budget_note(flops: float, smallest: float, largest: float) -> str:
    """How far a budget lies outside the measured ones; "" inside."""
    if flops > 1.05 * largest:
        far = flops / largest
        return (f"{flops:.3g} FLOPs is {times(far)} times the largest measured budget "
                f"({largest:.3g}): " + ("an extrapolation, good only as far as the law holds there"
                                        if far > FAR * (1 + 1e-9) else "beyond what was measured"))
    if flops < smallest / 1.05:
        return (f"{flops:.3g} FLOPs is {times(smallest / flops)} times below the smallest measured "
                f"budget ({smallest:.3g})")
    return ""


def times(ratio: float) -> str:
    """2.74 -> "2.7", 1234.5 -> "1,234"."""
    return f"{ratio:.2g}" if ratio < 9.95 else f"{ratio:,.0f}"


def budget_for(fit: Fit, loss: float) -> tuple[float, tuple[float, float] | None]:
    """The least FLOPs at which sizes that the runs cover reach this loss, and its interval, whose
    ends are 0 and infinity where bootstraps reach it far outside the measured budgets.

    Raises ManyformError where the fitted law does not reach it below a million times the largest
    measured budget.
    """
    budgets = np.geomspace(fit.runs.flops.min() / FAR, fit.largest * 1e6, 481)
    own, drawn = fit.frontier(budgets)
    where = _first(budgets, own, loss)
    if not math.isfinite(where) or where <= 0:
        why = (f"the law (floor E {fit.E:.4g}) does not reach it below a million times the largest "
               "measured budget" if where else "less than a tenth of the smallest measured budget "
               "reaches it")
        raise ManyformError(f"a loss of {loss:g} is not planned with these runs: {why}")
    try:
        exact = fit.counted(fit.law, loss=loss)
        if budgets[0] <= exact.flops <= budgets[-1]:
            inside = best(fit, exact.flops)
            if inside.determined and inside.nearest == inside.law:
                where = exact.flops
    except ManyformError:  # the law has no such optimum; the covered sizes have
        pass
    if not len(drawn):
        return where, None
    found = np.array([_first(budgets, d, loss) for d in drawn if np.isfinite(d).all()])
    if not len(found):
        return where, None
    order = np.sort(np.where(found > fit.largest * FAR, np.inf, found))
    low, high = (float(order[round(q * (len(order) - 1))])
                 for q in ((1 - fit.level) / 2, (1 + fit.level) / 2))
    return where, (low, high)


def _first(budgets: Array, losses: Array, loss: float) -> float:
    """The first budget at which the loss is reached: 0 where the first has it, infinite if none."""
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return 0.0
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(budgets[i - 1] * (budgets[i] / budgets[i - 1]) ** share)
