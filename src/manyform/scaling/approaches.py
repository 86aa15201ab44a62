"""The best size by three routes side by side: where they disagree, none of them is sure.

1  the envelope of the training curves (Hoffmann 2022, section 3.1)
2  the minima of parabolas through isoFLOP profiles (section 3.2)
3  the fitted law (section 3.3)

A parabola is not the law's profile: where alpha and beta differ, approach 2 is off even without
noise (arXiv 2603.22339). The law says by how much, on the very same runs, so the corrected figure
stands beside the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manyform.errors import ManyformError
from manyform.scaling.fit import Fit
from manyform.scaling.laws import Chinchilla
from manyform.scaling.table import Array, Runs

REPLICATES = 200
Rows = NDArray[np.signedinteger]


@dataclass(frozen=True, eq=False)
class Approach:
    """One route. name: in words. a, low, high: the exponent of the best size and its interval (NaN
    where it cannot be had; `note` says why). flops, params: the points that it rests on, the best
    size at each budget. reference: the best size at the middle budget of the table, low_reference
    and high_reference its interval."""

    name: str
    a: float
    low: float
    high: float
    flops: Array
    params: Array
    reference: float
    low_reference: float
    high_reference: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class Profile:
    """An isoFLOP profile: rows of the table near one budget. curve: coefficients of the parabola
    in log10 N, highest power first. best: the size at its minimum, NaN where that lies outside."""

    flops: float
    rows: Rows
    curve: Array
    best: float


def compare(fit: Fit, *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0,
            ) -> list[Approach]:
    """All routes over the runs of a fit; those that the table does not allow say so."""
    runs = fit.runs
    middle = float(np.exp(np.log(runs.flops).mean()))
    law = fit.law if isinstance(fit.law, Chinchilla) else None
    routes: list[tuple[str, Callable[[Runs], tuple[Array, Array]]]] = [
        ("1: envelope of the curves", envelope), ("2: isoFLOP parabolas", parabolas)]
    if law is not None:
        routes.append(("2, corrected by the law", lambda r: corrected(r, law)))
    out = []
    random = np.random.default_rng(seed)
    clusters = runs.clusters
    count = int(clusters.max()) + 1
    members = [np.flatnonzero(clusters == c) for c in range(count)]
    draws = [np.concatenate([members[c] for c in random.integers(0, count, count)])
             for _ in range(replicates)]
    for name, route in routes:
        try:
            flops, params = route(runs)
        except ManyformError as error:
            nothing, none = np.nan, np.empty(0)
            out.append(Approach(name, nothing, nothing, nothing, none, none, nothing, nothing,
                                nothing, str(error)))
            continue
        lines = [line(flops, params)]
        for rows in draws:
            try:
                lines.append(line(*route(_apart(runs.take(rows)))))
            except ManyformError:
                continue
        exponents = np.array([k[0] for k in lines])
        sizes = np.array([np.exp(k[0] * np.log(middle) + k[1]) for k in lines])
        note = "" if len(lines) > 0.9 * replicates else (
            f"{1 - (len(lines) - 1) / replicates:.0%} of the resampled tables allow no such fit: "
            "the interval is too narrow")
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(exponents[1:], tails) if len(lines) > 20 else (np.nan, np.nan)
        low_size, high_size = np.quantile(sizes[1:], tails) if len(lines) > 20 else (np.nan, np.nan)
        out.append(Approach(name, float(exponents[0]), float(low), float(high), flops, params,
                            float(sizes[0]), float(low_size), float(high_size), note))
    out.append(_by_law(fit, middle, level))
    return out


def _by_law(fit: Fit, middle: float, level: float) -> Approach:
    name = "3: the fitted law"
    interval = fit.interval("a", level) if fit.draws else (np.nan, np.nan)
    grid = np.geomspace(fit.runs.flops.min(), fit.runs.flops.max(), 20)
    try:
        best = fit.optimal(flops=middle)
        sizes = [fit.counted(fit.law, float(c)).params for c in grid]
    except ManyformError as error:
        return Approach(name, np.nan, np.nan, np.nan, np.empty(0), np.empty(0), np.nan, np.nan,
                        np.nan, str(error))
    return Approach(name, fit.a, *interval, grid, np.array(sizes), best.params,
                    *best.intervals.get("params", (np.nan, np.nan)))


def spread(approaches: list[Approach]) -> float:
    """The largest exponent minus the smallest, over the routes that gave one."""
    exponents = [x.a for x in approaches if np.isfinite(x.a)]
    return max(exponents) - min(exponents)


def envelope(runs: Runs) -> tuple[Array, Array]:
    """Budgets and the size that has the least loss there, where smaller and larger ones lose.

    With curves (runs of three points or more) they are interpolated at 200 budgets; with single
    points the lower convex hull of loss against compute is taken. Raises ManyformError where fewer
    than three sizes ever lead.
    """
    clusters = runs.clusters
    curves = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    curves = [r[np.argsort(runs.flops[r])] for r in curves if len(r) >= 3]
    if len(curves) >= 3:
        budgets, sizes = _lead(runs, curves)
    else:
        rows = _hull(np.log(runs.flops), np.log(runs.loss))
        rows = rows[(runs.params[rows] > runs.params.min())
                    & (runs.params[rows] < runs.params.max())]
        budgets, sizes = runs.flops[rows], runs.params[rows]
    if len(np.unique(sizes)) < 3:
        raise ManyformError("fewer than three sizes are ever the best between smaller and larger "
                            "ones")
    return budgets, sizes


def _lead(runs: Runs, curves: list[Rows]) -> tuple[Array, Array]:
    budgets = np.geomspace(runs.flops.min(), runs.flops.max(), 200)
    at = np.log(budgets)
    losses = np.stack([np.interp(at, np.log(runs.flops[r]), np.log(runs.loss[r]), left=np.inf,
                                 right=np.inf) for r in curves])
    size = np.array([runs.params[r[0]] for r in curves])
    covered = np.isfinite(losses)
    winner = size[np.argmin(losses, axis=0)]
    between = np.array([
        c.any() and size[c].min() < w < size[c].max()
        for c, w in zip(covered.T, winner, strict=True)])
    return budgets[between], winner[between]


def _hull(x: Array, y: Array) -> Rows:
    """Indices of the lower convex hull, from left to right, as far as y falls."""
    hull: list[int] = []
    for i in np.lexsort((y, x)):
        if hull and x[i] == x[hull[-1]]:
            continue
        while len(hull) >= 2 and ((y[hull[-1]] - y[hull[-2]]) * (x[i] - x[hull[-2]])
                                  >= (y[i] - y[hull[-2]]) * (x[hull[-1]] - x[hull[-2]])):
            hull.pop()
        hull.append(int(i))
    falling = np.array(hull)
    return falling[:int(np.argmin(y[falling])) + 1]


def profiles(runs: Runs, *, tolerance: float = 0.08) -> list[Profile]:
    """The isoFLOP profiles of a table: rows whose budgets lie together, four sizes or more."""
    order = np.argsort(runs.flops)
    gaps = np.diff(np.log(runs.flops[order]))
    groups = np.split(order, np.flatnonzero(gaps > tolerance) + 1)
    out = []
    for rows in groups:
        if len(np.unique(runs.params[rows])) < 4 or np.ptp(np.log(runs.flops[rows])) > 0.5:
            continue
        x = np.log10(runs.params[rows])
        curve = np.polyfit(x, runs.loss[rows], 2)
        vertex = -curve[1] / (2 * curve[0]) if curve[0] > 0 else np.nan
        inside = x.min() < vertex < x.max()
        out.append(Profile(float(np.exp(np.log(runs.flops[rows]).mean())), rows, curve,
                           float(10**vertex) if inside else np.nan))
    return out


def parabolas(runs: Runs) -> tuple[Array, Array]:
    """Budgets of the profiles whose minimum lies inside, and the size there.

    Raises ManyformError where there are fewer than three.
    """
    found = [p for p in profiles(runs) if np.isfinite(p.best)]
    if len(found) < 3:
        raise ManyformError(f"{len(found)} isoFLOP profiles (four sizes at one budget, the best "
                            "between them) where three are needed")
    return np.array([p.flops for p in found]), np.array([p.best for p in found])


def bias(runs: Runs, law: Chinchilla) -> tuple[Array, Array]:
    """Budgets, and by which factor approach 2 would miss the law's best size on these very runs if
    their losses were the law's."""
    found = [p for p in profiles(runs) if np.isfinite(p.best)]
    factors = []
    for p in found:
        x = np.log10(runs.params[p.rows])
        curve = np.polyfit(x, law.predict(runs.params[p.rows], runs.tokens[p.rows]), 2)
        product = float(np.exp(np.log(runs.params[p.rows] * runs.tokens[p.rows]).mean()))
        true = law.optimal(flops=6 * product).params
        factors.append(10 ** (-curve[1] / (2 * curve[0])) / true if curve[0] > 0 else np.nan)
    return np.array([p.flops for p in found]), np.array(factors)


