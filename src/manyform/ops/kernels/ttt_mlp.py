"""TTT with a network of several layers on matrix tiles: one pass over time for each row and head.

The equations are those of `ops.ttt`. For a mini-batch with weights W_l (biases b_l), inputs X_l of
keys and H_l of queries, and last the scale of its end:

    X_l+1 = gelu(Z_l), Z_l = X_l W_l + b_l      E_last = rate dl/dZ_last
    E_l = (E_l+1 W_l+1^T) gelu'(Z_l)            A_l = -scale tril(H_l X_l^T + 1)
    H_l+1 = gelu(R_l), R_l = H_l W_l + b_l + A_l E_l
    y = Q + LN(R_last)                          W_l' = W_l - last X_l^T E_l

and back as in `ttt`, layer by layer. Weights are kept every few mini-batches; the way back goes
forward over those once more and keeps them, as bfloat16, in cache.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import halve, multiply, pair, turn, visible
from manyform.ops.kernels.lanes import FAST, WIDTH, load, splat, store, total
from manyform.ops.kernels.strips import (
    SIZE,
    copy_rows,
    pair_alone,
    pair_rows,
    pair_square,
    square,
    strip,
)
from manyform.ops.kernels.tiles import (
    SHAPE,
    A,
    C,
    configure,
    gelu,
    gelu_slope,
    release,
    sigmoid,
    store_half,
)
from manyform.ops.kernels.ttt import (
    _triangle,
    loss_rows,
    loss_rows_back,
    norm_rows,
    norm_rows_back,
)

GROUP = 8
"""Mini-batches between the weights that are kept."""
_SQUARE = SIZE * SIZE


@numba.njit(inline="always")
def _curve(v):
    """GELU's second derivative."""
    cubic, one, two = splat(C) * v * v, splat(np.float32(1)), splat(np.float32(2))
    s = sigmoid(v * (splat(A) + cubic))
    first = splat(A) + splat(np.float32(3)) * cubic
    inner = (one - two * s) * first * first + splat(np.float32(6) * C) * v
    return s * (one - s) * (two * first + v * inner)


@numba.njit(fastmath=FAST, cache=True)
def copy_in(source, sizes, wide, at, bias_at, w, bias):
    """Weights (inputs + 1, outputs), biases last, a layer after another -> padded with zeros."""
    start = 0
    for i in range(len(at)):
        n = sizes[i + 1]
        for r in range(sizes[i] + 1):
            for j in range(0, n, WIDTH):
                v = load(source, start + r * n + j)
                if r < sizes[i]:
                    store(w, at[i] + r * wide[i + 1] + j, v)
                else:
                    store(bias, bias_at[i] + j, v)
        start += (sizes[i] + 1) * n


@numba.njit(fastmath=FAST, cache=True)
def copy_out(w, bias, sizes, wide, at, bias_at, into, add):
    """The inverse of `copy_in`; added to what is there, or in its place."""
    start = 0
    for i in range(len(at)):
        n = sizes[i + 1]
        for r in range(sizes[i] + 1):
            for j in range(0, n, WIDTH):
                to = start + r * n + j
                v = (load(w, at[i] + r * wide[i + 1] + j) if r < sizes[i]
                     else load(bias, bias_at[i] + j))
                store(into, to, v + (load(into, to) if add else splat(np.float32(0))))
        start += (sizes[i] + 1) * n


@numba.njit(fastmath=FAST, cache=True)
def _add_bias(z, start, wide, bias, at, rows):
    for j in range(start, start + SIZE * wide, wide):
        for c in range(0, wide, WIDTH):
            v = load(z, j + c) + load(bias, at + c)
            store(z, j + c, v)
            if rows.size:
                store_half(rows, j + c, gelu(v))


@numba.njit(fastmath=FAST, cache=True)
def _add_rows(z, start, wide, factor, into, at):
    """Add the sum of sixteen rows, times a factor."""
    factor = splat(factor)
    for c in range(0, wide, WIDTH):
        acc = splat(np.float32(0))
        for j in range(start + c, start + c + SIZE * wide, wide):
            acc = acc + load(z, j)
        store(into, at + c, load(into, at + c) + acc * factor)


