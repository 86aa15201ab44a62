"""Rows of queries and keys of a chunk for `decay_tiles`, and the way back to their gradients.

PLAIN rows are used as they are, with decays of a channel as `decay_tiles` says. RANDOM ones become
random features, e^(w . x - shift) + eps, with the shifts that `ops.kernel_average` describes;
COSINE ones relu(x) cos a, relu(x) sin a. Features live in cache only, and the way back makes them
anew.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import fetch, multiply, positive
from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    largest,
    load,
    maximum,
    put,
    splat,
    store,
    total,
)
from manyform.ops.kernels.tiles import exp2, store_half

PLAIN, RANDOM, COSINE = 0, 1, 2
"""Maps from rows to features."""
NONE, HEAD, CHANNEL = 0, 1, 2
"""Kinds of decay."""
LOG2E = np.float32(1.4426950408889634)


@numba.njit(fastmath=FAST, cache=True)
def starts(strides, dims, row, share, first):
    """Where a chunk begins: in q, k and g."""
    group = share // dims[7]
    return (row * strides[0, 0] + first * strides[0, 1] + group * strides[0, 2],
            row * strides[1, 0] + first * strides[1, 1] + group * strides[1, 2],
            row * strides[3, 0] + first * strides[3, 1] + share * strides[3, 2])


@numba.njit(fastmath=FAST, cache=True)
def read(q, k, g, reset, strides, dims, scale, kind, maps, row, share, first, steps, again, top,
         shifts, q_, k_, totals, keep, raws, halves):
    """Features of queries (times scale) and of keys, (size, key) each, zero after the end.

    Of decays of a channel, with b their sum: e^(c - b / 2) (size, key) in totals, e^(b / 2) in
    keep. For RANDOM: `again` says that shifts (2, batch heads length), of queries and keys, are
    known; else they are found here, as is top, the largest logarithm so far, and what it rises by
    becomes g. totals, raws and halves are scratch then.
    """
    _, length, _, key, _, _, groups, _, size, raw, _ = dims
    at_q, at_k, at_g = starts(strides, dims, row, share, first)
    step_q, step_k, step_g = strides[0, 1], strides[1, 1], strides[3, 1]
    ahead_by = -size if again else size
    fetch(q, at_q + ahead_by * step_q, step_q, size, raw)
    fetch(k, at_k + ahead_by * step_k, step_k, size, raw)
    if kind == CHANNEL:
        fetch(g, at_g + ahead_by * step_g, step_g, size, key)
    kind_of_map, eps, ahead, _, cos, sin = maps
    if kind_of_map == RANDOM:
        at = (row * groups + share) * length + first
        _logarithms(q, at_q, step_q, steps, size, key, raw, ahead, raws, halves, totals)
        if not again:
            for t in range(steps):
                shifts[0, at + t] = _highest(totals, t * key, key)
        _exponentials(totals, shifts[0], at, steps, size, key, eps, q_)
        _logarithms(k, at_k, step_k, steps, size, key, raw, ahead, raws, halves, totals)
        if not again:
            _climb(totals, halves, steps, key, top, row * groups + share, reset, row, first,
                   shifts[1], at, g, at_g, step_g)
        _exponentials(totals, shifts[1], at, steps, size, key, eps, k_)
        return
    q_[steps * key:] = 0
    k_[steps * key:] = 0
    if kind_of_map == COSINE:
        _turned(q, at_q, step_q, cos, sin, row * length + first, steps, raw, q_)
        _turned(k, at_k, step_k, cos, sin, row * length + first, steps, raw, k_)
        return
    scales = splat(np.float32(scale))
    if kind == CHANNEL:
        for j in range(0, key, WIDTH):
            c = splat(np.float32(0))
            for t in range(steps):
                c = c + load(g, at_g + t * step_g + j)
            c = c * splat(np.float32(-0.5) * LOG2E)
            store(keep, j, exp2(splat(np.float32(0)) - c))
            for t in range(steps):
                c = c + load(g, at_g + t * step_g + j) * splat(LOG2E)
                now = exp2(c)
                store(totals, t * key + j, now)
                store_half(q_, t * key + j, load(q, at_q + t * step_q + j) * now * scales)
                store_half(k_, t * key + j,
                           load(k, at_k + t * step_k + j) * exp2(splat(np.float32(0)) - c))
        return
    for t in range(steps):
        for j in range(0, key, WIDTH):
            store_half(q_, t * key + j, load(q, at_q + t * step_q + j) * scales)
            store_half(k_, t * key + j, load(k, at_k + t * step_k + j))


@numba.njit(fastmath=FAST, cache=True)
def _logarithms(x, at, step, steps, size, key, raw, ahead, raws, halves, logs):
    """w . x of every row, and in halves |x|^2 / (2 sqrt(raw)); ahead: pairs of the weights."""
    factor = np.float32(0.5) / np.sqrt(np.float32(raw))
    raws[steps * raw:] = 0
    for t in range(steps):
        line = splat(np.float32(0))
        for j in range(0, raw, WIDTH):
            v = load(x, at + t * step + j)
            store_half(raws, t * raw + j, v)
            line = line + v * v
        halves[t] = total(line) * factor
    multiply(logs.ctypes.data, 4 * key, True, raws.ctypes.data, 2 * raw, ahead.ctypes.data, 4 * key,
             size, key, raw)


@numba.njit(fastmath=FAST, cache=True)
def _highest(logs, at, key):
    high = load(logs, at)
    for j in range(at + WIDTH, at + key, WIDTH):
        high = maximum(high, load(logs, j))
    return largest(high)


@numba.njit(fastmath=FAST, cache=True)
def _climb(logs, halves, steps, key, top, head, reset, row, first, shifts, at, g, at_g, step_g):
    """Shifts of keys: the largest logarithm so far, which only rises, over the half of theirs."""
    high = top[head]
    for t in range(steps):
        begins = reset.size > 0 and reset[row, first + t]
        mine = _highest(logs, t * key, key) - halves[t]
        now = mine if begins or mine > high else high
        g[at_g + t * step_g] = np.float32(0) if begins or high == -np.inf else high - now
        shifts[at + t] = halves[t] + now
        high = now
    top[head] = high


@numba.njit(fastmath=FAST, cache=True)
def _exponentials(logs, shifts, at, steps, size, key, eps, rows):
    more = splat(np.float32(eps))
    for t in range(steps):
        down = splat(shifts[at + t])
        for j in range(t * key, (t + 1) * key, WIDTH):
            store_half(rows, j, exp2((load(logs, j) - down) * splat(LOG2E)) + more)
    rows[steps * key:size * key] = 0


@numba.njit(fastmath=FAST, cache=True)
def _turned(x, at, step, cos, sin, when, steps, raw, rows):
    zero = splat(np.float32(0))
    for t in range(steps):
        c, s = splat(cos[when + t]), splat(sin[when + t])
        for j in range(0, raw, WIDTH):
            u = maximum(load(x, at + t * step + j), zero)
            store_half(rows, 2 * t * raw + j, u * c)
            store_half(rows, (2 * t + 1) * raw + j, u * s)


@numba.njit(fastmath=FAST, cache=True)
def put_rows(rows, steps, width, value, factor, to, hop, into):
    """Float32 rows (size, value), times factor, to bfloat16 rows of the given width, `hop` apart.
    """
    full = width // WIDTH * WIDTH
    for t in range(steps):
        for j in range(0, full, WIDTH):
            store_half(into, to + t * hop + j, load(rows, t * value + j) * splat(factor))
        for j in range(full, width):
            put(into, to + t * hop + j, rows[t * value + j] * factor)


@numba.njit(fastmath=FAST, cache=True)
def finish(q, k, strides, dims, scale, kind, maps, row, share, first, steps, q_, k_, dqs, dks,
           totals, ends, lines, dx, dq, dk, dg):
    """Gradients of rows from those of features (dqs, dks), and those of decays of a channel.
    q_, k_, totals: as `read` left them, the first two overwritten; lines, dx: scratch."""
    _, length, _, key, _, _, groups, parts, size, raw, _ = dims
    at_q, at_k, _ = starts(strides, dims, row, share, first)
    kind_of_map, eps, _, back, cos, sin = maps
    hop = groups * parts * raw
    base = ((row * length + first) * groups * parts + share) * raw
    if kind_of_map == RANDOM:
        _through_weights(q, at_q, strides[0, 1], False, dqs, q_, steps, size, key, raw, eps, back,
                         lines, dx, base, hop, dq)
        _through_weights(k, at_k, strides[1, 1], True, dks, k_, steps, size, key, raw, eps, back,
                         lines, dx, base, hop, dk)
    elif kind_of_map == COSINE:
        when = row * length + first
        _turn_back(q, at_q, strides[0, 1], dqs, cos, sin, when, steps, raw, base, hop, dq)
        _turn_back(k, at_k, strides[1, 1], dks, cos, sin, when, steps, raw, base, hop, dk)
    elif kind == CHANNEL:
        one = splat(np.float32(1))
        for j in range(0, key, WIDTH):
            running = load(ends, j)
            for back_ in range(steps):
                t = steps - 1 - back_
                at, to = t * key + j, base + t * hop + j
                now, grad_q, grad_k = load(totals, at), load(dqs, at), load(dks, at)
                running = running + load(q_, at) * grad_q - load(k_, at) * grad_k
                store(dg, to, running)
                store_half(dq, to, grad_q * now * splat(np.float32(scale)))
                store_half(dk, to, grad_k * (one / now))
    else:
        put_rows(dqs, steps, key, key, np.float32(scale), base, hop, dq)
        put_rows(dks, steps, key, key, np.float32(1), base, hop, dk)


@numba.njit(fastmath=FAST, cache=True)
def _through_weights(x, at, step, halved, grads, features, steps, size, key, raw, eps, back, lines,
                     dx, base, hop, into):
    """From gradients of features to those of rows; halved: |x|^2 is part of the shift."""
    less = splat(np.float32(eps))
    slope = np.float32(-1) / np.sqrt(np.float32(raw))
    for t in range(size):
        line = splat(np.float32(0))
        for j in range(t * key, (t + 1) * key, WIDTH):
            e = load(grads, j) * (load(features, j) - less)
            line = line + e
            store_half(features, j, e)
        lines[t] = total(line) * slope if halved else np.float32(0)
    multiply(dx.ctypes.data, 4 * raw, True, features.ctypes.data, 2 * key, back.ctypes.data,
             4 * raw, size, raw, key)
    for t in range(steps):
        along = splat(lines[t])
        for j in range(0, raw, WIDTH):
            e = load(dx, t * raw + j) + along * load(x, at + t * step + j)
            store_half(into, base + t * hop + j, e)


@numba.njit(fastmath=FAST, cache=True)
def _turn_back(x, at, step, grads, cos, sin, when, steps, raw, base, hop, into):
    for t in range(steps):
        c, s = splat(cos[when + t]), splat(sin[when + t])
        for j in range(0, raw, WIDTH):
            e = (load(grads, 2 * t * raw + j) * c + load(grads, (2 * t + 1) * raw + j) * s)
            store_half(into, base + t * hop + j, positive(e, load(x, at + t * step + j)))
