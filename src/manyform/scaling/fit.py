"""`fit`: a table of runs becomes a law with intervals, and what the table cannot say is said."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manyform.errors import ManyformError, unknown
from manyform.scaling.forms import ChinchillaForm, Form, KaplanForm, PowerForm, RepetitionForm
from manyform.scaling.laws import FLOPS_PER_PARAM_TOKEN, Chinchilla, Law, Optimum
from manyform.scaling.numerics import DELTA, settle
from manyform.scaling.resample import choose, replicates
from manyform.scaling.table import Array, Runs, load

LAWS = {
    "chinchilla": "E + A / N^alpha + B / D^beta (Hoffmann 2022, approach 3)",
    "overtraining": "the same with alpha = beta (Gadre 2024)",
    "repetition": "the same where data repeat, with a column of unique tokens (Muennighoff 2023)",
    "kaplan": "((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D (Kaplan 2020)",
    "kaplan-n": "(Nc / N)^alpha", "kaplan-d": "(Dc / D)^alpha", "kaplan-c": "(Cc / C)^alpha",
}
FAR = 10.0
"""Beyond this many times the largest measured budget a number comes with a warning."""
OUTLYING = 5.0
"""Robust standard deviations from the law at which a run is named an outlier."""


class ExtrapolationWarning(UserWarning):
    """A number far outside what was measured."""


@dataclass(frozen=True)
class FittedOptimum(Optimum):
    """An optimum with an interval for params, tokens, tokens_per_param and loss (of those that the
    question left open; empty without bootstraps), and a warning where it is extrapolated."""

    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    warning: str = ""


@dataclass(frozen=True)
class HeldOut:
    """The runs of the largest budgets, predicted by a law fitted to the others.

    rows: their number. largest_fitted, smallest_held: budgets in FLOPs. error: mean of predicted /
    measured - 1, with its sign. worst: the one farthest from zero.
    """

    rows: int
    largest_fitted: float
    smallest_held: float
    error: float
    worst: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A law fitted to runs. Its coefficients and exponents are attributes (`fit.alpha`, `fit.a`).

    law: the formula at the best coefficients. draws: the formula at those of each bootstrap.
    resample: how they were drawn. sigma: robust standard deviation of the logarithm of the loss
    around the law. outliers: rows of the table that lie far from it, and without_outliers the law
    that the others alone give (None where there are none). held_out: None where too few runs are
    left for it.
    """

    law: Law
    runs: Runs
    name: str
    draws: tuple[Law, ...]
    level: float
    resample: str
    sigma: float
    objective: float
    outliers: tuple[int, ...]
    without_outliers: Law | None
    held_out: HeldOut | None

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name != "law" and hasattr(self.law, name):
            return getattr(self.law, name)
        raise AttributeError(f"a fit of the law {self.__dict__.get('name')} has no {name!r}")

    @property
    def largest(self) -> float:
        """The largest measured budget, in FLOPs."""
        return float(self.runs.flops.max())

    def residuals(self) -> Array:
        """log(measured / predicted) of every run."""
        inputs = [getattr(self.runs, column) for column in self.law.inputs]
        return np.log(self.runs.loss / self.law.predict(*inputs))

    def interval(self, name: str, level: float | None = None) -> tuple[float, float]:
        """Percentiles of a coefficient, or of an exponent such as "a", over the bootstraps."""
        if not hasattr(self.law, name) or callable(getattr(self.law, name)):
            raise unknown("coefficient", name, self.law.names())
        return self.spread(np.array([_attribute(d, name) for d in self.draws]), level)

    def spread(self, values: Array, level: float | None = None) -> tuple[float, float]:
        """The interval of one value a bootstrap."""
        if not self.draws:
            raise ManyformError("this fit has no intervals: it was made with bootstraps=0")
        tail = (1 - (level or self.level)) / 2
        kept = values[np.isfinite(values)]
        if not len(kept):
            return math.nan, math.nan
        low, high = np.quantile(kept, [tail, 1 - tail])
        return float(low), float(high)

    def predict(self, *inputs: Any, interval: bool = False) -> Any:
        """The loss at these inputs (see `law.inputs`); with interval=True (loss, low, high).

        Warns (ExtrapolationWarning) beyond ten times the largest measured budget.
        """
        value = self.law.predict(*inputs)
        warning = self.extrapolation(self._flops(*inputs))
        if warning:
            warnings.warn(warning, ExtrapolationWarning, stacklevel=2)
        if not interval:
            return value
        drawn = np.stack([np.asarray(d.predict(*inputs), float) for d in self.draws]) \
            if self.draws else np.empty((0, *np.shape(value)))
        if not len(drawn):
            raise ManyformError("this fit has no intervals: it was made with bootstraps=0")
        tail = (1 - self.level) / 2
        low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
        return value, low, high

    def optimal(self, *, flops: float | None = None, loss: float | None = None) -> FittedOptimum:
        """The best size and tokens for a budget, or the cheapest for a loss, with intervals.

        Beyond ten times the largest measured budget the answer carries a warning, and a fit
        without bootstraps, which has no interval to go with it, refuses.
        """
        best = self.counted(self.law, flops, loss)
        warning = self.extrapolation(best.flops)
        if warning and not self.draws:
            raise ManyformError(f"{warning}; a number without an interval is not given there: fit "
                                "with bootstraps")
        drawn = []
        for draw in self.draws:
            try:
                drawn.append(self.counted(draw, flops, loss))
            except ManyformError:  # this bootstrap's law does not reach the loss, or never bends
                continue
        asked = "flops" if flops is not None else "loss"
        intervals = {what: self.spread(np.array([getattr(o, what) for o in drawn], float))
                     for what in ("params", "tokens", "tokens_per_param", "flops", "loss")
                     if what != asked and drawn}
        if len(drawn) < len(self.draws):
            share = 1 - len(drawn) / len(self.draws)
            warning = "; ".join(filter(None, [warning, f"{share:.0%} of the bootstraps have no "
                                              "such optimum, so the intervals are too narrow"]))
        return FittedOptimum(best.params, best.tokens, best.flops, best.loss, intervals, warning)

    def counted(self, law: Law, flops: float | None = None, loss: float | None = None,
                ) -> Optimum:
        """The optimum of a law where C is as this table counts it, not 6 N D."""
        scale = self.per_token / FLOPS_PER_PARAM_TOKEN
        best = law.optimal(flops=None if flops is None else flops / scale, loss=loss)
        return Optimum(best.params, best.tokens, best.flops * scale, best.loss)

    @property
    def per_token(self) -> float:
        """Training FLOPs per parameter and token: 6, or the median of the table's own count."""
        return float(np.median(self.runs.flops / (self.runs.params * self.runs.tokens)))

    def frontier(self, budgets: Any) -> tuple[Array, Array]:
        """The least loss at each of these budgets (m,), and that of each bootstrap (draws, m); NaN
        where a bootstrap's law has no optimum.

        The best size is sought where runs are: with parameters, tokens and tokens per parameter
        within those measured (beyond the largest budget the first two may grow as it does). A law
        that is flat in one of them would else be read far from every run.
        """
        product = np.asarray(budgets, float) / self.per_token
        laws = [self.law, *self.draws]
        if not all(isinstance(law, Chinchilla) for law in laws):
            losses = np.array([[law.optimal(flops=6 * float(p)).loss for p in product]
                               for law in laws], float)
            return losses[0], losses[1:]
        E, A, B, alpha, beta = np.array([[getattr(law, n) for n in ("E", "A", "B", "alpha", "beta")]
                                         for law in laws]).T[:, :, None]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            size = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) \
                * product ** (beta / (alpha + beta))
            size = np.clip(size, *self.covered(product))
            losses = E + A * size**-alpha + B * (product / size) ** -beta
        bends = ((A > 0) & (B > 0) & (alpha > 0) & (beta > 0))[:, 0]
        losses[~bends] = np.nan
        return losses[0], losses[1:]

    def covered(self, product: Array, slack: float = 1.0) -> tuple[Array, Array]:
        """The smallest and the largest size at which parameters, tokens and tokens per parameter
        lie within those measured, where parameters times tokens are `product` (m,); with slack
        each of the three may lie so many times outside."""
        params, tokens, ratio = self.runs.params, self.runs.tokens, self.runs.tokens / \
            self.runs.params
        further = slack * np.maximum(1.0, product * self.per_token / self.largest)
        smallest = np.max([np.full_like(product, params.min() / slack),
                           np.sqrt(product / (ratio.max() * slack)),
                           product / (tokens.max() * further)], axis=0)
        largest = np.min([params.max() * further, np.sqrt(product * slack / ratio.min()),
                          product * slack / tokens.min()], axis=0)
        return np.minimum(smallest, largest), largest

    def extrapolation(self, flops: Any) -> str:
        """A sentence if any of these budgets lies far beyond what was measured, else ""."""
        far = float(np.max(flops)) / self.largest
        return "" if far <= FAR * (1 + 1e-9) else (
            f"{float(np.max(flops)):.3g} FLOPs is {far:,.0f} times the largest measured budget "
            f"({self.largest:.3g}): an extrapolation, good only as far as the law holds there")

    def _flops(self, *inputs: Any) -> Any:
        given = dict(zip(self.law.inputs, inputs, strict=False))
        if "flops" in given:
            return given["flops"]
        if "params" in given and "tokens" in given:
            return (self.per_token * np.asarray(given["params"], float)
                    * np.asarray(given["tokens"], float))
        column = self.law.inputs[0]  # a law of one quantity is measured in that quantity
        return np.asarray(given[column], float) / getattr(self.runs, column).max() * self.largest

    def statements(self) -> list[str]:
        """What the table does not determine, one sentence each."""
        from manyform.scaling.identify import statements
        return statements(self)

    def summary(self) -> str:
        """The law, its intervals, its held-out error, its outliers and its limits, in words."""
        from manyform.scaling.summary import summary
        return summary(self)

    def plot(self) -> Any:
        """A plotly figure: loss against FLOPs, one line a size, with the frontier."""
        from manyform.scaling.draw import frontier
        return frontier(self)


