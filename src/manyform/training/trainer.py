"""The engine of training: one optimizer step at a time, no folders, no printing."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from manyform import state as states
from manyform.errors import ManyformError
from manyform.model import Model
from manyform.precision import autocast
from manyform.training.allocator import keep_large_blocks
from manyform.training.config import TrainConfig
from manyform.training.guard import Guard
from manyform.training.machine import resolve_precision
from manyform.training.masking import Masking
from manyform.training.optimizer import Optimizer
from manyform.training.schedule import learning_rate

IGNORE = -100
"""The target that is not counted, as in `Model.loss`."""


class Batch(Protocol):
    """tokens, targets: (rows, length) int64; reset: (rows, length) bool, or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def reset(self) -> Tensor | None: ...


class Batches(Protocol):
    """Training data: what step `step` sees is a function of `step` alone."""

    def batch(self, step: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step was.

    step, position: the step's index and the index of the batch it saw. loss: nats per token before
    the update. grad_norm: before clipping. tokens, seconds: of this step. flops: forward and
    backward, as the model declares. event: why the update was skipped, or "".
    """

    step: int
    position: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    flops: float
    event: str = ""


class Trainer:
    """Trains a model on batches by a config; `step()` does one step, `done` says when to stop.

    model: moved to `device` if one is given. batches: an object whose `batch(position)` gives
      `tokens`, `targets` and `reset`; with tbptt, row r of each batch must continue row r of the
      one before.
    With objective="masked" the last token of the model's vocabulary is the mask.
    Attributes: step_count (steps done), position (batches consumed: differs from step_count only
      after data was skipped), tokens (trained on), guard, precision ("bf16" or "fp32"), config.
    Raises ManyformError where the config cannot apply to the model.
    """

    def __init__(self, model: Model, batches: Batches, config: TrainConfig, *,
                 device: torch.device | str | None = None) -> None:
        if device is not None:
            model.to(device)
        self.model = model.train()
        self.batches = batches
        self.config = config
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_large_blocks()
        self.precision = resolve_precision(config.precision, self.device)
        self.masking = Masking(model, config.seed) if config.objective == "masked" else None
        if self.masking is None and not model.causal:
            raise ManyformError(
                f"{model.config.name or 'this model'} looks ahead, and next-token loss means "
                "nothing for a model that sees the next token; train it with objective='masked' "
                "(--objective masked)")
        if config.tbptt:
            _refuse_tbptt(model)
        self.optimizer = Optimizer(model, config)
        self.guard = Guard(config.spike, config.patience)
        self.step_count = 0
        self.position = 0
        self.tokens = 0
        self.flops_per_token = model.cost(config.length).training_flops_per_token
        self._carried: list[Any] = [None] * config.accumulation

    @property
    def done(self) -> bool:
        """True once all steps of the config are made."""
        return self.step_count >= self.config.total_steps

    def step(self) -> StepResult:
        """One optimizer step: gradients of one batch, the guard's verdict, the update."""
        started = time.perf_counter()
        batch = self.batches.batch(self.position)
        if self.masking is not None:
            batch = self.masking(batch, self.position)
        lr = learning_rate(self.step_count, self.config)
        loss = self._gradients(batch)
        norm, event = self._update(loss, lr)
        self.optimizer.zero_grad()
        tokens = batch.tokens.numel()
        result = StepResult(self.step_count, self.position, loss, norm, lr, tokens,
                            time.perf_counter() - started, self.flops_per_token * tokens, event)
        self.step_count += 1
        self.position += 1
        self.tokens += tokens
        return result

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the model runs in."""
        return autocast(self.device, self.precision)

    def _gradients(self, batch: Any) -> float:
        """Leave the whole batch's gradients on the parameters; returns its mean loss."""
        parts = self.config.accumulation
        whole_count = int((batch.targets != IGNORE).sum()) if parts > 1 else 1
        losses: list[Tensor] = []
        for i, (tokens, targets, reset) in enumerate(self._parts(batch, parts)):
            with self.autocast():
                loss, after = self.model.loss(tokens, targets, self._carried[i], reset=reset)
            if parts > 1:
                # A part's loss is the mean over its own tokens: weigh it by its share of them.
                loss = loss * (int((targets != IGNORE).sum()) / max(1, whole_count))
            loss.backward()
            losses.append(loss.detach())
            if self.config.tbptt:
                # A copy of fixed layout: a resumed run must see the same memory order to be
                # bit-identical, and the graph and spare capacity of this step must go.
                self._carried[i] = states.map_tensors(
                    lambda t: t.detach().clone(memory_format=torch.contiguous_format), after)
        return (losses[0] if parts == 1 else torch.stack(losses).sum()).item()

    def _parts(self, batch: Any, parts: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        tokens, targets, reset = batch.tokens, batch.targets, batch.reset
        if self.device.type != "cpu":
            tokens, targets = (t.to(self.device, non_blocking=True) for t in (tokens, targets))
            reset = reset.to(self.device, non_blocking=True) if reset is not None else None
        if parts == 1:
            return [(tokens, targets, reset)]
        cut_reset = reset.tensor_split(parts) if reset is not None else [None] * parts
        return list(zip(tokens.tensor_split(parts), targets.tensor_split(parts), cut_reset,
                        strict=True))

    def _update(self, loss: float, lr: float) -> tuple[float, str]:
        """Clip and apply the gradients unless the guard objects; the norm before clipping."""
        gradients = self.optimizer.gradients()
        norm = torch.nn.utils.get_total_norm(gradients, foreach=_foreach(self.device)).item()
        event = self.guard.judge(loss, norm)
        if event:
            self._carried = [None] * self.config.accumulation
            return norm, event
        clip = self.config.clip
        if clip is not None and norm > clip:
            torch._foreach_mul_(gradients, clip / norm)
        self.optimizer.step(lr)
        return norm, ""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as a tree of dicts, lists, tensors, numbers.

        Tensors are the live ones: copy or write them before the next step.
        """
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state_dict(), "step": self.step_count, "position": self.position,
            "tokens": self.tokens, "precision": self.precision, "random": _random_state(),
            "carried": [None if c is None else list(states.tensors(c)) for c in self._carried]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, in this process or another; the weights stay as they are
        where `state` has none."""
        if "model" in state:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.step_count, self.position = state["step"], state["position"]
        self.tokens, self.precision = state["tokens"], state["precision"]
        self._carried = [None if c is None else self._state_like(c) for c in state["carried"]]
        _set_random_state(state["random"])

    def _state_like(self, flat: list[Tensor]) -> Any:
        """The carried state's tree around its tensors."""
        like = self.model.initial_state(flat[0].shape[0])
        moved = iter(flat)
        return states.map_tensors(lambda t: next(moved).to(t.device, copy=True), like)


def _foreach(device: torch.device) -> bool | None:
    """On a CPU torch takes the fused form of a list operation only when it is asked to."""
    return True if device.type == "cpu" else None


def _refuse_tbptt(model: Model) -> None:
    if not model.causal:
        raise ManyformError("tbptt carries a state, and this model is not causal and has none")
    for block in model.blocks.layers:
        if block.mixer.growth[0] == "linear":
            raise ManyformError(
                f"tbptt carries a state over the whole text, and the state of "
                f"{type(block.mixer).__name__} grows with it; give the mixer a window, or train "
                "without tbptt")
    if model.config.position in ("learned", "axial"):
        raise ManyformError("tbptt runs past the end of a learned position table; use another "
                            "position, or train without tbptt")


def seed_all(seed: int) -> None:
    """Start every generator that a layer may draw from at `seed`."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def _random_state() -> dict[str, Any]:
    """The generators that a layer may draw from: torch (CPU and CUDA), numpy, random."""
    name, keys, *rest = numpy.random.get_state()
    version, numbers, gauss = random.getstate()
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, [int(k) for k in keys], *rest],
            "python": [version, list(numbers), gauss]}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
