"""Transformer-XL: attention with a memory of bounded length and relative positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Hint, Place, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.mixers.attention import Attention
from manyform.ops.attention import visible_pairs
from manyform.ops.relative_attention import relative_attention
from manyform.positions import sinusoidal


@mixer("transformer_xl")
class TransformerXL(Attention):
    """Attention over a memory (Dai 2019, arXiv:1901.02860, section 3): the score of a key i - j
    tokens back is ((q_i + u) . k_j + (q_i + v) . W s_{i-j}) / sqrt(d), with the sinusoid s of the
    distance and biases u, v for every head, which the paper's layers share and here each has.

    memory: tokens before a query that it sees. The paper cuts a text in segments and lets a query
      see its own segment up to itself and `memory` tokens before that; here every query sees
      exactly `memory` tokens, wherever the text is cut (what the released code calls same_length,
      and evaluates with). Segments are then how a text is fed: chunks with the state between them.
    n_heads, head_dim: as in attention.

    The state holds the memory as keys and values rather than as the hidden states from which the
    paper computes both again at every segment: the same numbers. Gradients flow through it; the
    paper stops them between segments, as training with `tbptt` does.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, memory: int = 256) -> None:
        if memory < 1:
            raise ManyformError(f"memory of transformer_xl must be at least 1 token, not {memory}")
        super().__init__(d_model, place=place, n_heads=n_heads, head_dim=head_dim,
                         window=memory + 1, position="none")
        self.memory = memory
        # Every weight of the released code starts normal with deviation 0.02, biases too.
        self.distance = Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(self.n_heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.empty(self.n_heads, self.head_dim))
        for p in (self.distance.weight, self.content_bias, self.position_bias):
            nn.init.normal_(p, std=0.02)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, prefix: int) -> Tensor:
        distances = torch.arange(min(k.shape[2], self.memory + 1), device=q.device)
        table = sinusoidal(distances, self.d_model, torch.float64).to(q.dtype)
        return relative_attention(q, k, v, table, self.distance.weight, self.content_bias,
                                  self.position_bias, start, window=self.memory + 1)

    def hints(self) -> Mapping[str, Hint]:
        plain = Hint(weight_decay=False)
        return {"content_bias": plain, "position_bias": plain}

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        scaled, others = super().deepnorm_weights()
        return scaled, [*others, self.distance.weight]

    def cost(self, length: int) -> Cost:
        """Attention's, and the scores of distances: one more product of a pair, and a projection of
        every distance that occurs."""
        base = super().cost(length)
        extra = (2 * self.head_dim * self.n_heads * visible_pairs(length, self.window)
                 + 2 * self.distance.weight.numel() * min(length, self.memory + 1))
        return Cost(base.flops + extra, base.state_bytes)
