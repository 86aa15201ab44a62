"""Attention over intervals of keys on matrix tiles, by meetings of 32 queries and 64 keys.

Which queries meet which keys: see `sparse_plan`. Scores are computed transposed, a row for each
key and a column for each query, so that every query is a lane: its largest score, its sum and its
limits are vectors, and what the products for y, dq, dk and dv read is written as it comes.

Forward, 32 neighbours at a time meet up to 256 keys a step of the online softmax; gathered queries
meet theirs before that, and what they have found so far lies in memory. Backward, 64 keys at a time
meet up to 128 queries, and the sums for these keys lie in cache, those for queries in memory.
Tensors are bfloat16 seen as uint16, flat, with their strides (row, head, step) in elements.
Exponents are base 2.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from manyform.ops.kernels.attention import HIDDEN, SLACK
from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    exponent,
    lanes,
    load,
    log1p,
    mantissa,
    maximum,
    splat,
    store,
    total,
    turn,
)
from manyform.ops.kernels.packing import columns, fetch, gathered, pairs, rows, turned
from manyform.ops.kernels.sparse_plan import KEYS, SIDE
from manyform.ops.kernels.tiles import (
    SHAPE,
    configure,
    exceeds,
    exp2,
    product,
    release,
    store_half,
    store_pairs,
)

STEP = 256
"""Most keys a step of the forward pass: their scores fill two thirds of a 48 KB cache."""
MEETINGS = 4
"""Meetings a step of the backward pass."""
HELD = 32
"""Tiles of queries whose operands are held in the backward pass."""
LEAST = np.float32(-1e20)
"""The largest score so far of a query that has seen nothing: far below others, far above HIDDEN."""
LOG2E = np.float32(1.4426950408889634)


@intrinsic
def _visible(typing: Any, value: Any, key: Any, low: Any, high: Any) -> Any:
    """The lanes of value with low <= key < high, HIDDEN in the others."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, key, low, high = args
        seen = builder.and_(builder.fcmp_ordered("<=", low, key),
                            builder.fcmp_ordered("<", key, high))
        hidden = ir.Constant(value.type, [float(HIDDEN)] * WIDTH)
        return builder.select(seen, value, hidden)
    return lanes(lanes, lanes, lanes, lanes), code


