"""Attention without softmax, whose memory is a matrix: linear attention, retention, gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.init import linear, residual_std
from manyform.linear import Linear
from manyform.norms import RMSNorm
from manyform.ops.gated_norm import gated_norm
from manyform.ops.gates import divide_by_last, elu_plus_one
from manyform.ops.log_sigmoid import log_sigmoid
from manyform.ops.matrix_recurrence import matrix_recurrence
from manyform.ops.short_conv import steps_since_reset
from manyform.positions import RotaryTable


class MemoryState(NamedTuple):
    """memory: (batch, n_heads, key features, value features), float32."""

    memory: Tensor


class RetentionState(NamedTuple):
    """position: (batch,) int64, tokens since the document began; memory: as in `MemoryState`."""

    position: Tensor
    memory: Tensor


class _Memory(SequenceMixer):
    """What the three share: heads, each with a matrix of key by value features."""

    def __init__(self, d_model: int, *, place: Place, n_heads: int | None, keys: int, values: int,
                 ) -> None:
        super().__init__(d_model, place=place)
        self.n_heads = _heads(values, n_heads) if n_heads is None else n_heads
        if self.n_heads < 1 or keys % self.n_heads or values % self.n_heads:
            raise ManyformError(f"n_heads must divide the {keys} features of the keys and the "
                                f"{values} of the values, which {self.n_heads} does not")
        self.keys, self.values = keys, values
        self.memory_shape = (self.n_heads, keys // self.n_heads, values // self.n_heads)
        self.out_proj = linear(values, d_model, std=residual_std(place))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.out_proj.weight.dtype, torch.float32)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Any:
        """Zeros, in float32 (float64 for a float64 mixer)."""
        return MemoryState(torch.zeros(batch_size, *self.memory_shape, dtype=self._wide(),
                                       device=device))

    def _cost(self, length: int, decays: bool) -> Cost:
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        heads, key, value = self.memory_shape
        memory = heads * key * value
        return Cost(length * (2 * weights + memory * (5 if decays else 4)),
                    memory * self._wide().itemsize)


@mixer("linear_attention")
class LinearAttention(_Memory):
    """y_t = sum_{j <= t} (f(q_t) . f(k_j)) v_j / sum_{j <= t} f(q_t) . f(k_j), f(x) = elu(x) + 1
    (Katharopoulos 2020, eq. 7, 9 and 12).

    n_heads: heads of about 64 features if None. eps: added to the denominator. The last column of
    the state is the running sum of f(k), from which the denominator comes.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 eps: float = 1e-6) -> None:
        super().__init__(d_model, place=place, n_heads=n_heads, keys=d_model, values=d_model)
        if eps <= 0:
            raise ManyformError(f"eps must be positive, not {eps}")
        self.eps = eps
        heads, key, value = self.memory_shape
        self.memory_shape = (heads, key, value + 1)
        self.in_proj = linear(d_model, 3 * d_model)

    def forward(self, x: Tensor, state: MemoryState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        qk, v = self.in_proj(x).split([2 * self.d_model, self.d_model], dim=-1)
        q, k = elu_plus_one(qk).chunk(2, dim=-1)
        v = F.pad(self._split(v), (0, 1), value=1.0)
        y, memory = matrix_recurrence(self._split(q), self._split(k), v, None, None,
                                      None if state is None else state.memory, reset)
        return self.out_proj(divide_by_last(y, self.eps)), MemoryState(memory)

    def cost(self, length: int) -> Cost:
        """Matrix products and the recurrence; a state of fixed size."""
        return self._cost(length, decays=False)


@mixer("retention")
class Retention(_Memory):
    """S_t = g S_{t-1} + k_t v_t^T, y_t = S_t^T q_t, with queries and keys turned by their positions
    and a fixed decay g a head: 1 - 2^-5, 1 - 2^-6, ... (Sun 2023, "Retentive Network", eq. 5 to 8).

    The result of each head is normalised (root mean square, no learned scale, as in the released
    code) and gated by silu(x W_g). n_heads: heads of about 64 query features if None. expand_v:
    value features for one query feature, 2 in the paper. Xavier initialisation of gain 2^-2.5, of
    gain 1/2 for the projection out, as in the released code.
    """

    decay: Tensor

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 expand_v: float = 2.0) -> None:
        n_heads = _heads(d_model, n_heads, even=True)
        super().__init__(d_model, place=place, n_heads=n_heads, keys=d_model,
                         values=_expanded(d_model, "expand_v", expand_v))
        self.table = RotaryTable(self.memory_shape[1])
        self.in_proj = Linear(d_model, 2 * d_model + 2 * self.values, bias=False)
        _xavier(self.in_proj, [d_model, d_model, self.values, self.values], 2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=0.5)
        gaps = 2.0 ** (-5 - torch.arange(self.n_heads, dtype=torch.float64))
        self.register_buffer("decay", torch.log1p(-gaps).float(), persistent=False)
        self.register_buffer("unit", torch.ones(self.memory_shape[2]), persistent=False)

    def forward(self, x: Tensor, state: RetentionState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, RetentionState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        batch, length, _ = x.shape
        old, memory = (None, None) if state is None else state
        qk, v, gate = self.in_proj(x).split([2 * self.keys, self.values, self.values], dim=-1)
        positions = _positions(old, reset, batch, length, x.device)
        qk = self.table.turn(qk.unflatten(-1, (2 * self.n_heads, -1)), positions)
        q, k = qk.chunk(2, dim=2)
        y, memory = matrix_recurrence(q, k, self._split(v), self.decay, None, memory, reset,
                                      self.memory_shape[1] ** -0.5)
        y = gated_norm(y, gate, self.unit, 1e-6)
        return self.out_proj(y), RetentionState(positions[:, -1] + 1, memory)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> RetentionState:
        """Position 0 and an empty memory."""
        return RetentionState(torch.zeros(batch_size, dtype=torch.int64, device=device),
                              super().initial_state(batch_size, device=device).memory)

    def cost(self, length: int) -> Cost:
        """Matrix products and the recurrence; a state of fixed size."""
        return self._cost(length, decays=True) + Cost(0, 8)


@mixer("gla")
class GatedLinearAttention(_Memory):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(d_k), with a decay that the input
    chooses for each key feature, a = sigmoid(x W_1 W_2 + b)^(1/16) (Yang 2023, "Gated Linear
    Attention Transformers", section 4.4).

    The result of each head is normalised and gated by silu(x W_g). n_heads: heads of about 64 value
    features if None. expand_k, expand_v: features of keys and values for one of the model, 1/2 and
    1 in the paper. gate_rank: columns of W_1. gate_temperature: the 16. Xavier initialisation of
    gain 2^-2.5, as in the released code.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 expand_k: float = 0.5, expand_v: float = 1.0, gate_rank: int = 16,
                 gate_temperature: float = 16.0) -> None:
        super().__init__(d_model, place=place, n_heads=n_heads,
                         keys=_expanded(d_model, "expand_k", expand_k),
                         values=_expanded(d_model, "expand_v", expand_v))
        if gate_rank < 1 or gate_temperature <= 0:
            raise ManyformError("gate_rank must be at least 1 and gate_temperature positive, not "
                                f"{gate_rank} and {gate_temperature}")
        self.gate_rank, self.gate_temperature = gate_rank, gate_temperature
        self.widths = [self.keys, self.keys, self.values, self.values, gate_rank]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.decay_proj = Linear(gate_rank, self.keys)
        self.norm = RMSNorm(self.memory_shape[2], eps=1e-5)
        _xavier(self.in_proj, self.widths, 2**-2.5)
        for layer in (self.decay_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)

    def forward(self, x: Tensor, state: MemoryState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        q, k, v, gate, low = self.in_proj(x).split(self.widths, dim=-1)
        decay = log_sigmoid(self.decay_proj(low), self.gate_temperature)
        y, memory = matrix_recurrence(*map(self._split, (q, k, v, decay)), None,
                                      None if state is None else state.memory, reset,
                                      self.memory_shape[1] ** -0.5)
        y = gated_norm(y, gate, self.norm.weight, self.norm.eps)
        return self.out_proj(y), MemoryState(memory)

    def cost(self, length: int) -> Cost:
        """Matrix products and the recurrence; a state of fixed size."""
        return self._cost(length, decays=True)

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay on the bias of the decay."""
        return {"decay_proj.bias": Hint(weight_decay=False)}


def _heads(width: int, n_heads: int | None, *, even: bool = False) -> int:
    """The fewest heads of at most 64 features each; `even` features if asked."""
    if n_heads is not None:
        return n_heads
    sizes = [s for s in range(1, 65) if width % s == 0 and not (even and s % 2)]
    return width // max(sizes, default=width)


def _expanded(d_model: int, name: str, factor: float) -> int:
    width = round(d_model * factor)
    if width < 1 or abs(width - d_model * factor) > 1e-6:
        raise ManyformError(f"{name} must make d_model={d_model} a whole number of features; "
                            f"{factor} makes it {d_model * factor:g}")
    return width


def _xavier(layer: Linear, widths: list[int], gain: float) -> None:
    """Initialise each of the maps that one linear layer holds side by side."""
    for weight in layer.weight.data.split(widths):
        nn.init.xavier_uniform_(weight, gain=gain)


def _positions(old: Tensor | None, reset: Tensor | None, batch: int, length: int,
               device: torch.device) -> Tensor:
    """Tokens since the document began: (batch, length) int64."""
    steps = torch.arange(length, device=device)
    positions = steps.expand(batch, length) if old is None else old[:, None] + steps
    if reset is None:
        return positions
    since = steps_since_reset(reset)
    return torch.where(since < length, since, positions)
