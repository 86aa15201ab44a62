"""The laws as formulas: coefficients are attributes, `predict` and `optimal` are closed forms.

N: parameters, D: training tokens, C: training FLOPs, C = 6 N D where nothing else is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from manyform.errors import ManyformError
from manyform.scaling.table import PF_DAY

FLOPS_PER_PARAM_TOKEN = 6.0
"""Forward and backward, a multiply-add counted as two (Kaplan 2020, section 2.1)."""


@dataclass(frozen=True)
class Optimum:
    """A model and its training. loss is None where the law is a rule that predicts none."""

    params: float
    tokens: float
    flops: float
    loss: float | None

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.params


class Law:
    """A formula with coefficients (its dataclass fields).

    inputs: the columns of a table that `predict` takes, in order. reaches_floor: whether the loss
    falls towards a floor above zero.
    """

    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens")
    formula: ClassVar[str] = ""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The coefficients, in order."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    def predict(self, *inputs: Any) -> Any:
        """The loss at these inputs (numbers or arrays)."""
        raise ManyformError(f"{type(self).__name__} predicts no loss: it is a rule for sizes")

    def optimal(self, *, flops: float | None = None, loss: float | None = None) -> Optimum:
        """The best model for this many training FLOPs, or the cheapest that reaches this loss."""
        raise ManyformError(f"a law of {' and '.join(self.inputs)} alone has no compute-optimal "
                            "size; that needs one of parameters and tokens together")


def _power(base: float, exponent: float) -> float:
    """Infinite where a float ends: a bootstrap's exponent may be as good as zero."""
    try:
        return base**exponent
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Chinchilla(Law):
    """L = E + A / N^alpha + B / D^beta (Hoffmann 2022, eq. 2 and appendix D.3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    formula = "L = E + A / N^alpha + B / D^beta"

    def predict(self, params: Any, tokens: Any) -> Any:
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    @property
    def a(self) -> float:
        """Exponent of the best size: N* ~ C^a (Hoffmann 2022, eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the best tokens: D* ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:
        """N* = G (C / 6)^a, D* = (C / 6)^b / G (Hoffmann 2022, eq. 4)."""
        self._bends()
        return _power(self.alpha * self.A / (self.beta * self.B), 1 / (self.alpha + self.beta))

    def optimal(self, *, flops: float | None = None, loss: float | None = None) -> Optimum:
        """Closed forms: at the optimum alpha A / N^alpha = beta B / D^beta."""
        self._bends()
        if (flops is None) == (loss is None):
            raise ManyformError("give flops or loss, one of them")
        if flops is not None:
            _positive("flops", flops)
            product = flops / FLOPS_PER_PARAM_TOKEN
            params = self.G * product**self.a
            if not 1 <= params <= product:
                raise ManyformError(f"this law has no best size at {flops:.3g} FLOPs: it would be "
                                    f"{params:.3g} parameters (alpha {self.alpha:.3g}, beta "
                                    f"{self.beta:.3g})")
            return Optimum(params, product / params, flops,
                           float(self.predict(params, product / params)))
        assert loss is not None
        above = loss - self.E
        if above <= 0:
            raise ManyformError(f"a loss of {loss:g} is at or below the floor E = {self.E:.4g} of "
                                "this law: no size and no data reach it")
        params = _power(self.A * (1 + self.alpha / self.beta) / above, 1 / self.alpha)
        tokens = _power(self.B * (1 + self.beta / self.alpha) / above, 1 / self.beta)
        return Optimum(params, tokens, FLOPS_PER_PARAM_TOKEN * params * tokens, loss)

    def tokens_for(self, params: Any, loss: float) -> Any:
        """Tokens at which a model of this size reaches the loss; infinite where it never does."""
        room = loss - self.E - self.A * np.asarray(params, float)**-self.alpha
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(room > 0, (self.B / np.maximum(room, 1e-300)) ** (1 / self.beta),
                            np.inf)

    def _bends(self) -> None:
        if min(self.A, self.B, self.alpha, self.beta) <= 0:
            raise ManyformError("this law has no compute-optimal size: the loss does not fall with "
                                f"both parameters and tokens (A {self.A:.3g}, alpha "
                                f"{self.alpha:.3g}, B {self.B:.3g}, beta {self.beta:.3g})")


@dataclass(frozen=True)
class Repetition(Law):
    """Chinchilla's law where data repeat (Muennighoff 2023, eq. 5 and 6, appendix A):

    L = E + A / N'^alpha + B / D'^beta, D' = U (1 + R_D (1 - exp(-R / R_D))) with U different
    tokens read 1 + R times, and N' likewise from U_N = min(N, the best size for U tokens).
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    R_D: float
    R_N: float

    inputs = ("params", "tokens", "unique")
    formula = "L = E + A / N'^alpha + B / D'^beta, N' and D' discounted where data repeat"

    @property
    def base(self) -> Chinchilla:
        """The law of data that never repeat."""
        return Chinchilla(self.E, self.A, self.B, self.alpha, self.beta)

    def predict(self, params: Any, tokens: Any, unique: Any) -> Any:
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        unique = np.minimum(np.asarray(unique, float), tokens)
        size = np.minimum(params, best_size(self.base, unique))
        return self.base.predict(discounted(params, size, self.R_N),
                                 discounted(tokens, unique, self.R_D))

    def effective_tokens(self, tokens: Any, unique: Any) -> Any:
        """What the tokens are worth in different ones."""
        unique = np.minimum(np.asarray(unique, float), np.asarray(tokens, float))
        return discounted(np.asarray(tokens, float), unique, self.R_D)


def discounted(amount: Any, unique: Any, scale: float) -> Any:
    """unique * (1 + scale (1 - exp(-repeats / scale))), repeats = amount / unique - 1."""
    repeats = np.maximum(np.asarray(amount, float) / unique - 1, 0)
    return unique * (1 + scale * -np.expm1(-repeats / scale))


def best_size(law: Chinchilla, tokens: Any) -> Any:
    """The size for which this many tokens are compute-optimal."""
    return law.G * (law.G * np.asarray(tokens, float)) ** (law.beta / law.alpha)


@dataclass(frozen=True)
class KaplanN(Law):
    """L(N) = (Nc / N)^alpha, data without limit (Kaplan 2020, eq. 1.1)."""

    Nc: float
    alpha: float

    inputs = ("params",)
    formula = "L = (Nc / N)^alpha"

    def predict(self, params: Any) -> Any:
        return (self.Nc / np.asarray(params, float)) ** self.alpha


@dataclass(frozen=True)
class KaplanD(Law):
    """L(D) = (Dc / D)^alpha, size without limit (Kaplan 2020, eq. 1.2)."""

    Dc: float
    alpha: float

    inputs = ("tokens",)
    formula = "L = (Dc / D)^alpha"

    def predict(self, tokens: Any) -> Any:
        return (self.Dc / np.asarray(tokens, float)) ** self.alpha


@dataclass(frozen=True)
class KaplanC(Law):
    """L(C) = (Cc / C)^alpha along the best sizes (Kaplan 2020, eq. 1.3); Cc in FLOPs."""

    Cc: float
    alpha: float

    inputs = ("flops",)
    formula = "L = (Cc / C)^alpha"

    def predict(self, flops: Any) -> Any:
        return (self.Cc / np.asarray(flops, float)) ** self.alpha


@dataclass(frozen=True)
class Kaplan(Law):
    """L(N, D) = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D (Kaplan 2020, eq. 1.5)."""

    Nc: float
    Dc: float
    alpha_N: float  # noqa: N815
    alpha_D: float  # noqa: N815

    formula = "L = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D"

    def predict(self, params: Any, tokens: Any) -> Any:
        power = self.alpha_N / self.alpha_D
        return ((self.Nc / np.asarray(params, float)) ** power
                + self.Dc / np.asarray(tokens, float)) ** self.alpha_D

    @property
    def a(self) -> float:
        """Exponent of the best size of this formula: N* ~ C^a."""
        return 1 / (1 + self.alpha_N / self.alpha_D)

    def optimal(self, *, flops: float | None = None, loss: float | None = None) -> Optimum:
        """The minimum of the formula along 6 N D = C."""
        power = self.alpha_N / self.alpha_D
        if (flops is None) == (loss is None):
            raise ManyformError("give flops or loss, one of them")
        if flops is None:
            assert loss is not None
            _positive("loss", loss)
            # At the optimum power (Nc / N)^power = Dc / D, so their sum is loss^(1 / alpha_D).
            whole = loss ** (1 / self.alpha_D)
            params = self.Nc * (whole / (1 + power)) ** (-1 / power)
            tokens = self.Dc * (1 + power) / (power * whole)
            return Optimum(params, tokens, FLOPS_PER_PARAM_TOKEN * params * tokens, loss)
        _positive("flops", flops)
        product = flops / FLOPS_PER_PARAM_TOKEN
        params = (power * self.Nc**power * product / self.Dc) ** (1 / (1 + power))
        return Optimum(params, product / params, flops,
                       float(self.predict(params, product / params)))


@dataclass(frozen=True)
class Allocation(Law):
    """A rule for sizes: N* = size * (C / flops)^a. It predicts no loss.

    size, flops: a point that the rule passes through; a: the exponent of the size.
    """

    size: float
    flops: float
    a: float

    inputs = ("flops",)
    formula = "N* = size * (C / flops)^a"

    def optimal(self, *, flops: float | None = None, loss: float | None = None) -> Optimum:
        if flops is None:
            raise ManyformError("this rule knows no losses: give flops, or name a law that does "
                                "(chinchilla, chinchilla-epoch)")
        _positive("flops", flops)
        params = self.size * (flops / self.flops) ** self.a
        return Optimum(params, flops / (FLOPS_PER_PARAM_TOKEN * params), flops, None)


def _positive(what: str, value: float) -> None:
    if not (0 < value < np.inf):
        raise ManyformError(f"{what} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class Published:
    """A law as its paper gives it. largest: training FLOPs of the largest run behind it, about.
    standard_errors: as published, by coefficient. counting: of its parameters."""

    name: str
    law: Law
    source: str
    largest: float
    counting: str
    standard_errors: dict[str, float]


def _published() -> dict[str, Published]:
    hoffmann = "Hoffmann 2022, arXiv 2203.15556"
    laws = [
        # Table 6 of appendix A, in PF-days of the adjusted compute C_min.
        Published("kaplan", Allocation(1.3e9, PF_DAY, 0.73), "Kaplan 2020, arXiv 2001.08361, "
                  "appendix A: N* = 1.3e9 C^0.73 (C in PF-days)", 6 * 1.5e9 * 2.3e10,
                  "non-embedding", {}),
        Published("kaplan-loss", Kaplan(6.4e13, 1.8e13, 0.076, 0.103),
                  "Kaplan 2020, arXiv 2001.08361, table 2", 6 * 1.5e9 * 2.3e10, "non-embedding",
                  {}),
        # Points of tables 3 and A3 that the rules pass through.
        Published("chinchilla-1", Allocation(1e9, 1.21e20, 0.50), f"{hoffmann}, approach 1, "
                  "table 3", 1.3e22, "total", {}),
        Published("chinchilla-2", Allocation(1e9, 1.20e20, 0.49), f"{hoffmann}, approach 2, "
                  "table A3", 3e21, "total", {}),
        # The digits of the paper are rounded too far to allocate with; these are the logarithms
        # that its authors' source holds (Besiroglu 2024, section 2).
        Published("chinchilla", Chinchilla(float(np.exp(0.5267228)), float(np.exp(6.0073404)),
                                           float(np.exp(6.0179186)), 0.33917084, 0.2849083),
                  f"{hoffmann}, approach 3, unrounded", 1.3e22, "total", {}),
        Published("chinchilla-epoch", Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
                  "Besiroglu 2024, arXiv 2404.10102", 1.3e22, "total",
                  {"E": 0.026, "A": 125.0, "B": 1293.0, "alpha": 0.015, "beta": 0.021,
                   "a": 0.020}),
        Published("muennighoff", Repetition(float(np.exp(0.6254804)), float(np.exp(6.255414)),
                                            float(np.exp(7.3049974)), 0.3526596, 0.3526596,
                                            15.387756, 5.309743),
                  "Muennighoff 2023, arXiv 2305.16264, appendix A", 6 * 8.7e9 * 1.78e11, "total",
                  {}),
    ]
    return {p.name: p for p in laws}


PUBLISHED = _published()
"""Laws by name. "kaplan" and "chinchilla-1", "chinchilla-2" are rules for sizes alone."""
