"""The form of attention that trains on a CPU's matrix tiles: see `kernels.attention`.

Forward: for 32 queries, scores against 256 keys at a time by tile products, an online softmax on
vectors, and a tile product with the values; only y and one number a query are kept. Backward: for
128 keys, scores are computed again, transposed, so that one pass yields what the products for dq,
dk and dv read. Blocks that nothing sees are skipped, so a window or packed documents cost less.
Products are of bfloat16 and summed in float32; softmax and all sums are float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable

MULTIPLE = 32
LOG2E = math.log2(math.e)
NARROW = 4
"""A window this many times shorter than the sequence is left to the loops of sparse attention."""


def applies(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, *, prefix: int = 0,
            window: int | None = None, sinks: int = 0, slopes: Tensor | None = None,
            scale: float | None = None) -> bool:
    """True for bfloat16 on a CPU with tiles and self-attention from the start; heads of so many
    features that padding them to whole tiles at most doubles the work, and beside sinks, which are
    intervals, of whole tiles and without ALiBi."""
    length, d = q.shape[2:]
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16 and length == k.shape[2]
            and length >= MULTIPLE and MULTIPLE // 2 <= d <= 256 and v.shape[3] == d
            and (sinks == 0 or window is None or (slopes is None and d % MULTIPLE == 0))
            and usable(q, k, v)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, *,
                    prefix: int = 0, window: int | None = None, sinks: int = 0,
                    slopes: Tensor | None = None, scale: float | None = None) -> Tensor:
    """`attention` for the arguments that `applies` accepts."""
    length, d = q.shape[2:]
    n, wide = (-(-size // MULTIPLE) * MULTIPLE for size in (length, d))
    first = _first_visible(start, q.shape[0], length, n, window)
    scale = 1 / math.sqrt(d) if scale is None else scale
    if window is not None and slopes is None and wide == d and (
            sinks or NARROW * window <= length):
        from manyform.ops.tiled_intervals import tiled_intervals
        low = first[:, None, :length, None]
        high = torch.arange(1, length + 1)[:, None].expand_as(low)
        if sinks:
            begin = _first_visible(start, len(q), length, length, None)[:, None, :, None]
            low = torch.cat([begin, low], -1)
            high = torch.cat([torch.minimum(begin + sinks, low[..., 1:]), high], -1)
        return tiled_intervals(q, k, v, low, high, scale)
    if n > length or wide > d:  # queries after the end see only what they must, without gradient
        q, k, v = (F.pad(x, (0, wide - d, 0, n - length)) for x in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        y = _Tiled.apply(q, k, v, first, slopes, scale)
    else:
        y, _ = _forward(q, k, v, first, slopes, scale)
    return y[:, :, :length, :d]


def _first_visible(start: Tensor | None, batch: int, length: int, n: int, window: int | None,
                   ) -> Tensor:
    """The first key that each query sees, (batch, n), never falling."""
    steps = torch.arange(n)
    first = torch.zeros(batch, n, dtype=torch.int64)
    if start is not None:
        first[:, :length] = start.clamp(min=0)
        first[:, length:] = first[:, length - 1:length]
    return first if window is None else torch.maximum(first, steps - window + 1)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _readable(x: Tensor) -> Tensor:
    """x itself if its rows are dense and pairs of its elements aligned, else a copy."""
    good = x.stride(3) == 1 and not any(s % 2 for s in _strides(x)) and x.data_ptr() % 4 == 0
    return x if good else x.contiguous()


def _bias(slopes: Tensor | None, heads: int, n: int) -> tuple[Any, Any]:
    """Slopes times log2(e), zero for none, and the distances -n, ..., n + 63."""
    if slopes is None:
        return torch.zeros(heads).numpy(), torch.zeros(1).numpy()
    return (slopes.float() * LOG2E).numpy(), torch.arange(-n, n + 64, dtype=torch.float32).numpy()


def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, slopes: Tensor | None, scale: float,
             ) -> tuple[Tensor, Tensor]:
    import numpy as np

    from manyform.ops.kernels import attention as kernels
    from manyform.ops.kernels.lanes import flat
    q, k, v = (_readable(x) for x in (q, k, v))
    batch, heads, n, d = q.shape
    groups, workers = k.shape[1], threads()
    y = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
    peaks = torch.empty(batch, heads, n)
    packed = torch.empty(2, batch * groups, n * d // 2, dtype=torch.int32)
    columns, pairs = packed.numpy().view("u4")
    block = kernels.SIDE * kernels.KEYS + kernels.SIDE * d
    floats = torch.empty(workers, block + kernels.SIDE * 17)
    halves = torch.empty(workers, block, dtype=torch.int16).numpy().view("u2")
    kernels.pack(flat(k).view("u4"), flat(v), _strides(k), _strides(v), batch, groups, n, d,
                 columns, pairs)
    kernels.forward(flat(q), _strides(q), columns, pairs, heads, groups, first.numpy(),
                    np.float32(scale * LOG2E), *_bias(slopes, heads, n), flat(y), _strides(y),
                    peaks.numpy(), floats.numpy(), halves)
    return y, peaks


class _Tiled(torch.autograd.Function):
    """The backward pass of Dao 2022 (FlashAttention, algorithm 4), scores transposed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, slopes: Tensor | None,
                scale: float) -> Tensor:
        y, peaks = _forward(q, k, v, first, slopes, scale)
        ctx.save_for_backward(q, k, v, y, peaks, first, slopes)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        import numpy as np

        from manyform.ops.kernels import attention as kernels
        from manyform.ops.kernels.lanes import flat
        q, k, v, y, peaks, first, slopes = ctx.saved_tensors
        q, k, v, dy = (_readable(x) for x in (q, k, v, dy))
        batch, heads, n, d = q.shape
        groups, workers = k.shape[1], threads()
        last = torch.searchsorted(first, torch.arange(n).repeat(batch, 1), right=True)
        dq, dk, dv = (torch.empty(batch, n, heads, d, dtype=q.dtype) for _ in range(3))
        sizes = kernels.scratch(n, d)
        floats = torch.empty(workers, sizes[0])
        words = torch.empty(workers, sizes[1], dtype=torch.int32).numpy().view("u4")
        halves = torch.empty(workers, sizes[2], dtype=torch.int16).numpy().view("u2")
        kernels.backward(
            flat(q), flat(q).view("u4"), _strides(q), flat(k), _strides(k), flat(v), _strides(v),
            flat(dy), flat(dy).view("u4"), _strides(dy), flat(y), _strides(y), heads, groups,
            first.numpy(), last.numpy(), np.float32(ctx.scale * LOG2E), *_bias(slopes, heads, n),
            peaks.numpy(), np.float32(ctx.scale), flat(dq), flat(dk), flat(dv), floats.numpy(),
            words, halves)
        if heads > groups:
            dk, dv = (x.view(batch, n, groups, -1, d).sum(3, dtype=torch.float32).to(x.dtype)
                      for x in (dk, dv))
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None, None
