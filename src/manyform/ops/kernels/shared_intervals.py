"""Attention over intervals of keys that several heads share, on matrix tiles.

Heads that read the same keys through the same intervals are rows of one product: 32 rows are
32 / `together` queries, each with `together` heads, whose rows are neighbours in memory. A span of
queries is taken at a time, so that all that is summed for it stays in the second-level cache, and
for it every block of 64 keys in turn: the queries of the span that see some of the block meet it,
32 rows a meeting, wherever they stand. Rows are queries throughout, so gathered rows are operands
as they are; the softmax is online (Milakov 2018).

Visits (which queries of a span see which keys of a block): see `sparse_plan.visit`, a span a
pattern. Tensors are bfloat16 seen as uint16, flat, with their strides (row, head, step) in
elements. Exponents are base 2.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.attention import HIDDEN, SLACK
from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    largest,
    load,
    maximum,
    splat,
    store,
    total,
    turn,
)
from manyform.ops.kernels.packing import columns, pairs, rows, turned
from manyform.ops.kernels.sparse_attention import LEAST, _visible
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

MEETINGS = 4
"""Meetings whose sums for keys are made at once in the backward pass."""
SPAN = 2048
"""Rows of 64 features a span has at most: their sums fill a quarter of a cache of 2 MB."""
RAMP = np.arange(KEYS, dtype=np.float32)


@numba.njit(cache=True)
def _meet(visitors, edges, e, stop, most, places, low, high):
    """The next meeting of a block: how many queries, and the keys, one or both halves of the block.

    Fills places, low and high, a query each. Returns (queries, first, end, masked).
    """
    m, first, end, masked = 0, KEYS, 0, False
    while e + m < stop and m < most and (m == 0 or visitors[e + m] != visitors[e + m - 1]):
        a, b = edges[e + m] & 255, edges[e + m] >> 8
        places[m], low[m], high[m] = visitors[e + m], a, b
        first, end = min(first, a), max(end, b)
        m += 1
    first, end = first // SIDE * SIDE, (end + SIDE - 1) // SIDE * SIDE
    for i in range(m):
        if low[i] > first or high[i] < end:
            masked = True
    return m, first, end, masked


@numba.njit(fastmath=FAST, cache=True)
def _take(source, row, head, places, m, together, d, target):
    """The rows of m queries side by side, and zeros up to 32 rows."""
    for i in range(m):
        rows(source + places[i] * row, head, together, together, d,
             target + 2 * i * together * d)
    rows(source, head, 0, SIDE - m * together, d, target + 2 * m * together * d)


@numba.njit(fastmath=FAST, cache=True)
def _mask(scores, m, together, first, n, low, high, ramp):
    """Hide from each query, of scores (32, KEYS), the keys that it does not see."""
    for i in range(m):
        a, b = splat(low[i] - first), splat(high[i] - first)
        for row in range(i * together * KEYS, (i + 1) * together * KEYS, KEYS):
            for j in range(0, n, WIDTH):
                store(scores, row + j, _visible(load(scores, row + j), load(ramp, j), a, b))


@numba.njit(fastmath=FAST, cache=True)
def _soften(scores, places, m, together, n, d, scale, weights, top, summed, found):
    """One step of the online softmax: scores (32, KEYS) to bfloat16 weights.

    top, summed (., 16), found (., d): of all rows of the span, the shift of their exponents, their
    sums and what they have found so far.
    """
    row = 0
    for i in range(m):
        for at in range(places[i] * together, (places[i] + 1) * together):
            peak = maximum(load(scores, row), load(scores, row + WIDTH))
            for j in range(row + SIDE, row + n, SIDE):
                peak = maximum(maximum(load(scores, j), load(scores, j + WIDTH)), peak)
            # The shift need not be the maximum: weights up to 2^SLACK do no harm.
            if exceeds(peak * splat(scale), top[at] + SLACK):
                new = largest(peak) * scale
                shrink = exp2(splat(top[at] - new))
                store(summed, at * WIDTH, load(summed, at * WIDTH) * shrink)
                for j in range(at * d, at * d + d, WIDTH):
                    store(found, j, load(found, j) * shrink)
                top[at] = new
            more, more2, shift = load(summed, at * WIDTH), splat(np.float32(0)), splat(top[at])
            for j in range(row, row + n, SIDE):
                p = exp2(load(scores, j) * splat(scale) - shift)
                o = exp2(load(scores, j + WIDTH) * splat(scale) - shift)
                more, more2 = more + p, more2 + o
                store_half(weights, j, p)
                store_half(weights, j + WIDTH, o)
            store(summed, at * WIDTH, more + more2)
            row += KEYS


@numba.njit(fastmath=FAST, cache=True)
def _add(part, places, m, together, d, sums):
    """Rows of a meeting (32, d) to those of the span."""
    few = together * d
    for i in range(m):
        at, to = i * few, places[i] * few
        for j in range(0, few, WIDTH):
            store(sums, to + j, load(sums, to + j) + load(part, at + j))


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(q, q_strides, k, k_strides, v, v_strides, heads, groups, n, keys, d, starts, visitors,
            edges, sets, together, span, scale, y, y_strides, peaks, ramp, floats, words, halves):
    """y, and for each query the base-2 logarithm of its sum of exponentials (peaks, (batch, heads /
    together, spans * span * together)); y = 0 for a query without keys.

    starts: ((batch or 1) * sets * spans, blocks + 1), the first visit of each block. floats, words,
    halves: scratch a worker, see `scratch`.
    """
    workers, (batch, units) = floats.shape[0], peaks.shape[:2]
    spans, blocks, limit = (n + span - 1) // span, starts.shape[1] - 1, span * together
    patterns = starts.shape[0] // (sets * spans)
    tasks = batch * units * spans
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores, part = floats[w, :SIDE * KEYS], floats[w, SIDE * KEYS:][:SIDE * d]
        rest = floats[w, SIDE * (KEYS + d):]
        top, summed = rest[:limit], rest[limit:limit * (WIDTH + 1)]
        found = rest[limit * (WIDTH + 1):][:limit * d]
        k_at, v_at = words[w].ctypes.data, words[w].ctypes.data + 2 * blocks * KEYS * d
        packing, weights = halves[w, :KEYS * d], halves[w, KEYS * d:][:SIDE * KEYS]
        p_at, w_at, s_at = packing.ctypes.data, weights.ctypes.data, scores.ctypes.data
        places = np.empty(SIDE, np.int64)
        low, high = np.empty(SIDE, np.float32), np.empty(SIDE, np.float32)
        packed = -1
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            b, unit, piece = task // (units * spans), task // spans % units, task % spans
            h, i0 = unit * together, piece * span
            g, count = h * groups // heads, min(span, n - i0)
            if b * groups + g != packed:
                packed = b * groups + g
                from_k = k.ctypes.data + 2 * (b * k_strides[0] + g * k_strides[1])
                from_v = v.ctypes.data + 2 * (b * v_strides[0] + g * v_strides[1])
                for j in range(0, blocks * KEYS, KEYS):
                    here = min(keys - j, KEYS)
                    rows(from_k + 2 * j * k_strides[2], 2 * k_strides[2], here, KEYS, d, p_at)
                    columns(p_at, 2 * d, KEYS, d, k_at + 2 * j * d)
                    rows(from_v + 2 * j * v_strides[2], 2 * v_strides[2], here, KEYS, d, p_at)
                    pairs(p_at, 2 * d, KEYS, d, v_at + 2 * j * d)
            p = (b % patterns * sets + h * sets // heads) * spans + piece
            from_q = q.ctypes.data + 2 * (b * q_strides[0] + h * q_strides[1] + i0 * q_strides[2])
            top[:count * together] = LEAST
            summed[:count * together * WIDTH] = 0
            found[:count * together * d] = 0
            for block in range(blocks):
                e, stop = starts[p, block], starts[p, block + 1]
                while e < stop:
                    m, first, end, masked = _meet(visitors, edges, e, stop, SIDE // together,
                                                  places, low, high)
                    e, size, at = e + m, end - first, 2 * (block * KEYS + first) * d
                    _take(from_q, 2 * q_strides[2], 2 * q_strides[1], places, m, together, d, p_at)
                    for j in range(0, size, SIDE):
                        product(s_at + 4 * j, 4 * KEYS, True, p_at, 2 * d, 64,
                                k_at + at + 2 * j * d, 32 * d, 1024, d // 32)
                    if masked:
                        _mask(scores, m, together, np.float32(first), size, low, high, ramp)
                    _soften(scores, places, m, together, size, d, scale, weights, top, summed,
                            found)
                    for c in range(0, d, SIDE):
                        product(part.ctypes.data + 4 * c, 4 * d, True, w_at, 2 * KEYS, 64,
                                v_at + at + c * 64, 1024, 64 * d, size // SIDE)
                    _add(part, places, m, together, d, found)
            for i in range(count * together):
                whole = total(load(summed, i * WIDTH))
                seen = whole != 0
                peaks[b, unit, i0 * together + i] = top[i] + np.log2(whole) if seen else -HIDDEN
                inverse = splat(np.float32(1) / whole if seen else np.float32(0))
                at = (b * y_strides[0] + (h + i % together) * y_strides[1]
                      + (i0 + i // together) * y_strides[2])
                for j in range(0, d, WIDTH):
                    store_half(y, at + j, load(found, i * d + j) * inverse)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _differentiate(scores, slants, n, scale, peaks, dots, slot, p_pairs, ds, ds_pairs):
    """p and ds = p (slant - dot) of 32 rows and n keys, in pairs of rows, and ds also as rows."""
    for r in range(0, SIDE, 2):
        row, to = r * KEYS, slot * (SIDE * KEYS // 2) + r * (WIDTH // 2)
        peak, peak2, dot, dot2 = (splat(peaks[r]), splat(peaks[r + 1]), splat(dots[r]),
                                  splat(dots[r + 1]))
        for j in range(0, n, WIDTH):
            p = exp2(load(scores, row + j) * splat(scale) - peak)
            o = exp2(load(scores, row + KEYS + j) * splat(scale) - peak2)
            a = p * (load(slants, row + j) - dot)
            b = o * (load(slants, row + KEYS + j) - dot2)
            store_half(ds, row + j, a)
            store_half(ds, row + KEYS + j, b)
            store_pairs(p_pairs, to + j * WIDTH, p, o)
            store_pairs(ds_pairs, to + j * WIDTH, a, b)


@numba.njit(fastmath=FAST, cache=True)
def _sum_keys(sums, left, right, first, n, steps, d):
    """Add to the gradients (d, KEYS) of n keys what `steps` meetings give; all addresses."""
    for c in range(0, d, SIDE):
        for j in range(0, n, SIDE):
            product(sums + 4 * (c * KEYS + first + j), 4 * KEYS, False, left + 64 * c, 64, 64 * d,
                    right + 64 * j, 1024, 64 * KEYS, steps)


@numba.njit(fastmath=FAST, cache=True)
def write_keys(sums, scale, keys, d, spare, out, to, hop):
    """Gradients of keys, (blocks, d, KEYS), to rows of `out` from `to` on, `hop` apart."""
    for j in range(0, keys, WIDTH):
        at = j // KEYS * KEYS * d + j % KEYS
        for c in range(0, d, WIDTH):
            turn(sums, at + c * KEYS, KEYS, spare, 0, WIDTH)
            for r in range(min(keys - j, WIDTH)):
                store_half(out, to + (j + r) * hop + c, load(spare, r * WIDTH) * splat(scale))


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(q, q_strides, k, k_strides, v, v_strides, dy, dy_strides, y, y_strides, heads, groups,
             n, keys, d, starts, visitors, edges, sets, together, span, scale, shrink, peaks, dq,
             dk, dv, ramp, floats, words, halves):
    """dq (batch, n, heads, d) and dk, dv (shares, batch, keys, groups, d), each share that of some
    spans. shrink: the factor between s and q.k. floats, words, halves: scratch a worker, see
    `scratch`."""
    workers, batch = floats.shape[0], peaks.shape[0]
    spans, blocks, limit = (n + span - 1) // span, starts.shape[1] - 1, span * together
    patterns, small, few = starts.shape[0] // (sets * spans), SIDE * KEYS, SIDE * d
    units, area = heads // groups // together, blocks * KEYS * d // 2
    shares = len(dk) // (batch * keys * groups * d)
    tasks = batch * groups * shares
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores, slants = floats[w, :small], floats[w, small:2 * small]
        part, dots = floats[w, 2 * small:2 * small + few], floats[w, 2 * small + few:][:limit]
        dq_sum = floats[w, 2 * small + few + limit:][:limit * d]
        dk_sum = floats[w, 2 * small + few + limit * (d + 1):][:2 * area]
        dv_sum = floats[w, 2 * small + few + limit * (d + 1) + 2 * area:]
        k_at = words[w].ctypes.data
        v_at, kp_at = k_at + 4 * area, k_at + 8 * area
        p_pairs = words[w, 3 * area:][:MEETINGS * small // 2]
        ds_pairs = words[w, 3 * area + MEETINGS * small // 2:][:MEETINGS * small // 2]
        packing, slopes = halves[w, :KEYS * d], halves[w, KEYS * d:][:few]
        ds, turned_q = halves[w, KEYS * d + few:][:small], halves[w, KEYS * d + few + small:]
        pack_at, slope_at, ds_at = packing.ctypes.data, slopes.ctypes.data, ds.ctypes.data
        tq_at = turned_q.ctypes.data
        tdy_at = tq_at + 2 * MEETINGS * few
        s_at, t_at = scores.ctypes.data, slants.ctypes.data
        places = np.empty(SIDE, np.int64)
        low, high = np.empty(SIDE, np.float32), np.empty(SIDE, np.float32)
        peak, dot = np.empty(SIDE, np.float32), np.empty(SIDE, np.float32)
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            pair, share = task // shares, task % shares
            b, g = pair // groups, pair % groups
            from_k = k.ctypes.data + 2 * (b * k_strides[0] + g * k_strides[1])
            from_v = v.ctypes.data + 2 * (b * v_strides[0] + g * v_strides[1])
            for j in range(0, blocks * KEYS, KEYS):
                here = min(keys - j, KEYS)
                rows(from_v + 2 * j * v_strides[2], 2 * v_strides[2], here, KEYS, d, pack_at)
                columns(pack_at, 2 * d, KEYS, d, v_at + 2 * j * d)
                rows(from_k + 2 * j * k_strides[2], 2 * k_strides[2], here, KEYS, d, pack_at)
                columns(pack_at, 2 * d, KEYS, d, k_at + 2 * j * d)
                pairs(pack_at, 2 * d, KEYS, d, kp_at + 2 * j * d)
            dk_sum[:] = 0
            dv_sum[:] = 0
            for piece in range(share, units * spans, shares):
                h, i0 = g * heads // groups + piece // spans * together, piece % spans * span
                count = min(span, n - i0)
                p = (b % patterns * sets + h * sets // heads) * spans + piece % spans
                first_q = b * q_strides[0] + h * q_strides[1] + i0 * q_strides[2]
                first_dy = b * dy_strides[0] + h * dy_strides[1] + i0 * dy_strides[2]
                first_y = b * y_strides[0] + h * y_strides[1] + i0 * y_strides[2]
                from_q, from_dy = q.ctypes.data + 2 * first_q, dy.ctypes.data + 2 * first_dy
                for i in range(count * together):
                    at = first_dy + i // together * dy_strides[2] + i % together * dy_strides[1]
                    to = first_y + i // together * y_strides[2] + i % together * y_strides[1]
                    sum_ = splat(np.float32(0))
                    for j in range(0, d, WIDTH):
                        sum_ = sum_ + load(dy, at + j) * load(y, to + j)
                    dots[i] = total(sum_)
                dq_sum[:count * together * d] = 0
                top = peaks[b, h // together, i0 * together:]
                for block in range(blocks):
                    e, stop, slot, begin, size = starts[p, block], starts[p, block + 1], 0, 0, 0
                    dk_at, dv_at = (dk_sum.ctypes.data + 4 * block * KEYS * d,
                                    dv_sum.ctypes.data + 4 * block * KEYS * d)
                    while e < stop:
                        m, first, end, masked = _meet(visitors, edges, e, stop, SIDE // together,
                                                      places, low, high)
                        if slot == MEETINGS or (slot > 0 and (first, end - first) != (begin, size)):
                            _sum_keys(dk_at, tq_at, ds_pairs.ctypes.data, begin, size, slot, d)
                            _sum_keys(dv_at, tdy_at, p_pairs.ctypes.data, begin, size, slot, d)
                            slot = 0
                        e, begin, size = e + m, first, end - first
                        at = 2 * (block * KEYS + first) * d
                        _take(from_q, 2 * q_strides[2], 2 * q_strides[1], places, m, together, d,
                              pack_at)
                        _take(from_dy, 2 * dy_strides[2], 2 * dy_strides[1], places, m, together, d,
                              slope_at)
                        for j in range(0, size, SIDE):
                            product(s_at + 4 * j, 4 * KEYS, True, pack_at, 2 * d, 64,
                                    k_at + at + 2 * j * d, 32 * d, 1024, d // 32)
                            product(t_at + 4 * j, 4 * KEYS, True, slope_at, 2 * d, 64,
                                    v_at + at + 2 * j * d, 32 * d, 1024, d // 32)
                        turned(pack_at, 2 * d, SIDE, d, tq_at + 2 * slot * few, part.ctypes.data)
                        turned(slope_at, 2 * d, SIDE, d, tdy_at + 2 * slot * few, part.ctypes.data)
                        if masked:
                            _mask(scores, m, together, np.float32(first), size, low, high, ramp)
                        peak[:], dot[:] = -HIDDEN, 0
                        for i in range(m):
                            for r in range(together):
                                peak[i * together + r] = top[places[i] * together + r]
                                dot[i * together + r] = dots[places[i] * together + r]
                        _differentiate(scores, slants, size, scale, peak, dot, slot, p_pairs, ds,
                                       ds_pairs)
                        for c in range(0, d, SIDE):
                            product(part.ctypes.data + 4 * c, 4 * d, True, ds_at, 2 * KEYS, 64,
                                    kp_at + at + c * 64, 1024, 64 * d, size // SIDE)
                        _add(part, places, m, together, d, dq_sum)
                        slot += 1
                    if slot > 0:
                        _sum_keys(dk_at, tq_at, ds_pairs.ctypes.data, begin, size, slot, d)
                        _sum_keys(dv_at, tdy_at, p_pairs.ctypes.data, begin, size, slot, d)
                for i in range(count * together):
                    to = ((b * n + i0 + i // together) * heads + h + i % together) * d
                    for j in range(0, d, WIDTH):
                        store_half(dq, to + j, load(dq_sum, i * d + j) * splat(shrink))
            first = ((share * batch + b) * keys * groups + g) * d
            write_keys(dk_sum, shrink, keys, d, scores, dk, first, groups * d)
            write_keys(dv_sum, np.float32(1), keys, d, scores, dv, first, groups * d)
        release()


def scratch(keys, d, rows, gradient):
    """Sizes of one worker's floats, words and halves, forward or backward; rows: of a span."""
    area = -(-keys // KEYS) * KEYS * d // 2
    if gradient:
        return (2 * SIDE * KEYS + SIDE * d + rows * (d + 1) + 4 * area,
                3 * area + MEETINGS * SIDE * KEYS,
                KEYS * d + SIDE * (d + KEYS) + 2 * MEETINGS * SIDE * d)
    return SIDE * (KEYS + d) + rows * (d + WIDTH + 1), 2 * area, KEYS * d + SIDE * KEYS
