"""The two feed-forward networks of the Transformer family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Mixer, Place, channel
from manyform.errors import ManyformError, unknown
from manyform.init import linear, residual_std
from manyform.linear import Linear
from manyform.ops.feed_forward import ACTIVATIONS as FUSED
from manyform.ops.feed_forward import feed_forward
from manyform.ops.gelu import gelu_tanh
from manyform.ops.relu_squared import relu_squared
from manyform.ops.swiglu import swiglu
from manyform.state import State

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": relu_squared,
    "silu": F.silu}


def network(x: Tensor, up: nn.Module, down: nn.Module, activation: str) -> Tensor:
    """down(f(up(x))), by one operation where both are linear maps and nothing else."""
    if activation in FUSED and _maps(up, down):
        return feed_forward(x, up.weight, down.weight, activation)
    return down(ACTIVATIONS[activation](up(x)))


class _Feedforward(Mixer):
    """A channel mixer without state."""

    def _width(self, expansion: float, multiple_of: int, width: int | None) -> int:
        if width is not None:
            if width < 1:
                raise ManyformError(f"width must be at least 1, not {width}")
            return width
        if expansion <= 0:
            raise ManyformError(f"expansion must be positive, not {expansion}")
        return max(1, round(expansion * self.d_model / multiple_of)) * multiple_of

    def initial_state(self, batch_size: int, *, device: Any = None) -> State:
        return None

    def cost(self, length: int) -> Cost:
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return Cost(2 * weights * length, 0)


@channel("mlp")
class MLP(_Feedforward):
    """Two linear maps with an activation between (Vaswani 2017, eq. 2; GELU as in GPT-2).

    width: hidden features; if None, expansion * d_model to the nearest multiple of multiple_of.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expansion: float = 4.0,
                 multiple_of: int = 1, width: int | None = None, activation: str = "gelu_tanh",
                 bias: bool = False) -> None:
        super().__init__(d_model, place=place)
        self.width = hidden = self._width(expansion, multiple_of, width)
        self.activation = _activation(activation)
        self.bias = bias
        self.up = linear(d_model, hidden, bias=bias)
        self.down = linear(hidden, d_model, bias=bias, std=residual_std(place))

    def forward(self, x: Tensor, state: State = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, State]:
        return network(x, self.up, self.down, self.activation), None

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.up.weight, self.down.weight], []


@channel("gated_mlp")
class GatedMLP(_Feedforward):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer 2020, eq. 6), or its sibling with another
    activation (Gemma: gelu_tanh).

    gate_scale, out_scale: multiply the gate before the activation, and the result (Falcon-H1).
    width: hidden features; if None, expansion * d_model to the nearest multiple of multiple_of.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expansion: float = 8 / 3,
                 multiple_of: int = 16, width: int | None = None, activation: str = "silu",
                 bias: bool = False, gate_scale: float = 1.0, out_scale: float = 1.0) -> None:
        super().__init__(d_model, place=place)
        self.gate_scale, self.out_scale = gate_scale, out_scale
        self.width = hidden = self._width(expansion, multiple_of, width)
        self.activation = _activation(activation)
        self.bias = bias
        self.gate_up = linear(d_model, 2 * hidden, bias=bias)
        self.down = linear(hidden, d_model, bias=bias, std=residual_std(place))

    def forward(self, x: Tensor, state: State = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, State]:
        if self.activation == "silu" and self.gate_scale == self.out_scale == 1 and \
                _maps(self.gate_up, self.down):
            return feed_forward(x, self.gate_up.weight, self.down.weight), None
        return self.gated(self.gate_up(x)), None

    def gated(self, gate_up: Tensor) -> Tensor:
        """What follows both input maps, (..., 2 width)."""
        if self.activation == "silu" and self.gate_scale == 1:
            y = self.down(swiglu(gate_up))
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            y = self.down(ACTIVATIONS[self.activation](gate * self.gate_scale) * up)
        return y if self.out_scale == 1 else y * self.out_scale

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        gate, up = self.gate_up.weight.chunk(2)
        return [up, self.down.weight], [gate]


def _maps(*layers: nn.Module) -> bool:
    """Whether these layers are linear maps and nothing else, so that their weights say all."""
    return all(type(layer) is Linear and layer.bias is None and not layer._forward_hooks
               and not layer._forward_pre_hooks for layer in layers)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return name
