"""The neural long-term memory of Titans: a network that learns with momentum, and forgets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops import tiled_titans
from manyform.ops.fast_weights import SILU, Blocks, Weights, where
from manyform.ops.operation import operation


class NeuralMemory(NamedTuple):
    """memory, momentum: M_t and S_t, (B, H, inputs, outputs) a layer; start: M before the current
    chunk; position: (B,) int64, tokens of the chunk so far."""

    memory: Weights
    momentum: Weights
    start: Weights
    position: Tensor


def _flops(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor, log_momentum: Tensor,
           initial: Weights, chunk: int, state: NeuralMemory | None = None,
           reset: Tensor | None = None) -> int:
    sizes = [w[0].numel() for w in initial]
    return rate.numel() * (8 * sum(sizes) + 2 * sum(sizes[1:]))


@operation(flops=_flops)
def titans(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor, log_momentum: Tensor,
           initial: Weights, chunk: int, state: NeuralMemory | None = None,
           reset: Tensor | None = None) -> tuple[Tensor, NeuralMemory]:
    """S_t = eta_t S_{t-1} - theta_t grad l(M'; x_t),   M_t = (1 - alpha_t) M_{t-1} + S_t,
    y_t = M_t(q_t),   l(M; x) = |M(k) - v|^2

    with M' the memory before the chunk of `chunk` tokens that t is in (Behrouz 2025, "Titans:
    Learning to Memorize at Test Time", eq. 8 to 15 and section 3.2). The memory is a network of
    linear layers with SiLU between.

    q, k, v: (B, T, H, D); rate theta, log_keep log(1 - alpha), log_momentum log(eta): (B, T, H);
    initial: (H, inputs, outputs) a layer, the memory at a document's beginning; reset: (B, T)
    bool, true where a document begins.
    Returns y: (B, T, H, D) in the dtype of v, and the state in float32 (float64 for float64 input),
    in which all is computed.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    memory, momentum, start, position = _start(len(q), initial, state, wide)
    fresh = _expand(len(q), initial, wide)
    q_, k_, v_, rates, keeps, moves = (x.to(wide).transpose(1, 2) for x in (
        q, k, v, rate, log_keep.exp(), log_momentum.exp()))
    ys = []
    with torch.autocast(v.device.type, enabled=False):
        for t in range(q.shape[1]):
            if reset is not None:
                memory, start = (where(reset[:, t], fresh, w) for w in (memory, start))
                momentum = where(reset[:, t], _zeros(momentum), momentum)
                position = torch.where(reset[:, t], 0, position)
            inputs, results = SILU.run(start, k_[:, :, t:t + 1])
            errors = SILU.gradients(start, results, 2 * (results[-1] - v_[:, :, t:t + 1]))
            step, keep, move = (x[:, :, t, None, None] for x in (rates, keeps, moves))
            momentum = tuple(move * s - step * i.mT @ e
                             for s, i, e in zip(momentum, inputs, errors, strict=True))
            memory = tuple(keep * m + s for m, s in zip(memory, momentum, strict=True))
            ys.append(SILU.run(memory, q_[:, :, t:t + 1])[1][-1])
            position = (position + 1) % chunk
            start = where(position == 0, memory, start)
    y = torch.cat(ys, dim=2).transpose(1, 2)
    return y.to(v.dtype), NeuralMemory(memory, momentum, start, position)


@titans.path("dual")
def _(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor, log_momentum: Tensor,
      initial: Weights, chunk: int, state: NeuralMemory | None = None,
      reset: Tensor | None = None) -> tuple[Tensor, NeuralMemory]:
    """A chunk at a time, as matrix products; see `fast_weights`. With A_ts and E_ts what the
    forgetting and the momentum leave at t of step s, M_t = A_t M + (A E)_t S - (A E theta)_ts g_s.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, heads = len(q), q.shape[2]
    with torch.autocast(v.device.type, enabled=False):
        old = _start(batch, initial, state, wide)
        blocks = Blocks(batch, q.shape[1], chunk, None if state is None else old.position, reset,
                        q.device)

        def parts(x: Tensor) -> list[Tensor]:
            """(B, T, H, ...) -> a chunk's (B H, C, ...) each; zeros where there is no token:"""
            return [c.flatten(0, 1) for c in blocks.split(x.to(wide)).transpose(2, 3).unbind(1)]
        # nothing is learned there, nothing forgotten,
        rates, keeps, moves = (blocks.split(x.to(wide)).transpose(2, 3) for x in (
            rate, log_keep, log_momentum))
        moved, move_all = _decays(moves)
        kept, keep_all = _decays(keeps)
        kept = kept * blocks.valid[:, :, None, None]  # nor is momentum added there
        pushed = -moved * rates[..., None, :]
        share, mix = kept @ pushed, (kept @ move_all[..., None])
        # What M and S of before weigh in M_t, for every t, and in the next M and S.
        weigh = torch.stack([keep_all, mix[..., 0]], -1)
        last = torch.stack([share[..., -1, :], pushed[..., -1, :]], -1)
        step = torch.stack([weigh[..., -1, :], F.pad(move_all[..., -1:], (1, 0))], -2)
        shares, weighs, lasts, steps = ([c.flatten(0, 1) for c in x.unbind(1)]
                                        for x in (share, weigh, last, step))
        new = blocks.fresh.any(0).tolist() if reset is not None else [False] * blocks.count
        fresh = [torch.cat([w, torch.zeros_like(w)], 1).repeat(batch, 1, 1)
                 for w in (i.to(wide) for i in initial)]
        both = [torch.cat([m, s], 2).flatten(0, 1)
                for m, s in zip(old.memory, old.momentum, strict=True)]
        held, ys = [], []
        for n, (q_, k_, v_) in enumerate(zip(*map(parts, (q, k, v)), strict=True)):
            if new[n]:
                mask = blocks.fresh[:, n].repeat_interleave(heads)[:, None, None]
                both = [torch.where(mask, f, z) for f, z in zip(fresh, both, strict=True)]
            begin = None
            if n == 0 and state is not None:
                begin = where(blocks.fresh[:, 0], _expand(batch, initial, wide), old.start)
            held.append((both, begin))
            inputs, errors = _learn(both, begin, k_, v_)
            ys.append(_read(q_, both, inputs, errors, shares[n], weighs[n]))
            both = [_next(z, i, e, lasts[n], steps[n])
                    for z, i, e in zip(both, inputs, errors, strict=True)]
        y = blocks.join(torch.stack(ys, dim=1).unflatten(0, (batch, heads)).permute(0, 2, 3, 1, 4))
        memory, momentum = zip(*(z.unflatten(0, (batch, heads)).chunk(2, 2) for z in both),
                               strict=True)
        start = where(blocks.position == 0, memory, _begun(held, blocks, heads))
    return y.to(v.dtype), NeuralMemory(memory, momentum, start, blocks.position)


def _tiles(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor, log_momentum: Tensor,
           initial: Weights, chunk: int, state: NeuralMemory | None = None,
           reset: Tensor | None = None) -> bool:
    sizes = [initial[0].shape[1], *(w.shape[2] for w in initial)]
    return tiled_titans.applies(v, sizes, chunk, None if state is None else state.position)


@titans.path("tiles", when=_tiles)
def _(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_keep: Tensor, log_momentum: Tensor,
      initial: Weights, chunk: int, state: NeuralMemory | None = None,
      reset: Tensor | None = None) -> tuple[Tensor, NeuralMemory]:
    wide = torch.float32
    begin = tuple(w.to(wide) for w in initial)
    memory, momentum, *_ = _start(len(q), begin, state, wide)
    y, (memory, momentum, start), position = tiled_titans.tiled_titans(
        q.to(v.dtype), k.to(v.dtype), v, rate.to(wide), log_keep.to(wide), log_momentum.to(wide),
        begin, chunk, memory, momentum, reset)
    return y, NeuralMemory(memory, momentum, start, position)


def _learn(both: list[Tensor], begin: Weights | None, k: Tensor, v: Tensor,
           ) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of every layer of the memory for keys (B H, C, D), and the gradients behind it, at
    the M of [M; S], or at `begin`."""
    if begin is not None:
        weights = tuple(w.flatten(0, 1) for w in begin)
        inputs, results = SILU.run(weights, k)
        return inputs, SILU.gradients(weights, results, 2 * (results[-1] - v))
    inputs, results = [k], []
    for z in both:  # S times zero, which is cheaper than to cut M out and its gradient in again
        results.append(torch.cat([inputs[-1], torch.zeros_like(inputs[-1])], -1) @ z)
        inputs.append(SILU.activation(results[-1]))
    errors = [2 * (results[-1] - v)]
    for z, made in zip(reversed(both[1:]), reversed(results[:-1]), strict=True):
        errors.append((errors[-1] @ z.mT).chunk(2, -1)[0] * SILU.slope(made))
    return inputs[:-1], errors[::-1]


def _read(x: Tensor, both: list[Tensor], inputs: list[Tensor], errors: list[Tensor], share: Tensor,
          weigh: Tensor) -> Tensor:
    """The results of M_t for x (B H, C, D): see `fast_weights`."""
    for i, z in enumerate(both):
        x = SILU.activation(x) if i else x
        base = (weigh[..., None] * x[..., None, :]).flatten(-2) @ z
        x = torch.baddbmm(base, share * (x @ inputs[i].mT), errors[i])
    return x


def _next(both: Tensor, inputs: Tensor, errors: Tensor, last: Tensor, step: Tensor) -> Tensor:
    """[M; S] (B H, 2 inputs, outputs) after the chunk."""
    learned = (last[..., None] * inputs[..., None, :]).flatten(-2).mT @ errors
    return torch.baddbmm(learned.view(len(both), 2, -1), step, both.view(len(both), 2, -1)
                         ).view(both.shape)


def _begun(held: list[tuple[list[Tensor], Weights | None]], blocks: Blocks, heads: int) -> Weights:
    """The memory before the chunk of every row's last token."""
    def of(n: int) -> Weights:
        both, begin = held[n]
        return begin or tuple(z.chunk(2, 1)[0].unflatten(0, (-1, heads)) for z in both)
    if blocks.plain:
        return of(-1)
    ends = blocks.valid.any(-1).sum(1).tolist()
    return tuple(torch.stack([of(n - 1)[layer][row] for row, n in enumerate(ends)])
                 for layer in range(len(held[0][0])))


def _decays(logs: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) log factors -> what is left at t of step s <= t, (..., C, C), and of all before,
    (..., C)."""
    total = logs.cumsum(-1)
    gaps = total[..., :, None] - total[..., None, :]
    later = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=gaps.device).triu(1)
    return gaps.masked_fill(later, -torch.inf).exp(), total.exp()


def _zeros(weights: Weights) -> Weights:
    return tuple(torch.zeros_like(w) for w in weights)


def _expand(batch: int, initial: Weights, wide: torch.dtype) -> Weights:
    return tuple(w.to(wide).expand(batch, -1, -1, -1) for w in initial)


def _start(batch: int, initial: Weights, state: NeuralMemory | None, wide: torch.dtype,
           ) -> NeuralMemory:
    if state is None:
        memory = _expand(batch, initial, wide)
        return NeuralMemory(memory, _zeros(memory), memory,
                            torch.zeros(batch, dtype=torch.int64, device=memory[0].device))
    memory, momentum, start = (tuple(w.to(wide) for w in part) for part in (
        state.memory, state.momentum, state.start))
    return NeuralMemory(memory, momentum, start, state.position)
