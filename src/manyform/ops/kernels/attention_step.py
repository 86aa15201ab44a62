"""Attention of one query a row: a loop over the keys it sees, wherever they lie in the cache."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    exp2,
    largest,
    load,
    maximum,
    splat,
    store,
    total,
)


@numba.njit(fastmath=FAST, cache=True)
def _scores(q, q_at, k, k_at, step, d, low, high, scale, slope, distance, scores, n):
    """Scores of rows low ... high - 1, of which the first lies `distance` back, to scores[n:]."""
    for j in range(low, high):
        dot = splat(np.float32(0))
        for c in range(0, d, WIDTH):
            dot = dot + load(q, q_at + c) * load(k, k_at + j * step + c)
        scores[n] = total(dot) * scale - slope * np.float32(distance - (j - low))
        n += 1
    return n


@numba.njit(fastmath=FAST, cache=True)
def _weights(scores, n):
    """exp2(score - the largest) in place of the first n scores, behind which is room for sixteen
    more; returns their sum."""
    scores[n:n + WIDTH] = -np.inf
    peak = load(scores, 0)
    for j in range(0, n, WIDTH):
        peak = maximum(load(scores, j), peak)
    shift, summed = splat(largest(peak)), splat(np.float32(0))
    for j in range(0, n, WIDTH):
        p = exp2(load(scores, j) - shift)
        summed = summed + p
        store(scores, j, p)
    return total(summed)


@numba.njit(fastmath=FAST, cache=True)
def _add(v, v_at, step, d, low, high, scores, n, out):
    for j in range(low, high):
        weight = splat(scores[n])
        for c in range(0, d, WIDTH):
            store(out, c, load(out, c) + weight * load(v, v_at + j * step + c))
        n += 1
    return n


def _attend(q, q_strides, k, k_strides, v, v_strides, start, batch, heads, groups, keys, prefix,
            window, sinks, d, scale, slopes, y):
    """y: (batch, heads, d). Exponents are base 2; window: at least the number of keys for none."""
    for bh in numba.prange(batch * heads):
        b, h = bh // heads, bh % heads
        g = h // (heads // groups)
        begin, last = start[b], keys - prefix - 1
        near = max(begin, 0, last - window + 1)
        # three stretches: slots of tokens that are gone, first tokens before the window, the window
        lows = (0, prefix + max(begin, 0), prefix + near)
        highs = (min(prefix, max(-begin, 0)), prefix + min(begin + sinks, near), keys)
        far = (last - begin, last - max(begin, 0), last - near)
        scores = np.empty(keys + WIDTH, np.float32)
        out = np.zeros(d, np.float32)
        n = 0
        for part in range(3):
            n = _scores(q, b * q_strides[0] + h * q_strides[1], k,
                        b * k_strides[0] + g * k_strides[1], k_strides[2], d, lows[part],
                        highs[part], scale, slopes[h], far[part], scores, n)
        inverse = splat(np.float32(1) / _weights(scores, n))
        n = 0
        for part in range(3):
            n = _add(v, b * v_strides[0] + g * v_strides[1], v_strides[2], d, lows[part],
                     highs[part], scores, n, out)
        for c in range(0, d, WIDTH):
            store(y, bh * d + c, load(out, c) * inverse)


attend = numba.njit(fastmath=FAST, cache=True)(_attend)
attend_parallel = numba.njit(fastmath=FAST, parallel=True, cache=True)(_attend)
