"""The form of Titans' memory that trains on a CPU's matrix tiles: see `kernels.titans`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import dense, threads, usable
from manyform.ops.tiled_ttt import mini_batches

SIZE, WIDEST, DEEPEST = 16, 256, 4


def applies(v: Tensor, sizes: list[int], chunk: int, position: Tensor | None) -> bool:
    """True for bfloat16 on a CPU with tiles, memories of up to four layers of 16, 32, ... 256
    features, chunks of up to 16 tokens, and none under way."""
    if not (v.dtype == torch.bfloat16 and usable(v) and chunk <= SIZE and v.shape[1] > 1
            and len(sizes) <= DEEPEST + 1
            and all(n % 16 == 0 and n <= WIDEST for n in sizes)):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported() and (position is None or not position.any())


def tiled_titans(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor,
                 log_momentum: Tensor, initial: tuple[Tensor, ...], chunk: int,
                 memory: tuple[Tensor, ...], momentum: tuple[Tensor, ...], reset: Tensor | None,
                 ) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor]:
    """`titans` from the beginning of a chunk on: y; memory, momentum and the memory before the
    last chunk; position. q, k, v: bfloat16; the rest float32."""
    sizes = [initial[0].shape[1], *(w.shape[2] for w in initial)]
    starts, fresh, position = mini_batches(v.shape[0], v.shape[1], chunk, reset)
    y, *after = _TiledTitans.apply(
        q, k, v, rate, log_keep, log_momentum, torch.cat([w.flatten(1) for w in initial], 1),
        *(torch.cat([w.flatten(2) for w in part], 2) for part in (memory, momentum)), starts,
        fresh, sizes, chunk)
    areas = [w[0].numel() for w in initial]
    parts = [tuple(w.view(*w.shape[:2], *i.shape[1:])
                   for w, i in zip(part.split(areas, 2), initial, strict=True)) for part in after]
    return y, parts, position


class _TiledTitans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor,
                log_momentum: Tensor, initial: Tensor, memory: Tensor, momentum: Tensor,
                starts: Tensor, fresh: Tensor, sizes: list[int], chunk: int) -> Any:
        from manyform.ops.kernels import titans as kernel
        from manyform.ops.kernels.lanes import flat
        q, k, v = (dense(x) for x in (q, k, v))
        wide = [-(-n // 64) * 64 for n in sizes]
        tasks, groups = v.shape[0] * v.shape[2], -(-fresh.shape[1] // kernel.GROUP)
        whole = sum(a * b for a, b in itertools.pairwise(wide))
        memory, momentum = (x.clone(memory_format=torch.contiguous_format)
                            for x in (memory, momentum))
        begin, y = torch.empty_like(memory), torch.empty(v.shape, dtype=v.dtype)
        kept = torch.empty(tasks, groups, 2, whole)
        read = (q, k, v, rate, log_keep, log_momentum, initial, starts, fresh)
        run: Any = kernel.forward
        run(*_arguments(*read, sizes, wide, chunk), *(_rows(x) for x in (memory, momentum, begin)),
            flat(y), kept.numpy(), *_scratch(wide))
        ctx.save_for_backward(*read, kept)
        ctx.shape = sizes, wide, chunk
        return y, memory, momentum, begin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dmemory: Tensor, dmomentum: Tensor, dbegin: Tensor) -> Any:
        from manyform.ops.kernels import titans as kernel
        from manyform.ops.kernels.lanes import flat
        *read, kept = ctx.saved_tensors
        v, rate = read[2], read[3]
        dmemory, dmomentum = (x.clone(memory_format=torch.contiguous_format)
                              for x in (dmemory, dmomentum))
        dinitial = torch.zeros(dmemory.shape)
        dqkv = [torch.empty(v.shape, dtype=v.dtype) for _ in range(3)]
        gates = [torch.empty(rate.shape) for _ in range(3)]
        run: Any = kernel.backward
        run(*_arguments(*read, *ctx.shape),
            *(_rows(x) for x in (dmemory, dmomentum, dbegin.contiguous())),
            flat(dy.to(v.dtype).contiguous()), kept.numpy(), *(flat(x) for x in (*dqkv, *gates)),
            _rows(dinitial), *_scratch(ctx.shape[1]))
        return (*dqkv, *gates, dinitial.sum(0), dmemory, dmomentum, None, None, None, None)


def _rows(x: Tensor) -> Any:
    """(B, H, ...) -> (B H, ...), a row a head."""
    return x.detach().view(x.shape[0] * x.shape[1], -1).numpy()


def _arguments(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor,
               log_momentum: Tensor, initial: Tensor, starts: Tensor, fresh: Tensor,
               sizes: list[int], wide: list[int], chunk: int) -> tuple[Any, ...]:
    """What both kernels read first."""
    from manyform.ops.kernels.lanes import flat
    lines = (q, k, v, rate, log_keep, log_momentum)
    areas = [a * b for a, b in itertools.pairwise(wide)]
    return (*(flat(x) for x in lines), initial.detach().contiguous().numpy(),
            np.array([x.stride()[:3] for x in lines]), np.array(sizes), np.array(wide),
            np.cumsum([0, *areas[:-1]]), (v.shape[1], v.shape[2], chunk),
            starts.contiguous().numpy(), fresh.numpy())


def _scratch(wide: list[int]) -> tuple[Any, Any, Any]:
    from manyform.ops.kernels.titans import scratch
    workers = threads()
    floats, halves, words = scratch(wide)
    return (torch.zeros(workers, floats).numpy(),
            torch.zeros(workers, halves, dtype=torch.int16).numpy().view("u2"),
            torch.zeros(workers, words, dtype=torch.int32).numpy().view("u4"))
