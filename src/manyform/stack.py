"""The stack: blocks in order, some of which may share their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyform.block import Block, BlockState
from manyform.config import LayerSpec
from manyform.contract import Cost, Place
from manyform.exits import Exits


class Stack(nn.ModuleList):
    """The blocks of `layers`. As a list it holds every set of weights once; `order` names the block
    of each layer, and layers that share one keep a state each.

    make_norm: makes one of the blocks' norms. residual: see `Block`.
    """

    def __init__(self, layers: Sequence[LayerSpec], d_model: int, *, residual: str,
                 make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.residual = residual
        self.order: list[int] = []
        owners: dict[str, int] = {}
        uses = Counter(layer.share for layer in layers)
        for i, layer in enumerate(layers):
            if layer.share is not None and layer.share in owners:
                self.order.append(owners[layer.share])
                continue
            self.order.append(len(self))
            if layer.share is not None:
                owners[layer.share] = len(self)
            place = Place(i, len(layers), 1 if layer.share is None else uses[layer.share])
            self.append(Block(layer, d_model, place=place, residual=residual, make_norm=make_norm))
        self.use = [self.order[:i].count(block) for i, block in enumerate(self.order)]

    @property
    def layers(self) -> list[Block]:
        """The block of each layer, a shared one as often as it is used."""
        return [self[i] for i in self.order]  # type: ignore[misc]

    def forward(self, x: Tensor, state: tuple[BlockState, ...] | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                final_norm: nn.Module | None = None, exits: Exits | None = None,
                ) -> tuple[Tensor, tuple[BlockState, ...]]:
        """x: (batch, length, d_model) -> the same shape (reversible streams one beside the other:
        2 d_model features), behind `final_norm` where one is given, and a state for each layer
        (of no tokens: the state that was). exits: what tokens may do on the way."""
        shared = {} if shared is None else shared
        after: list[BlockState] = []
        batch, length, _ = x.shape
        outside = shared.get("entrance")  # of a stack around this one
        shared["entrance"] = x
        dual = self.residual in ("residual_dual", "reversible")
        if dual:
            x = torch.stack([x, x])
        for i, block in enumerate(self.layers):
            before = state[i] if state is not None else None
            if not length:  # layers need not care about no tokens
                after.append(block.initial_state(batch, device=x.device) if before is None
                             else before)
                continue
            shared["use"] = self.use[i]
            if exits is not None and exits.everyone_left:
                after.append(block.remember(x, before, reset=reset, shared=shared))
                continue
            new, layer = block(x, before, reset=reset, shared=shared)
            x = new if exits is None else exits(i + 1, x, new)
            after.append(layer)
        shared["entrance"] = outside
        if self.residual == "reversible":
            x = torch.cat([*x], dim=-1)
        elif dual:
            x, long = x
            return x + (long if final_norm is None else final_norm(long)), tuple(after)
        return x if final_norm is None else final_norm(x), tuple(after)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> tuple[BlockState, ...]:
        """The state before the first token, one for each layer."""
        return tuple(b.initial_state(batch_size, device=device) for b in self.layers)

    def cost(self, length: int) -> Cost:
        """Declared cost of every layer: a shared block's once for each use."""
        return sum((block.cost(length) for block in self.layers), Cost(0, 0))

    def cost_limit(self, length: int) -> Cost:
        """The most that they can cost."""
        return sum((block.cost_limit(length) for block in self.layers), Cost(0, 0))


def ends_in_norm(residual: str) -> bool:
    """Whether the last branch of such a stack ends in a norm, so that the head needs no other."""
    return residual in ("post", "deepnorm")
