"""Steps of a block's two halves: norm, mixer or channel, residual, on the stream of one token.

`compiled` names what makes the compiled step of a class of mixers or channels; `Plain` serves every
other class with its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyform.channels.mlp import MLP, GatedMLP
from manyform.contract import Mixer
from manyform.linear import Linear
from manyform.norms import LayerNorm, RMSNorm
from manyform.state import State

Array = NDArray[Any]
WIDTH = 16
NONE = np.zeros(0, np.float32)
"""Stands for what a kernel's argument does not have."""


class Part(Protocol):
    """Half of a block, with its state in buffers of its own."""

    def load(self, state: State) -> None:
        """Begin at a state of the mixer (None: the start), which stays as it is."""

    def step(self, threads: int) -> None:
        """Read one token: stream becomes stream + part(norm(stream))."""

    def state(self) -> State:
        """A copy of the state, as the mixer itself would give it."""


class Site(NamedTuple):
    """Where a part stands. stream: (d_model,) of the token, which steps change in place, followed
    by zeros up to a multiple of 16. norm: what stands before the part. residual: the part's output
    is added to the stream; else it replaces the stream. shared: see `Mixer.shares`. weights: the
    dtype in which matrices are kept."""

    stream: Array
    norm: nn.Module
    residual: bool
    shared: dict[str, Any]
    weights: torch.dtype


class Unfit(Exception):  # noqa: N818  (not an error: the plain step serves)
    """Raised by a maker for options or parameters without a compiled form."""


compiled: dict[type[Mixer], Callable[[Any, Site], Part]] = {}
"""What makes the compiled step of a class; raises `Unfit` where options have no compiled form."""


def compiles(cls: type[Mixer]) -> Callable[[Any], Any]:
    """Class decorator: the compiled step of mixers or channels of exactly this class."""
    def register(maker: Any) -> Any:
        compiled[cls] = maker
        return maker
    return register


def make(part: Mixer, site: Site) -> Part:
    """The compiled step of a mixer or channel where there is one, else its own."""
    maker = compiled.get(type(part))
    if maker is not None:
        try:
            return maker(part, site)
        except Unfit:
            pass
    return Plain(part, site)


class Plain:
    """The mixer's own forward on one token."""

    def __init__(self, part: Mixer, site: Site) -> None:
        self.part, self.site, self.held = part, site, None
        self.row = torch.from_numpy(site.stream)[None, None, :part.d_model]

    def load(self, state: State) -> None:
        self.held = state

    def step(self, threads: int) -> None:
        extra = {"shared": self.site.shared} if self.part.shares else {}
        x = self.row.clone()  # a state may keep its input, and the row goes on to change
        y, self.held = self.part(self.site.norm(x), self.held, **extra)
        if self.site.residual:
            self.row.add_(y)
        else:
            self.row.copy_(y)

    def state(self) -> State:
        return self.held


def array(tensor: Tensor | None) -> Array:
    """A dense float32 tensor's own memory; `NONE` for None."""
    if tensor is None:
        return NONE
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise Unfit
    return tensor.detach().numpy()


def linear(layer: nn.Module, weights: torch.dtype) -> tuple[Array, Array]:
    """Weight, in float32 or bfloat16 (as uint16), and bias of an ordinary linear map."""
    if not isinstance(layer, nn.Linear) or type(layer) not in (Linear, nn.Linear):
        raise Unfit
    weight = array(layer.weight)
    if weights == torch.bfloat16:
        weight = layer.weight.detach().bfloat16().view(torch.uint16).numpy()
    return weight, array(layer.bias)


def norm(layer: nn.Module) -> tuple[int, Array, Array, float]:
    """Kind, weight, bias and epsilon, as the kernels take them."""
    from manyform.ops.kernels.decode import NORMS
    if type(layer) is RMSNorm:
        return NORMS["rms"], array(layer.weight), NONE, layer.eps
    if type(layer) is LayerNorm and layer.weight is not None:
        return NORMS["layer"], array(layer.weight), array(layer.bias), layer.eps
    if type(layer) is nn.Identity:
        return NORMS["none"], NONE, NONE, 0.0
    raise Unfit


def room(count: int) -> int:
    """`count` rounded up to whole vectors of lanes."""
    return -(-count // WIDTH) * WIDTH


def scratch(*shape: int) -> Array:
    """Zeros, the last dimension rounded up to whole vectors of lanes."""
    return np.zeros((*shape[:-1], room(shape[-1])), np.float32)


def padded(tensor: Tensor) -> Array:
    """A copy in float32, the last dimension filled up with zeros to whole vectors of lanes."""
    out = scratch(*tensor.shape)
    out[..., :tensor.shape[-1]] = tensor.detach().float().numpy()
    return out


def exported(buffer: Array, width: int) -> Tensor:
    """A copy without the padding, with a batch of one in front."""
    return torch.from_numpy(buffer[..., :width].copy())[None]


class _Stateless:
    """A channel mixer that remembers nothing: one call of a kernel."""

    def load(self, state: State) -> None:
        pass

    def state(self) -> State:
        return None


@compiles(GatedMLP)
class GatedMLPStep(_Stateless):
    """SwiGLU."""

    def __init__(self, part: GatedMLP, site: Site) -> None:
        from manyform.ops.kernels import decode
        if part.activation != "silu" or (part.gate_scale, part.out_scale) != (1.0, 1.0):
            raise Unfit
        half = part.down.in_features
        self.kernel = decode.gated_mlp
        self.arguments = (site.stream, site.residual, *norm(site.norm),
                          *linear(part.gate_up, site.weights), *linear(part.down, site.weights),
                          scratch(part.d_model), scratch(half), scratch(half))

    def step(self, threads: int) -> None:
        self.kernel(*self.arguments, threads)


@compiles(MLP)
class MLPStep(_Stateless):
    """Two linear maps with an activation between."""

    def __init__(self, part: MLP, site: Site) -> None:
        from manyform.ops.kernels import decode
        self.kernel = decode.mlp
        self.arguments = (site.stream, site.residual, *norm(site.norm),
                          *linear(part.up, site.weights), decode.ACTIVATIONS[part.activation],
                          *linear(part.down, site.weights),
                          scratch(part.d_model), scratch(part.up.out_features))

    def step(self, threads: int) -> None:
        self.kernel(*self.arguments, threads)
