"""Attention with Transformer-XL's relative positions over a window, on matrix tiles.

32 queries at a time meet all keys that they see. Scores of distances are a product with the vectors
R'_c = R_{origin - c}, the farthest first: the next key is then the next column, and what query r
of the tile needs begins 31 - r columns in, so that shifting them into place is a load from another
address (and on the way back a store to one). Softmax and sums are float32, products bfloat16.

Tensors are bfloat16 seen as uint16, flat, with their strides (row, head, step) in elements.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.attention import HIDDEN
from manyform.ops.kernels.lanes import FAST, WIDTH, largest, load, maximum, splat, store, total
from manyform.ops.kernels.packing import columns, pairs, rows, turned
from manyform.ops.kernels.shared_intervals import write_keys
from manyform.ops.kernels.sparse_attention import _visible
from manyform.ops.kernels.sparse_plan import KEYS, SIDE
from manyform.ops.kernels.tiles import (
    SHAPE,
    configure,
    exp2,
    product,
    release,
    store_half,
    store_pairs,
)


@numba.njit(fastmath=FAST, cache=True)
def _biased(x, at, step, count, bias, to, d, out):
    """`count` rows of x plus a bias, and zeros up to 32."""
    out[count * d:SIDE * d] = 0
    for r in range(count):
        for j in range(0, d, WIDTH):
            store_half(out, r * d + j, load(x, at + r * step + j) + load(bias, to + j))


@numba.njit(fastmath=FAST, cache=True)
def _multiply(into, row, left, right, d, n):
    """(32, n) float32, rows `row` bytes apart: 32 rows times columns."""
    for j in range(0, n, SIDE):
        product(into + 4 * j, row, True, left, 2 * d, 64, right + 2 * j * d, 32 * d, 1024, d // 32)


@numba.njit(fastmath=FAST, cache=True)
def _pack(x, strides, b, h, n, d, spare, column_at, pair_at):
    """Rows of a head as columns and as pairs (addresses, 0 for none), zeros up to whole blocks."""
    for i in range(0, n, KEYS):
        rows(x.ctypes.data + 2 * (b * strides[0] + h * strides[1] + i * strides[2]), 2 * strides[2],
             min(n - i, KEYS), KEYS, d, spare)
        if column_at != 0:
            columns(spare, 2 * d, KEYS, d, column_at + 2 * i * d)
        if pair_at != 0:
            pairs(spare, 2 * d, KEYS, d, pair_at + 2 * i * d)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(q, q_strides, k, k_strides, v, v_strides, far, far_strides, u, w_, heads, n, keys, d,
            low, origin, span, scale, y, y_strides, peaks, ramp, floats, words, halves):
    """y, and for each query the base-2 logarithm of its sum of exponentials (peaks, (batch, heads,
    n)). far: R', (1, heads, distances, d). low (batch or 1, n): the first key that each query sees.
    span: room for the keys of a tile. scale: of scores, times log2(e). See `scratch`."""
    workers, batch, tiles = floats.shape[0], peaks.shape[0], (n + SIDE - 1) // SIDE
    wide, old, distances = span + SIDE, keys - n, far.shape[0] // (heads * d)
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores, places = floats[w, :SIDE * span], floats[w, SIDE * span:SIDE * (span + wide)]
        found = floats[w, SIDE * (span + wide):]
        area = (keys + KEYS - 1) // KEYS * KEYS * d * 2
        k_at = words[w].ctypes.data
        v_at, r_at = k_at + area, k_at + 2 * area
        weights, queries = halves[w, :SIDE * span], halves[w, SIDE * span:]
        near_q = queries[SIDE * d:]
        for task in range(w * batch * heads // workers, (w + 1) * batch * heads // workers):
            b, h = task // heads, task % heads
            _pack(k, k_strides, b, h, keys, d, queries.ctypes.data, k_at, 0)
            _pack(v, v_strides, b, h, keys, d, queries.ctypes.data, 0, v_at)
            _pack(far, far_strides, 0, h, distances, d, queries.ctypes.data, r_at, 0)
            first = low[b % low.shape[0]]
            for i0 in range(0, tiles * SIDE, SIDE):
                count = min(SIDE, n - i0)
                j0 = first[i0] // SIDE * SIDE
                m = (i0 + count + old - j0 + SIDE - 1) // SIDE * SIDE
                at = b * q_strides[0] + h * q_strides[1] + i0 * q_strides[2]
                _biased(q, at, q_strides[2], count, u, h * d, d, near_q)
                _biased(q, at, q_strides[2], count, w_, h * d, d, queries)
                _multiply(scores.ctypes.data, 4 * span, near_q.ctypes.data, k_at + 2 * j0 * d, d, m)
                _multiply(places.ctypes.data, 4 * wide, queries.ctypes.data,
                          r_at + 2 * (origin - i0 - old - SIDE + 1 + j0) * d, d, m + SIDE)
                for r in range(count):
                    a, end = splat(np.float32(first[i0 + r] - j0)), i0 + r + old + 1 - j0
                    z, peak, s, t = (splat(np.float32(end)), splat(HIDDEN), r * span,
                                     r * wide + SIDE - 1 - r)
                    for j in range(0, m, WIDTH):
                        x = _visible(load(scores, s + j) + load(places, t + j), load(ramp, j), a, z)
                        store(scores, s + j, x)
                        peak = maximum(x, peak)
                    top, whole = largest(peak) * scale, splat(np.float32(0))
                    for j in range(0, m, WIDTH):
                        p = exp2(load(scores, s + j) * splat(scale) - splat(top))
                        whole = whole + p
                        store_half(weights, s + j, p)
                    sum_ = total(whole)
                    found[SIDE * d + r] = np.float32(1) / sum_
                    peaks[b, h, i0 + r] = top + np.log2(sum_)
                for c in range(0, d, SIDE):
                    product(found.ctypes.data + 4 * c, 4 * d, True, weights.ctypes.data, 2 * span,
                            64, v_at + 2 * j0 * d + c * 64, 1024, 64 * d, m // SIDE)
                for r in range(count):
                    at = b * y_strides[0] + h * y_strides[1] + (i0 + r) * y_strides[2]
                    for j in range(0, d, WIDTH):
                        store_half(y, at + j, load(found, r * d + j) * splat(found[SIDE * d + r]))
        release()


@numba.njit(fastmath=FAST, cache=True)
def _differentiate(scores, places, slants, m, span, scale, low, high, peaks, dots, ramp, p_pairs,
                   ds, ds_pairs, shifted):
    """p and ds = p (slant - dot) of 32 queries and m keys, in pairs of rows, and ds also as rows
    and as the rows (32, span + 32) of its distances. low, high, peaks, dots: a query each."""
    wide, zero = span + SIDE, splat(np.float32(0))
    for r in range(0, SIDE, 2):
        s, t, to = r * span, r * wide + SIDE - 1 - r, r * (WIDTH // 2)
        for row in (r * wide, (r + 1) * wide):
            for j in (0, WIDTH, m, m + WIDTH):
                store_half(shifted, row + j, zero)
        a, b, z, e = splat(low[r]), splat(low[r + 1]), splat(high[r]), splat(high[r + 1])
        peak, peak2, dot, dot2 = (splat(peaks[r]), splat(peaks[r + 1]), splat(dots[r]),
                                  splat(dots[r + 1]))
        for j in range(0, m, WIDTH):
            key = load(ramp, j)
            p = _visible(load(scores, s + j) + load(places, t + j), key, a, z)
            o = _visible(load(scores, s + span + j) + load(places, t + wide - 1 + j), key, b, e)
            p, o = exp2(p * splat(scale) - peak), exp2(o * splat(scale) - peak2)
            f = p * (load(slants, s + j) - dot)
            g = o * (load(slants, s + span + j) - dot2)
            store_half(ds, s + j, f)
            store_half(ds, s + span + j, g)
            store_half(shifted, t + j, f)
            store_half(shifted, t + wide - 1 + j, g)
            store_pairs(p_pairs, to + j * WIDTH, p, o)
            store_pairs(ds_pairs, to + j * WIDTH, f, g)


@numba.njit(fastmath=FAST, cache=True)
def _sum_keys(sums, left, right, j0, m, d):
    """Add to the gradients of keys, (blocks, d, KEYS), what 32 queries give; all addresses."""
    for j in range(j0, j0 + m, SIDE):
        at = sums + 4 * (j // KEYS * KEYS * d + j % KEYS)
        for c in range(0, d, SIDE):
            product(at + 4 * c * KEYS, 4 * KEYS, False, left + 64 * c, 64, 0,
                    right + 64 * (j - j0), 1024, 0, 1)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(q, q_strides, k, k_strides, v, v_strides, far, far_strides, dy, dy_strides, y,
             y_strides, u, w_, heads, n, keys, d, low, origin, span, scale, shrink, peaks, dq, dk,
             dv, d_far, du, dw, ramp, floats, words, halves):
    """dq (batch, n, heads, d); dk, dv (batch, keys, heads, d); d_far (batch, heads, d, distances)
    and du, dw (batch, heads, d) float32, zero at first, without the factor `shrink` between scores
    and products. See `forward`, `scratch`."""
    workers, batch, tiles = floats.shape[0], peaks.shape[0], (n + SIDE - 1) // SIDE
    wide, old, distances = span + SIDE, keys - n, d_far.shape[3]
    area = (keys + KEYS - 1) // KEYS * KEYS * d
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores, places = floats[w, :SIDE * span], floats[w, SIDE * span:SIDE * (span + wide)]
        rest = floats[w, SIDE * (span + wide):]
        slants, rest = rest[:SIDE * span], rest[SIDE * span:]
        part, part2, rest = rest[:SIDE * d], rest[SIDE * d:2 * SIDE * d], rest[2 * SIDE * d:]
        dk_sum, dv_sum = rest[:area], rest[area:2 * area]
        begin, end, peak, dot = np.empty((4, SIDE), np.float32)
        k_at = words[w].ctypes.data
        v_at, kp_at, r_at = k_at + 2 * area, k_at + 4 * area, k_at + 6 * area
        rp_at = r_at + 2 * distances * d
        rest_ = words[w, 3 * area // 2 + distances * d:]
        p_pairs, ds_pairs = rest_[:span * WIDTH], rest_[span * WIDTH:2 * span * WIDTH]
        far_pairs = rest_[2 * span * WIDTH:]
        few = SIDE * d
        ds, shifted = halves[w, :SIDE * span], halves[w, SIDE * span:SIDE * (span + wide)]
        small = halves[w, SIDE * (span + wide):]
        near_q, far_q, slopes = small[:few], small[few:2 * few], small[2 * few:3 * few]
        turned_at = small.ctypes.data + 6 * few
        for task in range(w * batch * heads // workers, (w + 1) * batch * heads // workers):
            b, h = task // heads, task % heads
            _pack(k, k_strides, b, h, keys, d, small.ctypes.data, k_at, kp_at)
            _pack(v, v_strides, b, h, keys, d, small.ctypes.data, v_at, 0)
            _pack(far, far_strides, 0, h, distances, d, small.ctypes.data, r_at, rp_at)
            first = low[b % low.shape[0]]
            dk_sum[:] = 0
            dv_sum[:] = 0
            for i0 in range(0, tiles * SIDE, SIDE):
                count = min(SIDE, n - i0)
                j0 = first[i0] // SIDE * SIDE
                m = (i0 + count + old - j0 + SIDE - 1) // SIDE * SIDE
                c0 = origin - i0 - old - SIDE + 1 + j0
                at = b * q_strides[0] + h * q_strides[1] + i0 * q_strides[2]
                _biased(q, at, q_strides[2], count, u, h * d, d, near_q)
                _biased(q, at, q_strides[2], count, w_, h * d, d, far_q)
                at = b * dy_strides[0] + h * dy_strides[1] + i0 * dy_strides[2]
                to = b * y_strides[0] + h * y_strides[1] + i0 * y_strides[2]
                rows(dy.ctypes.data + 2 * at, 2 * dy_strides[2], count, SIDE, d, slopes.ctypes.data)
                begin[:], end[:], peak[:], dot[:] = 0, 0, -HIDDEN, 0
                for r in range(count):
                    begin[r], end[r] = first[i0 + r] - j0, i0 + r + old + 1 - j0
                    sum_ = splat(np.float32(0))
                    for j in range(0, d, WIDTH):
                        sum_ = sum_ + load(slopes, r * d + j) * load(y, to + r * y_strides[2] + j)
                    peak[r], dot[r] = peaks[b, h, i0 + r], total(sum_)
                _multiply(scores.ctypes.data, 4 * span, near_q.ctypes.data, k_at + 2 * j0 * d, d, m)
                _multiply(places.ctypes.data, 4 * wide, far_q.ctypes.data, r_at + 2 * c0 * d, d,
                          m + SIDE)
                _multiply(slants.ctypes.data, 4 * span, slopes.ctypes.data, v_at + 2 * j0 * d, d, m)
                _differentiate(scores, places, slants, m, span, scale, begin, end, peak, dot, ramp,
                               p_pairs, ds, ds_pairs, shifted)
                for c in range(0, d, SIDE):
                    product(part.ctypes.data + 4 * c, 4 * d, True, ds.ctypes.data, 2 * span, 64,
                            kp_at + 2 * j0 * d + c * 64, 1024, 64 * d, m // SIDE)
                    product(part2.ctypes.data + 4 * c, 4 * d, True, shifted.ctypes.data, 2 * wide,
                            64, rp_at + 2 * c0 * d + c * 64, 1024, 64 * d, m // SIDE + 1)
                for r in range(count):
                    to = ((b * n + i0 + r) * heads + h) * d
                    for j in range(0, d, WIDTH):
                        near, far_ = load(part, r * d + j), load(part2, r * d + j)
                        at = (b * heads + h) * d + j
                        store(du, at, load(du, at) + near)
                        store(dw, at, load(dw, at) + far_)
                        store_half(dq, to + j, (near + far_) * splat(shrink))
                pairs(shifted.ctypes.data, 2 * wide, SIDE, m + SIDE, far_pairs.ctypes.data)
                for i in range(3):
                    turned(small.ctypes.data + 2 * i * few, 2 * d, SIDE, d, turned_at + 2 * i * few,
                           part.ctypes.data)
                _sum_keys(dk_sum.ctypes.data, turned_at, ds_pairs.ctypes.data, j0, m, d)
                _sum_keys(dv_sum.ctypes.data, turned_at + 4 * few, p_pairs.ctypes.data, j0, m, d)
                for j in range(0, m + SIDE, SIDE):
                    for c in range(0, d, SIDE):
                        product(d_far[b, h].ctypes.data + 4 * (c * distances + c0 + j),
                                4 * distances, False, turned_at + 2 * few + 64 * c, 64, 0,
                                far_pairs.ctypes.data + 64 * j, 1024, 0, 1)
            to = (b * keys * heads + h) * d
            write_keys(dk_sum, shrink, keys, d, part, dk, to, heads * d)
            write_keys(dv_sum, np.float32(1), keys, d, part, dv, to, heads * d)
        release()


def scratch(keys, d, distances, span, gradient):
    """Sizes of one worker's floats, words and halves, forward or backward."""
    area, wide = -(-keys // KEYS) * KEYS * d, span + SIDE
    if gradient:
        return (SIDE * (2 * span + wide + 2 * d) + 2 * area,
                3 * area // 2 + distances * d + WIDTH * (2 * span + wide),
                SIDE * (span + wide) + 6 * SIDE * d)
    return SIDE * (span + wide + d + 1), area + distances * d // 2, SIDE * span + 2 * SIDE * d
