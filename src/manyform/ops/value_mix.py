"""The pull of one layer's values towards those of the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda v, first, rate, v0: 0)
def value_mix(v: Tensor, first: Tensor, rate: Tensor, v0: Tensor) -> Tensor:
    """v + (first - v) sigmoid(v0 + rate) (Peng 2025, eq. 9).

    v, first, rate: (B, T, D); v0: (D,). Returns (B, T, D) in the dtype of v.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    share = torch.sigmoid(v0 + rate.to(wide))
    return torch.lerp(v.to(wide), first.to(wide), share).to(v.dtype)


def _compiled(v: Tensor, first: Tensor, rate: Tensor, v0: Tensor) -> bool:
    return (usable(v, first, rate, v0) and single(v, first, rate, v0) and v.shape[-1] % 16 == 0
            and v.numel() >= 4096)


@value_mix.path("numba", when=_compiled)
def _numba(v: Tensor, first: Tensor, rate: Tensor, v0: Tensor) -> Tensor:
    return _Mix.apply(v, first, rate, v0)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        from manyform.ops.kernels import rwkv as kernel
        from manyform.ops.kernels.lanes import flat
        tensors = tuple(x.contiguous() for x in tensors)
        out = torch.empty_like(tensors[0])
        threads()
        run: Any = kernel.mix
        run(*(flat(x) for x in tensors), flat(out))
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        from manyform.ops.kernels import rwkv as kernel
        from manyform.ops.kernels.lanes import flat
        tensors = ctx.saved_tensors
        outs = [torch.empty_like(x) for x in tensors[:3]]
        partial = torch.empty(threads(), tensors[3].numel())
        run: Any = kernel.mix_back
        run(*(flat(x) for x in tensors), flat(g.contiguous()), *(flat(x) for x in outs),
            partial.numpy())
        return (*outs, partial.sum(0))
