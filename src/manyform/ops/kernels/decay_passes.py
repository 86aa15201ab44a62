"""Torch tensors in and out of the loops of `kernels.decay`."""

from __future__ import annotations

import torch
from torch import Tensor

from manyform.ops.kernels import decay as kernel
from manyform.ops.kernels import threads
from manyform.ops.kernels.lanes import flat

_NONE = torch.zeros(1)


def _factor(factor: Tensor | None, batch: int) -> tuple[object, int, int]:
    """The factor's memory, its kind, and whether all rows of the batch share it."""
    if factor is None:
        return flat(_NONE), 0, 0
    return (flat(factor.contiguous()), 1 if factor.shape[-1] == 1 else 2,
            int(factor.shape[0] < batch))


def gather(x: Tensor, factor: Tensor | None, groups: int, size: int, dtype: torch.dtype,
           scale: float) -> Tensor:
    """scale * x (B, T, H, D) * factor (B or 1, N, C, H, D or 1) -> (B N G, C, H/G D)."""
    batch, length, heads, width = x.shape
    out = torch.empty(batch * (length // size) * groups, size, heads // groups * width, dtype=dtype)
    threads()
    kernel.gather(flat(x), x.stride()[:3], *_factor(factor, batch), kernel.np.float32(scale),
                  flat(out), (batch, length // size, groups, size, heads // groups, width))
    return out


def scatter(rows: Tensor, factor: Tensor | None, groups: int, width: int, like: Tensor,
            dtype: torch.dtype, own: Tensor | None) -> Tensor:
    """rows * factor, as (B, T, H, D), plus own (B N G, C, 1) * like (B, T, H, D)."""
    batch, length = like.shape[:2]
    size, heads = rows.shape[1], rows.shape[2] // width
    out = torch.empty(batch, length, groups * heads, width, dtype=dtype)
    mine = _NONE if own is None else own.float().contiguous()
    threads()
    kernel.scatter(flat(rows.contiguous()), *_factor(factor, batch), flat(mine),
                   int(own is not None), flat(like), like.stride()[:3], flat(out),
                   (batch, length // size, groups, size, heads, width))
    return out


def _decays(keep: Tensor | None, enter: Tensor | None, leave: Tensor | None, add: Tensor,
            ) -> tuple[object, ...]:
    """The three factors in one layout, whether there is one for each key feature, whether the batch
    shares them, whether there are any."""
    if keep is None:
        return (flat(_NONE),) * 3 + (0, 0, 0)
    _, _, groups, _, heads, _ = add.shape
    one = keep.new_ones(())
    parts = torch.broadcast_tensors(keep, *(one if x is None else x for x in (enter, leave)))
    parts = [x.expand(-1, -1, groups, -1, heads, -1).float().contiguous() for x in parts]
    return (*map(flat, parts), int(parts[0].shape[3] > 1), int(parts[0].shape[0] < add.shape[0]), 1)


def carry(start: Tensor, add: Tensor, keep: Tensor | None, enter: Tensor | None,
          leave: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `chunked_decay._carry`; entering in the shape of add."""
    batch, chunks, groups, keys, heads, value = add.shape
    entering, last = torch.empty_like(add), torch.empty(start.shape)
    threads()
    kernel.carry(flat(start.contiguous()), flat(add), *_decays(keep, enter, leave, add),
                 flat(entering), flat(last), tuple(add.shape))
    return entering, last


def carry_back(end: Tensor, add: Tensor, keep: Tensor | None, enter: Tensor | None,
               leave: Tensor | None, entering: Tensor, last: Tensor,
               ) -> tuple[Tensor, Tensor, Tensor]:
    """See `chunked_decay._carry_back`; leaving in the shape of add."""
    leaving, first, db = torch.empty_like(add), torch.empty(end.shape), torch.empty(add.shape[:-1])
    threads()
    kernel.carry_back(flat(end.contiguous()), flat(add), *_decays(keep, enter, leave, add),
                      flat(entering.contiguous()), flat(last.contiguous()), flat(leaving),
                      flat(first), flat(db), tuple(add.shape))
    return leaving, first, db


def products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, heads: int) -> Tensor:
    """a . b - c . d over each of `heads` parts of the last dimension: (X, C, heads)."""
    out = torch.empty(*a.shape[:2], heads)
    threads()
    kernel.dots(flat(a), flat(b), flat(c), flat(d), flat(out), out.numel(), a.shape[2] // heads)
    return out


def factors(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g (B, N, C, H, K) -> e^{c - b/2}, e^{b/2 - c} of the same shape and b (B, N, H, K)."""
    batch, chunks, size, heads, width = g.shape
    left, right = torch.empty(g.shape), torch.empty(g.shape)
    ends = torch.empty(batch, chunks, heads, width)
    threads()
    kernel.factors(flat(g), (g.stride(0), g.stride(2), g.stride(3)), flat(left), flat(right),
                   flat(ends), (batch, chunks, heads, size, width))
    return left, right, ends


def decay_gradient(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, db: Tensor) -> Tensor:
    """Rows (B N H, C, K) and db (B, N, H, K, 1) -> the gradient of g (B, T, H, K)."""
    batch, chunks, heads, width, _ = db.shape
    size = q.shape[1]
    out = torch.empty(batch, chunks * size, heads, width)
    threads()
    kernel.decay_gradient(flat(q), flat(dq), flat(k), flat(dk), flat(db), flat(out),
                          (batch, chunks, heads, size, width))
    return out


def step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, scale: float,
         ) -> tuple[Tensor, Tensor]:
    """One token, T = 1: y (B, 1, H, V) in the dtype of v, and the next state."""
    batch, _, heads, value = v.shape
    y, after = torch.empty(v.shape, dtype=v.dtype), torch.empty(state.shape)
    kind = 0
    if decay is None:
        decay = _NONE
    else:
        kind = 1 if decay.ndim == 1 else decay.ndim - 1
        decay = decay.float().contiguous()
    q, k, v, state = (x if x.is_contiguous() else x.contiguous() for x in (q, k, v, state))
    kernel.step(flat(q), flat(k), flat(v), flat(decay), kind, flat(state), kernel.np.float32(scale),
                flat(y), flat(after), (batch, q.shape[2], heads, q.shape[3], value))
    return y, after
