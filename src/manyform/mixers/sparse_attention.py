"""Sparse attention with a pattern fixed in advance: Longformer, BigBird, Sparse Transformer.

Every pattern is written as intervals of keys for each query (see `manyform.ops.sparse_attention`),
in positions of the query's own document, so that it is the same wherever a sequence is cut.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.contract import Cost, CostGrowth, Place, StateGrowth, mixer
from manyform.errors import ManyformError, unknown
from manyform.init import linear
from manyform.mixers.attention import Attention, AttentionState, _document_starts
from manyform.ops.sparse_attention import kept_pairs, sparse_attention

POSITIONS = ("rotary", "none")


class Where(NamedTuple):
    """Where the queries of a call stand, counted in keys of the sequence (a prefix not counted).

    at: (1, T) their own places. start, end: (batch or 1, T), where their document begins (negative
      if its first tokens are no longer there) and ends; for a causal mixer it ends at the query.
    total: number of keys.
    """

    at: Tensor
    start: Tensor
    end: Tensor
    total: int


def where(start: Tensor | None, length: int, total: int, causal: bool,
          device: torch.device | None = None) -> Where:
    """`Where` from what `_document_starts` gives."""
    at = torch.arange(total - length, total, device=device)[None]
    start = torch.zeros_like(at) if start is None else start
    if causal:
        return Where(at, start, at + 1, total)
    last = torch.full_like(at[:, :1], total).expand(start.shape[0], -1)
    edge = torch.where(start[:, 1:] != start[:, :-1], at[:, 1:], total)
    return Where(at, start, torch.cat([edge, last], 1).flip(1).cummin(1).values.flip(1), total)


Intervals = list[tuple[Tensor, Tensor]]
"""(low, high), each (batch or 1, T), or (batch or 1, patterns, T)."""


def stacked(intervals: Intervals, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Intervals as the operation takes them, (batch or 1, patterns, T, intervals), moved up."""
    parts = [[t if t.ndim == 3 else t[:, None] for t in pair] for pair in intervals]
    flat = torch.broadcast_tensors(*(t for pair in parts for t in pair))
    return torch.stack(flat[0::2], -1) + shift, torch.stack(flat[1::2], -1) + shift


