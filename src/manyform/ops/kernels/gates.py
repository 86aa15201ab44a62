"""The loops of `ops.gates`. Flat arrays with the strides given, or dense (B, T, H, V)."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    exp2,
    get,
    load,
    maximum,
    minimum,
    put,
    sigmoid,
    splat,
    store,
    total,
)

_LOG2E = np.float32(1.4426950408889634)
BLOCK = 64


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def elu_plus_one(x, strides, y, shape):
    """y = e^min(x, 0) + max(x, 0)."""
    batch, length, width = shape
    zero, log2e = splat(np.float32(0)), splat(_LOG2E)
    for index in numba.prange(batch * length):
        row = np.int64(index)
        at = row // length * strides[0] + row % length * strides[1]
        for d in range(0, width, WIDTH):
            v = load(x, at + d)
            store(y, row * width + d, exp2(minimum(v, zero) * log2e) + maximum(v, zero))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def elu_plus_one_backward(g, y, dx, shape):
    """dx = g min(y, 1): the slope is e^x = y where x < 0, and 1 elsewhere."""
    batch, length, width = shape
    one = splat(np.float32(1))
    for index in numba.prange(batch * length):
        at = np.int64(index) * width
        for d in range(at, at + width, WIDTH):
            store(dx, d, load(g, d) * minimum(load(y, d), one))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def silu_gate(y, ys, z, zs, u, us, skip, skips, out, shape):
    """out = (y + skip u) z sigmoid(z)."""
    batch, length, heads, width = shape
    for index in numba.prange(batch * length):
        row = np.int64(index)
        b, t = row // length, row % length
        for h in range(heads):
            for d in range(0, width, WIDTH):
                inner = load(y, b * ys[0] + t * ys[1] + h * ys[2] + d)
                if skips:
                    inner = inner + splat(skip[h]) * load(
                        u, b * us[0] + t * us[1] + h * us[2] + d)
                gate = load(z, b * zs[0] + t * zs[1] + h * width + d)
                store(out, (row * heads + h) * width + d, inner * gate * sigmoid(gate))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def silu_gate_backward(g, y, ys, z, zs, u, us, skip, skips, dy, dz, du, dskip, shape):
    """dskip: one row for each block of BLOCK steps."""
    batch, length, heads, width = shape
    rows = batch * length
    one = splat(np.float32(1))
    for index in numba.prange((rows + BLOCK - 1) // BLOCK):
        block = np.int64(index)
        for row in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            b, t = row // length, row % length
            for h in range(heads):
                sums = splat(np.float32(0))
                for d in range(0, width, WIDTH):
                    at = (row * heads + h) * width + d
                    inner = load(y, b * ys[0] + t * ys[1] + h * ys[2] + d)
                    gate = load(z, b * zs[0] + t * zs[1] + h * width + d)
                    s = sigmoid(gate)
                    grad = load(g, at)
                    through = grad * gate * s
                    store(dy, at, through)
                    if skips:
                        other = load(u, b * us[0] + t * us[1] + h * us[2] + d)
                        inner = inner + splat(skip[h]) * other
                        sums = sums + through * other
                        store(du, at, through * splat(skip[h]))
                    store(dz, at, grad * inner * s * (one + gate * (one - s)))
                if skips:
                    dskip[block * heads + h] += total(sums)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def scale_heads(x, xs, factor, y, shape):
    """y = x * factor."""
    batch, length, heads, width = shape
    for index in numba.prange(batch * length):
        row = np.int64(index)
        b, t = row // length, row % length
        for h in range(heads):
            f = splat(factor[row * heads + h])
            for d in range(0, width, WIDTH):
                store(y, (row * heads + h) * width + d,
                      f * load(x, b * xs[0] + t * xs[1] + h * xs[2] + d))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def scale_heads_backward(g, more, x, xs, factor, dx, dfactor, shape):
    """dx = g * factor, plus `more` if it has elements; dfactor = g . x."""
    batch, length, heads, width = shape
    for index in numba.prange(batch * length):
        row = np.int64(index)
        b, t = row // length, row % length
        for h in range(heads):
            f = splat(factor[row * heads + h])
            sums = splat(np.float32(0))
            for d in range(0, width, WIDTH):
                at = (row * heads + h) * width + d
                grad = load(g, at)
                sums = sums + grad * load(x, b * xs[0] + t * xs[1] + h * xs[2] + d)
                grad = grad * f
                store(dx, at, grad + load(more, at) if more.size else grad)
            dfactor[row * heads + h] = total(sums)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def divide_by_last(y, z, eps, width):
    """z = y / (last of y + eps); dense rows of width + 1 and width."""
    for row in numba.prange(z.size // width):
        at, to = row * (width + 1), row * width
        scale = splat(np.float32(1) / (get(y, at + width) + np.float32(eps)))
        for d in range(0, width, WIDTH):
            store(z, to + d, load(y, at + d) * scale)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def divide_by_last_backward(g, y, dy, eps, width):
    """dy = g / s, and -sum(g y) / s^2 for the last, s = last of y + eps."""
    for row in numba.prange(g.size // width):
        at, to = row * (width + 1), row * width
        scale = np.float32(1) / (get(y, at + width) + np.float32(eps))
        sums = splat(np.float32(0))
        for d in range(0, width, WIDTH):
            grad = load(g, to + d)
            sums = sums + grad * load(y, at + d)
            store(dy, at + d, grad * splat(scale))
        put(dy, at + width, -total(sums) * scale * scale)