def fit(data: Any, law: str = "chinchilla", *, bootstraps: int = 1000, level: float = 0.95,
        resample: str = "auto", seed: int = 0, delta: float = DELTA, arch: str | None = None,
        drop_outliers: bool = False, columns: Mapping[str, str] | None = None,
        convention: str | None = None, bad: str = "refuse") -> Fit:
    """Fit a law to a table of runs.

    data: see `manyform.scaling.load`, which columns, convention and bad go to. law: one of `LAWS`.
    arch: the architecture to fit where the table holds several (`fit_archs` fits all).
    bootstraps: 0 for none. level: of the intervals. resample: "pairs" (whole runs drawn with
    replacement), "noise" (new errors of the measured spread, sizes and tokens kept; for few
    runs), or "auto". seed: of the draws. delta: of the Huber loss. drop_outliers: fit without the
    runs that a first fit names.
    Raises ManyformError for a table that cannot carry the law.
    """
    if law not in LAWS:
        raise unknown("law", law, LAWS)
    if not 0 < level < 1:
        raise ManyformError(f"level is a share such as 0.95, not {level!r}")
    if bootstraps < 0 or 0 < bootstraps < 50:
        raise ManyformError(f"bootstraps is 0 or at least 50, not {bootstraps}")
    runs = one_arch(load(data, columns=columns, convention=convention, bad=bad), arch)
    require(runs, law)
    form, theta, reached = solve(runs, law, delta)
    outliers, sigma = _outliers(form, theta, runs)
    without = None
    if outliers:
        rest = np.setdiff1d(np.arange(len(runs)), outliers)
        try:
            require(runs.take(rest), law)
        except ManyformError:
            rest = rest[:0]
        if len(rest) and drop_outliers:
            return fit(runs.take(rest), law, bootstraps=bootstraps, level=level,
                       resample=resample, seed=seed, delta=delta)
        if len(rest):
            other, other_theta, _ = solve(runs.take(rest), law, delta)
            without = other.law(other_theta)
    method = choose(resample, runs)
    thetas = replicates(form, theta, runs, bootstraps, method, seed, delta)
    return Fit(form.law(theta), runs, law, tuple(form.law(t) for t in thetas), level, method,
               sigma, reached, tuple(outliers), without, hold_out(runs, law, delta))


