"""The block: a sequence mixer and a channel mixer, each behind a norm, on a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Mixer, Place, SequenceMixer, build
from manyform.state import State


class BlockState(NamedTuple):
    """States of the two mixers of a block; None where one has none."""

    mixer: State
    channel: State


class Block(nn.Module):
    """h = x + mixer(norm(x)); y = h + channel(norm(h)) (pre-norm, Xiong 2020, figure 1b).

    layer: a `LayerSpec`. make_norm: makes one of its norms. residual=False drops the sums, for
    the stacked recurrent networks of before 2016.
    """

    def __init__(self, layer: Any, d_model: int, *, place: Place,
                 make_norm: Callable[[], nn.Module], residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.mixer_norm = make_norm()
        mixer = build("mixer", layer.mixer, d_model, place, layer.mixer_options)
        assert isinstance(mixer, SequenceMixer)
        self.mixer = mixer
        self.channel: Mixer | None = None
        if layer.channel is not None:
            self.channel_norm = make_norm()
            self.channel = build("channel", layer.channel, d_model, place, layer.channel_options)

    def forward(self, x: Tensor, state: BlockState | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, BlockState]:
        """x: (batch, length, d_model) -> the same shape, and the block's state."""
        before = state or BlockState(None, None)
        shared = {} if shared is None else shared
        x, after_mixer = self._branch(self.mixer, self.mixer_norm, x, before.mixer, reset, shared)
        after_channel = None
        if self.channel is not None:
            x, after_channel = self._branch(self.channel, self.channel_norm, x, before.channel,
                                            reset, shared)
        return x, BlockState(after_mixer, after_channel)

    def _branch(self, part: Mixer, norm_: nn.Module, x: Tensor, state: State,
                reset: Tensor | None, shared: dict[str, Any]) -> tuple[Tensor, State]:
        extra = {"shared": shared} if part.shares else {}
        y, state = part(norm_(x), state, reset=reset, **extra)
        return (x + y if self.residual else y), state

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> BlockState:
        """The state before the first token."""
        channel = self.channel.initial_state(batch_size, device=device) if self.channel else None
        return BlockState(self.mixer.initial_state(batch_size, device=device), channel)

    def cost(self, length: int) -> Cost:
        """Declared cost of both mixers."""
        cost = self.mixer.cost(length)
        return cost + self.channel.cost(length) if self.channel is not None else cost
