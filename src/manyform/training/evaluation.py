"""Loss on data that was not trained on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from manyform.errors import ManyformError
from manyform.model import Model
from manyform.training.machine import resolve_precision
from manyform.training.trainer import autocast


@dataclass(frozen=True)
class Evaluation:
    """nats: mean cross-entropy per token. bits_per_byte: the same per byte of text, which does not
    depend on the tokenizer (None where the data does not know its bytes). tokens: evaluated."""

    nats: float
    bits_per_byte: float | None
    tokens: int
    seconds: float


@torch.no_grad()
def evaluate(model: Model, batches: Any, *, tokens: int = 65536, rows: int | None = None,
             precision: str = "auto") -> Evaluation:
    """The model's loss on the first `tokens` tokens of `batches`, each row from an empty state.

    batches: an object with `rows(start, count)` (tokens, targets, reset), `length`, `batch_size`
      and `num_rows`, as `manyform.data.Batches`; `batches.data.bits_per_byte(nats)` if it has one.
    rows: rows computed at a time (the batch's own size if None).
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    context = autocast(device, resolve_precision(precision, device))
    rows = rows or batches.batch_size
    wanted = min(batches.num_rows, max(1, -(-tokens // batches.length)))
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for start in range(0, wanted, rows):
            part = batches.rows(start, min(rows, wanted - start))
            seen = int((part.targets != -100).sum())
            reset = part.reset.to(device) if part.reset is not None else None
            with context:
                loss, _ = model.loss(part.tokens.to(device), part.targets.to(device), reset=reset)
            total, count = total + loss.item() * seen, count + seen
    finally:
        model.train(was_training)
    if count == 0:
        raise ManyformError("there is nothing to evaluate on: the validation part is empty")
    nats = total / count
    measure = getattr(getattr(batches, "data", None), "bits_per_byte", None)
    return Evaluation(nats, measure(nats) if measure else None, count,
                      time.perf_counter() - started)
