"""The choice of blocks for 32 queries at a time: what their heads pay to compressed keys lies in
cache, a row for each key and a column for each query, until the best blocks are known."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from manyform.ops.kernels.attention import HIDDEN
from manyform.ops.kernels.lanes import FAST, WIDTH, lanes, load, maximum, splat, store
from manyform.ops.kernels.packing import columns, rows
from manyform.ops.kernels.sparse_attention import _hide, _multiply_rows, _visible
from manyform.ops.kernels.sparse_plan import SIDE
from manyform.ops.kernels.tiles import SHAPE, configure, exp2, release


@numba.njit(fastmath=FAST, cache=True)
def _pay(scores, n, scale, paid):
    """Add the softmax of scores (n, 32) over the keys; scores are used up."""
    for c in range(0, SIDE, WIDTH):
        peak, whole = splat(HIDDEN), splat(np.float32(0))
        for r in range(c, n * SIDE, SIDE):
            peak = maximum(load(scores, r), peak)
        for r in range(c, n * SIDE, SIDE):
            p = exp2((load(scores, r) - peak) * splat(scale))
            whole = whole + p
            store(scores, r, p)
        share = splat(np.float32(1)) / whole
        for r in range(c, n * SIDE, SIDE):
            store(paid, r, load(paid, r) + load(scores, r) * share)


@numba.njit(fastmath=FAST, cache=True)
def _value(paid, first, n, wide, steps, blocks, worth):
    """The worth (blocks, 32) of blocks in a document whose first compressed key is `first` of n."""
    times = np.empty(wide + steps - 1, np.float32)
    for gap in range(1 - wide, steps):
        times[gap + wide - 1] = min(wide, steps - gap) - max(0, -gap)
    for j in range(blocks):
        low, high = max(first + steps * j + 1 - wide, first), min(first + steps * (j + 1), n)
        for c in range(0, SIDE, WIDTH):
            value = splat(np.float32(0))
            for key in range(low, high):
                value = value + (load(paid, key * SIDE + c)
                                 * splat(times[key - first - steps * j + wide - 1]))
            store(worth, j * SIDE + c, value)


@intrinsic
def _prefer(typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """The lanes of x where a > b, of y elsewhere."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, x, y = args
        return builder.select(builder.fcmp_ordered(">", a, b), x, y)
    return lanes(lanes, lanes, lanes, lanes), code


@numba.njit(fastmath=FAST, cache=True)
def _best(worth, last, blocks, most, values, which):
    """Of each of 32 queries the `most` blocks of most worth from block 1 to the one before its
    last two, the best first: fills which (most, 32), -1 for none. values: as large.

    A block comes in at the place where it belongs and pushes the others down, all queries at once.
    """
    for i in range(0, most * SIDE, WIDTH):
        store(values, i, splat(HIDDEN))
        store(which, i, splat(np.float32(-1)))
    one = splat(np.float32(1))
    for c in range(0, SIDE, WIDTH):
        end = load(last, c) - one
        for j in range(1, blocks):
            block = splat(np.float32(j))
            value = _visible(load(worth, j * SIDE + c), block, one, end)
            for i in range(c, most * SIDE, SIDE):
                value2, block2 = load(values, i), load(which, i)
                store(values, i, _prefer(value, value2, value, value2))
                store(which, i, _prefer(value, value2, block, block2))
                value, block = (_prefer(value, value2, value2, value),
                                _prefer(value, value2, block2, block))


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def choose(q, q_strides, k, k_strides, heads, groups, n, keys, d, first, count, own, wide, steps,
           block, scale, chosen, floats, words, halves):
    """chosen (batch, groups, n, number) gets the blocks. first, count, own: (batch or 1, n), as in
    the operation; wide, steps: strides a compressed key and a block are long. scale comes
    multiplied by log2(e). floats, words, halves: scratch a worker, see `scratch`."""
    workers, batch, tiles = floats.shape[0], chosen.shape[0], (n + SIDE - 1) // SIDE
    span, number = (keys + SIDE - 1) // SIDE * SIDE, chosen.shape[3]
    total = batch * groups * tiles
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores, paid = floats[w, :span * SIDE], floats[w, span * SIDE:2 * span * SIDE]
        low = floats[w, 2 * span * SIDE:][:SIDE]
        high, worth = floats[w, 2 * span * SIDE + SIDE:][:SIDE], floats[w, 2 * (span + 1) * SIDE:]
        k_rows, queries = halves[w, :span * d], halves[w, span * d:]
        k_at, q_at, columns_at = k_rows.ctypes.data, queries.ctypes.data, words[w].ctypes.data
        most, packed = number - 3, -1
        latest = np.zeros(SIDE, np.float32)
        values, which = np.empty(most * SIDE, np.float32), np.empty(most * SIDE, np.float32)
        for task in range(w * total // workers, (w + 1) * total // workers):
            pair, i0 = task // tiles, task % tiles * SIDE
            b, g, here = pair // groups, pair % groups, min(SIDE, n - i0)
            if pair != packed:
                packed = pair
                rows(k.ctypes.data + 2 * (b * k_strides[0] + g * k_strides[1]), 2 * k_strides[2],
                     keys, span, d, k_at)
            row = b % first.shape[0]
            begin, end, last = keys, 0, 0
            for i in range(i0, i0 + here):
                begin, end = min(begin, first[row, i]), max(end, first[row, i] + count[row, i])
                last = max(last, own[row, i] // block)
            begin = begin // SIDE * SIDE
            m = max(end - begin + SIDE - 1, 0) // SIDE * SIDE
            for r in range(SIDE):
                i = i0 + min(r, here - 1)
                low[r] = first[row, i] - begin
                high[r] = low[r] + count[row, i]
            if last >= number and m > 0:
                paid[:m * SIDE] = 0
                for h in range(g * heads // groups, (g + 1) * heads // groups):
                    rows(q.ctypes.data + 2 * (b * q_strides[0] + h * q_strides[1]
                                              + i0 * q_strides[2]),
                         2 * q_strides[2], here, SIDE, d, q_at)
                    columns(q_at, 2 * d, SIDE, d, columns_at)
                    _multiply_rows(scores.ctypes.data, k_at + 2 * begin * d, 2 * d, columns_at, d,
                                   m)
                    _hide(scores, 0, m, low, high)
                    _pay(scores, m, scale, paid)
            for r in range(here):
                latest[r] = own[row, i0 + r] // block
            for r in range(here):
                i, mine = i0 + r, own[row, i0 + r] // block
                if last >= number and (r == 0 or first[row, i] != first[row, i - 1]):
                    _value(paid, first[row, i] - begin, m, wide, steps, last + 1, worth)
                    _best(worth, latest, last - 1, most, values, which)
                if mine < number:
                    for j in range(number):
                        chosen[b, g, i, j] = j if j <= mine else -1
                else:
                    chosen[b, g, i, 0], chosen[b, g, i, 1], chosen[b, g, i, 2] = 0, mine, mine - 1
                    for j in range(most):
                        chosen[b, g, i, 3 + j] = int(which[j * SIDE + r])
        release()


def scratch(keys, d, blocks):
    """Sizes of one worker's floats, words and halves."""
    keys = -(-keys // SIDE) * SIDE
    return (2 * keys + 2 + blocks) * SIDE, SIDE * d // 2, (keys + SIDE) * d
