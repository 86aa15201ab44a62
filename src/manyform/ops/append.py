"""Growing a cache by a few steps at a time, in amortised constant time a step, without surprises.

`torch.cat` copies the whole cache for every token. `append` returns the same tensor, but keeps
spare capacity behind it: a second append to the newest view writes there and returns a longer view
of the same memory. A mark on the storage says how far it has been written. Whoever appends to an
older view (a fork) finds the mark beyond its end and gets a copy, so no holder of a tensor ever
sees it change.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_lock = threading.Lock()


class _Buffer:
    """What the storage of a growing cache carries: its full shape and how far it is written."""

    __slots__ = ("dim", "mark", "shape", "strides")

    def __init__(self, shape: tuple[int, ...], dim: int, mark: int) -> None:
        self.shape, self.dim, self.mark = shape, dim, mark
        self.strides = _strides(shape)


def append(cache: Tensor, new: Tensor, dim: int) -> Tensor:
    """torch.cat([cache, new], dim), amortised: n appends of one step cost O(n) in all.

    cache and new agree in dtype, device and every dimension but `dim` (not negative). Where
    gradients are recorded for either, this is torch.cat. The result shares memory with `cache`
    where nobody else has written behind it; neither argument is ever seen to change.
    """
    if torch.is_grad_enabled() and (cache.requires_grad or new.requires_grad):
        return torch.cat([cache, new], dim)
    old, total = cache.shape[dim], cache.shape[dim] + new.shape[dim]
    storage: Any = cache.untyped_storage()
    start = _claim(storage, cache, total, dim)
    if start is None:
        shape: list[int] = list(cache.shape)
        shape[dim] = 2 * total + 16
        whole = cache.new_empty(shape)
        storage, start = whole.untyped_storage(), 0
        storage.growing = _Buffer(tuple(shape), dim, total)
        whole.narrow(dim, 0, old).copy_(cache)
        stride, offset = storage.growing.strides, 0
    else:
        stride, offset = cache.stride(), int(cache.storage_offset())
        # .data: its own version counter, so that a graph which saved an earlier view is not told
        # that this view changed. It did not.
        whole = cache.data
    size = list(cache.shape)
    size[dim] = total
    grown = whole.as_strided(size, stride, offset)
    grown.narrow(dim, old, total - old).copy_(new.detach())
    return grown


def _claim(storage: Any, cache: Tensor, total: int, dim: int) -> int | None:
    """Reserve the room behind `cache` in its buffer; where the view begins, or None if taken."""
    buffer = getattr(storage, "growing", None)
    if buffer is None or buffer.dim != dim:
        return None
    if cache.is_inference() != torch.is_inference_mode_enabled():  # torch forbids writing there
        return None
    shape = list(cache.shape)
    shape[dim] = buffer.shape[dim]
    stride = buffer.strides
    if tuple(shape) != buffer.shape or cache.stride() != stride or stride[dim] == 0:
        return None
    start, rest = divmod(int(cache.storage_offset()), stride[dim])
    end = start + cache.shape[dim]
    with _lock:
        if rest or end != buffer.mark or start + total > buffer.shape[dim]:
            return None
        buffer.mark = start + total
    return start


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
