"""Attention over a window, with the relative positions of Transformer-XL.

Forms, the preferred one first:
  folded     one query a row: the position weights are multiplied into the query, and not into every
             distance of the window
  amx        on a CPU with matrix tiles, in bfloat16: see `kernels.relative_attention`
  blocked    queries in blocks that look only at the keys within reach; the scores of all distances
             are one product, whose rows are then shifted into place
  reference  the equation
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.attention import visible, visible_pairs
from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation
from manyform.ops.tiled_attention import LOG2E, _readable, _strides

BLOCK = 64
"""Queries a block in the blocked form."""


def _flops(q: Tensor, k: Tensor, v: Tensor, table: Tensor, weight: Tensor, u: Tensor, w: Tensor,
           start: Tensor | None = None, *, window: int) -> int:
    batch, heads, length, d = q.shape
    keys = k.shape[2]
    if start is None and keys == length:
        pairs = batch * visible_pairs(length, window)
    else:
        mask, _ = visible(length, keys, start, window=window, device=q.device)
        pairs = int(mask.expand(batch, -1, -1).sum())
    return 6 * d * heads * pairs + 2 * weight.numel() * table.shape[0]


@operation(flops=_flops)
def relative_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, weight: Tensor, u: Tensor,
                       w: Tensor, start: Tensor | None = None, *, window: int) -> Tensor:
    """y_i = sum_j p_ij v_j,  p_i = softmax over the visible j of
    ((q_i + u) . k_j + (q_i + w) . W s_{i-j}) / sqrt(D)   (Dai 2019, section 3.3).

    q: (B, H, T, D); k, v: (B, H, S, D), the last T of which belong to the queries. table: (n, M),
    row t the sinusoid s_t of distance t, n at least min(S, window). weight: (H D, M), the W of
    every head below each other. u, w: (H, D), content and position bias.
    Key j is visible to query i if start_i <= j <= i and i - j < window; start: (B, T) int64 counted
    in keys (negative: the document's first tokens are no longer there), None is 0.
    Returns (B, H, T, D) in the dtype of v; softmax in float32 (float64 for float64 input).
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads, d = q.shape[1], q.shape[3]
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, u_, w_ = (x.to(wide) for x in (q, k, v, u, w))
        rows = (table.to(wide) @ weight.to(wide).T).view(-1, heads, d)
        mask, distance = visible(q.shape[2], k.shape[2], start, window=window, device=q.device)
        rows = rows[distance[0].clamp(0, rows.shape[0] - 1)]  # (T, S, H, D)
        score = ((q_ + u_[:, None]) @ k_.mT
                 + torch.einsum("bhid,ijhd->bhij", q_ + w_[:, None], rows)) / math.sqrt(d)
        return (score.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ v_).to(v.dtype)


@relative_attention.path("blocked")
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, weight: Tensor, u: Tensor, w: Tensor,
      start: Tensor | None = None, *, window: int) -> Tensor:
    (batch, heads, length, d), keys = q.shape, k.shape[2]
    old, n, reach = keys - length, table.shape[0], min(window, keys) - 1
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    size = min(BLOCK, length)
    count = -(-length // size)
    behind, seen, scale = count * size - length, reach + size, 1 / math.sqrt(d)
    # Scores in full precision: rounded to bfloat16 they would be off by a hundredth and more.
    content, place = ((q.to(wide) + bias[:, None].to(wide)) * scale for bias in (u, w))
    content, place = (F.pad(x, (0, 0, 0, behind)).unflatten(2, (count, size))
                      for x in (content, place))
    # Block b of queries sees `seen` keys, which begin `reach` before its first query.
    k, v = (F.pad(x, (0, 0, reach - old, behind)).unfold(2, seen, size) for x in (k, v))
    steps, columns = torch.arange(size, device=q.device), torch.arange(seen, device=q.device)
    # All distances that occur in a block, the largest first; those of keys that are not visible
    # are masked, whatever their row.
    order = (reach + size - 1 - torch.arange(seen + size - 1, device=q.device)).clamp(0, n - 1)
    rows = F.linear(table.to(q.dtype), weight.to(q.dtype)).view(n, heads, d).transpose(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        score = content @ k.to(wide) + _shift(place @ rows.to(wide)[:, None, order].mT, seen)
    distance = steps[:, None] + reach - columns
    blocks = torch.arange(count, device=q.device)[:, None, None]
    begin = blocks.new_zeros(1) if start is None else F.pad(start, (0, behind)).clamp(min=0).view(
        -1, count, size, 1)
    mask = ((distance >= 0) & (distance <= reach)
            & (columns + old - reach + size * blocks >= begin))
    p = score.masked_fill(~mask.view(-1, 1, count, size, seen), -math.inf).softmax(-1)
    y = (p.to(v.dtype) @ v.mT).view(batch, heads, count * size, d)
    return y[:, :, :length]


def _shift(x: Tensor, seen: int) -> Tensor:
    """x: (..., n, seen + n - 1), row i in need of columns n - 1 - i and on -> (..., n, seen)."""
    n, width = x.shape[-2:]
    if n == 1:
        return x
    flat = x.flatten(-2)[..., n - 1:n - 1 + n * (width - 1)]
    return flat.unflatten(-1, (n, width - 1))[..., :seen]


def _tiles(q: Tensor, k: Tensor, v: Tensor, table: Tensor, weight: Tensor, u: Tensor, w: Tensor,
           start: Tensor | None = None, *, window: int) -> bool:
    heads, length, d = q.shape[1:]
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16 and length >= 32 and d % 32 == 0
            and d <= 256 and k.shape[1] == heads and u.dtype == w.dtype == torch.float32
            and usable(q, k, v, table, weight, u, w, start)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@relative_attention.path("amx", when=_tiles)
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, weight: Tensor, u: Tensor, w: Tensor,
      start: Tensor | None = None, *, window: int) -> Tensor:
    (_, heads, length, d), keys = q.shape, k.shape[2]
    low = (torch.arange(keys - length, keys) - window + 1).clamp(min=0)[None]
    if start is not None:
        low = torch.maximum(low, start)
    rows = F.linear(table.to(q.dtype), weight.to(q.dtype)).view(-1, heads, d)
    return _Relative.apply(q, k, v, rows, u, w, low, min(window, keys))


class _Relative(torch.autograd.Function):
    """Scores are computed again from the kept logarithms of their sums (Dao 2022, algorithm 4)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, u: Tensor, w: Tensor,
                low: Tensor, window: int) -> Tensor:
        import numpy as np

        from manyform.ops.kernels import relative_attention as kernels
        from manyform.ops.kernels.lanes import flat
        q, k, v = (_readable(x) for x in (q, k, v))
        (batch, heads, n, d), keys = q.shape, k.shape[2]
        # A tile's last query and its first key, a multiple of 32, are at column 0 or later, and
        # columns that begin a tile at a multiple of 32.
        origin = window + 62 + (keys - n - window + 1) % 32
        distances = -(-(origin + 64) // 64) * 64
        far = rows.new_zeros(1, heads, distances, d)
        count = min(len(rows), window)
        far[0, :, origin - count + 1:origin + 1] = rows[:count].flip(0).transpose(0, 1)
        span = (window + 126) // 32 * 32
        y = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
        peaks = torch.empty(batch, heads, n)
        u, w = u.contiguous(), w.contiguous()
        run: Any = kernels.forward
        run(*_placed(q, k, v, far), flat(u), flat(w), heads, n, keys, d, low.numpy(), origin, span,
            np.float32(LOG2E / math.sqrt(d)), flat(y), _strides(y), peaks.numpy(),
            *_scratch(keys, d, distances, span, False))
        ctx.save_for_backward(q, k, v, far, u, w, low, y, peaks)
        ctx.sizes = origin, span, len(rows), count
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        import numpy as np

        from manyform.ops.kernels import relative_attention as kernels
        from manyform.ops.kernels.lanes import flat
        q, k, v, far, u, w, low, y, peaks = ctx.saved_tensors
        origin, span, length, count = ctx.sizes
        dy = _readable(dy.to(q.dtype))
        (batch, heads, n, d), keys, distances = q.shape, k.shape[2], far.shape[2]
        dq = torch.empty(batch, n, heads, d, dtype=q.dtype)
        dk, dv = (torch.empty(batch, keys, heads, d, dtype=q.dtype) for _ in range(2))
        d_far = torch.zeros(batch, heads, d, distances)
        du, dw = torch.zeros(2, batch, heads, d)
        scale = 1 / math.sqrt(d)
        run: Any = kernels.backward
        run(*_placed(q, k, v, far, dy, y), flat(u), flat(w), heads, n, keys, d, low.numpy(), origin,
            span, np.float32(scale * LOG2E), np.float32(scale), peaks.numpy(), flat(dq), flat(dk),
            flat(dv), d_far.numpy(), flat(du), flat(dw),
            *_scratch(keys, d, distances, span, True))
        near = d_far.sum(0)[..., origin - count + 1:origin + 1].flip(2) * scale
        d_rows = F.pad(near.permute(2, 0, 1), (0, 0, 0, 0, 0, length - count)).to(q.dtype)
        dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
        return dq, dk, dv, d_rows, du.sum(0) * scale, dw.sum(0) * scale, None, None


def _placed(*tensors: Tensor) -> list[Any]:
    from manyform.ops.kernels.lanes import flat
    return [part for x in tensors for part in (flat(x), _strides(x))]


def _scratch(keys: int, d: int, distances: int, span: int, gradient: bool) -> tuple[Any, ...]:
    from manyform.ops.kernels import relative_attention as kernels
    workers = threads()
    floats, words, halves = kernels.scratch(keys, d, distances, span, gradient)
    return (torch.arange(span, dtype=torch.float32).numpy(), torch.empty(workers, floats).numpy(),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"))


def _one_query(q: Tensor, *_: Any, **__: Any) -> bool:
    return q.shape[2] == 1


@relative_attention.path("folded", when=_one_query)
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, weight: Tensor, u: Tensor, w: Tensor,
      start: Tensor | None = None, *, window: int) -> Tensor:
    heads, d = q.shape[1], q.shape[3]
    low = max(0, k.shape[2] - window)
    k, v = k[:, :, low:], v[:, :, low:]
    seen = k.shape[2]
    scale = 1 / math.sqrt(d)
    content, place = ((q + bias[:, None]).to(q.dtype) * scale for bias in (u, w))
    folded = place @ weight.to(q.dtype).view(heads, d, -1)  # (B, H, 1, M)
    score = content @ k.mT + folded @ table[:seen].flip(0).to(q.dtype).T
    p = score.float() if score.dtype != torch.float64 else score
    if start is not None:
        index = torch.arange(low, low + seen, device=q.device)
        p = p.masked_fill((index < start[:, :1])[:, None, None], -math.inf)
    return p.softmax(-1).to(v.dtype) @ v
