"""One pass over queries and keys that turns every head by its position's angle."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, get, load, put, splat, store


def _turn(x, step, cos, sin, positions, sign, heads, half, y):
    """x: rows `step` apart; cos, sin: (N, half) flat; positions: (rows,); y: dense; all flat."""
    flip = np.float32(sign)
    whole = half - half % WIDTH
    for row in numba.prange(positions.shape[0]):
        at = positions[row] * half
        for h in range(heads):
            a, o = row * step + 2 * half * h, (row * heads + h) * 2 * half
            for j in range(0, whole, WIDTH):
                c, s = load(cos, at + j), load(sin, at + j) * splat(flip)
                first, second = load(x, a + j), load(x, a + half + j)
                store(y, o + j, first * c - second * s)
                store(y, o + half + j, second * c + first * s)
            for j in range(whole, half):
                c, s = cos[at + j], sin[at + j] * flip
                first, second = get(x, a + j), get(x, a + half + j)
                put(y, o + j, first * c - second * s)
                put(y, o + half + j, second * c + first * s)


turn = numba.njit(fastmath=FAST, cache=True)(_turn)
turn_parallel = numba.njit(fastmath=FAST, parallel=True, cache=True)(_turn)
