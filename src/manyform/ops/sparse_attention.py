"""Softmax attention in which every query names the intervals of keys that it sees.

A window, global tokens, blocks chosen at random or by content, summaries of earlier chunks: each is
an interval of keys, of the sequence itself or of keys laid beside it or in another order (in which
every l-th token is an interval, too). One operation serves them all, and its cost follows the pairs
that are kept.

Forms, the preferred one first:
  amx        on a CPU with matrix tiles, in bfloat16: see `tiled_intervals`
  gathered   anywhere: 64 queries at a time against the blocks of 64 keys that any of them sees
  reference  the equation
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.errors import ManyformError
from manyform.ops.kernels import usable
from manyform.ops.operation import operation

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
    from manyform.ops.tiled_intervals import tiled_intervals
    check(q, k, low, high)
    return tiled_intervals(q, k, v, low, high,
                           1 / math.sqrt(q.shape[3]) if scale is None else scale)
