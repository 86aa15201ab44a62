"""The plan: from a budget and a calibration to the tokens, seeds and sizes of every run.

A time budget is the whole command's: calibration, learning-rate search, every seed, evaluation and
probes included. A budget in tokens or FLOPs is one training run's ceiling; the search and the
measurements come on top. The plan is written once into the run folder and every later start reads
it, so that noise in the calibration cannot change a result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from manyform.errors import ManyformError

MATCHES = ("params", "flops", "time")
TRIALS = 4  # learning rates tried for each: a grid of three, then one where the best points
TUNE_SHARE = 0.1  # of a run's tokens, for each trial
MIN_STEPS = 20
CURVE_POINTS = 10
PROBE_STEPS = (100, 2000)
PROBE_SHARE = 0.2  # of a time budget, at most, where that allows the least
SAFETY = 0.92  # of the time left is planned; the rest absorbs noise

_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Budget:
    """kind: "time" (amount in seconds), "tokens" or "flops"; text: as given."""

    kind: str
    amount: float
    text: str


def parse_budget(text: str) -> Budget:
    """ "90s", "5m", "1h30m" (time); "20Mtok", "500ktok" (tokens); "1e15" (FLOPs).

    Raises ManyformError for anything else, and for amounts that are not positive.
    """
    given = str(text).strip().lower().replace(" ", "").replace("_", "")
    budget = None
    if re.fullmatch(r"(\d+(\.\d+)?(s|sec|m|min|h|d))+", given):
        parts = re.findall(r"(\d+(?:\.\d+)?)(sec|min|s|m|h|d)", given)
        budget = Budget("time", sum(float(n) * _SECONDS[unit] for n, unit in parts), str(text))
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmgbt]?)tok(ens)?", given):
        budget = Budget("tokens", float(match[1]) * _THOUSANDS[match[2]], str(text))
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)(flops?)?", given):
        if not match[2] and float(match[1]) < 1e9:
            raise ManyformError(f"a budget of {text!r} has no unit: write {text}m for minutes, "
                                f"{text}Mtok for tokens, or FLOPs as in 1e15")
        budget = Budget("flops", float(match[1]), str(text))
    if budget is None:
        raise ManyformError("a budget reads like 90s, 5m, 2h, 20Mtok or 1e15 (FLOPs), not "
                            f"{text!r}")
    if not (0 < budget.amount < math.inf):
        raise ManyformError(f"a budget must be positive, not {text!r}")
    return budget


@dataclass(frozen=True)
class Timing:
    """Seconds of one architecture at the planned shape, as the calibration measured them.

    step: one training step; eval_batch: one validation batch; flops_per_token: training
    operations per token; decode, length: the whole of each task; probe_step: one step of each
    probe, summed by its share of the steps; probe_fixed: scoring them; memory: measuring it.
    """

    step: float
    eval_batch: float
    flops_per_token: float
    decode: float = 0.0
    length: float = 0.0
    probe_step: float = 0.0
    probe_fixed: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What is the same for all: training length, batch, evaluation sizes in batches."""

    length: int
    batch_size: int
    curve_batches: int
    final_batches: int

    @property
    def tokens_per_step(self) -> int:
        return self.length * self.batch_size


@dataclass(frozen=True)
class ArchPlan:
    """steps, tokens and flops of one training run; tuning_steps of one trial; estimated seconds
    of everything this architecture does."""

    steps: int
    tokens: int
    flops: float
    tuning_steps: int
    eval_every: int
    estimated_seconds: float


@dataclass(frozen=True)
class Plan:
    """What will be run. `quantum` is what the match makes equal: steps, training FLOPs or training
    seconds of one run, whichever `match` says; a later architecture is planned from it."""

    budget: str
    match: str
    seeds: int
    length: int
    batch_size: int
    curve_batches: int
    final_batches: int
    quantum: float
    steps: int
    tokens: int
    lr_candidates: tuple[float, ...]
    lr_factor: float
    probe_steps: int
    contexts: tuple[int, ...]
    length_factors: tuple[int, ...]
    archs: dict[str, ArchPlan] = field(default_factory=dict)
    estimated_seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "minutes": self.estimated_seconds.get("total", 0.0) / 60}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        values = {k: v for k, v in values.items() if k != "minutes"}
        for key in ("lr_candidates", "contexts", "length_factors"):
            values[key] = tuple(values[key])
        archs = {name: ArchPlan(**a) for name, a in values["archs"].items()}
        return cls(**{**values, "archs": archs})

    @property
    def shape(self) -> Shape:
        return Shape(self.length, self.batch_size, self.curve_batches, self.final_batches)


