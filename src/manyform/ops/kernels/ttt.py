"""TTT-Linear on matrix tiles: one pass over time for each row and head, weights in cache.

The equations are those of `ops.ttt`. For a mini-batch with weights W (biases b), A tril(Q K^T + 1)
with row t times -scale_t, and last the scale of its end:

    Z = K W + b    E = rate dl/dZ    R = Q W + b + A E    y = Q + LN(R)    W' = W - last K^T E

and back, with dR from dy, dA = tril(dR E^T), and f dV the gradient of K^T E, which is -last dW' (or
that of the sums that a last, shorter mini-batch leaves):

    dE = A^T dR + K f dV     [dK; dQ] = [dZ; dR] W^T + [dA^T Q; dA K] + [E f dV^T; 0] + direct ones
    dW = dW' + K^T dZ + Q^T dR

with dZ by the gradient of the loss's gradient. Products are of bfloat16 and summed in float32; W
before each mini-batch is kept in bfloat16 for the way back, and all else is computed again.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import halve, multiply, pair, turn, visible
from manyform.ops.kernels.lanes import FAST, WIDTH, get, load, splat, store, total
from manyform.ops.kernels.strips import SIZE, copy_rows, pair_rows, pair_square, square, strip
from manyform.ops.kernels.tiles import SHAPE, configure, release, store_half

_EPS = np.float32(1e-6)


@numba.njit(fastmath=FAST, cache=True)
def unit(z, at, d):
    """A row of z becomes (z - mean) / std; returns 1 / std."""
    acc, many = splat(np.float32(0)), np.float32(d)
    for j in range(at, at + d, WIDTH):
        acc = acc + load(z, j)
    mean = splat(total(acc) / many)
    acc = splat(np.float32(0))
    for j in range(at, at + d, WIDTH):
        v = load(z, j) - mean
        store(z, j, v)
        acc = acc + v * v
    inverse = np.float32(1) / np.sqrt(total(acc) / many + _EPS)
    scale = splat(inverse)
    for j in range(at, at + d, WIDTH):
        store(z, j, load(z, j) * scale)
    return inverse


@numba.njit(fastmath=FAST, cache=True)
def loss_rows(v, at_v, step_v, rate, at_r, step_r, steps, d, wide, norm, k, z, start, error, grad,
              statistics, e, to):
    """Of Z (from `start` on, normalised in place): LN(Z) - target, the loss's gradient, what it is
    made of (1 / std, and what it has along Z), and the gradient times the rate; k: rows of keys."""
    many = np.float32(d)
    for t in range(steps):
        at = t * wide
        inverse = unit(z, start + at, d)
        sums, along = splat(np.float32(0)), splat(np.float32(0))
        for j in range(0, d, WIDTH):
            own, scale = load(z, start + at + j), load(norm, j)
            target = load(v, at_v + t * step_v + j) - load(k, at + j)
            off = own * scale + load(norm, d + j) - target
            g = off * scale
            store(error, at + j, off)
            store(grad, at + j, g)
            sums = sums + g
            along = along + g * own
        mean, turned = splat(total(sums) / many), total(along) / many
        statistics[t], statistics[SIZE + t] = inverse, turned
        meet, scale, step = splat(turned), splat(inverse), splat(get(rate, at_r + t * step_r))
        for j in range(0, d, WIDTH):
            g = (load(grad, at + j) - mean - load(z, start + at + j) * meet) * scale
            store(grad, at + j, g)
            store(e, to + at + j, g * step)
    for j in range(to + steps * wide, to + SIZE * wide):
        e[j] = 0


@numba.njit(fastmath=FAST, cache=True)
def loss_rows_back(de, to, rate, at_r, step_r, first, heads, steps, d, wide, norm, down, z, start,
                   error, grad, statistics, spare, dx, dv, drate):
    """The gradient of E -> of Z (in place of Z, zero after the last token), of the norm (added), of
    keys as targets (dx), of values and rates (from row `first` on)."""
    many = np.float32(d)
    for t in range(steps):
        at, own_z, own_e, out = t * wide, start + t * wide, to + t * wide, first + t * heads
        step, scale = splat(get(rate, at_r + t * step_r)), splat(statistics[t])
        along = splat(statistics[SIZE + t])
        rates, sums = splat(np.float32(0)), splat(np.float32(0))
        meets, outs = splat(np.float32(0)), splat(np.float32(0))
        for j in range(0, d, WIDTH):
            g = load(de, own_e + j)
            rates = rates + g * load(grad, at + j)
            g = g * step
            sums = sums + g
            meets = meets + g * load(z, own_z + j)
            outs = outs + g * load(grad, at + j)
        drate[out] = total(rates)
        mean, meet = splat(total(sums) / many), splat(total(meets) / many)
        sums, meets = splat(np.float32(0)), splat(np.float32(0))
        for j in range(0, d, WIDTH):
            g, own, off = load(de, own_e + j) * step, load(z, own_z + j), load(error, at + j)
            gain = load(norm, j)
            dgrad = (g - mean - own * meet) * scale
            scaled = dgrad * gain
            dunit = scaled * gain - (g * along + off * gain * meet) * scale
            sums = sums + dunit
            meets = meets + dunit * own
            store(spare, at + j, dunit)
            store(dx, at + j, scaled)
            store_half(dv, out * d + j, splat(np.float32(0)) - scaled)
            store(down, j, load(down, j) + dgrad * (off + own * gain))
            store(down, d + j, load(down, d + j) + scaled)
        mean = splat(total(sums) / many)
        meet = splat((total(meets) + total(outs)) / many)
        for j in range(0, d, WIDTH):
            g = (load(spare, at + j) - mean - load(z, own_z + j) * meet) * scale
            store(z, own_z + j, g)
    for j in range(start + steps * wide, start + SIZE * wide):
        z[j] = 0


@numba.njit(fastmath=FAST, cache=True)
def norm_rows_back(dy, first, heads, steps, d, wide, norm, down, r, start, dx, to):
    """The gradient of y -> of R (in place of R, zero after the last token), of queries (dx, as the
    skip gives it) and of the norm (added)."""
    many = np.float32(d)
    for t in range(steps):
        at, own_x, out = start + t * wide, to + t * wide, (first + t * heads) * d
        inverse = unit(r, at, d)
        sums, along = splat(np.float32(0)), splat(np.float32(0))
        for j in range(0, d, WIDTH):
            g, own = load(dy, out + j), load(r, at + j)
            store(dx, own_x + j, g)
            store(down, j, load(down, j) + g * own)
            store(down, d + j, load(down, d + j) + g)
            g = g * load(norm, j)
            sums = sums + g
            along = along + g * own
        mean, meet = splat(total(sums) / many), splat(total(along) / many)
        scale = splat(inverse)
        for j in range(0, d, WIDTH):
            g = load(dx, own_x + j) * load(norm, j) - mean - load(r, at + j) * meet
            store(r, at + j, g * scale)
    for j in range(start + steps * wide, start + SIZE * wide):
        r[j] = 0


@numba.njit(fastmath=FAST, cache=True)
def norm_rows(r, start, x, at_x, steps, d, wide, norm, y, first, heads):
    """y = x + LN(R), R normalised in place."""
    for t in range(steps):
        at, out = start + t * wide, (first + t * heads) * d
        unit(r, at, d)
        for j in range(0, d, WIDTH):
            store_half(y, out + j, load(x, at_x + t * wide + j) + load(r, at + j) * load(norm, j)
                       + load(norm, d + j))


@numba.njit(fastmath=FAST, cache=True)
def _learn(q, k, v, rate, strides, row, head, first, steps, d, wide, norm, minus, mask, w_rows,
           bias, x, w_pairs, k_turned, z, error, grad, statistics, e, e_pairs, scores, shares,
           masked):
    """What both passes compute of a mini-batch.

    x: (32, wide) rows of K and Q. z: (32, wide), the normalised Z, and R. error, grad, e: (16,
    wide), LN(Z) - target, the loss's gradient, and E. statistics: (2, 16), 1 / std of Z, and what
    the gradient has along it. scores: (16, 16), tril(Q K^T + 1); shares: the same with scales,
    masked: as rows of 32.
    """
    at_q = row * strides[0, 0] + first * strides[0, 1] + head * strides[0, 2]
    at_k = row * strides[1, 0] + first * strides[1, 1] + head * strides[1, 2]
    at_v = row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2]
    at_r = row * strides[3, 0] + first * strides[3, 1] + head * strides[3, 2]
    copy_rows(k, at_k, strides[1, 1], steps, d, wide, x, 0)
    copy_rows(q, at_q, strides[0, 1], steps, d, wide, x, SIZE * wide)
    pair(w_rows.ctypes.data, w_pairs.ctypes.data, wide, wide)
    multiply(z.ctypes.data, 4 * wide, True, x.ctypes.data, 2 * wide, w_pairs.ctypes.data, 4 * wide,
             2 * SIZE, wide, wide)
    turn(x.ctypes.data, k_turned.ctypes.data, SIZE, wide // 2)
    square(scores.ctypes.data, 4 * SIZE, x.ctypes.data + 2 * SIZE * wide, 2 * wide,
           k_turned.ctypes.data, 4 * SIZE, wide)
    one = splat(np.float32(1))
    for t in range(SIZE):
        a = visible(load(scores, t * SIZE) + one, load(mask, t * SIZE))
        store(scores, t * SIZE, a)
        a = a * splat(minus[t])
        store(shares, t * SIZE, a)
        store_half(masked, 2 * t * SIZE, a)
    for t in range(2 * SIZE):
        for j in range(0, d, WIDTH):
            store(z, t * wide + j, load(z, t * wide + j) + load(bias, j))
    loss_rows(v, at_v, strides[2, 1], rate, at_r, strides[3, 1], steps, d, wide, norm, x, z, 0,
              error, grad, statistics, e, 0)
    pair_rows(e, 0, d, wide, e_pairs, 0)
    strip(z.ctypes.data + 4 * SIZE * wide, 4 * wide, False, masked.ctypes.data, 4 * SIZE,
          e_pairs.ctypes.data, 4 * wide, wide, 2 * SIZE)


@numba.njit(fastmath=FAST, cache=True)
def _weights(source, at, d, wide, w, bias):
    """(d + 1, d), biases last -> (wide, wide) and (wide,)."""
    for i in range(d):
        for j in range(0, d, WIDTH):
            store(w, i * wide + j, load(source, at + i * d + j))
    for j in range(0, d, WIDTH):
        store(bias, j, load(source, at + d * d + j))


@numba.njit(fastmath=FAST, cache=True)
def _give(w, bias, d, wide, into, at, add):
    """The inverse of `_weights`; added to what is there, or in its place."""
    zero = splat(np.float32(0))
    for i in range(d + 1):
        for j in range(0, d, WIDTH):
            to = at + i * d + j
            value = load(w, i * wide + j) if i < d else load(bias, j)
            store(into, to, value + (load(into, to) if add else zero))


@numba.njit(fastmath=FAST, cache=True)
def _triangle(mask):
    for t in range(SIZE):
        for s in range(SIZE):
            mask[t * SIZE + s] = 1 if s <= t else 0


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(q, k, v, rate, norm, initial, minus, strides, dims, starts, fresh, weights, sums, y,
            states, biases, floats, halves, words):
    """y, the weights (in place), the sums, and what the way back needs.

    q, k, v, rate: flat, strides: (4, 3), theirs over batch, step and head; norm: (heads, 2 d);
    initial: (heads, (d + 1) d); minus: (16,), -scale; dims: (length, heads, d, mini-batch). starts:
    (batch, chunks + 1), where mini-batches begin, the length after the last; fresh: (batch,
    chunks), those of a new document. weights, sums: (batch heads, (d + 1) d); y: dense, flat.
    states: (batch heads, chunks, wide wide) and biases (.., wide): before each mini-batch.
    floats, halves, words: scratch of zeros, a row a worker.
    """
    length, heads, d, size = dims
    wide = biases.shape[2]
    workers, tasks = floats.shape[0], weights.shape[0]
    area = SIZE * wide
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[worker], halves[worker], words[worker]
        w, f = f[:wide * wide], f[wide * wide:]
        z, f = f[:2 * area], f[2 * area:]
        error, f = f[:area], f[area:]
        grad, f = f[:area], f[area:]
        e, f = f[:area], f[area:]
        bias, f = f[:wide], f[wide:]
        scores, shares, mask = f[:256], f[256:512], f[512:768]
        statistics = f[768:800]
        x, masked = h[:2 * area], h[2 * area:2 * area + 512]
        w_pairs, p = p[:wide * wide // 2], p[wide * wide // 2:]
        e_pairs, p = p[:area], p[area:]
        k_pairs, p = p[:area], p[area:]
        turned = p[:area]
        _triangle(mask)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            row, head = task // heads, task % heads
            _weights(weights[task], 0, d, wide, w, bias)
            own = norm[head]
            for n in range(fresh.shape[1]):
                first = starts[row, n]
                if first >= length:
                    break
                steps = starts[row, n + 1] - first
                if fresh[row, n]:
                    _weights(initial[head], 0, d, wide, w, bias)
                halve(w, wide, wide, states[task, n])
                for j in range(0, wide, WIDTH):
                    store(biases[task, n], j, load(bias, j))
                _learn(q, k, v, rate, strides, row, head, first, steps, d, wide, own, minus, mask,
                       states[task, n], bias, x, w_pairs, turned, z, error, grad, statistics, e,
                       e_pairs, scores, shares, masked)
                norm_rows(z, area, x, area, steps, d, wide, own, y, (row * length + first) * heads
                          + head, heads)
                last = first + steps == length
                if steps < size:
                    if not last:
                        continue
                    _give(w, bias, d, wide, weights[task], 0, False)
                    w[:] = 0
                    bias[:] = 0
                factor = splat(minus[size - 1] if steps == size else np.float32(1))
                for j in range(0, wide, WIDTH):
                    acc = splat(np.float32(0))
                    for t in range(SIZE):
                        v_ = load(e, t * wide + j)
                        acc = acc + v_
                        store(grad, t * wide + j, v_ * factor)
                    store(bias, j, load(bias, j) + acc * factor)
                pair_rows(grad, 0, wide, wide, e_pairs, 0)
                pair_rows(x, 0, wide, wide, k_pairs, 0)
                turn(k_pairs.ctypes.data, turned.ctypes.data, SIZE, wide)
                multiply(w.ctypes.data, 4 * wide, False, turned.ctypes.data, 4 * SIZE,
                         e_pairs.ctypes.data, 4 * wide, wide, wide, 2 * SIZE)
                if last:
                    _give(w, bias, d, wide, weights[task] if steps == size else sums[task], 0,
                          False)
        release()


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(q, k, v, rate, norm, initial, minus, strides, dims, starts, fresh, dweights, dsums, dy,
             states, biases, dq, dk, dv, drate, dnorm, dscale, dinitial, floats, halves, words):
    """Gradients of everything that `forward` read; see there.

    dy: dense like y. dweights: of the last weights, in place of the first; dsums: of the sums. dq,
    dk, dv, drate: dense, flat; dnorm: (batch heads, 2 d), dscale: (batch heads, 16) and dinitial
    (batch heads, (d + 1) d): zeros before.
    """
    length, heads, d, size = dims
    wide = biases.shape[2]
    workers, tasks = floats.shape[0], dweights.shape[0]
    area = SIZE * wide
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[worker], halves[worker], words[worker]
        dw, f = f[:wide * wide], f[wide * wide:]
        after, f = f[:wide * wide], f[wide * wide:]
        z, f = f[:2 * area], f[2 * area:]
        dx, f = f[:2 * area], f[2 * area:]
        error, f = f[:area], f[area:]
        grad, f = f[:area], f[area:]
        e, f = f[:area], f[area:]
        de, f = f[:area], f[area:]
        fed, f = f[:area], f[area:]
        dbias, f = f[:wide], f[wide:]
        after_bias, f = f[:wide], f[wide:]
        scores, shares, mask = f[:256], f[256:512], f[512:768]
        statistics = f[768:800]
        x, h = h[:2 * area], h[2 * area:]
        dz, h = h[:2 * area], h[2 * area:]
        e_rows, h = h[:area], h[area:]
        after_rows, h = h[:wide * wide], h[wide * wide:]
        masked, masked_turned, cross = h[:512], h[512:1024], h[1024:2048]
        w_pairs, p = p[:wide * wide // 2], p[wide * wide // 2:]
        w_turned, p = p[:wide * wide // 2], p[wide * wide // 2:]
        after_pairs, p = p[:wide * wide // 2], p[wide * wide // 2:]
        e_pairs, p = p[:area], p[area:]
        x_pairs, p = p[:area], p[area:]
        dz_pairs, p = p[:area], p[area:]
        turned, p = p[:area], p[area:]
        block = p[:256]
        _triangle(mask)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            row, head = task // heads, task % heads
            _weights(dweights[task], 0, d, wide, dw, dbias)
            own, down, steps_scale = norm[head], dnorm[task], dscale[task]
            for back in range(fresh.shape[1]):
                n = fresh.shape[1] - 1 - back
                first = starts[row, n]
                if first >= length:
                    continue
                steps = starts[row, n + 1] - first
                _learn(q, k, v, rate, strides, row, head, first, steps, d, wide, own, minus, mask,
                       states[task, n], biases[task, n], x, w_pairs, turned, z, error, grad,
                       statistics, e, e_pairs, scores, shares, masked)
                base = (row * length + first) * heads + head
                norm_rows_back(dy, base, heads, steps, d, wide, own, down, z, area, dx, area)
                for j in range(area, 2 * area, WIDTH):
                    store_half(dz, j, load(z, j))
                for j in range(area // 2):
                    dz_pairs[j] = 0
                pair_rows(z, area, wide, wide, dz_pairs, area // 2)
                # dE through what the queries read
                pair_square(shares, block, 128)
                turn(block.ctypes.data, masked_turned.ctypes.data, SIZE, SIZE)
                strip(de.ctypes.data, 4 * wide, True, masked_turned.ctypes.data, 4 * SIZE,
                      dz_pairs.ctypes.data, 4 * wide, wide, 2 * SIZE)
                halve(e, SIZE, wide, e_rows)
                turn(e_rows.ctypes.data, turned.ctypes.data, SIZE, wide // 2)
                square(shares.ctypes.data, 4 * SIZE, dz.ctypes.data + 2 * area, 2 * wide,
                       turned.ctypes.data, 4 * SIZE, wide)
                for t in range(SIZE):
                    g = load(shares, t * SIZE)
                    steps_scale[t] -= total(visible(g, load(scores, t * SIZE)))
                    g = visible(g, load(mask, t * SIZE)) * splat(minus[t])
                    store(shares, t * SIZE, g)
                    store_half(cross, (SIZE + t) * 2 * SIZE, g)
                pair_square(shares, block, 128)
                turn(block.ctypes.data, cross.ctypes.data, SIZE, SIZE)
                # and through the weights, or the sums, after it
                full, last = steps == size, first + steps == length
                if full:
                    halve(dw, wide, wide, after_rows)
                    after_bias[:] = dbias
                elif last:
                    _weights(dsums[task], 0, d, wide, after, after_bias)
                    halve(after, wide, wide, after_rows)
                if full or last:
                    factor = splat(minus[size - 1] if full else np.float32(1))
                    pair(after_rows.ctypes.data, after_pairs.ctypes.data, wide, wide)
                    strip(fed.ctypes.data, 4 * wide, True, x.ctypes.data, 2 * wide,
                          after_pairs.ctypes.data, 4 * wide, wide, wide)
                    acc = splat(np.float32(0))
                    for at in range(0, area, wide):
                        for j in range(0, d, WIDTH):
                            g = load(fed, at + j) + load(after_bias, j)
                            acc = acc + g * load(e, at + j)
                            store(de, at + j, load(de, at + j) + factor * g)
                            store_half(e_rows, at + j, load(e, at + j) * factor)
                    if full:
                        steps_scale[size - 1] -= total(acc)
                # the gradient of the loss's gradient
                at_r = row * strides[3, 0] + first * strides[3, 1] + head * strides[3, 2]
                loss_rows_back(de, 0, rate, at_r, strides[3, 1], base, heads, steps, d, wide, own,
                               down, z, 0, error, grad, statistics, fed, dx, dv, drate)
                halve(z, SIZE, wide, dz)
                pair_rows(z, 0, wide, wide, dz_pairs, 0)
                pair(x.ctypes.data, x_pairs.ctypes.data, 2 * SIZE, wide)
                turn(states[task, n].ctypes.data, w_turned.ctypes.data, wide, wide // 2)
                multiply(dx.ctypes.data, 4 * wide, False, dz.ctypes.data, 2 * wide,
                         w_turned.ctypes.data, 4 * wide, 2 * SIZE, wide, wide)
                multiply(dx.ctypes.data, 4 * wide, False, cross.ctypes.data, 4 * SIZE,
                         x_pairs.ctypes.data, 4 * wide, 2 * SIZE, wide, 2 * SIZE)
                if full or last:
                    turn(after_rows.ctypes.data, w_turned.ctypes.data, wide, wide // 2)
                    strip(dx.ctypes.data, 4 * wide, False, e_rows.ctypes.data, 2 * wide,
                          w_turned.ctypes.data, 4 * wide, wide, wide)
                for t in range(steps):
                    to = ((row * length + first + t) * heads + head) * d
                    for j in range(0, d, WIDTH):
                        store_half(dk, to + j, load(dx, t * wide + j))
                        store_half(dq, to + j, load(dx, (SIZE + t) * wide + j))
                turn(x_pairs.ctypes.data, turned.ctypes.data, SIZE, wide)
                multiply(dw.ctypes.data, 4 * wide, False, turned.ctypes.data, 4 * SIZE,
                         dz_pairs.ctypes.data, 4 * wide, wide, wide, 2 * SIZE)
                for j in range(0, d, WIDTH):
                    acc = load(dbias, j)
                    for t in range(2 * SIZE):
                        acc = acc + load(z, t * wide + j)
                    store(dbias, j, acc)
                if fresh[row, n]:
                    _give(dw, dbias, d, wide, dinitial[task], 0, True)
                    dw[:] = 0
                    dbias[:] = 0
            _give(dw, dbias, d, wide, dweights[task], 0, False)
        release()


def scratch(wide):
    """(floats, halves, words) of one worker, enough for both passes; multiples of 64 bytes."""
    area, whole = SIZE * wide, wide * wide
    return (2 * whole + 9 * area + 2 * wide + 896, whole + 5 * area + 2048,
            2 * whole + 4 * area + 256)
