"""xLSTM: long short-term memory with exponential gates; the mLSTM's memory is a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.init import linear
from manyform.linear import Linear
from manyform.ops.full_precision import full_precision
from manyform.ops.head_linear import head_linear
from manyform.ops.head_norm import head_norm
from manyform.ops.layer_norm import layer_norm
from manyform.ops.mlstm import Memory, mlstm
from manyform.ops.short_conv import short_conv
from manyform.ops.slstm import Cell, slstm
from manyform.precision import compute_dtype

EPS = 1e-6
"""What the released code adds to the mLSTM's denominator."""


class _Heads(SequenceMixer):
    """What the three share: heads, and the scale of a layer norm of each."""

    def __init__(self, d_model: int, width: int, n_heads: int | None, place: Place) -> None:
        super().__init__(d_model, place=place)
        if n_heads is None:
            n_heads = max(n for n in range(1, 5) if width % n == 0)
        if n_heads < 1 or width % n_heads:
            raise ManyformError(f"n_heads must divide the {width} features of {self.name}'s heads; "
                                f"{n_heads} does not")
        self.n_heads, self.head_dim = n_heads, width // n_heads
        self.norm_weight = nn.Parameter(torch.ones(width))

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.norm_weight.dtype, torch.float32)

    def _memory(self, batch_size: int, key: int, device: Any) -> Memory:
        matrix = torch.zeros(batch_size, self.n_heads, key, self.head_dim + 1, dtype=self._wide(),
                             device=device)
        return Memory(matrix, matrix.new_zeros(batch_size, self.n_heads))