class _TooSmallError(Exception):
    """A time budget holds no plan. seconds: the least that would."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def learning_rates(d_model: int) -> tuple[tuple[float, ...], float]:
    """Three candidates and the factor between them: 3e-3 at width 256, falling with the square
    root of the width, as the optimum of Adam does between 1/d (Yang 2022) and a constant."""
    factor = 3.0
    centre = 3e-3 * math.sqrt(256 / d_model)
    return tuple(float(f"{centre * factor**k:.2g}") for k in (-1, 0, 1)), factor


def next_rate(tried: Sequence[tuple[float, float]], factor: float) -> float:
    """The fourth trial, by one rule for all: beyond the edge if the best rate stands there, else
    halfway (on a log scale) towards the better neighbour.

    tried: (rate, bits per byte), infinite where it diverged.
    """
    order = sorted(tried)
    best = min(range(len(order)), key=lambda i: order[i][1])
    rate = order[best][0]
    if best == 0:
        value = rate / factor
    elif best == len(order) - 1:
        value = rate * factor
    else:
        left, right = order[best - 1][1], order[best + 1][1]
        value = rate * factor ** (0.5 if right < left else -0.5)
    return float(f"{value:.2g}")


def tuning_steps(steps: int) -> int:
    """Steps of one learning-rate trial of a run of `steps`."""
    return max(min(steps, MIN_STEPS), round(TUNE_SHARE * steps))


def make_plan(budget: Budget, timings: Mapping[str, Timing], shape: Shape, *, match: str = "params",
              seeds: int | None = None, d_model: int = 128, spent: float = 0.0,
              contexts: Sequence[int] = (256, 1024, 4096, 16384),
              length_factors: Sequence[int] = (1, 2, 4, 8),
              probe_steps: int | None = None) -> Plan:
    """The plan for these architectures.

    timings: one for each architecture at its matched size. seeds: None lets the budget decide
    (one to three). spent: seconds of a time budget already gone. Raises ManyformError where the
    budget allows no sensible plan, naming the least that would.
    """
    if match not in MATCHES:
        raise ManyformError(f"match must be one of {', '.join(MATCHES)}, not {match!r}")
    if seeds is not None and seeds < 1:
        raise ManyformError(f"seeds must be at least 1, not {seeds}")
    if not timings:
        raise ManyformError("no architecture is left to compare")
    if probe_steps is not None and probe_steps < 0:
        raise ManyformError(f"probe_steps must be at least 0, not {probe_steps}")
    weights = {name: _weight(t, match, shape) for name, t in timings.items()}
    # A budget without room for the shortest probes has none.
    offers = [_probe_steps(budget, timings), 0] if probe_steps is None else [probe_steps]
    for probe_steps in offers:
        try:
            quantum, runs = _quantum(budget, timings, weights, shape, match, seeds, spent,
                                       probe_steps)
            break
        except _TooSmallError as error:
            least = error.seconds
    else:
        raise ManyformError(
            f"a budget of {budget.text} is too small for {len(timings)} architectures on this "
            f"machine: about {_duration(least)} would be the least ({MIN_STEPS} training steps "
            "each, the learning-rate search and evaluation); give more time, fewer architectures, "
            "or smaller models (--d-model, --layers)")
    candidates, factor = learning_rates(d_model)
    plan = Plan(budget.text, match, runs, shape.length, shape.batch_size, shape.curve_batches,
                shape.final_batches, quantum, 0, 0, candidates, factor, probe_steps,
                tuple(contexts), tuple(length_factors))
    return extend_plan(plan, timings, spent=spent)


def extend_plan(plan: Plan, timings: Mapping[str, Timing], *, spent: float = 0.0,
                seeds: int | None = None) -> Plan:
    """The same plan with these architectures added (or with more seeds)."""
    seeds = seeds or plan.seeds
    shape, archs = plan.shape, dict(plan.archs)
    parts = dict(plan.estimated_seconds) or {
        "calibration": 0.0, "tuning": 0.0, "training": 0.0, "evaluation": 0.0, "decoding": 0.0,
        "length": 0.0, "probes": 0.0}
    parts.pop("total", None)
    parts["calibration"] += spent
    for name, t in timings.items():
        steps = max(1, int(plan.quantum * _weight(t, plan.match, shape) + 1e-9))
        trial = tuning_steps(steps)
        mine = _seconds(t, steps, seeds, shape, plan.probe_steps)
        for key, value in mine.items():
            parts[key] += value
        tokens = steps * shape.tokens_per_step
        archs[name] = ArchPlan(steps, tokens, tokens * t.flops_per_token, trial,
                               max(1, round(steps / CURVE_POINTS)), sum(mine.values()))
    parts["total"] = sum(parts.values())
    most = max(a.steps for a in archs.values())
    return Plan(**{**{k: getattr(plan, k) for k in plan.__dataclass_fields__}, "seeds": seeds,
                   "archs": archs, "estimated_seconds": parts, "steps": most,
                   "tokens": most * shape.tokens_per_step})


def _weight(t: Timing, match: str, shape: Shape) -> float:
    """Steps per unit of what the match makes equal."""
    if match == "time":
        return 1 / t.step
    if match == "flops":
        return 1 / (t.flops_per_token * shape.tokens_per_step)
    return 1.0


def _seconds(t: Timing, steps: float, seeds: int, shape: Shape, probe_steps: int,
             ) -> dict[str, float]:
    """Estimated seconds of everything one architecture does."""
    trial = max(min(steps, MIN_STEPS), TUNE_SHARE * steps)
    evaluations = seeds * (CURVE_POINTS * shape.curve_batches + shape.final_batches)
    return {"tuning": TRIALS * (trial * t.step + shape.final_batches * t.eval_batch),
            "training": seeds * steps * t.step, "evaluation": evaluations * t.eval_batch,
            "decoding": t.decode + t.memory, "length": t.length,
            "probes": probe_steps * t.probe_step + t.probe_fixed if probe_steps else 0.0}


def _probe_steps(budget: Budget, timings: Mapping[str, Timing]) -> int:
    """Training steps of each probe: the same for all, within the share that a time budget
    leaves them."""
    low, high = PROBE_STEPS
    if budget.kind != "time":
        return high
    per_step = sum(t.probe_step for t in timings.values())
    if per_step <= 0:
        return high
    return int(min(high, max(low, PROBE_SHARE * budget.amount / per_step)) // 50 * 50)


def _quantum(budget: Budget, timings: Mapping[str, Timing], weights: Mapping[str, float],
             shape: Shape, match: str, seeds: int | None, spent: float, probe_steps: int,
             ) -> tuple[float, int]:
    """What the match makes equal (see `Plan.quantum`), and the seeds."""
    if budget.kind != "time":
        if budget.kind == "tokens":
            limits = {n: budget.amount / shape.tokens_per_step for n in timings}
        else:
            limits = {n: budget.amount / (t.flops_per_token * shape.tokens_per_step)
                      for n, t in timings.items()}
        quantum = min(limits[n] / weights[n] for n in timings)
        least = min(quantum * w for w in weights.values())
        if least < MIN_STEPS:
            needed = budget.amount * MIN_STEPS / max(least, 1e-9)
            unit = "tokens" if budget.kind == "tokens" else "FLOPs"
            raise ManyformError(
                f"a budget of {budget.text} is too small: at batches of {shape.tokens_per_step:,} "
                f"tokens, at least {needed:,.3g} {unit} are needed for {MIN_STEPS} steps each; "
                "give more, or a smaller --batch-size or --length")
        return quantum, seeds or 2
    available = SAFETY * (budget.amount - spent)

    def total(q: float, n: int) -> float:
        return sum(sum(_seconds(t, q * weights[name], n, shape, probe_steps).values())
                   for name, t in timings.items())

    def largest(n: int) -> float:
        """The largest quantum that fits (the total grows with it), 0 if none does."""
        low, high = 0.0, 1.0 / min(weights.values())
        if total(low, n) > available:
            return 0.0
        while total(high, n) <= available and high * max(weights.values()) < 1e9:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if total(middle, n) <= available else (low, middle)
        return low

    needed_steps = MIN_STEPS / min(weights.values())
    for n in ([seeds] if seeds else [3, 2, 1]):
        quantum = largest(n)
        steps = quantum * min(weights.values())
        # More seeds come before more tokens only where each run still learns something.
        wanted = {3: 2000, 2: 100}.get(n, MIN_STEPS) if seeds is None else MIN_STEPS
        if steps >= wanted:
            return quantum, n
    least = spent + total(needed_steps, seeds or 1) / SAFETY
    raise _TooSmallError(least)


def _duration(seconds: float) -> str:
    """ "95s" or "12m": a budget that can be given back."""
    return f"{math.ceil(seconds)}s" if seconds < 300 else f"{math.ceil(seconds / 60)}m"
