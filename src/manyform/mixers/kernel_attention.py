"""Softmax attention replaced by a product of features, phi(q) . phi(k), so that its memory is a
matrix: random features that estimate it (Performer), rectified ones with a cosine (cosFormer)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.contract import Cost, CostGrowth, Place, SequenceMixer, StateGrowth, mixer
from manyform.errors import ManyformError
from manyform.init import linear, residual_std
from manyform.mixers.attention import _heads
from manyform.mixers.linear_attention import _positions
from manyform.ops.gates import scale_heads
from manyform.ops.kernel_average import (
    cosine_sums,
    half_squares,
    random_logarithms,
    random_sums,
    running_max,
)
from manyform.ops.kernel_features import cosine_features, exp_features
from manyform.ops.matrix_recurrence import matrix_recurrence

TINY = 1e-30
"""Below every sum of a Performer's weights."""


class PerformerState(NamedTuple):
    """top: (batch, n_heads), the largest logarithm of a key's feature so far, -inf at the start;
    memory: (batch, n_heads, features, head_dim + 1), in units of exp(top); both float32."""

    top: Tensor
    memory: Tensor


class CosformerState(NamedTuple):
    """position: (batch,) int64, tokens since the document began; memory: (batch, n_heads,
    2 head_dim, head_dim + 1), float32."""

    position: Tensor
    memory: Tensor


class _KernelAttention(SequenceMixer):
    """y_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j), over j <= i if causal,
    over the document if not. The last column of the memory is the running sum of phi(k)."""

    def __init__(self, d_model: int, *, place: Place, n_heads: int | None, head_dim: int | None,
                 causal: bool) -> None:
        super().__init__(d_model, place=place)
        self.n_heads, self.head_dim = _heads(d_model, n_heads, head_dim)
        self.causal = causal
        width = self.n_heads * self.head_dim
        self.qkv = linear(d_model, 3 * width)
        self.out = linear(width, d_model, std=residual_std(place))

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """What looks both ways keeps no state."""
        return ("constant" if self.causal else "none"), "linear"

    def _project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, each (batch, length, n_heads, head_dim)."""
        return list(self.qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2))

    def _average(self, sums: Tensor, weights: Tensor, floor: float) -> Tensor:
        """The layer's output, from sums of values and of weights, which are `floor` at least."""
        return self.out(scale_heads(sums, weights.clamp(min=floor).reciprocal()).flatten(2))

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.out.weight.dtype, torch.float32)

    def _memory(self, batch: int, features: int, device: torch.device | str | None) -> Tensor:
        return torch.zeros(batch, self.n_heads, features, self.head_dim + 1, dtype=self._wide(),
                           device=device)

    def _cost(self, length: int, features: int, per_entry: int, more: int) -> Cost:
        """per_entry: operations for an entry of the memory and a step; more: other state bytes."""
        memory = self.n_heads * features * (self.head_dim + 1)
        maps = 2 * (self.qkv.weight.numel() + self.out.weight.numel())
        return Cost(length * (maps + per_entry * memory),
                    self.causal * (memory * self._wide().itemsize + more))

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Values and output; queries and keys."""
        q, k, v = self.qkv.weight.chunk(3)
        return [v, self.out.weight], [q, k]


@mixer("performer")
class Performer(_KernelAttention):
    """FAVOR+: phi(x) = exp(w_i . x - |x|^2 / 2), i = 1 ... features, with w_i normal, so that
    phi(q) . phi(k) / features estimates exp(q . k) without bias and without negative weights
    (Choromanski 2021, "Rethinking attention with performers", lemma 1); q and k are scaled by
    head_dim^(-1/4) first.

    features: head_dim ln(head_dim) if None, to the nearest multiple of 32. orthogonal: the w_i are
    orthogonal in groups of head_dim, their lengths those of normal vectors, which lowers the
    variance (ibid., theorem 2). They are drawn once and saved with the weights. causal: False lets
    every token see its whole document.

    Numbers stay in range as in the released code: a query's features are divided by its largest,
    and eps is added to all. Keys are divided by the largest feature of the keys so far (in the
    released code, of all keys: that would look ahead), which is a decay of the memory where it
    grows; both factors cancel in the quotient.
    """

    projection: Tensor

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, features: int | None = None, orthogonal: bool = True,
                 causal: bool = True, eps: float = 1e-6) -> None:
        super().__init__(d_model, place=place, n_heads=n_heads, head_dim=head_dim, causal=causal)
        d = self.head_dim
        if features is None:
            features = max(1, round(d * math.log(d) / 32)) * 32
        if features < 1 or eps <= 0:
            raise ManyformError("features must be at least 1 and eps positive, not "
                                f"{features} and {eps}")
        self.features, self.eps = features, eps
        self.register_buffer("projection", random_features(features, d, orthogonal))

    def forward(self, x: Tensor, state: PerformerState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, PerformerState | None]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step (None
        if not causal)."""
        if not self.causal:
            self.whole(state, reset)
        q, k, v = self._project(x)
        if self.causal:
            top, memory = (None, None) if state is None else state
            y, weights, memory, top = random_sums(q, k, v, self.projection, self.eps, top, memory,
                                                  reset)
            return self._average(y, weights, TINY), PerformerState(top, memory)
        log_q, log_k = (random_logarithms(t, self.projection) for t in (q, k))
        half = half_squares(k)
        highest = log_k.detach().amax(-1).to(half.dtype) - half.detach()
        if reset is None:
            top = highest.amax(1, keepdim=True)
        else:
            top = torch.maximum(running_max(highest, None, reset)[0], running_max(
                highest.flip(1), None, _backwards(reset))[0].flip(1))
        phi_q = exp_features(log_q, log_q.detach().amax(-1).to(half.dtype), self.eps)
        phi_k = exp_features(log_k, half + top, self.eps)
        y, weights = _both_ways(phi_q, phi_k, v, reset)
        return self._average(y, weights, TINY), None

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> PerformerState | None:
        """An empty memory; None if not causal."""
        if not self.causal:
            return None
        memory = self._memory(batch_size, self.features, device)
        return PerformerState(torch.full_like(memory[:, :, 0, 0], -math.inf), memory)

    def cost(self, length: int) -> Cost:
        """The maps, the features and the recurrence; a state of fixed size."""
        cost = self._cost(length, self.features, 5 if self.causal else 4,
                          self.n_heads * self._wide().itemsize)
        return cost + Cost(4 * length * self.n_heads * self.head_dim * self.features, 0)


