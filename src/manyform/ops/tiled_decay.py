"""The form of the recurrence without erase that trains on a CPU's matrix tiles: see
`kernels.decay_tiles`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import dense, threads, usable

SIZE = 64
LONG, WIDE_KEYS = 128, 128
"""Steps in a chunk, and in one whose keys have so many features that what a chunk does to its state
costs more than its pairs of steps."""
LIMIT = 110.0
"""Largest total log decay b of a chunk, a channel: its factors exp(c_i - b / 2) and
exp(b / 2 - c_j) stay far from the ends of float32's and bfloat16's range."""


class Random(NamedTuple):
    """Random features: projection (key, raw), scaled; eps added to all; top (B, H), the largest
    logarithm of a key so far, -inf at the start. See `ops.kernel_average`."""

    projection: Tensor
    eps: float
    top: Tensor


class Cosine(NamedTuple):
    """relu(x) cos a, relu(x) sin a: cos and sin of every step, (B, T) float32."""

    cos: Tensor
    sin: Tensor


Map = Random | Cosine | None


def applies(k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None) -> bool:
    """True on a CPU with tiles, for keys of whole tiles and long enough sequences; where decays are
    of a channel only if they are weak and nothing resets.

    k: (B, T, G, K); v: (B, T, H, V); g: None, (B, T, H) or (B, T, H, K).
    """
    if not (usable(k, v, g) and k.shape[-1] % 32 == 0 and v.shape[-1] >= 32
            and v.shape[1] >= SIZE // 2 and (g is None or g.dtype == torch.float32)):
        return False
    from manyform.ops.kernels.tiles import supported
    if not supported():
        return False
    return g is None or g.ndim == 3 or (reset is None and weak(g))


def weak(g: Tensor) -> bool:
    """True if no channel's log decays (B, T, H, K) sum below -LIMIT within a chunk."""
    g = F.pad(g.detach(), (0, 0, 0, 0, 0, -g.shape[1] % SIZE))
    return bool(g.unflatten(1, (-1, SIZE)).sum(2).amin() >= -LIMIT)


def tiled_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor,
                reset: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`matrix_recurrence` without erase.

    q, k: (B, T, G, K), v: (B, T, H, V) bfloat16, G = H for decays of a channel; log_decay: None,
    (B, T, H) or (B, T, H, K) and state (B, H, K, V) float32.
    """
    y, last, *_ = _TiledDecay.apply(q, k, v, _kept(log_decay, v, reset), state, None, reset, scale,
                                    None)
    return y, last


def tiled_average(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor,
                  reset: Tensor | None, scale: float, features: Map = None,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tiled_decay`, with a state (B, H, K, V + 1) whose last column sums keys, on features of q
    and k if any; no decay of a channel, and with `Random` none but its own.

    Returns y (B, T, H, V), what a value of 1 would give (B, T, H) float32, the last state, and top.
    """
    width = v.shape[3]
    y, last, weights, norm, top = _TiledDecay.apply(
        q, k, v, _kept(log_decay, v, reset), state[..., :width], state[..., width], reset, scale,
        features)
    return y, weights, torch.cat([last, norm[..., None]], dim=3), top


def _kept(g: Tensor | None, v: Tensor, reset: Tensor | None) -> Tensor | None:
    """A reset is a decay of a head."""
    if g is None and reset is not None:
        return torch.zeros(1).expand(v.shape[:3])
    return g


def _parts(tasks: int, heads: int) -> int:
    """Into how many parts the heads of a group are cut, so that every thread has work."""
    return min((n for n in range(1, heads + 1) if heads % n == 0 and tasks * n >= threads()),
               default=heads)


class _Plan(NamedTuple):
    """What both passes share beside tensors."""

    scale: float
    parts: int
    key: int
    size: int
    learn: bool
    maps: tuple[Any, ...]


