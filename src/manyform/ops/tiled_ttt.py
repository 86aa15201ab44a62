"""The forms of test-time training that train on a CPU's matrix tiles: see `kernels.ttt` and
`kernels.ttt_mlp`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import dense, threads, usable

SIZE, WIDEST, DEEPEST = 16, 256, 4


def applies(q: Tensor, v: Tensor, scale: Tensor, initial: tuple[Tensor, ...],
            position: Tensor | None) -> bool:
    """True for bfloat16 on a CPU with tiles, up to four layers of 16, 32, ... 256 features,
    mini-batches of up to 16 tokens, and none under way."""
    if not (v.dtype == torch.bfloat16 and usable(q, v) and len(scale) <= SIZE and v.shape[1] > 1
            and len(initial) <= DEEPEST
            and all(n % 16 == 0 and n <= WIDEST for n in _sizes(initial))):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported() and (position is None or not position.any())


def tiled_ttt(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
              initial: tuple[Tensor, ...], weights: tuple[Tensor, ...], reset: Tensor | None,
              ) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor]:
    """`ttt` from the beginning of a mini-batch on: y; weights and sums; position. q, k, v:
    bfloat16; the rest float32."""
    starts, fresh, position = mini_batches(v.shape[0], v.shape[1], len(scale), reset)
    y, *after = _TiledTTT.apply(
        q, k, v, rate, scale, norm, torch.cat([w.flatten(1) for w in initial], 1),
        torch.cat([w.flatten(2) for w in weights], 2), starts, fresh, _sizes(initial))
    areas = [w[0].numel() for w in initial]
    parts = [tuple(w.view(*w.shape[:2], *i.shape[1:])
                   for w, i in zip(part.split(areas, 2), initial, strict=True)) for part in after]
    return y, parts, position


def _sizes(initial: tuple[Tensor, ...]) -> list[int]:
    """Features before, between and behind the layers."""
    return [initial[0].shape[1] - 1, *(w.shape[2] for w in initial)]


def mini_batches(batch: int, length: int, size: int, reset: Tensor | None,
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """starts: (B, N + 1) int64, where each row's mini-batches begin, `length` after the last;
    fresh: (B, N) bool, those that begin a document; position: (B,), tokens of the last one, 0 if
    it is full."""
    if reset is None:
        starts = torch.arange(0, length + size, size).clamp(max=length)[:-(-length // size) + 1]
        return (starts.expand(batch, -1), torch.zeros(batch, len(starts) - 1, dtype=torch.bool),
                torch.full((batch,), length % size))
    steps = torch.arange(length)
    latest = torch.where(reset, steps, -1).cummax(dim=1).values
    slot = torch.where(latest >= 0, steps - latest, steps) % size
    begins = slot == 0
    block = begins.cumsum(1) - 1
    count = int(block.max()) + 1
    starts = torch.full((batch, count + 2), length)
    starts.scatter_(1, torch.where(begins, block, count + 1), steps.expand(batch, -1))
    starts = starts[:, :-1]
    starts[:, -1] = length
    fresh = F.pad(reset, (0, 1)).gather(1, starts[:, :-1])
    return starts, fresh, (slot[:, -1] + 1) % size


class _TiledTTT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor,
                norm: Tensor, initial: Tensor, weights: Tensor, starts: Tensor, fresh: Tensor,
                sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        from manyform.ops.kernels.lanes import flat
        q, k, v = (dense(x) for x in (q, k, v))
        tasks, chunks = v.shape[0] * v.shape[2], fresh.shape[1]
        kernel, shapes, wide = _kernel(sizes)
        whole = sum(a * b for a, b in itertools.pairwise(wide))
        if shapes:
            kept = [torch.empty(tasks, -(-chunks // kernel.GROUP), whole + sum(wide[1:]))]
        else:
            kept = [torch.empty(tasks, chunks, whole, dtype=torch.bfloat16),
                    torch.empty(tasks, chunks, wide[1])]
        after = weights.clone(memory_format=torch.contiguous_format)
        sums, y = torch.zeros_like(after), torch.empty(v.shape, dtype=v.dtype)
        read = (q, k, v, rate, scale, norm, initial, starts, fresh)
        kernel.forward(*_arguments(*read), _rows(after), _rows(sums), flat(y), *shapes,
                       *_numpy(kept), *_scratch(kernel, wide))
        ctx.save_for_backward(*read, *kept)
        ctx.sizes = sizes
        return y, after, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dweights: Tensor, dsums: Tensor) -> Any:
        from manyform.ops.kernels.lanes import flat
        read, kept = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
        v, rate, scale = read[2:5]
        kernel, shapes, wide = _kernel(ctx.sizes)
        heads, d, tasks = v.shape[2], v.shape[3], len(kept[0])
        before = dweights.clone(memory_format=torch.contiguous_format)
        dq, dk, dv = (torch.empty(v.shape, dtype=v.dtype) for _ in range(3))
        drate, dnorm = torch.empty(rate.shape), torch.zeros(tasks, 2 * d)
        dscale, dinitial = torch.zeros(tasks, SIZE), torch.zeros(before.shape)
        kernel.backward(*_arguments(*read), _rows(before), _rows(dsums.contiguous()),
                        flat(dy.to(v.dtype).contiguous()), *shapes, *_numpy(kept),
                        *(flat(x) for x in (dq, dk, dv, drate)), dnorm.numpy(), dscale.numpy(),
                        _rows(dinitial), *_scratch(kernel, wide))
        dnorm = dnorm.view(-1, heads, 2, d).sum(0).transpose(0, 1)
        return (dq, dk, dv, drate, dscale.sum(0)[:len(scale)], dnorm, dinitial.sum(0), before,
                None, None, None)


def _kernel(sizes: list[int]) -> tuple[Any, tuple[Any, ...], list[int]]:
    """The module for so many layers, what it is told of their sizes, and sizes in whole tiles."""
    from manyform.ops.kernels import ttt, ttt_mlp
    wide = [-(-n // 64) * 64 for n in sizes]
    if len(sizes) == 2:
        return ttt, (), wide
    areas = [a * b for a, b in itertools.pairwise(wide)]
    return ttt_mlp, (np.array(sizes), np.array(wide), np.cumsum([0, *areas[:-1]]),
                     np.cumsum([0, *wide[1:-1]])), wide


def _numpy(tensors: Any) -> list[Any]:
    return [x.view(torch.int16).numpy().view("u2") if x.dtype == torch.bfloat16 else x.numpy()
            for x in tensors]


def _rows(x: Tensor) -> Any:
    """(B, H, ...) -> (B H, ...), a row a head."""
    return x.detach().reshape(x.shape[0] * x.shape[1], -1).numpy()


def _arguments(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
               initial: Tensor, starts: Tensor, fresh: Tensor) -> tuple[Any, ...]:
    """What both kernels read first."""
    from manyform.ops.kernels.lanes import flat
    heads, d = v.shape[2:]
    minus = F.pad(-scale.detach(), (0, SIZE - len(scale))).numpy()
    strides = np.array([x.stride()[:3] for x in (q, k, v, rate)])
    return (*(flat(x) for x in (q, k, v, rate)),
            norm.detach().transpose(0, 1).reshape(heads, 2 * d).numpy(),
            initial.detach().reshape(heads, -1).numpy(), minus, strides,
            (v.shape[1], heads, d, len(scale)), starts.contiguous().numpy(), fresh.numpy())


def _scratch(kernel: Any, wide: list[int]) -> tuple[Any, Any, Any]:
    workers = threads()
    floats, halves, words = kernel.scratch(wide[0] if len(wide) == 2 else wide)
    return (torch.zeros(workers, floats).numpy(),
            torch.zeros(workers, halves, dtype=torch.int16).numpy().view("u2"),
            torch.zeros(workers, words, dtype=torch.int32).numpy().view("u4"))
