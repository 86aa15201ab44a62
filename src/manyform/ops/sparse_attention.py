"""Softmax attention in which every query names the intervals of keys that it sees.

A window, global tokens, blocks chosen at random or by content, summaries of earlier chunks: each is
an interval of keys, of the sequence itself or of keys laid beside it or in another order (in which
every l-th token is an interval, too). One operation serves them all, and its cost follows the pairs
that are kept.

Forms, the preferred one first:
  amx        on a CPU with matrix tiles, in bfloat16: see `kernels.sparse_attention`, and where
             heads share both keys and intervals `kernels.shared_intervals`
  gathered   anywhere: 64 queries at a time against the blocks of 64 keys that any of them sees
  reference  the equation
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.errors import ManyformError
from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation
from manyform.ops.tiled_attention import LOG2E, _readable, _strides

BLOCK = 64
"""Keys, and in the gathered form queries, a block."""


def kept_pairs(low: Tensor, high: Tensor) -> int:
    """Pairs of a query and a key that the intervals keep."""
    return int((high - low).clamp(min=0).sum())


def _flops(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, *,
           scale: float | None = None) -> int:
    batch, heads, _, d = q.shape
    return 4 * d * kept_pairs(low, high) * (batch // low.shape[0]) * (heads // low.shape[1])


@operation(flops=_flops)
def sparse_attention(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, *,
                     scale: float | None = None) -> Tensor:
    """y_i = sum_j p_ij v_j,  p_i = softmax over the kept j of scale q_i.k_j (Vaswani 2017, eq. 1).

    q: (B, H, T, D); k, v: (B, G, S, D) with G dividing H, head h reading group h // (H / G).
    low, high: (B or 1, P, T, M) int64 with P dividing H, head h having pattern h // (H / P): query
      i sees key j if low[i, m] <= j < high[i, m] for some m. Intervals lie within 0 ... S, those of
      one query do not overlap, and one with low >= high is empty.
    scale: 1/sqrt(D) if None.
    Returns (B, H, T, D) in the dtype of v, zero where a query sees nothing; softmax in float32
    (float64 for float64 input). Raises ManyformError for shapes that do not fit.
    """
    check(q, k, low, high)
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    k_, v_ = (x.to(wide).repeat_interleave(repeat, dim=1) for x in (k, v))
    score = q.to(wide) @ k_.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    key = torch.arange(k.shape[2], device=q.device)
    mask = torch.zeros(*low.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    for first, end in zip(low.unbind(-1), high.unbind(-1), strict=True):
        mask |= (key >= first[..., None]) & (key < end[..., None])
    mask = mask.repeat_interleave(q.shape[1] // low.shape[1], dim=1)
    return _softmax(score, mask, v_).to(v.dtype)


def check(q: Tensor, k: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise ManyformError where the shapes of a call do not fit."""
    batch, heads, length, _ = q.shape
    if (low.shape != high.shape or low.ndim != 4 or low.shape[0] not in (1, batch)
            or heads % low.shape[1] or low.shape[2] != length or heads % k.shape[1]):
        raise ManyformError(
            f"intervals of shape {tuple(low.shape)} and {tuple(high.shape)} do not fit queries "
            f"{tuple(q.shape)} and keys {tuple(k.shape)}: give (batch or 1, patterns, {length}, "
            "intervals), patterns and groups of keys dividing the heads")


