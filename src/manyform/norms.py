"""Normalisation layers by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyform.errors import unknown
from manyform.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale (Zhang & Sennrich 2019)."""

    def __init__(self, d: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        return rms_norm(x, self.weight, self.eps, _compute_dtype(x))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba 2016), computed in the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        return super().forward(x.to(self.weight.dtype)).to(_compute_dtype(x))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the layers behind a norm compute in: under autocast its dtype, else that of x.

    Casting once here spares every linear map behind the norm a cast of its own.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(device)
    return x.dtype


NORMS = {"rms": RMSNorm, "layer": LayerNorm,
         "layer_no_bias": lambda d: LayerNorm(d, bias=False), "none": lambda d: nn.Identity()}


def norm(name: str, d: int) -> nn.Module:
    """The normalisation layer called `name` over `d` features; ManyformError if unknown."""
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    return NORMS[name](d)
