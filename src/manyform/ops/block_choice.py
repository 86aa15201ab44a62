"""Which blocks of keys a query reads, judged by the attention that it pays to compressed keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation
from manyform.ops.tiled_attention import LOG2E, _readable, _strides

ROWS = 512
"""Queries at a time, so that no tensor of queries by compressed keys exists whole."""


def _flops(q: Tensor, k: Tensor, first: Tensor, count: Tensor, own: Tensor, *, size: int,
           stride: int, block: int, number: int) -> int:
    pairs = int(count.sum()) * (q.shape[0] // count.shape[0])
    return 2 * q.shape[3] * q.shape[1] * pairs


@torch.no_grad()
def _choose(q: Tensor, k: Tensor, first: Tensor, count: Tensor, own: Tensor, weights: Tensor,
            block: int, number: int) -> Tensor:
    """Choices of some queries; weights: (most compressed keys, most blocks)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, length, d = q.shape
    groups, keys = k.shape[1:3]
    blocks = weights.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q_ = q.to(wide).reshape(batch, groups, heads // groups, length, d)
        score = q_ @ k.to(wide).mT[:, :, None] / math.sqrt(d)
        place = torch.arange(keys, device=q.device)
        seen = (place >= first[..., None]) & (place < (first + count)[..., None])
        seen = seen[:, None, None]
        p = score.masked_fill_(~seen, -math.inf).softmax(-1).nan_to_num_(0).sum(2)
        if bool(first.any()):  # counted from the first of each document
            index = first[..., None] + torch.arange(weights.shape[0], device=q.device)
            here = index < (first + count)[..., None]
            index = index.clamp(max=keys - 1)[:, None].expand(batch, groups, -1, -1)
            p = p.gather(3, index).masked_fill(~here[:, None], 0)
        else:
            p = p[..., :weights.shape[0]]
        worth = p @ weights.to(wide)
    mine = (own // block)[:, None, :, None]
    choice = torch.arange(blocks, device=q.device)
    always = (choice == 0) | (choice == mine) | (choice == mine - 1)
    worth = worth.masked_fill(always, math.inf).masked_fill(choice > mine, -math.inf)
    best, chosen = worth.topk(min(number, blocks), dim=3)
    chosen = chosen.masked_fill(best == -math.inf, -1)
    return torch.nn.functional.pad(chosen, (0, number - chosen.shape[3]), value=-1)


@operation(flops=_flops)
def block_choice(q: Tensor, k: Tensor, first: Tensor, count: Tensor, own: Tensor, *, size: int,
                 stride: int, block: int, number: int) -> Tensor:
    """The `number` blocks of most worth, the first one and the last two always among them.

    worth_j = sum of p[block / stride j + a - b] over 0 <= a < block / stride, over 0 <= b < size /
    stride and over the heads of a group, p = softmax over the visible compressed keys of
    q.k / sqrt(D)
    (Yuan 2025, "Native Sparse Attention", eq. 8 to 12; counted from 0).

    q: (B, H, T, D); k: (B, G, X, D), compressed keys, each of `size` tokens, one every `stride`.
    first, count: (B or 1, T), the place of the first compressed key of the query's document, and
      how many of it the query sees. own: (B or 1, T), the query's position in the document.
    block: tokens a block. Returns (B, G, T, number) int64, blocks counted in the document, -1 for
    none; not differentiable.
    """
    weights = overlaps(int(count.max()), int(own.max()) // block + 1, size // stride,
                       block // stride)
    return _choose(q, k, first, count, own, weights.to(q.device), block, number)


@block_choice.path("chunked", when=lambda q, *a, **o: q.shape[2] > ROWS)
def _(q: Tensor, k: Tensor, first: Tensor, count: Tensor, own: Tensor, *, size: int, stride: int,
      block: int, number: int) -> Tensor:
    found = []
    for i in range(0, q.shape[2], ROWS):
        rows = slice(i, i + ROWS)
        most = int((first + count)[:, rows].max())
        weights = overlaps(int(count[:, rows].max()), int(own[:, rows].max()) // block + 1,
                           size // stride, block // stride)
        found.append(_choose(q[:, :, rows], k[:, :, :max(most, 1)], first[:, rows], count[:, rows],
                             own[:, rows], weights.to(q.device), block, number))
    return torch.cat(found, dim=2)


def _tiles(q: Tensor, k: Tensor, first: Tensor, count: Tensor, own: Tensor, **_: Any) -> bool:
    d = q.shape[3]
    if not (q.dtype == k.dtype == torch.bfloat16 and q.shape[2] >= 32 and k.shape[2]
            and d % 32 == 0 and d <= 256 and usable(q, k, first, count, own)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@block_choice.path("amx", when=_tiles)
@torch.no_grad()
def _(q: Tensor, k: Tensor, first: Tensor, count: Tensor, own: Tensor, *, size: int, stride: int,
      block: int, number: int) -> Tensor:
    import numpy as np

    from manyform.ops.kernels import block_choice as kernels
    from manyform.ops.kernels.lanes import flat
    q, k = _readable(q), _readable(k)
    (batch, heads, n, d), (_, groups, keys, _) = q.shape, k.shape
    rows = max(x.shape[0] for x in (first, count, own))
    places = [x.expand(rows, -1).contiguous().numpy() for x in (first, count, own)]
    chosen = torch.empty(batch, groups, n, number, dtype=torch.int64)
    workers = threads()
    sizes = kernels.scratch(keys, d, int(own.max()) // block + 1)
    choose: Any = kernels.choose
    choose(
        flat(q), _strides(q), flat(k), _strides(k), heads, groups, n, keys, d, *places,
        size // stride, block // stride, block, np.float32(LOG2E / math.sqrt(d)), chosen.numpy(),
        torch.empty(workers, sizes[0]).numpy(),
        torch.empty(workers, sizes[1], dtype=torch.int32).numpy().view("u4"),
        torch.empty(workers, sizes[2], dtype=torch.int16).numpy().view("u2"))
    return chosen


def overlaps(keys: int, blocks: int, wide: int, steps: int) -> Tensor:
    """How often the compressed key i, `wide` strides long, counts for the block j of `steps`
    strides: (keys, blocks)."""
    gap = torch.arange(keys)[:, None] - steps * torch.arange(blocks)
    return sum(((gap + b >= 0) & (gap + b < steps)).float() for b in range(wide))  # type: ignore[return-value]
