"""Averages of values by weights phi(q) . phi(k), as a recurrence: the sums, and the sum of weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops import chunked_decay, tiled_decay
from manyform.ops.kernel_features import cosine_features, exp_features
from manyform.ops.matrix_recurrence import matrix_recurrence
from manyform.ops.operation import operation
from manyform.ops.short_conv import steps_since_reset


def _flops(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
           state: Tensor | None = None, reset: Tensor | None = None, scale: float = 1.0) -> int:
    batch, length, heads, value = v.shape
    each = 4 + (log_decay is not None)
    return each * batch * length * heads * k.shape[3] * (value + 1)


@operation(flops=_flops)
def weighted_sums(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
                  state: Tensor | None = None, reset: Tensor | None = None, scale: float = 1.0,
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix_recurrence` of [v, 1]: sum_j w_ij v_j and sum_j w_ij, with w_ij = scale q_i . k_j and
    the decays between (Katharopoulos 2020, "Transformers are RNNs", eq. 9 and 18).

    q, k: (B, T, G, K) with G heads that divide H; v: (B, T, H, V); log_decay <= 0: None or
    (B, T, H); state: (B, H, K, V + 1) or None; reset: (B, T) bool, true where a document begins.
    Returns y (B, T, H, V) in the dtype of v, the sums of weights (B, T, H) and the last state, both
    float32 (float64 for float64 input).
    """
    y, state = matrix_recurrence(q, k, F.pad(v, (0, 1), value=1.0), log_decay, None, state, reset,
                                 scale)
    return y[..., :-1], y[..., -1].to(state.dtype), state


@operation(flops=lambda q, k, v, angle, state=None, reset=None: (
    8 * k.shape[3] * (v.shape[3] + 1) * v[..., 0].numel()))
