"""The memory of Titans on matrix tiles: one pass over time for each row and head, in cache.

The equations are those of `ops.titans`. For a chunk with memory M_l and momentum S_l, inputs X_l of
keys, H_l of queries, E_l the gradients behind each layer, and, of the gates alone, what M and S of
before weigh at step t (keep, mix) and what step s adds to M and S of t (share, push):

    X_l+1 = silu(Z_l), Z_l = X_l M_l      E_last = 2 (Z_last - V), E_l = (E_l+1 M_l+1^T) silu'(Z_l)
    H_l+1 = silu(R_l), R_l = keep H_l M_l + mix H_l S_l + A_l E_l,  A_l = share * (H_l X_l^T)
    M' = keep M + mix S + X^T (share E),  S' = move S + X^T (push E), of the last step

and back, with G_l the gradient of R_l, from the last layer to the first

    dE += A^T G + share X dM' + push X dS'        D = share * (G E^T)
    dX += D^T H + share E dM'^T + push E dS'^T    dH = keep G M^T + mix G S^T + D X
    dM = keep dM' + (keep H)^T G                  dS = move dS' + mix dM' + (mix H)^T G

and then through E and Z. Products are of bfloat16 and summed in float32. M and S are kept every few
chunks; the way back goes forward over those once more and keeps them, as bfloat16, in cache.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import multiply, pair, turn
from manyform.ops.kernels.lanes import FAST, WIDTH, load, sigmoid, splat, store, total
from manyform.ops.kernels.strips import (
    SIZE,
    copy_rows,
    pair_alone,
    pair_rows,
    pair_square,
    square,
    strip,
)
from manyform.ops.kernels.tiles import SHAPE, configure, release, store_half
from manyform.ops.kernels.titans_gates import (
    KEEP,
    MIX,
    MOVE,
    PUSH,
    RATE,
    SHARE,
    SQUARE,
    gates,
    gates_back,
)

GROUP = 8
"""Chunks between the memories that are kept."""


@numba.njit(fastmath=FAST, cache=True)
def _keep_and_fade(m, s, keep, mix, move, m_rows, s_rows):
    """M and S as bfloat16, and what is left of them after the chunk."""
    keep, mix, move = splat(keep), splat(mix), splat(move)
    for j in range(0, m.size, WIDTH):
        a, b = load(m, j), load(s, j)
        store_half(m_rows, j, a)
        store_half(s_rows, j, b)
        store(m, j, a * keep + b * mix)
        store(s, j, b * move)


@numba.njit(fastmath=FAST, cache=True)
def _keep_and_fade_back(dm, ds, m_rows, s_rows, last, lines, dlines, dm_rows, ds_rows):
    """The same for gradients, and those of the factors, from M and S before the chunk."""
    keep, mix = splat(lines[KEEP + last]), splat(lines[MIX + last])
    move = splat(lines[MOVE + last])
    keeps, mixes, moves = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    for j in range(0, dm.size, WIDTH):
        a, b, s = load(dm, j), load(ds, j), load(s_rows, j)
        store_half(dm_rows, j, a)
        store_half(ds_rows, j, b)
        keeps = keeps + a * load(m_rows, j)
        mixes = mixes + a * s
        moves = moves + b * s
        store(dm, j, a * keep)
        store(ds, j, a * mix + b * move)
    dlines[KEEP + last] += total(keeps)
    dlines[MIX + last] += total(mixes)
    dlines[MOVE + last] += total(moves)


@numba.njit(fastmath=FAST, cache=True)
def _activate(z, count, into):
    for j in range(0, count, WIDTH):
        v = load(z, j)
        store_half(into, j, v * sigmoid(v))


@numba.njit(inline="always")
def _slope(v):
    s = sigmoid(v)
    return s * (splat(np.float32(1)) + v * (splat(np.float32(1)) - s))


@numba.njit(inline="always")
def _curve(v):
    """The second derivative of SiLU."""
    s, one, two = sigmoid(v), splat(np.float32(1)), splat(np.float32(2))
    return s * (one - s) * (two + v * (one - two * s))


@numba.njit(fastmath=FAST, cache=True)
def _learn(v, at_v, step, steps, d, wide, at, slab, m_rows, m_pairs, m_turned, x, z, behind, e,
           e_rows):
    """Z, what came back to it, E, from X_0: see above; a slab of rows of each for each layer."""
    layers = len(at)
    for i in range(layers):
        n, k = wide[i + 1], wide[i]
        pair(m_rows[at[i]:].ctypes.data, m_pairs[at[i] // 2:].ctypes.data, k, n)
        if i > 0:
            turn(m_rows[at[i]:].ctypes.data, m_turned[at[i] // 2:].ctypes.data, k, n // 2)
        strip(z[i * slab:].ctypes.data, 4 * n, True, x[i * slab:].ctypes.data, 2 * k,
              m_pairs[at[i] // 2:].ctypes.data, 4 * n, n, k)
        if i < layers - 1:
            _activate(z[i * slab:], SIZE * n, x[(i + 1) * slab:])
    last, n = (layers - 1) * slab, wide[layers]
    for t in range(steps):
        for j in range(0, d, WIDTH):
            g = load(z, last + t * n + j) - load(v, at_v + t * step + j)
            store(e, last + t * n + j, g + g)
            store_half(e_rows, last + t * n + j, g + g)
    for j in range(last + steps * n, last + SIZE * n):
        e[j] = 0
        e_rows[j] = 0
    for back in range(1, layers):
        i = layers - 1 - back
        n, k = wide[i + 1], wide[i + 2]
        strip(behind[i * slab:].ctypes.data, 4 * n, True, e_rows[(i + 1) * slab:].ctypes.data,
              2 * k, m_turned[at[i + 1] // 2:].ctypes.data, 4 * n, n, k)
        for j in range(i * slab, i * slab + SIZE * n, WIDTH):
            g = load(behind, j) * _slope(load(z, j))
            store(e, j, g)
            store_half(e_rows, j, g)


@numba.njit(fastmath=FAST, cache=True)
def _scaled_rows(source, start, factors, wide, into):
    """Sixteen rows times a factor each, as bfloat16."""
    for t in range(SIZE):
        factor = splat(factors[t])
        for j in range(t * wide, (t + 1) * wide, WIDTH):
            store_half(into, j, load(source, start + j) * factor)


@numba.njit(fastmath=FAST, cache=True)
def _write(wide, at, slab, share, push, x, e, m, s, rows, left, right, turned):
    """Add X^T (share E) to M and X^T (push E) to S."""
    for i in range(len(at)):
        n, k = wide[i + 1], wide[i]
        pair_alone(x, i * slab, k, k, left, 0)
        turn(left.ctypes.data, turned.ctypes.data, SIZE, k)
        _scaled_rows(e, i * slab, share, n, rows)
        pair_alone(rows, 0, n, n, right, 0)
        multiply(m[at[i]:].ctypes.data, 4 * n, False, turned.ctypes.data, 4 * SIZE,
                 right.ctypes.data, 4 * n, k, n, 2 * SIZE)
        _scaled_rows(e, i * slab, push, n, rows)
        pair_alone(rows, 0, n, n, right, 0)
        multiply(s[at[i]:].ctypes.data, 4 * n, False, turned.ctypes.data, 4 * SIZE,
                 right.ctypes.data, 4 * n, k, n, 2 * SIZE)


@numba.njit(fastmath=FAST, cache=True)
def _read(wide, at, slab, lines, share, m_pairs, s_rows, x, h, r, e_rows, scores, weights, rows,
          masked, right, turned):
    """R from H_0, and H; scores: H X^T of each layer, weights: A."""
    layers = len(at)
    keeps, mixes = lines[KEEP:KEEP + SIZE], lines[MIX:MIX + SIZE]
    for i in range(layers):
        n, k, to = wide[i + 1], wide[i], r[i * slab:].ctypes.data
        _scaled_rows(h, i * slab, keeps, k, rows)
        strip(to, 4 * n, True, rows.ctypes.data, 2 * k, m_pairs[at[i] // 2:].ctypes.data, 4 * n, n,
              k)
        _scaled_rows(h, i * slab, mixes, k, rows)
        pair(s_rows[at[i]:].ctypes.data, turned.ctypes.data, k, n)
        strip(to, 4 * n, False, rows.ctypes.data, 2 * k, turned.ctypes.data, 4 * n, n, k)
        turn(x[i * slab:].ctypes.data, turned.ctypes.data, SIZE, k // 2)
        square(scores[i * SQUARE:].ctypes.data, 4 * SIZE, h[i * slab:].ctypes.data, 2 * k,
               turned.ctypes.data, 4 * SIZE, k)
        for t in range(SIZE):
            a = load(scores, i * SQUARE + t * SIZE) * load(share, t * SIZE)
            store(weights, i * SQUARE + t * SIZE, a)
            store_half(masked, 2 * t * SIZE, a)
        pair_alone(e_rows, i * slab, n, n, right, 0)
        strip(to, 4 * n, False, masked.ctypes.data, 4 * SIZE, right.ctypes.data, 4 * n, n, 2 * SIZE)
        if i < layers - 1:
            _activate(r[i * slab:], SIZE * n, h[(i + 1) * slab:])


@numba.njit(fastmath=FAST, cache=True)
def copy_in(source, sizes, wide, at, into):
    """Matrices one after the other, dense -> padded with zeros."""
    start = 0
    for i in range(len(at)):
        for r in range(sizes[i]):
            for j in range(sizes[i + 1]):
                into[at[i] + r * wide[i + 1] + j] = source[start]
                start += 1


@numba.njit(fastmath=FAST, cache=True)
def copy_out(source, sizes, wide, at, into, add):
    """The inverse of `copy_in`; added to what is there, or in its place."""
    start = 0
    for i in range(len(at)):
        for r in range(sizes[i]):
            for j in range(sizes[i + 1]):
                value = source[at[i] + r * wide[i + 1] + j]
                into[start] = value + into[start] if add else value
                start += 1


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(q, k, v, rate, log_keep, log_momentum, initial, strides, sizes, wide, at, dims, starts,
            fresh, memory, momentum, begin, y, kept, floats, halves, words):
    """y, memory and momentum (in place), the memory before the last chunk, and what the way back
    needs.

    q, k, v, rate, log_keep, log_momentum: flat, strides: (6, 3), theirs over batch, step and head;
    initial: (heads, all weights of a memory); sizes, wide: (layers + 1,), features and the same
    padded to whole tiles; at: (layers,), where matrices of padded features begin; dims: (length,
    heads, chunk). starts: (batch, chunks + 1), where chunks begin, the length after the last;
    fresh: (batch, chunks), those of a new document. memory, momentum, begin: (batch heads, all
    weights). y: dense, flat. kept: (batch heads, groups, 2, all padded weights). floats, halves,
    words: scratch of zeros, a row a worker.
    """
    length, heads, size = dims
    layers, d, whole = len(at), sizes[0], kept.shape[3]
    slab = SIZE * wide.max()
    workers, tasks = floats.shape[0], memory.shape[0]
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h_, p = floats[worker], halves[worker], words[worker]
        m, f = f[:whole], f[whole:]
        s, f = f[:whole], f[whole:]
        z, f = f[:layers * slab], f[layers * slab:]
        behind, f = f[:layers * slab], f[layers * slab:]
        e, f = f[:layers * slab], f[layers * slab:]
        scores, f = f[:layers * SQUARE], f[layers * SQUARE:]
        weights, f = f[:layers * SQUARE], f[layers * SQUARE:]
        pairs, lines = f[:4 * SQUARE], f[4 * SQUARE:4 * SQUARE + 4 * SIZE]
        m_rows, h_ = h_[:whole], h_[whole:]
        s_rows, h_ = h_[:whole], h_[whole:]
        x, h_ = h_[:layers * slab], h_[layers * slab:]
        h, h_ = h_[:layers * slab], h_[layers * slab:]
        e_rows, h_ = h_[:layers * slab], h_[layers * slab:]
        rows, masked = h_[:slab], h_[slab:slab + 2 * SQUARE]
        m_pairs, p = p[:whole // 2], p[whole // 2:]
        m_turned, p = p[:whole // 2], p[whole // 2:]
        left, p = p[:slab], p[slab:]
        right, turned = p[:slab], p[slab:]
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            row, head = task // heads, task % heads
            copy_in(memory[task], sizes, wide, at, m)
            copy_in(momentum[task], sizes, wide, at, s)
            for n in range(fresh.shape[1]):
                first = starts[row, n]
                if first >= length:
                    break
                steps = starts[row, n + 1] - first
                if fresh[row, n]:
                    copy_in(initial[head], sizes, wide, at, m)
                    s[:] = 0
                if n % GROUP == 0:
                    kept[task, n // GROUP, 0] = m
                    kept[task, n // GROUP, 1] = s
                final = first + steps == length
                if final:
                    copy_out(m, sizes, wide, at, begin[task], False)
                gates(rate, log_keep, log_momentum, strides, row, head, first, steps, lines, pairs)
                last = steps - 1
                _keep_and_fade(m, s, lines[KEEP + last], lines[MIX + last], lines[MOVE + last],
                               m_rows, s_rows)
                copy_rows(k, row * strides[1, 0] + first * strides[1, 1] + head * strides[1, 2],
                          strides[1, 1], steps, d, wide[0], x, 0)
                copy_rows(q, row * strides[0, 0] + first * strides[0, 1] + head * strides[0, 2],
                          strides[0, 1], steps, d, wide[0], h, 0)
                at_v = row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2]
                _learn(v, at_v, strides[2, 1], steps, d, wide, at, slab, m_rows, m_pairs, m_turned,
                       x, z, behind, e, e_rows)
                share = pairs[SHARE:SHARE + SQUARE]
                _read(wide, at, slab, lines, share, m_pairs, s_rows, x, h, z, e_rows, scores,
                      weights, rows, masked, right, turned)
                for t in range(steps):
                    to = ((row * length + first + t) * heads + head) * d
                    for j in range(0, d, WIDTH):
                        store_half(y, to + j, load(z, (layers - 1) * slab + t * wide[layers] + j))
                if final or not fresh[row, n + 1]:
                    _write(wide, at, slab, share[last * SIZE:],
                           pairs[PUSH + last * SIZE:PUSH + SQUARE], x, e, m, s, rows, left,
                           right, turned)
                if final:
                    copy_out(m, sizes, wide, at, memory[task], False)
                    copy_out(s, sizes, wide, at, momentum[task], False)
                    if steps == size:
                        begin[task] = memory[task]
        release()


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(q, k, v, rate, log_keep, log_momentum, initial, strides, sizes, wide, at, dims, starts,
             fresh, dmemory, dmomentum, dbegin, dy, kept, dq, dk, dv, drate, dlog_keep,
             dlog_momentum, dinitial, floats, halves, words):
    """Gradients of everything that `forward` read; see there.

    dmemory, dmomentum: of the last ones, in place of the first; dbegin: of the memory before the
    last chunk. dy: dense like y; dq ... dlog_momentum: dense, flat; dinitial: (batch heads, all
    weights), zeros before.
    """
    length, heads, size = dims
    layers, d, whole = len(at), sizes[0], kept.shape[3]
    slab = SIZE * wide.max()
    workers, tasks = floats.shape[0], dmemory.shape[0]
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h_, p = floats[worker], halves[worker], words[worker]
        m, f = f[:whole], f[whole:]
        s, f = f[:whole], f[whole:]
        dm, f = f[:whole], f[whole:]
        ds, f = f[:whole], f[whole:]
        z, f = f[:layers * slab], f[layers * slab:]
        behind, f = f[:layers * slab], f[layers * slab:]
        e, f = f[:layers * slab], f[layers * slab:]
        r, f = f[:layers * slab], f[layers * slab:]
        dx, f = f[:layers * slab], f[layers * slab:]
        de, f = f[:layers * slab], f[layers * slab:]
        g, f = f[:slab], f[slab:]
        one, f = f[:slab], f[slab:]
        two, f = f[:slab], f[slab:]
        scores, f = f[:layers * SQUARE], f[layers * SQUARE:]
        weights, f = f[:layers * SQUARE], f[layers * SQUARE:]
        pairs, f = f[:4 * SQUARE], f[4 * SQUARE:]
        dpairs, f = f[:4 * SQUARE], f[4 * SQUARE:]
        meet, f = f[:SQUARE], f[SQUARE:]
        lines, dlines = f[:4 * SIZE], f[4 * SIZE:8 * SIZE]
        group, h_ = h_[:2 * GROUP * whole], h_[2 * GROUP * whole:]
        dm_rows, h_ = h_[:whole], h_[whole:]
        ds_rows, h_ = h_[:whole], h_[whole:]
        x, h_ = h_[:layers * slab], h_[layers * slab:]
        h, h_ = h_[:layers * slab], h_[layers * slab:]
        e_rows, h_ = h_[:layers * slab], h_[layers * slab:]
        rows, masked = h_[:slab], h_[slab:slab + 2 * SQUARE]
        m_pairs, p = p[:whole // 2], p[whole // 2:]
        m_turned, p = p[:whole // 2], p[whole // 2:]
        lefts, p = p[:layers * slab], p[layers * slab:]
        rights, p = p[:layers * slab], p[layers * slab:]
        left, p = p[:slab], p[slab:]
        right, p = p[:slab], p[slab:]
        block, turned = p[:SQUARE], p[SQUARE:]
        share = pairs[SHARE:SHARE + SQUARE]
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            row, head = task // heads, task % heads
            copy_in(dmemory[task], sizes, wide, at, dm)
            copy_in(dmomentum[task], sizes, wide, at, ds)
            count = 0
            while count < fresh.shape[1] and starts[row, count] < length:
                count += 1
            if length - starts[row, count - 1] == size:
                copy_in(dbegin[task], sizes, wide, at, m)
                for j in range(0, whole, WIDTH):
                    store(dm, j, load(dm, j) + load(m, j))
            for back in range(count):
                n = count - 1 - back
                if back == 0 or n % GROUP == GROUP - 1:
                    m[:] = kept[task, n // GROUP, 0]
                    s[:] = kept[task, n // GROUP, 1]
                    for c in range(n // GROUP * GROUP, n + 1):
                        if fresh[row, c]:
                            copy_in(initial[head], sizes, wide, at, m)
                            s[:] = 0
                        first = starts[row, c]
                        steps = starts[row, c + 1] - first
                        last = steps - 1
                        gates(rate, log_keep, log_momentum, strides, row, head, first, steps,
                               lines, pairs)
                        base = c % GROUP * 2 * whole
                        _keep_and_fade(m, s, lines[KEEP + last], lines[MIX + last],
                                       lines[MOVE + last], group[base:base + whole],
                                       group[base + whole:])
                        if c == n or fresh[row, c + 1]:
                            continue
                        copy_rows(k, row * strides[1, 0] + first * strides[1, 1]
                                  + head * strides[1, 2], strides[1, 1], steps, d, wide[0], x, 0)
                        at_v = row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2]
                        _learn(v, at_v, strides[2, 1], steps, d, wide, at, slab, group[base:],
                               m_pairs, m_turned, x, z, behind, e, e_rows)
                        _write(wide, at, slab, share[last * SIZE:],
                               pairs[PUSH + last * SIZE:PUSH + SQUARE], x, e, m, s, rows, left,
                               right, turned)
                first = starts[row, n]
                steps = starts[row, n + 1] - first
                last = steps - 1
                base = n % GROUP * 2 * whole
                m_rows, s_rows = group[base:base + whole], group[base + whole:base + 2 * whole]
                gates(rate, log_keep, log_momentum, strides, row, head, first, steps, lines, pairs)
                copy_rows(k, row * strides[1, 0] + first * strides[1, 1] + head * strides[1, 2],
                          strides[1, 1], steps, d, wide[0], x, 0)
                copy_rows(q, row * strides[0, 0] + first * strides[0, 1] + head * strides[0, 2],
                          strides[0, 1], steps, d, wide[0], h, 0)
                at_v = row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2]
                _learn(v, at_v, strides[2, 1], steps, d, wide, at, slab, m_rows, m_pairs, m_turned,
                       x, z, behind, e, e_rows)
                _read(wide, at, slab, lines, share, m_pairs, s_rows, x, h, r, e_rows, scores,
                      weights, rows, masked, right, turned)
                dlines[:] = 0
                dpairs[:] = 0
                _keep_and_fade_back(dm, ds, m_rows, s_rows, last, lines, dlines, dm_rows, ds_rows)
                turn(m_rows.ctypes.data, m_turned.ctypes.data, wide[0], wide[1] // 2)
                # through what was written
                for i in range(layers):
                    o, c = wide[i + 1], wide[i]
                    own_x, own_e = x[i * slab:].ctypes.data, e[i * slab:]
                    to_x, to_e = dx[i * slab:].ctypes.data, de[i * slab:]
                    for kind in range(2):
                        part = dm_rows[at[i]:] if kind == 0 else ds_rows[at[i]:]
                        line = (SHARE if kind == 0 else PUSH) + last * SIZE
                        pair(part.ctypes.data, turned.ctypes.data, c, o)
                        strip(one.ctypes.data, 4 * o, True, own_x, 2 * c, turned.ctypes.data, 4 * o,
                              o, c)
                        for t in range(SIZE):
                            factor, acc = splat(pairs[line + t]), splat(np.float32(0))
                            for j in range(t * o, (t + 1) * o, WIDTH):
                                u = load(one, j)
                                acc = acc + u * load(own_e, j)
                                u = u * factor
                                store(to_e, j, u + load(to_e, j) if kind else u)
                            dpairs[line + t] += total(acc)
                        _scaled_rows(e, i * slab, pairs[line:], o, rows)
                        turn(part.ctypes.data, turned.ctypes.data, c, o // 2)
                        strip(to_x, 4 * c, kind == 0, rows.ctypes.data, 2 * o, turned.ctypes.data,
                              4 * c, c, o)
                # through what the queries read
                o = wide[layers]
                for t in range(SIZE):
                    to = ((row * length + first + t) * heads + head) * d
                    for j in range(0, o, WIDTH):
                        held = t < steps and j < d
                        store(g, t * o + j, load(dy, to + j) if held else splat(np.float32(0)))
                for down in range(layers):
                    i = layers - 1 - down
                    o, c = wide[i + 1], wide[i]
                    for j in range(0, SIZE * o, WIDTH):
                        store_half(rows, j, load(g, j))
                    pair_rows(g, 0, o, o, rights, i * slab + SIZE // 2 * o)
                    strip(one.ctypes.data, 4 * c, True, rows.ctypes.data, 2 * o,
                          m_turned[at[i] // 2:].ctypes.data, 4 * c, c, o)
                    turn(s_rows[at[i]:].ctypes.data, turned.ctypes.data, c, o // 2)
                    strip(two.ctypes.data, 4 * c, True, rows.ctypes.data, 2 * o, turned.ctypes.data,
                          4 * c, c, o)
                    for t in range(SIZE):
                        keep, mix = splat(lines[KEEP + t]), splat(lines[MIX + t])
                        keeps, mixes = splat(np.float32(0)), splat(np.float32(0))
                        for j in range(t * c, (t + 1) * c, WIDTH):
                            u, w, own = load(one, j), load(two, j), load(h, i * slab + j)
                            keeps = keeps + u * own
                            mixes = mixes + w * own
                            store(one, j, u * keep + w * mix)
                        dlines[KEEP + t] += total(keeps)
                        dlines[MIX + t] += total(mixes)
                    turn(e_rows[i * slab:].ctypes.data, turned.ctypes.data, SIZE, o // 2)
                    square(meet.ctypes.data, 4 * SIZE, rows.ctypes.data, 2 * o, turned.ctypes.data,
                           4 * SIZE, o)
                    for t in range(SIZE):
                        u, there = load(meet, t * SIZE), SHARE + t * SIZE
                        store(dpairs, there, load(dpairs, there)
                              + u * load(scores, i * SQUARE + t * SIZE))
                        u = u * load(share, t * SIZE)
                        store(meet, t * SIZE, u)
                        store_half(masked, 2 * t * SIZE, u)
                    _scaled_rows(h, i * slab, lines[KEEP:], c, rows)
                    pair_rows(rows, 0, c, c, lefts, i * slab + SIZE // 2 * c)
                    pair_rows(x, i * slab, c, c, lefts, i * slab)
                    # D X, where keep H meets zeros; D^T H; A^T G
                    strip(one.ctypes.data, 4 * c, False, masked.ctypes.data, 4 * SIZE,
                          lefts[i * slab:].ctypes.data, 4 * c, c, 2 * SIZE)
                    pair_square(meet, block, 0)
                    turn(block.ctypes.data, masked.ctypes.data, SIZE, SIZE)
                    pair_alone(h, i * slab, c, c, left, 0)
                    strip(dx[i * slab:].ctypes.data, 4 * c, False, masked.ctypes.data, 4 * SIZE,
                          left.ctypes.data, 4 * c, c, 2 * SIZE)
                    pair_square(weights[i * SQUARE:], block, 0)
                    turn(block.ctypes.data, masked.ctypes.data, SIZE, SIZE)
                    pair_alone(g, 0, o, o, right, 0)
                    strip(de[i * slab:].ctypes.data, 4 * o, False, masked.ctypes.data, 4 * SIZE,
                          right.ctypes.data, 4 * o, o, 2 * SIZE)
                    _scaled_rows(h, i * slab, lines[MIX:], c, rows)
                    pair_alone(rows, 0, c, c, left, 0)
                    turn(left.ctypes.data, turned.ctypes.data, SIZE, c)
                    multiply(ds[at[i]:].ctypes.data, 4 * o, False, turned.ctypes.data, 4 * SIZE,
                             right.ctypes.data, 4 * o, c, o, 2 * SIZE)
                    if i > 0:
                        for j in range(0, SIZE * c, WIDTH):
                            store(g, j, load(one, j) * _slope(load(r, (i - 1) * slab + j)))
                for t in range(steps):
                    to = ((row * length + first + t) * heads + head) * d
                    for j in range(0, d, WIDTH):
                        store_half(dq, to + j, load(one, t * wide[0] + j))
                # through the gradients, and through the memory's run on the keys
                for i in range(layers - 1):
                    o, c = wide[i + 2], wide[i + 1]
                    for j in range(0, SIZE * c, WIDTH):
                        u, own = load(de, i * slab + j), load(z, i * slab + j)
                        store(one, j, u * _slope(own))
                        store(g, j, u * load(behind, i * slab + j) * _curve(own))
                        store_half(rows, j, u * _slope(own))
                    de[i * slab:i * slab + SIZE * c] = g[:SIZE * c]
                    strip(de[(i + 1) * slab:].ctypes.data, 4 * o, False, rows.ctypes.data, 2 * c,
                          m_pairs[at[i + 1] // 2:].ctypes.data, 4 * o, o, c)
                    pair_alone(one, 0, c, c, left, 0)
                    turn(left.ctypes.data, turned.ctypes.data, SIZE, c)
                    pair_alone(e_rows, (i + 1) * slab, o, o, right, 0)
                    multiply(dm[at[i + 1]:].ctypes.data, 4 * o, False, turned.ctypes.data, 4 * SIZE,
                             right.ctypes.data, 4 * o, c, o, 2 * SIZE)
                o = wide[layers]
                final = (layers - 1) * slab
                for j in range(final, final + SIZE * o, WIDTH):
                    store(de, j, load(de, j) + load(de, j))
                for t in range(steps):
                    to = ((row * length + first + t) * heads + head) * d
                    for j in range(0, d, WIDTH):
                        store_half(dv, to + j, splat(np.float32(0)) - load(de, final + t * o + j))
                for down in range(layers):
                    i = layers - 1 - down
                    o, c = wide[i + 1], wide[i]
                    for j in range(0, SIZE * o, WIDTH):
                        store_half(rows, j, load(de, i * slab + j))
                    strip(dx[i * slab:].ctypes.data, 4 * c, False, rows.ctypes.data, 2 * o,
                          m_turned[at[i] // 2:].ctypes.data, 4 * c, c, o)
                    pair_rows(rows, 0, o, o, rights, i * slab)
                    turn(lefts[i * slab:].ctypes.data, turned.ctypes.data, SIZE, c)
                    multiply(dm[at[i]:].ctypes.data, 4 * o, False, turned.ctypes.data, 4 * SIZE,
                             rights[i * slab:].ctypes.data, 4 * o, c, o, 2 * SIZE)
                    if i > 0:
                        for j in range((i - 1) * slab, (i - 1) * slab + SIZE * c, WIDTH):
                            u = load(dx, j + slab) * _slope(load(z, j))
                            store(de, j, load(de, j) + u)
                gates_back(lines, pairs, dlines, dpairs, meet)
                for t in range(steps):
                    to = (row * length + first + t) * heads + head
                    for j in range(0, d, WIDTH):
                        store_half(dk, to * d + j, load(dx, t * wide[0] + j))
                    drate[to] = dlines[RATE + t]
                    dlog_keep[to] = dlines[KEEP + t]
                    dlog_momentum[to] = dlines[MOVE + t]
                if back == 0 and steps < size:
                    copy_in(dbegin[task], sizes, wide, at, m)
                    for j in range(0, whole, WIDTH):
                        store(dm, j, load(dm, j) + load(m, j))
                if fresh[row, n]:
                    copy_out(dm, sizes, wide, at, dinitial[task], True)
                    dm[:] = 0
                    ds[:] = 0
            copy_out(dm, sizes, wide, at, dmemory[task], False)
            copy_out(ds, sizes, wide, at, dmomentum[task], False)
        release()


def scratch(wide):
    """(floats, halves, words) of one worker, enough for both passes; multiples of 64 bytes."""
    layers, slab = len(wide) - 1, SIZE * max(wide)
    whole = sum(wide[i] * wide[i + 1] for i in range(layers))
    largest = max(wide[i] * wide[i + 1] for i in range(layers))
    return (4 * whole + (6 * layers + 3) * slab + 2 * layers * SQUARE + 10 * SQUARE,
            (2 * GROUP + 2) * whole + (3 * layers + 1) * slab + 2 * SQUARE,
            whole + (2 * layers + 2) * slab + SQUARE + max(largest // 2, SIZE * max(wide)))