@mixer("mlstm")
class MLSTM(_Heads):
    """The mLSTM as xLSTM-7B has it (Beck 2025, "xLSTM 7B", section 3; the cell Beck 2024, eq. 19
    to 27): q, k, v, an output gate o and one input and forget gate a head from x,

        y = W_o (sigmoid(o) * norm(mlstm(q, k, v, exp(i), sigmoid(f))))

    with the two gates' inputs capped, i = cap tanh(i / cap), so that nothing overflows early.
    The norm is a layer norm of each head.

    n_heads: 4 where that divides, if None (8 in the 7B model). qk_expand, v_expand: features of
    queries and keys, and of values, for one of the model. gate_cap: the cap; None is none.
    norm_eps: of the norm. Initialisation as in the released code: gates from their biases alone,
    -10 for i, 3 to 6 over the heads for f.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 qk_expand: float = 0.5, v_expand: float = 1.0, gate_cap: float | None = 15.0,
                 norm_eps: float = 1e-6) -> None:
        keys, values = (_width(d_model, name, factor) for name, factor in
                        (("qk_expand", qk_expand), ("v_expand", v_expand)))
        if n_heads is None:
            n_heads = max(n for n in range(1, 5) if keys % n == 0 and values % n == 0)
        super().__init__(d_model, values, n_heads, place)
        if keys % n_heads:
            raise ManyformError(f"n_heads must divide the {keys} features of mlstm's keys; "
                                f"{n_heads} does not")
        if gate_cap is not None and gate_cap <= 0:
            raise ManyformError(f"gate_cap must be positive, or None for no cap, not {gate_cap}")
        self.gate_cap, self.norm_eps, self.keys = gate_cap, norm_eps, keys
        self.widths = [keys, keys, values, values]
        self.in_proj = linear(d_model, sum(self.widths), std=_small(d_model))
        self.gates = Linear(d_model, 2 * n_heads)
        _set_gates(self.gates, -10.0)
        self.out_proj = linear(values, d_model, std=_wang(place, d_model))

    def forward(self, x: Tensor, state: Memory | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, Memory]:
        q, k, v, o = self.in_proj(x).split(self.widths, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        gates = full_precision(x, self.gates.weight, self.gates.bias)
        if self.gate_cap is not None:
            gates = self.gate_cap * torch.tanh(gates / self.gate_cap)
        i, f = gates.chunk(2, dim=-1)
        h, memory = mlstm(q, k, v, i, F.logsigmoid(f), state, reset, EPS)
        return self.out_proj(head_norm(h, self.norm_weight, o, self.norm_eps)), memory

    def initial_state(self, batch_size: int, *, device: Any = None) -> Memory:
        return self._memory(batch_size, self.keys // self.n_heads, device)

    def cost(self, length: int) -> Cost:
        """Matrix products and the recurrence of memory and normaliser; a state of fixed size."""
        weights = sum(layer.weight.numel() for layer in (self.in_proj, self.gates, self.out_proj))
        memory = self.keys * (self.head_dim + 1)
        return Cost(length * (2 * weights + 5 * memory),
                    self._wide().itemsize * (memory + self.n_heads))

    def hints(self) -> Mapping[str, Hint]:
        return {"gates.bias": Hint(weight_decay=False)}


class MLSTMUpState(NamedTuple):
    """conv: (batch, conv_size - 1, inner), the last inputs of the short convolution; memory: see
    `manyform.ops.mlstm.Memory`."""

    conv: Tensor
    memory: Memory


@mixer("mlstm_up")
class MLSTMUp(_Heads):
    """The mLSTM in the pre up-projection block of the first xLSTM (Beck 2024, figure 11), which
    needs no channel mixer after it.

    u, z = W_up x; c = silu(short_conv(u)); q and k from c, v from u, by matrices of
    `block_size` features; gates from q, k and v together;
    y = W_down ((norm(mlstm(q, k, v)) + skip c) * silu(z)).

    n_heads, block_size: 4 where that divides, if None. expand: features of u for one of the
    model. conv_size: taps of the convolution. Initialisation as in the released code.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 expand: float = 2.0, conv_size: int = 4, block_size: int | None = None) -> None:
        inner = _width(d_model, "expand", expand)
        if block_size is None:
            block_size = max(n for n in range(1, 5) if inner % n == 0)
        super().__init__(d_model, inner, n_heads, place)
        if conv_size < 1:
            raise ManyformError(f"conv_size must be at least 1, not {conv_size}")
        if block_size < 1 or inner % block_size:
            raise ManyformError(f"block_size must divide the {inner} inner features; {block_size} "
                                "does not")
        self.inner, self.conv_size = inner, conv_size
        self.up = linear(d_model, 2 * inner, std=_small(d_model))
        self.conv_weight = nn.Parameter(torch.empty(inner, conv_size))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        for tensor in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(tensor, -conv_size**-0.5, conv_size**-0.5)
        blocks = (inner // block_size, block_size, block_size)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(blocks) * _small(d_model))
                                  for _ in range(3))
        self.gates = Linear(3 * inner, 2 * self.n_heads)
        _set_gates(self.gates, None)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = linear(inner, d_model, std=_wang(place, d_model))

    def forward(self, x: Tensor, state: MLSTMUpState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, MLSTMUpState]:
        old_conv, old = (None, None) if state is None else state
        u, z = self.up(x).chunk(2, dim=-1)
        c, conv = short_conv(u, self.conv_weight, self.conv_bias, old_conv, reset, "silu")
        q, k, v = head_linear(c, self.q), head_linear(c, self.k), head_linear(u, self.v)
        gates = full_precision(torch.cat([q, k, v], dim=-1), self.gates.weight, self.gates.bias)
        i, f = gates.chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        h, memory = mlstm(q, k, v, i, F.logsigmoid(f), old, reset, EPS)
        h = head_norm(h, self.norm_weight, z, 1e-5, self.skip, c)
        return self.down(h), MLSTMUpState(conv, memory)

    def initial_state(self, batch_size: int, *, device: Any = None) -> MLSTMUpState:
        memory = self._memory(batch_size, self.head_dim, device)
        return MLSTMUpState(memory.m.new_zeros(batch_size, self.conv_size - 1, self.inner), memory)

    def cost(self, length: int) -> Cost:
        """Matrix products, the convolution and the recurrence; a state of fixed size."""
        weights = sum(p.numel() for name, p in self.named_parameters()
                      if p.ndim > 1 and name != "conv_weight")
        memory = self.inner * (self.head_dim + 1)
        step = 2 * weights + 2 * self.conv_weight.numel() + 5 * memory
        kept = memory + self.n_heads + self.inner * (self.conv_size - 1)
        return Cost(length * step, self._wide().itemsize * kept)

    def hints(self) -> Mapping[str, Hint]:
        return {"gates.bias": Hint(weight_decay=False)}


class SLSTMState(NamedTuple):
    """conv: (batch, conv_size - 1, d_model), the last inputs of the short convolution; cell: see
    `manyform.ops.slstm.Cell`."""

    conv: Tensor
    cell: Cell


