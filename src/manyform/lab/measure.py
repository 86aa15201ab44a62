"""What each task does: a resumable training run, and the measurements on a model."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyform.errors import ManyformError
from manyform.lab.decode import peak_memory
from manyform.lab.match import Size, natural_depth
from manyform.lab.probes import (
    BATCH,
    D_MODEL,
    LEARNING_RATE,
    N_LAYERS,
    Probe,
    examples,
    score,
    wilson,
)
from manyform.ops.operation import trace
from manyform.precision import autocast
from manyform.training import TrainConfig, Trainer, checkpoint

CURVE_ROWS = 60
"""Points of a training curve, about."""

Report = Callable[..., None]
"""report(share, loss=, bpb=, rate=): how far a task is."""


class DivergedError(ManyformError):
    """The loss of a run stopped being finite, or kept jumping."""


@dataclass(frozen=True)
class Checks:
    """What a run is validated on. every: steps between looks (0: none before the end); curve,
    final: the `Validation` of those looks and of the one after training."""

    every: int
    curve: Any
    final: Any


def seeded(size: Size, vocab_size: int, seed: int, device: torch.device) -> Any:
    """The model with the weights of that seed, the same on every device."""
    torch.manual_seed(seed)
    return size.create(vocab_size).to(device)


def train_config(steps: int, lr: float, *, batch_size: int, length: int, precision: str,
                 seed: int = 0) -> TrainConfig:
    """The recipe that all runs of a comparison share; only steps, lr and seed differ."""
    return TrainConfig(steps=steps, lr=lr, batch_size=batch_size, length=length, seed=seed,
                       precision=precision, warmup=0.05, decay=0.3, weight_decay=0.1)


def train_run(model: Any, batches: Any, checks: Checks, config: TrainConfig, *,
              folder: Path | None = None, checkpoint_seconds: float = 20.0,
              report: Report = lambda *a, **k: None) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `folder` if there is one.

    -> {"curve", "final_bpb", "seconds" (of the training steps alone), "tokens", "flops",
    "tokens_per_second", "events"}. Everything but the timings is the same however often the run
    was interrupted. Raises DivergedError.
    """
    trainer = Trainer(model, batches, config)
    log: dict[str, Any] = {"curve": [], "seconds": 0.0, "losses": [], "events": []}
    if folder is not None:
        found = checkpoint.load_newest(folder, model, lambda text: None)
        if found is not None:
            log = found.pop("log")
            trainer.load_state_dict({**found, "model": model.state_dict()})
    total = config.total_steps
    every = max(1, total // CURVE_ROWS)
    saved = time.perf_counter()
    while not trainer.done:
        done = trainer.step()
        log["seconds"] += done.seconds
        if done.event:
            log["events"].append({"step": done.step, "event": done.event})
        if trainer.guard.diverged:
            raise DivergedError(f"training diverged at step {done.step} of {total} (learning rate "
                           f"{config.lr:g}, seed {config.seed}): {done.event} in "
                           f"{trainer.guard.streak} steps in a row")
        if not done.event:
            log["losses"].append(done.loss)
        step = trainer.step_count
        look = bool(checks.every) and (step % checks.every == 0 or step == total)
        if look or step % every == 0 or step == total:
            bpb = validate(model, checks.curve, trainer.precision) if look else None
            losses, log["losses"] = log["losses"], []
            log["curve"].append({
                "step": step, "tokens": trainer.tokens,
                "flops": trainer.flops_per_token * trainer.tokens, "seconds": log["seconds"],
                "train_loss": sum(losses) / len(losses) if losses else None, "val_bpb": bpb})
            report(step / total, loss=done.loss, bpb=bpb, rate=trainer.tokens / log["seconds"])
        else:
            report(step / total, loss=done.loss, rate=trainer.tokens / log["seconds"])
        if folder is not None and time.perf_counter() - saved >= checkpoint_seconds:
            state = {k: v for k, v in trainer.state_dict().items() if k != "model"}
            checkpoint.save(folder, step, model, {**state, "log": log}, anchor=False)
            checkpoint.rotate(folder, 2)
            saved = time.perf_counter()
    final = validate(model, checks.final, trainer.precision)
    if not math.isfinite(final):
        raise DivergedError(f"the validation loss after training is not finite (learning rate "
                       f"{config.lr:g}, seed {config.seed})")
    return {"curve": log["curve"], "final_bpb": final, "seconds": log["seconds"],
            "steps": total, "tokens": trainer.tokens,
            "flops": trainer.flops_per_token * trainer.tokens,
            "tokens_per_second": trainer.tokens / log["seconds"], "events": log["events"]}


@torch.no_grad()
def validate(model: Any, validation: Any, precision: str) -> float:
    """Bits per byte over all batches of a `manyform.data.Validation`."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in validation:
        counted, (tokens, targets, reset) = batch.counted, batch.to(device)
        with autocast(device, precision):
            loss, _ = model.loss(tokens, targets, reset=reset)
        total, count = total + loss.item() * counted, count + counted
    model.train(was_training)
    return validation.bits_per_byte(total / count)


def forget(folder: Path) -> None:
    """Delete the checkpoints of a run that has ended."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


class _Examples:
    """A probe's training examples in the form that Trainer reads."""

    @dataclass(frozen=True)
    class Batch:
        tokens: torch.Tensor
        targets: torch.Tensor
        reset: None = None

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def batch(self, step: int) -> Any:
        return self.Batch(*examples(self.probe, 0, step, BATCH, self.probe.train_length))


def probe_model(arch: str, probe: Probe, options: dict[str, Any], device: torch.device) -> Any:
    """The small model that every architecture sends to a probe.

    The head has weights of its own: sharing the embedding's kept attention from finding recall
    within these few steps (0.33 after 400 steps, 1.00 with a head of its own).
    """
    size = Size(arch, D_MODEL, natural_depth(arch, N_LAYERS), 0, 1, {"tie": False, **options})
    return seeded(size, probe.vocab_size, 0, device)


def run_probe(arch: str, probe: Probe, steps: int, device: torch.device, *,
              options: dict[str, Any] | None = None, report: Report = lambda *a, **k: None,
              ) -> dict[str, Any]:
    """Train a small model on the probe, for its share of `steps`, and score it on fresh examples.

    -> {"accuracy", "low", "high" (95%), its continuous twins "log_prob" (mean, nats), "bits" and
    "brier" of the same answers, "chance", "n", "setting", "train_length", "test_length",
    "at_train_length" and "bits_at_train_length" (accuracy and bits there), "exact" (share of
    sequences whose every answer is right), "answers" (of a sequence), "exact_bits" and
    "exact_brier" (means over those answers), "steps", "params", "seconds"}.
    """
    started = time.perf_counter()
    steps = probe.steps(steps)
    model = probe_model(arch, probe, options or {}, device)
    trainer = probe_trainer(model, probe, steps)
    while not trainer.done:
        done = trainer.step()
        report(trainer.step_count / steps, loss=done.loss)
        if trainer.guard.diverged:
            raise DivergedError(f"training on the probe diverged at step {done.step}")
    last, whole = score(model, probe, probe.test_length)
    near = last
    if probe.test_length != probe.train_length:
        near, _ = score(model, probe, probe.train_length)
    low, high = wilson(round(last.exact * last.items), last.items)
    return {"accuracy": last.exact, "low": low, "high": high, "log_prob": last.log_prob,
            "bits": last.bits, "brier": last.brier, "chance": probe.chance, "n": last.items,
            "exact": whole.exact, "answers": whole.tokens, "exact_bits": whole.bits,
            "exact_brier": whole.brier,
            "setting": f"{probe.setting}; {steps} steps of {BATCH} sequences, "
                       f"{model.config.n_layers} layers of width {D_MODEL}",
            "train_length": probe.train_length, "test_length": probe.test_length,
            "at_train_length": near.exact, "bits_at_train_length": near.bits, "steps": steps,
            "params": model.num_params(), "seconds": time.perf_counter() - started}


def probe_trainer(model: Any, probe: Probe, steps: int) -> Trainer:
    """The recipe of the probes, the same for all."""
    config = TrainConfig(steps=steps, lr=LEARNING_RATE, batch_size=BATCH,
                         length=probe.train_length, precision="fp32", schedule="cosine",
                         warmup=0.05, weight_decay=0.01, spike=0)
    return Trainer(model, _Examples(probe), config)


def memory_and_paths(model: Any, batches: Any, config: TrainConfig) -> dict[str, Any]:
    """Peak memory of a training step after the first, and the form that each operation took.

    -> {"peak_memory_bytes", "method", "paths", "resident_bytes"}.
    """
    trainer = Trainer(model, batches, config)
    with trace() as seen:
        trainer.step()  # makes the optimizer's state, and is the step that is traced
    resident = sum(t.numel() * t.element_size() for t in model.parameters())
    resident += sum(t.numel() * t.element_size() for s in trainer.optimizer.state_dict().values()
                    for t in s.values())
    peak, method = peak_memory(trainer.step, trainer.device, resident)
    paths: dict[str, list[str]] = {}
    for op, path in sorted(seen):
        paths.setdefault(op, []).append(path)
    return {"peak_memory_bytes": peak, "resident_bytes": resident, "method": method,
            "paths": {op: " and ".join(names) for op, names in paths.items()}}


def length_windows(data: Any, span: int, count: int) -> tuple[torch.Tensor, str]:
    """`count` windows of span + 1 validation tokens spread evenly over the documents that hold
    one, and a note. -> (count, span + 1) int64; over all of the text, boundaries included, if
    no document is so long; none if the text is too short even then."""
    tokens = data.tokens("val")
    size = len(tokens)
    starts = np.asarray(data.documents("val"))
    lengths = np.diff(starts, append=size)
    places = np.concatenate([
        np.arange(a, a + n - span, span) for a, n in zip(starts, lengths, strict=True)
        if n > span] or [np.empty(0, dtype=np.int64)])
    note = ""
    if not len(places):
        places = np.arange(0, max(0, size - span), max(1, span // 4))
        note = "no validation document is long enough: windows run across documents"
    chosen = places[np.unique(np.linspace(0, len(places) - 1, count).astype(np.int64))] \
        if len(places) else places
    return torch.from_numpy(tokens[chosen[:, None] + np.arange(span + 1)]), note


@torch.no_grad()
def length_losses(model: Any, data: Any, length: int, factors: tuple[int, ...], precision: str, *,
                  count: int = 16, report: Report = lambda *a, **k: None) -> list[dict[str, Any]]:
    """Bits per byte of the same validation tokens with more and more text before them.

    For each factor the model reads the last factor * length tokens of a window from an empty
    state, and the last `length` of its predictions are scored: the scored tokens are the same for
    all factors, only the context grows. A factor that a model cannot reach has "bpb" None and the
    sentence why in "note".
    """
    device = next(model.parameters()).device
    windows, note = length_windows(data, max(factors) * length, count)
    scored = windows[:, -length:]
    text = scored.numel() * data.bytes_per_token
    if data.byte_lengths is not None:
        text = float(np.asarray(data.byte_lengths)[scored.numpy()].sum())
    model.eval()
    rows = []
    for i, factor in enumerate(factors):
        span = factor * length
        row: dict[str, Any] = {"factor": factor, "length": span, "bpb": None, "note": note}
        if not len(windows):
            row["note"] = (f"the validation split has {len(data.tokens('val')):,} tokens, fewer "
                           f"than {max(factors) * length + 1:,} in a row")
        else:
            try:
                bits = sum(_scored_nats(model, part[:, -span - 1:].to(device), length, precision)
                           for part in windows.split(max(1, 16384 // span))) / math.log(2)
                row["bpb"] = bits / text if math.isfinite(bits) else None
                row["note"] = note if math.isfinite(bits) else "the loss is not finite"
            except ManyformError as error:
                row["note"] = str(error)
        rows.append(row)
        report((i + 1) / len(factors))
    return rows


def _scored_nats(model: Any, window: torch.Tensor, length: int, precision: str) -> float:
    """Summed loss of the last `length` predictions."""
    targets = window[:, 1:].clone()
    targets[:, :-length] = -100
    with autocast(window.device, precision):
        loss, _ = model.loss(window[:, :-1], targets)
    return loss.item() * len(window) * length
