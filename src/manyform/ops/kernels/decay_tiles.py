"""The chunked recurrence without erase on matrix tiles: one pass over time, in cache.

The equations are those of `chunked_decay`, with c_i the sum of log decays of a chunk up to step i
and b that of the whole chunk. Decays of a head scale rows of v, y and their gradients, so that
heads that share q and k share every product of these two; with P = Q K^T times exp(c_i - c_j),

    y = e^c (Q S) + P V       S' = e^b S + K^T (e^{b - c} V)

and back, with dP = dy V^T and dZ the sum over the heads of dP times exp(c_i - c_j),

    dV = e^{b - c} (K dS') + P^T dy       dS = e^b dS' + Q^T (e^c dy)
    dQ = dZ K + sum (e^c dy) S^T          dK = dZ^T Q + sum (e^{b - c} V) dS'^T

so that they may be of any strength. Decays of a channel scale Q by e^{c - b/2}, K by e^{b/2 - c}
and the state on its way in and out by e^{b/2},

    y = Q (e^{b/2} S) + P V       S' = e^{b/2} (e^{b/2} S + K^T V)

for which they must be weak (`tiled_decay.LIMIT`). Products are of bfloat16 and summed in float32,
in which states and decays are kept.

The normaliser is what y and S would have in a further column if V had a column of ones: the sums of
the rows of P, and a vector beside the state, for which no tile is needed.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.decay_rows import CHANNEL, HEAD, LOG2E, NONE, finish, put_rows, read
from manyform.ops.kernels.delta_forms import fade, fetch, halve, halve_pairs, multiply, pair, turn
from manyform.ops.kernels.lanes import FAST, WIDTH, get, load, put, splat, store, total
from manyform.ops.kernels.tiles import SHAPE, configure, exp2, release, store_half, store_pairs

BLOCK = 32
"""Rows of a product of tiles."""
_FORGET = np.float32(-200)
"""A log decay whose factor is exactly 0 in float32."""


@numba.njit(fastmath=FAST, cache=True)
def _decays(g, at, step, reset, row, first, steps, sums, enter, leave):
    """Of decays of a head: c in base-2 logarithms, e^c and e^{b - c}, (size,) each; returns e^b."""
    whole = np.float32(0)
    for t in range(sums.size):
        if t < steps:
            decay = get(g, at + t * step)
            if decay < _FORGET or (reset.size > 0 and reset[row, first + t]):
                decay = _FORGET
            whole += decay * LOG2E
        sums[t] = whole
    for t in range(0, sums.size, WIDTH):
        store(enter, t, exp2(load(sums, t)))
        store(leave, t, exp2(splat(whole) - load(sums, t)))
    return enter[sums.size - 1]


@numba.njit(fastmath=FAST, cache=True)
def _values(v, strides, row, head, first, steps, ahead, width, value, into):
    """Rows of v, zero from `width` to `value` and after the end; those `ahead` come next."""
    at, step = row * strides[0] + first * strides[1] + head * strides[2], strides[1]
    fetch(v, at + ahead * step, step, abs(ahead), width)
    full = width // WIDTH * WIDTH
    for t in range(steps):
        for j in range(0, full, WIDTH):
            store_half(into, t * value + j, load(v, at + t * step + j))
        for j in range(full, width):
            into[t * value + j] = v[at + t * step + j]
        for j in range(width, value):
            into[t * value + j] = 0
    into[steps * value:] = 0


@numba.njit(fastmath=FAST, cache=True)
def _scaled(rows, factors, size, width, into, pairs):
    """Rows times a factor each: rows and pairs of them."""
    for t in range(0, size, 2):
        even, odd = splat(factors[t]), splat(factors[t + 1])
        for j in range(0, width, WIDTH):
            at = t * width + j
            a, b = load(rows, at) * even, load(rows, at + width) * odd
            store_half(into, at, a)
            store_half(into, at + width, b)
            store_pairs(pairs, t // 2 * width + j, a, b)


@numba.njit(fastmath=FAST, cache=True)
def _lower(c, c_row, fresh, a, b, b_row, n, size):
    """`multiply` for lower-triangular A (size, size)."""
    for i in range(0, size, BLOCK):
        multiply(c + i * c_row, c_row, fresh, a + 2 * i * size, 2 * size, b, b_row, BLOCK, n,
                 i + BLOCK)


@numba.njit(fastmath=FAST, cache=True)
def _upper(c, c_row, fresh, a, b, b_row, n, size):
    """`multiply` for upper-triangular A (size, size)."""
    for i in range(0, size, BLOCK):
        multiply(c + i * c_row, c_row, fresh, a + 2 * i * (size + 1), 2 * size, b + i // 2 * b_row,
                 b_row, BLOCK, n, size - i)


@numba.njit(fastmath=FAST, cache=True)
def _to_lower(c, a, a_row, b, k, size):
    """A B (size, size); blocks above the diagonal stay as they were."""
    for i in range(0, size, BLOCK):
        multiply(c + 4 * i * size, 4 * size, True, a + i * a_row, a_row, b, 4 * size, BLOCK,
                 i + BLOCK, k)


@numba.njit(fastmath=FAST, cache=True)
def _to_upper(c, a, a_row, b, k, size):
    """A B (size, size); blocks below the diagonal stay as they were."""
    for i in range(0, size, BLOCK):
        multiply(c + 4 * i * (size + 1), 4 * size, True, a + i * a_row, a_row, b + 4 * i, 4 * size,
                 BLOCK, size - i, k)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(q, k, v, g, reset, strides, dims, scale, kind, maps, shifts, top, state, norm, y,
            weights, states, norms, floats, halves, words):
    """y, the state (in place) and the states before each chunk.

    q, k, v, g: flat, strides: (5, 3), theirs over batch, step and head; reset: (batch, length) bool
    or empty; dims: (batch, length, heads, key, width, value, groups, parts, size, raw, learn), of
    v's `width` features padded to `value`, a group's heads shared among so many tasks, chunks of
    `size` steps, and `raw` features of q and k, of which `maps` (see `decay_rows`) make `key`;
    learn: whether decays get a gradient. state: (batch heads, key value) float32. y: (batch,
    length, heads, width), dense and flat. states: (batch heads, chunks, key value) bfloat16.
    Of the normaliser, or empty: norm (batch heads, key) in place, weights (batch, length, heads)
    flat, norms (batch heads, chunks, key), float32. shifts, top: see `decay_rows.read`.
    floats, halves, words: scratch, a row a worker.
    """
    batch, length, heads, key, width, value, groups, parts, size, raw, _ = dims
    chunks, workers = states.shape[1], floats.shape[0]
    shares, half = groups * parts, size // 2
    each, tasks = heads // shares, batch * shares
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[w], halves[w], words[w]
        scores, f = f[:size * size], f[size * size:]
        out, f = f[:size * value], f[size * value:]
        totals, f = f[:size * key], f[size * key:]
        keep, f = f[:key], f[key:]
        sums, enter, leave = f[:size], f[size:2 * size], f[2 * size:3 * size]
        own = f[3 * size:4 * size]
        q_, h = h[:size * key], h[size * key:]
        k_, h = h[:size * key], h[size * key:]
        masked, h = h[:size * size], h[size * size:]
        v_, h = h[:size * value], h[size * value:]
        left, h = h[:size * value], h[size * value:]
        raws = h[:size * raw]
        k_turned, p = p[:half * key], p[half * key:]
        k_pairs, p = p[:half * key], p[half * key:]
        k_columns, p = p[:half * key], p[half * key:]
        s_pairs, p = p[:key * value // 2], p[key * value // 2:]
        v_pairs, p = p[:half * value], p[half * value:]
        left_pairs = p[:half * value]
        begin_task, end_task = w * tasks // workers, (w + 1) * tasks // workers
        # all heads of a chunk in turn, since their rows are neighbours
        for place in range(begin_task // shares * chunks, -(-end_task // shares) * chunks):
            row, n = place // chunks, place % chunks
            first = n * size
            steps = min(size, length - first)
            for share in range(max(begin_task - row * shares, 0),
                               min(end_task - row * shares, shares)):
                read(q, k, g, reset, strides, dims, scale, kind, maps, row, share, first, steps,
                     False, top, shifts, q_, k_, totals, keep, raws, sums)
                turn(k_.ctypes.data, k_turned.ctypes.data, size, key // 2)
                pair(k_.ctypes.data, k_pairs.ctypes.data, size, key)
                turn(k_pairs.ctypes.data, k_columns.ctypes.data, half, key)
                _to_lower(scores.ctypes.data, q_.ctypes.data, 2 * key, k_turned.ctypes.data, key,
                          size)
                for head in range(share * each, (share + 1) * each):
                    line = row * heads + head
                    s = state[line]
                    kept = np.float32(1)
                    if kind == HEAD:
                        kept = _decays(g, row * strides[3, 0] + first * strides[3, 1]
                                       + head * strides[3, 2], strides[3, 1], reset, row, first,
                                       steps, sums, enter, leave)
                    if kind == HEAD or head == share * each:
                        _mask(scores, sums, kind == HEAD, size, masked)
                    if norm.size > 0:
                        if kind == HEAD or head == share * each:
                            _sums_of_rows(masked, size, own)
                        norms[line, n, :] = norm[line]
                        _normalise(q_, k_, norm[line], own, enter, leave, kept, kind == HEAD, size,
                                   key, steps, weights, (row * length + first) * heads + head,
                                   heads)
                    _values(v, strides[2], row, head, first, steps, size, width, value, v_)
                    pair(v_.ctypes.data, v_pairs.ctypes.data, size, value)
                    added = v_pairs
                    if kind == HEAD:
                        _scaled(v_, leave, size, value, left, left_pairs)
                        added = left_pairs
                    _leave(s, key, value, kept, keep, kind, states[line, n], s_pairs)
                    multiply(out.ctypes.data, 4 * value, True, q_.ctypes.data, 2 * key,
                             s_pairs.ctypes.data, 4 * value, size, value, key)
                    if kind == HEAD:
                        fade(out, enter, steps, value)
                    _lower(out.ctypes.data, 4 * value, False, masked.ctypes.data,
                           v_pairs.ctypes.data, 4 * value, value, size)
                    put_rows(out, steps, width, value, np.float32(1),
                             ((row * length + first) * heads + head) * width, heads * width, y)
                    multiply(s.ctypes.data, 4 * value, False, k_columns.ctypes.data, 2 * size,
                             added.ctypes.data, 4 * value, key, value, size)
                    if kind == CHANNEL:
                        fade(s, keep, key, value)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _mask(scores, sums, decays, size, masked):
    """Row i, column j: what step i sees of step j <= i, in bfloat16."""
    zero = splat(np.float32(0))
    for i in range(size):
        here = splat(sums[i])
        for j in range(0, size, WIDTH):
            at = i * size + j
            if j > i:
                store_half(masked, at, zero)
            elif decays:
                store_half(masked, at, load(scores, at) * exp2(here - load(sums, j)))
            else:
                store_half(masked, at, load(scores, at))
        for j in range(i + 1, i // WIDTH * WIDTH + WIDTH):
            masked[i * size + j] = 0


@numba.njit(fastmath=FAST, cache=True)
def _sums_of_rows(masked, size, own):
    for i in range(size):
        line = splat(np.float32(0))
        for j in range(0, i + 1, WIDTH):
            line = line + load(masked, i * size + j)
        own[i] = total(line)


@numba.njit(fastmath=FAST, cache=True)
def _normalise(q_, k_, z, own, enter, leave, kept, decays, size, key, steps, weights, to, hop):
    """weights = e^c (Q z) + the sums of P's rows; then z = e^b z + K^T e^{b - c}."""
    for t in range(steps):
        line = splat(np.float32(0))
        for j in range(0, key, WIDTH):
            line = line + load(q_, t * key + j) * load(z, j)
        past = total(line)
        weights[to + t * hop] = own[t] + (past * enter[t] if decays else past)
    for j in range(0, key, WIDTH):
        line = load(z, j) * splat(kept)
        for t in range(steps):
            e = load(k_, t * key + j)
            line = line + (e * splat(leave[t]) if decays else e)
        store(z, j, line)


