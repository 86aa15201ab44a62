"""How far two results are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manyform.laws.report import LawError
from manyform.state import State, tensors

# Largest error relative to the largest entry. Float32 leaves room for another order of summation
# over a few hundred steps; bfloat16 keeps 8 bits of every factor, so its law is on the norm.
TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 5e-2}

# Gradients below this share of the largest one are sums of cancelling terms, of which rounding
# leaves nothing. In bfloat16 so is a difference of half a unit in the last place of the largest.
NEGLIGIBLE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 2.0**-8}

# How much farther from float32 than any of the other way's a bfloat16 gradient may lie.
ROUNDING = 4.0


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


def require_gradients_close(got: Sequence[Tensor | None], want: Sequence[Tensor | None],
                            truth: Callable[[], Sequence[Tensor | None]], what: str,
                            precision: str) -> float:
    """Gradients of two ways to compute the same (None: no gradient): the largest relative error.

    In bfloat16 a gradient whose terms cancel may be mostly rounding, which no two ways share. Where
    they differ by more than the tolerance both are held to float32, which `truth` computes: `got`
    may lie at most `ROUNDING` times as far from it as the farthest of `want` does.
    """
    scale = max(float(w.abs().max()) for w in want if w is not None and w.numel())
    exact: Sequence[Tensor | None] | None = None
    worst = far = 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if w is None or not w.numel() or float(w.abs().max()) <= NEGLIGIBLE[precision] * scale:
            continue
        if g is None:
            raise LawError(f"{what} differ: one way loses a gradient that the other has")
        error = distance(g, w, precision)
        if error > TOLERANCE[precision] and precision == "bfloat16":
            apart = float((g.double() - w.double()).square().mean().sqrt())
            if apart <= NEGLIGIBLE[precision] / 2 * scale:
                continue
            if exact is None:
                exact = truth()
                far = max(distance(w, t, precision) for w, t in zip(want, exact, strict=True)
                          if w is not None and t is not None
                          and float(w.abs().max()) > NEGLIGIBLE[precision] * scale)
            t = exact[i]
            if t is not None and distance(g, t, precision) <= ROUNDING * far < float("inf"):
                continue
        worst = max(worst, require_close(g, w, what, precision))
    return worst


def require_states_close(got: State, want: State, what: str, precision: str) -> float:
    """The same for every tensor of two states whose layout agrees."""
    pairs = list(zip(tensors(got), tensors(want), strict=False))
    return max((require_close(a, b, what, precision) for a, b in pairs if a.shape == b.shape),
               default=0.0)
