"""A causal convolution a channel as products of matrix tiles.

The output is a matrix Y[r, i] = y_{32 r + i}, and y_{32 r + i} = sum over q and j of
k_{32 (r - q) - j} x_{32 q + i + j}, q from -1 to r and j from 0 to 31: products of matrices
A[r, j] and B[j, i] that are never built. With k reversed in memory, each row of A begins 32
elements before the last, and each row of B one element after the last (two, for pairs of
neighbours), which are only strides. Both gradients are convolutions of this kind too, of sequences
reversed in time, x~_t = x_{T-1-t}: dx~ = k * g~ and dk~ = x * g~.

Sequences lie as (time, channels); a task is sixteen channels. A channel needs n^2 / 2 multiply-adds
of bfloat16, summed in float32; up to about 16,000 steps that is less work for the tiles than the
Fourier transforms are for vectors.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store, turn
from manyform.ops.kernels.tiles import (
    SHAPE,
    configure,
    release,
    slide,
    store_half,
    store_pairs,
)

SIDE = 32
BLOCK = SIDE * SIDE
SQUARE = WIDTH * WIDTH


@numba.njit(fastmath=FAST, inline="always")
def _row(x, at, step, t, length):
    """Sixteen channels at time t, zero outside of the sequence."""
    value = splat(np.float32(0))
    if 0 <= t < length:
        value = load(x, at + t * step)
    return value


@numba.njit(fastmath=FAST, cache=True)
def _reverse(x, at, step, length, n, square, halves):
    """halves[c, n - t] = x_t; zeros for other t."""
    size = n + BLOCK + SIDE
    for t in range(-BLOCK, n, WIDTH):
        for i in range(WIDTH):
            store(square, i * WIDTH, _row(x, at, step, t + WIDTH - i, length))
        turn(square, 0, WIDTH, square, 0, WIDTH)
        for c in range(WIDTH):
            store_half(halves, c * size + n - WIDTH - t, load(square, c * WIDTH))


@numba.njit(fastmath=FAST, cache=True)
def _pair(x, at, step, length, n, backwards, square, words):
    """words[c, 32 + t] = the pair (x_t, x_{t+1}), zeros outside; backwards: of x reversed."""
    now = splat(np.float32(0))
    for t0 in range(-SIDE, n + SIDE, WIDTH):
        for t in range(t0, t0 + WIDTH):
            after = _row(x, at, step, length - 2 - t if backwards else t + 1, length)
            store_pairs(square, (t - t0) * WIDTH, now, after)
            now = after
        turn(square, 0, WIDTH, words, SIDE + t0, n + 2 * SIDE)


@numba.njit(cache=True)
def _convolve(halves, words, n, begin, reach, fresh, out):
    """out[c, t] = or += the convolution, for sixteen channels, from the block of t = begin on.

    Lags from reach on are left out where whole tiles of them can be.
    """
    for c in range(WIDTH):
        line = halves.ctypes.data + 2 * (c * (n + BLOCK + SIDE) + n)
        pairs = words.ctypes.data + 4 * c * (n + 2 * SIDE)
        to = out.ctypes.data + 4 * c * n
        for t in range(begin // BLOCK * BLOCK, n, BLOCK):
            q = max(0, (t - reach) // SIDE)  # how many of the factors, q = -1 first, to leave out
            slide(to + 4 * t, 4 * SIDE, fresh, line - 2 * (t + SIDE - q * SIDE), -2 * SIDE,
                  2 * SIDE, pairs + 4 * q * SIDE, 64, 8, 4 * SIDE, t // SIDE + SIDE + 1 - q)


@numba.njit(fastmath=FAST, cache=True)
def _unpack(out, length, n, backwards, square, y, at, step):
    """out[c, t] -> y in (time, channels); backwards: out is reversed."""
    for t0 in range(0, length, WIDTH):
        turn(out, t0, n, square, 0, WIDTH)
        for t in range(t0, min(t0 + WIDTH, length)):
            to = length - 1 - t if backwards else t
            store(y, at + to * step, load(square, (t - t0) * WIDTH))


@numba.njit(parallel=True, cache=True)
def forward(x, k, reach, y, shape, n, floats, words, halves):
    """y = k * x; x, y (B, T, D), k (T, D), zero from reach (D / 16 groups of channels) on.

    floats, words, halves: scratch a worker, see `scratch`.
    """
    batch, length, width = shape
    groups, workers = width // WIDTH, floats.shape[0]
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        square, out = floats[w, :SQUARE], floats[w, SQUARE:]
        bits, pairs = words[w, :SQUARE], words[w, SQUARE:]
        for group in range(w * groups // workers, (w + 1) * groups // workers):
            col = group * WIDTH
            _reverse(k, col, width, length, n, square, halves[w])
            for b in range(batch):
                at = b * length * width + col
                _pair(x, at, width, length, n, False, bits, pairs)
                _convolve(halves[w], pairs, n, 0, reach[group], True, out)
                _unpack(out, length, n, False, square, y, at, width)
        release()


@numba.njit(parallel=True, cache=True)
def backward(g, x, k, reach, dx, dk, shape, n, floats, words, halves):
    """Gradients dx (B, T, D) and dk (T, D), zero from reach on, given that of y."""
    batch, length, width = shape
    groups, workers = width // WIDTH, floats.shape[0]
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        square, out = floats[w, :SQUARE], floats[w, SQUARE:SQUARE + WIDTH * n]
        dk_sum = floats[w, -WIDTH * n:]  # is out where there is one row: scratch fits the cache
        bits, pairs = words[w, :SQUARE], words[w, SQUARE:]
        for group in range(w * groups // workers, (w + 1) * groups // workers):
            col = group * WIDTH
            begin = max(0, length - reach[group]) // BLOCK * BLOCK
            for c in range(WIDTH):
                dk_sum[c * n:c * n + begin] = 0
            for b in range(batch):
                at = b * length * width + col
                _pair(g, at, width, length, n, True, bits, pairs)
                _reverse(x, at, width, length, n, square, halves[w])
                _convolve(halves[w], pairs, n, begin, n, b == 0, dk_sum)
                if b == batch - 1:
                    _unpack(dk_sum, length, n, True, square, dk, col, width)
                _reverse(k, col, width, length, n, square, halves[w])
                _convolve(halves[w], pairs, n, 0, reach[group], True, out)
                _unpack(out, length, n, True, square, dx, at, width)
        release()


def padded(length: int) -> int:
    """Steps that the tiles work on: whole blocks of 32 rows of 32."""
    return -(-length // BLOCK) * BLOCK


def scratch(n: int, copies: int) -> tuple[int, int, int]:
    """Sizes of one worker's floats, words and halves; copies: 2 backward for several rows."""
    return (SQUARE + copies * WIDTH * n, SQUARE + WIDTH * (n + 2 * SIDE),
            WIDTH * (n + BLOCK + SIDE))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def multiply(a, a_row, a_col, b, b_row, b_col, rows, width, y):
    """y (rows, width) = a b, each with its distance between rows and its first column."""
    for row in numba.prange(rows):
        i, j, to = row * a_row + a_col, row * b_row + b_col, row * width
        for c in range(0, width, WIDTH):
            store_half(y, to + c, load(a, i + c) * load(b, j + c))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def open_gates(dy, u, conv, rows, width, du, g):
    """For y = x0 conv, u = (x0, x1, v) side by side: g = dy x0, and the first part of du."""
    for row in numba.prange(rows):
        at, wide = row * width, 3 * row * width
        for c in range(0, width, WIDTH):
            d = load(dy, at + c)
            store_half(g, at + c, d * load(u, wide + c))
            store_half(du, wide + c, d * load(conv, at + c))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def close_gates(dz, dz_too, u, rows, width, du):
    """For z = x1 v: the other parts of du from dz + dz_too (empty for zero)."""
    for row in numba.prange(rows):
        at, wide = row * width, 3 * row * width + width
        for c in range(0, width, WIDTH):
            d = load(dz, at + c)
            if dz_too.size > 0:
                d = d + load(dz_too, at + c)
            store_half(du, wide + c, d * load(u, wide + width + c))
            store_half(du, wide + width + c, d * load(u, wide + c))