@numba.njit(fastmath=FAST, cache=True)
def _leave(s, key, value, kept, keep, kind, rows, pairs):
    """The state in bfloat16, rows and pairs; what stays of it, in place. Of decays of a channel
    both are what stays half way."""
    factor = splat(kept)
    for i in range(0, key, 2):
        even, odd = factor, factor
        if kind == CHANNEL:
            even, odd = splat(keep[i]), splat(keep[i + 1])
        for j in range(0, value, WIDTH):
            at = i * value + j
            a, b = load(s, at), load(s, at + value)
            if kind == CHANNEL:
                a, b = a * even, b * odd
                store(s, at, a)
                store(s, at + value, b)
            store_half(rows, at, a)
            store_half(rows, at + value, b)
            store_pairs(pairs, i // 2 * value + j, a, b)
            if kind == HEAD:
                store(s, at, a * even)
                store(s, at + value, b * odd)


@numba.njit(fastmath=FAST, cache=True)
def _steps_of_pairs(scores, sums, decays, size, factors, masked):
    """The transpose of `_mask`: row j, column i, the factors and in bfloat16 the products.
    Factors of no use, left of the diagonal's block, are not written."""
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for j in range(size):
        here, begin = splat(sums[j]), j // WIDTH * WIDTH
        for i in range(0, begin, WIDTH):
            store_half(masked, j * size + i, zero)
        for i in range(begin, size, WIDTH):
            at = j * size + i
            v = exp2(load(sums, i) - here) if decays else one
            store(factors, at, v)
            store_half(masked, at, load(scores, at) * v)
        for i in range(begin, j):
            factors[j * size + i] = 0
            masked[j * size + i] = 0


@numba.njit(fastmath=FAST, cache=True)
def _gather(dp, dweights, factors, scores, learn, size, dz, by_y, by_q):
    """dZ^T += (dP^T and the normaliser's gradient) times factors; sums of its products with P over
    j (by_q) and i (by_y)."""
    by_q[:] = 0
    for j in range(size):
        line = splat(np.float32(0))
        for i in range(j // WIDTH * WIDTH, size, WIDTH):
            at = j * size + i
            e = (load(dp, at) + load(dweights, i)) * load(factors, at)
            if learn:
                both = e * load(scores, at)
                line = line + both
                store(by_q, i, load(by_q, i) + both)
            store(dz, at, load(dz, at) + e)
        by_y[j] = total(line) if learn else np.float32(0)


@numba.njit(fastmath=FAST, cache=True)
def _arrive(ds, s, key, value, kept, keep, kind, learn, rows, pairs, ends):
    """dS' in bfloat16, rows and pairs (times e^{b/2} for decays of a channel); times e^b (e^{b/2}),
    in place; of each key feature the gradient by b that comes through S."""
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
                if learn:
                    line = line + a * load(s, at)
                    next_line = next_line + b * load(s, at + value)
        if learn:
            ends[i], ends[i + 1] = total(line), total(next_line)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(q, k, v, g, reset, strides, dims, scale, kind, maps, shifts, top, dstate, dnorm, dy,
             dweights, states, norms, dq, dk, dv, dg, floats, halves, words):
    """Gradients of everything that `forward` read; see there.

    dy: flat, strides[4]. dstate, dnorm: of the last state and normaliser, in place of the first.
    dweights: flat, (batch, length, heads) dense. dq, dk (batch, length, groups parts, raw), dv:
    dense bfloat16, flat; dg: dense float32.
    """
    batch, length, heads, key, width, value, groups, parts, size, raw, learn = dims
    chunks, workers = states.shape[1], floats.shape[0]
    shares, half = groups * parts, size // 2
    each, tasks = heads // shares, batch * shares
    by_head = learn > 0 and kind == HEAD
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[w], halves[w], words[w]
        scores, f = f[:size * size], f[size * size:]
        factors, f = f[:size * size], f[size * size:]
        dp, f = f[:size * size], f[size * size:]
        dz, f = f[:size * size], f[size * size:]
        out, f = f[:size * value], f[size * value:]
        totals, f = f[:size * key], f[size * key:]
        dqs, f = f[:size * key], f[size * key:]
        dks, f = f[:size * key], f[size * key:]
        part, f = f[:size * key], f[size * key:]
        keep, f = f[:key], f[key:]
        ends, f = f[:key], f[key:]
        sums, enter, leave = f[:size], f[size:2 * size], f[2 * size:3 * size]
        by_q, by_y, f = f[3 * size:4 * size], f[4 * size:5 * size], f[5 * size:]
        seen, f = f[:size], f[size:]
        dx = f[:size * raw]
        q_, h = h[:size * key], h[size * key:]
        k_, h = h[:size * key], h[size * key:]
        masked, h = h[:size * size], h[size * size:]
        v_, h = h[:size * value], h[size * value:]
        dy_, h = h[:size * value], h[size * value:]
        v_left, h = h[:size * value], h[size * value:]
        dy_in, h = h[:size * value], h[size * value:]
        raws, h = h[:size * raw], h[size * raw:]
        ds_rows = h[:key * value]
        q_turned, p = p[:half * key], p[half * key:]
        q_pairs, p = p[:half * key], p[half * key:]
        q_columns, p = p[:half * key], p[half * key:]
        k_pairs, p = p[:half * key], p[half * key:]
        s_turned, p = p[:key * value // 2], p[key * value // 2:]
        ds_pairs, p = p[:key * value // 2], p[key * value // 2:]
        dy_pairs, p = p[:half * value], p[half * value:]
        dy_turned, p = p[:half * value], p[half * value:]
        in_pairs, p = p[:half * value], p[half * value:]
        dz_pairs, p = p[:half * size], p[half * size:]
        dz_rows = p[:half * size]
        seen[:] = 0
        begin_task, end_task = w * tasks // workers, (w + 1) * tasks // workers
        for place in range(begin_task // shares * chunks, -(-end_task // shares) * chunks):
            row, n = place // chunks, chunks - 1 - place % chunks
            first = n * size
            steps = min(size, length - first)
            for share in range(max(begin_task - row * shares, 0),
                               min(end_task - row * shares, shares)):
                read(q, k, g, reset, strides, dims, scale, kind, maps, row, share, first, steps,
                     True, top, shifts, q_, k_, totals, keep, raws, sums)
                turn(q_.ctypes.data, q_turned.ctypes.data, size, key // 2)
                pair(q_.ctypes.data, q_pairs.ctypes.data, size, key)
                turn(q_pairs.ctypes.data, q_columns.ctypes.data, half, key)
                pair(k_.ctypes.data, k_pairs.ctypes.data, size, key)
                _to_upper(scores.ctypes.data, k_.ctypes.data, 2 * key, q_turned.ctypes.data, key,
                          size)
                dz[:] = 0
                for head in range(share * each, (share + 1) * each):
                    begin = head == share * each
                    line = row * heads + head
                    base = (row * length + first) * heads + head
                    s, ds = states[line, n], dstate[line]
                    if n > 0:
                        fetch(states[line, n - 1], 0, value, key, value)
                    kept = np.float32(1)
                    if kind == HEAD:
                        kept = _decays(g, row * strides[3, 0] + first * strides[3, 1]
                                       + head * strides[3, 2], strides[3, 1], reset, row, first,
                                       steps, sums, enter, leave)
                    if kind == HEAD or begin:
                        _steps_of_pairs(scores, sums, kind == HEAD, size, factors, masked)
                    _values(v, strides[2], row, head, first, steps, -size, width, value, v_)
                    _values(dy, strides[4], row, head, first, steps, -size, width, value, dy_)
                    if norms.size > 0:
                        for t in range(size):
                            seen[t] = dweights[base + t * heads] if t < steps else np.float32(0)
                    turn(dy_.ctypes.data, dy_turned.ctypes.data, size, value // 2)
                    _to_upper(dp.ctypes.data, v_.ctypes.data, 2 * value, dy_turned.ctypes.data,
                              value, size)
                    _gather(dp, seen, factors, scores, by_head, size, dz, by_y, by_q)
                    _arrive(ds, s, key, value, kept, keep, kind, learn > 0, ds_rows, ds_pairs, ends)
                    pair(dy_.ctypes.data, dy_pairs.ctypes.data, size, value)
                    dy_read, dy_read_pairs, v_read = dy_, dy_pairs, v_
                    if kind == HEAD:
                        _scaled(v_, leave, size, value, v_left, in_pairs)
                        _scaled(dy_, enter, size, value, dy_in, in_pairs)
                        dy_read, dy_read_pairs, v_read = dy_in, in_pairs, v_left
                    multiply(out.ctypes.data, 4 * value, True, k_.ctypes.data, 2 * key,
                             ds_pairs.ctypes.data, 4 * value, size, value, key)
                    end = np.float32(0)
                    if by_head:
                        for i in range(key):
                            end += ends[i]
                        end += _written(out, v_, leave, steps, value, by_y)
                    elif kind == HEAD:
                        fade(out, leave, steps, value)
                    _upper(out.ctypes.data, 4 * value, False, masked.ctypes.data,
                           dy_pairs.ctypes.data, 4 * value, value, size)
                    put_rows(out, steps, width, value, np.float32(1), base * width, heads * width,
                             dv)
                    turn(ds_rows.ctypes.data, s_turned.ctypes.data, key, value // 2)
                    multiply(dks.ctypes.data, 4 * key, begin, v_read.ctypes.data, 2 * value,
                             s_turned.ctypes.data, 4 * key, size, key, value)
                    turn(s.ctypes.data, s_turned.ctypes.data, key, value // 2)
                    read_into = part if by_head else dqs
                    multiply(read_into.ctypes.data, 4 * key, by_head or begin, dy_read.ctypes.data,
                             2 * value, s_turned.ctypes.data, 4 * key, size, key, value)
                    if norms.size > 0:
                        end += _normalise_back(q_, k_, norms[line, n], dnorm[line], seen, enter,
                                               leave, kept, kind == HEAD, steps, key, read_into,
                                               dks, by_y)
                    if by_head:
                        for t in range(size):
                            dot = splat(np.float32(0))
                            for j in range(t * key, (t + 1) * key, WIDTH):
                                e = load(part, j)
                                dot = dot + e * load(q_, j)
                                if not begin:
                                    e = e + load(dqs, j)
                                store(dqs, j, e)
                            by_q[t] += total(dot)
                        _finish_head(by_q, by_y, end, reset, row, first, steps, base, heads, dg)
                    if kind == CHANNEL and learn > 0:
                        for j in range(0, key, WIDTH):
                            dot = load(ends, j)
                            for at in range(j, steps * key, key):
                                dot = dot + load(dks, at) * load(k_, at)
                            store(ends, j, dot)
                    multiply(ds.ctypes.data, 4 * value, False, q_columns.ctypes.data, 2 * size,
                             dy_read_pairs.ctypes.data, 4 * value, key, value, size)
                    if kind == CHANNEL:
                        fade(ds, keep, key, value)
                halve(dz, size, size, masked)
                halve_pairs(dz, size, size, dz_pairs)
                turn(dz_pairs.ctypes.data, dz_rows.ctypes.data, half, size)
                _upper(dks.ctypes.data, 4 * key, False, masked.ctypes.data, q_pairs.ctypes.data,
                       4 * key, key, size)
                _lower(dqs.ctypes.data, 4 * key, False, dz_rows.ctypes.data, k_pairs.ctypes.data,
                       4 * key, key, size)
                finish(q, k, strides, dims, scale, kind, maps, row, share, first, steps, q_, k_,
                       dqs, dks, totals, ends, sums, dx, dq, dk, dg)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _written(out, v_, leave, steps, value, by_y):
    """Rows of K dS' times e^{b - c}; their products with V go to by_y, and their sum back."""
    end = np.float32(0)
    for t in range(steps):
        factor, line = splat(leave[t]), splat(np.float32(0))
        for j in range(t * value, (t + 1) * value, WIDTH):
            e = load(out, j) * factor
            line = line + e * load(v_, j)
            store(out, j, e)
        written = total(line)
        by_y[t] += written
        end += written
    return end


@numba.njit(fastmath=FAST, cache=True)
def _normalise_back(q_, k_, z, dz, seen, enter, leave, kept, decays, steps, key, dq, dk, by_y):
    """Through `_normalise`, but for the sums of P's rows: dq, dk +=, dz in place; by_y gets the
    products of dk with K, and their sum with that of z with dz comes back."""
    end, line = np.float32(0), splat(np.float32(0))
    for t in range(steps):
        factor = splat(leave[t] if decays else np.float32(1))
        reads = splat(seen[t] * enter[t] if decays else seen[t])
        dot = splat(np.float32(0))
        for j in range(0, key, WIDTH):
            at = t * key + j
            e = load(dz, j) * factor
            dot = dot + e * load(k_, at)
            store(dk, at, load(dk, at) + e)
            store(dq, at, load(dq, at) + load(z, j) * reads)
        written = total(dot)
        by_y[t] += written
        end += written
    for j in range(0, key, WIDTH):
        e = load(dz, j) * splat(kept)
        line = line + e * load(z, j)
        for t in range(steps):
            reads = seen[t] * enter[t] if decays else seen[t]
            e = e + load(q_, t * key + j) * splat(reads)
        store(dz, j, e)
    return end + total(line)


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


def scratch(size, key, value, raw):
    """(floats, halves, words) of one worker, enough for both passes; multiples of 64 bytes."""
    floats = (4 * size * size + size * value + 4 * size * key + 2 * key + 6 * size + size * raw)
    halves = 2 * size * key + size * size + 4 * size * value + size * raw + key * value
    words = 2 * size * key + key * value + 3 * size // 2 * value + size * size
    return tuple(-(-n // 64) * 64 for n in (floats, halves, words))