class Residues(NamedTuple):
    """The keys 0 ... total - 1 in the order of their residue modulo `step`: every step-th key of
    the sequence is next to the one before it."""

    step: int
    total: int

    def order(self, device: torch.device | None = None) -> Tensor:
        """Which key stands at each place, (total,)."""
        return torch.cat([torch.arange(r, self.total, self.step, device=device)
                          for r in range(min(self.step, self.total))])

    def interval(self, at: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Where the keys j with low <= j < high and the residue of `at` stand."""
        return self._place(at, low), self._place(at, high)

    def _place(self, at: Tensor, key: Tensor) -> Tensor:
        """Where the first key that is not before `key` and has the residue of `at` stands."""
        residue = at % self.step
        first = residue * (self.total // self.step) + residue.clamp(max=self.total % self.step)
        return first + ((key - residue).clamp(min=0) + self.step - 1) // self.step


class SparseAttention(Attention, abc.ABC):
    """What the patterns share: projections, rotary positions, a cache, one operation.

    A subclass says in `pattern` what queries see, and may lay further keys beside those of the
    sequence. causal=False looks both ways, keeps no state, and needs the whole sequence in a call.
    """

    def __init__(self, d_model: int, *, place: Place, causal: bool, position: str,
                 window: int | None = None, sinks: int = 0, **heads: Any) -> None:
        if position not in POSITIONS:
            raise unknown(f"position of {type(self).__name__}", position, POSITIONS)
        super().__init__(d_model, place=place, position=position, window=window, sinks=sinks,
                         **heads)
        self.causal = causal

    @abc.abstractmethod
    def pattern(self, here: Where, prefix: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """low, high as the operation takes them, and orders: index tensors (batch or 1, n) of keys
        (prefix included) that are laid beside the sequence, one after the other."""

    def forward(self, x: Tensor, state: AttentionState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, Any]:
        if self.causal:
            return super().forward(x, state, reset=reset)
        self.whole(state, reset)
        return super().forward(x, reset=reset)[0], None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, prefix: int) -> Tensor:
        here = where(start, q.shape[2], k.shape[2] - prefix, self.causal, q.device)
        low, high, orders = self.pattern(here, prefix)
        if orders:
            order = torch.cat([o.expand(max(o.shape[0] for o in orders), -1) for o in orders], 1)
            k, v = (torch.cat([t, picked(t, order)], 2) for t in (k, v))
        return sparse_attention(q, k, v, low, high, scale=self.scale)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Any:
        if not self.causal:
            return None
        return super().initial_state(batch_size, device=device)

    def cost(self, length: int) -> Cost:
        """Projections, and four operations for each feature of each kept pair."""
        here = where(None, length, length, self.causal)
        low, high, _ = self.pattern(here, 0)
        pairs = kept_pairs(low, high) * (self.n_heads // low.shape[1])
        projections = 2 * (self.qkv.weight.numel() + self.out.weight.numel()) * length
        kept = length if self.window is None else min(length, self.window - 1)
        row = 2 * self.kv_heads * self.head_dim * self.qkv.weight.element_size()
        return Cost(projections + 4 * self.head_dim * pairs,
                    row * (kept + self.sinks) + 8 if self.causal else 0)


def picked(x: Tensor, order: Tensor) -> Tensor:
    """Keys of x (batch, heads, n, d) at the places of order (batch or 1, m)."""
    if order.shape[0] == 1:
        return x[:, :, order[0]]
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and (isinstance(value, bool) or value < least):
        raise ManyformError(f"{name} must be at least {least}, not {value}")


@mixer("longformer")
class Longformer(SparseAttention):
    """A window, and global tokens that all see and that see all (Beltagy 2020, section 3).

    causal: each query sees itself, the window - 1 tokens before it and the first `globals` tokens
      of its document (the paper's autoregressive form has none, and here neither by default).
      Otherwise it sees window // 2 tokens to either side, and the first tokens see all, with
      projections of their own, which begin as copies of the others (section 3.1).
    dilation: the window takes every dilation-th token only, in the last `dilated_heads` heads (all
      if None; the paper dilates 2 in its upper layers, section 4.1.1).
    n_heads, head_dim, kv_heads, position ("rotary" or "none"), rope_base, bias: as in attention;
    the paper's positions are learned or relative, which the window leaves open.

    State of the causal form: keys and values of the tokens that a window can reach, and of the
    first ones. Cost T (window + globals); in the other direction also globals T.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, kv_heads: int | None = None, window: int = 256,
                 globals: int = 0, dilation: int = 1, dilated_heads: int | None = None,
                 causal: bool = True, position: str = "rotary", rope_base: float = 10000.0,
                 bias: bool = False) -> None:
        _at_least("window", window, 1)
        _at_least("globals", globals, 0)
        _at_least("dilation", dilation, 1)
        _at_least("dilated_heads", dilated_heads, 0)
        super().__init__(d_model, place=place, causal=causal, position=position, n_heads=n_heads,
                         head_dim=head_dim, kv_heads=kv_heads, rope_base=rope_base, bias=bias,
                         window=(window - 1) * dilation + 1, sinks=globals if causal else 0)
        if dilated_heads is not None and dilated_heads > self.n_heads:
            raise ManyformError(f"dilated_heads={dilated_heads} of n_heads={self.n_heads}: give at "
                                "most all")
        self.span, self.globals, self.dilation = window, globals, dilation
        self.dilated_heads = self.n_heads if dilated_heads is None else dilated_heads
        self.global_q = self.global_kv = None
        if globals and not causal:
            width = self.n_heads * self.head_dim
            self.global_q = linear(d_model, width, bias=bias)
            self.global_kv = linear(d_model, 2 * self.kv_heads * self.head_dim, bias=bias)
            with torch.no_grad():
                self.global_q.weight.copy_(self.qkv.weight[:width])
                self.global_kv.weight.copy_(self.qkv.weight[width:])

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """Bounded by the window; without a state where it looks ahead."""
        return "window" if self.causal else "none", "linear"

    def pattern(self, here: Where, prefix: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        at, start, end, total = here
        local = start + self.globals  # the window begins after the global tokens
        first, stop = self._window(here, local, 1)
        near, orders = (prefix + first, prefix + stop), []
        if self.dilation > 1 and self.dilated_heads:
            rank = Residues(self.dilation, total)
            orders.append(prefix + rank.order(at.device)[None])
            first, stop = rank.interval(at, *self._window(here, local, self.dilation))
            head = torch.arange(self.n_heads, device=at.device)[:, None]
            near = _choose(head >= self.n_heads - self.dilated_heads,
                           (prefix + total + first[:, None], prefix + total + stop[:, None]),
                           (near[0][:, None], near[1][:, None]))
        seen = [near]
        if self.globals:
            seen.insert(0, (prefix + start.clamp(min=0), prefix + torch.minimum(local, end)))
        if prefix:  # the first tokens of the first query's document, where they are no longer kept
            seen.insert(0, (torch.zeros_like(start), (-start).clamp(0, prefix)))
        if self.global_q is not None:  # global tokens look elsewhere
            seen = [(a, torch.where((at < local)[:, None] if a.ndim == 3 else at < local, a, b))
                    for a, b in seen]
        return *stacked(seen), orders

    def _window(self, here: Where, local: Tensor, step: int) -> tuple[Tensor, Tensor]:
        reach = (self.span - 1 if self.causal else self.span // 2) * step
        low = torch.maximum(here.at - reach, local.clamp(min=0))
        return low, torch.minimum(here.at + 1 if self.causal else here.at + reach + 1, here.end)

    def forward(self, x: Tensor, state: AttentionState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, after = super().forward(x, state, reset=reset)
        return y if self.global_q is None else y + self._global_tokens(x, reset), after

    def _global_tokens(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """What the global tokens see of their whole documents, zero elsewhere."""
        assert self.global_q is not None
        assert self.global_kv is not None
        batch, length, _ = x.shape
        heads, groups, d = self.n_heads, self.kv_heads, self.head_dim
        start = _document_starts(None, 0, length, reset)
        here = where(start, length, length, False, x.device)
        is_global = here.at < here.start + self.globals
        most = int(is_global.sum(1).max())
        order = is_global.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = is_global.gather(1, order)
        low = here.start.gather(1, order)
        high = torch.where(chosen, here.end.gather(1, order), low)
        rows = order.expand(batch, -1)
        q = self.global_q(x.gather(1, rows[..., None].expand(-1, -1, x.shape[2])))
        k, v = self.global_kv(x).view(batch, length, 2 * groups, d).split(groups, dim=2)
        q = q.view(batch, most, heads, d)
        if self.table is not None:
            places = here.at - here.start
            q = self.table.turn(q, places.gather(1, order).expand(batch, -1))
            k = self.table.turn(k, places.expand(batch, -1))
        y = sparse_attention(*(t.transpose(1, 2) for t in (q, k, v)), low[:, None, :, None],
                             high[:, None, :, None], scale=self.scale)
        y = F.linear(y.transpose(1, 2).reshape(batch, most, heads * d), self.out.weight)
        index = rows[..., None].expand(-1, -1, y.shape[2])
        return y.new_zeros(batch, length, y.shape[2]).scatter_add(1, index, y)

    def cost(self, length: int) -> Cost:
        cost = super().cost(length)
        if self.global_q is None or self.global_kv is None:
            return cost
        few = min(self.globals, length)
        width = self.n_heads * self.head_dim
        return cost + Cost(2 * self.global_kv.weight.numel() * length + 4 * width * length * few
                           + 2 * (self.global_q.weight.numel() + self.out.weight.numel()) * few, 0)


@mixer("bigbird")
class BigBird(SparseAttention):
    """Blocks of tokens that see a window of blocks, global blocks and random blocks (Zaheer 2020,
    section 2; block form of appendix D, without tokens added for the purpose, ITC).

    block: tokens a block. window_blocks: blocks of the window, half of the others to either side,
      or in the causal form the block itself and those before it. global_blocks: the first blocks of
      a document, which all see, and which see all; looking both ways also as many last ones, as in
      the released code. random_blocks: chosen for every head and block from those that the
      others leave, in the causal form from the earlier ones.
    random: how they are chosen. "hashed": they follow from the saved `seed`, drawn when the mixer
      is made, by a hash of head and block: a loaded model has the same ones, at any length.
      "first": each is the first block of the document once more, whose keys then count 1 +
      random_blocks times; this is what transformers computes with the published models whenever it
      does not train.
    dense_length: documents of up to so many tokens see all of themselves (None: none do); looking
      both ways only, since a stream does not know how long its document will be.
    causal: else each token sees blocks on both sides, and no state is kept.
    n_heads, head_dim, kv_heads, position ("rotary" or "none"), rope_base, bias, out_bias: as in
    attention.

    Since a later block may choose any earlier one, the state of the causal form keeps all keys and
    values. Cost linear in T.
    """

    seed: Tensor

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, kv_heads: int | None = None, block: int = 64,
                 window_blocks: int = 3, global_blocks: int = 1, random_blocks: int = 3,
                 random: str = "hashed", dense_length: int | None = None,
                 causal: bool = True, position: str = "rotary", rope_base: float = 10000.0,
                 bias: bool = False, out_bias: bool | None = None) -> None:
        _at_least("block", block, 1)
        _at_least("window_blocks", window_blocks, 1)
        _at_least("global_blocks", global_blocks, 0)
        _at_least("random_blocks", random_blocks, 0)
        _at_least("dense_length", dense_length, 1)
        if random not in ("hashed", "first"):
            raise unknown("random of bigbird", random, ("hashed", "first"))
        if causal and dense_length is not None:
            raise ManyformError(f"dense_length={dense_length} needs causal=False: a stream does "
                                "not know how long its document will be")
        if not causal and window_blocks % 2 == 0:
            raise ManyformError("window_blocks must be odd where the window looks both ways, not "
                                f"{window_blocks}")
        super().__init__(d_model, place=place, causal=causal, position=position, n_heads=n_heads,
                         head_dim=head_dim, kv_heads=kv_heads, rope_base=rope_base, bias=bias,
                         out_bias=out_bias)
        self.block, self.window_blocks = block, window_blocks
        self.global_blocks, self.random_blocks = global_blocks, random_blocks
        self.random, self.dense_length = random, dense_length
        if random == "hashed":
            self.register_buffer("seed", torch.randint(1 << 31, ()))

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """All keys are kept, a bounded number is seen."""
        return "linear" if self.causal else "none", "linear"

    def pattern(self, here: Where, prefix: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        at, start, end = (t[:, None] for t in here[:3])  # (batch or 1, patterns, T), as all below
        few, half = self.global_blocks, self.window_blocks // 2
        own = (at - start) // self.block  # counted in blocks of the document, as all below
        if self.causal:
            back, ahead, last = self.window_blocks - 1, 0, own + 1
        else:
            back, ahead, last = half, half, -(-(end - start) // self.block) - few
        last = last.clamp(min=few)  # the window and the choices lie in few ... last - 1
        low = torch.minimum((own - back).clamp(min=few), last)
        high = torch.minimum((own + ahead + 1).clamp(min=few), last)
        blocks = [(torch.zeros_like(own), torch.full_like(own, few)), (low, high)]
        if not self.causal:
            blocks.append((last, last + few))
        before = low - few
        hashed = self.random == "hashed"
        if hashed:
            for choice, exists in self._choices(own, before + last - high):
                block = few + torch.where(choice < before, choice, choice + high - low)
                blocks.append((block, torch.where(exists, block + 1, block)))
        seen = [tuple(torch.minimum(start + edge * self.block, end) for edge in pair)
                for pair in blocks]
        orders = []
        if not hashed:  # the sequence once more for each of them, of which the first block is seen
            stop = torch.minimum(start + self.block, end)
            for i in range(1, self.random_blocks + 1):
                orders.append(torch.arange(here.total, device=at.device)[None])
                seen.append((i * here.total + start, i * here.total + stop))
        if not self.causal:
            sees_all = (own < few) | (own >= last) if few else own < 0
            if self.dense_length is not None:
                sees_all = sees_all | (end - start <= self.dense_length)
            seen = [tuple(torch.where(sees_all, bound, edge) for edge, bound in zip(
                pair, (start, end if i == 0 else start), strict=True))
                for i, pair in enumerate(seen)]
        return *stacked(seen), orders  # type: ignore[arg-type]

    def _choices(self, own: Tensor, number: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Different numbers below `number`, (batch or 1, n_heads, T) each, and whether there are so
        many (Floyd's sampling: a draw that was made before becomes the largest one possible)."""
        head = torch.arange(self.n_heads, device=own.device)[:, None]
        word, wanted = _hash(_hash(self.seed + head) + own), self.random_blocks
        found: list[tuple[Tensor, Tensor]] = []
        for i in range(wanted):
            largest = (number - wanted + i).clamp(min=0)
            choice = torch.remainder(_hash(word + i), largest + 1)
            taken = torch.zeros_like(choice, dtype=torch.bool)
            for other, _ in found:
                taken |= other == choice
            choice = torch.where(taken, largest, choice)
            choice = torch.where(number < wanted, torch.full_like(choice, i), choice)
            found.append((choice, choice < number))
        return found


def _hash(x: Tensor) -> Tensor:
    """Numbers of 62 bits that look random (multiply and fold, twice, as in splitmix64)."""
    for factor in (-7046029254386353131, -4658895280553007687):
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * factor
    return ((x ^ ((x >> 31) & 0x1FFFFFFFF)) >> 1) & 0x3FFFFFFFFFFFFFFF


@mixer("sparse_transformer")
class SparseTransformer(SparseAttention):
    """Two sparse factors of attention, of about sqrt(T) keys each (Child 2019, section 4.3).

    factors: "strided", the last `stride` tokens, and every stride-th token before (for data with
      a natural period); or "fixed", the tokens so far of one's own block of `stride`, and the last
      `summary` tokens of every block (for text).
    stride: None lets it grow with the position p in the document, the least power of two above
      sqrt(p): the cost is then T sqrt T. A number is that stride throughout (the paper: 128 for
      12288 bytes of text), with a cost of T (stride + T / stride).
    summary: None is stride / 16, at least 1 (the paper: 8 to 32 for strides 128 and 256).
    heads: "merged", each sees what both factors see; "split", the first half of the heads has the
      first factor and the others the second (the paper's choice for shorter sequences); "layers",
      the factors alternate by layer (section 5.1 has the three). Under the fixed pattern's second
      factor alone, the first tokens of a document see nothing and give zero.
    n_heads, head_dim, kv_heads, position ("rotary" or "none"), rope_base, bias: as in attention.

    The state keeps all keys and values: strides reach back to the first of them.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, kv_heads: int | None = None,
                 factors: str = "strided", stride: int | None = None, summary: int | None = None,
                 heads: str = "merged", position: str = "rotary", rope_base: float = 10000.0,
                 bias: bool = False) -> None:
        for name, value, known in (("factors", factors, ("strided", "fixed")),
                                   ("heads", heads, ("merged", "split", "layers"))):
            if value not in known:
                raise unknown(f"{name} of sparse_transformer", value, known)
        _at_least("stride", stride, 1)
        _at_least("summary", summary, 1)
        if summary is not None and (factors == "strided" or summary > (stride or summary)):
            raise ManyformError(f"summary={summary} needs factors='fixed' and a stride that is not "
                                "smaller")
        super().__init__(d_model, place=place, causal=True, position=position, n_heads=n_heads,
                         head_dim=head_dim, kv_heads=kv_heads, rope_base=rope_base, bias=bias)
        self.fixed, self.stride, self.summary = factors == "fixed", stride, summary
        index = torch.arange(self.n_heads)
        near = {"merged": index >= 0, "split": 2 * index < self.n_heads,
                "layers": (index >= 0) & (place.index % 2 == 0)}[heads]
        far = ~near if heads != "merged" else near
        self.register_buffer("near", near[:, None], persistent=False)
        self.register_buffer("far", far[:, None], persistent=False)
        self.merged = heads == "merged"

    near: Tensor
    far: Tensor

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """T sqrt T only where the stride grows."""
        return "linear", "T sqrt T" if self.stride is None else "quadratic"

    def pattern(self, here: Where, prefix: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        at, start, end, total = here
        own = at - start
        level = _level(own) if self.stride is None else torch.zeros_like(own)
        near = far = (torch.zeros_like(own), torch.zeros_like(own))
        orders, laid = [], total
        for k in level.unique().tolist():
            step, chosen = self.stride or 2 << k, level == k
            reach = int(torch.where(chosen, at, -1).max()) + 1  # what this level sees lies before
            first = start + own // step * step if self.fixed else torch.maximum(at - step + 1,
                                                                                start)
            stop = end
            if self.merged:
                stop = first if self.fixed else at - step + 1
            order, beyond = (self._summaries if self.fixed else self._strided)(
                here, stop.clamp(max=reach), step, reach)
            near = _choose(chosen, (first, end), near)
            far = _choose(chosen, (laid + beyond[0], laid + beyond[1]), far)
            orders.append(order)
            laid += order.shape[1]
        parts = [(a[:, None], torch.where(mask, b[:, None], a[:, None]))
                 for (a, b), mask in ((near, self.near), (far, self.far))]
        return *stacked(parts), orders

    def _strided(self, here: Where, stop: Tensor, step: int, reach: int) -> Any:
        """Every step-th key before `stop`, counted back from the query."""
        rank = Residues(step, reach)
        return rank.order(stop.device)[None], rank.interval(here.at, here.start, stop)

    def _summaries(self, here: Where, stop: Tensor, step: int, reach: int) -> Any:
        """The last keys of each block of the document that lie before `stop`."""
        few = max(1, step // 16) if self.summary is None else min(self.summary, step)
        key = torch.arange(here.total, device=stop.device)[None]
        held = here.total - here.at.shape[1]  # where the keys of this call begin
        begin = torch.cat([here.start[:, :1].expand(-1, held), here.start], 1)
        last = (key >= begin) & ((key - begin) % step >= step - few) & (key < reach)
        order = last.int().argsort(dim=1, descending=True, stable=True)
        count = F.pad(last.cumsum(1), (1, 0))
        low, high = (count.expand(here.start.shape[0], -1).gather(1, t.expand(
            here.start.shape[0], -1)) for t in (here.start, stop))
        return order[:, :max(int(last.sum(1).max()), 1)], (low, high)


def _choose(chosen: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor],
            ) -> tuple[Tensor, Tensor]:
    """The new interval of the chosen queries, the old one of the others."""
    return torch.where(chosen, new[0], old[0]), torch.where(chosen, new[1], old[1])


def _level(own: Tensor) -> Tensor:
    """k for the positions from 4^k to 4^(k + 1) - 1, and 0 for the first."""
    edges = 4 ** torch.arange(1, 31, device=own.device)
    return torch.bucketize(own, edges, right=True)
