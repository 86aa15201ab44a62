"""A linear map, with a faster gradient of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import usable
from manyform.ops.operation import operation

SMALLEST = 2**26
"""Multiply-adds below which torch's product is as fast."""


@operation(flops=lambda x, weight, bias=None: 2 * x.numel() * weight.shape[0])
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b. x: (..., I); weight: (O, I); bias: (O) or None. Returns (..., O)."""
    return F.linear(x, weight, bias)


def _halves(x: Tensor, weight: Tensor) -> bool:
    """True if the product is computed in bfloat16, by its operands or by autocast."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (
            torch.float32, torch.bfloat16)
    return x.dtype == weight.dtype == torch.bfloat16


def _fits(multiply_adds: int, *operands: Tensor) -> bool:
    if multiply_adds < SMALLEST or not usable(*operands):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """G^T X, summed over all tokens: g (..., O) and x (..., I), bfloat16 or float32, of one dtype.
    Returns (O, I), in float32 or in their dtype."""
    if g.dtype == torch.bfloat16 and _fits(g.numel() * x.shape[-1], g, x):
        from manyform.ops.kernels.weight_gradient import weight_gradient as tiled
        return tiled(g, x)
    return g.flatten(0, -2).T @ x.flatten(0, -2)


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    work = x.numel() * weight.shape[0]  # first: most calls of small models end here
    return (work >= SMALLEST and torch.is_grad_enabled() and weight.requires_grad
            and _halves(x, weight) and _fits(work, x, weight))


@linear.path("tiles", when=_tiled)
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum over tokens of the weights' gradient on matrix tiles, kept in float32: torch turns
    both operands first, and rounds the sum to bfloat16."""
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half, halves = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(half, halves)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        return F.linear(half, halves, bias.bfloat16() if bias is not None else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).to(of_x)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(g, x).to(of_weight)
        if of_bias is not None and ctx.needs_input_grad[2]:
            dbias = g.flatten(0, -2).sum(0, dtype=torch.float32).to(of_bias)
        return dx, dweight, dbias
