"""The chunked recurrence without erase on matrix tiles: one pass over time, in cache.

The equations are those of `chunked_decay`, with c_i the sum of log decays of a chunk up to step i
and b that of the whole chunk. Decays of a head scale rows of v, y and their gradients, so that
heads that share q and k share every product of these two; with P = Q K^T times exp(c_i - c_j),

    y = e^c (Q S) + P V       S' = e^b S + K^T (e^{b - c} V)

and back, with dP = dy V^T and dZ the sum over the heads of dP times exp(c_i - c_j),

    dV = e^{b - c} (K dS') + P^T dy       dS = e^b dS' + Q^T (e^c dy)
    dQ = dZ K + sum (e^c dy) S^T          dK = dZ^T Q + sum (e^{b - c} V) dS'^T

so that they may be of any strength. Decays of a channel scale Q by e^c and K by e^-c, and

    y = Q S + P V       S' = e^b (S + K^T V)

for which they must be weak (`tiled_decay.LIMIT`). Products are of bfloat16 and summed in float32,
in which states and decays are kept.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import halve, halve_pairs, multiply, pair, turn
from manyform.ops.kernels.lanes import FAST, WIDTH, get, load, put, splat, store, total
from manyform.ops.kernels.tiles import (
    SHAPE,
    configure,
    exp2,
    release,
    store_half,
    store_pairs,
)

SIZE = 64
"""Steps in a chunk."""
HALF = SIZE // 2
NONE, HEAD, CHANNEL = 0, 1, 2
"""Kinds of decay."""
_LOG2E = np.float32(1.4426950408889634)
_FORGET = np.float32(-200)
"""A log decay whose factor is exactly 0 in float32."""


@numba.njit(fastmath=FAST, cache=True)
def _keys(q, k, g, at_q, at_k, at_g, step_q, step_k, step_g, steps, key, scale, channel, q_, k_,
          totals, keep):
    """Rows of Q, times scale, and K, zero after the end. Of decays of a channel, e^c (64, key) in
    totals and e^b in keep."""
    if steps < SIZE:
        q_[steps * key:] = 0
        k_[steps * key:] = 0
    scales = splat(np.float32(scale))
    if channel:
        for j in range(0, key, WIDTH):
            c, now = splat(np.float32(0)), splat(np.float32(1))
            for t in range(steps):
                c = c + load(g, at_g + t * step_g + j) * splat(_LOG2E)
                now = exp2(c)
                store(totals, t * key + j, now)
                store_half(q_, t * key + j, load(q, at_q + t * step_q + j) * now * scales)
                store_half(k_, t * key + j,
                           load(k, at_k + t * step_k + j) * exp2(splat(np.float32(0)) - c))
            store(keep, j, now)
        return
    for t in range(steps):
        for j in range(0, key, WIDTH):
            store_half(q_, t * key + j, load(q, at_q + t * step_q + j) * scales)
            store_half(k_, t * key + j, load(k, at_k + t * step_k + j))


@numba.njit(fastmath=FAST, cache=True)
def _decays(g, at, step, reset, row, first, steps, sums, enter, leave):
    """Of decays of a head: c in base-2 logarithms, e^c and e^{b - c}, (64,) each; returns e^b."""
    whole = np.float32(0)
    for t in range(SIZE):
        if t < steps:
            decay = get(g, at + t * step)
            if decay < _FORGET or (reset.size > 0 and reset[row, first + t]):
                decay = _FORGET
            whole += decay * _LOG2E
        sums[t] = whole
    for t in range(0, SIZE, WIDTH):
        store(enter, t, exp2(load(sums, t)))
        store(leave, t, exp2(splat(whole) - load(sums, t)))
    return enter[SIZE - 1]


@numba.njit(fastmath=FAST, cache=True)
def _values(v, at, step, steps, width, value, into):
    """Rows of v, zero from `width` to `value` and after the end."""
    full = width // WIDTH * WIDTH
    for t in range(steps):
        for j in range(0, full, WIDTH):
            store_half(into, t * value + j, load(v, at + t * step + j))
        for j in range(full, width):
            into[t * value + j] = v[at + t * step + j]
        for j in range(width, value):
            into[t * value + j] = 0
    into[steps * value:SIZE * value] = 0


@numba.njit(fastmath=FAST, cache=True)
def _scaled(rows, factors, width, into, pairs):
    """Rows times a factor each: rows and pairs of them."""
    for t in range(0, SIZE, 2):
        even, odd = splat(factors[t]), splat(factors[t + 1])
        for j in range(0, width, WIDTH):
            at = t * width + j
            a, b = load(rows, at) * even, load(rows, at + width) * odd
            store_half(into, at, a)
            store_half(into, at + width, b)
            store_pairs(pairs, t // 2 * width + j, a, b)


@numba.njit(fastmath=FAST, cache=True)
def _put(rows, steps, width, value, to, hop, into):
    """Float32 rows (64, value) to bfloat16 rows of the given width, `hop` apart."""
    full = width // WIDTH * WIDTH
    for t in range(steps):
        for j in range(0, full, WIDTH):
            store_half(into, to + t * hop + j, load(rows, t * value + j))
        for j in range(full, width):
            put(into, to + t * hop + j, rows[t * value + j])


@numba.njit(fastmath=FAST, cache=True)
def _lower(c, c_row, fresh, a, b, b_row, n):
    """`multiply` for lower-triangular A (64, 64)."""
    multiply(c, c_row, fresh, a, 2 * SIZE, b, b_row, HALF, n, HALF)
    multiply(c + HALF * c_row, c_row, fresh, a + 2 * HALF * SIZE, 2 * SIZE, b, b_row, HALF, n, SIZE)


@numba.njit(fastmath=FAST, cache=True)
def _upper(c, c_row, fresh, a, b, b_row, n):
    """`multiply` for upper-triangular A (64, 64)."""
    multiply(c, c_row, fresh, a, 2 * SIZE, b, b_row, HALF, n, SIZE)
    multiply(c + HALF * c_row, c_row, fresh, a + 2 * HALF * (SIZE + 1), 2 * SIZE,
             b + HALF // 2 * b_row, b_row, HALF, n, HALF)


@numba.njit(fastmath=FAST, cache=True)
def _to_lower(c, a, a_row, b, k):
    """A B (64, 64) but for the upper right quarter, which stays as it was."""
    multiply(c, 4 * SIZE, True, a, a_row, b, 4 * SIZE, HALF, HALF, k)
    multiply(c + 4 * HALF * SIZE, 4 * SIZE, True, a + HALF * a_row, a_row, b, 4 * SIZE, HALF, SIZE,
             k)


@numba.njit(fastmath=FAST, cache=True)
def _to_upper(c, a, a_row, b, k):
    """A B (64, 64) but for the lower left quarter, which stays as it was."""
    multiply(c, 4 * SIZE, True, a, a_row, b, 4 * SIZE, HALF, SIZE, k)
    multiply(c + 4 * HALF * (SIZE + 1), 4 * SIZE, True, a + HALF * a_row, a_row, b + 4 * HALF,
             4 * SIZE, HALF, HALF, k)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(q, k, v, g, reset, strides, dims, scale, kind, state, y, states, floats, halves, words):
    """y, the state (in place) and the states before each chunk.

    q, k, v, g: flat, strides: (4, 3), theirs over batch, step and head; reset: (batch, length) bool
    or empty; dims: (batch, length, heads, key, width, value, groups, parts), of v's `width`
    features padded to `value`, and a group's heads shared among so many tasks. state: (batch
    heads, key value) float32. y: (batch, length, heads, width), dense and flat. states: (batch
    heads, chunks, key value) bfloat16. floats, halves, words: scratch, a row a worker.
    """
    batch, length, heads, key, width, value, groups, parts = dims
    chunks, workers = states.shape[1], floats.shape[0]
    shares = groups * parts
    each, tasks = heads // shares, batch * shares
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[w], halves[w], words[w]
        scores, f = f[:SIZE * SIZE], f[SIZE * SIZE:]
        out, f = f[:SIZE * value], f[SIZE * value:]
        totals, f = f[:SIZE * key], f[SIZE * key:]
        keep, f = f[:key], f[key:]
        sums, enter, leave = f[:SIZE], f[SIZE:2 * SIZE], f[2 * SIZE:3 * SIZE]
        q_, h = h[:SIZE * key], h[SIZE * key:]
        k_, h = h[:SIZE * key], h[SIZE * key:]
        masked, h = h[:SIZE * SIZE], h[SIZE * SIZE:]
        v_, h = h[:SIZE * value], h[SIZE * value:]
        left = h[:SIZE * value]
        k_turned, p = p[:HALF * key], p[HALF * key:]
        k_pairs, p = p[:HALF * key], p[HALF * key:]
        k_columns, p = p[:HALF * key], p[HALF * key:]
        s_pairs, p = p[:key * value // 2], p[key * value // 2:]
        v_pairs, p = p[:HALF * value], p[HALF * value:]
        left_pairs = p[:HALF * value]
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            row, share = task // shares, task % shares
            group = share // parts
            for n in range(chunks):
                first = n * SIZE
                steps = min(SIZE, length - first)
                _keys(q, k, g,
                      row * strides[0, 0] + first * strides[0, 1] + group * strides[0, 2],
                      row * strides[1, 0] + first * strides[1, 1] + group * strides[1, 2],
                      row * strides[3, 0] + first * strides[3, 1] + share * strides[3, 2],
                      strides[0, 1], strides[1, 1], strides[3, 1], steps, key, scale,
                      kind == CHANNEL, q_, k_, totals, keep)
                turn(k_.ctypes.data, k_turned.ctypes.data, SIZE, key // 2)
                pair(k_.ctypes.data, k_pairs.ctypes.data, SIZE, key)
                turn(k_pairs.ctypes.data, k_columns.ctypes.data, HALF, key)
                _to_lower(scores.ctypes.data, q_.ctypes.data, 2 * key, k_turned.ctypes.data, key)
                for head in range(share * each, (share + 1) * each):
                    s = state[row * heads + head]
                    kept = np.float32(1)
                    if kind == HEAD:
                        kept = _decays(g, row * strides[3, 0] + first * strides[3, 1]
                                       + head * strides[3, 2], strides[3, 1], reset, row, first,
                                       steps, sums, enter, leave)
                    if kind == HEAD or head == share * each:
                        _mask(scores, sums, kind == HEAD, masked)
                    _values(v, row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2],
                            strides[2, 1], steps, width, value, v_)
                    pair(v_.ctypes.data, v_pairs.ctypes.data, SIZE, value)
                    added = v_pairs
                    if kind == HEAD:
                        _scaled(v_, leave, value, left, left_pairs)
                        added = left_pairs
                    _leave(s, key, value, kept, kind == HEAD, states[row * heads + head, n],
                           s_pairs)
                    multiply(out.ctypes.data, 4 * value, True, q_.ctypes.data, 2 * key,
                             s_pairs.ctypes.data, 4 * value, SIZE, value, key)
                    if kind == HEAD:
                        for t in range(steps):
                            factor = splat(enter[t])
                            for j in range(t * value, (t + 1) * value, WIDTH):
                                store(out, j, load(out, j) * factor)
                    _lower(out.ctypes.data, 4 * value, False, masked.ctypes.data,
                           v_pairs.ctypes.data, 4 * value, value)
                    _put(out, steps, width, value, ((row * length + first) * heads + head) * width,
                         heads * width, y)
                    multiply(s.ctypes.data, 4 * value, False, k_columns.ctypes.data, 2 * SIZE,
                             added.ctypes.data, 4 * value, key, value, SIZE)
                    if kind == CHANNEL:
                        for i in range(key):
                            factor = splat(keep[i])
                            for j in range(i * value, (i + 1) * value, WIDTH):
                                store(s, j, load(s, j) * factor)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _mask(scores, sums, decays, masked):
    """Row i, column j: what step i sees of step j <= i, in bfloat16."""
    zero = splat(np.float32(0))
    for i in range(SIZE):
        here = splat(sums[i])
        for j in range(0, SIZE, WIDTH):
            at = i * SIZE + j
            if j > i:
                store_half(masked, at, zero)
            elif decays:
                store_half(masked, at, load(scores, at) * exp2(here - load(sums, j)))
            else:
                store_half(masked, at, load(scores, at))
        for j in range(i + 1, i // WIDTH * WIDTH + WIDTH):
            masked[i * SIZE + j] = 0


@numba.njit(fastmath=FAST, cache=True)
def _leave(s, key, value, kept, decays, rows, pairs):
    """The state in bfloat16, rows and pairs; what stays of it, in place."""
    factor = splat(kept)
    for i in range(0, key, 2):
        for j in range(0, value, WIDTH):
            at = i * value + j
            a, b = load(s, at), load(s, at + value)
            store_half(rows, at, a)
            store_half(rows, at + value, b)
            store_pairs(pairs, i // 2 * value + j, a, b)
            if decays:
                store(s, at, a * factor)
                store(s, at + value, b * factor)


@numba.njit(fastmath=FAST, cache=True)
def _steps_of_pairs(scores, sums, decays, factors, masked):
    """The transpose of `_mask`: row j, column i, the factors and in bfloat16 the products.
    Factors of no use, left of the diagonal's block, are not written."""
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for j in range(SIZE):
        here, begin = splat(sums[j]), j // WIDTH * WIDTH
        for i in range(0, begin, WIDTH):
            store_half(masked, j * SIZE + i, zero)
        for i in range(begin, SIZE, WIDTH):
            at = j * SIZE + i
            v = exp2(load(sums, i) - here) if decays else one
            store(factors, at, v)
            store_half(masked, at, load(scores, at) * v)
        for i in range(begin, j):
            factors[j * SIZE + i] = 0
            masked[j * SIZE + i] = 0