def cosine_sums(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, state: Tensor | None = None,
                reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_sums` of `cosine_features` of q and k: w_ij = relu(q_i) . relu(k_j) cos(a_i - a_j)
    (Qin 2022, "cosFormer", eq. 10 to 12).

    q, k: (B, T, H, D); v: (B, T, H, V); angle a: (B, T) float64; state: (B, H, 2 D, V + 1) or None.
    Returns as `weighted_sums` does.
    """
    return weighted_sums(cosine_features(q, angle), cosine_features(k, angle), v, None, state,
                         reset)


@operation(flops=lambda q, k, v, projection, eps, top=None, state=None, reset=None: (
    (4 * q.shape[3] + 5 * (v.shape[3] + 1)) * v[..., 0].numel() * len(projection)))
def random_sums(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, eps: float,
                top: Tensor | None = None, state: Tensor | None = None,
                reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`weighted_sums` of positive random features: phi(x) = exp(p_n . x - |x|^2 / (2 sqrt(D))),
    n = 1 ... M, the rows of the projection scaled by D^(-1/4) (Choromanski 2021, "Rethinking
    attention with performers", lemma 1), kept in range:

        phi(q_i) / (its largest) + eps        phi(k_j) / (the largest of k_1 ... k_j) + eps

    The state is in units of the latter, so that it decays where that rises. Both are constants to
    the gradient, since they cancel in the average (up to eps).

    q, k: (B, T, H, D); v: (B, T, H, V); projection: (M, D); top: (B, H), the logarithm of the
    largest so far, None for -inf, and state: (B, H, M, V + 1), both after the step before.
    Returns as `weighted_sums` does, then top after the last step.
    """
    log_q, log_k = (random_logarithms(x, projection) for x in (q, k))
    half = half_squares(k)
    highest = log_k.detach().amax(-1).to(half.dtype) - half.detach()
    tops, decay = running_max(highest, top, reset)
    phi_q = exp_features(log_q, log_q.detach().amax(-1).to(half.dtype), eps)
    phi_k = exp_features(log_k, half + tops, eps)
    return *weighted_sums(phi_q, phi_k, v, decay, state, reset), tops[:, -1]


def random_logarithms(x: Tensor, projection: Tensor) -> Tensor:
    """D^(-1/4) p_n . x: (B, T, H, D) and (M, D) -> (B, T, H, M)."""
    return F.linear(x.contiguous(), projection * x.shape[-1]**-0.25)


def half_squares(x: Tensor) -> Tensor:
    """|x|^2 / (2 sqrt(D)): (B, T, H, D) -> (B, T, H), in float32 (float64 for float64 input)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).square().sum(-1) / (2 * x.shape[-1]**0.5)


def running_max(x: Tensor, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest x of the document so far, and by how much it fell short of that a step before
    (0 where there is none): both (batch, length, heads). before: (batch, heads) or None."""
    if reset is None:
        top = x.cummax(1).values
        old = None if before is None else before[:, None]
    else:
        top, since, span = x, steps_since_reset(reset)[..., None], 1
        while span < x.shape[1]:  # after each round, the maximum of the last 2 span steps
            further = torch.maximum(top[:, span:], top[:, :-span])
            top = torch.cat([top[:, :span],
                             torch.where(since[:, span:] >= span, further, top[:, span:])], 1)
            span *= 2
        old = None if before is None else torch.where(since >= x.shape[1], before[:, None],
                                                      -math.inf)
    if old is not None:
        top = torch.maximum(top, old)
    first = torch.full_like(top[:, :1], -math.inf) if before is None else before[:, None]
    previous = torch.cat([first, top[:, :-1]], dim=1)
    fresh = previous == -math.inf
    if reset is not None:
        fresh = fresh | reset[..., None]
    return top, torch.where(fresh, 0.0, previous - top)


def _tiles(k: Tensor, v: Tensor, features: int, log_decay: Tensor | None = None) -> bool:
    """True for bfloat16 that is not small, where there are matrix tiles."""
    return (v.dtype == torch.bfloat16 and v.numel() >= chunked_decay.SMALL and features % 32 == 0
            and (log_decay is None or log_decay.ndim < 4)
            and tiled_decay.applies(k.new_empty(1).expand(*k.shape[:3], features), v, None, None))


def _empty(v: Tensor, key: int) -> Tensor:
    return torch.zeros(v.shape[0], v.shape[2], key, v.shape[3] + 1)


@weighted_sums.path("tiles", when=lambda q, k, v, log_decay=None, state=None, reset=None, scale=1.0:
                    _tiles(k, v, k.shape[3], log_decay))
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
      state: Tensor | None = None, reset: Tensor | None = None, scale: float = 1.0,
      ) -> tuple[Tensor, Tensor, Tensor]:
    if log_decay is not None:
        log_decay = log_decay.float().expand(v.shape[:3])
    state = _empty(v, k.shape[3]) if state is None else state.float()
    return tiled_decay.tiled_average(q.bfloat16(), k.bfloat16(), v, log_decay, state, reset,
                                     scale)[:3]


@cosine_sums.path("tiles", when=lambda q, k, v, angle, state=None, reset=None: (
    k.shape[3] % 16 == 0 and _tiles(k, v, 2 * k.shape[3])))
def _(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, state: Tensor | None = None,
      reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    angle = angle.expand(v.shape[:2])
    state = _empty(v, 2 * k.shape[3]) if state is None else state.float()
    return tiled_decay.tiled_average(
        q.bfloat16(), k.bfloat16(), v, None, state, reset, 1.0,
        tiled_decay.Cosine(angle.cos().float(), angle.sin().float()))[:3]


@random_sums.path("tiles", when=lambda q, k, v, projection, eps, top=None, state=None, reset=None: (
    k.shape[3] % 32 == 0 and k.shape[2] == v.shape[2] and _tiles(k, v, len(projection))))
def _(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, eps: float, top: Tensor | None = None,
      state: Tensor | None = None, reset: Tensor | None = None,
      ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = _empty(v, len(projection)) if state is None else state.float()
    if top is None:
        top = torch.full(state.shape[:2], -math.inf)
    features = tiled_decay.Random(projection * k.shape[3]**-0.25, eps, top)
    return tiled_decay.tiled_average(q.bfloat16(), k.bfloat16(), v, None, state, reset, 1.0,
                                     features)
