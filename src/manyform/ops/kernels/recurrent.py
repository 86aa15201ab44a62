"""A layer of a classic recurrent network and its gradient for the CPU: a task for every four rows
of the batch, which share each load of the recurrent weights.

Hidden states have `size` features, a multiple of 32; gates are such parts side by side. What the
gradient needs of a step is kept in KEPT parts: tanh, relu: h; gru: r, s, n and u_n; lstm: i, f, g,
o, tanh(c) and the c before.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import positive
from manyform.ops.kernels.lanes import FAST, WIDTH, load, maximum, sigmoid, splat, store

CELLS = {"tanh": 0, "relu": 1, "gru": 2, "lstm": 3}
KEPT = {"tanh": 1, "relu": 1, "gru": 4, "lstm": 6}
ROWS = 4
SIDE = 2 * WIDTH
_TANH, _RELU, _GRU = 0, 1, 2


@numba.njit(fastmath=FAST, inline="always")
def _tanh(v):
    two = splat(np.float32(2))
    return two * sigmoid(two * v) - splat(np.float32(1))


@numba.njit(fastmath=FAST, cache=True)
def _product(weights, width, fed, count, out):
    """out (ROWS, width) += fed (ROWS, count) weights (count, width)."""
    for o in range(0, width, SIDE):
        a0, a1 = load(out, o), load(out, o + WIDTH)
        b0, b1 = load(out, width + o), load(out, width + o + WIDTH)
        c0, c1 = load(out, 2 * width + o), load(out, 2 * width + o + WIDTH)
        d0, d1 = load(out, 3 * width + o), load(out, 3 * width + o + WIDTH)
        for j in range(count):
            w0, w1 = load(weights, j * width + o), load(weights, j * width + o + WIDTH)
            a, b = splat(fed[j]), splat(fed[count + j])
            c, d = splat(fed[2 * count + j]), splat(fed[3 * count + j])
            a0, a1 = a0 + a * w0, a1 + a * w1
            b0, b1 = b0 + b * w0, b1 + b * w1
            c0, c1 = c0 + c * w0, c1 + c * w1
            d0, d1 = d0 + d * w0, d1 + d * w1
        store(out, o, a0)
        store(out, o + WIDTH, a1)
        store(out, width + o, b0)
        store(out, width + o + WIDTH, b1)
        store(out, 2 * width + o, c0)
        store(out, 2 * width + o + WIDTH, c1)
        store(out, 3 * width + o, d0)
        store(out, 3 * width + o + WIDTH, d1)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(cell, z, weights, bias, reset, h, c, y, before, kept, dims):
    """z: flat (B, T, G size); weights: flat (size, G size), U transposed; bias: flat (G size);
    reset: (B, T) or empty; h: flat (B, size), the state before at the call and after at the end;
    c: so, of the LSTM, else empty; y: flat (B, T, size); before, kept: flat (B, T, size), the state
    each step began with, and (B, T, KEPT size), or empty."""
    batch, length, size, gates = dims
    width, parts = gates * size, kept.size // max(1, before.size)
    zero = splat(np.float32(0))
    for task in numba.prange((batch + ROWS - 1) // ROWS):
        first = task * ROWS
        rows = min(ROWS, batch - first)
        fed = np.zeros(ROWS * size, np.float32)
        sums = np.empty(ROWS * width, np.float32)
        for j in range(0, rows * size, WIDTH):
            store(fed, j, load(h, first * size + j))
        for t in range(length):
            for r in range(rows):
                step = ((first + r) * length + t) * size
                if reset.size > 0 and reset[first + r, t]:
                    for j in range(0, size, WIDTH):
                        store(fed, r * size + j, zero)
                        if c.size > 0:
                            store(c, (first + r) * size + j, zero)
                if before.size > 0:
                    for j in range(0, size, WIDTH):
                        store(before, step + j, load(fed, r * size + j))
            for r in range(ROWS):
                for j in range(0, width, WIDTH):
                    store(sums, r * width + j, load(bias, j))
            _product(weights, width, fed, size, sums)
            for r in range(rows):
                step = ((first + r) * length + t) * size
                for j in range(0, size, WIDTH):
                    now, keep, u = r * size + j, step * parts + j, r * width + j
                    at = step * gates + j
                    if cell <= _RELU:
                        out = load(z, at) + load(sums, u)
                        out = _tanh(out) if cell == _TANH else maximum(out, zero)
                        if parts:
                            store(kept, keep, out)
                    elif cell == _GRU:
                        u_n = load(sums, u + 2 * size)
                        gate = sigmoid(load(z, at) + load(sums, u))
                        stay = sigmoid(load(z, at + size) + load(sums, u + size))
                        new = _tanh(load(z, at + 2 * size) + gate * u_n)
                        out = new + stay * (load(fed, now) - new)
                        if parts:
                            store(kept, keep, gate)
                            store(kept, keep + size, stay)
                            store(kept, keep + 2 * size, new)
                            store(kept, keep + 3 * size, u_n)
                    else:
                        held = (first + r) * size + j
                        i = sigmoid(load(z, at) + load(sums, u))
                        f = sigmoid(load(z, at + size) + load(sums, u + size))
                        g = _tanh(load(z, at + 2 * size) + load(sums, u + 2 * size))
                        o = sigmoid(load(z, at + 3 * size) + load(sums, u + 3 * size))
                        memory = load(c, held)
                        if parts:
                            store(kept, keep + 5 * size, memory)
                        memory = f * memory + i * g
                        level = _tanh(memory)
                        out = o * level
                        store(c, held, memory)
                        if parts:
                            store(kept, keep, i)
                            store(kept, keep + size, f)
                            store(kept, keep + 2 * size, g)
                            store(kept, keep + 3 * size, o)
                            store(kept, keep + 4 * size, level)
                    store(y, step + j, out)
                    store(fed, now, out)
        for j in range(0, rows * size, WIDTH):
            store(h, first * size + j, load(fed, j))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(cell, kept, before, weights, reset, dy, dh, dc, dz, du, dims):
    """weights: flat (G size, size), U; dy: flat (B, T, size); dh, dc: flat (B, size), gradients of
    the last state at the call and of the first at the end; dz: flat (B, T, G size), of the gates'
    sum; du: so, of what U adds to it, for the GRU, else empty."""
    batch, length, size, gates = dims
    width, parts = gates * size, kept.size // max(1, before.size)
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    for task in numba.prange((batch + ROWS - 1) // ROWS):
        first = task * ROWS
        rows = min(ROWS, batch - first)
        fed = np.zeros(ROWS * size, np.float32)
        mine = np.zeros(ROWS * width, np.float32)
        for j in range(0, rows * size, WIDTH):
            store(fed, j, load(dh, first * size + j))
        for t in range(length - 1, -1, -1):
            for r in range(rows):
                step = ((first + r) * length + t) * size
                for j in range(0, size, WIDTH):
                    now, keep, u = r * size + j, step * parts + j, r * width + j
                    at = step * gates + j
                    out = load(fed, now) + load(dy, step + j)
                    rest = zero
                    if cell <= _RELU:
                        h = load(kept, keep)
                        if cell == _TANH:
                            out = out * (one - h * h)
                        else:
                            out = positive(out, h)
                        store(mine, u, out)
                        store(dz, at, out)
                    elif cell == _GRU:
                        gate, stay = load(kept, keep), load(kept, keep + size)
                        new, u_n = load(kept, keep + 2 * size), load(kept, keep + 3 * size)
                        of_new = out * (one - stay) * (one - new * new)
                        of_gate = of_new * u_n * gate * (one - gate)
                        of_stay = out * (load(before, step + j) - new) * stay * (one - stay)
                        rest = out * stay
                        store(mine, u, of_gate)
                        store(mine, u + size, of_stay)
                        store(mine, u + 2 * size, of_new * gate)
                        store(dz, at, of_gate)
                        store(dz, at + size, of_stay)
                        store(dz, at + 2 * size, of_new)
                        store(du, at, of_gate)
                        store(du, at + size, of_stay)
                        store(du, at + 2 * size, of_new * gate)
                    else:
                        held = (first + r) * size + j
                        i, f = load(kept, keep), load(kept, keep + size)
                        g, o = load(kept, keep + 2 * size), load(kept, keep + 3 * size)
                        level = load(kept, keep + 4 * size)
                        of_c = load(dc, held) + out * o * (one - level * level)
                        store(mine, u, of_c * g * i * (one - i))
                        store(mine, u + size,
                              of_c * load(kept, keep + 5 * size) * f * (one - f))
                        store(mine, u + 2 * size, of_c * i * (one - g * g))
                        store(mine, u + 3 * size, out * level * o * (one - o))
                        store(dc, held, of_c * f)
                        for k in range(4):
                            store(dz, at + k * size, load(mine, u + k * size))
                    store(fed, now, rest)
            _product(weights, size, mine, width, fed)
            if reset.size > 0:
                for r in range(rows):
                    if reset[first + r, t]:
                        for j in range(0, size, WIDTH):
                            store(fed, r * size + j, zero)
                            if dc.size > 0:
                                store(dc, (first + r) * size + j, zero)
        for j in range(0, rows * size, WIDTH):
            store(dh, first * size + j, load(fed, j))
