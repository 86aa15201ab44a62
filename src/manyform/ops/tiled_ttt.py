"""The form of TTT-Linear that trains on a CPU's matrix tiles: see `kernels.ttt`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import dense, threads, usable
from manyform.ops.tiled_delta import _numpy

SIZE, WIDEST = 16, 128


def applies(q: Tensor, v: Tensor, scale: Tensor, layers: int, position: Tensor | None) -> bool:
    """True for bfloat16 on a CPU with tiles, one layer, heads of 16, 32, ... 128 features,
    mini-batches of up to 16 tokens, and none under way."""
    if not (layers == 1 and v.dtype == torch.bfloat16 and usable(q, v) and len(scale) <= SIZE
            and v.shape[-1] % 16 == 0 and v.shape[-1] <= WIDEST and v.shape[1] > 1):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported() and (position is None or not position.any())


def tiled_ttt(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
              initial: Tensor, weights: Tensor, reset: Tensor | None,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ttt` of one layer from the beginning of a mini-batch on: y, weights, sums, position.

    q, k, v: (B, T, H, D) bfloat16; weights: (B, H, D + 1, D) float32.
    """
    starts, fresh, position = mini_batches(v.shape[0], v.shape[1], len(scale), reset)
    y, weights, sums = _TiledTTT.apply(q, k, v, rate, scale, norm, initial, weights, starts, fresh)
    return y, weights, sums, position


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
                ) -> tuple[Tensor, Tensor, Tensor]:
        from manyform.ops.kernels import ttt as kernel
        from manyform.ops.kernels.lanes import flat
        q, k, v = (dense(x) for x in (q, k, v))
        batch, _, heads, d = v.shape
        tasks, chunks, wide = batch * heads, fresh.shape[1], -(-d // 64) * 64
        after = weights.clone(memory_format=torch.contiguous_format)
        sums, y = torch.zeros_like(after), torch.empty(v.shape, dtype=v.dtype)
        states = torch.empty(tasks, chunks, wide * wide, dtype=torch.bfloat16)
        biases = torch.empty(tasks, chunks, wide)
        read = (q, k, v, rate, scale, norm, initial, starts, fresh)
        run: Any = kernel.forward
        run(*_arguments(*read), _rows(after), _rows(sums), flat(y), *_numpy([states]),
            biases.numpy(), *_scratch(wide))
        ctx.save_for_backward(*read, states, biases)
        return y, after, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dweights: Tensor, dsums: Tensor) -> Any:
        from manyform.ops.kernels import ttt as kernel
        from manyform.ops.kernels.lanes import flat
        *read, states, biases = ctx.saved_tensors
        v, rate, scale = read[2], read[3], read[4]
        heads, d = v.shape[2:]
        before = dweights.clone(memory_format=torch.contiguous_format)
        dq, dk, dv = (torch.empty(v.shape, dtype=v.dtype) for _ in range(3))
        drate, dnorm = torch.empty(rate.shape), torch.zeros(len(states), 2 * d)
        dscale, dinitial = torch.zeros(len(states), SIZE), torch.zeros(before.shape)
        run: Any = kernel.backward
        run(*_arguments(*read), _rows(before), _rows(dsums.contiguous()),
            flat(dy.to(v.dtype).contiguous()), *_numpy([states]), biases.numpy(),
            *(flat(x) for x in (dq, dk, dv, drate)), dnorm.numpy(), dscale.numpy(),
            _rows(dinitial), *_scratch(biases.shape[-1]))
        dnorm = dnorm.view(-1, heads, 2, d).sum(0).transpose(0, 1)
        return (dq, dk, dv, drate, dscale.sum(0)[:len(scale)], dnorm, dinitial.sum(0), before,
                None, None)


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


def _scratch(wide: int) -> tuple[Any, Any, Any]:
    from manyform.ops.kernels.ttt import scratch
    workers = threads()
    floats, halves, words = scratch(wide)
    return (torch.zeros(workers, floats).numpy(),
            torch.zeros(workers, halves, dtype=torch.int16).numpy().view("u2"),
            torch.zeros(workers, words, dtype=torch.int32).numpy().view("u4"))
