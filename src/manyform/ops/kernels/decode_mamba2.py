"""One decoding step of Mamba-2, from norm to residual, with its states in place."""

from __future__ import annotations

import math

import numba
import numpy as np

from manyform.ops.kernels.decode import SUMS, normalise, product
from manyform.ops.kernels.lanes import FAST, WIDTH, load, sigmoid, splat, store

SHARED = 1 << 15
"""Elements of the state from which the heads are shared out among the threads."""


@numba.njit(fastmath=FAST, cache=True)
def convolve(x, at, taps, bias, state, y):
    """y = silu(bias + sum_k taps[k] * input k), the last of which is x[at:]; the state moves on.

    taps: (K, room), state: (K - 1, room), bias and y: (room,), room a multiple of 16 from which on
    x has elements to read.
    """
    kept, room = state.shape
    weights, held = taps.reshape(-1), state.reshape(-1)
    for j in range(0, room, WIDTH):
        new = load(x, at + j)
        v = load(bias, j) + load(weights, kept * room + j) * new
        for k in range(kept):
            old = load(held, k * room + j)
            v = v + load(weights, k * room + j) * old
            if k:
                store(held, (k - 1) * room + j, old)
        if kept:
            store(held, (kept - 1) * room + j, new)
        store(y, j, v * sigmoid(v))


@numba.njit(fastmath=FAST, cache=True)
def _head(h, xbc, z, dt, rate, skip, ssm, inner, per_group, d, y):
    """y[h] = (S^T c + skip u) silu(z) after S = exp(rate dt) S + b (dt u)^T."""
    states, room = ssm.shape[1], ssm.shape[2]
    flat = ssm.reshape(-1)
    keep = splat(np.float32(math.exp(rate * dt)))
    b = inner + h // per_group * states
    c = b + (ssm.shape[0] // per_group) * states
    scaled, out = np.zeros(room, np.float32), np.empty(room, np.float32)
    for j in range(d):
        scaled[j] = xbc[h * d + j] * dt
    base, block = h * states * room, 4 * WIDTH
    whole = room // block * block
    for p in range(0, whole, block):  # four vectors a row, so that memory is read in its order
        v0, v1 = load(scaled, p), load(scaled, p + WIDTH)
        v2, v3 = load(scaled, p + 2 * WIDTH), load(scaled, p + 3 * WIDTH)
        y0 = splat(np.float32(0))
        y1, y2, y3 = y0, y0, y0
        for n in range(states):
            at, enter, leave = base + n * room + p, splat(xbc[b + n]), splat(xbc[c + n])
            s0 = load(flat, at) * keep + enter * v0
            s1 = load(flat, at + WIDTH) * keep + enter * v1
            s2 = load(flat, at + 2 * WIDTH) * keep + enter * v2
            s3 = load(flat, at + 3 * WIDTH) * keep + enter * v3
            store(flat, at, s0)
            store(flat, at + WIDTH, s1)
            store(flat, at + 2 * WIDTH, s2)
            store(flat, at + 3 * WIDTH, s3)
            y0, y1, y2, y3 = (y0 + leave * s0, y1 + leave * s1, y2 + leave * s2, y3 + leave * s3)
        store(out, p, y0)
        store(out, p + WIDTH, y1)
        store(out, p + 2 * WIDTH, y2)
        store(out, p + 3 * WIDTH, y3)
    for p in range(whole, room, WIDTH):
        v, total = load(scaled, p), splat(np.float32(0))
        for n in range(states):
            at = base + n * room + p
            s = load(flat, at) * keep + splat(xbc[b + n]) * v
            store(flat, at, s)
            total = total + splat(xbc[c + n]) * s
        store(out, p, total)
    for j in range(d):
        y[h * d + j] = (out[j] + skip * xbc[h * d + j]) * z[h * d + j]


@numba.njit(parallel=True, cache=True)
def _heads_shared(xbc, z, dt, rates, skips, ssm, inner, per_group, d, y):
    for h in numba.prange(ssm.shape[0]):
        _head(h, xbc, z, dt[h], rates[h], skips[h], ssm, inner, per_group, d, y)


@numba.njit(fastmath=SUMS, cache=True)
def _normalise_groups(y, weight, groups, eps):
    size = weight.size // groups
    for g in range(groups):
        square = np.float32(0)
        for j in range(g * size, (g + 1) * size):
            square += y[j] * y[j]
        r = np.float32(1) / np.sqrt(square / np.float32(size) + np.float32(eps))
        for j in range(g * size, (g + 1) * size):
            y[j] *= r * weight[j]


@numba.njit(fastmath=FAST, cache=True)
def mamba2(stream, residual, norm, norm_weight, norm_bias, eps, in_proj, taps, conv_bias, dt_bias,
           rates, skips, inner_norm, out_proj, groups, d, conv, ssm, x, projected, xbc, z, dt, y,
           threads):
    """stream (+)= mamba2(norm(stream)).

    conv: (taps - 1, room), ssm: (heads, d_state, d rounded up to 16). projected, z, x, xbc, y:
    scratch. rates: -exp(A_log).
    """
    heads, inner = ssm.shape[0], inner_norm.size
    normalise(stream, norm, norm_weight, norm_bias, eps, x)
    product(in_proj, x, norm_bias[:0], projected, False, threads)
    convolve(projected, inner, taps, conv_bias, conv, xbc)
    for j in range(0, inner, WIDTH):
        v = load(projected, j)
        store(z, j, v * sigmoid(v))
    first = in_proj.shape[0] - heads
    for h in range(heads):
        v = projected[first + h] + dt_bias[h]
        dt[h] = np.float32(max(v, 0) + math.log1p(math.exp(-abs(v))))
    if threads > 1 and ssm.size >= SHARED:
        _heads_shared(xbc, z, dt, rates, skips, ssm, inner, heads // groups, d, y)
    else:
        for h in range(heads):
            _head(h, xbc, z, dt[h], rates[h], skips[h], ssm, inner, heads // groups, d, y)
    _normalise_groups(y, inner_norm, groups, 1e-5)
    product(out_proj, y, norm_bias[:0], stream, residual, threads)
