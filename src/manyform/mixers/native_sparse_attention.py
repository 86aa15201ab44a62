"""Native sparse attention: compressed, chosen and near keys, each attended to, and gated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.init import linear, residual_std
from manyform.linear import Linear
from manyform.mixers.attention import _document_starts, _heads
from manyform.mixers.block_attention import carried, finished, kept
from manyform.mixers.sparse_attention import where
from manyform.ops.append import append
from manyform.ops.attention import attention, visible_pairs
from manyform.ops.block_choice import block_choice
from manyform.ops.gated_sum import gated_sum
from manyform.ops.sparse_attention import sparse_attention
from manyform.positions import RotaryTable


class NativeSparseState(NamedTuple):
    """What later queries may look at; keys with their positions turned in, except the raw ones.

    keys, values: (batch, kv_heads, n, head_dim), all tokens, to choose blocks from.
    near_keys, near_values: the last window - 1. raw_keys, raw_values: those that are to be part of
      the next compressed key. compressed_keys, compressed_values: one every `stride` tokens.
    length: (batch,) int64, tokens of the row's current document so far.
    """

    keys: Tensor
    values: Tensor
    near_keys: Tensor
    near_values: Tensor
    raw_keys: Tensor
    raw_values: Tensor
    compressed_keys: Tensor
    compressed_values: Tensor
    length: Tensor


class Compressor(nn.Module):
    """A block of tokens to one key or value: a hidden layer over all their features, to which a
    learned position inside the block is added (Yuan 2025, section 3.3.1)."""

    def __init__(self, size: int, d: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(size, d) * 0.02)
        self.up = Linear(size * d, d)
        self.down = Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size, d) to (..., d)."""
        x = (x + self.position.to(x.dtype)).flatten(-2)
        return self.down(F.gelu(self.up(x)))

    def flops(self) -> int:
        """For one block."""
        return 2 * (self.up.weight.numel() + self.down.weight.numel())


def _blocks(x: Tensor, size: int, stride: int) -> Tensor:
    """Every block of `size` tokens of x (batch, heads, total, d), one every `stride`: slices side
    by side, which is faster back and forth than picking tokens. (batch, heads, n, size, d)."""
    parts, steps = x.shape[2] // stride, size // stride
    x = x[:, :, :parts * stride].unflatten(2, (parts, stride))
    count = max(parts - steps + 1, 0)
    return torch.cat([x[:, :, i:i + count] for i in range(steps)], 3)


