"""Features of kernel attention, each in one pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation

SMALL = 1 << 14  # elements below which starting the threads costs more than they save


@operation(flops=lambda x, shift, eps: 0)
def exp_features(x: Tensor, shift: Tensor, eps: float) -> Tensor:
    """exp(x - shift) + eps: positive random features from their logarithms (Choromanski 2021,
    "Rethinking attention with performers", lemma 1; the shift and eps are its code's).

    x: (B, T, H, M); shift: (B, T, H) float32 (float64 for float64 x). Returns (B, T, H, M) in the
    dtype of x.
    """
    return (torch.exp(x.to(shift.dtype) - shift[..., None]) + eps).to(x.dtype)


@operation(flops=lambda x, angle: 0)
def cosine_features(x: Tensor, angle: Tensor) -> Tensor:
    """relu(x) cos(a), then relu(x) sin(a) (Qin 2022, "cosFormer", eq. 11).

    x: (B, T, H, D); angle a: (B, T) float64. Returns (B, T, H, 2 D) in the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    u, a = F.relu(x).to(wide), angle[..., None, None]
    return torch.cat([u * a.cos().to(wide), u * a.sin().to(wide)], dim=-1).to(x.dtype)


def _compilable(width: int, x: Tensor, other: Tensor | None = None) -> bool:
    return (usable(x, other) and single(x) and width % 16 == 0 and x.stride(-1) == 1
            and x.numel() >= SMALL)


@exp_features.path("numba", when=lambda x, shift, eps: _compilable(x.shape[-1], x, shift))
def _(x: Tensor, shift: Tensor, eps: float) -> Tensor:
    return _Exponential.apply(x.contiguous(), shift.float().contiguous(), eps)


@cosine_features.path("numba", when=lambda x, angle: _compilable(x.shape[-1], x, angle))
def _(x: Tensor, angle: Tensor) -> Tensor:
    return _Cosine.apply(x, angle)


def _loops() -> tuple[Any, Any]:
    """The compiled loops and what flattens a tensor for them; imported when first needed."""
    from manyform.ops.kernels import kernel_features
    from manyform.ops.kernels.lanes import flat
    threads()
    return kernel_features, flat


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, eps: float) -> Tensor:
        kernel, flat = _loops()
        y = torch.empty(x.shape, dtype=x.dtype)
        kernel.exponential(flat(x), flat(shift), np.float32(eps), flat(y), shift.numel(),
                           x.shape[-1])
        ctx.save_for_backward(y)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kernel, flat = _loops()
        (y,) = ctx.saved_tensors
        dx, dshift = torch.empty_like(y), torch.empty(y.shape[:-1])
        kernel.exponential_backward(flat(g.contiguous()), flat(y), np.float32(ctx.eps), flat(dx),
                                    flat(dshift), dshift.numel(), y.shape[-1])
        return dx, dshift, None


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angle: Tensor) -> Tensor:
        kernel, flat = _loops()
        angle = angle.expand(x.shape[:2])
        cos, sin = angle.cos().float(), angle.sin().float()
        y = torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
        kernel.cosine(flat(x), x.stride()[:3], flat(cos), flat(sin), flat(y), tuple(x.shape))
        ctx.save_for_backward(x, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kernel, flat = _loops()
        x, cos, sin = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype)
        kernel.cosine_backward(flat(g.contiguous()), flat(x), x.stride()[:3], flat(cos), flat(sin),
                               flat(dx), tuple(x.shape))
        return dx, None