def _softmax(score: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """softmax(score) v over the mask, zero for a query that sees nothing."""
    none = ~mask.any(-1, keepdim=True)
    p = score.masked_fill(~(mask | none), -math.inf).softmax(-1)
    return (p.masked_fill(none, 0) if bool(none.any()) else p) @ v


@sparse_attention.path("gathered", when=lambda q, k, *a, **o: q.shape[2] and k.shape[2] > BLOCK)
def _(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, *, scale: float | None = None,
      ) -> Tensor:
    check(q, k, low, high)
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, heads, length, d = q.shape
    keys, patterns, device = k.shape[2], low.shape[1], q.device
    rows, cells = -(-length // BLOCK), -(-keys // BLOCK)
    tail = rows * BLOCK - length
    low, high = (F.pad(x, (0, 0, 0, tail)).view(x.shape[0], patterns, rows, -1, x.shape[3])
                 for x in (low, high))
    # The cells of 64 keys that any of a row's queries sees: where intervals begin and end.
    seen = low < high
    touched = torch.zeros(*low.shape[:3], cells + 1, dtype=torch.int32, device=device)
    first, last = (low // BLOCK).flatten(3), ((high - 1) // BLOCK + 1).flatten(3)
    count = seen.flatten(3).int()
    touched.scatter_add_(3, torch.where(seen.flatten(3), first, cells), count)
    touched.scatter_add_(3, torch.where(seen.flatten(3), last, cells), -count)
    touched = (touched.cumsum(3) > 0)[..., :cells]
    most = max(int(touched.sum(3).max()), 1)
    cell = touched.int().argsort(dim=3, descending=True, stable=True)[..., :most]
    listed = touched.gather(3, cell)
    place = cell[..., None] * BLOCK + torch.arange(BLOCK, device=device)
    place = place.flatten(3)[..., None, :]
    mask = torch.zeros(*low.shape[:4], place.shape[-1], dtype=torch.bool, device=device)
    for a, b in zip(low.unbind(-1), high.unbind(-1), strict=True):
        mask |= (place >= a[..., None]) & (place < b[..., None])
    mask &= listed.repeat_interleave(BLOCK, dim=3)[..., None, :]
    # One gather a set of heads that share both a pattern and their keys.
    sets = math.lcm(patterns, k.shape[1])
    cell = cell.repeat_interleave(sets // patterns, dim=1).expand(batch, -1, -1, -1)
    mask = mask.repeat_interleave(sets // patterns, dim=1)
    picked = []
    for x in (k, v):
        x = F.pad(x, (0, 0, 0, cells * BLOCK - keys)).to(wide)
        x = x.reshape(batch, k.shape[1], cells, BLOCK * d)
        x = x.repeat_interleave(sets // k.shape[1], dim=1)
        index = cell.flatten(2)[..., None].expand(-1, -1, -1, BLOCK * d)
        picked.append(x.gather(2, index).view(batch, sets, 1, rows, most * BLOCK, d))
    q_ = F.pad(q, (0, 0, 0, tail)).to(wide).reshape(batch, sets, heads // sets, rows, BLOCK, d)
    score = q_ @ picked[0].mT * (1 / math.sqrt(d) if scale is None else scale)
    y = _softmax(score, mask[:, :, None], picked[1])
    return y.reshape(batch, heads, rows * BLOCK, d)[:, :, :length].to(v.dtype)


def _tiles(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, *,
           scale: float | None = None) -> bool:
    length, d = q.shape[2:]
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16 and length >= 32 and k.shape[2]
            and d % 32 == 0 and d <= 256 and (scale is None or scale > 1e-6)
            and usable(q, k, v, low, high)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@sparse_attention.path("amx", when=_tiles)
def _(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, *, scale: float | None = None,
      ) -> Tensor:
    check(q, k, low, high)
    return tiled_intervals(q, k, v, low, high,
                           1 / math.sqrt(q.shape[3]) if scale is None else scale)


def tiled_intervals(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float,
                    ) -> Tensor:
    """The form for matrix tiles, for arguments that it takes (see `_tiles`)."""
    together = _together(q.shape[1], k.shape[1], low.shape[1])
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if together > 1:
        visits = _visits(low, high, k.shape[2], q.shape[3], together)
        if learns:
            return _Shared.apply(q, k, v, visits, scale)
        return _shared_forward(q, k, v, visits, scale)[0]
    from manyform.ops.kernels.sparse_plan import plan
    first, end = (x.flatten(0, 1).contiguous().numpy() for x in (low, high))
    meetings = (*plan(first, end, k.shape[2]), low.shape[1])
    if learns:
        return _Sparse.apply(q, k, v, meetings, scale)
    return _forward(q, k, v, meetings, scale)[0]


def _call(loop: Any, tensors: tuple[Tensor, ...], meetings: tuple[Any, ...], *rest: Any) -> None:
    """Run a loop of `kernels.sparse_attention` with scratch memory; q, k and v come first."""
    from manyform.ops.kernels import sparse_attention as kernels
    from manyform.ops.kernels.lanes import flat
    q, k = tensors[:2]
    (_, heads, n, d), (_, groups, keys, _) = q.shape, k.shape
    far_starts = meetings[6]
    gathers = bool((far_starts[:, 0] < far_starts[:, -1]).any())
    workers = threads()
    floats, words, halves = kernels.scratch(n, keys, d, gathers, loop is kernels.backward)
    scratch = (torch.empty(workers, floats).numpy(),
               torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"),
               torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"))
    placed = [part for x in tensors for part in (flat(x), _strides(x))]
    loop(*placed, heads, groups, n, keys, d, *meetings, *rest, *scratch)


def _forward(q: Tensor, k: Tensor, v: Tensor, meetings: tuple[Any, ...], scale: float,
             ) -> tuple[Tensor, Tensor]:
    import numpy as np

    from manyform.ops.kernels import sparse_attention as kernels
    from manyform.ops.kernels.lanes import flat
    q, k, v = (_readable(x) for x in (q, k, v))
    batch, heads, n, d = q.shape
    y = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
    peaks = torch.empty(batch, heads, -(-n // kernels.SIDE) * kernels.SIDE)
    _call(kernels.forward, (q, k, v), meetings, np.float32(scale * LOG2E), flat(y), _strides(y),
          peaks.numpy())
    return y, peaks


class _Sparse(torch.autograd.Function):
    """Scores are computed again from the kept logarithms of their sums (Dao 2022, algorithm 4)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meetings: tuple[Any, ...],
                scale: float) -> Tensor:
        y, peaks = _forward(q, k, v, meetings, scale)
        ctx.save_for_backward(q, k, v, y, peaks)
        ctx.meetings, ctx.scale = meetings, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        import numpy as np

        from manyform.ops.kernels import sparse_attention as kernels
        from manyform.ops.kernels.lanes import flat
        q, k, v, y, peaks = ctx.saved_tensors
        q, k, v, dy = (_readable(x) for x in (q, k, v, dy.to(q.dtype)))
        (batch, heads, n, d), (_, groups, keys, _) = q.shape, k.shape
        dq = torch.empty(batch, n, heads, d, dtype=q.dtype)
        dk, dv = (torch.empty(batch, keys, heads, d, dtype=q.dtype) for _ in range(2))
        _call(kernels.backward, (q, k, v, dy, y), ctx.meetings, np.float32(ctx.scale * LOG2E),
              np.float32(ctx.scale), peaks.numpy(), flat(dq), flat(dk), flat(dv))
        if heads > groups:
            dk, dv = (x.view(batch, keys, groups, -1, d).sum(3, dtype=torch.float32).to(x.dtype)
                      for x in (dk, dv))
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None


def _together(heads: int, groups: int, patterns: int) -> int:
    """How many heads go as rows of one query: a power of two, at most 32, of those that share both
    keys and intervals."""
    shared = heads // math.lcm(groups, patterns)
    return min(shared & -shared, 32)


def _visits(low: Tensor, high: Tensor, keys: int, d: int, together: int) -> tuple[Any, ...]:
    """What `kernels.shared_intervals` walks through: starts, visitors, edges, sets, together,
    span."""
    import numpy as np

    from manyform.ops.kernels.shared_intervals import SPAN
    from manyform.ops.kernels.sparse_plan import KEYS, SIDE, measure, visit
    batch, sets, n, intervals = low.shape
    span = max(SPAN * 64 // d // together, SIDE)
    spans = -(-n // span)
    low, high = (F.pad(x, (0, 0, 0, spans * span - n)) if n % span else x for x in (low, high))
    first, end = (x.reshape(-1, span, intervals).numpy() for x in (low, high))
    starts = np.empty((batch * sets * spans, -(-keys // KEYS) + 1), np.int64)
    count = measure(first, end, starts)
    visitors, edges = np.empty(count, np.int32), np.empty(count, np.int32)
    visit(first, end, starts, visitors, edges)
    return starts, visitors, edges, sets, together, span


def _shared_scratch(keys: int, d: int, rows: int, gradient: bool) -> tuple[Any, ...]:
    from manyform.ops.kernels import shared_intervals as kernels
    workers = threads()
    floats, words, halves = kernels.scratch(keys, d, rows, gradient)
    return (kernels.RAMP, torch.empty(workers, floats).numpy(),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"))


def _shared_forward(q: Tensor, k: Tensor, v: Tensor, visits: tuple[Any, ...], scale: float,
                    ) -> tuple[Tensor, Tensor]:
    import numpy as np

    from manyform.ops.kernels import shared_intervals as kernels
    from manyform.ops.kernels.lanes import flat
    q, k, v = (_readable(x) for x in (q, k, v))
    (batch, heads, n, d), (_, groups, keys, _) = q.shape, k.shape
    together, span = visits[4:]
    y = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
    peaks = torch.empty(batch, heads // together, -(-n // span) * span * together)
    run: Any = kernels.forward
    run(*(part for x in (q, k, v) for part in (flat(x), _strides(x))), heads, groups, n, keys, d,
        *visits, np.float32(scale * LOG2E), flat(y), _strides(y), peaks.numpy(),
        *_shared_scratch(keys, d, span * together, False))
    return y, peaks


class _Shared(torch.autograd.Function):
    """`_Sparse` where heads share keys and intervals."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visits: tuple[Any, ...],
                scale: float) -> Tensor:
        y, peaks = _shared_forward(q, k, v, visits, scale)
        ctx.save_for_backward(q, k, v, y, peaks)
        ctx.visits, ctx.scale = visits, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        import numpy as np

        from manyform.ops.kernels import shared_intervals as kernels
        from manyform.ops.kernels.lanes import flat
        q, k, v, y, peaks = ctx.saved_tensors
        q, k, v, dy = (_readable(x) for x in (q, k, v, dy.to(q.dtype)))
        (batch, heads, n, d), (_, groups, keys, _) = q.shape, k.shape
        together, span = ctx.visits[4:]
        shares = 1 if batch * groups >= threads() else threads()
        dq = torch.empty(batch, n, heads, d, dtype=q.dtype)
        dk, dv = (torch.empty(shares, batch, keys, groups, d, dtype=q.dtype) for _ in range(2))
        run: Any = kernels.backward
        run(*(part for x in (q, k, v, dy, y) for part in (flat(x), _strides(x))), heads, groups, n,
            keys, d, *ctx.visits, np.float32(ctx.scale * LOG2E), np.float32(ctx.scale),
            peaks.numpy(), flat(dq), flat(dk), flat(dv),
            *_shared_scratch(keys, d, span * together, True))
        dk, dv = (x[0] if shares == 1 else x.sum(0, dtype=torch.float32).to(x.dtype)
                  for x in (dk, dv))
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None
