"""Queries and keys of Mamba-3 in one pass over memory each way."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store, total


@numba.njit(fastmath=FAST, inline="always")
def _halves(x, at, bias, one, pairs):
    """Two features that turn together, each with its bias."""
    return load(x, at) + load(bias, one), load(x, at + pairs) + load(bias, one + pairs)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(c, b, c_bias, b_bias, cos, sin, q, k, dot, dims):
    """c, b: flat rows of groups * n; c_bias, b_bias: flat (heads, n); cos, sin: flat rows of heads
    * pairs; q, k: flat rows of heads * n; dot: flat rows of heads; dims: groups, heads, n,
    pairs."""
    groups, heads, n, pairs = dims
    for row in numba.prange(c.size // (groups * n)):
        for h in range(heads):
            at, to = (row * groups + h * groups // heads) * n, (row * heads + h) * n
            sums = splat(np.float32(0))
            for j in range(0, pairs, WIDTH):
                turn = (row * heads + h) * pairs + j
                x, y = load(cos, turn), load(sin, turn)
                one = h * n + j
                q1, q2 = _halves(c, at + j, c_bias, one, pairs)
                k1, k2 = _halves(b, at + j, b_bias, one, pairs)
                sums = sums + q1 * k1 + q2 * k2
                store(q, to + j, q1 * x - q2 * y)
                store(q, to + pairs + j, q1 * y + q2 * x)
                store(k, to + j, k1 * x - k2 * y)
                store(k, to + pairs + j, k1 * y + k2 * x)
            for j in range(2 * pairs, n, WIDTH):
                q1, k1 = load(c, at + j), load(b, at + j)
                q1, k1 = q1 + load(c_bias, h * n + j), k1 + load(b_bias, h * n + j)
                sums = sums + q1 * k1
                store(q, to + j, q1)
                store(k, to + j, k1)
            dot[row * heads + h] = total(sums)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(c, b, c_bias, b_bias, cos, sin, dq, dk, ddot, dc, db, dcos, dsin, partial, dims):
    """partial: (blocks, 2 heads n) gets the gradients of c_bias and b_bias."""
    groups, heads, n, pairs = dims
    width = groups * n
    rows, blocks, biases = c.size // width, partial.shape[0], heads * n
    zero = splat(np.float32(0))
    for block in numba.prange(blocks):
        mine = partial[block]
        sum_c, sum_b = np.empty(width, np.float32), np.empty(width, np.float32)
        for j in range(mine.size):
            mine[j] = 0
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            for j in range(0, width, WIDTH):
                store(sum_c, j, zero)
                store(sum_b, j, zero)
            for h in range(heads):
                local = h * groups // heads * n
                at, to = row * width + local, (row * heads + h) * n
                own = splat(ddot[row * heads + h])
                for j in range(0, pairs, WIDTH):
                    turn = (row * heads + h) * pairs + j
                    x, y = load(cos, turn), load(sin, turn)
                    one, two = h * n + j, h * n + pairs + j
                    q1, q2 = _halves(c, at + j, c_bias, one, pairs)
                    k1, k2 = _halves(b, at + j, b_bias, one, pairs)
                    u1, u2 = load(dq, to + j), load(dq, to + pairs + j)
                    v1, v2 = load(dk, to + j), load(dk, to + pairs + j)
                    store(dcos, turn, u1 * q1 + u2 * q2 + v1 * k1 + v2 * k2)
                    store(dsin, turn, u2 * q1 - u1 * q2 + v2 * k1 - v1 * k2)
                    g1, g2 = u1 * x + u2 * y + own * k1, u2 * x - u1 * y + own * k2
                    e1, e2 = v1 * x + v2 * y + own * q1, v2 * x - v1 * y + own * q2
                    store(sum_c, local + j, load(sum_c, local + j) + g1)
                    store(sum_c, local + pairs + j, load(sum_c, local + pairs + j) + g2)
                    store(sum_b, local + j, load(sum_b, local + j) + e1)
                    store(sum_b, local + pairs + j, load(sum_b, local + pairs + j) + e2)
                    store(mine, one, load(mine, one) + g1)
                    store(mine, two, load(mine, two) + g2)
                    store(mine, biases + one, load(mine, biases + one) + e1)
                    store(mine, biases + two, load(mine, biases + two) + e2)
                for j in range(2 * pairs, n, WIDTH):
                    one = h * n + j
                    q1, k1 = load(c, at + j) + load(c_bias, one), load(b, at + j)
                    k1 = k1 + load(b_bias, one)
                    g1, e1 = load(dq, to + j) + own * k1, load(dk, to + j) + own * q1
                    store(sum_c, local + j, load(sum_c, local + j) + g1)
                    store(sum_b, local + j, load(sum_b, local + j) + e1)
                    store(mine, one, load(mine, one) + g1)
                    store(mine, biases + one, load(mine, biases + one) + e1)
            for j in range(0, width, WIDTH):
                store(dc, row * width + j, load(sum_c, j))
                store(db, row * width + j, load(sum_b, j))
