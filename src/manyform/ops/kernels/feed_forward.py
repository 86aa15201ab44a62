"""Two linear maps with an activation between, on matrix tiles (see `tiles`): a block of tokens in
cache.

With X (tokens, D), W (m H, D), f and W_d (D, H), for a block of tokens

    Z = X W^T    A = f(Z)    Y = A W_d^T

and back, from dY, with Z computed again,

    dA = dY W_d    dZ = f'(Z; dA)    dX = dZ W    dW^T += X^T dZ    dW_d += dY^T A

where m = 2 for f = SwiGLU, of a gate and what it lets through, else 1. Nothing of H features a
token is ever written to memory. Products are of bfloat16 and summed in float32; X, dY, A and dZ are
rounded to bfloat16, Z and dA are not.

Operands lie in panels (see `panels`).
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import positive
from manyform.ops.kernels.lanes import FAST, WIDTH, load, maximum, splat, store, turn
from manyform.ops.kernels.panels import (
    BYTES,
    LENGTH,
    SIDE,
    STEP,
    across,
    multiply,
    read,
    tile,
    write,
)
from manyform.ops.kernels.tiles import (
    SHAPE,
    configure,
    gelu,
    gelu_slope,
    release,
    sigmoid,
    store_half,
    store_pairs,
)

SWIGLU, GELU, RELU, RELU2 = range(4)


@numba.njit(inline="always")
def _apply(kind, g, u):
    """f of sixteen elements; u, what a gate lets through, is read by SwiGLU only."""
    if kind == SWIGLU:
        return g * sigmoid(g) * u
    if kind == GELU:
        return gelu(g)
    g = maximum(g, splat(np.float32(0)))
    return g if kind == RELU else g * g


@numba.njit(inline="always")
def _back(kind, g, u, da):
    """f, and the gradients of g and u."""
    if kind == SWIGLU:
        s = sigmoid(g)
        silu = g * s
        return silu * u, da * u * (s + silu * (splat(np.float32(1)) - s)), da * silu
    if kind == GELU:
        return gelu(g), da * gelu_slope(g), u
    z = maximum(g, splat(np.float32(0)))
    if kind == RELU:
        return z, positive(da, g), u
    return z * z, da * (z + z), u


@numba.njit(fastmath=FAST, cache=True)
def _activate(kind, gate, up, into, at):
    for j in range(0, STEP, WIDTH):
        store_half(into, at + j, _apply(kind, load(gate, j), load(up, j)))


@numba.njit(fastmath=FAST, cache=True)
def _activate_back(kind, gate, up, da, pairs, at, area, rows, base):
    """Steps of panels of B: A and dZ, `area` words apart; and of A: dZ, of gate and up in turn."""
    for t in range(0, SIDE, 2):
        for side in range(2):
            j, k = t * SIDE + side * WIDTH, (t + 1) * SIDE + side * WIDTH
            a0, g0, u0 = _back(kind, load(gate, j), load(up, j), load(da, j))
            a1, g1, u1 = _back(kind, load(gate, k), load(up, k), load(da, k))
            to = at + side * STEP // 4 + t // 2 * WIDTH
            store_pairs(pairs, to, a0, a1)
            store_pairs(pairs, to + area, g0, g1)
            store_half(rows, base + j, g0)
            store_half(rows, base + k, g1)
            if kind == SWIGLU:
                store_pairs(pairs, to + 2 * area, u0, u1)
                store_half(rows, base + STEP + j, u0)
                store_half(rows, base + STEP + k, u1)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(kind, x, tokens, d, hidden, block, up, down, y, floats, halves):
    """y, flat rows of d as x; up, down: panels of B = W^T and W_d^T; floats, halves: scratch, a row
    a worker."""
    steps, slabs, squares = d // SIDE, hidden // SIDE, block // SIDE
    blocks, workers, panel = (tokens + block - 1) // block, floats.shape[0], d * 2 * SIDE
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h = floats[worker], halves[worker]
        one, two, c = f[:STEP], f[STEP:2 * STEP], f[2 * STEP:]
        own, act = h[:block * d], h[block * d:]
        two[:] = 0
        for n in range(worker * blocks // workers, (worker + 1) * blocks // workers):
            first = n * block
            count = min(block, tokens - first)
            read(x, first, count, block, d, own)
            for j in range(slabs):
                at = up.ctypes.data + j * panel
                for i in range(squares):
                    a = own.ctypes.data + i * panel
                    tile(one.ctypes.data, True, a, at, steps)
                    if kind == SWIGLU:
                        tile(two.ctypes.data, True, a, at + slabs * panel, steps)
                    _activate(kind, one, two, act, (i * slabs + j) * STEP)
            multiply(c.ctypes.data, True, act.ctypes.data, slabs * BYTES, down.ctypes.data,
                     slabs * BYTES, squares, steps, slabs)
            write(c, first, count, d, y)
        release()


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(kind, x, dy, tokens, d, hidden, block, up, down, up_rows, dx, sums, floats, halves,
             words):
    """dx, and sums over a share of the tokens each, (workers, slabs, 1 + m, d, 32): of dW_d and
    dW^T in squares.

    up: as in `forward`; down: panels of B = W_d; up_rows: of B = W, for SwiGLU 32 rows of the gate,
    32 of the other, and so on.
    """
    steps, slabs, squares = d // SIDE, hidden // SIDE, block // SIDE
    blocks, workers, panel = (tokens + block - 1) // block, floats.shape[0], d * 2 * SIDE
    area, wide, maps = block * SIDE, block * d, 2 if kind == SWIGLU else 1
    each = LENGTH // maps
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, pairs = floats[worker], halves[worker], words[worker]
        one, two, da, c = f[:STEP], f[STEP:2 * STEP], f[2 * STEP:3 * STEP], f[3 * STEP:]
        own, given, rows = h[:wide], h[wide:2 * wide], h[4 * wide:]
        own_across, given_across = h[2 * wide:3 * wide], h[3 * wide:4 * wide]
        two[:] = 0
        begin = worker * blocks // workers
        for n in range(begin, (worker + 1) * blocks // workers):
            first = n * block
            count = min(block, tokens - first)
            read(x, first, count, block, d, own)
            read(dy, first, count, block, d, given)
            across(own, block, d, own_across)
            across(given, block, d, given_across)
            for j in range(slabs):
                at, k = up.ctypes.data + j * panel, j % each
                for i in range(squares):
                    a, g = own.ctypes.data + i * panel, given.ctypes.data + i * panel
                    tile(one.ctypes.data, True, a, at, steps)
                    if kind == SWIGLU:
                        tile(two.ctypes.data, True, a, at + slabs * panel, steps)
                    tile(da.ctypes.data, True, g, down.ctypes.data + j * panel, steps)
                    _activate_back(kind, one, two, da, pairs, i * STEP // 2, area // 2, rows,
                                   (i * LENGTH + maps * k) * STEP)
                for part in range(1 + maps):
                    left = given_across if part == 0 else own_across
                    to = ((worker * slabs + j) * (1 + maps) + part) * SIDE * d
                    multiply(sums[to:].ctypes.data, n == begin, left.ctypes.data,
                             squares * BYTES, pairs[part * area // 2:].ctypes.data, 0, steps, 1,
                             squares)
                if k == each - 1 or j == slabs - 1:
                    multiply(c.ctypes.data, j == k, rows.ctypes.data, LENGTH * BYTES,
                             up_rows.ctypes.data + maps * (j - k) * BYTES, maps * slabs * BYTES,
                             squares, steps, maps * (k + 1))
            write(c, first, count, d, dx)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _cut(square, into, row, rows, column, columns):
    """What of a square of 32 by 32 lies within a matrix."""
    for r in range(min(SIDE, rows - row)):
        to = (row + r) * columns + column
        for j in range(0, SIDE, WIDTH):
            if column + j + WIDTH <= columns:
                store(into, to + j, load(square, r * SIDE + j))
            else:
                for k in range(j, min(j + WIDTH, columns - column)):
                    into[to + k] = square[r * SIDE + k]


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def finish(sums, workers, d, hidden, dup, ddown):
    """Add up the shares; dup: (m, hidden, d), ddown: (d, hidden), flat."""
    slabs, parts = (hidden + SIDE - 1) // SIDE, 1 + dup.size // ddown.size
    share = slabs * parts * SIDE * d
    for j in numba.prange(slabs):
        square, turned = np.empty(STEP, np.float32), np.empty(STEP, np.float32)
        for part in range(parts):
            for i in range(d // SIDE):
                at = (j * parts + part) * SIDE * d + i * STEP
                for k in range(0, STEP, WIDTH):
                    acc = load(sums, at + k)
                    for w in range(1, workers):
                        acc = acc + load(sums, w * share + at + k)
                    store(square, k, acc)
                if part == 0:
                    _cut(square, ddown, i * SIDE, d, j * SIDE, hidden)
                    continue
                for r in range(0, SIDE, WIDTH):
                    for s in range(0, SIDE, WIDTH):
                        turn(square, r * SIDE + s, SIDE, turned, s * SIDE + r, SIDE)
                _cut(turned, dup[(part - 1) * hidden * d:], j * SIDE, hidden, i * SIDE, d)


def scratch(d, hidden, block, gradient):
    """Sizes of one worker's floats, halves and words."""
    if not gradient:
        return 2 * STEP + block * d, block * (d + hidden), 0
    return 3 * STEP + block * d, block * (4 * d + LENGTH * SIDE), 3 * block * SIDE // 2
