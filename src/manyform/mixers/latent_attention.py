"""Multi-head latent attention: keys and values of all heads from one small latent a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyform.contract import Cost, Place, SequenceMixer, mixer
from manyform.errors import ManyformError, unknown
from manyform.init import linear, residual_std
from manyform.linear import Linear
from manyform.mixers.attention import _document_starts
from manyform.norms import RMSNorm
from manyform.ops.append import append
from manyform.ops.attention import attention, visible_pairs
from manyform.positions import RotaryTable

POSITIONS = ("rotary", "none")


class LatentState(NamedTuple):
    """What later queries may look at.

    latent: (batch, n, kv_rank + rope_dim), for each of the last n tokens its latent, normalised,
      and behind it the key that all heads share, turned by its position.
    length: (batch,) int64, tokens of the row's current document so far: the last `length` of n.
    """

    latent: Tensor
    length: Tensor


@mixer("mla")
class LatentAttention(SequenceMixer):
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1, eq. 9 to 19).

    c = norm(W_DKV x), k_R = rotary(W_KR x), and a head's key and value are [W_UK c; k_R] and
    W_UV c; its query [q_C; rotary(q_R)] comes from norm(W_DQ x), or from x itself without q_rank.
    Only c and k_R are kept. Two forms, equal in exact arithmetic, of which the one with fewer
    operations runs:
      expanded  keys and values of all tokens are computed from their latents: for many queries
      absorbed  W_UK goes into the query and W_UV behind the sum, q_C^T W_UK c = (W_UK^T q_C)^T c,
                so that one latent serves all heads as key and value: for few queries, many latents

    n_heads, head_dim: heads, and features of a head's value and of the part of its key without
      position; d_model together if None, in heads of at most 64 (n_heads d_model // head_dim).
    key_dim: features of the key without position; head_dim if None.
    rope_dim: features of the shared key that carries the position; half of head_dim if None.
    kv_rank, q_rank: features of the latents; kv_rank is 4 head_dim as in the paper, but at most
      half of d_model, if None. Queries have no latent if q_rank is None, as in DeepSeek-V2-Lite.
    position: "rotary" (Su 2021), or "none": nothing is turned (Kimi Linear).
    rope_base, rope_scaling: see `manyform.positions.rotary_frequencies`. The temperature of YaRN
      multiplies the whole score, not only the part with position.
    scale: factor on scores besides; 1 / sqrt(key_dim + rope_dim) if None.
    norm_eps: epsilon of the two norms. bias: on the projections of x to the latents and out.

    The layout of weights is that of transformers' DeepseekV2Attention, except that the pairs that
    turn together are the features i and i + rope_dim / 2, where DeepSeek's are 2i and 2i + 1.
    """

    state_growth = "linear"
    cost_growth = "quadratic"

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, key_dim: int | None = None,
                 rope_dim: int | None = None, kv_rank: int | None = None,
                 q_rank: int | None = None, position: str = "rotary", rope_base: float = 10000.0,
                 rope_scaling: Mapping[str, Any] | None = None, scale: float | None = None,
                 norm_eps: float = 1e-6, bias: bool = False) -> None:
        super().__init__(d_model, place=place)
        if position not in POSITIONS:
            raise unknown("position of mla", position, POSITIONS)
        if position != "rotary" and rope_scaling is not None:
            raise ManyformError(f"rope_scaling needs position='rotary', not {position!r}")
        if n_heads is None and head_dim is None:
            head_dim = max(n for n in range(1, 65) if d_model % n == 0)
        if n_heads is None:
            n_heads = max(1, d_model // (head_dim or 1))
        if head_dim is None:
            head_dim = max(1, d_model // max(n_heads, 1))
        key_dim = head_dim if key_dim is None else key_dim
        rope_dim = max(2, head_dim // 4 * 2) if rope_dim is None else rope_dim
        kv_rank = max(1, min(4 * head_dim, d_model // 2)) if kv_rank is None else kv_rank
        sizes = {"n_heads": n_heads, "head_dim": head_dim, "key_dim": key_dim,
                 "rope_dim": rope_dim, "kv_rank": kv_rank, "q_rank": q_rank}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ManyformError(f"{name} of mla must be at least 1, not {value}")
        if key_dim + rope_dim < head_dim:
            raise ManyformError(f"a key of mla has {key_dim} + {rope_dim} features, key_dim + "
                                f"rope_dim, which must be at least head_dim={head_dim}")
        self.n_heads, self.head_dim, self.key_dim, self.rope_dim = (n_heads, head_dim, key_dim,
                                                                    rope_dim)
        self.kv_rank, self.q_rank = kv_rank, q_rank
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.scale = (key_dim + rope_dim) ** -0.5 if scale is None else scale
        self.q_down = None if q_rank is None else linear(d_model, q_rank, bias=bias)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank, eps=norm_eps)
        self.q_up = linear(q_rank or d_model, n_heads * (key_dim + rope_dim))
        self.kv_down = linear(d_model, kv_rank + rope_dim, bias=bias)
        self.kv_norm = RMSNorm(kv_rank, eps=norm_eps)
        self.kv_up = linear(kv_rank, n_heads * (key_dim + head_dim))
        self.out = linear(n_heads * head_dim, d_model, bias=bias, std=residual_std(place))
        self.table: RotaryTable | None = None
        if position == "rotary":
            self.table = RotaryTable(rope_dim, base=rope_base, scaling=rope_scaling)

    def forward(self, x: Tensor, state: LatentState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, LatentState]:
        batch, length, _ = x.shape
        old = 0 if state is None else state.latent.shape[1]
        start = _document_starts(state, old, length, reset)
        positions = None if start is None else (
            torch.arange(old, old + length, device=x.device) - start)
        q, latent = self._query(x, positions), self._latent(x, positions)
        if state is not None:
            latent = append(state.latent.to(latent.dtype), latent, 1)
        if self._absorbs(length, old + length):
            y = self._absorbed(q, latent, start)
        else:
            y = self._expanded(q, latent, start)
        return self.out(y), self._after(latent, start, reset)

    def _query(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """(batch, length, n_heads, key_dim + rope_dim), the last features turned."""
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q_up(q).unflatten(-1, (self.n_heads, -1))
        if self.table is None:
            return q
        plain, turned = q.split([self.key_dim, self.rope_dim], dim=-1)
        if self.table.factor != 1:  # its square, as both sides of the turned part have it once
            plain = plain * self.table.factor**2
        return torch.cat([plain, self.table.turn(turned, positions)], dim=-1)

    def _latent(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """(batch, length, kv_rank + rope_dim): what the state keeps of x."""
        latent, key = self.kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        if self.table is not None:
            key = self.table.turn(key[:, :, None], positions)[:, :, 0]
        latent = self.kv_norm(latent)
        return torch.cat([latent, key.to(latent.dtype)], dim=-1)

    def _expanded(self, q: Tensor, latent: Tensor, start: Tensor | None) -> Tensor:
        """q: (batch, length, n_heads, key_dim + rope_dim), latent: (batch, n, kv_rank + rope_dim)
        -> (batch, length, n_heads * head_dim)."""
        latent, key = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        k, v = self.kv_up(latent).unflatten(-1, (self.n_heads, -1)).split(
            [self.key_dim, self.head_dim], dim=-1)
        shared = key[:, :, None].expand(-1, -1, self.n_heads, -1)
        k = torch.cat([k, shared.to(k.dtype)], dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v, start, scale=self.scale).transpose(1, 2).flatten(2)

    def _absorbed(self, q: Tensor, latent: Tensor, start: Tensor | None) -> Tensor:
        """The same from the same arguments, without a key or value for each head."""
        up = self.kv_up.weight.unflatten(0, (self.n_heads, -1))
        up_k, up_v = up.split([self.key_dim, self.head_dim], dim=1)
        plain, turned = q.split([self.key_dim, self.rope_dim], dim=-1)
        plain = torch.einsum("bthk,hkr->bhtr", plain, up_k)
        q = torch.cat([plain, turned.transpose(1, 2).to(plain.dtype)], dim=-1)
        keys = latent.to(q.dtype)[:, None]
        y = attention(q, keys, keys[..., :self.kv_rank], start, scale=self.scale)
        return torch.einsum("bhtr,hvr->bthv", y, up_v).flatten(2)

    def _attention_flops(self, length: int, keys: int) -> tuple[int, int]:
        """Operations behind the query, of the expanded and of the absorbed form."""
        pairs = visible_pairs(keys) - visible_pairs(keys - length)
        up = 2 * self.kv_up.weight.numel()
        return (up * keys + 2 * self.n_heads * pairs * (self.key_dim + self.rope_dim
                                                        + self.head_dim),
                up * length + 2 * self.n_heads * pairs * (2 * self.kv_rank + self.rope_dim))

    def _absorbs(self, length: int, keys: int) -> bool:
        expanded, absorbed = self._attention_flops(length, keys)
        return absorbed < expanded

    def _after(self, latent: Tensor, start: Tensor | None, reset: Tensor | None) -> LatentState:
        """The state once `latent`, (batch, n, kv_rank + rope_dim), has been seen."""
        batch, total, _ = latent.shape
        begin = (torch.zeros(batch, dtype=torch.int64, device=latent.device) if start is None
                 else start[:, -1])
        lengths = total - begin
        if reset is not None:  # what no row's current document reaches is dropped
            keep = int(lengths.max())
            if keep < total:
                latent = latent[:, total - keep:].clone()
        return LatentState(latent, lengths)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> LatentState:
        weight = self.kv_up.weight
        device = weight.device if device is None else device
        return LatentState(
            torch.zeros(batch_size, 0, self.kv_rank + self.rope_dim, dtype=weight.dtype,
                        device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device))

    def cost(self, length: int) -> Cost:
        """Projections, and the cheaper of the two forms; the state is the latents alone."""
        layers: list[Linear | None] = [self.q_down, self.q_up, self.kv_down, self.out]
        projections = 2 * sum(layer.weight.numel() for layer in layers if layer is not None)
        row = (self.kv_rank + self.rope_dim) * self.kv_up.weight.element_size()
        return Cost(projections * length + min(self._attention_flops(length, length)),
                    row * length + 8)
