"""What the gates of a chunk of Titans give: the weights of every step on every other, and back.

With keep_t and move_t the products of the chunk's decays up to step t, of the memory and of the
momentum, and rate_s the learning rate of step s (names as in `kernels.titans`):

    moved_ts = move_t / move_s    push_ts = -rate_s moved_ts     s <= t
    kept_tr = keep_t / keep_r     share_ts = sum_r kept_tr push_rs
    mix_t = sum_r kept_tr move_r
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, get, load, splat, store, total, turn
from manyform.ops.kernels.strips import SIZE
from manyform.ops.kernels.tiles import exp2

SQUARE = SIZE * SIZE
KEEP, MIX, MOVE, RATE = 0, SIZE, 2 * SIZE, 3 * SIZE
"""Where `lines` holds what is of each step."""
KEPT, MOVED, PUSH, SHARE = (i * SQUARE for i in range(4))
"""Where `pairs` holds what is of two steps each."""
_LOG2E = np.float32(1.4426950408889634)
_FORGET = np.float32(-200)
"""A log decay whose factor is exactly 0 in float32."""


@numba.njit(fastmath=FAST, cache=True)
def gates(rate, log_keep, log_momentum, strides, row, head, first, steps, lines, pairs):
    """All that the gates of a chunk give; after its end nothing is forgotten nor learned."""
    at_rate = row * strides[3, 0] + first * strides[3, 1] + head * strides[3, 2]
    at_keep = row * strides[4, 0] + first * strides[4, 1] + head * strides[4, 2]
    at_move = row * strides[5, 0] + first * strides[5, 1] + head * strides[5, 2]
    keep = move = np.float32(0)
    for t in range(SIZE):
        if t < steps:
            keep += max(get(log_keep, at_keep + t * strides[4, 1]), _FORGET) * _LOG2E
            move += max(get(log_momentum, at_move + t * strides[5, 1]), _FORGET) * _LOG2E
            lines[RATE + t] = get(rate, at_rate + t * strides[3, 1])
        else:
            lines[RATE + t] = 0
        lines[KEEP + t], lines[MOVE + t] = keep, move
    zero, kept, moved = splat(np.float32(0)), load(lines, KEEP), load(lines, MOVE)
    rates = load(lines, RATE)
    for t in range(SIZE):
        store(pairs, KEPT + t * SIZE, exp2(splat(lines[KEEP + t]) - kept))
        store(pairs, MOVED + t * SIZE, exp2(splat(lines[MOVE + t]) - moved))
        for s in range(t + 1, SIZE):
            pairs[KEPT + t * SIZE + s] = 0
            pairs[MOVED + t * SIZE + s] = 0
        store(pairs, PUSH + t * SIZE, zero - load(pairs, MOVED + t * SIZE) * rates)
    store(lines, KEEP, exp2(kept))
    store(lines, MOVE, exp2(moved))
    for t in range(SIZE):
        acc, mix = zero, np.float32(0)
        for r in range(t + 1):
            factor = pairs[KEPT + t * SIZE + r]
            acc = acc + splat(factor) * load(pairs, PUSH + r * SIZE)
            mix += factor * lines[MOVE + r]
        store(pairs, SHARE + t * SIZE, acc)
        lines[MIX + t] = mix


@numba.njit(fastmath=FAST, cache=True)
def gates_back(lines, pairs, dlines, dpairs, spare):
    """Gradients of keep, mix, move, share and push -> those of the log decays and the rates, in the
    first, the third and the fourth line."""
    kept, moved = pairs[KEPT:KEPT + SQUARE], pairs[MOVED:MOVED + SQUARE]
    push, dpush = pairs[PUSH:PUSH + SQUARE], dpairs[PUSH:PUSH + SQUARE]
    dshare = dpairs[SHARE:SHARE + SQUARE]
    zero = splat(np.float32(0))
    turn(push, 0, SIZE, spare, 0, SIZE)
    keeps, moves, rates, dmove = zero, zero, zero, load(dlines, MOVE)
    for t in range(SIZE):
        acc = splat(dlines[MIX + t]) * load(lines, MOVE)
        for s in range(t + 1):
            acc = acc + splat(dshare[t * SIZE + s]) * load(spare, s * SIZE)
            factor = splat(kept[t * SIZE + s])
            store(dpush, s * SIZE, load(dpush, s * SIZE) + factor * load(dshare, t * SIZE))
        dmove = dmove + splat(dlines[MIX + t]) * load(kept, t * SIZE)
        acc = acc * load(kept, t * SIZE)
        keeps = keeps - acc
        dlines[KEEP + t] = dlines[KEEP + t] * lines[KEEP + t] + total(acc)
    store(dlines, MOVE, dmove * load(lines, MOVE))
    for t in range(SIZE):
        acc = load(dpush, t * SIZE)
        rates = rates - acc * load(moved, t * SIZE)
        acc = acc * load(push, t * SIZE)
        moves = moves - acc
        dlines[MOVE + t] += total(acc)
    store(dlines, RATE, rates)
    store(dlines, KEEP, load(dlines, KEEP) + keeps)
    store(dlines, MOVE, load(dlines, MOVE) + moves)
    for back in range(1, SIZE):
        t = SIZE - 1 - back
        dlines[KEEP + t] += dlines[KEEP + t + 1]
        dlines[MOVE + t] += dlines[MOVE + t + 1]
