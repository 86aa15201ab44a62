"""Three gated results of heads, added: see `gated_sum`. Rows of d features are dense; gates lie as
(rows, 3, heads), features as (rows, heads, d)."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store, total


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def add(gates, a, b, c, heads, d, out):
    for row in numba.prange(len(gates) // (3 * heads)):
        for h in range(heads):
            at = row * 3 * heads + h
            g, g2, g3 = splat(gates[at]), splat(gates[at + heads]), splat(gates[at + 2 * heads])
            for j in range((row * heads + h) * d, (row * heads + h + 1) * d, WIDTH):
                store(out, j, load(a, j) * g + load(b, j) * g2 + load(c, j) * g3)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def add_back(gates, a, b, c, heads, d, slope, d_gates, d_a, d_b, d_c):
    for row in numba.prange(len(gates) // (3 * heads)):
        for h in range(heads):
            at, zero = row * 3 * heads + h, splat(np.float32(0))
            g, g2, g3 = splat(gates[at]), splat(gates[at + heads]), splat(gates[at + 2 * heads])
            sum_, sum2, sum3 = zero, zero, zero
            for j in range((row * heads + h) * d, (row * heads + h + 1) * d, WIDTH):
                up = load(slope, j)
                sum_, sum2, sum3 = (sum_ + up * load(a, j), sum2 + up * load(b, j),
                                    sum3 + up * load(c, j))
                store(d_a, j, up * g)
                store(d_b, j, up * g2)
                store(d_c, j, up * g3)
            d_gates[at], d_gates[at + heads], d_gates[at + 2 * heads] = (total(sum_), total(sum2),
                                                                         total(sum3))