@numba.njit(fastmath=FAST, cache=True)
def _multiply_rows(into, left, row, right, d, n):
    """Scores, (n, 32) float32: n rows, `row` bytes apart, times columns (addresses)."""
    for j in range(0, n, SIDE):
        product(into + j * 128, 128, True, left + j * row, row, 64, right, 32 * d, 1024, d // 32)


@numba.njit(fastmath=FAST, cache=True)
def _hide(scores, at, n, low, high):
    """Hide from each query, of scores (n, 32), the keys that it does not see."""
    for c in range(0, SIDE, WIDTH):
        first, end = load(low, c), load(high, c)
        for r in range(n):
            j = at + r * SIDE + c
            store(scores, j, _visible(load(scores, j), splat(np.float32(r)), first, end))


@numba.njit(fastmath=FAST, cache=True)
def _soften(scores, n, scale, weights, top, summed, shrink):
    """One step of the online softmax (Milakov 2018): scores (n, 32) to bfloat16 weights in pairs.

    top, summed: (32,), the shift of each query's exponents and its sum. Returns whether what the
    queries have added up so far has to shrink, by the factors in `shrink`.
    """
    shrinks = False
    for c in range(0, SIDE, WIDTH):
        peak = splat(HIDDEN)
        for r in range(0, n, 2):
            peak = maximum(maximum(load(scores, r * SIDE + c), load(scores, r * SIDE + SIDE + c)),
                           peak)
        # The shift need not be the maximum: weights up to 2^SLACK do no harm, and most steps then
        # have nothing to scale down.
        shift = load(top, c)
        peak = peak * splat(scale)
        store(shrink, c, splat(np.float32(1)))
        if exceeds(peak - shift, SLACK):
            peak = maximum(peak, shift)
            factor = exp2(shift - peak)
            store(shrink, c, factor)
            store(summed, c, load(summed, c) * factor)
            shrinks, shift = True, peak
            store(top, c, shift)
        more, more2 = load(summed, c), splat(np.float32(0))
        for r in range(0, n, 2):
            j = r * SIDE + c
            p = exp2(load(scores, j) * splat(scale) - shift)
            o = exp2(load(scores, j + SIDE) * splat(scale) - shift)
            more, more2 = more + p, more2 + o
            store_pairs(weights, r // SIDE * (SIDE * WIDTH) + c * WIDTH + r % SIDE * (WIDTH // 2),
                        p, o)
        store(summed, c, more + more2)
    return shrinks


@numba.njit(fastmath=FAST, cache=True)
def _turn_back(x, d, out):
    """(d, 32) to (32, d)."""
    for r in range(0, d, WIDTH):
        for c in range(0, SIDE, WIDTH):
            turn(x, r * SIDE + c, SIDE, out, c * d + r, d)


@numba.njit(fastmath=FAST, cache=True)
def _meet_far(q_at, q_row, k_at, v_at, d, block_starts, far, far_rows, far_low, far_high, scale,
              found, top, summed, floats, words, halves):
    """What gathered queries find: found (n, d), top and summed (n,), see `_soften`."""
    scores, part = floats[:KEYS * SIDE], floats[KEYS * SIDE:KEYS * SIDE + SIDE * d]
    turned_part = floats[KEYS * SIDE + SIDE * d:KEYS * SIDE + 2 * SIDE * d]
    rest = KEYS * SIDE + 2 * SIDE * d
    top_, summed_, shrink = (floats[rest:rest + SIDE], floats[rest + SIDE:rest + 2 * SIDE],
                             floats[rest + 2 * SIDE:rest + 3 * SIDE])
    q_columns, weights = words[:SIDE * d // 2], words[SIDE * d // 2:]
    w_at = weights.ctypes.data
    for e in range(block_starts[0], block_starts[-1]):
        m, first, n = far[e, 0], far[e, 1], far[e, 2] - far[e, 1]
        gathered(q_at, q_row, far_rows[e], m, SIDE, d, halves.ctypes.data)
        columns(halves.ctypes.data, 2 * d, SIDE, d, q_columns.ctypes.data)
        if e + 1 < block_starts[-1]:
            fetch(q_at, q_row, far_rows[e + 1], far[e + 1, 0], 2 * d)
        fetch(found.ctypes.data, 4 * d, far_rows[e], m, 4 * d)
        _multiply_rows(scores.ctypes.data, k_at + 2 * first * d, 2 * d, q_columns.ctypes.data, d, n)
        if far[e, 3]:
            _hide(scores, 0, n, far_low[e], far_high[e])
        for r in range(SIDE):
            i = far_rows[e, min(r, m - 1)]
            top_[r], summed_[r] = top[i], summed[i]
        _soften(scores, n, scale, weights, top_, summed_, shrink)
        for c in range(0, d, SIDE):
            product(turned_part.ctypes.data + c * 128, 128, True,
                    v_at + 2 * (first * d + c * SIDE), 64, 64 * d, w_at, 1024, 2048, n // SIDE)
        _turn_back(turned_part, d, part)
        for r in range(m):
            i = far_rows[e, r]
            top[i], summed[i], factor = top_[r], summed_[r], splat(shrink[r])
            for c in range(0, d, WIDTH):
                store(found, i * d + c, load(found, i * d + c) * factor + load(part, r * d + c))


@numba.njit(fastmath=FAST, cache=True)
def _meet_near(k_at, v_at, d, e, stop, order, near, near_low, near_high, scale, found, top, summed,
               floats, words):
    """What 32 neighbours find in meetings e ... stop: found (d, 32), top and summed (32,)."""
    scores, shrink = floats[:STEP * SIDE], floats[STEP * SIDE:STEP * SIDE + SIDE]
    q_columns, weights = words[:SIDE * d // 2], words[SIDE * d // 2:]
    while e < stop:
        begin, n = e, 0
        while e < stop and n + KEYS <= STEP:
            meeting = order[e]
            first, more = near[meeting, 1], near[meeting, 2] - near[meeting, 1]
            _multiply_rows(scores.ctypes.data + n * 128, k_at + 2 * first * d, 2 * d,
                           q_columns.ctypes.data, d, more)
            if near[meeting, 3]:
                _hide(scores, n * SIDE, more, near_low[meeting], near_high[meeting])
            n += more
            e += 1
        if _soften(scores, n, scale, weights, top, summed, shrink):
            for c in range(0, SIDE, WIDTH):
                factor = load(shrink, c)
                for r in range(d):
                    store(found, r * SIDE + c, load(found, r * SIDE + c) * factor)
        at = weights.ctypes.data
        while begin < e:  # keys side by side in one product
            first = end = near[order[begin], 1]
            while begin < e and near[order[begin], 1] == end:
                end = near[order[begin], 2]
                begin += 1
            steps = (end - first) // SIDE
            for c in range(0, d, SIDE):
                product(found.ctypes.data + c * 128, 128, False,
                        v_at + 2 * (first * d + c * SIDE), 64, 64 * d, at, 1024, 2048, steps)
            at += steps * 2048


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(q, q_strides, k, k_strides, v, v_strides, heads, groups, n, keys, d, near_starts, near,
            near_low, near_high, tile_starts, order, far_starts, far, far_rows, far_low, far_high,
            sets, scale, y, y_strides, peaks, floats, words, halves):
    """y, and for each query the base-2 logarithm of its sum of exponentials (peaks, (batch, heads,
    n rounded up to 32)).

    Patterns of the plan: (batch or 1) * sets, where head h has the pattern of set h sets / heads. A
    query without keys gets y = 0. floats, words, halves: scratch a worker, see `scratch`.
    """
    workers, batch, tiles = floats.shape[0], peaks.shape[0], peaks.shape[2] // SIDE
    span = (keys + KEYS - 1) // KEYS * KEYS
    patterns = near_starts.shape[0] // sets
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        found, row = floats[w, :SIDE * d], floats[w, SIDE * d:2 * SIDE * d]
        top, summed = floats[w, 2 * SIDE * d:][:SIDE], floats[w, 2 * SIDE * d + SIDE:][:SIDE]
        inner = floats[w, 2 * SIDE * d + 2 * SIDE:]
        memory = inner[(KEYS + STEP + 2 * d + 4) * SIDE:]
        found_far = memory[:tiles * SIDE * d]
        top_far = memory[tiles * SIDE * d:][:tiles * SIDE]
        summed_far = memory[tiles * SIDE * (d + 1):]
        k_rows, v_turned, queries = (halves[w, :span * d], halves[w, span * d:2 * span * d],
                                     halves[w, 2 * span * d:])
        packed = -1
        for task in range(w * batch * heads // workers, (w + 1) * batch * heads // workers):
            b, h = task // heads, task % heads
            group = b * groups + h // (heads // groups)
            p = b % patterns * sets + h * sets // heads
            if group != packed:
                packed = group
                g = h // (heads // groups)
                from_k = k.ctypes.data + 2 * (b * k_strides[0] + g * k_strides[1])
                from_v = v.ctypes.data + 2 * (b * v_strides[0] + g * v_strides[1])
                rows(from_k, 2 * k_strides[2], keys, span, d, k_rows.ctypes.data)
                whole = keys // SIDE * SIDE
                turned(from_v, 2 * v_strides[2], whole, d, v_turned.ctypes.data, inner.ctypes.data)
                for j in range(whole, span, SIDE):
                    rows(from_v + 2 * j * v_strides[2], 2 * v_strides[2],
                         max(min(keys - j, SIDE), 0), SIDE, d, queries.ctypes.data)
                    turned(queries.ctypes.data, 2 * d, SIDE, d, v_turned.ctypes.data + 2 * j * d,
                           inner.ctypes.data)
            k_at, v_at = k_rows.ctypes.data, v_turned.ctypes.data
            q_at = q.ctypes.data + 2 * (b * q_strides[0] + h * q_strides[1])
            q_row = 2 * q_strides[2]
            gathers = far_starts[p, 0] < far_starts[p, -1]
            if gathers:
                found_far[:] = 0
                top_far[:] = LEAST
                summed_far[:] = 0
                _meet_far(q_at, q_row, k_at, v_at, d, far_starts[p], far, far_rows, far_low,
                          far_high, scale, found_far, top_far, summed_far, inner, words[w], queries)
            for tile in range(tiles):
                i0 = tile * SIDE
                count = min(SIDE, n - i0)
                rows(q_at + i0 * q_row, q_row, count, SIDE, d, queries.ctypes.data)
                columns(queries.ctypes.data, 2 * d, SIDE, d, words[w].ctypes.data)
                if gathers:
                    for c in range(0, SIDE, WIDTH):
                        store(top, c, load(top_far, i0 + c))
                        store(summed, c, load(summed_far, i0 + c))
                        for r in range(0, d, WIDTH):
                            turn(found_far, (i0 + c) * d + r, d, found, r * SIDE + c, SIDE)
                else:
                    found[:] = 0
                    top[:] = LEAST
                    summed[:] = 0
                _meet_near(k_at, v_at, d, tile_starts[p, tile], tile_starts[p, tile + 1], order,
                           near, near_low, near_high, scale, found, top, summed, inner, words[w])
                for c in range(0, SIDE, WIDTH):
                    whole_ = load(summed, c)
                    log = exponent(whole_) + log1p(mantissa(whole_) - splat(np.float32(1))
                                                   ) * splat(LOG2E)
                    store(peaks, task * tiles * SIDE + i0 + c, load(top, c) + log)
                for r in range(SIDE):  # a query without keys: its exponentials are then 0
                    if summed[r] == 0:
                        peaks[b, h, i0 + r] = -HIDDEN
                _turn_back(found, d, row)
                for r in range(count):
                    inverse = np.float32(1) / summed[r] if summed[r] != 0 else np.float32(0)
                    at = b * y_strides[0] + h * y_strides[1] + (i0 + r) * y_strides[2]
                    for c in range(0, d, WIDTH):
                        store_half(y, at + c, load(row, r * d + c) * splat(inverse))
        release()


@numba.njit(fastmath=FAST, cache=True)
def _differentiate(scores, slants, n, scale, peaks, dots, at, weights, ds, slot, ds_pairs):
    """p and ds = p (slant - dot) of 32 queries and n keys: rows of left operands, 32 columns from
    `slot` on, and ds also in pairs. scores, slants: (n, 32), q.k and dy.v; peaks, dots: from `at`
    on."""
    wide = MEETINGS * SIDE
    for c in range(0, SIDE, WIDTH):
        peak, dot = load(peaks, at + c), load(dots, at + c)
        for r in range(0, n, 2):
            j, to = r * SIDE + c, r * wide + slot + c
            p = exp2(load(scores, j) * splat(scale) - peak)
            o = exp2(load(scores, j + SIDE) * splat(scale) - peak)
            a = p * (load(slants, j) - dot)
            b = o * (load(slants, j + SIDE) - dot)
            store_half(weights, to, p)
            store_half(weights, to + wide, o)
            store_half(ds, to, a)
            store_half(ds, to + wide, b)
            store_pairs(ds_pairs, r // SIDE * (SIDE * WIDTH) + c * WIDTH + r % SIDE * (WIDTH // 2),
                        a, b)


@numba.njit(fastmath=FAST, cache=True)
def _gather_sums(dk_sum, dv_sum, weights, ds, first, n, slot, steps, q_pairs, dy_pairs, d):
    """Add what `steps` meetings in a row give to the gradients of keys first ... first + n."""
    row = 2 * MEETINGS * SIDE
    for j in range(first, first + n, SIDE):
        at = (j - first) * row + 2 * slot
        for c in range(0, d, SIDE):
            to = 4 * (j * d + c)
            product(dv_sum + to, 4 * d, False, weights + at, row, 64, dy_pairs + c * 64, 1024,
                    d * 64, steps)
            product(dk_sum + to, 4 * d, False, ds + at, row, 64, q_pairs + c * 64, 1024, d * 64,
                    steps)


@numba.njit(fastmath=FAST, cache=True)
def _dots(dy, at, row, y, at_y, row_y, n, d, dots, to):
    """dy.y of n queries, zero up to 32."""
    for i in range(n):
        dot = splat(np.float32(0))
        for j in range(0, d, WIDTH):
            dot = dot + load(dy, at + i * row + j) * load(y, at_y + i * row_y + j)
        dots[to + i] = total(dot)
    dots[to + n:to + SIDE] = 0


@numba.njit(fastmath=FAST, cache=True)
def _finish(x, at, n, d, shrink, row, far, gathers, out, to, hop):
    """Gradients of 32 queries, (d, 32) of x from `at` on and where some were gathered (32, d) of
    far, to n rows of out."""
    _turn_back(x[at:], d, row)
    for r in range(n):
        for c in range(0, d, WIDTH):
            slope = load(row, r * d + c)
            if gathers:
                slope = slope + load(far, at + r * d + c)
            store_half(out, to + r * hop + c, slope * splat(shrink))


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(q, q_strides, k, k_strides, v, v_strides, dy, dy_strides, y, y_strides, heads, groups,
             n, keys, d, near_starts, near, near_low, near_high, tile_starts, order, far_starts,
             far, far_rows, far_low, far_high, sets, scale, shrink, peaks, dq, dk, dv, floats,
             words, halves):
    """dq: (batch, n, heads, d); dk, dv: (batch, keys, heads, d), a query head (sums over groups
    are the caller's). shrink: the factor between s and q.k. floats, words, halves: scratch."""
    workers, batch, tiles = floats.shape[0], peaks.shape[0], peaks.shape[2] // SIDE
    patterns, blocks = near_starts.shape[0] // sets, near_starts.shape[1] - 1
    small, area, wide, few = KEYS * SIDE, KEYS * d, MEETINGS * SIDE, SIDE * d // 2
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores, slants = floats[w, :small], floats[w, small:2 * small]
        dk_sum, dv_sum = floats[w, 2 * small:][:area], floats[w, 2 * small + area:][:area]
        rest = 2 * small + 2 * area
        part, row = floats[w, rest:rest + SIDE * d], floats[w, rest + SIDE * d:][:SIDE * d]
        rest += 2 * SIDE * d
        far_peaks, far_dots = floats[w, rest:rest + SIDE], floats[w, rest + SIDE:][:SIDE]
        dots = floats[w, rest + 2 * SIDE:][:tiles * SIDE]
        dq_sum = floats[w, rest + 2 * SIDE + tiles * SIDE:][:tiles * SIDE * d]
        dq_far = floats[w, rest + 2 * SIDE + tiles * SIDE * (d + 1):]
        half = HELD * few
        q_columns, q_pairs = words[w, :half], words[w, half:2 * half]
        dy_columns, dy_pairs = words[w, 2 * half:3 * half], words[w, 3 * half:4 * half]
        ds_pairs = words[w, 4 * half:][:small // 2]
        far_columns = words[w, 4 * half + small // 2:][:2 * few]
        far_pairs = words[w, 4 * half + small // 2 + 2 * few:]
        weights, ds = halves[w, :KEYS * wide], halves[w, KEYS * wide:][:KEYS * wide]
        k_rows, v_rows = halves[w, 2 * KEYS * wide:][:area], halves[w, 2 * KEYS * wide + area:]
        k_turned, queries = v_rows[area:], v_rows[2 * area:]
        s_at, t_at = scores.ctypes.data, slants.ctypes.data
        k_at, v_at, kt_at = k_rows.ctypes.data, v_rows.ctypes.data, k_turned.ctypes.data
        dk_at, dv_at = dk_sum.ctypes.data, dv_sum.ctypes.data
        w_at, ds_at = weights.ctypes.data, ds.ctypes.data
        held = np.empty(HELD, np.int64)
        for task in range(w * batch * heads // workers, (w + 1) * batch * heads // workers):
            b, h = task // heads, task % heads
            g = h // (heads // groups)
            p = b % patterns * sets + h * sets // heads
            from_k = k.ctypes.data + 2 * (b * k_strides[0] + g * k_strides[1])
            from_v = v.ctypes.data + 2 * (b * v_strides[0] + g * v_strides[1])
            from_q = q.ctypes.data + 2 * (b * q_strides[0] + h * q_strides[1])
            first_dy = b * dy_strides[0] + h * dy_strides[1]
            first_y, first_dq = b * y_strides[0] + h * y_strides[1], (b * n * heads + h) * d
            from_dy = dy.ctypes.data + 2 * first_dy
            k_row, v_row, q_row, dy_row = (2 * k_strides[2], 2 * v_strides[2], 2 * q_strides[2],
                                           2 * dy_strides[2])
            gathers = far_starts[p, 0] < far_starts[p, -1]
            if gathers:
                dq_far[:] = 0
                for i in range(0, n, SIDE):
                    _dots(dy, first_dy + i * dy_strides[2], dy_strides[2], y,
                          first_y + i * y_strides[2], y_strides[2], min(SIDE, n - i), d, dots, i)
            held[:] = -1
            for block in range(blocks):
                j0 = block * KEYS
                count = min(KEYS, keys - j0)
                rows(from_k + j0 * k_row, k_row, count, KEYS, d, k_at)
                rows(from_v + j0 * v_row, v_row, count, KEYS, d, v_at)
                turned(k_at, 2 * d, KEYS, d, kt_at, s_at)
                dk_sum[:] = 0
                dv_sum[:] = 0
                e, stop = near_starts[p, block], near_starts[p, block + 1]
                while e < stop:
                    # Meetings of the same keys with tiles in a row share the products over queries.
                    tile, first, end, slot = near[e, 0], near[e, 1], near[e, 2], 0
                    m, at_k, at_pairs = end - first, 2 * (first - j0) * d, tile % HELD * few * 4
                    while (e < stop and slot < wide and near[e, 0] == tile and near[e, 1] == first
                           and near[e, 2] == end and (slot == 0 or tile % HELD > 0)):
                        i0, place = tile * SIDE, tile % HELD * few * 4
                        queries_here = min(SIDE, n - i0)
                        begins = order[tile_starts[p, tile]] == e
                        if begins and not gathers:
                            _dots(dy, first_dy + i0 * dy_strides[2], dy_strides[2], y,
                                  first_y + i0 * y_strides[2], y_strides[2], queries_here, d, dots,
                                  i0)
                        if held[tile % HELD] != tile:
                            held[tile % HELD] = tile
                            rows(from_q + i0 * q_row, q_row, queries_here, SIDE, d,
                                 queries.ctypes.data)
                            columns(queries.ctypes.data, 2 * d, SIDE, d,
                                    q_columns.ctypes.data + place)
                            pairs(queries.ctypes.data, 2 * d, SIDE, d, q_pairs.ctypes.data + place)
                            rows(from_dy + i0 * dy_row, dy_row, queries_here, SIDE, d,
                                 queries.ctypes.data)
                            columns(queries.ctypes.data, 2 * d, SIDE, d,
                                    dy_columns.ctypes.data + place)
                            pairs(queries.ctypes.data, 2 * d, SIDE, d, dy_pairs.ctypes.data + place)
                        _multiply_rows(s_at, k_at + at_k, 2 * d, q_columns.ctypes.data + place, d,
                                       m)
                        _multiply_rows(t_at, v_at + at_k, 2 * d, dy_columns.ctypes.data + place, d,
                                       m)
                        if near[e, 3]:
                            _hide(scores, 0, m, near_low[e], near_high[e])
                        _differentiate(scores, slants, m, scale, peaks[b, h], dots, i0, weights,
                                       ds, slot, ds_pairs)
                        for c in range(0, d, SIDE):
                            product(dq_sum.ctypes.data + (tile * d + c) * 128, 128, begins,
                                    kt_at + at_k + c * 64, 64, 64 * d, ds_pairs.ctypes.data, 1024,
                                    2048, m // SIDE)
                        if not gathers and order[tile_starts[p, tile + 1] - 1] == e:
                            _finish(dq_sum, i0 * d, queries_here, d, shrink, row, dq_far, False,
                                    dq, first_dq + i0 * heads * d, heads * d)
                        e, tile, slot = e + 1, tile + 1, slot + SIDE
                    _gather_sums(dk_at, dv_at, w_at, ds_at, first - j0, m, 0, slot // SIDE,
                                 q_pairs.ctypes.data + at_pairs, dy_pairs.ctypes.data + at_pairs, d)
                e, stop = far_starts[p, block], far_starts[p, block + 1]
                while e < stop:
                    first, end, slot = far[e, 1], far[e, 2], 0
                    m, at_k = end - first, 2 * (first - j0) * d
                    while e < stop and slot < wide and far[e, 1] == first and far[e, 2] == end:
                        for side in range(2):
                            gathered(from_dy if side else from_q, dy_row if side else q_row,
                                     far_rows[e], far[e, 0], SIDE, d, queries.ctypes.data)
                            columns(queries.ctypes.data, 2 * d, SIDE, d,
                                    far_columns.ctypes.data + side * few * 4)
                            pairs(queries.ctypes.data, 2 * d, SIDE, d, far_pairs.ctypes.data
                                  + (side * MEETINGS + slot // SIDE) * few * 4)
                        if e + 1 < stop:
                            fetch(from_q, q_row, far_rows[e + 1], far[e + 1, 0], 2 * d)
                            fetch(from_dy, dy_row, far_rows[e + 1], far[e + 1, 0], 2 * d)
                        fetch(dq_far.ctypes.data, 4 * d, far_rows[e], far[e, 0], 4 * d)
                        for r in range(SIDE):
                            i = far_rows[e, min(r, far[e, 0] - 1)]
                            far_peaks[r], far_dots[r] = peaks[b, h, i], dots[i]
                        _multiply_rows(s_at, k_at + at_k, 2 * d, far_columns.ctypes.data, d, m)
                        _multiply_rows(t_at, v_at + at_k, 2 * d, far_columns.ctypes.data + few * 4,
                                       d, m)
                        if far[e, 3]:
                            _hide(scores, 0, m, far_low[e], far_high[e])
                        _differentiate(scores, slants, m, scale, far_peaks, far_dots, 0, weights,
                                       ds, slot, ds_pairs)
                        for c in range(0, d, SIDE):
                            product(part.ctypes.data + c * 128, 128, True, kt_at + at_k + c * 64,
                                    64, 64 * d, ds_pairs.ctypes.data, 1024, 2048, m // SIDE)
                        _turn_back(part, d, row)
                        for r in range(far[e, 0]):
                            at = far_rows[e, r] * d
                            for c in range(0, d, WIDTH):
                                store(dq_far, at + c, load(dq_far, at + c) + load(row, r * d + c))
                        e, slot = e + 1, slot + SIDE
                    _gather_sums(dk_at, dv_at, w_at, ds_at, first - j0, m, 0, slot // SIDE,
                                 far_pairs.ctypes.data,
                                 far_pairs.ctypes.data + MEETINGS * few * 4, d)
                for j in range(count):
                    at = ((b * keys + j0 + j) * heads + h) * d
                    for c in range(0, d, WIDTH):
                        store_half(dk, at + c, load(dk_sum, j * d + c) * splat(shrink))
                        store_half(dv, at + c, load(dv_sum, j * d + c))
            for tile in range(tiles):
                i0, met = tile * SIDE, tile_starts[p, tile] < tile_starts[p, tile + 1]
                if not met:
                    dq_sum[i0 * d:(i0 + SIDE) * d] = 0
                if gathers or not met:
                    _finish(dq_sum, i0 * d, min(SIDE, n - i0), d, shrink, row, dq_far, gathers, dq,
                            first_dq + i0 * heads * d, heads * d)
        release()


def scratch(n, keys, d, gathers, gradient):
    """Sizes of one worker's floats, words and halves, forward or backward."""
    n, keys = -(-n // SIDE) * SIDE, -(-keys // KEYS) * KEYS
    if gradient:
        wide, small, area = MEETINGS * SIDE, KEYS * SIDE, KEYS * d
        return (2 * small + 2 * area + 2 * SIDE * d + 2 * SIDE + n * (d + 1) + gathers * n * d,
                (2 * HELD + 1) * SIDE * d + small // 2 + gathers * MEETINGS * SIDE * d,
                2 * KEYS * wide + 3 * area + SIDE * d)
    return (2 * SIDE * d + (KEYS + STEP + 2 * d + 6) * SIDE + gathers * n * (d + 2),
            SIDE * (d + STEP) // 2, 2 * keys * d + SIDE * d)
