"""Layer normalisation in one pass over memory each way."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store, total


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(x, weight, bias, eps, y, mean, inverse):
    """x, y: flat rows of weight.size elements; bias: like weight, or empty; mean, inverse: (rows,)
    get each row's mean and 1 / standard deviation."""
    d = weight.size
    for row in numba.prange(inverse.size):
        base = row * d
        acc = splat(np.float32(0))
        for j in range(0, d, WIDTH):
            acc = acc + load(x, base + j)
        m = total(acc) / np.float32(d)
        centre, square = splat(m), splat(np.float32(0))
        for j in range(0, d, WIDTH):
            v = load(x, base + j) - centre
            square = square + v * v
        r = np.float32(1) / np.sqrt(total(square) / np.float32(d) + np.float32(eps))
        mean[row], inverse[row] = m, r
        scale = splat(r)
        for j in range(0, d, WIDTH):
            v = (load(x, base + j) - centre) * scale * load(weight, j)
            if bias.size:
                v = v + load(bias, j)
            store(y, base + j, v)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(g, x, weight, mean, inverse, dx, d_weight, d_bias):
    """With n the normalised row and h = g w: dx = r (h - mean(h) - n mean(h n)); d_weight and
    d_bias, (blocks, d), get the sums of g n and of g over the block's rows."""
    d, rows, blocks = weight.size, inverse.size, d_weight.shape[0]
    for block in numba.prange(blocks):
        dw, db = d_weight[block], d_bias[block]
        for j in range(d):
            dw[j] = 0
            db[j] = 0
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            base, r, centre = row * d, splat(inverse[row]), splat(mean[row])
            sum_h, sum_hn = splat(np.float32(0)), splat(np.float32(0))
            for j in range(0, d, WIDTH):
                gj = load(g, base + j)
                n = (load(x, base + j) - centre) * r
                h = gj * load(weight, j)
                sum_h = sum_h + h
                sum_hn = sum_hn + h * n
                store(dw, j, load(dw, j) + gj * n)
                store(db, j, load(db, j) + gj)
            a, b = splat(total(sum_h) / np.float32(d)), splat(total(sum_hn) / np.float32(d))
            for j in range(0, d, WIDTH):
                n = (load(x, base + j) - centre) * r
                store(dx, base + j, r * (load(g, base + j) * load(weight, j) - a - n * b))