@numba.njit(fastmath=FAST, cache=True)
def _scaled_rows(source, start, factor, count, into):
    """A factor times some rows, as bfloat16."""
    factor = splat(factor)
    for j in range(0, count, WIDTH):
        store_half(into, j, load(source, start + j) * factor)


@numba.njit(fastmath=FAST, cache=True)
def _learn(k, v, rate, strides, row, head, first, steps, d, wide, at, bias_at, slab, norm, w_rows,
           bias, w_pairs, w_turned, x, z, behind, error, grad, statistics, e, e_rows):
    """X, Z (the last normalised), what came back to Z, and E: a slab of rows a layer of each."""
    layers = len(at)
    copy_rows(k, row * strides[1, 0] + first * strides[1, 1] + head * strides[1, 2], strides[1, 1],
              steps, d, wide[0], x, 0)
    for i in range(layers):
        n, c = wide[i + 1], wide[i]
        pair(w_rows[at[i]:].ctypes.data, w_pairs[at[i] // 2:].ctypes.data, c, n)
        if i > 0:
            turn(w_rows[at[i]:].ctypes.data, w_turned[at[i] // 2:].ctypes.data, c, n // 2)
        strip(z[i * slab:].ctypes.data, 4 * n, True, x[i * slab:].ctypes.data, 2 * c,
              w_pairs[at[i] // 2:].ctypes.data, 4 * n, n, c)
        _add_bias(z[i * slab:], 0, n, bias, bias_at[i],
                  x[(i + 1) * slab:] if i < layers - 1 else x[:0])
    last = (layers - 1) * slab
    loss_rows(v, row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2], strides[2, 1],
              rate, row * strides[3, 0] + first * strides[3, 1] + head * strides[3, 2],
              strides[3, 1], steps, d, wide[layers], norm, x, z, last, error, grad, statistics, e,
              last)
    halve(e[last:], SIZE, wide[layers], e_rows[last:])
    for back in range(1, layers):
        i = layers - 1 - back
        n, c = wide[i + 1], wide[i + 2]
        strip(behind[i * slab:].ctypes.data, 4 * n, True, e_rows[(i + 1) * slab:].ctypes.data,
              2 * c, w_turned[at[i + 1] // 2:].ctypes.data, 4 * n, n, c)
        for j in range(i * slab, i * slab + SIZE * n, WIDTH):
            g = load(behind, j) * gelu_slope(load(z, j))
            store(e, j, g)
            store_half(e_rows, j, g)


@numba.njit(fastmath=FAST, cache=True)
def _read(wide, at, bias_at, slab, minus, mask, w_pairs, bias, x, h, r, e_rows, scores, weights,
          masked, right, turned):
    """R (the last not normalised) and H, from H_0; scores: tril(H X^T + 1), weights: A."""
    layers, one = len(at), splat(np.float32(1))
    for i in range(layers):
        n, c, to = wide[i + 1], wide[i], r[i * slab:].ctypes.data
        strip(to, 4 * n, True, h[i * slab:].ctypes.data, 2 * c, w_pairs[at[i] // 2:].ctypes.data,
              4 * n, n, c)
        turn(x[i * slab:].ctypes.data, turned.ctypes.data, SIZE, c // 2)
        square(scores[i * _SQUARE:].ctypes.data, 4 * SIZE, h[i * slab:].ctypes.data, 2 * c,
               turned.ctypes.data, 4 * SIZE, c)
        for t in range(SIZE):
            there = i * _SQUARE + t * SIZE
            a = visible(load(scores, there) + one, load(mask, t * SIZE))
            store(scores, there, a)
            a = a * splat(minus[t])
            store(weights, there, a)
            store_half(masked, 2 * t * SIZE, a)
        pair_alone(e_rows, i * slab, n, n, right, 0)
        strip(to, 4 * n, False, masked.ctypes.data, 4 * SIZE, right.ctypes.data, 4 * n, n, 2 * SIZE)
        _add_bias(r[i * slab:], 0, n, bias, bias_at[i],
                  h[(i + 1) * slab:] if i < layers - 1 else h[:0])


@numba.njit(fastmath=FAST, cache=True)
def _write(wide, at, bias_at, slab, factor, x, e, w, bias, rows, left, right, turned):
    """Add a factor times X^T E, and the biases' part."""
    for i in range(len(at)):
        n, c = wide[i + 1], wide[i]
        pair_alone(x, i * slab, c, c, left, 0)
        turn(left.ctypes.data, turned.ctypes.data, SIZE, c)
        _scaled_rows(e, i * slab, factor, SIZE * n, rows)
        pair_alone(rows, 0, n, n, right, 0)
        multiply(w[at[i]:].ctypes.data, 4 * n, False, turned.ctypes.data, 4 * SIZE,
                 right.ctypes.data, 4 * n, c, n, 2 * SIZE)
        _add_rows(e, i * slab, n, factor, bias, bias_at[i])


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(q, k, v, rate, norm, initial, minus, strides, dims, starts, fresh, weights, sums, y,
            sizes, wide, at, bias_at, kept, floats, halves, words):
    """y, the weights (in place), the sums, and what the way back needs.

    As in `ttt`, with all weights of a network in a row; sizes, wide: (layers + 1,), features and
    the same padded to whole tiles; at, bias_at: (layers,), where padded matrices and biases begin.
    kept: (batch heads, groups, all padded weights and biases).
    """
    length, heads, d, size = dims
    layers, every = len(at), kept.shape[2]
    whole = every - wide[1:].sum()
    slab = SIZE * wide.max()
    workers, tasks = floats.shape[0], weights.shape[0]
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h_, p = floats[worker], halves[worker], words[worker]
        state, f = f[:every], f[every:]
        weight, bias = state[:whole], state[whole:]
        z, f = f[:layers * slab], f[layers * slab:]
        behind, f = f[:layers * slab], f[layers * slab:]
        e, f = f[:layers * slab], f[layers * slab:]
        error, f = f[:slab], f[slab:]
        grad, f = f[:slab], f[slab:]
        scores, f = f[:layers * _SQUARE], f[layers * _SQUARE:]
        shares, f = f[:layers * _SQUARE], f[layers * _SQUARE:]
        mask, statistics = f[:_SQUARE], f[_SQUARE:_SQUARE + 2 * SIZE]
        w_rows, h_ = h_[:whole], h_[whole:]
        x, h_ = h_[:layers * slab], h_[layers * slab:]
        h, h_ = h_[:layers * slab], h_[layers * slab:]
        e_rows, h_ = h_[:layers * slab], h_[layers * slab:]
        rows, masked = h_[:slab], h_[slab:slab + 2 * _SQUARE]
        w_pairs, p = p[:whole // 2], p[whole // 2:]
        w_turned, p = p[:whole // 2], p[whole // 2:]
        left, p = p[:slab], p[slab:]
        right, turned = p[:slab], p[slab:]
        _triangle(mask)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            row, head = task // heads, task % heads
            own = norm[head]
            copy_in(weights[task], sizes, wide, at, bias_at, weight, bias)
            for n in range(fresh.shape[1]):
                first = starts[row, n]
                if first >= length:
                    break
                steps = starts[row, n + 1] - first
                if fresh[row, n]:
                    copy_in(initial[head], sizes, wide, at, bias_at, weight, bias)
                if n % GROUP == 0:
                    kept[task, n // GROUP] = state
                halve(weight, 1, whole, w_rows)
                copy_rows(q, row * strides[0, 0] + first * strides[0, 1] + head * strides[0, 2],
                          strides[0, 1], steps, d, wide[0], h, 0)
                _learn(k, v, rate, strides, row, head, first, steps, d, wide, at, bias_at, slab,
                       own, w_rows, bias, w_pairs, w_turned, x, z, behind, error, grad, statistics,
                       e, e_rows)
                _read(wide, at, bias_at, slab, minus, mask, w_pairs, bias, x, h, z, e_rows, scores,
                      shares, masked, right, turned)
                norm_rows(z, (layers - 1) * slab, h, 0, steps, d, wide[0], own, y,
                          (row * length + first) * heads + head, heads)
                last = first + steps == length
                if steps < size:
                    if not last:
                        continue
                    copy_out(weight, bias, sizes, wide, at, bias_at, weights[task], False)
                    state[:] = 0
                factor = minus[size - 1] if steps == size else np.float32(1)
                _write(wide, at, bias_at, slab, factor, x, e, weight, bias, rows, left, right,
                       turned)
                if last:
                    copy_out(weight, bias, sizes, wide, at, bias_at,
                             weights[task] if steps == size else sums[task], False)
        release()


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(q, k, v, rate, norm, initial, minus, strides, dims, starts, fresh, dweights, dsums, dy,
             sizes, wide, at, bias_at, kept, dq, dk, dv, drate, dnorm, dscale, dinitial, floats,
             halves, words):
    """Gradients of everything that `forward` read; see there, and `ttt`."""
    length, heads, d, size = dims
    layers, every = len(at), kept.shape[2]
    few = wide[1:].sum()
    whole, slab = every - few, SIZE * wide.max()
    final = (layers - 1) * slab
    workers, tasks = floats.shape[0], dweights.shape[0]
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h_, p = floats[worker], halves[worker], words[worker]
        state, f = f[:every], f[every:]
        weight, after = state[:whole], state[whole:]
        dw, f = f[:whole], f[whole:]
        dbias, f = f[:few], f[few:]
        biases, f = f[:GROUP * few], f[GROUP * few:]
        z, f = f[:layers * slab], f[layers * slab:]
        behind, f = f[:layers * slab], f[layers * slab:]
        e, f = f[:layers * slab], f[layers * slab:]
        r, f = f[:layers * slab], f[layers * slab:]
        dx, f = f[:layers * slab], f[layers * slab:]
        de, f = f[:layers * slab], f[layers * slab:]
        error, f = f[:slab], f[slab:]
        grad, f = f[:slab], f[slab:]
        g, f = f[:slab], f[slab:]
        one, f = f[:slab], f[slab:]
        scores, f = f[:layers * _SQUARE], f[layers * _SQUARE:]
        shares, f = f[:layers * _SQUARE], f[layers * _SQUARE:]
        meet, f = f[:_SQUARE], f[_SQUARE:]
        mask, statistics = f[:_SQUARE], f[_SQUARE:_SQUARE + 2 * SIZE]
        group, h_ = h_[:GROUP * whole], h_[GROUP * whole:]
        after_rows, h_ = h_[:whole], h_[whole:]
        x, h_ = h_[:layers * slab], h_[layers * slab:]
        h, h_ = h_[:layers * slab], h_[layers * slab:]
        e_rows, h_ = h_[:layers * slab], h_[layers * slab:]
        rows, masked = h_[:slab], h_[slab:slab + 2 * _SQUARE]
        w_pairs, p = p[:whole // 2], p[whole // 2:]
        w_turned, p = p[:whole // 2], p[whole // 2:]
        lefts, p = p[:layers * slab], p[layers * slab:]
        rights, p = p[:layers * slab], p[layers * slab:]
        left, p = p[:slab], p[slab:]
        right, p = p[:slab], p[slab:]
        block, turned = p[:_SQUARE], p[_SQUARE:]
        _triangle(mask)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            row, head = task // heads, task % heads
            own, down, steps_scale = norm[head], dnorm[task], dscale[task]
            copy_in(dweights[task], sizes, wide, at, bias_at, dw, dbias)
            count = 0
            while count < fresh.shape[1] and starts[row, count] < length:
                count += 1
            for back in range(count):
                n = count - 1 - back
                if back == 0 or n % GROUP == GROUP - 1:
                    state[:] = kept[task, n // GROUP]
                    for c in range(n // GROUP * GROUP, n + 1):
                        if fresh[row, c]:
                            copy_in(initial[head], sizes, wide, at, bias_at, weight, after)
                        first = starts[row, c]
                        steps = starts[row, c + 1] - first
                        w_rows = group[c % GROUP * whole:]
                        halve(weight, 1, whole, w_rows)
                        bias = biases[c % GROUP * few:]
                        bias[:few] = after
                        if c == n or steps < size:
                            continue
                        _learn(k, v, rate, strides, row, head, first, steps, d, wide, at, bias_at,
                               slab, own, w_rows, bias, w_pairs, w_turned, x, z, behind, error,
                               grad, statistics, e, e_rows)
                        _write(wide, at, bias_at, slab, minus[size - 1], x, e, weight, after, rows,
                               left, right, turned)
                first = starts[row, n]
                steps = starts[row, n + 1] - first
                base = (row * length + first) * heads + head
                w_rows, bias = group[n % GROUP * whole:], biases[n % GROUP * few:]
                copy_rows(q, row * strides[0, 0] + first * strides[0, 1] + head * strides[0, 2],
                          strides[0, 1], steps, d, wide[0], h, 0)
                _learn(k, v, rate, strides, row, head, first, steps, d, wide, at, bias_at, slab,
                       own, w_rows, bias, w_pairs, w_turned, x, z, behind, error, grad, statistics,
                       e, e_rows)
                turn(w_rows.ctypes.data, w_turned.ctypes.data, wide[0], wide[1] // 2)
                _read(wide, at, bias_at, slab, minus, mask, w_pairs, bias, x, h, r, e_rows, scores,
                      shares, masked, right, turned)
                # through the weights, or the sums, after it
                full, last = steps == size, first + steps == length
                factor = minus[size - 1] if full else np.float32(1)
                if full:
                    halve(dw, 1, whole, after_rows)
                    after[:] = dbias
                elif last:
                    copy_in(dsums[task], sizes, wide, at, bias_at, weight, after)
                    halve(weight, 1, whole, after_rows)
                else:
                    de[:] = 0
                    dx[:] = 0
                if full or last:
                    acc = splat(np.float32(0))
                    for i in range(layers):
                        o, c = wide[i + 1], wide[i]
                        part = after_rows[at[i]:].ctypes.data
                        pair(part, turned.ctypes.data, c, o)
                        strip(one.ctypes.data, 4 * o, True, x[i * slab:].ctypes.data, 2 * c,
                              turned.ctypes.data, 4 * o, o, c)
                        _add_bias(one, 0, o, after, bias_at[i], x[:0])
                        for j in range(0, SIZE * o, WIDTH):
                            u = load(one, j)
                            acc = acc + u * load(e, i * slab + j)
                            store(de, i * slab + j, u * splat(factor))
                        _scaled_rows(e, i * slab, factor, SIZE * o, rows)
                        turn(part, turned.ctypes.data, c, o // 2)
                        strip(dx[i * slab:].ctypes.data, 4 * c, True, rows.ctypes.data, 2 * o,
                              turned.ctypes.data, 4 * c, c, o)
                    if full:
                        steps_scale[size - 1] -= total(acc)
                # through what the queries read
                norm_rows_back(dy, base, heads, steps, d, wide[0], own, down, r, final, g, 0)
                for down_ in range(layers):
                    i = layers - 1 - down_
                    o, c, there = wide[i + 1], wide[i], i * slab
                    halve(r[there:], SIZE, o, rows)
                    pair_rows(rows, 0, o, o, rights, there + SIZE // 2 * o)
                    strip(one.ctypes.data, 4 * c, True, rows.ctypes.data, 2 * o,
                          w_turned[at[i] // 2:].ctypes.data, 4 * c, c, o)
                    turn(e_rows[there:].ctypes.data, turned.ctypes.data, SIZE, o // 2)
                    square(meet.ctypes.data, 4 * SIZE, rows.ctypes.data, 2 * o, turned.ctypes.data,
                           4 * SIZE, o)
                    for t in range(SIZE):
                        u = load(meet, t * SIZE)
                        steps_scale[t] -= total(visible(u, load(scores, i * _SQUARE + t * SIZE)))
                        u = visible(u, load(mask, t * SIZE)) * splat(minus[t])
                        store(meet, t * SIZE, u)
                        store_half(masked, 2 * t * SIZE, u)
                    pair_rows(x, there, c, c, lefts, there)
                    pair_rows(h, there, c, c, lefts, there + SIZE // 2 * c)
                    strip(one.ctypes.data, 4 * c, False, masked.ctypes.data, 4 * SIZE,
                          lefts[there:].ctypes.data, 4 * c, c, 2 * SIZE)
                    pair_square(meet, block, 0)
                    turn(block.ctypes.data, masked.ctypes.data, SIZE, SIZE)
                    pair_alone(h, there, c, c, left, 0)
                    strip(dx[there:].ctypes.data, 4 * c, False, masked.ctypes.data, 4 * SIZE,
                          left.ctypes.data, 4 * c, c, 2 * SIZE)
                    pair_square(shares[i * _SQUARE:], block, 0)
                    turn(block.ctypes.data, masked.ctypes.data, SIZE, SIZE)
                    pair_alone(rows, 0, o, o, right, 0)
                    strip(de[there:].ctypes.data, 4 * o, False, masked.ctypes.data, 4 * SIZE,
                          right.ctypes.data, 4 * o, o, 2 * SIZE)
                    if i > 0:
                        for j in range(there - slab, there - slab + SIZE * c, WIDTH):
                            store(r, j, load(one, j - there + slab) * gelu_slope(load(r, j)))
                for t in range(steps):
                    to = (base + t * heads) * d
                    for j in range(0, d, WIDTH):
                        there = t * wide[0] + j
                        store_half(dq, to + j, load(one, there) + load(g, there))
                # through the gradients, and through the network's run on the keys
                for i in range(layers - 1):
                    o, c = wide[i + 2], wide[i + 1]
                    for j in range(0, SIZE * c, WIDTH):
                        u, there = load(de, i * slab + j), load(z, i * slab + j)
                        store_half(rows, j, u * gelu_slope(there))
                        store(de, i * slab + j, u * load(behind, i * slab + j) * _curve(there))
                    strip(de[(i + 1) * slab:].ctypes.data, 4 * o, False, rows.ctypes.data, 2 * c,
                          w_pairs[at[i + 1] // 2:].ctypes.data, 4 * o, o, c)
                    pair_alone(rows, 0, c, c, left, 0)
                    turn(left.ctypes.data, turned.ctypes.data, SIZE, c)
                    pair_alone(e_rows, (i + 1) * slab, o, o, right, 0)
                    multiply(dw[at[i + 1]:].ctypes.data, 4 * o, False, turned.ctypes.data, 4 * SIZE,
                             right.ctypes.data, 4 * o, c, o, 2 * SIZE)
                loss_rows_back(de, final, rate, row * strides[3, 0] + first * strides[3, 1]
                               + head * strides[3, 2], strides[3, 1], base, heads, steps, d,
                               wide[layers], own, down, z, final, error, grad, statistics, one, g,
                               dv, drate)
                for j in range(0, SIZE * wide[layers], WIDTH):
                    store(de, final + j, load(z, final + j))
                for down_ in range(layers):
                    i = layers - 1 - down_
                    o, c, there = wide[i + 1], wide[i], i * slab
                    halve(de[there:], SIZE, o, rows)
                    strip(dx[there:].ctypes.data, 4 * c, False, rows.ctypes.data, 2 * o,
                          w_turned[at[i] // 2:].ctypes.data, 4 * c, c, o)
                    pair_rows(rows, 0, o, o, rights, there)
                    turn(lefts[there:].ctypes.data, turned.ctypes.data, SIZE, c)
                    multiply(dw[at[i]:].ctypes.data, 4 * o, False, turned.ctypes.data, 4 * SIZE,
                             rights[there:].ctypes.data, 4 * o, c, o, 2 * SIZE)
                    _add_rows(de, there, o, np.float32(1), dbias, bias_at[i])
                    _add_rows(r, there, o, np.float32(1), dbias, bias_at[i])
                    if i > 0:
                        for j in range(there - slab, there - slab + SIZE * c, WIDTH):
                            u = load(dx, j + slab) * gelu_slope(load(z, j))
                            store(de, j, load(de, j) + u)
                for t in range(steps):
                    to = (base + t * heads) * d
                    for j in range(0, d, WIDTH):
                        there = t * wide[0] + j
                        store_half(dk, to + j, load(dx, there) + load(g, there))
                if fresh[row, n]:
                    copy_out(dw, dbias, sizes, wide, at, bias_at, dinitial[task], True)
                    dw[:] = 0
                    dbias[:] = 0
            copy_out(dw, dbias, sizes, wide, at, bias_at, dweights[task], False)
        release()


def scratch(wide):
    """(floats, halves, words) of one worker, enough for both passes; multiples of 64 bytes."""
    layers, slab = len(wide) - 1, SIZE * max(wide)
    whole = sum(wide[i] * wide[i + 1] for i in range(layers))
    every = whole + sum(wide[1:])
    largest = max(wide[i] * wide[i + 1] for i in range(layers))
    return (2 * every + GROUP * sum(wide[1:]) + (6 * layers + 4) * slab
            + (2 * layers + 3) * _SQUARE,
            (GROUP + 1) * whole + (3 * layers + 1) * slab + 2 * _SQUARE,
            whole + (2 * layers + 2) * slab + _SQUARE + max(largest // 2, slab))
