"""Softmax attention: multi-head, grouped-query, multi-query; windows, sinks, rotary or ALiBi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, CostGrowth, Place, SequenceMixer, StateGrowth, mixer
from manyform.errors import ManyformError, unknown
from manyform.init import linear, residual_std
from manyform.norms import norm
from manyform.ops.append import append
from manyform.ops.attention import attention, visible_pairs
from manyform.ops.capped_attention import capped_attention
from manyform.positions import RotaryTable, alibi_slopes

POSITIONS = ("rotary", "alibi", "none")


class AttentionState(NamedTuple):
    """What later queries may look at.

    keys, values: (batch, kv_heads, n, head_dim), the last n tokens, keys with their positions
      turned in. With a window n is at most window - 1.
    first_keys, first_values: (batch, kv_heads, sinks, head_dim), slot i the i-th token of the row's
      current document, zero if it has not come yet; None without sinks.
    length: (batch,) int64, tokens of the row's current document so far: its tokens are the last
      `length` of the n (what lies before them belongs to an older document and is not seen).
    """

    keys: Tensor
    values: Tensor
    first_keys: Tensor | None
    first_values: Tensor | None
    length: Tensor


class Seen(NamedTuple):
    """What the queries of a call look at: keys, values, start and prefix as
    `ops.attention.attention` takes them. positions: (batch, length), of the queries in their
    documents; None where these are 0, 1, 2, ..."""

    keys: Tensor
    values: Tensor
    start: Tensor | None
    prefix: int
    positions: Tensor | None


@mixer("attention")
class Attention(SequenceMixer):
    """Scaled dot-product attention over the past (Vaswani 2017, section 3.2).

    n_heads: d_model // head_dim if None. head_dim: d_model // n_heads if n_heads is given, else the
      largest even divisor of d_model up to 64. kv_heads: n_heads if None; heads of keys and values,
      each shared by n_heads / kv_heads query heads (Ainslie 2023; 1 is multi-query, Shazeer 2019).
      kv_groups says the same as a proportion that holds at every width: query heads per head of
      keys and values (all share one where there are fewer).
    window: a query sees itself and the window - 1 tokens before it (Beltagy 2020); None is all.
    sinks: the first tokens of a document that stay visible beside the window (Xiao 2023).
    qk_norm: RMSNorm on every head's query and key (Henry 2020, Dehghani 2023), or another norm of
      `manyform.norms` by name, with qk_norm_eps (None: the norm's own). qk_norm_whole: one norm
      over the features of all heads together, as OLMo 2 has it (arXiv:2501.00656, section 3.2).
    position: "rotary" (Su 2021), "alibi" (Press 2021) or "none".
    rope_base, rope_scaling: see `manyform.positions.rotary_frequencies`. rotary_dim: the first
      features of a head that are turned, all if None (GPT-J and GPT-NeoX turn a quarter).
    alibi_scale: multiplies ALiBi's slopes (Falcon's released code: 1 / sqrt(head_dim)).
    scale: of the scores, 1 / sqrt(head_dim) if None. cap: scores become cap * tanh(scores / cap)
      (Gemma 2); not beside ALiBi or sinks. clip: queries, keys and values stay within
      -clip ... clip (MPT's and OLMo's released code).
    bias: on both projections; out_bias: on the output where it differs from the input (Qwen 2).
    gated: each feature of the result times a sigmoid of a linear map of x (Qiu 2025, "Gated
      Attention for Large Language Models", section 2.2; Qwen3-Next).

    The state has the dtype in which keys are computed: that of the parameters, or autocast's.
    """

    state_growth = "linear"
    cost_growth = "quadratic"
    aligned = True

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, kv_heads: int | None = None,
                 kv_groups: int | None = None, window: int | None = None, sinks: int = 0,
                 qk_norm: bool | str = False, qk_norm_eps: float | None = None,
                 qk_norm_whole: bool = False, position: str = "rotary",
                 rope_base: float = 10000.0, rope_scaling: Mapping[str, Any] | None = None,
                 rotary_dim: int | None = None, alibi_scale: float = 1.0,
                 scale: float | None = None, clip: float | None = None,
                 cap: float | None = None, bias: bool = False,
                 out_bias: bool | None = None, gated: bool = False) -> None:
        super().__init__(d_model, place=place)
        if position not in POSITIONS:
            if position in ("learned", "sinusoidal"):
                raise ManyformError(
                    f"position={position!r} is added to the embedding, so it is an option of the "
                    "model; the attention mixer takes 'rotary', 'alibi' or 'none'")
            raise unknown("position of attention", position, POSITIONS)
        if position != "rotary" and (rope_scaling is not None or rotary_dim is not None):
            raise ManyformError("rope_scaling and rotary_dim need position='rotary', not "
                                f"{position!r}")
        if position != "alibi" and alibi_scale != 1:
            raise ManyformError(f"alibi_scale needs position='alibi', not {position!r}")
        if not qk_norm and (qk_norm_whole or qk_norm_eps is not None):
            raise ManyformError("qk_norm_whole and qk_norm_eps need qk_norm")
        if cap is not None and (position == "alibi" or sinks):
            raise ManyformError("cap cannot stand beside position='alibi' or sinks")
        for name, value in (("scale", scale), ("clip", clip), ("cap", cap)):
            if value is not None and not value > 0:
                raise ManyformError(f"{name} of attention must be positive, not {value}")
        if window is not None and window < 1:
            raise ManyformError(f"window must be at least 1, not {window}; None is no window")
        if sinks < 0 or (sinks and window is None):
            raise ManyformError(f"sinks={sinks} needs to be 0 or more, and a window beside which "
                                "the first tokens stay visible; set window too")
        self.n_heads, self.head_dim = _heads(d_model, n_heads, head_dim)
        if kv_heads is not None and kv_groups is not None:
            raise ManyformError("give kv_heads or kv_groups, not both")
        if kv_groups is not None:
            if kv_groups < 1 or (self.n_heads > kv_groups and self.n_heads % kv_groups):
                raise ManyformError(f"kv_groups must divide n_heads={self.n_heads}; {kv_groups} "
                                    "does not")
            kv_heads = max(1, self.n_heads // kv_groups)
        self.kv_heads = self.n_heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ManyformError(f"kv_heads must divide n_heads={self.n_heads}; {kv_heads} does not")
        self.window, self.sinks, self.position = window, sinks, position
        self.scale, self.clip, self.cap = scale, clip, cap
        self.qk_norm, self.qk_norm_whole = "rms" if qk_norm is True else qk_norm, qk_norm_whole
        width, narrow = self.n_heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = linear(d_model, width + 2 * narrow, bias=bias)
        self.out = linear(width, d_model, bias=bias if out_bias is None else out_bias,
                          std=residual_std(place))
        self.gate = linear(d_model, width, bias=bias) if gated else None
        self.q_norm, self.k_norm = (
            norm(self.qk_norm, n if qk_norm_whole else self.head_dim, qk_norm_eps)
            if self.qk_norm else None for n in (width, narrow))
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.alibi_scale, self.bias, self.qk_norm_eps = alibi_scale, bias, qk_norm_eps
        self.table: RotaryTable | None = None
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if not 0 < self.rotary_dim <= self.head_dim:
            raise ManyformError(f"rotary_dim must be from 2 to head_dim={self.head_dim}, not "
                                f"{rotary_dim}")
        if position == "rotary":
            self.table = RotaryTable(self.rotary_dim, base=rope_base, scaling=rope_scaling)
        self.slopes: Tensor | None
        self.register_buffer("slopes", alibi_slopes(self.n_heads) * alibi_scale
                             if position == "alibi" else None, persistent=False)

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """Constant and linear once a window bounds them."""
        return ("linear", "quadratic") if self.window is None else ("window", "linear")

    def forward(self, x: Tensor, state: AttentionState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, AttentionState]:
        return self.attend(x, self.qkv(x), state, reset)

    def attend(self, x: Tensor, qkv: Tensor, state: AttentionState | None,
               reset: Tensor | None) -> tuple[Tensor, AttentionState]:
        """What follows the projection of x to queries, keys and values, (batch, length,
        (n_heads + 2 kv_heads) head_dim)."""
        q, seen, after = self.see(qkv, state, reset)
        return self.result(x, q, seen), after

    def see(self, qkv: Tensor, state: AttentionState | None, reset: Tensor | None,
            ) -> tuple[Tensor, Seen, AttentionState]:
        """Queries (batch, n_heads, length, head_dim), what they look at, and the next state."""
        batch, length, _ = qkv.shape
        heads, groups, d = self.n_heads, self.kv_heads, self.head_dim
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        qkv = qkv.view(batch, length, heads + 2 * groups, d)
        qk, v = qkv.split([heads + groups, groups], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self._normed(part, t) for part, t in zip(
                (self.q_norm, self.k_norm), qk.split([heads, groups], dim=2), strict=True)], dim=2)
        old = 0 if state is None else state.keys.shape[2]
        start = _document_starts(state, old, length, reset)
        positions = None if start is None else (
            torch.arange(old, old + length, device=qkv.device) - start)
        q, k = self.turn(qk, positions).split([heads, groups], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        seen_k, seen_v, prefix = k, v, 0
        if state is not None:
            k, v = (append(cache.to(new.dtype), new, 2)
                    for cache, new in ((state.keys, k), (state.values, v)))
            seen_k, seen_v = k, v
            if state.first_keys is not None and state.first_values is not None:
                prefix = self.sinks
                seen_k = torch.cat([state.first_keys.to(k.dtype), k], dim=2)
                seen_v = torch.cat([state.first_values.to(v.dtype), v], dim=2)
        return (q, Seen(seen_k, seen_v, start, prefix, positions),
                self._after(k, v, state, start, reset))

    def turn(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Queries and keys, (batch, length, heads, head_dim), with their positions turned in."""
        if self.table is None:
            return x
        if self.rotary_dim == self.head_dim:
            return self.table.turn(x, positions)
        turned, kept = x.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        return torch.cat([self.table.turn(turned, positions), kept], dim=-1)

    def result(self, x: Tensor, q: Tensor, seen: Seen) -> Tensor:
        """The layer's output."""
        y = self._attend(q, seen.keys, seen.values, seen.start, seen.prefix)
        y = y.transpose(1, 2).flatten(2)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.out(y)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, prefix: int) -> Tensor:
        """Queries, keys and values, (batch, heads, n, head_dim), to outputs; see the operation."""
        if self.cap is not None:
            return capped_attention(q, k, v, start, cap=self.cap, window=self.window,
                                    scale=self.scale)
        return attention(q, k, v, start, prefix=prefix, window=self.window, sinks=self.sinks,
                         slopes=self.slopes, scale=self.scale)

    def _normed(self, norm_: nn.Module, x: Tensor) -> Tensor:
        """x: (batch, length, heads, head_dim), normed by head or over all heads."""
        return norm_(x.flatten(2)).view(x.shape) if self.qk_norm_whole else norm_(x)

    def _after(self, k: Tensor, v: Tensor, state: AttentionState | None, start: Tensor | None,
               reset: Tensor | None) -> AttentionState:
        """The state once k and v, (batch, kv_heads, total, head_dim), have been seen."""
        batch, _, total, _ = k.shape
        begin = (torch.zeros(batch, dtype=torch.int64, device=k.device) if start is None
                 else start[:, -1])
        firsts: list[Tensor | None] = [None, None]
        if self.sinks:
            place = begin[:, None] + torch.arange(self.sinks, device=k.device)
            place = place[:, None, :, None]
            index = place.clamp(0, total - 1).expand(-1, k.shape[1], -1, k.shape[3])
            before = (None, None) if state is None else (state.first_keys, state.first_values)
            for i, (new, held) in enumerate(zip((k, v), before, strict=True)):
                first = new.gather(2, index).masked_fill(place >= total, 0)
                first = first.to(self.qkv.weight.dtype)  # of fixed size, so kept whole
                if held is not None:
                    first = torch.where(place < 0, held, first)
                firsts[i] = first
        keep = total
        lengths = total - begin
        if reset is not None:  # what no row's current document reaches is dropped
            keep = min(keep, int(lengths.max()))
        if self.window is not None:
            keep = min(keep, self.window - 1)
        if keep < total:
            k, v = (t.narrow(2, total - keep, keep) for t in (k, v))
            if 2 * keep < total:  # do not hold the memory of all for the sake of a few
                k, v = k.clone(), v.clone()
        return AttentionState(k, v, firsts[0], firsts[1], lengths)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> AttentionState:
        weight = self.qkv.weight
        device = weight.device if device is None else device

        def zeros(n: int) -> Tensor:
            return torch.zeros(batch_size, self.kv_heads, n, self.head_dim, device=device,
                               dtype=weight.dtype)
        first, second = (zeros(self.sinks), zeros(self.sinks)) if self.sinks else (None, None)
        return AttentionState(zeros(0), zeros(0), first, second,
                              torch.zeros(batch_size, dtype=torch.int64, device=device))

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        narrow = self.kv_heads * self.head_dim
        q, k, v = self.qkv.weight.split([self.n_heads * self.head_dim, narrow, narrow])
        return [v, self.out.weight], [q, k]

    def cost(self, length: int) -> Cost:
        """Projections, and four operations for each feature of each visible pair."""
        layers = [self.qkv, self.out, *([] if self.gate is None else [self.gate])]
        projections = 2 * sum(layer.weight.numel() for layer in layers) * length
        pairs = visible_pairs(length, self.window, self.sinks)
        kept = length if self.window is None else min(length, self.window - 1)
        row = 2 * self.kv_heads * self.head_dim * self.qkv.weight.element_size()
        return Cost(projections + 4 * self.head_dim * self.n_heads * pairs,
                    row * (kept + self.sinks) + 8)


