"""Planning with a law: what to train for a budget, and what a smaller, longer trained model saves.

A law is a fit, or a published one by name. With a fit the best size is a number only where its runs
determine it (`manyform.scaling.best`), and outside what was measured it comes with its distance.
With a published law a warning and the range of the others come with a number far outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from manyform.errors import ManyformError, unknown
from manyform.scaling.best import Row, best, budget_for, times
from manyform.scaling.fit import FAR, Fit, FittedOptimum
from manyform.scaling.laws import PUBLISHED, Allocation, Chinchilla, Law, Optimum, Published
from manyform.scaling.table import short

# Peak dense FLOP/s in bfloat16 (float16 on V100), from the makers' data sheets.
DEVICES = {"v100": 125e12, "a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12,
           "l4": 121e12, "l40s": 362e12, "rtx4090": 165e12, "mi300x": 1307e12,
           "tpu-v4": 275e12, "tpu-v5e": 197e12, "tpu-v5p": 459e12}
RULES = ("chinchilla-1", "chinchilla-2", "chinchilla", "chinchilla-epoch")
"""The published rules that a planned number is compared with."""
SHRINK = (1.0, 0.7, 0.5, 0.35, 0.25)
HISTORY = {"GPT-3": (175e9, 300e9), "Gopher": (280e9, 300e9), "Chinchilla": (70e9, 1.4e12)}
"""Parameters and training tokens (Brown 2020, Rae 2021, Hoffmann 2022)."""


@dataclass(frozen=True)
class Smaller:
    """A smaller model trained longer to the same loss. training, serving: its cost as a share of
    the compute-optimal model's (serving: per token). far: how many times its tokens per parameter,
    its size or its tokens lie outside those of the runs (1 inside, and for a published law)."""

    params: float
    tokens: float
    training: float
    serving: float
    far: float = 1.0


@dataclass(frozen=True)
class Serving:
    """The cheapest model of this loss when it also serves `tokens` tokens (Sardana 2023). optimum:
    its training; total: training and inference FLOPs; saved: the share of the compute-optimal
    model's total that it saves."""

    tokens: float
    optimum: Optimum
    total: float
    saved: float


