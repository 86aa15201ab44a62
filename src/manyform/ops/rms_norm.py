"""Root mean square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from manyform.ops.operation import operation


@operation(flops=lambda x, weight, eps=1e-6: 0)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4).

    x: (..., d), weight: (d,) or None. Statistics in float32 (float64 for float64 input); y has
    the dtype of x.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)
