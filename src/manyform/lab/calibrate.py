"""A few seconds with each architecture at the planned shape: what the plan is computed from.

It also warms what is compiled on first use, so that no run pays for another's compilation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from manyform.lab.decode import CHUNK, decode_costs
from manyform.lab.match import Size
from manyform.lab.measure import (
    probe_model,
    probe_trainer,
    seeded,
    train_config,
    validate,
)
from manyform.lab.plan import Shape, Timing
from manyform.lab.probes import BATCH, PROBES, TESTED
from manyform.training import Trainer

SECONDS = 1.0
"""Of timed training steps for each architecture, about."""


def calibrate(size: Size, data: Any, shape: Shape, device: torch.device, precision: str, *,
              contexts: Sequence[int], factors: Sequence[int], length_windows: int,
              probe_options: dict[str, Any] | None = None) -> Timing:
    """Measure one architecture at its size. Whatever its layers raise comes through."""
    model = seeded(size, data.vocab_size, 0, device)
    config = train_config(1000, 1e-3, batch_size=shape.batch_size, length=shape.length,
                          precision=precision)
    batches = data.batches(batch_size=shape.batch_size, length=shape.length, seed=0)
    trainer = Trainer(model, batches, config)
    step = step_seconds(trainer)
    validation = data.validation(shape.length, shape.tokens_per_step, batch_size=shape.batch_size)
    validate(model, validation, precision)
    evaluation = _timed(lambda: validate(model, validation, precision))
    probe_step, probe_fixed = 0.0, 0.0
    for probe in PROBES.values():
        small = probe_model(size.arch, probe, probe_options or {}, device)
        seconds = step_seconds(probe_trainer(small, probe, 100), most=0.2)
        probe_step += probe.share * seconds
        # Scoring is forward only (a third of a step), at longer sequences.
        batches_scored = TESTED / BATCH
        probe_fixed += seconds / 2 * batches_scored * (
            probe.test_length / probe.train_length + (probe.test_length != probe.train_length))
    reach = sum(factors) * shape.length * length_windows / shape.tokens_per_step
    return Timing(step=step, eval_batch=evaluation, flops_per_token=trainer.flops_per_token,
                  decode=_decode_seconds(model, contexts), length=2 * reach * evaluation,
                  probe_step=probe_step, probe_fixed=probe_fixed, memory=4 * step + 0.2)


def step_seconds(trainer: Trainer, *, most: float = SECONDS) -> float:
    """Median seconds of a training step, after two that warm up."""
    for _ in range(2):
        first = trainer.step().seconds
    times: list[float] = []
    while len(times) < 3 or (sum(times) < most and len(times) < 20):
        times.append(trainer.step().seconds)
        if first > most and len(times) >= 1:
            break
    return statistics.median(times)


@torch.inference_mode()
def _decode_seconds(model: Any, contexts: Sequence[int]) -> float:
    """An estimate of the decoding task: a chunk read and a few tokens decoded, extrapolated.
    The cost of a chunk grows with what came before it for attention, so half again as much."""
    first = min(min(contexts), CHUNK)
    decode_costs(model, [first], repeats=4)
    whole = _timed(lambda: decode_costs(model, [first], repeats=4))
    rest = (max(contexts) / first) * whole * 0.5
    return whole * (1 + len(contexts)) + rest


def _timed(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

