"""Functions of single elements by compiled loops, one pass over memory each way."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import single, threads, usable

SMALL = 8192  # elements below which starting the threads costs more than it saves


def compilable(x: Tensor, fold: int = 1) -> bool:
    """True if `pointwise` serves x and is worth it."""
    whole = x.shape[-1] % (16 * fold) == 0 if fold > 1 else x.numel() % 16 == 0
    return usable(x) and single(x) and whole and x.numel() >= SMALL


def pointwise(x: Tensor, kernel: str, fold: int = 1, dtype: torch.dtype | None = None,
              *numbers: float) -> Tensor:
    """f(x), in the dtype of x if None, by the loops `forward(x, y)` and `backward(g, x, dx)` of
    kernels/<kernel>, which get flat arrays, and then `numbers`.

    With fold > 1, y has that many times fewer features than x, and both loops get the number of
    its features as their last argument.
    """
    return _Pointwise.apply(x, kernel, fold, dtype or x.dtype, numbers)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: str, fold: int, dtype: torch.dtype,
                numbers: tuple[float, ...]) -> Tensor:
        from manyform.ops.kernels.lanes import flat
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // fold, dtype=dtype)
        ctx.kernel, ctx.more = kernel, (*numbers, *((y.shape[-1],) if fold > 1 else ()))
        threads()
        _loops(kernel).forward(flat(x), flat(y), *ctx.more)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        from manyform.ops.kernels.lanes import flat
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        threads()
        _loops(ctx.kernel).backward(flat(g.contiguous()), flat(x), flat(dx), *ctx.more)
        return dx, None, None, None, None


def _loops(kernel: str) -> ModuleType:
    return importlib.import_module(f"manyform.ops.kernels.{kernel}")
