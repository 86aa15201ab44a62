"""What mixers made of blocks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyform.config import RESIDUALS, parse_pattern
from manyform.contract import (
    COST_ORDER,
    STATE_ORDER,
    CostGrowth,
    Place,
    SequenceMixer,
    StateGrowth,
)
from manyform.errors import ManyformError, unknown
from manyform.norms import norm
from manyform.positions import document_positions
from manyform.stack import Stack


class Composite(SequenceMixer):
    """A mixer made of stacks of blocks, each given as a pattern such as
    "2 attention(window=64) + mlp" (`manyform.config.parse_pattern`; gated_mlp where none is said).

    It stands bare on the residual stream (`SequenceMixer.bare`): the inner stacks bring their own
    norms and sums.
    """

    aligned = True  # until a stack has a mixer that is not
    bare = True
    shares = True

    def __init__(self, d_model: int, *, place: Place, norm: str, residual: str) -> None:
        super().__init__(d_model, place=place)
        if residual not in RESIDUALS:
            raise unknown("residual", residual, RESIDUALS)
        if residual == "reversible":
            raise ManyformError("residual='reversible' ends in two streams; it is a setting of the "
                                "model, not of stacks inside of a mixer")
        self.norm, self.residual = norm, residual

    def build_stack(self, pattern: str, role: str) -> Stack:
        """The blocks of `pattern`; ManyformError where one looks ahead."""
        stack = Stack(parse_pattern(pattern), self.d_model, residual=self.residual,
                      make_norm=lambda: norm(self.norm, self.d_model))
        for block in stack.layers:
            if not block.mixer.causal:
                raise ManyformError(f"the {role} of {self.name} needs causal mixers, and "
                                    f"{block.mixer.name} looks ahead")
        self.packs = self.packs and all(b.mixer.packs for b in stack.layers)
        self.exactly_causal = self.exactly_causal and all(
            b.mixer.exactly_causal for b in stack.layers)
        self.aligned = self.aligned and all(
            b.mixer.aligned or b.mixer.growth[0] in ("none", "constant") for b in stack.layers)
        self.reads_tokens = self.reads_tokens or any(b.mixer.reads_tokens for b in stack.layers)
        self.discrete = self.discrete or any(
            p.discrete for b in stack.layers for p in (b.mixer, b.channel) if p is not None)
        return stack

    def positions(self, state: Any, x: Tensor, reset: Tensor | None) -> Tensor:
        """(batch, length) int64: tokens since the document began, of which the state's `position`
        (zero at the start) is the first's."""
        before = (state.position if state is not None
                  else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device))
        return document_positions(before, x.shape[1], reset)

    def after(self, positions: Tensor, state: Any, x: Tensor) -> Tensor:
        """The position of the state that follows."""
        if positions.shape[1]:
            return positions[:, -1] + 1
        return state.position if state is not None else positions.new_zeros(x.shape[0])


def growth_of(*stacks: Stack) -> tuple[StateGrowth, CostGrowth]:
    """The fastest growth among the mixers of the stacks."""
    growths = [block.mixer.growth for stack in stacks for block in stack.layers]
    return (max((g[0] for g in growths), key=STATE_ORDER.index),
            max((g[1] for g in growths), key=COST_ORDER.index))
