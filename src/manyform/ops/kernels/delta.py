"""What surrounds the products of the chunked delta rule, in one pass over memory each way."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, exp2, load, splat, store, total

_LOG2E = np.float32(1.4426950408889634)


@numba.njit(inline="always")
def _at(strides, which, row, step, head):
    return row * strides[which, 0] + step * strides[which, 1] + head * strides[which, 2]


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def split(q, a, k, b, g, strides, dims, scale, two, x, y, keep):
    """Rows of each chunk with their decays of a channel: x = [a exp(e); q exp(c) scale],
    y = [b exp(-c); k exp(-c)] (k alone unless `two`), keep = exp(c of the chunk).

    strides: (5, 3), of q, a, k, b, g over batch, step and head; dims: (batch, length, heads,
    key, size); x, y: (chunks, batch, heads, rows, key) and keep: (.., key), dense; all flat.
    """
    batch, length, heads, key, size = dims
    rows = 2 * size if two else size
    for m in numba.prange(keep.size // key):
        n, row, h = m // (batch * heads), m // heads % batch, m % heads
        for j in range(0, key, WIDTH):
            c, one = splat(np.float32(0)), splat(np.float32(1))
            before = one
            for t in range(size):
                step = n * size + t
                at_x, at_y = (2 * m * size + t) * key + j, (m * rows + t) * key + j
                if step < length:
                    c = c + load(g, _at(strides, 4, row, step, h) + j)
                    now = exp2(c * splat(_LOG2E))
                    back, scaled = one / now, now * splat(np.float32(scale))
                    store(x, at_x, load(a, _at(strides, 1, row, step, h) + j) * before)
                    store(x, at_x + size * key, load(q, _at(strides, 0, row, step, h) + j) * scaled)
                    store(y, at_y + (rows - size) * key,
                          load(k, _at(strides, 2, row, step, h) + j) * back)
                    if two:
                        store(y, at_y, load(b, _at(strides, 3, row, step, h) + j) * back)
                    before = now
                else:
                    zero = splat(np.float32(0))
                    store(x, at_x, zero)
                    store(x, at_x + size * key, zero)
                    store(y, at_y, zero)
                    store(y, at_y + (rows - size) * key, zero)
            store(keep, m * key + j, before)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def join(x, y, dx, dy, dwrite, kept, g, strides, dims, scale, two, dq, da, dk, db, dg):
    """The way back from gradients dx, dy of what `split` made.

    dwrite: like y, gradient of y exp(c of the chunk); kept: like keep, sum of state times gradient.
    strides: (1, 3), of g. dq, da, dk, db, dg: (batch, length, heads, key), dense. Every row of x
    carries exp(its total) and every row of y exp(-its total), so x dx and -y dy are gradients of
    the totals, whose sums from the end of the chunk are those of the log decays.
    """
    batch, length, heads, key, size = dims
    rows = 2 * size if two else size
    for m in numba.prange(kept.size // key):
        n, row, h = m // (batch * heads), m // heads % batch, m % heads
        steps = min(size, length - n * size)
        totals = np.empty((size + 1) * WIDTH, np.float32)
        for j in range(0, key, WIDTH):
            c, sums = splat(np.float32(0)), load(kept, m * key + j)
            store(totals, 0, splat(np.float32(1)))
            for t in range(steps):
                c = c + load(g, _at(strides, 0, row, n * size + t, h) + j)
                store(totals, (t + 1) * WIDTH, exp2(c * splat(_LOG2E)))
                at_y = (m * rows + t) * key + j
                sums = sums + load(y, at_y) * load(dwrite, at_y)
                if two:
                    at_y += size * key
                    sums = sums + load(y, at_y) * load(dwrite, at_y)
            sums = sums * load(totals, steps * WIDTH)
            for back in range(steps):
                t = steps - 1 - back
                at_x, at_y = (2 * m * size + t) * key + j, (m * rows + t) * key + j
                to = ((row * length + n * size + t) * heads + h) * key + j
                now, before = load(totals, (t + 1) * WIDTH), load(totals, t * WIDTH)
                inverse = splat(np.float32(1)) / now
                grad_a, grad_q = load(dx, at_x), load(dx, at_x + size * key)
                grad_k = load(dy, at_y + (rows - size) * key)
                sums = (sums + load(x, at_x + size * key) * grad_q
                        - load(y, at_y + (rows - size) * key) * grad_k)
                store(dk, to, grad_k * inverse)
                if two:
                    grad_b = load(dy, at_y)
                    sums = sums - load(y, at_y) * grad_b
                    store(db, to, grad_b * inverse)
                store(dg, to, sums)
                sums = sums + load(x, at_x) * grad_a
                store(da, to, grad_a * before)
                store(dq, to, grad_q * now * splat(np.float32(scale)))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def dots(x, y, key, out):
    """out[r] = sum of row r of x times row r of y, rows of `key` elements."""
    for r in numba.prange(out.size):
        sums = splat(np.float32(0))
        for j in range(r * key, r * key + key, WIDTH):
            sums = sums + load(x, j) * load(y, j)
        out[r] = total(sums)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def mask(dx, x, pair, size, blocks, sums, by_x, by_y):
    """dx *= pair in place, rows 0 .. C-1 by the row of pair before theirs (the first by zero), rows
    C .. 2C-1 by their own; with `sums`, first by_x = row sums of dx x and by_y = column sums.

    dx, x: (N, 2C, blocks C); pair: (N, C, C); by_x: (N, 2C); by_y: (N, C), over blocks; all flat.
    """
    width = blocks * size
    for m in numba.prange(pair.size // (size * size)):
        columns = np.zeros(size, np.float32)
        for r in range(2 * size):
            at = (2 * m * size + r) * width
            factors = (m * size + (r - size if r >= size else max(r - 1, 0))) * size
            row = splat(np.float32(0))
            for block in range(blocks):
                for j in range(0, size, WIDTH):
                    v = load(dx, at + block * size + j)
                    if sums:
                        both = v * load(x, at + block * size + j)
                        row = row + both
                        store(columns, j, load(columns, j) + both)
                    v = v * load(pair, factors + j) if r > 0 else splat(np.float32(0))
                    store(dx, at + block * size + j, v)
            if sums:
                by_x[2 * m * size + r] = total(row)
        if sums:
            for j in range(size):
                by_y[m * size + j] = columns[j]
