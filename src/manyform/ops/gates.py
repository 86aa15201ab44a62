"""Pointwise parts of the recurrent mixers, each in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation

SMALL = 1 << 14  # elements below which starting the threads costs more than they save


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@operation(flops=lambda x: 0)
def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: 1 + x for x > 0, e^x otherwise (Katharopoulos 2020, eq. 7). Any shape.

    Written so, the small values of negative x keep all their digits in bfloat16.
    """
    wide = _wide(x)
    return (wide.clamp(max=0).exp() + wide.relu()).to(x.dtype)


@operation(flops=lambda y, z, u=None, skip=None: 0)
def silu_gate(y: Tensor, z: Tensor, u: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    """(y + skip u) silu(z), with one skip a head (Gu & Dao 2023, figure 3; without u: y silu(z)).

    y, u: (B, T, H, V); z: (B, T, H V); skip: (H,). Returns (B, T, H V) in the dtype of y.
    """
    inner = _wide(y)
    if u is not None and skip is not None:
        inner = inner + u * skip[:, None]
    return (inner.flatten(2) * F.silu(_wide(z))).to(y.dtype)


@operation(flops=lambda x, factor: 0)
def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    """x: (B, T, H, V) times factor: (B, T, H), in the dtype of x, computed in that of factor."""
    return (x * factor[..., None]).to(x.dtype)


@operation(flops=lambda x, factor: 0)
def scale_and_keep(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(scale_heads(x, factor), x), for an x that is read once more: both gradients meet in one
    pass."""
    return scale_heads.reference(x, factor), x


@operation(flops=lambda y, eps: 0)
def divide_by_last(y: Tensor, eps: float) -> Tensor:
    """z_i = y_i / (y_V + eps), i < V: a normaliser that was computed beside what it divides
    (Katharopoulos 2020, eq. 9, where numerator and denominator are one recurrence).

    y: (B, T, H, V + 1) -> (B, T, H V).
    """
    return (y[..., :-1] / (y[..., -1:] + eps)).flatten(2)


def _rows(*tensors: Tensor | None) -> bool:
    """True if the compiled loops can walk over these: float32 or bfloat16, the last dimension dense
    and a multiple of 16, large enough."""
    return (usable(*tensors) and single(*tensors) and all(
        t is None or (t.stride(-1) == 1 and t.shape[-1] % 16 == 0) for t in tensors)
        and any(t is not None and t.numel() >= SMALL for t in tensors))


@elu_plus_one.path("numba", when=lambda x: x.ndim == 3 and _rows(x))
def _(x: Tensor) -> Tensor:
    return _EluPlusOne.apply(x)


@silu_gate.path("numba", when=lambda y, z, u=None, skip=None: _rows(y, z, u))
def _(y: Tensor, z: Tensor, u: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    return _SiluGate.apply(y, z, u, skip)


@scale_heads.path("numba", when=lambda x, factor: _rows(x) and factor.dtype == torch.float32)
def _(x: Tensor, factor: Tensor) -> Tensor:
    return _ScaleHeads.apply(x, factor)[0]


@scale_and_keep.path("numba", when=lambda x, factor: _rows(x) and factor.dtype == torch.float32)
def _(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return _ScaleHeads.apply(x, factor)


@divide_by_last.path("numba", when=lambda y, eps: usable(y) and single(y)
                     and y.shape[-1] % 16 == 1 and y.numel() >= SMALL)
def _(y: Tensor, eps: float) -> Tensor:
    return _DivideByLast.apply(y, eps)


class _EluPlusOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        y = torch.empty(x.shape, dtype=x.dtype)
        threads()
        kernel.elu_plus_one(flat(x), x.stride()[:2], flat(y), tuple(x.shape))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        threads()
        kernel.elu_plus_one_backward(flat(g.contiguous()), flat(y), flat(dx), tuple(y.shape))
        return dx


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, u: Tensor | None, skip: Tensor | None) -> Tensor:
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        ctx.save_for_backward(y, z, u, skip)
        out = torch.empty(z.shape, dtype=y.dtype)
        u_, skip_ = (y, torch.zeros(1)) if u is None or skip is None else (u, skip.float())
        threads()
        kernel.silu_gate(flat(y), y.stride()[:3], flat(z), z.stride()[:2], flat(u_),
                         u_.stride()[:3], flat(skip_), int(u is not None), flat(out),
                         tuple(y.shape))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        y, z, u, skip = ctx.saved_tensors
        dy, dz = torch.empty(y.shape, dtype=y.dtype), torch.empty(z.shape, dtype=z.dtype)
        u_, skip_ = (y, torch.zeros(1)) if u is None else (u, skip.float())
        du = torch.empty(u_.shape if u is not None else (1,), dtype=u_.dtype)
        blocks = -(-y.shape[0] * y.shape[1] // kernel.BLOCK)
        dskip = torch.zeros(blocks, y.shape[2] if u is not None else 1)
        threads()
        kernel.silu_gate_backward(flat(g.contiguous()), flat(y), y.stride()[:3], flat(z),
                                  z.stride()[:2], flat(u_), u_.stride()[:3], flat(skip_),
                                  int(u is not None), flat(dy), flat(dz), flat(du), flat(dskip),
                                  tuple(y.shape))
        if u is None:
            return dy, dz, None, None
        return dy, dz, du, dskip.sum(0).to(skip.dtype)


class _ScaleHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        ctx.save_for_backward(x, factor)
        ctx.set_materialize_grads(False)
        y = torch.empty(x.shape, dtype=x.dtype)
        threads()
        kernel.scale_heads(flat(x), x.stride()[:3], flat(factor.contiguous()), flat(y),
                           tuple(x.shape))
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, more: Tensor | None,  # type: ignore[override]
                 ) -> tuple[Tensor | None, Tensor | None]:
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        if g is None:
            return more, None
        x, factor = ctx.saved_tensors
        more = g.new_empty(0) if more is None else more.contiguous()
        dx, dfactor = torch.empty(x.shape, dtype=x.dtype), torch.empty(factor.shape)
        threads()
        kernel.scale_heads_backward(flat(g.contiguous()), flat(more), flat(x), x.stride()[:3],
                                    flat(factor.contiguous()), flat(dx), flat(dfactor),
                                    tuple(x.shape))
        return dx, dfactor


class _DivideByLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, eps: float) -> Tensor:
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        y = y.contiguous()
        z = y.new_empty(*y.shape[:3], y.shape[3] - 1)
        threads()
        kernel.divide_by_last(flat(y), flat(z), eps, z.shape[3])
        ctx.save_for_backward(y)
        ctx.eps = eps
        return z.flatten(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        from manyform.ops.kernels import gates as kernel
        from manyform.ops.kernels.lanes import flat
        (y,) = ctx.saved_tensors
        dy = torch.empty_like(y)
        threads()
        kernel.divide_by_last_backward(flat(g.contiguous()), flat(y), flat(dy), ctx.eps,
                                       y.shape[3] - 1)
        return dy, None
