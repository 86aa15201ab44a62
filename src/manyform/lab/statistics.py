"""What a few seeds allow one to say: intervals of means, and of all differences at once.

Every architecture sees the same data in the same order under the same seed, so results are a
two-way table, architecture by seed, and differences are taken within seeds. The differences of all
pairs are judged together (Tukey 1953: the studentized range), so that the chance of a single wrong
claim among all of them is 5%, however many architectures there are.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MOST_SEEDS = 64
"""A difference that would need more seeds than this is called too small to matter."""


@dataclass(frozen=True)
class Interval:
    """A mean of n values; low and high are None where n is one: a single value has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Difference:
    """a - b over their common seeds. low, high: the simultaneous interval, None where fewer than
    two common seeds leave none."""

    a: str
    b: str
    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def lower(self) -> bool:
        """Whether a is below b, decidedly."""
        return self.decided and self.mean < 0


@dataclass(frozen=True)
class Comparison:
    """All differences between `names`. spread: the standard deviation of what neither the
    architecture nor the seed explains, with `freedom` degrees of freedom (0: no spread known)."""

    names: tuple[str, ...]
    values: Mapping[str, Mapping[int, float]]
    spread: float
    freedom: int
    level: float

    def mean(self, name: str) -> float:
        """Over all seeds of `name`."""
        return statistics.fmean(self.values[name].values())

    def interval(self, name: str) -> Interval:
        """Student's t-interval of one mean over seeds. The spread within an architecture is
        pooled over all (its own where that is larger); its degrees of freedom are Satterthwaite's
        (1946), since the order of the data, which all share, is part of it."""
        own = list(self.values[name].values())
        mean, n = statistics.fmean(own), len(own)
        some = [list(v.values()) for v in self.values.values() if len(v) > 1]
        if n < 2 or (not self._noise([0.0, 0.0]) and len(self.names) > 1):
            return Interval(mean, None, None, n)
        within = sum(len(v) * statistics.pvariance(v) for v in some) / sum(len(v) - 1 for v in some)
        freedom = float(n - 1)
        groups = len(self.names)
        if len({frozenset(v) for v in self.values.values()}) == 1 and groups > 1:
            errors = (groups - 1) * self.spread**2
            seeds = max(0.0, groups * within - errors)  # the mean square of seeds
            freedom *= (seeds + errors) ** 2 / (seeds**2 + errors**2 / (groups - 1))
        from scipy.stats import t
        half = float(t.ppf((1 + self.level) / 2, freedom)) \
            * max(math.sqrt(within), statistics.stdev(own)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half, n)

    def difference(self, a: str, b: str) -> Difference:
        """a - b with its simultaneous interval."""
        common = sorted(set(self.values[a]) & set(self.values[b]))
        if not common:
            return Difference(a, b, self.mean(a) - self.mean(b), None, None, 0)
        each = [self.values[a][s] - self.values[b][s] for s in common]
        mean, n = statistics.fmean(each), len(each)
        noise = self._noise(each)
        if n < 2 or not noise:
            return Difference(a, b, mean, None, None, n)
        half = self._multiple(self.freedom) * noise / math.sqrt(n)
        return Difference(a, b, mean, mean - half, mean + half, n)

    def seeds_needed(self, a: str, b: str) -> int | None:
        """How many seeds would decide a difference of the size seen at the spread seen; None where
        there is no spread to judge by or more than MOST_SEEDS would be needed."""
        common = set(self.values[a]) & set(self.values[b])
        each = [self.values[a][s] - self.values[b][s] for s in common]
        noise = self._noise(each) if len(each) > 1 else 0.0
        gap = abs(statistics.fmean(each)) if each else 0.0
        if not noise or not gap:
            return None

        def enough(n: int) -> bool:
            freedom = (len(self.names) - 1) * (n - 1)
            return self._multiple(freedom) * noise / math.sqrt(n) < gap
        low, high = 1, MOST_SEEDS
        if not enough(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def _noise(self, each: Sequence[float]) -> float:
        """Standard deviation of one paired difference: that of all architectures together, or this
        pair's own where it is larger (spreads need not be equal). 0 where none is known: seeds
        that all give the same value are copies and not evidence."""
        if self.freedom < 1 or self.spread <= 1e-9 * max(1e-9, *map(abs, self._all())):
            return 0.0
        own = statistics.stdev(each) if len(each) > 1 else 0.0
        return max(math.sqrt(2) * self.spread, own)

    def _all(self) -> list[float]:
        return [v for row in self.values.values() for v in row.values()]

    def _multiple(self, freedom: int) -> float:
        return _tukey(len(self.names), freedom, self.level)


def compare_all(values: Mapping[str, Mapping[int, float]], level: float = LEVEL) -> Comparison:
    """values: {name: {seed: value}}, each with at least one seed; some may be missing."""
    names = tuple(sorted(values))
    seeds = sorted({s for row in values.values() for s in row})
    cells = [(names.index(n), seeds.index(s), v) for n in names for s, v in values[n].items()]
    design = np.zeros((len(cells), len(names) + len(seeds)))
    for i, (n, s, _) in enumerate(cells):
        design[i, n] = design[i, len(names) + s] = 1
    y = np.array([v for *_, v in cells])
    spread, freedom = 0.0, 0
    if len(cells):
        y = y - y.mean()
        solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        freedom = len(cells) - int(rank)
        if freedom > 0:
            spread = math.sqrt(float(((y - design @ solution) ** 2).sum()) / freedom)
    return Comparison(names, values, spread, freedom, level)


@functools.lru_cache(maxsize=256)
def _tukey(groups: int, freedom: int, level: float) -> float:
    """The multiple of a difference's standard error that all pairs of `groups` means stay within
    with probability `level`; Student's t for two."""
    from scipy.stats import studentized_range, t
    if groups <= 2:
        return float(t.ppf((1 + level) / 2, freedom))
    return float(studentized_range.ppf(level, groups, freedom)) / math.sqrt(2)