def make_form(runs: Runs, law: str, delta: float = DELTA) -> Form:
    """The form of a law over these runs."""
    if law in ("chinchilla", "overtraining"):
        return ChinchillaForm(runs, tied=law == "overtraining")
    if law == "kaplan":
        return KaplanForm(runs)
    if law == "repetition":
        assert runs.unique is not None
        once = runs.take(runs.tokens <= 1.01 * runs.unique)
        try:
            require(once, "chinchilla")
        except ManyformError as error:
            raise ManyformError("a law of repeated data starts from the runs that saw each token "
                                f"once, and those cannot carry it: {error}") from error
        base_form, theta, _ = solve(once, "chinchilla", delta)
        base = base_form.law(theta)
        assert isinstance(base, Chinchilla)
        return RepetitionForm(runs, base)
    return PowerForm(runs, {"kaplan-n": "params", "kaplan-d": "tokens", "kaplan-c": "flops"}[law])


def solve(runs: Runs, law: str, delta: float = DELTA) -> tuple[Form, Array, float]:
    """The form, the best coefficients from all starts, and the summed robust loss."""
    form = make_form(runs, law, delta)
    weights = np.ones(len(runs))
    y = np.log(runs.loss)
    found = [settle(form.value, form.bounds, y, weights, start, delta=delta)
             for start in form.starts(runs.loss, weights)]
    theta, reached = min(found, key=lambda f: f[1])
    return form, theta, reached


