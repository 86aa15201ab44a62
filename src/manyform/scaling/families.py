"""Several architectures: a law for each, laws that share exponents, and which wins where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manyform.errors import ManyformError, unknown
from manyform.scaling.fit import Fit, fit, require
from manyform.scaling.forms import ChinchillaForm
from manyform.scaling.laws import Chinchilla
from manyform.scaling.numerics import DELTA, huber, settle
from manyform.scaling.resample import choose, replicates
from manyform.scaling.table import Array, Runs, load

COEFFICIENTS = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True, eq=False)
class Families:
    """Laws of several architectures over one table.

    free: each fitted alone. shared: all fitted together with the coefficients in `share` one for
    all (separate laws are ill-conditioned where runs are few: what differs is then read from what
    is left). refused: why an architecture has no law of its own. evidence: BIC of the free laws
    minus BIC of the shared ones, for errors with an absolute-value law; above zero the shared
    coefficients explain the table as well as the free ones do.
    """

    free: dict[str, Fit]
    shared: dict[str, Fit]
    share: tuple[str, ...]
    refused: dict[str, str]
    evidence: float

    def frontiers(self, budgets: Any, *, shared: bool = False) -> dict[str, tuple[Array, Array]]:
        """For each architecture the least loss at each budget, and that of each bootstrap."""
        fits = self.shared if shared else self.free
        return {name: f.frontier(budgets) for name, f in fits.items()}

    def chances(self, budgets: Any, *, shared: bool = False) -> dict[str, Array]:
        """The share of the bootstraps in which each architecture has the least loss (m,)."""
        drawn = {n: d for n, (_, d) in self.frontiers(budgets, shared=shared).items()}
        return chances(drawn)

    def crossings(self, *, shared: bool = False, reach: float = 10.0) -> list[Crossing]:
        """Each two architectures over compute; see `crossing`."""
        fits = self.shared if shared else self.free
        names = list(fits)
        return [crossing(fits[a], fits[b], a, b, reach=reach)
                for i, a in enumerate(names) for b in names[i + 1:]]

    @property
    def common(self) -> tuple[float, float]:
        """The smallest and the largest budget that were measured for every architecture."""
        return (max(float(f.runs.flops.min()) for f in self.free.values()),
                min(f.largest for f in self.free.values()))

    def standing(self) -> Standing:
        """Who is ahead at the largest budget that was measured for every architecture.

        Raises ManyformError without bootstraps, and where no budget was measured for all.
        """
        low, high = self.common
        if low > high:
            raise ManyformError("no budget was measured for every architecture: one begins at "
                                f"{low:.3g} FLOPs where another ends at {high:.3g}")
        found = self.frontiers([high])
        drawn = {n: d[:, 0] for n, (_, d) in found.items()}
        losses = {n: float(own[0]) for n, (own, _) in found.items() if np.isfinite(own[0])}
        order = sorted(losses, key=lambda n: losses[n])
        if not order:
            raise ManyformError("no law has a frontier at the largest measured budget")
        behind = {n: _gap(drawn[order[0]], drawn[n]) for n in order[1:]}
        best = chances({n: d[:, None] for n, d in drawn.items()})
        return Standing(high, {n: losses[n] for n in order}, {n: g[0] for n, g in behind.items()},
                        {n: (g[1], g[2]) for n, g in behind.items()},
                        {n: float(c[0]) for n, c in best.items()},
                        {n: float(f.runs.loss[f.runs.flops <= high * 1.001].min())
                         for n, f in self.free.items()})


SURE = 0.95
"""A chance from which on the laws tell who is ahead; between 1 - SURE and SURE they do not. Gaps
have the interval whose ends are exceeded with these chances."""


@dataclass(frozen=True)
class Standing:
    """Architectures at one budget, each at the best size that its runs cover. losses: by the laws,
    the least first. chance: for each but the first, of the bootstraps in which the first is ahead
    of it; gaps: interval of its loss above the first's. best: the chance to have the least loss.
    runs: the least loss of a run within the budget, without a law."""

    flops: float
    losses: dict[str, float]
    chance: dict[str, float]
    gaps: dict[str, tuple[float, float]]
    best: dict[str, float]
    runs: dict[str, float]

    @property
    def first(self) -> str:
        return next(iter(self.losses))

    @property
    def close(self) -> list[str]:
        """Those that the laws cannot tell from the first."""
        return [n for n, p in self.chance.items() if not p >= SURE]


@dataclass(frozen=True)
class Crossing:
    """Two architectures over compute, each at the best size that its runs cover.

    smallest, largest: budgets that were measured for both (smallest > largest: none was).
    flops: where the fitted frontiers cross last between them, None where they do not; low, high:
    the middle 95% of the bootstraps' crossings there (None below 20 of them); crossed: the share of
    the bootstraps that cross there. beyond: where they cross next up to `reach` times the largest,
    an extrapolation, or None. first, last: who is ahead at the smallest and at the largest;
    chance_low, chance_high: the chance that `a` is ahead there. gap: loss of `a` minus that of `b`
    at the largest, with its interval. cells, ahead: pairs of runs of one size and one number of
    tokens, and in how many `a` has the lower loss; no law is behind these.
    """

    a: str
    b: str
    smallest: float
    largest: float
    flops: float | None
    low: float | None
    high: float | None
    crossed: float
    beyond: float | None
    first: str
    last: str
    chance_low: float
    chance_high: float
    gap: float
    gap_low: float
    gap_high: float
    cells: int
    ahead: int

    @property
    def sure_low(self) -> bool:
        """Whether the laws tell who is ahead at the smallest budget."""
        return not 1 - SURE < self.chance_low < SURE

    @property
    def sure_high(self) -> bool:
        """Whether the laws tell who is ahead at the largest budget."""
        return not 1 - SURE < self.chance_high < SURE

    @property
    def passes(self) -> bool:
        """Whether the laws show, surely, one passing the other."""
        return self.flops is not None and self.sure_low and self.sure_high \
            and self.first != self.last


def fit_archs(data: Any, *, share: Sequence[str] = ("E", "alpha", "beta"), bootstraps: int = 1000,
              level: float = 0.95, resample: str = "auto", seed: int = 0, delta: float = DELTA,
              **table: Any) -> Families:
    """Fit Chinchilla's law to each architecture of a table alone, and to all with `share` shared.

    data, table: see `manyform.scaling.load`. share: of E, A, B, alpha, beta; the floor E is the
    text's, so by default it is shared with the exponents and only A and B are an architecture's.
    The rest is as in `fit`. Raises ManyformError where no architecture has runs enough.
    """
    for name in share:
        if name not in COEFFICIENTS:
            raise unknown("coefficient", name, COEFFICIENTS)
    runs = load(data, **table)
    free: dict[str, Fit] = {}
    refused: dict[str, str] = {}
    for name in runs.archs:
        try:
            free[name] = fit(runs.take(runs.arch == name), bootstraps=bootstraps, level=level,
                             resample=resample, seed=seed, delta=delta)
        except ManyformError as error:
            refused[name] = str(error)
    if not free:
        raise ManyformError("no architecture has a law: " + "; ".join(
            f"{n}: {e}" for n, e in refused.items()))
    kept = runs.take(np.isin(runs.arch, list(free)))
    shared = _shared(kept, tuple(share), bootstraps, level, resample, seed, delta, free)
    return Families(free, shared, tuple(share), refused, _evidence(free, shared, share))


def _shared(runs: Runs, share: tuple[str, ...], bootstraps: int, level: float, resample: str,
            seed: int, delta: float, free: dict[str, Fit]) -> dict[str, Fit]:
    form = ChinchillaForm(runs, share=share)
    y, ones = np.log(runs.loss), np.ones(len(runs))
    theta, _ = min((settle(form.value, form.bounds, y, ones, s, delta=delta)
                    for s in form.starts(runs.loss, ones)), key=lambda f: f[1])
    method = choose(resample, runs)
    thetas = replicates(form, theta, runs, bootstraps, method, seed, delta)
    out = {}
    for k, name in enumerate(form.archs):
        law = form.law_of(theta, k)
        mine = free[name].runs
        r = np.log(mine.loss / law.predict(mine.params, mine.tokens))
        out[name] = replace(
            free[name], law=law, draws=tuple(form.law_of(t, k) for t in thetas), resample=method,
            sigma=1.4826 * float(np.median(np.abs(r - np.median(r)))),
            objective=float(huber(r, delta).sum()), without_outliers=None, held_out=None)
    return out


def _evidence(free: dict[str, Fit], shared: dict[str, Fit], share: Sequence[str]) -> float:
    n = sum(len(f.runs) for f in free.values())
    few = 5 * len(free) - len(share) * (len(free) - 1)

    def bic(fits: dict[str, Fit], coefficients: int) -> float:
        size = sum(float(np.abs(f.residuals()).sum()) for f in fits.values()) / n
        return 2 * n * float(np.log(max(size, 1e-12))) + coefficients * float(np.log(n))

    return bic(free, 5 * len(free)) - bic(shared, few)


def chances(drawn: dict[str, Array]) -> dict[str, Array]:
    """drawn: losses (draws, budgets) by name -> the share of draws in which each is the least.
    Draws of different architectures are independent, so they are paired as they come."""
    count = min(len(d) for d in drawn.values())
    if not count:
        raise ManyformError("chances need bootstraps")
    losses = np.stack([d[:count] for d in drawn.values()])
    whole = np.isfinite(losses).all(0)
    best = np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=0)
    total = np.maximum(whole.sum(0), 1)
    return {name: ((best == i) & whole).sum(0) / total for i, name in enumerate(drawn)}


def crossing(first: Fit, second: Fit, a: str = "a", b: str = "b", *, reach: float = 10.0,
             ) -> Crossing:
    """Who is ahead of two laws between the smallest and the largest budget that were measured for
    both, where their frontiers cross there, and where next up to `reach` times the largest."""
    for fitted in (first, second):
        require(fitted.runs, "chinchilla")
        if not isinstance(fitted.law, Chinchilla):
            raise ManyformError("crossings are of laws of parameters and tokens (chinchilla)")
    low = max(float(first.runs.flops.min()), float(second.runs.flops.min()))
    high = min(first.largest, second.largest)
    inside = np.geomspace(low, high, 161)
    budgets = np.concatenate([inside, high * np.geomspace(1, reach, 81)[1:]])
    (best_a, drawn_a), (best_b, drawn_b) = first.frontier(budgets), second.frontier(budgets)
    count = min(len(drawn_a), len(drawn_b))
    with np.errstate(invalid="ignore"):
        gaps, own = drawn_a[:count] - drawn_b[:count], best_a - best_b
    gaps = gaps[np.isfinite(gaps).all(1)]
    last = len(inside) - 1
    found = np.array([_zero(inside, g[:last + 1], last=True) for g in gaps])
    crossed = np.isfinite(found)
    within: tuple[float | None, float | None] = (None, None)
    if crossed.sum() >= 20:
        lower, upper = np.quantile(found[crossed], [0.025, 0.975])
        within = (float(lower), float(upper))
    at, after = _zero(inside, own[:last + 1], last=True), _zero(budgets[last:], own[last:])
    spread = np.quantile(gaps[:, last], [1 - SURE, SURE]) if len(gaps) else (np.nan, np.nan)
    return Crossing(
        a, b, low, high, _known(at), within[0], within[1],
        float(crossed.mean()) if len(gaps) else float("nan"), _known(after),
        a if own[0] <= 0 else b, a if own[last] <= 0 else b,
        float((gaps[:, 0] < 0).mean()) if len(gaps) else float("nan"),
        float((gaps[:, last] < 0).mean()) if len(gaps) else float("nan"),
        float(own[last]), float(spread[0]), float(spread[1]), *paired(first.runs, second.runs))


def paired(first: Runs, second: Runs) -> tuple[int, int]:
    """Cells of one size (within 10%) and one number of tokens (within 2%) that both have, and in
    how many `first` has the lower loss; several runs of a cell are averaged."""
    cells = ahead = 0
    seen: set[tuple[int, ...]] = set()
    for n, d in zip(first.params, first.tokens, strict=True):
        mine, other = (np.flatnonzero((np.abs(r.params / n - 1) < 0.1)
                                      & (np.abs(r.tokens / d - 1) < 0.02)) for r in (first, second))
        if tuple(mine) in seen or not len(other):
            continue
        seen.add(tuple(mine))
        cells += 1
        ahead += bool(first.loss[mine].mean() < second.loss[other].mean())
    return cells, ahead


def _gap(first: Array, other: Array) -> tuple[float, float, float]:
    """The chance that `first` is below `other`, and the interval of other - first."""
    count = min(len(first), len(other))
    gaps = other[:count] - first[:count]
    gaps = gaps[np.isfinite(gaps)]
    if not len(gaps):
        return float("nan"), float("nan"), float("nan")
    low, high = np.quantile(gaps, [1 - SURE, SURE])
    return float((gaps > 0).mean()), float(low), float(high)


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _zero(budgets: Array, gap: Array, *, last: bool = False) -> float:
    """The first (or the last) budget at which the gap changes its sign, NaN where it never does."""
    change = np.flatnonzero(np.diff(np.sign(gap)) != 0)
    if not len(change):
        return float("nan")
    i = int(change[-1 if last else 0])
    share = gap[i] / (gap[i] - gap[i + 1])
    return float(np.exp(np.log(budgets[i]) + share * np.log(budgets[i + 1] / budgets[i])))