def _plan(k: Tensor, v: Tensor, g: Tensor | None, scale: float, features: Map, learn: bool,
          ) -> _Plan:
    from manyform.ops.kernels import decay_rows
    words, none = np.zeros(0, np.uint32), np.zeros(0, np.float32)
    key = k.shape[3]
    maps: tuple[Any, ...] = (decay_rows.PLAIN, np.float32(0), words, words, none, none)
    if isinstance(features, Random):
        rows = features.projection.bfloat16().contiguous()
        key = len(rows)
        ahead = rows.view(torch.int32).t()
        back = rows.view(-1, 2, k.shape[3]).transpose(1, 2).contiguous().view(torch.int32)
        maps = (decay_rows.RANDOM, np.float32(features.eps), *(
            x.contiguous().view(-1).numpy().view("u4") for x in (ahead, back)), none, none)
    elif features is not None:
        key = 2 * key
        maps = (decay_rows.COSINE, np.float32(0), words, words, *(
            x.contiguous().view(-1).numpy() for x in features))
    channel = g is not None and g.ndim == 4
    size = LONG if key >= WIDE_KEYS and v.shape[1] >= LONG and not channel else SIZE
    parts = _parts(v.shape[0] * k.shape[2], v.shape[2] // k.shape[2])
    return _Plan(scale, parts, key, size, learn, maps)


def _arguments(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, reset: Tensor | None, dy: Tensor,
               shifts: Tensor, top: Tensor, plan: _Plan) -> tuple[Any, ...]:
    """What both kernels read first."""
    from manyform.ops.kernels.lanes import flat
    kind = 0 if g is None else g.ndim - 2
    g = torch.zeros(1).expand(v.shape[:3]) if g is None else g
    strides = np.array([x.stride()[:3] for x in (q, k, v, g, dy)])
    starts = torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous()
    batch, length, heads, width = v.shape
    dims = (batch, length, heads, plan.key, width, _padded_width(width), k.shape[2], plan.parts,
            plan.size, k.shape[3], int(plan.learn))
    return (*(flat(x) for x in (q, k, v, g)), starts.numpy(), strides, dims,
            np.float32(plan.scale), kind, plan.maps, shifts.numpy(), top.view(-1).numpy())


def _padded_width(width: int) -> int:
    return width + -width % 32


def _scratch(plan: _Plan, value: int, raw: int) -> tuple[Any, Any, Any]:
    from manyform.ops.kernels.decay_tiles import scratch
    workers = threads()
    floats, halves, words = scratch(plan.size, plan.key, value, raw)
    return (torch.empty(workers, floats).numpy(),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"))


class _TiledDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
                norm: Tensor | None, reset: Tensor | None, scale: float, features: Map,
                ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        from manyform.ops.kernels import decay_tiles
        from manyform.ops.kernels.lanes import flat
        q, k, v = (dense(x) for x in (q, k, v))
        g = dense(g) if g is not None and g.ndim == 4 else g
        batch, length, heads, width = v.shape
        plan = _plan(k, v, g, scale, features, ctx.needs_input_grad[3])
        shifts, top = torch.empty(2, 0), torch.empty(0)
        if isinstance(features, Random):  # which finds its decays on the way
            g, shifts = torch.empty(batch, length, heads), torch.empty(2, batch * heads * length)
            top = features.top.float().clone(memory_format=torch.contiguous_format)
        value, chunks = _padded_width(width), -(-length // plan.size)
        after = _padded(state, value)
        y = torch.empty(v.shape, dtype=v.dtype)
        states = torch.empty(batch * heads, chunks, plan.key * value, dtype=torch.bfloat16)
        normed = norm is not None
        last = torch.empty(0) if norm is None else norm.float().clone(
            memory_format=torch.contiguous_format)
        weights = torch.empty(v.shape[:3] if normed else 0)
        norms = torch.empty(batch * heads * normed, chunks, plan.key)
        kernel: Any = decay_tiles.forward
        kernel(*_arguments(q, k, v, g, reset, v, shifts, top, plan),
               after.view(batch * heads, -1).numpy(), last.view(-1, plan.key).numpy(), flat(y),
               flat(weights), _numpy(states), norms.numpy(), *_scratch(plan, value, k.shape[3]))
        ctx.save_for_backward(q, k, v, g, reset, states, norms, shifts)
        ctx.plan = plan
        ctx.mark_non_differentiable(top)
        return y, after[..., :width].contiguous(), weights, last, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor, dweights: Tensor, dlast: Tensor,
                 dtop: Tensor) -> Any:
        from manyform.ops.kernels import decay_tiles
        from manyform.ops.kernels.lanes import flat
        q, k, v, g, reset, states, norms, shifts = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dy = dense(dy.to(v.dtype))
        width = v.shape[-1]
        value = _padded_width(width)
        before, norm = _padded(dstate, value), dlast.clone(memory_format=torch.contiguous_format)
        dq, dk = (torch.empty(*k.shape[:3], plan.parts, k.shape[3], dtype=k.dtype)
                  for _ in range(2))
        dv = torch.empty(v.shape, dtype=v.dtype)
        dg = torch.empty(0 if g is None else g.shape)
        kernel: Any = decay_tiles.backward
        kernel(*_arguments(q, k, v, g, reset, dy, shifts, torch.empty(0), plan),
               before.view(len(states), -1).numpy(), norm.view(-1, plan.key).numpy(), flat(dy),
               flat(dweights.contiguous()), _numpy(states), norms.numpy(),
               *(flat(x) for x in (dq, dk, dv, dg)), *_scratch(plan, value, k.shape[3]))
        dq, dk = (x.sum(3) if plan.parts > 1 else x[:, :, :, 0] for x in (dq, dk))
        return (dq, dk, dv, dg if plan.learn else None, before[..., :width],
                norm if len(norms) else None, None, None, None)


def _padded(state: Tensor, value: int) -> Tensor:
    """A copy in float32 with `value` columns, the last of which may be zero."""
    out = torch.zeros(*state.shape[:3], value)
    out[..., :state.shape[3]] = state
    return out


def _numpy(x: Tensor) -> Any:
    return x.view(torch.int16).numpy().view("u2")