@numba.njit(fastmath=FAST, cache=True)
def _gather(dp, factors, scores, decays, dz, by_y, by_q):
    """dZ^T += dP^T times factors; sums of its products with P over j (by_q) and i (by_y)."""
    for i in range(SIZE):
        by_q[i] = 0
    for j in range(SIZE):
        line = splat(np.float32(0))
        by_y[j] = 0
        for i in range(j // WIDTH * WIDTH, SIZE, WIDTH):
            at = j * SIZE + i
            e = load(dp, at) * load(factors, at)
            if decays:
                both = e * load(scores, at)
                line = line + both
                store(by_q, i, load(by_q, i) + both)
            store(dz, at, load(dz, at) + e)
        if decays:
            by_y[j] = total(line)


@numba.njit(fastmath=FAST, cache=True)
def _arrive(ds, s, key, value, kept, keep, kind, rows, pairs, ends):
    """dS' in bfloat16, rows and pairs (times e^b for decays of a channel); times e^b, in place; of
    each key feature the gradient by b that comes through S."""
    for i in range(0, key, 2):
        even, odd = splat(kept), splat(kept)
        if kind == CHANNEL:
            even, odd = splat(keep[i]), splat(keep[i + 1])
        line, next_line = splat(np.float32(0)), splat(np.float32(0))
        for j in range(0, value, WIDTH):
            at = i * value + j
            a, b = load(ds, at), load(ds, at + value)
            if kind == CHANNEL:
                a, b = a * even, b * odd
            store_half(rows, at, a)
            store_half(rows, at + value, b)
            store_pairs(pairs, i // 2 * value + j, a, b)
            if kind == HEAD:
                a, b = a * even, b * odd
            if kind != NONE:
                store(ds, at, a)
                store(ds, at + value, b)
                line = line + a * load(s, at)
                next_line = next_line + b * load(s, at + value)
        if kind != NONE:
            ends[i], ends[i + 1] = total(line), total(next_line)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(q, k, v, g, reset, strides, dims, scale, kind, dstate, dy, states, dq, dk, dv, dg,
             floats, halves, words):
    """Gradients of everything that `forward` read; see there.

    dy: flat, strides[4]. dstate: (batch heads, key value) float32, of the last state, in place of
    the first. dq, dk (batch, length, groups parts, key), dv: dense bfloat16, flat; dg: dense
    float32.
    """
    batch, length, heads, key, width, value, groups, parts = dims
    chunks, workers = states.shape[1], floats.shape[0]
    shares = groups * parts
    each, tasks = heads // shares, batch * shares
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[w], halves[w], words[w]
        scores, f = f[:SIZE * SIZE], f[SIZE * SIZE:]
        factors, f = f[:SIZE * SIZE], f[SIZE * SIZE:]
        dp, f = f[:SIZE * SIZE], f[SIZE * SIZE:]
        dz, f = f[:SIZE * SIZE], f[SIZE * SIZE:]
        out, f = f[:SIZE * value], f[SIZE * value:]
        totals, f = f[:SIZE * key], f[SIZE * key:]
        dqs, f = f[:SIZE * key], f[SIZE * key:]
        dks, f = f[:SIZE * key], f[SIZE * key:]
        part, f = f[:SIZE * key], f[SIZE * key:]
        keep, f = f[:key], f[key:]
        ends, f = f[:key], f[key:]
        sums, enter, leave = f[:SIZE], f[SIZE:2 * SIZE], f[2 * SIZE:3 * SIZE]
        by_q, by_y = f[3 * SIZE:4 * SIZE], f[4 * SIZE:5 * SIZE]
        q_, h = h[:SIZE * key], h[SIZE * key:]
        k_, h = h[:SIZE * key], h[SIZE * key:]
        masked, h = h[:SIZE * SIZE], h[SIZE * SIZE:]
        v_, h = h[:SIZE * value], h[SIZE * value:]
        dy_, h = h[:SIZE * value], h[SIZE * value:]
        v_left, h = h[:SIZE * value], h[SIZE * value:]
        dy_in, h = h[:SIZE * value], h[SIZE * value:]
        ds_rows = h[:key * value]
        q_turned, p = p[:HALF * key], p[HALF * key:]
        q_pairs, p = p[:HALF * key], p[HALF * key:]
        q_columns, p = p[:HALF * key], p[HALF * key:]
        k_pairs, p = p[:HALF * key], p[HALF * key:]
        s_turned, p = p[:key * value // 2], p[key * value // 2:]
        ds_pairs, p = p[:key * value // 2], p[key * value // 2:]
        dy_pairs, p = p[:HALF * value], p[HALF * value:]
        dy_turned, p = p[:HALF * value], p[HALF * value:]
        in_pairs, p = p[:HALF * value], p[HALF * value:]
        dz_pairs, p = p[:HALF * SIZE], p[HALF * SIZE:]
        dz_rows = p[:HALF * SIZE]
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            row, share = task // shares, task % shares
            group = share // parts
            for back in range(chunks):
                n = chunks - 1 - back
                first = n * SIZE
                steps = min(SIZE, length - first)
                _keys(q, k, g,
                      row * strides[0, 0] + first * strides[0, 1] + group * strides[0, 2],
                      row * strides[1, 0] + first * strides[1, 1] + group * strides[1, 2],
                      row * strides[3, 0] + first * strides[3, 1] + share * strides[3, 2],
                      strides[0, 1], strides[1, 1], strides[3, 1], steps, key, scale,
                      kind == CHANNEL, q_, k_, totals, keep)
                turn(q_.ctypes.data, q_turned.ctypes.data, SIZE, key // 2)
                pair(q_.ctypes.data, q_pairs.ctypes.data, SIZE, key)
                turn(q_pairs.ctypes.data, q_columns.ctypes.data, HALF, key)
                pair(k_.ctypes.data, k_pairs.ctypes.data, SIZE, key)
                _to_upper(scores.ctypes.data, k_.ctypes.data, 2 * key, q_turned.ctypes.data, key)
                dz[:] = 0
                for head in range(share * each, (share + 1) * each):
                    begin = head == share * each
                    s, ds = states[row * heads + head, n], dstate[row * heads + head]
                    kept = np.float32(1)
                    if kind == HEAD:
                        kept = _decays(g, row * strides[3, 0] + first * strides[3, 1]
                                       + head * strides[3, 2], strides[3, 1], reset, row, first,
                                       steps, sums, enter, leave)
                    if kind == HEAD or begin:
                        _steps_of_pairs(scores, sums, kind == HEAD, factors, masked)
                    _values(v, row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2],
                            strides[2, 1], steps, width, value, v_)
                    _values(dy, row * strides[4, 0] + first * strides[4, 1] + head * strides[4, 2],
                            strides[4, 1], steps, width, value, dy_)
                    turn(dy_.ctypes.data, dy_turned.ctypes.data, SIZE, value // 2)
                    _to_upper(dp.ctypes.data, v_.ctypes.data, 2 * value, dy_turned.ctypes.data,
                              value)
                    _gather(dp, factors, scores, kind == HEAD, dz, by_y, by_q)
                    _arrive(ds, s, key, value, kept, keep, kind, ds_rows, ds_pairs, ends)
                    pair(dy_.ctypes.data, dy_pairs.ctypes.data, SIZE, value)
                    dy_read, dy_read_pairs, v_read = dy_, dy_pairs, v_
                    if kind == HEAD:
                        _scaled(v_, leave, value, v_left, in_pairs)
                        _scaled(dy_, enter, value, dy_in, in_pairs)
                        dy_read, dy_read_pairs, v_read = dy_in, in_pairs, v_left
                    multiply(out.ctypes.data, 4 * value, True, k_.ctypes.data, 2 * key,
                             ds_pairs.ctypes.data, 4 * value, SIZE, value, key)
                    end = np.float32(0)
                    if kind == HEAD:
                        for i in range(key):
                            end += ends[i]
                        for t in range(steps):
                            factor, line = splat(leave[t]), splat(np.float32(0))
                            for j in range(t * value, (t + 1) * value, WIDTH):
                                e = load(out, j) * factor
                                line = line + e * load(v_, j)
                                store(out, j, e)
                            written = total(line)
                            by_y[t] += written
                            end += written
                    _upper(out.ctypes.data, 4 * value, False, masked.ctypes.data,
                           dy_pairs.ctypes.data, 4 * value, value)
                    _put(out, steps, width, value, ((row * length + first) * heads + head) * width,
                         heads * width, dv)
                    turn(ds_rows.ctypes.data, s_turned.ctypes.data, key, value // 2)
                    multiply(dks.ctypes.data, 4 * key, begin, v_read.ctypes.data, 2 * value,
                             s_turned.ctypes.data, 4 * key, SIZE, key, value)
                    turn(s.ctypes.data, s_turned.ctypes.data, key, value // 2)
                    if kind == HEAD:
                        multiply(part.ctypes.data, 4 * key, True, dy_read.ctypes.data, 2 * value,
                                 s_turned.ctypes.data, 4 * key, SIZE, key, value)
                        for t in range(SIZE):
                            line = splat(np.float32(0))
                            for j in range(t * key, (t + 1) * key, WIDTH):
                                e = load(part, j)
                                line = line + e * load(q_, j)
                                if not begin:
                                    e = e + load(dqs, j)
                                store(dqs, j, e)
                            by_q[t] += total(line)
                        _finish_head(by_q, by_y, end, reset, row, first, steps,
                                     (row * length + first) * heads + head, heads, dg)
                    else:
                        multiply(dqs.ctypes.data, 4 * key, begin, dy_read.ctypes.data, 2 * value,
                                 s_turned.ctypes.data, 4 * key, SIZE, key, value)
                    if kind == CHANNEL:
                        for j in range(0, key, WIDTH):
                            line = load(ends, j)
                            for at in range(j, steps * key, key):
                                line = line + load(dks, at) * load(k_, at)
                            store(ends, j, line)
                    multiply(ds.ctypes.data, 4 * value, False, q_columns.ctypes.data, 2 * SIZE,
                             dy_read_pairs.ctypes.data, 4 * value, key, value, SIZE)
                halve(dz, SIZE, SIZE, masked)
                halve_pairs(dz, SIZE, SIZE, dz_pairs)
                turn(dz_pairs.ctypes.data, dz_rows.ctypes.data, HALF, SIZE)
                _upper(dks.ctypes.data, 4 * key, False, masked.ctypes.data, q_pairs.ctypes.data,
                       4 * key, key)
                _lower(dqs.ctypes.data, 4 * key, False, dz_rows.ctypes.data, k_pairs.ctypes.data,
                       4 * key, key)
                base = ((row * length + first) * shares + share) * key
                if kind == CHANNEL:
                    _finish_channel(q_, k_, dqs, dks, totals, ends, steps, key, scale, base,
                                    shares * key, dq, dk, dg)
                else:
                    for j in range(0, steps * key, WIDTH):
                        store(dqs, j, load(dqs, j) * splat(np.float32(scale)))
                    _put(dqs, steps, key, key, base, shares * key, dq)
                    _put(dks, steps, key, key, base, shares * key, dk)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _finish_head(by_q, by_y, end, reset, row, first, steps, base, heads, dg):
    """Gradients of the decays of a head; nothing crosses a reset."""
    running = end
    for back in range(steps):
        t = steps - 1 - back
        running += by_q[t] - by_y[t]
        if reset.size > 0 and reset[row, first + t]:
            running = np.float32(0)
        put(dg, base + t * heads, running)


@numba.njit(fastmath=FAST, cache=True)
def _finish_channel(q, k, dqs, dks, totals, ends, steps, key, scale, base, hop, dq, dk, dg):
    """Gradients of rows, which carry their decays, and of the decays of a channel."""
    one = splat(np.float32(1))
    for j in range(0, key, WIDTH):
        running = load(ends, j)
        for back in range(steps):
            t = steps - 1 - back
            at, to = t * key + j, base + t * hop + j
            now, grad_q, grad_k = load(totals, at), load(dqs, at), load(dks, at)
            running = running + load(q, at) * grad_q - load(k, at) * grad_k
            store(dg, to, running)
            store_half(dq, to, grad_q * now * splat(np.float32(scale)))
            store_half(dk, to, grad_k * (one / now))


def scratch(key, value):
    """(floats, halves, words) of one worker, enough for both passes; multiples of 64 bytes."""
    floats = 4 * SIZE * SIZE + SIZE * value + 4 * SIZE * key + 2 * key + 5 * SIZE
    halves = 2 * SIZE * key + SIZE * SIZE + 4 * SIZE * value + key * value
    words = 4 * HALF * key + key * value + 3 * HALF * value + 2 * HALF * SIZE
    return tuple(-(-n // 64) * 64 for n in (floats, halves, words))
