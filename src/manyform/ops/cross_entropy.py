"""The loss of a language model's head: linear map and cross-entropy in one operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.operation import operation


def _flops(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> int:
    return 2 * h.numel() * weight.shape[0]


@operation(flops=_flops)
def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
                         ) -> Tensor:
    """sum_i [ logsumexp_v(W h_i) - (W h_i)_{target_i} ], in nats, as a float32 scalar.

    h: (n, d) features, weight: (vocab, d), targets: (n,) int64; rows whose target is
    `ignore_index` count nothing. The sum, not the mean: callers divide by what they count.
    """
    logits = F.linear(h, weight.to(h.dtype))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
