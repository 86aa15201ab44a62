"""The recurrent networks of 1990 to 2014, on the library's fused kernels."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Place, SequenceMixer, mixer
from manyform.errors import unknown
from manyform.ops.recurrent_layer import GATES, recurrent_layer
from manyform.precision import compute_dtype
from manyform.state import nbytes


class HiddenState(NamedTuple):
    """hidden: (batch, d_model) float32."""

    hidden: Tensor


class CellState(NamedTuple):
    """hidden, cell: (batch, d_model) float32."""

    hidden: Tensor
    cell: Tensor


class _Recurrent(SequenceMixer):
    """One recurrent layer, d_model wide.

    Initialisation: uniform in +-1/sqrt(d_model), and orthogonal recurrent matrices gate by gate
    (Saxe 2014), which keep the gradient's length over time.
    """

    cell: str
    state_type: ClassVar[type] = HiddenState

    def __init__(self, d_model: int, *, place: Place = Place()) -> None:
        super().__init__(d_model, place=place)
        rows = GATES[self.cell] * d_model
        bound = 1 / math.sqrt(d_model)
        self.input_weight = nn.Parameter(torch.empty(rows, d_model).uniform_(-bound, bound))
        self.recurrent_weight = nn.Parameter(torch.empty(rows, d_model))
        self.input_bias = nn.Parameter(torch.zeros(rows))
        self.recurrent_bias = nn.Parameter(torch.zeros(rows))
        if not self.recurrent_weight.is_meta:
            for gate in self.recurrent_weight.data.split(d_model):
                nn.init.orthogonal_(gate)

    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, Any]:
        before = self.initial_state(x.shape[0], device=x.device) if state is None else state
        weights = (self.input_weight, self.recurrent_weight, self.input_bias, self.recurrent_bias)
        x = x.to(compute_dtype(x))
        y, after = recurrent_layer(x, weights, tuple(before), self.cell, reset)
        return y, self.state_type(*after)

    def initial_state(self, batch_size: int, *, device: Any = None) -> Any:
        weight = self.recurrent_weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch_size, self.d_model, dtype=dtype, device=device or weight.device)
        return self.state_type(*(zeros for _ in self.state_type._fields))  # type: ignore[attr-defined]

    def cost(self, length: int) -> Cost:
        flops = 2 * length * (self.input_weight.numel() + self.recurrent_weight.numel())
        return Cost(flops, nbytes(self.initial_state(1, device="meta")))


@mixer("rnn")
class RNN(_Recurrent):
    """h_t = tanh(W x_t + U h_{t-1} + b) (Elman 1990); activation "tanh" or "relu"."""

    def __init__(self, d_model: int, *, place: Place = Place(), activation: str = "tanh") -> None:
        if activation not in ("tanh", "relu"):
            raise unknown("activation", activation, ("tanh", "relu"))
        self.cell = activation
        super().__init__(d_model, place=place)


@mixer("lstm")
class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with the forget gate of Gers 2000 and
    without peepholes; forget bias 1 (Jozefowicz 2015)."""

    cell = "lstm"
    state_type = CellState

    def __init__(self, d_model: int, *, place: Place = Place()) -> None:
        super().__init__(d_model, place=place)
        with torch.no_grad():
            self.input_bias[d_model:2 * d_model] = 1.0  # gate order: i, f, g, o


@mixer("gru")
class GRU(_Recurrent):
    """Gated recurrent unit (Cho 2014), with the reset gate after the product."""

    cell = "gru"
