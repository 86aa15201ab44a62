"""What surrounds the recurrence of RWKV-7, each part in one pass over memory each way.

Arrays are flat rows of d features in heads of `size`; `partial` is (blocks, n d), a row for the
sums of each block of rows, n parameters side by side.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, sigmoid, splat, store, total

DECAY_SCALE = np.float32(-np.exp(-0.5))


@numba.njit(fastmath=FAST, inline="always")
def _inverse_length(k, k_k, base, at, size):
    square = splat(np.float32(0))
    for j in range(0, size, WIDTH):
        v = load(k, base + at + j) * load(k_k, at + j)
        square = square + v * v
    return np.float32(1) / max(np.sqrt(total(square)), np.float32(1e-12))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def keys(k, decay, rate, w0, a0, k_k, k_a, size, log_decay, a, b, key):
    d = w0.size
    one = splat(np.float32(1))
    for row in numba.prange(k.size // d):
        base = row * d
        for at in range(0, d, size):
            inverse = splat(_inverse_length(k, k_k, base, at, size))
            for j in range(at, at + size, WIDTH):
                v = load(k, base + j)
                share = sigmoid(load(a0, j) + load(rate, base + j))
                kappa = v * load(k_k, j) * inverse
                slow = sigmoid(load(w0, j) + load(decay, base + j))
                store(log_decay, base + j, slow * splat(DECAY_SCALE))
                store(a, base + j, splat(np.float32(0)) - kappa)
                store(b, base + j, kappa * share)
                store(key, base + j, v * (one + (share - one) * load(k_a, j)))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def keys_back(k, decay, rate, w0, a0, k_k, k_a, size, dlog_decay, da, db, dkey,
              dk, ddecay, drate, partial):
    """partial: sums for w0, a0, k_k, k_a."""
    d, blocks = w0.size, partial.shape[0]
    rows = k.size // d
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    for block in numba.prange(blocks):
        mine = partial[block]
        for j in range(mine.size):
            mine[j] = 0
        shares, kappas = np.empty(size, np.float32), np.empty(size, np.float32)
        grads = np.empty(size, np.float32)
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            base = row * d
            for at in range(0, d, size):
                inverse = splat(_inverse_length(k, k_k, base, at, size))
                dot = zero
                for j in range(0, size, WIDTH):
                    i = base + at + j
                    share = sigmoid(load(a0, at + j) + load(rate, i))
                    kappa = load(k, i) * load(k_k, at + j) * inverse
                    grad = load(db, i) * share - load(da, i)
                    dot = dot + grad * kappa
                    store(shares, j, share)
                    store(kappas, j, kappa)
                    store(grads, j, grad)
                along = splat(total(dot))
                for j in range(0, size, WIDTH):
                    i, c = base + at + j, at + j
                    share, kappa, v, g = load(shares, j), load(kappas, j), load(k, i), load(dkey, i)
                    grad = (load(grads, j) - kappa * along) * inverse
                    more = share - one
                    store(dk, i, grad * load(k_k, c) + g * (one + more * load(k_a, c)))
                    by_rate = load(db, i) * kappa + g * v * load(k_a, c)
                    by_rate = by_rate * share * (one - share)
                    store(drate, i, by_rate)
                    slow = sigmoid(load(w0, c) + load(decay, i))
                    by_decay = load(dlog_decay, i) * splat(DECAY_SCALE) * slow * (one - slow)
                    store(ddecay, i, by_decay)
                    store(mine, c, load(mine, c) + by_decay)
                    store(mine, d + c, load(mine, d + c) + by_rate)
                    store(mine, 2 * d + c, load(mine, 2 * d + c) + grad * v)
                    store(mine, 3 * d + c, load(mine, 3 * d + c) + g * v * more)


@numba.njit(fastmath=FAST, inline="always")
def _moments(y, i, size, eps):
    """Mean and one over the standard deviation of a head."""
    sums, squares = splat(np.float32(0)), splat(np.float32(0))
    for j in range(i, i + size, WIDTH):
        sums = sums + load(y, j)
    mean = total(sums) / np.float32(size)
    for j in range(i, i + size, WIDTH):
        v = load(y, j) - splat(mean)
        squares = squares + v * v
    return mean, np.float32(1) / np.sqrt(total(squares) / np.float32(size) + np.float32(eps))


@numba.njit(fastmath=FAST, inline="always")
def _bonus(r, k, r_k, i, at, size):
    sums = splat(np.float32(0))
    for j in range(0, size, WIDTH):
        sums = sums + load(r, i + j) * load(k, i + j) * load(r_k, at + j)
    return total(sums)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def output(y, r, k, v, gate, weight, bias, r_k, size, eps, out):
    d = weight.size
    for row in numba.prange(y.size // d):
        for at in range(0, d, size):
            i = row * d + at
            mean, inverse = _moments(y, i, size, eps)
            bonus = _bonus(r, k, r_k, i, at, size)
            for j in range(0, size, WIDTH):
                z = (load(y, i + j) - splat(mean)) * splat(inverse) * load(weight, at + j)
                z = z + load(bias, at + j) + splat(bonus) * load(v, i + j)
                store(out, i + j, z * load(gate, i + j))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def output_back(y, r, k, v, gate, weight, bias, r_k, size, eps, dout,
                dy, dr, dk, dv, dgate, partial):
    """partial: sums for weight, bias, r_k."""
    d, blocks = weight.size, partial.shape[0]
    rows = y.size // d
    share = splat(np.float32(1) / np.float32(size))
    for block in numba.prange(blocks):
        mine = partial[block]
        for j in range(mine.size):
            mine[j] = 0
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            for at in range(0, d, size):
                i = row * d + at
                mean, inverse = _moments(y, i, size, eps)
                bonus = splat(_bonus(r, k, r_k, i, at, size))
                middle, scale = splat(mean), splat(inverse)
                sums, dots = splat(np.float32(0)), splat(np.float32(0))
                by_bonus = splat(np.float32(0))
                for j in range(0, size, WIDTH):
                    c = at + j
                    unit = (load(y, i + j) - middle) * scale
                    g, value = load(dout, i + j), load(v, i + j)
                    z = unit * load(weight, c) + load(bias, c) + bonus * value
                    store(dgate, i + j, g * z)
                    g = g * load(gate, i + j)
                    store(dv, i + j, g * bonus)
                    by_bonus = by_bonus + g * value
                    store(mine, c, load(mine, c) + g * unit)
                    store(mine, d + c, load(mine, d + c) + g)
                    g = g * load(weight, c)
                    sums = sums + g
                    dots = dots + g * unit
                flat_part, along = splat(total(sums)) * share, splat(total(dots)) * share
                lift = splat(total(by_bonus))
                for j in range(0, size, WIDTH):
                    c = at + j
                    unit = (load(y, i + j) - middle) * scale
                    g = load(dout, i + j) * load(gate, i + j) * load(weight, c)
                    store(dy, i + j, (g - flat_part - unit * along) * scale)
                    read, key, factor = load(r, i + j), load(k, i + j), load(r_k, c)
                    store(dr, i + j, lift * key * factor)
                    store(dk, i + j, lift * read * factor)
                    store(mine, 2 * d + c, load(mine, 2 * d + c) + lift * read * key)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def mix(v, first, rate, v0, out):
    d = v0.size
    for row in numba.prange(v.size // d):
        for j in range(0, d, WIDTH):
            i = row * d + j
            x = load(v, i)
            store(out, i, x + (load(first, i) - x) * sigmoid(load(v0, j) + load(rate, i)))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def mix_back(v, first, rate, v0, g, dv, dfirst, drate, partial):
    """partial: sums for v0."""
    d, blocks = v0.size, partial.shape[0]
    rows = v.size // d
    one = splat(np.float32(1))
    for block in numba.prange(blocks):
        mine = partial[block]
        for j in range(d):
            mine[j] = 0
        for row in range(rows * block // blocks, rows * (block + 1) // blocks):
            for j in range(0, d, WIDTH):
                i = row * d + j
                share, grad = sigmoid(load(v0, j) + load(rate, i)), load(g, i)
                store(dfirst, i, grad * share)
                store(dv, i, grad * (one - share))
                by_rate = grad * (load(first, i) - load(v, i)) * share * (one - share)
                store(drate, i, by_rate)
                store(mine, j, load(mine, j) + by_rate)
