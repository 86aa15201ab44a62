"""Normalisation layers by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from manyform.errors import unknown
from manyform.ops.layer_norm import layer_norm
from manyform.ops.rms_norm import rms_norm
from manyform.precision import compute_dtype


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale (Zhang & Sennrich 2019)."""

    def __init__(self, d: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        return rms_norm(x, self.weight, self.eps, compute_dtype(x))


class OffsetRMSNorm(nn.Module):
    """Root mean square normalisation with the scale 1 + weight (Gemma's released code)."""

    def __init__(self, d: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        return rms_norm(x, 1 + self.weight, self.eps, compute_dtype(x))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba 2016) with a learned scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        return layer_norm(x, self.weight, self.bias, self.eps, compute_dtype(x))


def stream_norm(norm_: nn.Module, x: Tensor) -> Tensor:
    """The norm of the stream itself, which autocast must not round between layers."""
    with torch.autocast(x.device.type, enabled=False):
        return norm_(x)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": lambda d, eps: RMSNorm(d, eps=eps),
    "rms_offset": lambda d, eps: OffsetRMSNorm(d, eps=eps),
    "layer": lambda d, eps: LayerNorm(d, eps=eps),
    "layer_no_bias": lambda d, eps: LayerNorm(d, eps=eps, bias=False),
    "none": lambda d, eps: nn.Identity(),
}


def norm(name: str, d: int, eps: float | None = None) -> nn.Module:
    """The normalisation layer called `name` over `d` features; ManyformError if unknown.

    eps: added to the mean square or the variance; by default 1e-6 and 1e-5.
    """
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    return NORMS[name](d, default_eps(name) if eps is None else eps)


def default_eps(name: str) -> float:
    """The epsilon of the norm of that name where none is given."""
    return 1e-6 if name.startswith("rms") else 1e-5