@mixer("slstm")
class SLSTM(_Heads):
    """The sLSTM (Beck 2024, eq. 8 to 18, figure 10): scalar memories with exponential gates, whose
    heads see their own last output, so that it tracks what no parallel form can.

    c = silu(short_conv(x)); input and forget gates from c, cell input and output gate from x, by
    one matrix a head and gate; y = norm(slstm(...)), a layer norm of each head, with no
    projection out: the block's channel mixer follows.

    n_heads: 4 where that divides, if None. conv_size: taps of the convolution. The recurrent
    weights start at zero, the forget gates' biases fall from 5 to -7 within a head, as a power
    that rises with the depth (released code).
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 conv_size: int = 4) -> None:
        super().__init__(d_model, d_model, n_heads, place)
        if conv_size < 1:
            raise ManyformError(f"conv_size must be at least 1, not {conv_size}")
        self.conv_size = conv_size
        heads, size = self.n_heads, self.head_dim
        self.conv_weight = nn.Parameter(torch.empty(d_model, conv_size))
        self.conv_bias = nn.Parameter(torch.empty(d_model))
        for tensor in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(tensor, -conv_size**-0.5, conv_size**-0.5)
        self.from_conv = nn.Parameter(torch.randn(heads, 2 * size, size) * _small(d_model))
        self.from_x = nn.Parameter(torch.randn(heads, 2 * size, size) * _small(d_model))
        self.recurrent = nn.Parameter(torch.zeros(heads, 4 * size, size))
        self.bias = nn.Parameter(torch.zeros(heads, 4 * size))
        depth = place.index / max(place.count - 1, 1)
        ramp = torch.arange(size) / max(size - 1, 1)
        with torch.no_grad():
            self.bias[:, size:2 * size] = 5 - 12 * ramp ** (0.3 + 1.3 * depth)

    def forward(self, x: Tensor, state: SLSTMState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, SLSTMState]:
        old_conv, old = (None, None) if state is None else state
        x = x.to(compute_dtype(x))
        c, conv = short_conv(x, self.conv_weight, self.conv_bias, old_conv, reset, "silu")
        gates = torch.cat([head_linear(c, self.from_conv).unflatten(-1, (self.n_heads, -1)),
                           head_linear(x, self.from_x).unflatten(-1, (self.n_heads, -1))], dim=-1)
        h, cell = slstm(gates, self.recurrent, self.bias, old, reset)
        y = layer_norm(h, torch.ones_like(self.norm_weight[:self.head_dim]), None, 1e-5)
        return y.flatten(2) * self.norm_weight.to(y.dtype), SLSTMState(conv, cell)

    def initial_state(self, batch_size: int, *, device: Any = None) -> SLSTMState:
        zeros = torch.zeros(batch_size, self.n_heads, self.head_dim, dtype=self._wide(),
                            device=device)
        conv = zeros.new_zeros(batch_size, self.conv_size - 1, self.d_model)
        return SLSTMState(conv, Cell(zeros, zeros, zeros, zeros))

    def cost(self, length: int) -> Cost:
        """Matrix products and the convolution; a state of fixed size."""
        weights = self.from_conv.numel() + self.from_x.numel() + self.recurrent.numel()
        kept = self.d_model * (self.conv_size - 1 + 4)
        return Cost(2 * length * (weights + self.conv_weight.numel()),
                    self._wide().itemsize * kept)

    def hints(self) -> Mapping[str, Hint]:
        return {"bias": Hint(weight_decay=False)}


def _width(d_model: int, name: str, factor: float) -> int:
    width = round(d_model * factor)
    if width < 1:
        raise ManyformError(f"{name}={factor} leaves no feature of d_model={d_model}")
    return width


def _small(d_model: int) -> float:
    """sqrt(2 / (5 d)) (Nguyen & Salazar 2019), as the released code has it."""
    return math.sqrt(2 / (5 * d_model))


def _wang(place: Place, d_model: int) -> float:
    """2 / (layers sqrt(d)), for projections back into the residual stream (released code)."""
    return 2 / place.count / math.sqrt(d_model)


def _set_gates(layer: Linear, i: float | None) -> None:
    """Gates that start from their biases alone: i (small noise if None), and f from 3 to 6."""
    heads = layer.out_features // 2
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias[:heads] = 0.1 * torch.randn(heads) if i is None else i
        layer.bias[heads:] = torch.linspace(3.0, 6.0, heads)
