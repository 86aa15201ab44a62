"""Three results of heads, each times a gate of its own, added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda gates, a, b, c: 0)
def gated_sum(gates: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """g_1 a + g_2 b + g_3 c for each head (Yuan 2025, "Native Sparse Attention", eq. 5).

    gates: (B, T, 3, H) float32 (float64 beside float64); a, b, c: (B, H, T, D) of one dtype.
    Returns (B, T, H, D) in their dtype, added in that of the gates.
    """
    parts = torch.stack([x.transpose(1, 2).to(gates.dtype) for x in (a, b, c)], dim=2)
    return (gates[..., None] * parts).sum(2).to(a.dtype)


def _compiled(gates: Tensor, a: Tensor, b: Tensor, c: Tensor) -> bool:
    return (usable(gates, a, b, c) and single(gates, a, b, c) and a.dtype == b.dtype == c.dtype
            and gates.dtype == torch.float32 and a.shape[3] % 16 == 0 and a.numel() >= 4096)


@gated_sum.path("numba", when=_compiled)
def _numba(gates: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _Sum.apply(gates, a, b, c)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, *parts: Tensor) -> Tensor:
        from manyform.ops.kernels import gated_sum as kernels
        from manyform.ops.kernels.lanes import flat
        gates, *parts = (x.contiguous() if i == 0 else x.transpose(1, 2).contiguous()  # type: ignore[assignment]
                         for i, x in enumerate((gates, *parts)))
        out = torch.empty_like(parts[0])
        threads()
        run: Any = kernels.add
        run(flat(gates), *(flat(x) for x in parts), gates.shape[3], out.shape[3], flat(out))
        ctx.save_for_backward(gates, *parts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        from manyform.ops.kernels import gated_sum as kernels
        from manyform.ops.kernels.lanes import flat
        gates, *parts = ctx.saved_tensors
        slope = slope.contiguous()
        outs = [torch.empty_like(x) for x in (gates, *parts)]
        threads()
        run: Any = kernels.add_back
        run(flat(gates), *(flat(x) for x in parts), gates.shape[3], slope.shape[3], flat(slope),
            *(flat(x) for x in outs))
        return outs[0], *(x.transpose(1, 2) for x in outs[1:])