@mixer("native_sparse_attention")
class NativeSparseAttention(SequenceMixer):
    """y = sum over c of g_c attention_c(q, k_c, v_c), c = compressed, chosen, near (Yuan 2025,
    "Native Sparse Attention", eq. 5), g = sigmoid of a linear map of the input, for each head.

    Each part has keys and values of its own. Compressed: blocks of `size` tokens, one every
    `stride`, by a small network (eq. 7). Chosen: `number` blocks of `block` tokens, the first and
    the last two always, the others by the attention that the heads of a group pay to the
    compressed keys (eq. 8 to 12). Near: a window of the last `window` tokens.

    n_heads, head_dim: as in attention. kv_heads: groups of heads that choose together; one for 16
      heads if None, as in the paper.
    size, stride, block, number, window: defaults are the paper's. stride must divide size and
      block. Positions are rotary, a compressed key at its block's last token.

    The choice is a decision: where two blocks are worth the same to within rounding, another cut of
    the sequence may decide otherwise (the same holds of every other top-k).

    State: all tokens for the choice, the window, and a compressed key every `stride` tokens. Cost
    T (T / stride + number block + window): quadratic, by a small factor.
    """

    state_growth = "linear"
    cost_growth = "quadratic"

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, kv_heads: int | None = None, size: int = 32,
                 stride: int = 16, block: int = 64, number: int = 16, window: int = 512,
                 rope_base: float = 10000.0) -> None:
        super().__init__(d_model, place=place)
        self.n_heads, self.head_dim = _heads(d_model, n_heads, head_dim)
        self.kv_heads = max(1, self.n_heads // 16) if kv_heads is None else kv_heads
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ManyformError(f"kv_heads must divide n_heads={self.n_heads}; {kv_heads} does not")
        if stride < 1 or size % stride or block % stride or size < stride or block < stride:
            raise ManyformError(f"stride={stride} must divide size={size} and block={block}")
        if number < 3 or window < 1:
            raise ManyformError("number must be at least 3 (the first block and the last two are "
                                f"always chosen) and window at least 1, not {number} and {window}")
        self.size, self.stride, self.block = size, stride, block
        self.number, self.window = number, window
        width, narrow = self.n_heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = linear(d_model, width + 6 * narrow)
        self.gate = linear(d_model, 3 * self.n_heads, bias=True)
        self.out = linear(width, d_model, std=residual_std(place))
        self.compress_key = Compressor(size, self.head_dim)
        self.compress_value = Compressor(size, self.head_dim)
        self.table = RotaryTable(self.head_dim, base=rope_base)

    def forward(self, x: Tensor, state: NativeSparseState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, NativeSparseState]:
        batch, length, _ = x.shape
        heads, groups, d = self.n_heads, self.kv_heads, self.head_dim
        held = self.initial_state(batch, device=x.device) if state is None else state
        parts = self.qkv(x).view(batch, length, -1, d).split(
            [heads + 2 * groups, groups, 3 * groups], dim=2)
        start = _document_starts(state, held.keys.shape[2], length, reset)
        here = where(start, length, held.keys.shape[2] + length, True, x.device)
        own = here.at - here.start
        qk = self.table.turn(parts[0], None if start is None else own).transpose(1, 2)
        q, k, near_k = qk.split([heads, groups, groups], dim=1)
        v, near_v, raw_v = parts[2].transpose(1, 2).split(groups, dim=1)
        new = (k, v, near_k, near_v, parts[1].transpose(1, 2), raw_v)
        k, v, near_k, near_v, raw_k, raw_v = (
            append(old.to(t.dtype), t, 2) for old, t in zip(held[:6], new, strict=True))
        gates = torch.sigmoid(self.gate(x).to(self._wide())).view(batch, length, 3, heads)

        old = held.raw_keys.shape[2]
        begins = _document_starts(state, old, length, reset)
        raw = where(begins, length, old + length, True, x.device)
        done = finished(raw, self.size, self.stride)
        key_blocks, value_blocks = (
            _blocks(t, self.size, self.stride) if begins is None else done.tokens(t)
            for t in (raw_k, raw_v))
        new_k, new_v = self.compress_key(key_blocks), self.compress_value(value_blocks)
        place = raw.at - raw.start  # of the last token of each compressed key in its document
        place = place.expand(batch, -1).gather(1, (done.last - old).clamp(min=0).expand(batch, -1))
        if new_k.shape[2]:
            new_k = self.table.turn(new_k.transpose(1, 2), place).transpose(1, 2)
        few_k, few_v = (torch.cat([a.to(b.dtype), b], 2) for a, b in (
            (held.compressed_keys, new_k), (held.compressed_values, new_v)))
        count = done.before
        first = held.compressed_keys.shape[2] + done.ended - count
        far = sparse_attention(q, few_k, few_v, first[:, None, :, None],
                               (first + count)[:, None, :, None])

        chosen = block_choice(q, few_k, first, count, own, size=self.size, stride=self.stride,
                              block=self.block, number=self.number)
        low = here.start[:, None, :, None] + chosen * self.block
        high = torch.minimum(low + self.block, (here.at + 1)[:, None, :, None])
        best = sparse_attention(q, k, v, low.clamp(min=0), torch.where(chosen < 0, 0, high))
        near = attention(
            q, near_k, near_v, _document_starts(state, held.near_keys.shape[2], length, reset),
            window=self.window)
        y = self.out(gated_sum(gates, far, best, near).view(batch, length, heads * d))

        lengths = (own[:, -1] + 1).expand(batch)
        longest = int(lengths.max()) if reset is not None else k.shape[2]
        reach = min(near_k.shape[2], longest, self.window - 1)
        rest = int((lengths - count[:, -1] * self.stride).max())
        return y, NativeSparseState(
            kept(k, longest), kept(v, longest), kept(near_k, reach), kept(near_v, reach),
            kept(raw_k, rest), kept(raw_v, rest),
            carried(held.compressed_keys, new_k, done, reset),
            carried(held.compressed_values, new_v, done, reset), lengths)

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.qkv.weight.dtype, torch.float32)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> NativeSparseState:
        weight = self.qkv.weight
        device = weight.device if device is None else device
        none = torch.zeros(batch_size, self.kv_heads, 0, self.head_dim, device=device,
                           dtype=weight.dtype)
        return NativeSparseState(*8 * (none,), torch.zeros(batch_size, dtype=torch.int64,
                                                           device=device))

    def cost(self, length: int) -> Cost:
        """Projections, compression, and the pairs of the three parts; compressed pairs count once
        more for the choice."""
        weights = sum(w.weight.numel() for w in (self.qkv, self.gate, self.out))
        step = torch.arange(length)
        count = ((step - self.size + 1).div(self.stride, rounding_mode="floor") + 1).clamp(min=0)
        blocks = (step // self.block).clamp(max=self.number - 1)
        chosen = int((blocks * self.block + step % self.block + 1).sum())
        near = visible_pairs(length, self.window)
        pairs = 4 * (chosen + near) + 6 * int(count.sum())
        compressed = int(count[-1]) if length else 0
        both = self.compress_key.flops() + self.compress_value.flops()
        kept = (length + min(length, self.window - 1) + compressed
                + length - compressed * self.stride)
        row = 2 * self.kv_heads * self.head_dim * self.qkv.weight.element_size()
        return Cost(2 * weights * length + self.kv_heads * compressed * both
                    + self.n_heads * self.head_dim * pairs, row * kept + 8)
