"""Root mean square normalisation in one pass over memory each way."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store, total


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(x, weight, eps, y, inverse):
    """x, y: flat rows of weight.size elements; inverse: (rows,) gets 1 / rms."""
    d = weight.size
    for row in numba.prange(inverse.size):
        base = row * d
        square = splat(np.float32(0))
        for j in range(0, d, WIDTH):
            v = load(x, base + j)
            square = square + v * v
        r = np.float32(1) / np.sqrt(total(square) / np.float32(d) + np.float32(eps))
        inverse[row] = r
        scale = splat(r)
        for j in range(0, d, WIDTH):
            store(y, base + j, load(x, base + j) * scale * load(weight, j))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(g, x, weight, inverse, dx, partial):
    """dx = r (g w) - x r^3 mean(g w x); partial: (blocks, d) gets sums of g x r over its rows."""
    d, rows, blocks = weight.size, inverse.size, partial.shape[0]
    for block in numba.prange(blocks):
        mine = partial[block]
        for j in range(d):
            mine[j] = 0
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            base, r = row * d, splat(inverse[row])
            dot = splat(np.float32(0))
            for j in range(0, d, WIDTH):
                gx = load(g, base + j) * load(x, base + j)
                dot = dot + gx * load(weight, j)
                store(mine, j, load(mine, j) + gx * r)
            c = splat(total(dot) / np.float32(d)) * r * r * r
            for j in range(0, d, WIDTH):
                v = load(g, base + j) * load(weight, j) * r - load(x, base + j) * c
                store(dx, base + j, v)