def one_arch(runs: Runs, arch: str | None) -> Runs:
    """The rows of one architecture; refused where several are there and none is named."""
    if arch is not None:
        if arch not in runs.archs:
            raise unknown("architecture", arch, runs.archs)
        return runs.take(runs.arch == arch)
    if len(runs.archs) > 1:
        raise ManyformError(f"{runs.source} holds {len(runs.archs)} architectures "
                            f"({', '.join(runs.archs)}): name one (arch=, --arch), or fit all "
                            "(manyform.scaling.fit_archs)")
    return runs


_COEFFICIENTS = {"chinchilla": 5, "overtraining": 4, "repetition": 7, "kaplan": 4}


def require(runs: Runs, law: str) -> None:
    """Refuse a table that cannot carry the law, with one sentence."""
    columns = {"kaplan-n": ("params",), "kaplan-d": ("tokens",), "kaplan-c": ("flops",)}.get(
        law, ("params", "tokens"))
    wanted = 3 if law in ("chinchilla", "overtraining", "repetition") else 2
    least = _COEFFICIENTS.get(law, 2) + 2
    if law == "repetition" and runs.unique is None:
        raise ManyformError("the law of repeated data needs a column of unique tokens (unique, "
                            "unique_tokens)")
    if len(runs) < least:
        raise ManyformError(f"{len(runs)} runs are too few for the law {law}: its "
                            f"{_COEFFICIENTS.get(law, 2)} coefficients need {least} at least, and "
                            "intervals many more")
    words = {"params": ("size", "sizes"), "flops": ("budget", "budgets"),
             "tokens": ("amount of training tokens", "amounts of training tokens")}
    for column in columns:
        distinct = len(np.unique(np.round(np.log(getattr(runs, column)), 2)))
        if distinct < wanted:
            held = f"one {words[column][0]}" if distinct == 1 else f"{distinct} {words[column][1]}"
            raise ManyformError(f"{runs.source or 'the table'} holds {held}: the law {law} needs "
                                f"runs of {wanted} or more different {words[column][1]}")


def hold_out(runs: Runs, law: str, delta: float = DELTA) -> HeldOut | None:
    """Fit without the largest budgets (those within a factor of two of the largest: at least a
    tenth of the runs, at most a quarter) and predict them."""
    order = np.argsort(runs.flops)
    near = int((runs.flops >= 0.5 * runs.flops.max()).sum())
    count = max(1, min(max(near, len(runs) // 10), len(runs) // 4))
    held = order[runs.flops[order] >= runs.flops[order[-count]] * (1 - 1e-9)]
    rest = runs.take(np.setdiff1d(order, held))
    try:
        require(rest, law)
        form, theta, _ = solve(rest, law, delta)
    except ManyformError:
        return None
    inputs = [getattr(runs, c)[held] for c in form.law(theta).inputs]
    errors = form.law(theta).predict(*inputs) / runs.loss[held] - 1
    return HeldOut(len(held), float(rest.flops.max()), float(runs.flops[held].min()),
                   float(errors.mean()), float(errors[np.argmax(np.abs(errors))]))


def _outliers(form: Form, theta: Array, runs: Runs) -> tuple[list[int], float]:
    residuals = np.log(runs.loss) - form.value(theta)[0]
    sigma = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals))))
    far = np.flatnonzero(np.abs(residuals) > max(OUTLYING * sigma, DELTA))
    return far[np.argsort(-np.abs(residuals[far]))].tolist(), sigma


def _attribute(law: Law, name: str) -> float:
    try:
        return float(getattr(law, name))
    except (ManyformError, OverflowError, ZeroDivisionError):
        return math.nan
