"""The passes over memory between the products of the chunked matrix recurrence, each done once.

Flat arrays as `lanes.flat` gives them. Rows are (B, N, G, C, R, D): chunk n of N, step c of C,
head g * R + r, feature d. Natural layout is (B, T, H, D) with the strides given.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, exp2, get, load, put, splat, store, total

_LOG2E = np.float32(1.4426950408889634)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def gather(x, strides, factor, kind, shared, scale, out, shape):
    """out = scale * factor * x. factor: (B or 1, N, C, H, D or 1); shared: 1 if one for all."""
    sb, st, sh = strides
    batch, chunks, groups, size, heads, width = shape
    every = groups * heads
    for index in numba.prange(batch * chunks):
        at = np.int64(index)
        b, n = at // chunks, at % chunks
        row = (n if shared else at) * size * every
        for g in range(groups):
            for c in range(size):
                to = (((at * groups + g) * size) + c) * heads * width
                for r in range(heads):
                    h = g * heads + r
                    source = b * sb + (n * size + c) * st + h * sh
                    target = to + r * width
                    f = row + c * every + h
                    whole = width - width % WIDTH
                    for d in range(0, whole, WIDTH):
                        value = load(x, source + d) * splat(scale)
                        if kind == 1:
                            value = value * splat(factor[f])
                        elif kind == 2:
                            value = value * load(factor, f * width + d)
                        store(out, target + d, value)
                    for d in range(whole, width):
                        value = get(x, source + d) * scale
                        if kind == 1:
                            value = value * factor[f]
                        elif kind == 2:
                            value = value * factor[f * width + d]
                        put(out, target + d, value)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def scatter(rows, factor, kind, shared, own, mine, x, strides, out, shape):
    """out (B, T, H, D) = factor * rows + own * x, where own is (B, N, G, C) and `mine` is 1."""
    sb, st, sh = strides
    batch, chunks, groups, size, heads, width = shape
    every = groups * heads
    whole = width - width % WIDTH
    for index in numba.prange(batch * chunks):
        at = np.int64(index)
        b, n = at // chunks, at % chunks
        row = (n if shared else at) * size * every
        for c in range(size):
            for h in range(every):
                g, r = h // heads, h % heads
                step = (at * groups + g) * size + c
                source = (step * heads + r) * width
                target = ((at * size + c) * every + h) * width
                f = row + c * every + h
                other = b * sb + (n * size + c) * st + h * sh
                for d in range(0, whole, WIDTH):
                    value = load(rows, source + d)
                    if kind == 1:
                        value = value * splat(factor[f])
                    elif kind == 2:
                        value = value * load(factor, f * width + d)
                    if mine:
                        value = value + splat(own[step]) * load(x, other + d)
                    store(out, target + d, value)
                for d in range(whole, width):
                    value = get(rows, source + d)
                    if kind == 1:
                        value = value * factor[f]
                    elif kind == 2:
                        value = value * factor[f * width + d]
                    if mine:
                        value = value + own[step] * get(x, other + d)
                    put(out, target + d, value)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def carry(start, add, keep, enter, leave, by_key, shared, decays, entering, last,
          shape):
    """S_{n+1} = keep_n S_n + leave_n add_n; entering_n = enter_n S_n; last = S_N.

    start, last: (B, G, K, R, D); add, entering: (B, N, G, K, R, D); the factors, where `decays` is
    1: (B or 1, N, G, K or 1, R).
    """
    batch, chunks, groups, keys, heads, width = shape
    row = heads * width
    whole = width - width % WIDTH
    factors = keys if by_key else 1
    for index in numba.prange(batch * groups * keys):
        at = np.int64(index)
        b, g, k = at // (groups * keys), at // keys % groups, at % keys
        for j in range(row):
            last[at * row + j] = start[at * row + j]
        for n in range(chunks):
            here = (((b * chunks + n) * groups + g) * keys + k) * row
            f = ((((0 if shared else b) * chunks + n) * groups + g) * factors
                 + (k if by_key else 0)) * heads
            for r in range(heads):
                kept = keep[f + r] if decays else np.float32(1)
                into = enter[f + r] if decays else np.float32(1)
                out = leave[f + r] if decays else np.float32(1)
                for d in range(r * width, r * width + whole, WIDTH):
                    s = load(last, at * row + d)
                    store(entering, here + d, s * splat(into))
                    store(last, at * row + d, s * splat(kept) + load(add, here + d) * splat(out))
                for d in range(r * width + whole, (r + 1) * width):
                    s = last[at * row + d]
                    put(entering, here + d, s * into)
                    last[at * row + d] = s * kept + get(add, here + d) * out


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def carry_back(end, add, keep, enter, leave, by_key, shared, decays, entering, last, leaving,
               first, db, shape):
    """The same backward: dS_n = keep_n dS_{n+1} + enter_n add_n; leaving_n = leave_n dS_{n+1};
    first = dS_0; db_n = sum of S_{n+1} dS_{n+1}, (B, N, G, K, R)."""
    batch, chunks, groups, keys, heads, width = shape
    row = heads * width
    whole = width - width % WIDTH
    factors = keys if by_key else 1
    for index in numba.prange(batch * groups * keys):
        at = np.int64(index)
        b, g, k = at // (groups * keys), at // keys % groups, at % keys
        for j in range(row):
            first[at * row + j] = end[at * row + j]
        for n in range(chunks - 1, -1, -1):
            place = ((b * chunks + n) * groups + g) * keys + k
            here, after = place * row, (place + groups * keys) * row
            f = ((((0 if shared else b) * chunks + n) * groups + g) * factors
                 + (k if by_key else 0)) * heads
            for r in range(heads):
                kept = keep[f + r] if decays else np.float32(1)
                into = enter[f + r] if decays else np.float32(1)
                out = leave[f + r] if decays else np.float32(1)
                sums = splat(np.float32(0))
                for d in range(r * width, r * width + whole, WIDTH):
                    s = load(first, at * row + d)
                    if decays:
                        sums = sums + s * (load(last, at * row + d) if n == chunks - 1
                                           else load(entering, after + d))
                    store(leaving, here + d, s * splat(out))
                    store(first, at * row + d, s * splat(kept) + load(add, here + d) * splat(into))
                tail = np.float32(0)
                for d in range(r * width + whole, (r + 1) * width):
                    s = first[at * row + d]
                    if decays:
                        tail += s * (last[at * row + d] if n == chunks - 1
                                     else get(entering, after + d))
                    put(leaving, here + d, s * out)
                    first[at * row + d] = s * kept + get(add, here + d) * into
                if decays:  # what enters the next chunk was scaled on its way
                    following = f + groups * factors * heads + r
                    scaled = np.float32(1) if n == chunks - 1 else enter[following]
                    db[place * heads + r] = (total(sums) + tail) / scaled


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def dots(a, b, c, d, out, count, width):
    """out_i = a_i . b_i - c_i . d_i over rows of `width`."""
    whole = width - width % WIDTH
    for index in numba.prange(count):
        i = np.int64(index)
        at = i * width
        sums = splat(np.float32(0))
        for j in range(at, at + whole, WIDTH):
            sums = sums + load(a, j) * load(b, j) - load(c, j) * load(d, j)
        tail = np.float32(0)
        for j in range(at + whole, at + width):
            tail += get(a, j) * get(b, j) - get(c, j) * get(d, j)
        out[i] = total(sums) + tail


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def factors(g, strides, left, right, ends, shape):
    """For g (B, T, H, K): e^{c - b/2}, e^{b/2 - c} (B, N, C, H, K) and b (B, N, H, K)."""
    sb, st, sh = strides
    batch, chunks, heads, size, width = shape
    log2e = splat(_LOG2E)
    half, zero = splat(np.float32(0.5)), splat(np.float32(0))
    for index in numba.prange(batch * chunks):
        at = np.int64(index)
        b, n = at // chunks, at % chunks
        for h in range(heads):
            for d in range(0, width, WIDTH):
                base = b * sb + n * size * st + h * sh + d
                end = splat(np.float32(0))
                for c in range(size):
                    end = end + load(g, base + c * st)
                store(ends, (at * heads + h) * width + d, end)
                run = zero - end * half
                for c in range(size):
                    run = run + load(g, base + c * st)
                    to = ((at * size + c) * heads + h) * width + d
                    store(left, to, exp2(run * log2e))
                    store(right, to, exp2((zero - run) * log2e))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def decay_gradient(q, dq, k, dk, db, out, shape):
    """out_t (B, T, H, K) = db + sum over i >= t in the chunk of q_i dq_i - k_i dk_i (rows)."""
    batch, chunks, heads, size, width = shape
    for index in numba.prange(batch * chunks):
        at = np.int64(index)
        for h in range(heads):
            for d in range(0, width, WIDTH):
                run = load(db, (at * heads + h) * width + d)
                for c in range(size - 1, -1, -1):
                    i = ((at * heads + h) * size + c) * width + d
                    run = run + load(q, i) * load(dq, i) - load(k, i) * load(dk, i)
                    store(out, ((at * size + c) * heads + h) * width + d, run)


@numba.njit(fastmath=FAST, cache=True)
def step(q, k, v, decay, kind, state, scale, y, after, shape):
    """One step: after = e^decay * state + k v^T, y = scale * after^T q. On one thread.

    q, k: (B, G, K), v, y: (B, H, V), state, after: (B, H, K, V), all dense; decay: none (kind 0), a
    head (1: (H,), 2: (B, H)) or a channel (3: (B, H, K)).
    """
    batch, groups, heads, width, value = shape
    for b in range(batch):
        for h in range(heads):
            row = b * heads + h
            at = (b * groups + h // (heads // groups)) * width
            keep = np.float32(1)
            if kind == 1:
                keep = np.exp(decay[h])
            elif kind == 2:
                keep = np.exp(decay[row])
            for d in range(0, value, WIDTH):
                new = load(v, row * value + d)
                sums = splat(np.float32(0))
                for i in range(width):
                    if kind == 3:
                        keep = np.exp(decay[row * width + i])
                    place = (row * width + i) * value + d
                    s = splat(keep) * load(state, place) + splat(get(k, at + i)) * new
                    store(after, place, s)
                    sums = sums + s * splat(get(q, at + i))
                store(y, row * value + d, sums * splat(scale))
