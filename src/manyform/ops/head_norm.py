"""Layer normalisation of each head, a skip around it, and an output gate, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import even_rows, single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda *arguments: 0)
def head_norm(h: Tensor, weight: Tensor, gate: Tensor, eps: float, skip: Tensor | None = None,
              u: Tensor | None = None) -> Tensor:
    """weight (h - mean) / sqrt(var + eps) sigmoid(gate), mean and variance over a head (Beck 2025,
    "xLSTM 7B", figure 2); with skip: (the same + skip u) silu(gate) (Beck 2024, "xLSTM", figure
    11).

    h: (B, T, H, V); gate, u: (B, T, H V); weight, skip: (H V,). Returns (B, T, H V) in the dtype
    of gate.
    """
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    y = F.layer_norm(h.to(wide), (h.shape[-1],), eps=eps).flatten(2) * weight
    if skip is None or u is None:
        return (y * torch.sigmoid(gate.to(wide))).to(gate.dtype)
    return ((y + skip * u.to(wide)) * F.silu(gate.to(wide))).to(gate.dtype)


def _compiled(h: Tensor, weight: Tensor, gate: Tensor, eps: float, skip: Tensor | None = None,
              u: Tensor | None = None) -> bool:
    tensors = (h, weight, gate, skip, u)
    return (usable(*tensors) and single(*tensors) and weight.dtype == torch.float32
            and h.shape[-1] % 16 == 0 and h.shape[1] > 1)


@head_norm.path("numba", when=_compiled)
def _(h: Tensor, weight: Tensor, gate: Tensor, eps: float, skip: Tensor | None = None,
      u: Tensor | None = None) -> Tensor:
    return _HeadNorm.apply(h, weight, gate, eps, skip, u)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, gate: Tensor, eps: float,
                skip: Tensor | None, u: Tensor | None) -> Tensor:
        from manyform.ops.kernels import head_norm as kernel
        from manyform.ops.kernels.lanes import flat
        h, gate = h.contiguous(), even_rows(gate)
        skips = skip is not None
        side, shares = (gate, weight[:0]) if skip is None or u is None else (even_rows(u), skip)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        statistics = torch.empty(2 * h.numel() // h.shape[-1])
        threads()
        run: Any = kernel.forward
        run(flat(h), flat(weight), flat(gate), gate.stride(1), eps, flat(shares), flat(side),
            side.stride(1), skips, h.shape[-1], flat(out), statistics.numpy())
        ctx.save_for_backward(h, weight, gate, shares, side, statistics)
        ctx.skips = skips
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        from manyform.ops.kernels import head_norm as kernel
        from manyform.ops.kernels.lanes import flat
        h, weight, gate, shares, side, statistics = ctx.saved_tensors
        dh = torch.empty_like(h)
        dgate = torch.empty(gate.shape, dtype=gate.dtype)
        du = torch.empty(side.shape if ctx.skips else 0, dtype=side.dtype)
        partial = torch.empty(threads(), 2 * weight.numel())
        run: Any = kernel.backward
        run(flat(h), flat(weight), flat(gate), gate.stride(1), flat(shares), flat(side),
            side.stride(1), ctx.skips, h.shape[-1], statistics.numpy(), flat(g.contiguous()),
            flat(dh), flat(dgate), flat(du), partial.numpy())
        dweight, dskip = partial.sum(0).chunk(2)
        return dh, dweight, dgate, None, dskip if ctx.skips else None, du if ctx.skips else None