def corrected(runs: Runs, law: Chinchilla) -> tuple[Array, Array]:
    """`parabolas`, each minimum divided by the factor by which the law says that it is off."""
    flops, params = parabolas(runs)
    _, factors = bias(runs, law)
    kept = np.isfinite(factors)
    if kept.sum() < 3:
        raise ManyformError("the law's own profiles have no minimum at three of the budgets")
    return flops[kept], params[kept] / factors[kept]


def line(flops: Array, params: Array) -> tuple[float, float]:
    """The exponent and the intercept of log N against log C."""
    if len(np.unique(flops)) < 2:
        raise ManyformError("one budget alone has no slope")
    slope, intercept = np.polyfit(np.log(flops), np.log(params), 1)
    return float(slope), float(intercept)


def _apart(runs: Runs) -> Runs:
    """A run drawn twice counts as two runs."""
    seen: dict[tuple[str, str, float], int] = {}
    names = []
    for key in zip(runs.arch.tolist(), runs.run.tolist(), runs.tokens.tolist(), strict=True):
        seen[key] = seen.get(key, 0) + 1
        names.append(f"{key[1]}#{seen[key]}")
    return Runs(runs.params, runs.tokens, runs.loss, runs.flops, np.array(names, dtype=np.str_),
                runs.arch, runs.unique, runs.convention, runs.flops_from, runs.metric, runs.source)
