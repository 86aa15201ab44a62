"""RWKV-4 time mixing: an average of the past, weighted by keys and by age, behind a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.linear import Linear
from manyform.ops.token_shift import token_shift
from manyform.ops.wkv4 import NOTHING, Average, wkv4
from manyform.precision import compute_dtype


class RWKV4State(NamedTuple):
    """last: (batch, d_model), the features of the last step; num, den, max: (batch, d_model), the
    sums num e^max of weighted values and den e^max of weights. All float32."""

    last: Tensor
    num: Tensor
    den: Tensor
    max: Tensor


@mixer("rwkv4")
class RWKV4(SequenceMixer):
    """y_t = W_o (sigmoid(r_t) * wkv_t) with r, k and v from token shifts of their own (Peng 2023,
    "RWKV: Reinventing RNNs for the Transformer Era", section 3).

    time_mix: (3, d_model), the share of the present step in what k, v and r read. time_decay: the
    logarithm of minus w; time_first: u, the bonus of the present step. Initialised as in the
    released code: keys, receptance and output at zero, values orthogonal, decays spread over the
    channels, slower on average in deeper layers.
    """

    def __init__(self, d_model: int, *, place: Place = Place()) -> None:
        super().__init__(d_model, place=place)
        channel = torch.arange(d_model)
        depth, rest = place.index / max(place.count - 1, 1), 1 - place.index / place.count
        ramp = channel / d_model
        self.time_mix = nn.Parameter(torch.stack(
            [ramp**rest, ramp**rest + 0.3 * depth, ramp ** (0.5 * rest)]))
        speed = (channel / max(d_model - 1, 1)) ** (0.7 + 1.3 * depth)
        self.time_decay = nn.Parameter(-5 + 8 * speed)
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.key, self.value, self.receptance, self.output = (
            Linear(d_model, d_model, bias=False) for _ in range(4))
        for layer in (self.key, self.receptance, self.output):
            nn.init.zeros_(layer.weight)
        nn.init.orthogonal_(self.value.weight)

    def forward(self, x: Tensor, state: RWKV4State | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, RWKV4State]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        x = x.to(compute_dtype(x))
        old = None if state is None else Average(*state[1:])
        (xk, xv, xr), last = token_shift(x, 1 - self.time_mix, None if state is None else
                                         state.last, reset)
        y, average = wkv4(self.key(xk), self.value(xv), -torch.exp(self.time_decay),
                          self.time_first, old, reset)
        return self.output(torch.sigmoid(self.receptance(xr)) * y), RWKV4State(last, *average)

    def initial_state(self, batch_size: int, *, device: Any = None) -> RWKV4State:
        """No step before, and empty sums."""
        wide = torch.float64 if self.time_first.dtype == torch.float64 else torch.float32
        zero = torch.zeros(batch_size, self.d_model, dtype=wide, device=device)
        return RWKV4State(zero, zero, zero, torch.full_like(zero, NOTHING))

    def cost(self, length: int) -> Cost:
        """Matrix products and the weighted average; a state of fixed size."""
        element = 8 if self.time_first.dtype == torch.float64 else 4
        return Cost(length * (8 * self.d_model**2 + 9 * self.d_model), 4 * element * self.d_model)

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay at all, as in the released code."""
        return {name: Hint(weight_decay=False) for name, _ in self.named_parameters()}
