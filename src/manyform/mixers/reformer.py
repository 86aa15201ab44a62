"""Reformer: attention inside the buckets of a locality-sensitive hash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.contract import Cost, CostGrowth, Place, SequenceMixer, StateGrowth, mixer
from manyform.errors import ManyformError, unknown
from manyform.init import linear, residual_std
from manyform.mixers.attention import _document_starts, _heads
from manyform.mixers.block_attention import kept
from manyform.ops.append import append
from manyform.ops.lsh_attention import chunked_lsh_attention, hash_buckets, lsh_attention
from manyform.positions import RotaryTable


class ReformerState(NamedTuple):
    """keys, values: (batch, n_heads, n, head_dim) of all tokens. buckets: (batch, n_heads, hashes,
    n) int16. length: (batch,) int64, tokens of the row's current document so far."""

    keys: Tensor
    values: Tensor
    buckets: Tensor
    length: Tensor


@mixer("reformer")
class Reformer(SequenceMixer):
    """Softmax attention over the tokens that hash to the query's bucket (Kitaev 2020, section 2).

    Queries and keys are one projection, keys scaled to length 1 (shared-QK); a token sees itself
    only where nothing else is in its buckets. A random rotation, saved with the weights, sorts
    tokens into `buckets`, `hashes` times over; a token found more than once counts as often (as in
    transformers' form; in the paper's union it counts once).

    causal: a token sees the last 2 `chunk` tokens of each of its buckets. In the paper, chunks are
      cut from the sorted sequence, so that later tokens move their edges and change what earlier
      ones see; this form sees as many at most, keeps the order in which tokens came, and can
      stream. Otherwise it sees its chunk of the sorted sequence and the one before, as in the
      paper, and needs the whole sequence in a call. The paper draws new rotations at every step;
      here they stay, without which a stream could not be continued.
    released: a token sees the earlier ones of its chunk and of the one before, as in the released
      code and in transformers (`manyform.ops.lsh_attention.chunked_lsh_attention`), every head with
      rotations of its own; sequences of up to `chunk` tokens see all that is earlier. Later tokens
      move the edges of the chunks, so that this is a form of causal=False: it takes whole rows, of
      one document each. multiple: what the sorted sequence is filled up to (None: chunk).
    buckets, hashes, chunk: the paper takes chunks of twice the average bucket, and up to 8 hashes.
      Buckets may be given as factors ([64, 128]), each hashed by itself. hash_seed: draws the
      rotations (None: torch's generator does).
    position: "rotary" turns queries and keys after they are hashed; "none" leaves it to the model
      (the paper's are learned).
    n_heads, head_dim: as in attention.

    A bucket is a decision: an input that differs by rounding may fall into another one, so the
    hashes are computed from float32 projections even where the rest is bfloat16.

    State: all tokens and their buckets. Cost T hashes chunk, and a sort.
    """

    rotations: Tensor

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 head_dim: int | None = None, buckets: int | Sequence[int] = 32, hashes: int = 4,
                 chunk: int = 64, causal: bool = True, released: bool = False,
                 multiple: int | None = None, hash_seed: int | None = None,
                 position: str = "rotary", rope_base: float = 10000.0) -> None:
        super().__init__(d_model, place=place)
        if position not in ("rotary", "none"):
            raise unknown("position of reformer", position, ("rotary", "none"))
        self.factors = (buckets,) if isinstance(buckets, int) else tuple(buckets)
        self.buckets = math.prod(self.factors)
        if not self.factors or any(n < 2 or n % 2 for n in self.factors) or self.buckets >= 1 << 15:
            raise ManyformError("buckets must be even, from 2 to 32766, or even factors of such a "
                                f"number, not {buckets}")
        if hashes < 1 or chunk < 1:
            raise ManyformError(f"hashes and chunk must be at least 1, not {hashes} and {chunk}")
        if released and causal:
            raise ManyformError("released=True needs causal=False: a later token moves the edges "
                                "of the chunks, so that this form cannot stream")
        if multiple is not None and (not released or multiple < 1 or multiple % chunk):
            raise ManyformError(f"multiple={multiple} needs released=True, and to be a multiple of "
                                f"chunk={chunk}")
        self.n_heads, self.head_dim = _heads(d_model, n_heads, head_dim)
        self.hashes, self.chunk, self.causal = hashes, chunk, causal
        self.released, self.hash_seed = released, hash_seed
        self.multiple = chunk if multiple is None else multiple
        self.packs = not released
        width = self.n_heads * self.head_dim
        self.qk = linear(d_model, width)
        self.v = linear(d_model, width)
        self.out = linear(width, d_model, std=residual_std(place))
        self.register_buffer("rotations", self._draw())
        self.table = RotaryTable(self.head_dim, base=rope_base) if position == "rotary" else None

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """All tokens are kept, a bounded number is seen."""
        return "linear" if self.causal else "none", "linear"

    def forward(self, x: Tensor, state: ReformerState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, Any]:
        if not self.causal:
            self.whole(state, reset)
        batch, length, _ = x.shape
        old = 0 if state is None else state.keys.shape[2]
        start = _document_starts(state, old, length, reset)
        q, v = (t.view(batch, length, self.n_heads, self.head_dim)
                for t in (self._shared(x), self.v(x)))
        if self.released:
            return self._released(q, v), None
        buckets = hash_buckets(q.transpose(1, 2), self.rotations, self.factors).to(torch.int16)
        if self.table is not None:
            places = None if start is None else torch.arange(old, old + length,
                                                             device=x.device) - start
            q = self.table.turn(q, places)
        k = F.normalize(q, dim=-1, eps=1e-6)
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        if state is not None:
            k, v = (append(held.to(new.dtype), new, 2)
                    for held, new in ((state.keys, k), (state.values, v)))
            buckets = append(state.buckets, buckets, 3)
        y = lsh_attention(q, k, v, buckets, start, chunk=self.chunk, causal=self.causal)
        y = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        if not self.causal:
            return y, None
        total = old + length
        lengths = torch.full((batch,), total, device=x.device) if start is None else (
            total - start[:, -1])
        keep = total if reset is None else int(lengths.max())
        return y, ReformerState(kept(k, keep), kept(v, keep), buckets[..., total - keep:], lengths)

    def _draw(self) -> Tensor:
        """Rotations, (hashes, head_dim, n), or those of every head, (n_heads, hashes, head_dim, n):
        then as transformers draws them from a seed."""
        n, device = sum(self.factors) // 2, self.qk.weight.device
        shape = (self.hashes, self.head_dim, n)
        if self.released:
            shape = (self.n_heads, self.head_dim, self.hashes, n)  # type: ignore[assignment]
        if self.hash_seed is None:
            drawn = torch.randn(shape)
        else:
            generator = torch.Generator().manual_seed(self.hash_seed)
            drawn = torch.randn(shape, generator=generator, device="cpu").to(device)
        return drawn.transpose(1, 2).contiguous() if self.released else drawn

    def _released(self, q: Tensor, v: Tensor) -> Tensor:
        """The output from the shared projection and the values, (batch, length, heads, head_dim),
        of whole rows."""
        batch, length, heads, d = q.shape
        few = length <= self.chunk
        q, v = q.transpose(1, 2), v.transpose(1, 2)
        if few:
            buckets = q.new_zeros(batch, heads, 1, length, dtype=torch.int64)
        else:
            buckets = hash_buckets(q, self.rotations, self.factors)
        if self.table is not None:
            q = self.table.turn(q.transpose(1, 2)).transpose(1, 2)
        k = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6 * d)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if few:
            y = lsh_attention(q, k, v, buckets, None, chunk=(length + 1) // 2, causal=True)
        else:
            y = chunked_lsh_attention(q, k, v, buckets, chunk=self.chunk, multiple=self.multiple)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def _shared(self, x: Tensor) -> Tensor:
        """The shared projection, in the dtype of the parameters, since it decides the buckets."""
        with torch.autocast(x.device.type, enabled=False):
            return self.qk(x.to(self.qk.weight.dtype))

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Any:
        if not self.causal:
            return None
        weight = self.qk.weight
        device = weight.device if device is None else device
        none = torch.zeros(batch_size, self.n_heads, 0, self.head_dim, device=device,
                           dtype=weight.dtype)
        return ReformerState(
            none, none, torch.zeros(batch_size, self.n_heads, self.hashes, 0, device=device,
                                    dtype=torch.int16),
            torch.zeros(batch_size, dtype=torch.int64, device=device))

    def cost(self, length: int) -> Cost:
        """Projections, hashes, and 2 chunk keys a query and hash."""
        width = self.n_heads * self.head_dim
        weights = 3 * width * self.d_model + width * self.hashes * sum(self.factors) // 2
        pairs = length * self.hashes * 2 * self.chunk
        if self.released and length <= self.chunk:
            weights = 3 * width * self.d_model
            pairs = length * 2 * ((length + 1) // 2)
        row = width * 2 * self.qk.weight.element_size() + 2 * self.n_heads * self.hashes
        return Cost(2 * weights * length + 4 * width * pairs,
                    row * length + 8 if self.causal else 0)
