"""RWKV-6 time mixing: a matrix state whose decays, and whose token shift, the input chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.ops.matrix_recurrence import matrix_recurrence
from manyform.ops.rwkv6 import rwkv6_decay, rwkv6_output, steered_shift
from manyform.ops.token_shift import token_shift
from manyform.precision import compute_dtype


class RWKV6State(NamedTuple):
    """last: (batch, d_model), the features of the last step; memory: (batch, heads, head_dim,
    head_dim), keys by values. Both float32."""

    last: Tensor
    memory: Tensor


@mixer("rwkv6")
class RWKV6(SequenceMixer):
    """Time mixing of RWKV-6 "Finch" (Peng 2024, "Eagle and Finch"; initialisation of the released
    code).

    y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T), S_t = diag(w_t) S_{t-1} + k_t v_t^T, with the decay
    w_t = exp(-exp(d_t)) of every key feature; y is normalised head by head and gated by silu(g).
    The decay, k, v, r and g each read a token shift of their own, whose shares are a learned vector
    plus a low-rank function of the input.

    head_dim: features of a head; the largest divisor of d_model up to 64 if None. mix_rank,
    decay_rank: ranks of the low-rank maps to the shares of the token shift and to d.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), head_dim: int | None = None,
                 mix_rank: int = 32, decay_rank: int = 64) -> None:
        super().__init__(d_model, place=place)
        if head_dim is None:
            head_dim = max(n for n in range(1, min(64, d_model) + 1) if d_model % n == 0)
        if head_dim < 1 or d_model % head_dim:
            raise ManyformError(f"head_dim must divide d_model={d_model}; {head_dim} does not")
        if mix_rank < 1 or decay_rank < 1:
            raise ManyformError(f"mix_rank and decay_rank must be at least 1, not {mix_rank} and "
                                f"{decay_rank}")
        self.head_dim, self.n_heads = head_dim, d_model // head_dim
        channel = torch.arange(d_model)
        depth, rest = place.index / max(place.count - 1, 1), 1 - place.index / place.count
        share, ramp = channel / d_model, channel / max(d_model - 1, 1)
        slow, fast = 1 - share**rest, 1 - share ** (0.5 * rest)
        self.shift_x = nn.Parameter(slow.clone())
        # what the decay, k, v, r and g read
        self.shift = nn.Parameter(torch.stack([slow, slow, slow - 0.3 * depth, fast, fast]))
        self.shift_w1 = nn.Parameter(torch.zeros(d_model, 5 * mix_rank))
        self.shift_w2 = nn.Parameter(torch.empty(5, mix_rank, d_model).uniform_(-0.01, 0.01))
        self.decay = nn.Parameter(-6 + 5 * ramp ** (0.7 + 1.3 * depth))
        self.decay_w1 = nn.Parameter(torch.zeros(d_model, decay_rank))
        self.decay_w2 = nn.Parameter(torch.empty(decay_rank, d_model).uniform_(-0.01, 0.01))
        bonus = depth * (1 - ramp) + 0.1 * ((channel + 1) % 3 - 1)
        self.bonus = nn.Parameter(bonus.view(self.n_heads, head_dim))
        self.receptance, self.key, self.value, self.gate, self.output = (
            Linear(d_model, d_model, bias=False) for _ in range(5))
        for layer, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0),
                            (self.gate, 0.1)):
            nn.init.orthogonal_(layer.weight, gain=gain)
        nn.init.zeros_(self.output.weight)
        self.norm_weight = nn.Parameter(torch.full((d_model,),
                                                   ((1 + place.index) / place.count) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor, state: RWKV6State | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, RWKV6State]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        batch, length, d = x.shape
        heads = (batch, length, self.n_heads, self.head_dim)
        x = x.to(compute_dtype(x))
        both = torch.stack([self.shift_x, torch.ones_like(self.shift_x)])
        (steer, before), last = token_shift(x, both, None if state is None else state.last, reset)
        low = torch.tanh(steer @ self.shift_w1).view(batch * length, 5, -1).transpose(0, 1)
        change = torch.bmm(low, self.shift_w2).view(5, batch, length, d)
        xd, xk, xv, xr, xg = steered_shift(x, before, self.shift, change)
        k, v, r = self.key(xk).view(heads), self.value(xv).view(heads), self.receptance(xr)
        log_decay = rwkv6_decay(torch.tanh(xd @ self.decay_w1) @ self.decay_w2, self.decay)
        y, memory = self._read(r.view(heads), k, v, log_decay.view(heads),
                               None if state is None else state.memory, reset)
        y = rwkv6_output(y, r.view(heads), k, v, self.gate(xg), self.norm_weight, self.norm_bias,
                         self.bonus)
        return self.output(y), RWKV6State(last, memory)

    def _read(self, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor | None,
              reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """r_t^T S_{t-1} for all t, and the last S. What step t reads is read after step t - 1,
        where the recurrence stands at S_{t-1}; the first step reads the state that came in."""
        mine = r if reset is None else r.masked_fill(reset[..., None, None], 0.0)
        if memory is None:
            first = torch.zeros_like(v[:, :1])
        else:
            first = (mine[:, :1].to(memory.dtype).transpose(1, 2) @ memory).transpose(1, 2)
        later = torch.cat([mine[:, 1:], torch.zeros_like(r[:, :1])], dim=1)
        y, memory = matrix_recurrence(later, k, v, log_decay, None, memory, reset)
        return torch.cat([first.to(y.dtype), y[:, :-1]], dim=1), memory

    def initial_state(self, batch_size: int, *, device: Any = None) -> RWKV6State:
        """No step before, and an empty memory."""
        wide = torch.promote_types(self.decay.dtype, torch.float32)
        last = torch.zeros(batch_size, self.d_model, dtype=wide, device=device)
        return RWKV6State(last, last.new_zeros(batch_size, self.n_heads, self.head_dim,
                                               self.head_dim))

    def cost(self, length: int) -> Cost:
        """Matrix products and the recurrence; a state of fixed size."""
        weights = 5 * self.d_model**2 + sum(p.numel() for p in (
            self.shift_w1, self.shift_w2, self.decay_w1, self.decay_w2))
        memory = self.d_model * self.head_dim
        element = torch.promote_types(self.decay.dtype, torch.float32).itemsize
        return Cost((2 * weights + 5 * memory) * length, element * (self.d_model + memory))

    def hints(self) -> Mapping[str, Hint]:
        """Only the five projections decay; the decays learn at twice the rate (released code)."""
        plain = {name: Hint(weight_decay=False) for name, p in self.named_parameters()
                 if p.ndim > 1 and not name.endswith(".weight")}
        return {**plain, "decay": Hint(weight_decay=False, lr_scale=2.0)}
