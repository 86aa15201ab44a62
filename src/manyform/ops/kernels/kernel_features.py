"""The loops of `ops.kernel_features`, over rows of a multiple of sixteen features."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    exp2,
    get,
    load,
    maximum,
    put,
    splat,
    store,
    total,
)

_LOG2E = np.float32(1.4426950408889634)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def exponential(x, shift, eps, y, rows, width):
    """y = e^(x - shift) + eps."""
    log2e, more = splat(_LOG2E), splat(eps)
    for index in numba.prange(rows):
        row = np.int64(index)
        down = splat(shift[row])
        for at in range(row * width, (row + 1) * width, WIDTH):
            store(y, at, exp2((load(x, at) - down) * log2e) + more)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def exponential_backward(g, y, eps, dx, dshift, rows, width):
    """dx = g (y - eps), dshift = -sum of dx."""
    less = splat(eps)
    for index in numba.prange(rows):
        row = np.int64(index)
        sums = splat(np.float32(0))
        for at in range(row * width, (row + 1) * width, WIDTH):
            slope = load(g, at) * (load(y, at) - less)
            store(dx, at, slope)
            sums = sums + slope
        dshift[row] = -total(sums)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def cosine(x, xs, cos, sin, y, shape):
    """y = relu(x) cos, relu(x) sin; cos and sin: one a step of every row."""
    batch, length, heads, width = shape
    zero = splat(np.float32(0))
    for index in numba.prange(batch * length):
        row = np.int64(index)
        b, t = row // length, row % length
        c, s = splat(cos[row]), splat(sin[row])
        for h in range(heads):
            at, to = b * xs[0] + t * xs[1] + h * xs[2], (row * heads + h) * 2 * width
            for d in range(0, width, WIDTH):
                u = maximum(load(x, at + d), zero)
                store(y, to + d, u * c)
                store(y, to + width + d, u * s)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def cosine_backward(g, x, xs, cos, sin, dx, shape):
    """dx = g1 cos + g2 sin where x > 0."""
    batch, length, heads, width = shape
    for index in numba.prange(batch * length):
        row = np.int64(index)
        b, t = row // length, row % length
        c, s = splat(cos[row]), splat(sin[row])
        for h in range(heads):
            at, to = b * xs[0] + t * xs[1] + h * xs[2], (row * heads + h) * width
            for d in range(0, width, WIDTH):
                slope = load(g, 2 * to + d) * c + load(g, 2 * to + width + d) * s
                store(dx, to + d, slope)
                for i in range(d, d + WIDTH):
                    if not get(x, at + i) > np.float32(0):
                        put(dx, to + i, np.float32(0))
