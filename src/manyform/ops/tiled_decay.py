"""The form of the recurrence without erase that trains on a CPU's matrix tiles: see
`kernels.decay_tiles`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable

SIZE = 64
LIMIT = 110.0
"""Largest total log decay b of a chunk, a channel: its factors exp(c_i - b / 2) and
exp(b / 2 - c_j) stay far from the ends of float32's and bfloat16's range."""


def applies(k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None) -> bool:
    """True on a CPU with tiles, for keys of whole tiles and long enough sequences; resets only
    where no decay is of a channel, and these only where they are weak.

    k: (B, T, G, K); v: (B, T, H, V); g: None, (B, T, H) or (B, T, H, K).
    """
    if not (usable(k, v, g) and k.shape[-1] % 32 == 0 and v.shape[-1] >= 32
            and v.shape[1] >= SIZE // 2 and (g is None or g.dtype == torch.float32)):
        return False
    from manyform.ops.kernels.tiles import supported
    if not supported():
        return False
    return g is None or g.ndim == 3 or (reset is None and weak(g, 60.0))


def weak(g: Tensor, limit: float = LIMIT) -> bool:
    """True if no channel's log decays (B, T, H, K) sum below -limit within a chunk."""
    g = F.pad(g.detach(), (0, 0, 0, 0, 0, -g.shape[1] % SIZE))
    return bool(g.unflatten(1, (-1, SIZE)).sum(2).amin() >= -limit)


def tiled_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor,
                reset: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`matrix_recurrence` without erase.

    q, k: (B, T, G, K), v: (B, T, H, V) bfloat16, G = H for decays of a channel; log_decay: None,
    (B, T, H) or (B, T, H, K) and state (B, H, K, V) float32.
    """
    if log_decay is None and reset is not None:
        log_decay = state.new_zeros(1).expand(v.shape[:3])
    return _TiledDecay.apply(q, k, v, log_decay, state, reset, scale)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _parts(tasks: int, heads: int) -> int:
    """Into how many parts the heads of a group are cut, so that every thread has work."""
    return min((n for n in range(1, heads + 1) if heads % n == 0 and tasks * n >= threads()),
               default=heads)


def _arguments(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None,
               scale: float, parts: int, dy: Tensor) -> tuple[Any, ...]:
    """What both kernels read first."""
    from manyform.ops.kernels.lanes import flat
    kind = 0 if g is None else g.ndim - 2
    g = torch.zeros(1).expand(v.shape[:3]) if g is None else g
    strides = np.array([x.stride()[:3] for x in (q, k, v, g, dy)])
    starts = torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous()
    batch, length, heads, width = v.shape
    dims = (batch, length, heads, k.shape[-1], width, width + -width % 32, k.shape[2], parts)
    return (*(flat(x) for x in (q, k, v, g)), starts.numpy(), strides, dims, np.float32(scale),
            kind)


def _scratch(key: int, value: int) -> tuple[Any, Any, Any]:
    from manyform.ops.kernels.decay_tiles import scratch
    workers = threads()
    floats, halves, words = scratch(key, value)
    # zeros, since the sums of log decays stay as they are where there are none
    return (torch.zeros(workers, floats).numpy(),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"))


class _TiledDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
                reset: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import decay_tiles
        from manyform.ops.kernels.lanes import flat
        q, k, v = (_dense(x) for x in (q, k, v))
        g = _dense(g) if g is not None and g.ndim == 4 else g
        batch, length, heads, width = v.shape
        key, value, chunks = k.shape[-1], width + -width % 32, -(-length // SIZE)
        parts = _parts(batch * k.shape[2], heads // k.shape[2])
        after = _padded(state, value)
        y = torch.empty(v.shape, dtype=v.dtype)
        states = torch.empty(batch * heads, chunks, key * value, dtype=torch.bfloat16)
        kernel: Any = decay_tiles.forward
        kernel(*_arguments(q, k, v, g, reset, scale, parts, v),
               after.view(batch * heads, -1).numpy(), flat(y), _numpy(states),
               *_scratch(key, value))
        ctx.save_for_backward(q, k, v, g, reset, states)
        ctx.scale, ctx.parts = scale, parts
        return y, after[..., :width].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> Any:
        from manyform.ops.kernels import decay_tiles
        from manyform.ops.kernels.lanes import flat
        q, k, v, g, reset, states = ctx.saved_tensors
        dy = _dense(dy.to(v.dtype))
        width = v.shape[-1]
        key, value = k.shape[-1], width + -width % 32
        dbefore = _padded(dstate, value)
        dq, dk = (torch.empty(*k.shape[:3], ctx.parts, key, dtype=k.dtype) for _ in range(2))
        dv, dg = torch.empty(v.shape, dtype=v.dtype), torch.empty(0 if g is None else g.shape)
        kernel: Any = decay_tiles.backward
        kernel(*_arguments(q, k, v, g, reset, ctx.scale, ctx.parts, dy),
               dbefore.view(len(states), -1).numpy(), flat(dy), _numpy(states),
               *(flat(x) for x in (dq, dk, dv, dg)), *_scratch(key, value))
        dq, dk = (x.sum(3) if ctx.parts > 1 else x[:, :, :, 0] for x in (dq, dk))
        return (dq, dk, dv, None if g is None else dg, dbefore[..., :width], None, None)


def _padded(state: Tensor, value: int) -> Tensor:
    """A copy in float32 with `value` columns, the last of which may be zero."""
    out = torch.zeros(*state.shape[:3], value)
    out[..., :state.shape[3]] = state
    return out


def _numpy(x: Tensor) -> Any:
    return x.view(torch.int16).numpy().view("u2")
