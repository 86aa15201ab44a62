"""Root mean square normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda x, weight, eps=1e-6, dtype=None: 0)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None,
             ) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019,
    eq. 4).

    x: (..., d), weight: (d,). Statistics in float32 (float64 for float64 input). y has the given
    dtype, by default that of x.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return y.to(dtype or x.dtype)


@rms_norm.path("torch", when=lambda x, weight, eps=1e-6, dtype=None:
               x.dtype == weight.dtype == (dtype or x.dtype))
def _torch(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None,
           ) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _compiled(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None,
              ) -> bool:
    return (usable(x, weight) and x.shape[-1] % 16 == 0 and weight.dtype == torch.float32
            and {x.dtype, dtype or x.dtype} <= {torch.float32, torch.bfloat16}
            and x.numel() >= 4096)  # below that, starting two threads costs more than it saves


@rms_norm.path("numba", when=_compiled)
def _numba(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None,
           ) -> Tensor:
    return _RMSNorm.apply(x, weight, eps, dtype or x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from manyform.ops.kernels import rms_norm as kernel
        from manyform.ops.kernels.lanes import flat
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        inverse = torch.empty(x.numel() // x.shape[-1])
        threads()
        kernel.forward(flat(x), flat(weight), eps, flat(y), inverse.numpy())
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from manyform.ops.kernels import rms_norm as kernel
        from manyform.ops.kernels.lanes import flat
        x, weight, inverse = ctx.saved_tensors
        dx = torch.empty_like(x)
        partial = torch.empty(threads(), weight.numel())
        kernel.backward(flat(g.contiguous()), flat(x), flat(weight), inverse.numpy(), flat(dx),
                        partial.numpy())
        return dx, partial.sum(0), None, None
