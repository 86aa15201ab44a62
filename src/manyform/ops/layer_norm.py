"""Layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda x, weight, bias, eps=1e-5, dtype=None: 0)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5,
               dtype: torch.dtype | None = None) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension (Ba 2016,
    eq. 4).

    x: (..., d), weight, bias: (d,). Statistics in float32 (float64 for float64 input). y has the
    given dtype, by default that of x.
    """
    wide = torch.promote_types(x.dtype, weight.dtype)
    shift = None if bias is None else bias.to(wide)
    y = F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), shift, eps)
    return y.to(dtype or x.dtype)


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5,
              dtype: torch.dtype | None = None) -> bool:
    return (usable(x, weight) and x.shape[-1] % 16 == 0 and weight.dtype == torch.float32
            and {x.dtype, dtype or x.dtype} <= {torch.float32, torch.bfloat16}
            and x.numel() >= 4096)


@layer_norm.path("numba", when=_compiled)
def _numba(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5,
           dtype: torch.dtype | None = None) -> Tensor:
    return _LayerNorm.apply(x, weight, bias, eps, dtype or x.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
                dtype: torch.dtype) -> Tensor:
        from manyform.ops.kernels import layer_norm as kernel
        from manyform.ops.kernels.lanes import flat
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        mean, inverse = torch.empty(2, x.numel() // x.shape[-1])
        threads()
        kernel.forward(flat(x), flat(weight), flat(weight[:0] if bias is None else bias), eps,
                       flat(y), mean.numpy(), inverse.numpy())
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from manyform.ops.kernels import layer_norm as kernel
        from manyform.ops.kernels.lanes import flat
        x, weight, mean, inverse = ctx.saved_tensors
        dx = torch.empty_like(x)
        d_weight, d_bias = torch.empty(2, threads(), weight.numel())
        kernel.backward(flat(g.contiguous()), flat(x), flat(weight), mean.numpy(),
                        inverse.numpy(), flat(dx), d_weight.numpy(), d_bias.numpy())
        return dx, d_weight.sum(0), d_bias.sum(0) if ctx.has_bias else None, None, None
