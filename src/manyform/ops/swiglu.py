"""The gated activation of a gated MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda x: 0)
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, where x = (gate, up) side by side (Shazeer 2020, eq. 6 without the maps).

    x: (..., 2 h) -> (..., h).
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _compiled(x: Tensor) -> bool:
    return (usable(x) and x.shape[-1] % 32 == 0 and x.dtype in (torch.float32, torch.bfloat16)
            and x.numel() >= 8192)


@swiglu.path("numba", when=_compiled)
def _numba(x: Tensor) -> Tensor:
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from manyform.ops.kernels import swiglu as kernel
        from manyform.ops.kernels.lanes import flat
        x = x.contiguous()
        h = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], h)
        threads()
        kernel.forward(flat(x), flat(y), y.numel() // h, h)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        from manyform.ops.kernels import swiglu as kernel
        from manyform.ops.kernels.lanes import flat
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        h = x.shape[-1] // 2
        threads()
        kernel.backward(flat(g.contiguous()), flat(x), flat(dx), g.numel() // h, h)
        return dx
