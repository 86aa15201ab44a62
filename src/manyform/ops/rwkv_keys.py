"""Decays, removal and replacement keys of RWKV-7, from what its linear maps give."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation

DECAY_SCALE = -math.exp(-0.5)
"""Log decays lie in (-exp(-1/2), 0): a channel keeps at least 54.5% a step (Peng 2025, eq. 12)."""


@operation(flops=lambda k, decay, rate, w0, a0, k_k, k_a, heads: 0)
def rwkv_keys(k: Tensor, decay: Tensor, rate: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor,
              k_a: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of the recurrence (Peng 2025, section 4.1), features in heads of D / heads = N:

        log decay = -exp(-1/2) sigmoid(w0 + decay)      rate' = sigmoid(a0 + rate)
        kappa = k k_k / |k k_k| (a head)                 k' = k (1 + (rate' - 1) k_a)

    k, decay, rate: (B, T, D); w0, a0, k_k, k_a: (D,).
    Returns the log decay in float32 (float64 for float64 input) and, in the dtype of k, the erase
    terms -kappa and kappa rate', and k', all (B, T, heads, N).
    """
    shape = (*k.shape[:-1], heads, k.shape[-1] // heads)
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    log_decay = DECAY_SCALE * torch.sigmoid(w0 + decay.to(wide))
    share, wide_k = torch.sigmoid(a0 + rate.to(wide)), k.to(wide)  # rounded once, at the end
    kappa = F.normalize((wide_k * k_k).view(shape), dim=-1, eps=1e-12)
    key = (wide_k * (1 + (share - 1) * k_a)).view(shape)
    kept, erased, written = (x.to(k.dtype) for x in (key, -kappa, kappa * share.view(shape)))
    return log_decay.view(shape), erased, written, kept


def _compiled(k: Tensor, decay: Tensor, rate: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor,
              k_a: Tensor, heads: int) -> bool:
    tensors = (k, decay, rate, w0, a0, k_k, k_a)
    return (usable(*tensors) and single(*tensors) and k.shape[-1] // heads % 16 == 0
            and k.numel() >= 4096)


@rwkv_keys.path("numba", when=_compiled)
def _numba(k: Tensor, decay: Tensor, rate: Tensor, w0: Tensor, a0: Tensor, k_k: Tensor,
           k_a: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _Keys.apply(k, decay, rate, w0, a0, k_k, k_a, heads)


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from manyform.ops.kernels import rwkv as kernel
        from manyform.ops.kernels.lanes import flat
        *tensors, heads = arguments
        tensors = [x.contiguous() for x in tensors]
        k = tensors[0]
        shape = (*k.shape[:-1], heads, k.shape[-1] // heads)
        outs = [k.new_empty(shape, dtype=torch.float32), *(k.new_empty(shape) for _ in range(3))]
        threads()
        run: Any = kernel.keys
        run(*(flat(x) for x in tensors), shape[-1], *(flat(x) for x in outs))
        ctx.save_for_backward(*tensors)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from manyform.ops.kernels import rwkv as kernel
        from manyform.ops.kernels.lanes import flat
        tensors = ctx.saved_tensors
        d = tensors[3].numel()
        outs = [torch.empty_like(x) for x in tensors[:3]]
        partial = torch.empty(threads(), 4 * d)
        run: Any = kernel.keys_back
        run(*(flat(x) for x in tensors), grads[0].shape[-1],
            *(flat(g.contiguous()) for g in grads), *(flat(x) for x in outs), partial.numpy())
        return (*outs, *partial.sum(0).view(4, d).unbind(0), None)
