"""Attention on matrix tiles: scores are computed, used and forgotten in cache, block by block.

Queries and keys are counted from 0; query i of a row sees the keys from first[i] to i. Tensors are
bfloat16 seen as uint16, flat, with their strides (row, head, step) in elements. Exponents are
base 2: scale and bias come multiplied by log2(e).
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    largest,
    load,
    maximum,
    splat,
    store,
    total,
)
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

SIDE = 32
"""Rows and columns of one product of tiles."""
KEYS = 256
"""Keys a step of the forward pass: 32 rows of float32 scores fill two thirds of a 48 KB cache."""
CHUNK = 128
"""Queries and keys a step of the backward pass."""
HIDDEN = np.float32(-1e30)
SLACK = np.float32(8)


@numba.njit(cache=True)
def _columns(x, at, step, n, d, out):
    """Rows of x as the columns of B tiles: out[n / 16][d / 2][16], pairs of features."""
    for block in range(n // 16):
        for c in range(16):
            first = (at + (block * 16 + c) * step) // 2
            row, to = x[first:first + d // 2], out[block * d * 8 + c:(block + 1) * d * 8]
            for r in range(d // 2):
                to[r * 16] = row[r]


@numba.njit(cache=True)
def _pairs(x, at, step, n, d, out):
    """Rows of x in pairs, as the rows of B tiles: out[n / 32][d / 16][16][16]."""
    for block in range(n // 32):
        for r in range(16):
            a = at + (block * 32 + 2 * r) * step
            for part in range(d // 16):
                at_low, first = a + part * 16, ((block * (d // 16) + part) * 16 + r) * 16
                low, high = x[at_low:at_low + 16], x[at_low + step:at_low + step + 16]
                to = out[first:first + 16]
                for c in range(16):
                    to[c] = np.uint32(low[c]) | (np.uint32(high[c]) << np.uint32(16))


@numba.njit(cache=True)
def _turned(x, at, step, n, d, out):
    """Columns of x as the rows of A tiles: out[n / 32][d][32]."""
    for block in range(n // 32):
        for c in range(32):
            first = at + (block * 32 + c) * step
            row, to = x[first:first + d], out[block * d * 32 + c:(block + 1) * d * 32]
            for r in range(d):
                to[r * 32] = row[r]


@numba.njit(cache=True)
def _copy(x, at, step, n, d, out):
    for i in range(n):
        row, to = x[at + i * step:at + i * step + d], out[i * d:(i + 1) * d]
        for j in range(d):
            to[j] = row[j]


@numba.njit(parallel=True, cache=True)
def pack(k, v, k_strides, v_strides, batch, groups, n, d, k_columns, v_pairs):
    """Keys and values of every row and head in the order of B tiles."""
    for bg in numba.prange(batch * groups):
        b, g = bg // groups, bg % groups
        _columns(k, b * k_strides[0] + g * k_strides[1], k_strides[2], n, d, k_columns[bg])
        _pairs(v, b * v_strides[0] + g * v_strides[1], v_strides[2], n, d, v_pairs[bg])


@numba.njit(fastmath=FAST, cache=True)
def _soften(scores, weights, i0, j0, width, first, scale, slope, ramp, origin, top, summed, out, d):
    """One step of the online softmax (Milakov 2018) for 32 queries and `width` keys.

    scores: (32, KEYS) float32 -> weights: (32, KEYS) bfloat16; top: the shift of each query's
    exponents; summed: (32, 16), its running sums; out: (32, d), what has been added up so far.
    """
    for r in range(SIDE):
        low = max(first[i0 + r] - j0, 0)
        high = min(i0 + r + 1 - j0, width)
        row = r * KEYS
        begin, end = low // WIDTH * WIDTH, (high + WIDTH - 1) // WIDTH * WIDTH
        if low >= high:
            begin = end = 0
        for j in range(begin):
            weights[row + j] = 0
        for j in range(end, width):
            weights[row + j] = 0
        if begin == end:
            continue
        for j in range(begin, low):
            scores[row + j] = HIDDEN
        for j in range(high, end):
            scores[row + j] = HIDDEN
        peak, unit = splat(HIDDEN), scale
        if slope != 0:
            unit = np.float32(1)
            for j in range(begin, end, WIDTH):
                s = load(scores, row + j) * splat(scale)
                s = s + load(ramp, origin + j0 + j - i0 - r) * splat(slope)
                store(scores, row + j, s)
        for j in range(begin, end, WIDTH):
            peak = maximum(load(scores, row + j), peak)
        # The shift need not be the maximum: weights up to 2^SLACK do no harm, and most steps of
        # most rows then have nothing to scale down.
        if exceeds(peak * splat(unit), top[r] + SLACK):
            new = largest(peak) * unit
            shrink = splat(np.float32(0))
            if top[r] > HIDDEN:
                shrink = exp2(splat(top[r] - new))
            store(summed, r * WIDTH, load(summed, r * WIDTH) * shrink)
            for j in range(0, d, WIDTH):
                store(out, r * d + j, load(out, r * d + j) * shrink)
            top[r] = new
        more, shift = load(summed, r * WIDTH), splat(top[r])
        for j in range(begin, end, WIDTH):
            p = exp2(load(scores, row + j) * splat(unit) - shift)
            more = more + p
            store_half(weights, row + j, p)
        store(summed, r * WIDTH, more)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(q, q_strides, k_columns, v_pairs, heads, groups, first, scale, slopes, ramp,
            y, y_strides, peaks, floats, halves):
    """y, and for each query the base-2 logarithm of its sum of exponentials (peaks).

    floats (workers, KEYS * 32 + 32 * (d + 17)), halves (workers, KEYS * 32 + 32 * d): scratch.
    """
    workers, batch, n = floats.shape[0], first.shape[0], first.shape[1]
    d = k_columns.shape[1] // n * 2
    blocks = n // SIDE
    tasks = batch * heads * blocks
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        scores = floats[w, :KEYS * SIDE]
        out = floats[w, KEYS * SIDE:KEYS * SIDE + SIDE * d]
        top = floats[w, KEYS * SIDE + SIDE * d:KEYS * SIDE + SIDE * d + SIDE]
        summed = floats[w, KEYS * SIDE + SIDE * d + SIDE:]
        weights, queries = halves[w, :KEYS * SIDE], halves[w, KEYS * SIDE:]
        s_at, o_at = scores.ctypes.data, out.ctypes.data
        w_at, q_at = weights.ctypes.data, queries.ctypes.data
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            b, h = task // (heads * blocks), task // blocks % heads
            i0 = task % blocks * SIDE
            group = b * groups + h // (heads // groups)
            k_at, v_at = k_columns[group].ctypes.data, v_pairs[group].ctypes.data
            _copy(q, b * q_strides[0] + h * q_strides[1] + i0 * q_strides[2], q_strides[2], SIDE, d,
                  queries)
            out[:] = 0
            top[:] = HIDDEN
            summed[:] = 0
            for j0 in range(first[b, i0] // SIDE * SIDE, i0 + SIDE, KEYS):
                width = min(KEYS, i0 + SIDE - j0)
                for j in range(0, width, SIDE):
                    product(s_at + 4 * j, 4 * KEYS, True, q_at, 2 * d, 64,
                            k_at + (j0 + j) * d * 2, 32 * d, 1024, d // 32)
                _soften(scores, weights, i0, j0, width, first[b], scale, slopes[h], ramp, n, top,
                        summed, out, d)
                for c in range(0, d, SIDE):
                    product(o_at + 4 * c, 4 * d, False, w_at, 2 * KEYS, 64,
                            v_at + j0 * d * 2 + c * 64, 1024, d * 64, width // SIDE)
            for r in range(SIDE):
                at = b * y_strides[0] + h * y_strides[1] + (i0 + r) * y_strides[2]
                whole = total(load(summed, r * WIDTH))
                inverse = splat(np.float32(1) / whole)
                for j in range(0, d, WIDTH):
                    store_half(y, at + j, load(out, r * d + j) * inverse)
                peaks[b, h, i0 + r] = top[r] + np.log2(whole)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _differentiate(scores, slants, i0, j0, first, last, scale, slope, ramp, origin, peaks, dots,
                   weights, turned, pairs, to, pair_to):
    """The softmax and its derivative for 32 keys (rows) and 32 queries (columns).

    scores: k.q, slants: v.dy, each (32, 32) float32. Writes p and ds = p (slant - dot) as rows of A
    tiles, from `to` on in rows of CHUNK, and ds also as rows of B tiles, from `pair_to` on.
    """
    if i0 < j0 + SIDE or first[i0 + SIDE - 1] > j0:
        for r in range(SIDE):
            for i in range(min(max(j0 + r - i0, 0), SIDE)):
                scores[r * SIDE + i] = HIDDEN
            for i in range(min(max(last[j0 + r] - i0, 0), SIDE), SIDE):
                scores[r * SIDE + i] = HIDDEN
    for r in range(0, SIDE, 2):
        for i in range(0, SIDE, WIDTH):
            peak, dot = load(peaks, i0 + i), load(dots, i0 + i)
            s = load(scores, r * SIDE + i) * splat(scale) - peak
            t = load(scores, (r + 1) * SIDE + i) * splat(scale) - peak
            if slope != 0:
                at = origin + i0 + i - j0 - r
                s = s - load(ramp, at) * splat(slope)
                t = t - load(ramp, at - 1) * splat(slope)
            p, o = exp2(s), exp2(t)
            a = p * (load(slants, r * SIDE + i) - dot)
            b = o * (load(slants, (r + 1) * SIDE + i) - dot)
            store_half(weights, to + r * CHUNK + i, p)
            store_half(weights, to + (r + 1) * CHUNK + i, o)
            store_half(turned, to + r * CHUNK + i, a)
            store_half(turned, to + (r + 1) * CHUNK + i, b)
            store_pairs(pairs, pair_to + i * (CHUNK // 2) + r * (WIDTH // 2), a, b)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(q, q_pairs, q_strides, k, k_strides, v, v_strides, dy, dy_pairs, dy_strides, y,
             y_strides, heads, groups, first, last, scale, slopes, ramp, peaks, shrink,
             dq, dk, dv, floats, words, halves):
    """dq, dk, dv: (batch, n, heads, d), the last two a query head (sums over groups are the
    caller's). q_pairs, dy_pairs: q, dy seen as uint32. shrink: the factor between s and q.k.

    floats, words (uint32), halves (uint16): scratch a worker, see `scratch`.
    """
    workers, batch, n = floats.shape[0], first.shape[0], first.shape[1]
    d = dq.shape[0] // (batch * heads * n)
    area, small, chunk = n * d, SIDE * SIDE, CHUNK * d
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        dq_turned, dots = floats[w, :area], floats[w, area:area + n]
        scores = floats[w, area + n:area + n + small]
        slants = floats[w, area + n + small:area + n + 2 * small]
        rest = area + n + 2 * small
        dk_sum, dv_sum = floats[w, rest:rest + chunk], floats[w, rest + chunk:rest + 2 * chunk]
        half = area // 2
        q_columns, q_rows = words[w, :half], words[w, half:2 * half]
        dy_columns, dy_rows = words[w, 2 * half:3 * half], words[w, 3 * half:4 * half]
        ds_pairs = words[w, 4 * half:]
        k_turned = halves[w, :area]
        k_rows, v_rows = halves[w, area:area + chunk], halves[w, area + chunk:area + 2 * chunk]
        weights = halves[w, area + 2 * chunk:area + 2 * chunk + CHUNK * CHUNK]
        ds = halves[w, area + 2 * chunk + CHUNK * CHUNK:]
        for task in range(w * batch * heads // workers, (w + 1) * batch * heads // workers):
            b, h = task // heads, task % heads
            g = h // (heads // groups)
            q_at = b * q_strides[0] + h * q_strides[1]
            k_at = b * k_strides[0] + g * k_strides[1]
            v_at = b * v_strides[0] + g * v_strides[1]
            dy_at = b * dy_strides[0] + h * dy_strides[1]
            y_at = b * y_strides[0] + h * y_strides[1]
            _columns(q_pairs, q_at, q_strides[2], n, d, q_columns)
            _pairs(q, q_at, q_strides[2], n, d, q_rows)
            _columns(dy_pairs, dy_at, dy_strides[2], n, d, dy_columns)
            _pairs(dy, dy_at, dy_strides[2], n, d, dy_rows)
            _turned(k, k_at, k_strides[2], n, d, k_turned)
            for i in range(n):
                dot = splat(np.float32(0))
                for j in range(0, d, WIDTH):
                    dot = dot + (load(dy, dy_at + i * dy_strides[2] + j)
                                 * load(y, y_at + i * y_strides[2] + j))
                dots[i] = total(dot)
            dq_turned[:] = 0
            for j0 in range(0, n, CHUNK):
                width = min(CHUNK, n - j0)
                _copy(k, k_at + j0 * k_strides[2], k_strides[2], width, d, k_rows)
                _copy(v, v_at + j0 * v_strides[2], v_strides[2], width, d, v_rows)
                dk_sum[:] = 0
                dv_sum[:] = 0
                for i0 in range(j0, n, CHUNK):
                    if first[b, i0] >= j0 + width:
                        break
                    height = min(CHUNK, n - i0)
                    for j in range(0, width, SIDE):
                        # queries [i_low, i_high) of this block see any of the keys from j on
                        i_low = max(j0 + j - i0, 0)
                        i_high = i_low
                        while i_high < height and first[b, i0 + i_high] < j0 + j + SIDE:
                            i = i_high
                            product(scores.ctypes.data, 4 * SIDE, True,
                                    k_rows.ctypes.data + 2 * j * d, 2 * d, 64,
                                    q_columns.ctypes.data + (i0 + i) * d * 2, 32 * d, 1024, d // 32)
                            product(slants.ctypes.data, 4 * SIDE, True,
                                    v_rows.ctypes.data + 2 * j * d, 2 * d, 64,
                                    dy_columns.ctypes.data + (i0 + i) * d * 2, 32 * d, 1024,
                                    d // 32)
                            _differentiate(
                                scores, slants, i0 + i, j0 + j, first[b], last[b], scale, slopes[h],
                                ramp, n, peaks[b, h], dots, weights, ds, ds_pairs, j * CHUNK + i,
                                i * (CHUNK // 2) + j * (WIDTH // 2))
                            i_high += SIDE
                        if i_high == i_low:
                            continue
                        steps, at = (i_high - i_low) // SIDE, 2 * (j * CHUNK + i_low)
                        rows = (i0 + i_low) * d * 2
                        for c in range(0, d, SIDE):
                            product(dv_sum.ctypes.data + 4 * (j * d + c), 4 * d, False,
                                    weights.ctypes.data + at, 2 * CHUNK, 64,
                                    dy_rows.ctypes.data + rows + c * 64, 1024, d * 64, steps)
                            product(dk_sum.ctypes.data + 4 * (j * d + c), 4 * d, False,
                                    ds.ctypes.data + at, 2 * CHUNK, 64,
                                    q_rows.ctypes.data + rows + c * 64, 1024, d * 64, steps)
                    for i in range(0, height, SIDE):
                        j_high = min(width, i0 + i + SIDE - j0)
                        j_low = max(first[b, i0 + i] - j0, 0) // SIDE * SIDE
                        if j_low >= j_high:
                            continue
                        for c in range(0, d, SIDE):
                            product(dq_turned.ctypes.data + 4 * ((i0 + i) * d + c * SIDE), 4 * SIDE,
                                    False, k_turned.ctypes.data + 2 * ((j0 + j_low) * d + c * SIDE),
                                    2 * SIDE, d * 64,
                                    ds_pairs.ctypes.data + 4 * (i * (CHUNK // 2) + j_low * 8),
                                    CHUNK * 32, 1024, (j_high - j_low) // SIDE)
                for j in range(width):
                    at = ((b * n + j0 + j) * heads + h) * d
                    for c in range(0, d, WIDTH):
                        store_half(dk, at + c, load(dk_sum, j * d + c) * splat(shrink))
                        store_half(dv, at + c, load(dv_sum, j * d + c))
            for block in range(n // SIDE):
                for r in range(d):  # turned back in dk_sum, whose use is over
                    at = (block * d + r) * SIDE
                    row, to = dq_turned[at:at + SIDE], dk_sum[r:SIDE * d]
                    for c in range(SIDE):
                        to[c * d] = row[c] * shrink
                for c in range(SIDE):
                    at = ((b * n + block * SIDE + c) * heads + h) * d
                    for r in range(0, d, WIDTH):
                        store_half(dq, at + r, load(dk_sum, c * d + r))
        release()


def scratch(n, d):
    """Sizes of one worker's floats, words and halves in the backward pass."""
    area, chunk = n * d, CHUNK * d
    return (area + n + 2 * SIDE * SIDE + 2 * chunk, 2 * area + CHUNK * CHUNK // 2,
            area + 2 * chunk + 2 * CHUNK * CHUNK)
