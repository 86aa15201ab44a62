"""RWKV-7 time mixing: a decay for every channel and a delta rule with a rate for every channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.ops.matrix_recurrence import matrix_recurrence
from manyform.ops.rwkv_keys import rwkv_keys
from manyform.ops.rwkv_output import rwkv_output
from manyform.ops.token_shift import token_shift
from manyform.ops.value_mix import value_mix
from manyform.precision import compute_dtype


class RWKV7State(NamedTuple):
    """last: (batch, d_model), the features of the last step; memory: (batch, heads, head_dim,
    head_dim), keys by values. Both float32."""

    last: Tensor
    memory: Tensor


@mixer("rwkv7")
class RWKV7(SequenceMixer):
    """Time mixing of RWKV-7 "Goose" (Peng 2025, section 4; initialisation of the released code).

    S_t = diag(w_t) S_{t-1} - (a_t * kappa_t) (kappa_t^T S_{t-1}) + k_t v_t^T, read by r_t, with
    w = exp(-exp(-1/2) sigmoid(d_t)), the removal key kappa of unit length, and the in-context
    learning rate a in (0, 1). r, k, v and the low-rank d, a, g each read a token shift of their
    own. From the second layer of a stack on, v is drawn towards the first layer's by a learned
    rate; a layer that is told of no earlier one takes its own v for the first.

    head_dim: features of a head; the largest divisor of d_model up to 64 if None.
    decay_rank, rate_rank, value_rank, gate_rank: ranks of the low-rank maps; the multiples of 32
    next to 2.5, 2.5, 1.7 and 5 times sqrt(d_model) if None.
    """

    shares = True

    def __init__(self, d_model: int, *, place: Place = Place(), head_dim: int | None = None,
                 decay_rank: int | None = None, rate_rank: int | None = None,
                 value_rank: int | None = None, gate_rank: int | None = None) -> None:
        super().__init__(d_model, place=place)
        if head_dim is None:
            head_dim = max(n for n in range(1, min(64, d_model) + 1) if d_model % n == 0)
        if head_dim < 1 or d_model % head_dim:
            raise ManyformError(f"head_dim must divide d_model={d_model}; {head_dim} does not")
        self.head_dim, self.n_heads = head_dim, d_model // head_dim
        channel = torch.arange(d_model)
        ramp = channel / max(d_model - 1, 1) - 0.5
        in_head = 2 * (channel % head_dim) / max(head_dim - 1, 1) - 1
        zigzag = in_head * in_head.abs()
        depth = place.index / max(place.count - 1, 1)
        rest = 1 - place.index / place.count
        # token shift of r, d, k, v, a, g
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * rest
        self.shift = nn.Parameter(1 - (channel / d_model) ** powers)
        speed = -6 + 6 * (ramp + 0.5) ** (1 + depth**0.3)
        self.w0 = nn.Parameter(speed + 0.5 + 2.5 * zigzag)
        self.a0 = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * ramp)
        self.w1, self.w2 = _low_rank(d_model, decay_rank, 2.5, "decay_rank")
        self.a1, self.a2 = _low_rank(d_model, rate_rank, 2.5, "rate_rank")
        self.g1, self.g2 = _low_rank(d_model, gate_rank, 5.0, "gate_rank")
        if place.index:
            self.v0 = nn.Parameter(0.73 - 0.4 * ramp)
            self.v1, self.v2 = _low_rank(d_model, value_rank, 1.7, "value_rank")
        self.k_k = nn.Parameter(0.71 - 0.1 * ramp)
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.n_heads, head_dim), -0.04))
        self.receptance, self.key, self.value, self.output = (
            Linear(d_model, d_model, bias=False) for _ in range(4))
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)
        self.norm_weight = nn.Parameter(torch.full((d_model,),
                                                   ((1 + place.index) / place.count) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor, state: RWKV7State | None = None, *, reset: Tensor | None = None,
                shared: dict[str, Any] | None = None) -> tuple[Tensor, RWKV7State]:
        batch, length, d = x.shape
        heads = (batch, length, self.n_heads, self.head_dim)
        x = x.to(compute_dtype(x))
        (xr, xd, xk, xv, xa, xg), last = token_shift(
            x, self.shift, None if state is None else state.last, reset)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        decay = torch.tanh(xd @ self.w1) @ self.w2
        log_decay, removal, replacement, k = rwkv_keys(
            k, decay, xa @ self.a1 @ self.a2, self.w0, self.a0, self.k_k, self.k_a, self.n_heads)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        shared = {} if shared is None else shared
        if self.place.index:
            first = shared.get("rwkv7_first_value", v)
            v = value_mix(v, first, xv @ self.v1 @ self.v2, self.v0)
        shared.setdefault("rwkv7_first_value", v)
        r, v = r.view(heads), v.view(heads)
        y, memory = matrix_recurrence(r, k, v, log_decay, (removal, replacement),
                                      None if state is None else state.memory, reset)
        y = rwkv_output(y, r, k, v, gate, self.norm_weight, self.norm_bias, self.r_k)
        return self.output(y), RWKV7State(last, memory)

    def initial_state(self, batch_size: int, *, device: Any = None) -> RWKV7State:
        wide = torch.float64 if self.w0.dtype == torch.float64 else torch.float32
        last = torch.zeros(batch_size, self.d_model, dtype=wide, device=device)
        return RWKV7State(last, last.new_zeros(batch_size, self.n_heads, self.head_dim,
                                               self.head_dim))

    def cost(self, length: int) -> Cost:
        weights = 4 * self.d_model**2 + sum(
            p.numel() for name, p in self.named_parameters() if name[1:] in ("1", "2"))
        memory = self.d_model * self.head_dim
        element = 8 if self.w0.dtype == torch.float64 else 4
        return Cost((2 * weights + 9 * memory) * length, element * (self.d_model + memory))

    def hints(self) -> Mapping[str, Hint]:
        """Only the four projections decay; w0 learns at twice the rate (released code)."""
        plain = {name: Hint(weight_decay=False) for name, p in self.named_parameters()
                 if p.ndim > 1 and not name.endswith(".weight")}
        return {**plain, "w0": Hint(weight_decay=False, lr_scale=2.0)}


def _low_rank(d: int, rank: int | None, factor: float, name: str,
              ) -> tuple[nn.Parameter, nn.Parameter]:
    """Zeros (d, rank) and a tenth of an orthogonal matrix (rank, d)."""
    if rank is None:
        rank = max(32, round(factor * math.sqrt(d) / 32) * 32)
    if rank < 1:
        raise ManyformError(f"{name} must be at least 1, not {rank}")
    out = torch.empty(rank, d)
    nn.init.orthogonal_(out, gain=0.1 * math.sqrt(max(1.0, rank / d)))
    return nn.Parameter(torch.zeros(d, rank)), nn.Parameter(out)
