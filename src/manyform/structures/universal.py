"""The Universal Transformer: one block again and again, at each position as long as it asks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.block import BlockState
from manyform.contract import Cost, CostGrowth, Place, StateGrowth, add_loss, mixer
from manyform.errors import ManyformError
from manyform.positions import sinusoidal
from manyform.structures.composite import Composite, growth_of

WORTH = 0.75
"""Up to this share of running positions the others are left out: picking has a cost too."""


class UniversalState(NamedTuple):
    """position: (batch,) int64, tokens since the row's document began; steps: the layers' states
    of every step of the recurrence over depth."""

    position: Tensor
    steps: tuple[tuple[BlockState, ...], ...]


@mixer("universal_transformer")
class UniversalTransformer(Composite):
    """s^n = block(s^(n-1) + P^n) for n = 1 ... steps (Dehghani 2018, arXiv:1807.03819, section
    2.1), with one set of weights and P^n_i the sum of the sinusoids of position i and of step n.

    adaptive: every position halts by itself (section 2.2; Graves 2016, arXiv:1603.08983, eq. 5 to
      13). With h^n = sigmoid(w . s^n + b), it runs for N steps, the first at which the sum of h
      reaches 1 - epsilon, or all; its output is sum_{n<N} h^n s^n + R s^N with the remainder
      R = 1 - sum_{n<N} h^n, and its state is copied to the later steps, where other positions still
      read it. False: the output is the last state.
    ponder: weight of the mean of N + R in the training loss.
    block: pattern of what one step applies. norm, residual: of that block (the paper's are post).

    Exact in streaming: whether a position halts depends on it and its past alone. A halted one must
    still be read at the steps of others, so the mixers run at all steps; the last channel runs
    where a position does, and where none does a step leaves its state and nothing to learn from.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), steps: int = 6,
                 adaptive: bool = True, ponder: float = 0.01, epsilon: float = 0.01,
                 block: str = "attention(position='none') + mlp(activation='relu')",
                 norm: str = "layer", residual: str = "post") -> None:
        super().__init__(d_model, place=place, norm=norm, residual=residual)
        if steps < 1:
            raise ManyformError(f"steps of universal_transformer must be at least 1, not {steps}")
        if not 0 < epsilon < 1 or ponder < 0:
            raise ManyformError("epsilon of universal_transformer must lie between 0 and 1, and "
                                f"ponder be at least 0; given: {epsilon} and {ponder}")
        self.steps, self.adaptive, self.ponder, self.epsilon = steps, adaptive, ponder, epsilon
        self.block = self.build_stack(block, "block")
        self.discrete = self.discrete or adaptive
        self.exact_cost = not adaptive
        last = self.block.layers[-1]
        self.spares = (adaptive and last.channel is not None and last.stateless
                       and residual != "residual_dual")
        if adaptive:
            # w, then b; b begins at one as in the released code: few steps at first.
            self.halt = nn.Parameter(torch.empty(d_model + 1).normal_(std=0.02))
            with torch.no_grad():
                self.halt[-1] = 1.0

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """That of the block."""
        return growth_of(self.block)

    def forward(self, x: Tensor, state: UniversalState | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, UniversalState]:
        shared = {} if shared is None else shared
        batch, length, d = x.shape
        positions = self.positions(state, x, reset)
        where = sinusoidal(positions, d).to(x.dtype)
        when = sinusoidal(torch.arange(1, self.steps + 1, device=x.device), d).to(x.dtype)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        s, y, after = x, torch.zeros_like(x, dtype=wide), []
        spent = x.new_zeros(batch, length, dtype=wide)  # the sum of h so far
        cost = torch.zeros_like(spent)
        running = torch.ones_like(spent, dtype=torch.bool)
        for n in range(self.steps):
            new, layers = self._step(s + where + when[n], None if state is None else state.steps[n],
                                     reset, shared, running if n and self.spares else None)
            after.append(layers)
            if new is None:
                continue
            if not self.adaptive:
                s = new
                continue
            s = torch.where(running[..., None], new, s)
            h = torch.sigmoid((s.to(wide) * self.halt[:-1]).sum(-1) + self.halt[-1])
            halts = running & (spent + h >= 1 - self.epsilon)
            if n == self.steps - 1:
                halts = running
            remainder = 1 - spent
            share = torch.where(halts, remainder, h) * running
            y = y + share[..., None] * s
            cost = cost + running + torch.where(halts, remainder, 0)
            spent, running = spent + h * running, running & ~halts
        if self.adaptive:
            if length:
                add_loss(shared, "ponder", self.ponder * cost.mean())
            s = y.to(x.dtype)
        return s, UniversalState(self.after(positions, state, x), tuple(after))

    def _step(self, x: Tensor, state: tuple[BlockState, ...] | None, reset: Tensor | None,
              shared: dict[str, Any], running: Tensor | None,
              ) -> tuple[Tensor | None, tuple[BlockState, ...]]:
        """One step, whose output is read at the `running` positions; None where there are none."""
        count = x[..., 0].numel() if running is None else int(running.sum())
        if count >= WORTH * x[..., 0].numel():
            return self.block(x, state, reset=reset, shared=shared)
        after: list[BlockState] = []
        before = [None] * len(self.block.layers) if state is None else state
        for block, old in zip(self.block.layers[:-1], before[:-1], strict=True):
            x, new = block(x, old, reset=reset, shared=shared)
            after.append(new)
        last = self.block.layers[-1]
        if not count:
            return None, (*after, last.remember(x, before[-1], reset=reset, shared=shared))
        x, new = last(x, before[-1], reset=reset, shared=shared, read=running)
        return x, (*after, new)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> UniversalState:
        device = next(self.parameters()).device if device is None else device
        return UniversalState(
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            tuple(self.block.initial_state(batch_size, device=device) for _ in range(self.steps)))

    def cost(self, length: int) -> Cost:
        """Every step of every position, which halting makes less."""
        step = self.block.cost(length)
        return Cost(self.steps * step.flops, self.steps * step.state_bytes + 8)
