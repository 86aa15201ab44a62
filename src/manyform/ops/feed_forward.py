"""Two linear maps with an activation between: the feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.gelu import gelu_tanh
from manyform.ops.kernels import usable
from manyform.ops.linear import _halves, linear
from manyform.ops.operation import operation
from manyform.ops.relu_squared import relu_squared
from manyform.ops.swiglu import swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": relu_squared}
"""As `kernels.feed_forward` numbers them; the first halves the features."""
SMALLEST = 2**20
"""Multiply-adds of one map below which torch's products are as fast."""
WIDEST = 512
"""Features above which a block of tokens does not stay in cache."""


@operation(flops=lambda x, up, down, activation="swiglu":
           2 * x.numel() * (up.shape[0] + down.shape[1]))
def feed_forward(x: Tensor, up: Tensor, down: Tensor, activation: str = "swiglu") -> Tensor:
    """y = f(x W^T) W_d^T (Vaswani 2017, eq. 2; with SwiGLU, Shazeer 2020, eq. 6).

    x: (..., D); up, W: (H, D), for SwiGLU (2 H, D), the gate's map above the other; down, W_d:
    (D, H); activation: a name in `ACTIVATIONS`. Returns (..., D), in the dtype that autocast gives
    a linear map.
    """
    return F.linear(ACTIVATIONS[activation](F.linear(x, up)), down)


@feed_forward.path("steps")
def _(x: Tensor, up: Tensor, down: Tensor, activation: str = "swiglu") -> Tensor:
    """One operation after the other, each in its fastest form."""
    return linear(ACTIVATIONS[activation](linear(x, up)), down)


def _tiled(x: Tensor, up: Tensor, down: Tensor, activation: str = "swiglu") -> bool:
    d, hidden = down.shape
    if (x.numel() * hidden < SMALLEST or d % 32 or d > WIDEST or not _halves(x, up)
            or not usable(x, up, down)):
        return False
    learns = up.requires_grad and down.requires_grad  # else the way back would do too much
    if torch.is_grad_enabled() and not learns and any(z.requires_grad for z in (x, up, down)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@feed_forward.path("tiles", when=_tiled)
def _(x: Tensor, up: Tensor, down: Tensor, activation: str = "swiglu") -> Tensor:
    """A block of tokens goes through both maps in cache, and once more on the way back, where all
    gradients are made: see `kernels.feed_forward`. Only x is kept between the passes."""
    half, kind = x.bfloat16().contiguous(), list(ACTIVATIONS).index(activation)
    if torch.is_grad_enabled() and up.requires_grad:
        return _FeedForward.apply(half, up, down, kind)
    return _forward(half, up, down, kind)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(x, up, down)
        ctx.kind = kind
        return _forward(x, up, down, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, up, down = ctx.saved_tensors
        dx, dup, ddown = _backward(x, dy.bfloat16().contiguous(), up, down, ctx.kind)
        return dx, dup.to(up.dtype), ddown.to(down.dtype), None


def _scratch(tokens: int, d: int, hidden: int, gradient: bool) -> tuple[int, int, list[Any]]:
    """Hidden features and zeros after them, tokens a block, as many blocks as threads at least, and
    memory for each worker."""
    from manyform.ops.kernels import feed_forward as kernels
    from manyform.ops.kernels.panels import SIDE, blocks
    block, workers = blocks(tokens)
    wide = -(-hidden // SIDE) * SIDE
    floats, halves, words = kernels.scratch(d, wide, block, gradient)
    return wide, block, [torch.empty(workers, floats).numpy(),
                         torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"),
                         torch.empty(workers, words, dtype=torch.int32).numpy().view("u4")]


def _forward(x: Tensor, up: Tensor, down: Tensor, kind: int) -> Tensor:
    from manyform.ops.kernels import feed_forward as kernels
    from manyform.ops.kernels.lanes import flat
    from manyform.ops.kernels.panels import panels
    d, hidden = down.shape
    tokens, maps = x.numel() // d, len(up) // hidden
    wide, block, (floats, halves, _) = _scratch(tokens, d, hidden, False)
    y = torch.empty_like(x)
    run: Any = kernels.forward
    run(kind, flat(x), tokens, d, wide, block, panels(up, maps, turned=True),
        panels(down, 1, turned=True), flat(y), floats, halves)
    return y


def _backward(x: Tensor, dy: Tensor, up: Tensor, down: Tensor, kind: int,
              ) -> tuple[Tensor, Tensor, Tensor]:
    from manyform.ops.kernels import feed_forward as kernels
    from manyform.ops.kernels.lanes import flat
    from manyform.ops.kernels.panels import panels
    d, hidden = down.shape
    tokens, maps = x.numel() // d, len(up) // hidden
    wide, block, scratch = _scratch(tokens, d, hidden, True)
    workers = len(scratch[0])
    dx, dup, ddown = torch.empty_like(x), torch.empty(up.shape), torch.empty(down.shape)
    sums = torch.empty(workers, (1 + maps) * wide * d)
    run: Any = kernels.backward
    run(kind, flat(x), flat(dy), tokens, d, wide, block, panels(up, maps, turned=True),
        panels(down, 1, turned=False), panels(up, maps, turned=False), flat(dx), flat(sums),
        *scratch)
    finish: Any = kernels.finish
    finish(flat(sums), workers, d, hidden, flat(dup), flat(ddown))
    return dx, dup, ddown
