"""The loss of a language model's head: linear map and cross-entropy in one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable
from manyform.ops.linear import weight_gradient
from manyform.ops.operation import operation

_LOGITS_AT_ONCE = 1 << 23
"""Logits that the compiled form holds at a time: 16 MiB of bfloat16."""


def _flops(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> int:
    return 2 * h.numel() * weight.shape[0]


@operation(flops=_flops)
def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
                         ) -> Tensor:
    """sum_i [ logsumexp_v(W h_i) - (W h_i)_{target_i} ], in nats, as a float32 scalar (float64
    for float64 features).

    h: (n, d) features, weight: (vocab, d), targets: (n,) int64; rows whose target is
    `ignore_index` count nothing. The sum, not the mean: callers divide by what they count.
    """
    logits = F.linear(h, weight.to(h.dtype))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")


def _compiled(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> bool:
    return usable(h, weight, targets) and h.dtype in (torch.float32, torch.bfloat16)


@linear_cross_entropy.path("numba", when=_compiled)
def _numba(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Logits a block of rows at a time; where gradients are wanted they are taken at once, while
    the block is in the cache, so that no logits are kept."""
    return _LinearCrossEntropy.apply(h, weight, targets, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        from manyform.ops.kernels import cross_entropy as kernel
        from manyform.ops.kernels.lanes import flat
        n, vocab = h.shape[0], weight.shape[0]
        if bool(((targets < 0) | (targets >= vocab)).logical_and(targets != ignore_index).any()):
            raise IndexError(f"a target lies outside the vocabulary of {vocab}")
        w = weight.to(h.dtype)
        wants_h, wants_w = ctx.needs_input_grad[:2]
        losses = torch.empty(n)
        dh = torch.empty_like(h) if wants_h else None
        dw = torch.zeros(vocab, h.shape[1]) if wants_w else None
        step = max(1, _LOGITS_AT_ONCE // vocab)
        with torch.autocast("cpu", enabled=False):
            for i in range(0, n, step):
                rows = h[i:i + step]
                logits = rows @ w.T
                threads()
                kernel.loss_and_gradient(flat(logits), targets[i:i + step].numpy(), ignore_index,
                                         vocab, losses[i:i + step].numpy())
                if dh is not None:
                    torch.mm(logits, w, out=dh[i:i + step])
                if dw is not None:
                    dw += weight_gradient(logits, rows)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * g.to(dh.dtype),
                None if dw is None else (dw * g).to(ctx.dtype), None, None)