@dataclass(frozen=True)
class Plan:
    """What to train. source: whose law. budget: how the FLOPs came about. rows: the model in words.
    smaller: at the same loss, empty where the law predicts none or the best size is not determined.
    others: sizes by the other published rules at the same FLOPs. warnings: one sentence each."""

    source: str
    budget: str
    optimum: Optimum
    rows: tuple[Row, ...]
    smaller: tuple[Smaller, ...]
    serving: Serving | None
    others: dict[str, Optimum]
    warnings: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The plan in words."""
        out = [f"by {self.source}", self.budget, ""]
        wide = max(22, *(len(what) + 2 for what, _, _ in self.rows))
        out += [f"  {what:<{wide}}{value:<10}{f'  [{span}]' if span else ''}".rstrip()
                for what, value, span in self.rows]
        if self.smaller:
            out += ["", "smaller models of the same loss, trained longer:",
                    "  parameters  tokens    per parameter  training  serving a token"]
            out += [f"  {short(s.params):<12}{short(s.tokens):<10}{s.tokens / s.params:<15,.0f}"
                    f"{s.training:<10.2f}{s.serving:<6.2f}{_far(s.far)}".rstrip()
                    for s in self.smaller]
        if self.serving:
            s = self.serving
            out += ["", f"serving {short(s.tokens)} tokens counted in (2 N a token, Sardana 2023): "
                    f"{short(s.optimum.params)} parameters on {short(s.optimum.tokens)} tokens "
                    f"reach the same loss for {s.total:.3g} FLOPs in all, "
                    f"{s.saved:.0%} less than the compute-optimal model"]
        if self.others:
            out += ["", "the published rules at the same FLOPs:"]
            out += [f"  {name:<18}{short(x.params):<8} parameters, {short(x.tokens):<7} tokens"
                    for name, x in self.others.items()]
        if self.warnings:
            out += ["", *(f"warning: {w}" for w in self.warnings)]
        return out


def _far(far: float) -> str:
    return f"  ({times(far)} times outside what was run)" if far > 1.05 else ""


def find_law(law: Fit | Law | str) -> tuple[Fit | Law, Published | None]:
    """A fit or a formula as it is; a published law by its name."""
    if isinstance(law, str):
        if law not in PUBLISHED:
            raise unknown("published law", law, PUBLISHED)
        return PUBLISHED[law].law, PUBLISHED[law]
    return law, None


def gpu_flops(hours: float, device: str, utilisation: float = 0.4) -> float:
    """FLOPs of so many hours of one device at a share of its peak (model FLOPs utilisation)."""
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if not 0 < utilisation <= 1:
        raise ManyformError(f"utilisation is a share of the peak such as 0.4, not {utilisation!r}")
    if not hours > 0:
        raise ManyformError(f"gpu_hours must be positive, not {hours!r}")
    return hours * 3600 * DEVICES[device] * utilisation


def plan(law: Fit | Law | str, *, flops: float | None = None, loss: float | None = None,
         gpu_hours: float | None = None, device: str = "h100", utilisation: float = 0.4,
         inference_tokens: float | None = None) -> Plan:
    """The best model for training FLOPs, for a target loss, or for GPU-hours.

    law: a fit, a formula, or a name of `PUBLISHED`. device: one of `DEVICES`. inference_tokens:
    tokens that the model will serve; then also the cheapest model of the same loss with them.
    Raises ManyformError where not exactly one budget is given, and where the law cannot answer.
    """
    if sum(x is not None for x in (flops, loss, gpu_hours)) != 1:
        raise ManyformError("give one of flops, loss and gpu_hours")
    found, published = find_law(law)
    budget = f"for a loss of {loss:g}" if loss is not None else ""
    if gpu_hours is not None:
        flops = gpu_flops(gpu_hours, device, utilisation)
        budget = (f"for {gpu_hours:,.4g} hours of {device} at {utilisation:.0%} of "
                  f"{DEVICES[device] / 1e12:,.0f} TFLOP/s: {flops:.3g} FLOPs")
    elif flops is not None:
        budget = f"for {flops:.3g} training FLOPs"
    if isinstance(found, Fit) and isinstance(found.law, Chinchilla):
        return _measured(found, budget, flops, loss, inference_tokens)
    formula = found.law if isinstance(found, Fit) else found
    optimum = found.optimal(flops=flops, loss=loss)
    source = published.source if published else (
        f"a fit to {found.runs.source}" if isinstance(found, Fit) else formula.formula)
    serving = None if inference_tokens is None else \
        with_inference(formula, optimum, inference_tokens)
    return Plan(source, budget, optimum, _rows(optimum), tuple(smaller(formula, optimum)), serving,
                others(optimum.flops) if published else {}, tuple(_warnings(optimum, published)))


def _measured(fit: Fit, budget: str, flops: float | None, loss: float | None,
              inference_tokens: float | None) -> Plan:
    """The plan by a fit, as far as its runs determine it."""
    first: list[Row] = []
    if flops is None:
        assert loss is not None
        flops, span = budget_for(fit, loss)
        first = [("training FLOPs", f"{flops:.3g}", "" if span is None else _budgets(fit, span))]
    found = best(fit, flops)
    warnings, serving, less = list(found.notes), None, []
    if found.determined:
        less = [replace(s, far=_outside(fit, s.params, s.tokens, flops))
                for s in smaller(fit.law, found.law)]
        if inference_tokens is not None:
            serving = with_inference(fit.law, found.law, inference_tokens)
            far = _outside(fit, serving.optimum.params, serving.optimum.tokens, flops)
            if far > FAR:
                warnings.append(f"the model for serving lies {times(far)} times outside what was "
                                "run")
    elif inference_tokens is not None:
        warnings.append("so what a smaller model saves in serving is not determined either")
    return Plan(f"a fit to {fit.runs.source}", budget, found.optimum, (*first, *found.rows()),
                tuple(less), serving, {}, tuple(warnings))


def _budgets(fit: Fit, span: tuple[float, float]) -> str:
    low, high = span
    first = f"{low:.3g}" if low else f"under {fit.runs.flops.min() / FAR:.3g}"
    last = f"{high:.3g}" if np.isfinite(high) else f"over {fit.largest * FAR:.3g}"
    return f"{first} to {last}"


def _outside(fit: Fit, params: float, tokens: float, flops: float) -> float:
    """How many times a model lies outside the sizes, tokens and tokens per parameter of the runs;
    beyond their largest budget the first two may grow as it does."""
    runs, grown = fit.runs, max(1.0, flops / fit.largest)
    ratio = runs.tokens / runs.params
    return float(max(1.0, runs.params.min() / params, params / (runs.params.max() * grown),
                     runs.tokens.min() / tokens, tokens / (runs.tokens.max() * grown),
                     ratio.min() * params / tokens, tokens / params / ratio.max()))


def _rows(o: Optimum) -> tuple[Row, ...]:
    """An optimum without an interval, in words."""
    rows = [("parameters", short(o.params), ""), ("tokens", short(o.tokens), ""),
            ("tokens per parameter", short(o.tokens_per_param), ""),
            ("training FLOPs", f"{o.flops:.4g}", "")]
    return (*rows, *([] if o.loss is None else [("loss", f"{o.loss:.4g}", "")]))


def smaller(law: Law, best: Optimum, shares: Sequence[float] = SHRINK) -> list[Smaller]:
    """Models of these shares of the best size, trained to its loss; those that never reach it are
    left out. [] for a law that predicts no loss of size and tokens."""
    if not isinstance(law, Chinchilla) or best.loss is None:
        return []
    out = []
    for share in shares:
        tokens = float(law.tokens_for(share * best.params, best.loss))
        if np.isfinite(tokens):
            out.append(Smaller(share * best.params, tokens, share * tokens / best.tokens, share))
    return out


def with_inference(law: Law, best: Optimum, tokens: float) -> Serving:
    """Minimise 6 N D + 2 N T over models of the best one's loss (Sardana 2023, arXiv 2401.00448,
    eq. 2; D from the law)."""
    from scipy.optimize import minimize_scalar
    if not isinstance(law, Chinchilla) or best.loss is None:
        raise ManyformError("serving is planned with a law that predicts the loss of size and "
                            "tokens (chinchilla, chinchilla-epoch, or a fit of that form)")
    if not tokens > 0:
        raise ManyformError(f"inference_tokens must be positive, not {tokens!r}")
    per_token = best.flops / (best.params * best.tokens)
    target = best.loss

    def total(log_size: float) -> float:
        size = float(np.exp(log_size))
        return float(np.log(per_token * size * law.tokens_for(size, target) + 2 * size * tokens))

    # Below this size no amount of data reaches the loss; a hair above it costs almost infinity.
    least = (law.A / (target - law.E)) ** (1 / law.alpha)
    found = minimize_scalar(total, bounds=(np.log(least) + 1e-9, np.log(best.params) + 0.1),
                            method="bounded", options={"xatol": 1e-10})
    size = float(np.exp(found.x))
    data = float(law.tokens_for(size, target))
    whole = per_token * size * data + 2 * size * tokens
    plain = best.flops + 2 * best.params * tokens
    return Serving(tokens, Optimum(size, data, per_token * size * data, target), whole,
                   1 - whole / plain)


def others(flops: float) -> dict[str, Optimum]:
    """What the published rules choose for these FLOPs."""
    return {name: PUBLISHED[name].law.optimal(flops=flops) for name in ("kaplan", *RULES)}


@dataclass(frozen=True)
class Verdict:
    """A model of the past under a rule: what the rule would have chosen for its FLOPs. too_large:
    its size over the rule's; too_little: the rule's tokens over its own."""

    model: str
    rule: str
    params: float
    tokens: float
    too_large: float
    too_little: float


def history(rules: Sequence[str] = ("kaplan", *RULES)) -> list[Verdict]:
    """GPT-3, Gopher and Chinchilla under each rule, at their own 6 N D."""
    out = []
    for model, (params, tokens) in HISTORY.items():
        for rule in rules:
            best = find_law(rule)[0].optimal(flops=6 * params * tokens)
            out.append(Verdict(model, rule, best.params, best.tokens, params / best.params,
                               best.tokens / tokens))
    return out


def _warnings(best: Optimum, published: Published | None) -> list[str]:
    if published is None:
        return [best.warning] if isinstance(best, FittedOptimum) and best.warning else []
    out = []
    if published.counting != "total":
        out.append(f"{published.name} counts {published.counting} parameters")
    if best.flops > FAR * published.largest:
        sizes = [x.params for x in others(best.flops).values()]
        out.append(f"{best.flops:.3g} FLOPs is {best.flops / published.largest:,.0f} times the "
                   f"largest run behind this law (about {published.largest:.2g}); the published "
                   f"rules range from {short(min(sizes))} to {short(max(sizes))} parameters there")
    if not isinstance(published.law, Allocation):
        out.append("the paper gives no joint interval of its coefficients, so none comes with "
                   "these numbers; a fit to your own runs has one")
    return out
