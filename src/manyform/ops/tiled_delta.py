"""The form of the delta rule that trains on a CPU's matrix tiles: see `kernels.delta_tiles`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import dense, threads, usable
from manyform.ops.tiled_decay import weak

SIZE = 64


def applies(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, reset: Tensor | None,
            ) -> bool:
    """True for bfloat16 on a CPU with tiles, for heads of whole tiles and more than half a chunk;
    where decays are of a channel only if they are weak and nothing resets."""
    if not (v.dtype == torch.bfloat16 and usable(q, k, v, log_decay)
            and k.shape[-1] % 32 == 0 and v.shape[-1] % 32 == 0 and v.shape[1] > SIZE // 2):
        return False
    from manyform.ops.kernels.tiles import supported
    if not supported():
        return False
    return log_decay is None or log_decay.ndim == 3 or (reset is None and weak(log_decay))


def tiled_delta(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None,
                log_decay: Tensor | None, state: Tensor, reset: Tensor | None, scale: float,
                ) -> tuple[Tensor, Tensor]:
    """`matrix_recurrence` with the erase term (a, b), b None where it is k.

    q, k, v, a, b: (B, T, H, .) bfloat16; log_decay: None, (B, T, H) or (B, T, H, K) and state
    (B, H, K, V) float32. Decays of a channel: see `tiled_decay.LIMIT`.
    """
    return _TiledDelta.apply(q, k, v, a, b, log_decay, state, reset, scale)


def _arguments(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None, g: Tensor,
               reset: Tensor | None, scale: float, dy: Tensor | None = None) -> tuple[Any, ...]:
    """What both kernels read first, and dy."""
    from manyform.ops.kernels.lanes import flat
    dy = v if dy is None else dy
    rows = (q, a, k, k if b is None else b, v, g, dy)
    strides = np.array([x.stride()[:3] for x in rows])
    starts = torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous()
    dims = (*k.shape[:3], k.shape[-1], v.shape[-1])
    lines = [flat(x) for x in (q, a, k, k if b is None else b, v, g)]
    return (*lines, starts.numpy(), strides, dims, np.float32(scale), g.ndim == 4,
            b is not None), flat(dy)


def _scratch(key: int, value: int, two: bool) -> tuple[Any, Any, Any]:
    from manyform.ops.kernels.delta_tiles import scratch
    workers = threads()
    floats, halves, words = scratch(key, value, 2 * SIZE if two else SIZE)
    return (torch.empty(workers, floats).numpy(),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"))


class _TiledDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None,
                log_decay: Tensor | None, state: Tensor, reset: Tensor | None, scale: float,
                ) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import delta_tiles
        from manyform.ops.kernels.lanes import flat
        q, k, v, a = (dense(x) for x in (q, k, v, a))
        b = None if b is None else dense(b)
        g = state.new_zeros(1).expand(v.shape[:3]) if log_decay is None else log_decay
        g = dense(g) if g.ndim == 4 else g
        batch, length, heads, value = v.shape
        key, chunks, tasks = k.shape[-1], -(-length // SIZE), batch * heads
        after = state.clone(memory_format=torch.contiguous_format)
        y = torch.empty(v.shape, dtype=v.dtype)
        kept = [torch.empty(tasks, chunks, n, dtype=torch.bfloat16)
                for n in (key * value, SIZE * SIZE, SIZE * value)]
        arguments, _ = _arguments(q, k, v, a, b, g, reset, scale)
        kernel: Any = delta_tiles.forward
        kernel(*arguments, after.view(tasks, -1).numpy(), flat(y), *_numpy(kept),
               *_scratch(key, value, b is not None))
        ctx.save_for_backward(q, k, v, a, b, g, reset, *kept)
        ctx.scale, ctx.decays = scale, log_decay is not None
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> Any:
        from manyform.ops.kernels import delta_tiles
        from manyform.ops.kernels.lanes import flat
        q, k, v, a, b, g, reset, *kept = ctx.saved_tensors
        dy = dense(dy.to(v.dtype))
        dbefore = dstate.float().clone(memory_format=torch.contiguous_format)
        dq, dk, da, db = (torch.empty(k.shape, dtype=k.dtype) for _ in range(4))
        dv, dg = torch.empty(v.shape, dtype=v.dtype), torch.empty(g.shape)
        arguments, line = _arguments(q, k, v, a, b, g, reset, ctx.scale, dy)
        kernel: Any = delta_tiles.backward
        kernel(*arguments, dbefore.view(len(kept[0]), -1).numpy(), line, *_numpy(kept),
               *(flat(x) for x in (dq, da, dk, db, dv, dg)),
               *_scratch(k.shape[-1], v.shape[-1], b is not None))
        return (dq, dk, dv, da, None if b is None else db, dg if ctx.decays else None, dbefore,
                None, None)


def _numpy(tensors: list[Tensor]) -> list[Any]:
    return [x.view(torch.int16).numpy().view("u2") for x in tensors]
