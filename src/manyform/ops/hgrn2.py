"""The gates of HGRN2, from what its linear map gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import even_rows, single, threads, usable
from manyform.ops.operation import operation

LIMIT = 40.0
"""f beyond it changes nothing any more, so that the square of its exponential can be held."""


@operation(flops=lambda o, f, bound: 0)
def hgrn2_gates(o: Tensor, f: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q = silu(o),   k = 1 - a,   log a,   with a = bound + (1 - bound) sigmoid(f)

    (Qin 2024, "HGRN2: Gated Linear RNNs with State Expansion", section 3).

    o, f: (B, T, D); bound: (D,), from 0 up to 1. Returns q and k in the dtype of o and log a in
    float32 (float64 for float64 input), all (B, T, D).
    """
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    odds = (1 - bound) / (bound + f.to(wide).clamp(-LIMIT, LIMIT).exp())  # (1 - a) / a
    return F.silu(o), (odds / (1 + odds)).to(o.dtype), -torch.log1p(odds)


@hgrn2_gates.path("numba", when=lambda o, f, bound: (
    usable(o, f, bound) and single(o, f, bound) and o.shape[-1] % 16 == 0 and o.shape[1] > 1))
def _numba(o: Tensor, f: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _Gates.apply(o, f, bound.float())


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, f: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from manyform.ops.kernels import hgrn2 as kernel
        from manyform.ops.kernels.lanes import flat
        o, f, bound = even_rows(o), even_rows(f), bound.contiguous()
        q, k = (torch.empty(o.shape, dtype=o.dtype) for _ in range(2))
        log_a = torch.empty(o.shape)
        threads()
        kernel.forward(flat(o), o.stride(1), flat(f), f.stride(1), flat(bound), flat(q), flat(k),
                       flat(log_a))
        ctx.save_for_backward(o, f, bound)
        return q, k, log_a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dlog: Tensor) -> tuple[Tensor, ...]:
        from manyform.ops.kernels import hgrn2 as kernel
        from manyform.ops.kernels.lanes import flat
        o, f, bound = ctx.saved_tensors
        do, df = torch.empty(o.shape, dtype=o.dtype), torch.empty(f.shape, dtype=f.dtype)
        partial = torch.empty(threads(), bound.numel())
        run: Any = kernel.backward
        run(flat(o), o.stride(1), flat(f), f.stride(1), flat(bound),
            *(flat(g.contiguous()) for g in (dq, dk, dlog)), flat(do), flat(df), partial.numpy())
        return do, df, partial.sum(0)