def _heads(d_model: int, n_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    for name, value in (("n_heads", n_heads), ("head_dim", head_dim)):
        if value is not None and value < 1:
            raise ManyformError(f"{name} must be at least 1, not {value}")
    if n_heads is not None and head_dim is not None:
        return n_heads, head_dim
    given = n_heads if n_heads is not None else head_dim
    if given is None:
        even = [d for d in range(2, 65, 2) if d_model % d == 0]
        given = head_dim = even[-1] if even else 1
    if d_model % given:
        name = "n_heads" if n_heads is not None else "head_dim"
        raise ManyformError(f"{name}={given} does not divide d_model={d_model}; give both n_heads "
                            "and head_dim, or one that divides")
    return (d_model // given, given) if n_heads is None else (given, d_model // given)


def _document_starts(state: Any, old: int, length: int, reset: Tensor | None,
                     ) -> Tensor | None:
    """Where each new token's document begins, counted in cached keys: (batch, length), or None
    where all rows begin at the first key."""
    if state is None and (reset is None or not bool(reset[:, 1:].any())):
        return None
    if reset is None:
        assert state is not None
        return (old - state.length)[:, None].expand(-1, length)
    steps = torch.arange(old, old + length, device=reset.device)
    begin = old - state.length[:, None] if state is not None else steps.new_zeros(1, 1)
    latest = torch.where(reset, steps, -1).cummax(dim=1).values
    return torch.where(latest >= 0, latest, begin)
