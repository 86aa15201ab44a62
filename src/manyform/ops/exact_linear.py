"""A linear map whose result stays in float32 where a recurrence follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import usable
from manyform.ops.linear import linear, weight_gradient
from manyform.ops.operation import operation

SMALLEST = 2**22
"""Multiply-adds below which torch's product in float32 is as fast."""


@operation(flops=lambda x, weight, bias: 2 * x.numel() * weight.shape[0])
def exact_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y = x W^T + b in the dtype of W, under autocast too.

    x: (..., I); weight, W: (O, I); bias: (O). Returns (..., O). A gate is applied at every step of
    a recurrence, so what rounding to bfloat16 costs would add up.
    """
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(weight.dtype), weight, bias)


def _tiled(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    outputs, inputs = weight.shape
    if (x.numel() * outputs < SMALLEST or inputs % 32 or outputs % 32 or x.dtype != torch.bfloat16
            or weight.dtype != torch.float32 or not usable(x, weight, bias)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@exact_linear.path("tiles", when=_tiled)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two products of bfloat16, W being the sum of two matrices: an error of 2^-17 of each weight.
    Gradients are rounded to bfloat16 before their products."""
    return _ExactLinear.apply(x, weight, bias)


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from manyform.ops.kernels import exact_linear as kernels
        from manyform.ops.kernels.lanes import flat
        from manyform.ops.kernels.panels import blocks, panels
        outputs, inputs = weight.shape
        x = x.contiguous()
        tokens = x.numel() // inputs
        near = weight.bfloat16()
        both = panels(torch.cat([near, (weight - near.float()).bfloat16()]), 2, turned=True)
        block, workers = blocks(tokens)
        floats, halves = kernels.scratch(inputs, block)
        y = torch.empty(*x.shape[:-1], outputs)
        run: Any = kernels.forward
        run(flat(x), tokens, inputs, outputs, block, both, flat(bias), flat(y),
            torch.empty(workers, floats).numpy(),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"))
        ctx.save_for_backward(x, near)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, near = ctx.saved_tensors
        half = g.bfloat16()
        dx = half @ near if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(half, x).float(), g.flatten(0, -2).sum(0)
