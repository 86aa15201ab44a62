"""How far two results are apart, and how far they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from manyform.laws.report import LawError
from manyform.state import State, tensors

# Largest error relative to the largest entry. Float32 leaves room for another order of summation
# over a few hundred steps; bfloat16 keeps 8 bits of every factor, so its law is on the norm.
TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 5e-2}

# A gradient this small beside the largest one is a sum of cancelling terms, of which rounding
# leaves nothing: half a percent is one unit in the last place of a bfloat16.
NEGLIGIBLE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 1e-2}


def distance(got: Tensor, want: Tensor, precision: str) -> float:
    """Relative error: of the largest entry, or for bfloat16 of the Euclidean norm."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise LawError(f"shapes differ: {tuple(got.shape)} and {tuple(want.shape)}")
    if not got.numel():
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    if precision == "bfloat16":
        return float((got - want).norm() / want.norm().clamp(min=1e-6))
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))


def require_close(got: Tensor, want: Tensor, what: str, precision: str) -> float:
    """The relative error, or LawError if it is beyond the precision's tolerance."""
    error = distance(got, want, precision)
    if not error <= TOLERANCE[precision]:
        raise LawError(f"{what} differ by {error:.2g} (relative), allowed "
                       f"{TOLERANCE[precision]:.0e}")
    return error


def require_states_close(got: State, want: State, what: str, precision: str) -> float:
    """The same for every tensor of two states whose layout agrees."""
    pairs = list(zip(tensors(got), tensors(want), strict=False))
    return max((require_close(a, b, what, precision) for a, b in pairs if a.shape == b.shape),
               default=0.0)
