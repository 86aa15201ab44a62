"""Two linear maps with an activation between, on matrix tiles (see `tiles`): a block of tokens in
cache.

With X (tokens, D), W (m H, D), f and W_d (D, H), for a block of tokens

    Z = X W^T    A = f(Z)    Y = A W_d^T

and back, from dY, with Z computed again,

    dA = dY W_d    dZ = f'(Z; dA)    dX = dZ W    dW^T += X^T dZ    dW_d += dY^T A

where m = 2 for f = SwiGLU, of a gate and what it lets through, else 1. Nothing of H features a
token is ever written to memory. Products are of bfloat16 and summed in float32; X, dY, A and dZ are
rounded to bfloat16, Z and dA are not.

An operand of a product lies in panels, 32 rows (of A) or columns (of B) by 32 steps of the sum
after the other, each of two tiles; so every product reads memory from front to back. `LENGTH` such
steps of two panels fit into the first-level cache.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import _pair_block, _turn_block, positive
from manyform.ops.kernels.lanes import FAST, WIDTH, load, maximum, splat, store
from manyform.ops.kernels.tiles import (
    SHAPE,
    configure,
    gelu,
    gelu_slope,
    product,
    release,
    sigmoid,
    store_half,
    store_pairs,
)

SIDE = 32
STEP = SIDE * SIDE  # elements of a panel's step
BYTES = 2 * STEP
LENGTH = 8
SWIGLU, GELU, RELU = range(3)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def pack(w, columns, turned, panels):
    """Panels of B from a dense matrix w of bfloat16: B = w^T if turned, else B = w, which has
    `columns` columns; both sides multiples of 32."""
    rows = w.size // columns
    outer, steps = (rows, columns // SIDE) if turned else (columns, rows // SIDE)
    for panel in numba.prange(outer // SIDE):
        for s in range(steps):
            for side in range(2):
                to = panels.ctypes.data + (panel * steps + s) * BYTES + side * BYTES // 2
                n = panel * SIDE + side * WIDTH
                if turned:
                    at = w.ctypes.data + 2 * (n * columns + s * SIDE)
                    _turn_block(at, 2 * columns, to, 4 * WIDTH)
                else:
                    at = w.ctypes.data + 2 * (s * SIDE * columns + n)
                    for r in range(WIDTH):
                        _pair_block(at + 4 * r * columns, at + (4 * r + 2) * columns,
                                    to + 4 * r * WIDTH)


@numba.njit(fastmath=FAST, cache=True)
def _read(z, first, tokens, block, d, panels):
    """Panels of A from rows of z; zeros after the last."""
    for t in range(block):
        to = t // SIDE * SIDE * d + t % SIDE * SIDE
        for j in range(0, d, SIDE):
            if t < tokens:
                at = (first + t) * d + j
                store_half(panels, to + j * SIDE, load(z, at))
                store_half(panels, to + j * SIDE + WIDTH, load(z, at + WIDTH))
            else:
                panels[to + j * SIDE:to + j * SIDE + SIDE] = 0


@numba.njit(fastmath=FAST, cache=True)
def _across(panels, block, d, into):
    """Panels of A = Z^T from those of A = Z: the sum runs over the block's tokens."""
    steps = block // SIDE
    for i in range(steps):
        for j in range(d // SIDE):
            at = panels.ctypes.data + (i * (d // SIDE) + j) * BYTES
            to = into.ctypes.data + (j * steps + i) * BYTES
            for side in range(2):
                there, here = to + side * BYTES // 2, at + 2 * side * WIDTH
                for r in range(WIDTH):
                    _pair_block(here + 4 * r * SIDE, here + (4 * r + 2) * SIDE,
                                there + 4 * r * WIDTH)
                _turn_block(there, 4 * WIDTH, there, 4 * WIDTH)


@numba.njit(fastmath=FAST, cache=True)
def _tile(c, fresh, a, b, steps):
    """A square of C, 32 dense rows of float32, = (fresh) or += `steps` steps of two panels."""
    product(c, 4 * SIDE, fresh, a, 2 * SIDE, BYTES, b, BYTES // 2, BYTES, steps)


@numba.njit(fastmath=FAST, cache=True)
def _multiply(c, fresh, a, a_panel, b, b_panel, rows, columns, steps):
    """Squares of C, row after row of them, by all panels of A and B, which lie a_panel and b_panel
    bytes apart."""
    for s in range(0, steps, LENGTH):
        for j in range(columns):
            for i in range(rows):
                _tile(c + 4 * STEP * (i * columns + j), fresh and s == 0,
                      a + i * a_panel + s * BYTES, b + j * b_panel + s * BYTES,
                      min(LENGTH, steps - s))


@numba.njit(fastmath=FAST, cache=True)
def _write(c, first, tokens, d, z):
    """Rows of z from squares of C."""
    for t in range(tokens):
        at, to = t // SIDE * SIDE * d + t % SIDE * SIDE, (first + t) * d
        for j in range(0, d, SIDE):
            store_half(z, to + j, load(c, at + j * SIDE))
            store_half(z, to + j + WIDTH, load(c, at + j * SIDE + WIDTH))


@numba.njit(inline="always")
def _apply(kind, g, u):
    """f of sixteen elements; u, what a gate lets through, is read by SwiGLU only."""
    if kind == SWIGLU:
        return g * sigmoid(g) * u
    if kind == GELU:
        return gelu(g)
    return maximum(g, splat(np.float32(0)))


@numba.njit(inline="always")
def _back(kind, g, u, da):
    """f, and the gradients of g and u."""
    if kind == SWIGLU:
        s = sigmoid(g)
        silu = g * s
        return silu * u, da * u * (s + silu * (splat(np.float32(1)) - s)), da * silu
    if kind == GELU:
        return gelu(g), da * gelu_slope(g), u
    return maximum(g, splat(np.float32(0))), positive(da, g), u


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
            _read(x, first, count, block, d, own)
            for j in range(slabs):
                at = up.ctypes.data + j * panel
                for i in range(squares):
                    a = own.ctypes.data + i * panel
                    _tile(one.ctypes.data, True, a, at, steps)
                    if kind == SWIGLU:
                        _tile(two.ctypes.data, True, a, at + slabs * panel, steps)
                    _activate(kind, one, two, act, (i * slabs + j) * STEP)
            _multiply(c.ctypes.data, True, act.ctypes.data, slabs * BYTES, down.ctypes.data,
                      slabs * BYTES, squares, steps, slabs)
            _write(c, first, count, d, y)
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
            _read(x, first, count, block, d, own)
            _read(dy, first, count, block, d, given)
            _across(own, block, d, own_across)
            _across(given, block, d, given_across)
            for j in range(slabs):
                at, k = up.ctypes.data + j * panel, j % each
                for i in range(squares):
                    a, g = own.ctypes.data + i * panel, given.ctypes.data + i * panel
                    _tile(one.ctypes.data, True, a, at, steps)
                    if kind == SWIGLU:
                        _tile(two.ctypes.data, True, a, at + slabs * panel, steps)
                    _tile(da.ctypes.data, True, g, down.ctypes.data + j * panel, steps)
                    _activate_back(kind, one, two, da, pairs, i * STEP // 2, area // 2, rows,
                                   (i * LENGTH + maps * k) * STEP)
                for part in range(1 + maps):
                    across = given_across if part == 0 else own_across
                    to = ((worker * slabs + j) * (1 + maps) + part) * SIDE * d
                    _multiply(sums[to:].ctypes.data, n == begin, across.ctypes.data,
                              squares * BYTES, pairs[part * area // 2:].ctypes.data, 0, steps, 1,
                              squares)
                if k == each - 1 or j == slabs - 1:
                    _multiply(c.ctypes.data, j == k, rows.ctypes.data, LENGTH * BYTES,
                              up_rows.ctypes.data + maps * (j - k) * BYTES, maps * slabs * BYTES,
                              squares, steps, maps * (k + 1))
            _write(c, first, count, d, dx)
        release()


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def finish(sums, workers, d, hidden, dup, ddown):
    """Add up the shares; dup: (m, hidden, d), ddown: (d, hidden), flat."""
    slabs, parts = hidden // SIDE, 1 + dup.size // ddown.size
    share = slabs * parts * SIDE * d
    for j in numba.prange(slabs):
        square = np.empty(STEP, np.float32)
        for part in range(parts):
            for i in range(d // SIDE):
                at = (j * parts + part) * SIDE * d + i * STEP
                for k in range(0, STEP, WIDTH):
                    acc = load(sums, at + k)
                    for w in range(1, workers):
                        acc = acc + load(sums, w * share + at + k)
                    store(square, k, acc)
                if part == 0:
                    for r in range(SIDE):
                        to = (i * SIDE + r) * hidden + j * SIDE
                        store(ddown, to, load(square, r * SIDE))
                        store(ddown, to + WIDTH, load(square, r * SIDE + WIDTH))
                    continue
                base = ((part - 1) * hidden + j * SIDE) * d + i * SIDE
                for r in range(0, SIDE, WIDTH):
                    for s in range(0, SIDE, WIDTH):
                        _turn_block(square.ctypes.data + 4 * (r * SIDE + s), 4 * SIDE,
                                    dup.ctypes.data + 4 * (base + s * d + r), 4 * d)


def scratch(d, hidden, block, gradient):
    """Sizes of one worker's floats, halves and words."""
    if not gradient:
        return 2 * STEP + block * d, block * (d + hidden), 0
    return 3 * STEP + block * d, block * (4 * d + LENGTH * SIDE), 3 * block * SIDE // 2
