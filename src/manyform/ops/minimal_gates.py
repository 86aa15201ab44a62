"""Pointwise parts of minGRU and minLSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import even_rows, single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda f, i: 0)
def relative_gate(f: Tensor, i: Tensor) -> Tensor:
    """log sigmoid(f) - log sigmoid(i), whose sigmoid is sigmoid(f) / (sigmoid(f) + sigmoid(i))
    (Feng 2024, "Were RNNs All We Needed?", section 3.2).

    f, i: (B, T, D). Returns (B, T, D) in the dtype of f.
    """
    wide = torch.float64 if f.dtype == torch.float64 else torch.float32
    return (F.logsigmoid(f.to(wide)) - F.logsigmoid(i.to(wide))).to(f.dtype)


@operation(flops=lambda x: 0)
def positive_part(x: Tensor) -> Tensor:
    """x + 1/2 for x >= 0, sigmoid(x) otherwise: g of Feng 2024, appendix B. x: (B, T, D)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (torch.sigmoid(x.to(wide).clamp(max=0)) + x.to(wide).relu()).to(x.dtype)


def _fits(*tensors: Tensor) -> bool:
    return (usable(*tensors) and single(*tensors)
            and all(t.ndim == 3 and t.shape[2] % 16 == 0 and t.shape[1] > 1 for t in tensors))


@relative_gate.path("numba", when=_fits)
def _relative(f: Tensor, i: Tensor) -> Tensor:
    return _Relative.apply(f, i)


@positive_part.path("numba", when=_fits)
def _positive(x: Tensor) -> Tensor:
    return _Positive.apply(x)


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, i: Tensor) -> Tensor:
        from manyform.ops.kernels import minimal_gates as kernel
        from manyform.ops.kernels.lanes import flat
        f, i = even_rows(f), even_rows(i)
        out = torch.empty(f.shape, dtype=f.dtype)
        threads()
        kernel.relative(flat(f), f.stride(1), flat(i), i.stride(1), f.shape[2], flat(out))
        ctx.save_for_backward(f, i)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import minimal_gates as kernel
        from manyform.ops.kernels.lanes import flat
        f, i = ctx.saved_tensors
        df, di = torch.empty(f.shape, dtype=f.dtype), torch.empty(i.shape, dtype=i.dtype)
        threads()
        kernel.relative_back(flat(f), f.stride(1), flat(i), i.stride(1), f.shape[2],
                             flat(g.contiguous()), flat(df), flat(di))
        return df, di


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from manyform.ops.kernels import minimal_gates as kernel
        from manyform.ops.kernels.lanes import flat
        x = even_rows(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        threads()
        kernel.positive(flat(x), x.stride(1), x.shape[2], flat(out))
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        from manyform.ops.kernels import minimal_gates as kernel
        from manyform.ops.kernels.lanes import flat
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        threads()
        kernel.positive_back(flat(x), x.stride(1), x.shape[2], flat(g.contiguous()), flat(dx))
        return dx
