"""The token shift in one pass over memory each way, for all mixtures of one input at once."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(x, weights, first, reset, length, d, ys):
    """x: flat rows of d, `length` a sequence; weights: (n d,); first: (batch d,), what comes before
    each sequence; reset: (rows,) bool or empty; ys: n flat outputs."""
    for row in numba.prange(x.size // d):
        base, begins = row * d, row % length == 0
        cut = reset.size > 0 and reset[row]
        for j in range(0, d, WIDTH):
            v = load(x, base + j)
            if cut:
                change = splat(np.float32(0)) - v
            elif begins:
                change = load(first, row // length * d + j) - v
            else:
                change = load(x, base - d + j) - v
            for n in range(len(ys)):
                store(ys[n], base + j, v + change * load(weights, n * d + j))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(x, weights, first, reset, length, d, gs, dx, dfirst, partial):
    """gs: n flat gradients. dfirst: (batch d,); partial: (blocks, n d) gets sums of g times the
    change that it weighs."""
    rows, blocks = x.size // d, partial.shape[0]
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    for block in numba.prange(blocks):
        mine = partial[block]
        for j in range(mine.size):
            mine[j] = 0
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            base, begins = row * d, row % length == 0
            cut = reset.size > 0 and reset[row]
            seen = (row + 1) % length != 0 and not (reset.size > 0 and reset[row + 1])
            for j in range(0, d, WIDTH):
                v = load(x, base + j)
                if cut:
                    change = zero - v
                elif begins:
                    change = load(first, row // length * d + j) - v
                else:
                    change = load(x, base - d + j) - v
                grad, before = zero, zero
                for n in range(len(gs)):
                    g, w = load(gs[n], base + j), load(weights, n * d + j)
                    grad = grad + g * (one - w)
                    before = before + g * w
                    store(mine, n * d + j, load(mine, n * d + j) + g * change)
                    if seen:
                        grad = grad + load(gs[n], base + d + j) * w
                store(dx, base + j, grad)
                if begins:
                    store(dfirst, row // length * d + j, zero if cut else before)
