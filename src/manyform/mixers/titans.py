"""The neural long-term memory of Titans: a network that is trained on what it reads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.init import linear, residual_std
from manyform.norms import RMSNorm
from manyform.ops.full_precision import full_precision
from manyform.ops.gated_norm import gated_norm
from manyform.ops.rms_norm import rms_norm
from manyform.ops.short_conv import short_conv
from manyform.ops.titans import NeuralMemory, titans


class TitansState(NamedTuple):
    """conv: (batch, conv_size - 1, 3 n_heads head_dim), the last inputs of the short convolution;
    memory: see `manyform.ops.titans.NeuralMemory`."""

    conv: Tensor
    memory: NeuralMemory


@mixer("titans")
class NeuralLongTermMemory(SequenceMixer):
    """The long-term memory of Titans (Behrouz 2025, "Titans: Learning to Memorize at Test Time",
    section 3.1): a network M that learns at every token to give the value of its key,

        S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2,  M_t = (1 - alpha_t) M_{t-1} + S_t

    and is read by y_t = M_t(q_t), with gradients at the memory before each chunk of tokens
    (section 3.2). q, k, v come from a linear map, a short convolution and SiLU, q and k of unit
    length; theta = lr sigmoid(.), eta and alpha = sigmoid(.) from x, a head. Each head's result
    is normalised and gated (section 4.4). In front of attention with a window this is Titans
    "memory as a layer".

    depth: layers of M, SiLU between; expand: features between them for one of a head.
    chunk: tokens of a chunk. n_heads, head_dim: together d_model if None, in heads of at most 64.
    conv_size: taps of the convolution. lr: the largest theta. The paper publishes no code and
    leaves lr, chunk, expand and initial values open; here M starts from learned weights, and
    alpha near exp(-3) to exp(-6) over the heads.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), depth: int = 2,
                 expand: float = 2.0, chunk: int = 16, n_heads: int | None = None,
                 head_dim: int | None = None, conv_size: int = 4, lr: float = 0.01) -> None:
        super().__init__(d_model, place=place)
        if head_dim is None and n_heads is None:
            head_dim = max(n for n in range(1, 65) if d_model % n == 0)
        if n_heads is None:
            n_heads = max(1, d_model // max(head_dim or 1, 1))
        if head_dim is None:
            head_dim = max(1, d_model // max(n_heads, 1))
        hidden = round(expand * head_dim)
        for name, value in (("depth", depth), ("chunk", chunk), ("n_heads", n_heads),
                            ("head_dim", head_dim), ("conv_size", conv_size),
                            ("expand * head_dim", hidden)):
            if value < 1:
                raise ManyformError(f"{name} of titans must be at least 1, not {value}")
        if lr <= 0:
            raise ManyformError(f"lr of titans must be positive, not {lr}")
        self.n_heads, self.head_dim, self.chunk = n_heads, head_dim, chunk
        self.conv_size, self.lr = conv_size, lr
        width = n_heads * head_dim
        self.in_proj = linear(d_model, 4 * width)
        self.gates = linear(d_model, 3 * n_heads, bias=True)
        with torch.no_grad():
            self.gates.bias[n_heads:2 * n_heads] = torch.linspace(-3.0, -6.0, n_heads)
        self.conv = nn.Parameter(torch.empty(3 * width, conv_size))
        nn.init.uniform_(self.conv, -conv_size**-0.5, conv_size**-0.5)
        sizes = [head_dim, *[hidden] * (depth - 1), head_dim]
        self.initial = nn.ParameterList(torch.randn(n_heads, a, b) * a**-0.5
                                        for a, b in itertools.pairwise(sizes))
        self.norm = RMSNorm(head_dim, eps=1e-5)
        self.out_proj = linear(width, d_model, std=residual_std(place))

    def forward(self, x: Tensor, state: TitansState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, TitansState]:
        old_conv, old = (None, None) if state is None else state
        width = self.n_heads * self.head_dim
        qkv, gate = self.in_proj(x).split([3 * width, width], dim=-1)
        qkv, conv = short_conv(qkv, self.conv, state=old_conv, reset=reset, activation="silu")
        qk, v = qkv.unflatten(-1, (3 * self.n_heads, -1)).split(
            [2 * self.n_heads, self.n_heads], dim=2)
        unit = self.conv.new_full((self.head_dim,), self.head_dim**-0.5)
        q, k = rms_norm(qk, unit, 1e-12 / self.head_dim).chunk(2, dim=2)
        gates = full_precision(x, self.gates.weight, self.gates.bias)
        step, forget, carry = gates.chunk(3, dim=-1)
        y, memory = titans(q, k, v, self.lr * torch.sigmoid(step), F.logsigmoid(-forget),
                           F.logsigmoid(carry), tuple(self.initial), self.chunk, old, reset)
        y = gated_norm(y, gate, self.norm.weight, self.norm.eps)
        return self.out_proj(y), TitansState(conv, memory)

    def initial_state(self, batch_size: int, *, device: Any = None) -> TitansState:
        """The learned initial memory, without momentum."""
        memory = tuple(w.to(device=device, dtype=self._wide()).expand(batch_size, -1, -1, -1)
                       for w in self.initial)
        zeros = tuple(torch.zeros_like(w) for w in memory)
        conv = memory[0].new_zeros(batch_size, self.conv_size - 1, len(self.conv))
        position = torch.zeros(batch_size, dtype=torch.int64, device=conv.device)
        return TitansState(conv, NeuralMemory(memory, zeros, memory, position))

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.conv.dtype, torch.float32)

    def cost(self, length: int) -> Cost:
        """Matrix products, the convolution, and for the memory its run on the key, the gradients,
        their outer products, the two recurrences and its run on the query; three sets of the
        memory's weights as a state."""
        weights = sum(layer.weight.numel() for layer in (self.in_proj, self.gates, self.out_proj))
        sizes = [w.numel() for w in self.initial]
        kept = 3 * sum(sizes) + len(self.conv) * (self.conv_size - 1)
        step = 2 * weights + 2 * self.conv.numel() + 8 * sum(sizes) + 2 * sum(sizes[1:])
        return Cost(length * step, self._wide().itemsize * kept + 8)

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay on what the memory starts from."""
        return {name: Hint(weight_decay=False) for name, _ in self.named_parameters()
                if name.startswith("initial")}
