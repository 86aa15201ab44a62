"""The block: a sequence mixer and a channel mixer on a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.config import LayerSpec
from manyform.contract import Cost, Mixer, Place, SequenceMixer, build
from manyform.errors import ManyformError
from manyform.init import deepnorm_weights
from manyform.norms import stream_norm
from manyform.ops.residual import residual_add
from manyform.state import State


class BlockState(NamedTuple):
    """States of the two mixers of a block; None where one has none."""

    mixer: State
    channel: State


class Block(nn.Module):
    """Two branches f, the mixer and then the channel, each of which changes the stream x:

      pre            x + f(norm(x))                     Xiong 2020, figure 1b
      none           f(norm(x))                         stacked recurrent networks before 2016
      post           norm(x + f(x))                     Vaswani 2017, section 3.1
      deepnorm       norm((2 N)^(1/4) x + f(x))         Wang 2022 (DeepNet), a decoder of N layers:
                     initial weights on the way of values are scaled by (8 N)^(-1/4)
      sandwich       x + norm'(f(norm(x)))              Ding 2021 (CogView), section 2.4; Gemma 2
      reordered      x + norm(f(x))                     Liu 2021 (Swin v2), figure 1; OLMo 2
      residual_dual  two streams, a <- norm(a + f(a)) and b <- b + f(a), which end as a + norm'(b)
                                                        Xie 2023 (arXiv:2304.14802), section 2.2
      reversible     two streams, a <- a + mixer(norm(b)) and b <- b + channel(norm'(a)), which end
                     side by side: their inputs follow from their outputs
                                                        Gomez 2017; Kitaev 2020, section 3
      parallel       x + mixer(n) + channel(n), n = norm(x)          GPT-J, Falcon 7B, phi
      parallel_two_norms   x + mixer(norm(x)) + channel(norm'(x))    GPT-NeoX, Falcon 40B

    layer: a `LayerSpec`. make_norm: makes one of its norms. A mixer that is `bare` brings norms and
    a residual stream of its own, and replaces the stream.
    """

    def __init__(self, layer: LayerSpec, d_model: int, *, place: Place,
                 make_norm: Callable[[], nn.Module], residual: str) -> None:
        super().__init__()
        self.residual = residual
        mixer = build("mixer", layer.mixer, d_model, place, layer.mixer_options)
        assert isinstance(mixer, SequenceMixer)
        if mixer.bare and residual in ("residual_dual", "reversible"):
            raise ManyformError(f"{layer.mixer} brings a residual stream of its own, and cannot "
                                f"stand on the two streams of residual={residual!r}")
        self.mixer_norm = nn.Identity() if mixer.bare else make_norm()
        self.mixer = mixer
        self.channel: Mixer | None = None
        self.channel_norm: nn.Module | None = None
        if layer.channel is not None:
            self.channel_norm = None if residual == "parallel" else make_norm()
            self.channel = build("channel", layer.channel, d_model, place, layer.channel_options)
        self.mixer_out_norm = make_norm() if residual == "sandwich" and not mixer.bare else None
        self.channel_out_norm = make_norm() if residual == "sandwich" and self.channel else None
        self.alpha = 1.0
        if residual == "deepnorm":
            self.alpha = (2 * place.count) ** 0.25
            for part in (mixer, self.channel):
                if part is not None and not (part is mixer and mixer.bare):
                    deepnorm_weights(part, (8 * place.count) ** -0.25)

    def forward(self, x: Tensor, state: BlockState | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                read: Tensor | None = None) -> tuple[Tensor, BlockState]:
        """x: (batch, length, d_model) -> the same shape, and the block's state; two streams are
        (2, batch, length, d_model). read: (batch, length) bool, where somebody reads the output:
        elsewhere a channel without state (`stateless`) is left out."""
        before = state or BlockState(None, None)
        shared = {} if shared is None else shared

        def mixer(h: Tensor) -> tuple[Tensor, State]:
            return _call(self.mixer, h, before.mixer, reset, shared)

        def channel(h: Tensor) -> tuple[Tensor, State]:
            assert self.channel is not None
            if read is None:
                return _call(self.channel, h, before.channel, reset, shared)
            y, _ = _call(self.channel, h[read][None], None, None, shared)
            return y.new_zeros(h.shape).masked_scatter(read[..., None], y), None

        if self.mixer.bare:
            x, after_mixer = mixer(x)
        elif self.residual == "reversible":
            return self._reversible(mixer, channel, x)
        elif self.channel is not None and self.residual.startswith("parallel"):
            h = self.mixer_norm(x)
            y, after_mixer = mixer(h)
            z, after_channel = channel(h if self.channel_norm is None else self.channel_norm(x))
            x = residual_add(residual_add(x, y), z)
            return x, BlockState(after_mixer, after_channel)
        else:
            x, after_mixer = self._branch(mixer, self.mixer_norm, self.mixer_out_norm, x)
        after_channel = None
        if self.channel is not None:
            norm_ = self.mixer_norm if self.channel_norm is None else self.channel_norm
            x, after_channel = self._branch(channel, norm_, self.channel_out_norm, x)
        return x, BlockState(after_mixer, after_channel)

    def _branch(self, f: Callable[[Tensor], tuple[Tensor, State]], norm_: nn.Module,
                out_norm: nn.Module | None, x: Tensor) -> tuple[Tensor, State]:
        if self.residual == "none":
            return f(norm_(x))
        if self.residual in ("post", "deepnorm"):
            y, state = f(x)
            return stream_norm(norm_, self.alpha * x + y), state
        if self.residual == "residual_dual":
            y, state = f(x[0])
            return torch.stack([stream_norm(norm_, x[0] + y), x[1] + y]), state
        if self.residual == "reordered":
            y, state = f(x)
            return residual_add(x, norm_(y)), state
        y, state = f(norm_(x))
        return residual_add(x, y if out_norm is None else out_norm(y)), state

    @property
    def stateless(self) -> bool:
        """Whether the channel, if there is one, keeps no state."""
        return self.channel is None or self.channel.initial_state(1, device="meta") is None

    def _reversible(self, mixer: Callable[[Tensor], tuple[Tensor, State]],
                    channel: Callable[[Tensor], tuple[Tensor, State]], x: Tensor,
                    ) -> tuple[Tensor, BlockState]:
        a, b = x
        y, after_mixer = mixer(self.mixer_norm(b))
        a, after_channel = a + y, None
        if self.channel_norm is not None:
            y, after_channel = channel(self.channel_norm(a))
            b = b + y
        return torch.stack([a, b]), BlockState(after_mixer, after_channel)

    def remember(self, x: Tensor, state: BlockState | None = None, *,
                 reset: Tensor | None = None, shared: dict[str, Any] | None = None) -> BlockState:
        """The state alone, where nobody reads the output: a channel without state is left out."""
        before = state or BlockState(None, None)
        shared = {} if shared is None else shared
        if not self.stateless:
            return self(x, state, reset=reset, shared=shared)[1]
        inner = self.mixer.bare or self.residual in ("post", "deepnorm", "reordered")
        h = x if inner else self.mixer_norm(x)
        return BlockState(_call(self.mixer, h, before.mixer, reset, shared)[1], None)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> BlockState:
        """The state before the first token."""
        channel = self.channel.initial_state(batch_size, device=device) if self.channel else None
        return BlockState(self.mixer.initial_state(batch_size, device=device), channel)

    def cost(self, length: int) -> Cost:
        """Declared cost of both mixers."""
        cost = self.mixer.cost(length)
        return cost + self.channel.cost(length) if self.channel is not None else cost

    def cost_limit(self, length: int) -> Cost:
        """The most that both can cost."""
        cost = self.mixer.cost_limit(length)
        return cost + self.channel.cost_limit(length) if self.channel is not None else cost


def _call(part: Mixer, x: Tensor, state: State, reset: Tensor | None, shared: dict[str, Any],
          ) -> tuple[Tensor, State]:
    extra = {"shared": shared} if part.shares else {}
    return part(x, state, reset=reset, **extra)