@mixer("cosformer")
class Cosformer(_KernelAttention):
    """phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi / 2 * (i - j) / M), by the addition
    theorem a product of twice as many features, relu(x) cos(pi i / 2M) and relu(x) sin(pi i / 2M)
    (Qin 2022, "cosFormer", eq. 10 to 12).

    max_length: the M, at least the length of a document (beyond it weights would turn negative).
    causal: False lets every token see its whole document. eps: the least denominator.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, max_length: int = 2048, causal: bool = True,
                 eps: float = 1e-6) -> None:
        super().__init__(d_model, place=place, n_heads=n_heads, head_dim=head_dim, causal=causal)
        if max_length < 1 or eps <= 0:
            raise ManyformError("max_length must be at least 1 and eps positive, not "
                                f"{max_length} and {eps}")
        self.max_length, self.eps = max_length, eps

    def forward(self, x: Tensor, state: CosformerState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, CosformerState | None]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step (None
        if not causal). Raises ManyformError past `max_length`."""
        if not self.causal:
            self.whole(state, reset)
        before, memory = (None, None) if state is None else state
        positions = _positions(before, reset, x.shape[0], x.shape[1], x.device)
        if positions.numel() and int(positions.max()) >= self.max_length:
            raise ManyformError(
                f"cosformer was built for documents of at most {self.max_length} tokens and is "
                f"given {int(positions.max()) + 1}; create it with a larger max_length")
        angle = positions.double() * (math.pi / 2 / self.max_length)
        q, k, v = self._project(x)
        if not self.causal:
            y, weights = _both_ways(cosine_features(q, angle), cosine_features(k, angle), v, reset)
            return self._average(y, weights, self.eps), None
        y, weights, after = cosine_sums(q, k, v, angle, memory, reset)
        return self._average(y, weights, self.eps), CosformerState(positions[:, -1] + 1, after)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> CosformerState | None:
        """Position 0 and an empty memory; None if not causal."""
        if not self.causal:
            return None
        return CosformerState(torch.zeros(batch_size, dtype=torch.int64, device=device),
                              self._memory(batch_size, 2 * self.head_dim, device))

    def cost(self, length: int) -> Cost:
        """The maps and the recurrence; a state of fixed size."""
        return self._cost(length, 2 * self.head_dim, 4, 8)


def random_features(features: int, d: int, orthogonal: bool = True) -> Tensor:
    """(features, d): normal vectors; with `orthogonal`, directions that are orthogonal within every
    d rows (Choromanski 2021, section 3.3)."""
    normal = torch.randn(features, d)
    if not orthogonal:
        return normal
    blocks = []
    for _ in range(0, features, d):
        q, r = torch.linalg.qr(torch.randn(d, d))
        blocks.append(q * r.diagonal().sign())  # so every rotation is as likely as any other
    return torch.cat(blocks)[:features] * normal.norm(dim=1, keepdim=True)


def _backwards(reset: Tensor) -> Tensor:
    """Where documents begin when the row is read from its end."""
    ends = reset.roll(-1, 1)
    ends[:, -1] = True
    return ends.flip(1)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum of (q_i . k_j) v_j, and of q_i . k_j, over all j of the document; q, k, v: (batch,
    length, heads, width)."""
    v = F.pad(v, (0, 1), value=1.0)
    if reset is None:
        memory = k.transpose(1, 2).mT @ v.transpose(1, 2)
        y = (q.transpose(1, 2) @ memory).transpose(1, 2)
    else:
        past, _ = matrix_recurrence(q, k, v, None, None, None, reset)
        future, _ = matrix_recurrence(q.flip(1), k.flip(1), v.flip(1), None, None, None,
                                      _backwards(reset))
        y = past + future.flip(1) - (q * k).sum(-1, keepdim=True) * v
    return y[..., :-1], y[..., -1].to(torch.promote_types(y.dtype, torch.float32))
