"""Recurrent networks whose gates see only the input: QRNN, minGRU and minLSTM, by scans."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Place, SequenceMixer, mixer
from manyform.errors import ManyformError, unknown
from manyform.init import linear, residual_std
from manyform.linear import Linear
from manyform.ops.gated_scan import gated_scan
from manyform.ops.linear_scan import linear_scan
from manyform.ops.minimal_gates import positive_part, relative_gate
from manyform.ops.short_conv import short_conv, steps_since_reset

POOLINGS = {"f": 2, "fo": 3, "ifo": 4}
"""What QRNN's convolution makes for each pooling: the candidate and the gates."""


class GatedState(NamedTuple):
    """window: (batch, conv_size - 1, features), the last inputs of the convolution; hidden:
    (batch, features). Both float32."""

    window: Tensor
    hidden: Tensor


class _Gated(SequenceMixer):
    """A state of the last inputs and one vector, both of `width` features."""

    width: int
    conv_size: int

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> GatedState:
        """Zeros, in float32 (float64 for a float64 mixer)."""
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        hidden = torch.zeros(batch_size, self.width, dtype=dtype, device=device)
        return GatedState(hidden.new_zeros(batch_size, self.conv_size - 1, self.d_model), hidden)

    def _state_bytes(self) -> int:
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        return dtype.itemsize * ((self.conv_size - 1) * self.d_model + self.width)


@mixer("qrnn")
class QRNN(_Gated):
    """z, f, o, i = tanh, sigmoid, sigmoid, sigmoid of convolutions of x over the last `conv_size`
    steps; then, channel by channel (Bradbury 2016, "Quasi-Recurrent Neural Networks", eq. 1 to 5),

        f    h_t = f_t h_{t-1} + (1 - f_t) z_t
        fo   c_t = f_t c_{t-1} + (1 - f_t) z_t,  h_t = o_t c_t
        ifo  c_t = f_t c_{t-1} + i_t z_t,        h_t = o_t c_t

    pooling: one of these three. conv_size: 2 in the paper's language models. Without the paper's
    zoneout (section 2.1).
    """

    def __init__(self, d_model: int, *, place: Place = Place(), pooling: str = "fo",
                 conv_size: int = 2) -> None:
        super().__init__(d_model, place=place)
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        if conv_size < 1:
            raise ManyformError(f"conv_size of qrnn must be at least 1, not {conv_size}")
        self.pooling, self.conv_size, self.width = pooling, conv_size, d_model
        self.conv = Linear(conv_size * d_model, POOLINGS[pooling] * d_model)

    def forward(self, x: Tensor, state: GatedState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, GatedState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        before = self.initial_state(len(x), device=x.device) if state is None else state
        length, kept = x.shape[1], self.conv_size - 1
        seen = torch.cat([before.window.to(x.dtype), x], dim=1)
        since = None if reset is None else steps_since_reset(reset)
        taps = [x]
        for back in range(1, self.conv_size):
            tap = seen[:, kept - back: kept - back + length]
            taps.insert(0, tap if since is None else tap * (since >= back)[..., None])
        window = seen[:, length:]
        if since is not None:  # of the last inputs, those of the last document
            age = torch.arange(kept - 1, -1, -1, device=x.device)
            window = window * (since[:, -1:] >= age)[..., None]
        z, f, *gates = self.conv(torch.cat(taps, dim=-1)).split(self.d_model, dim=-1)
        z = torch.tanh(z)
        if self.pooling == "ifo":
            wide = before.hidden.dtype
            b = (torch.sigmoid(gates[1].to(wide)) * z.to(wide)).to(z.dtype)
            c, hidden = linear_scan(torch.sigmoid(f.to(wide)), b, before.hidden, reset)
        else:
            c, hidden = gated_scan(f, z, before.hidden, reset)
        y = torch.sigmoid(gates[0]) * c if gates else c
        return y, GatedState(window.to(hidden.dtype), hidden)

    def cost(self, length: int) -> Cost:
        """The convolution and the recurrence; a state of fixed size."""
        scan = 2 if self.pooling == "ifo" else 3
        return Cost(length * (2 * self.conv.weight.numel() + scan * self.d_model),
                    self._state_bytes())


class _Minimal(_Gated):
    """What the two minimal networks share: out_proj(scan(gates of conv(x)))."""

    def __init__(self, d_model: int, place: Place, expand: float, conv_size: int, positive: bool,
                 maps: int) -> None:
        super().__init__(d_model, place=place)
        self.width = round(expand * d_model)
        for name, value in (("expand * d_model", self.width), ("conv_size", conv_size)):
            if value < 1:
                raise ManyformError(f"{name} of {self.name} must be at least 1, not {value}")
        self.conv_size, self.positive = conv_size, positive
        if conv_size > 1:
            bound = conv_size**-0.5
            self.conv_weight = nn.Parameter(
                torch.empty(d_model, conv_size).uniform_(-bound, bound))
            self.conv_bias = nn.Parameter(torch.empty(d_model).uniform_(-bound, bound))
        self.in_proj = Linear(d_model, maps * self.width)
        self.out_proj = linear(self.width, d_model, std=residual_std(place))

    def forward(self, x: Tensor, state: GatedState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, GatedState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        before = self.initial_state(len(x), device=x.device) if state is None else state
        window = before.window
        if self.conv_size > 1:
            x, window = short_conv(x, self.conv_weight, self.conv_bias, window, reset)
        keep, value = self._gates(*self.in_proj(x).split(self.width, dim=-1))
        if self.positive:
            value = positive_part(value)
        h, hidden = gated_scan(keep, value, before.hidden, reset)
        return self.out_proj(h), GatedState(window, hidden)

    def _gates(self, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of what is kept, and the candidate."""
        raise TypeError(f"{type(self).__name__} must define _gates")

    def cost(self, length: int) -> Cost:
        """Matrix products, the convolution and the recurrence; a state of fixed size."""
        products = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        conv = 2 * self.conv_size * self.d_model if self.conv_size > 1 else 0
        return Cost(length * (products + conv + 3 * self.width), self._state_bytes())


@mixer("min_gru")
class MinGRU(_Minimal):
    """h_t = (1 - z_t) h_{t-1} + z_t g(v_t), z = sigmoid(W_z x), v = W_h x, between a short
    convolution and a linear map out (Feng 2024, "Were RNNs All We Needed?", section 3.1).

    expand: features of h for one of d_model. conv_size: taps of the convolution, 4 as in the
    paper's language model; 1 is none. positive: g keeps the candidate positive, as the paper's
    experiments have it (appendix B); without it g is the identity, as in its first definition.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expand: float = 2.0,
                 conv_size: int = 4, positive: bool = True) -> None:
        super().__init__(d_model, place, expand, conv_size, positive, maps=2)

    def _gates(self, *maps: Tensor) -> tuple[Tensor, Tensor]:
        z, value = maps
        return -z, value


@mixer("min_lstm")
class MinLSTM(_Minimal):
    """h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(v_t), f = sigmoid(W_f x),
    i = sigmoid(W_i x), v = W_h x (Feng 2024, "Were RNNs All We Needed?", section 3.2).

    expand, conv_size, positive: as for minGRU.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expand: float = 2.0,
                 conv_size: int = 4, positive: bool = True) -> None:
        super().__init__(d_model, place, expand, conv_size, positive, maps=3)

    def _gates(self, *maps: Tensor) -> tuple[Tensor, Tensor]:
        f, i, value = maps
        return relative_gate(f, i), value
