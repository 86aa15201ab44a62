"""The chunked delta rule on matrix tiles: one pass over time for each row and head, in cache.

The equations are those of `chunked_delta`: with X = [a; q] and Y = [b; k] (k alone where it is b),
P = X Y^T masked, T = (I - L)^-1, right-hand side R and UV = [U; V] (U alone, standing for U + V),

    R = A^ S + M V (or V)    U = T R    y = Q^ S + P_q UV    S' = keep S + Y~^T UV

and back, with zy = [z; dy],

    dU = B~ dS' + A_b^T dy       z = T^T dU         dV = K~ dS' + [M; A_k]^T zy (or z)
    dP = zy UV^T                 dX = zy S^T (read) + dP Y    dY = UV dS'^T (write) + dP^T X
    dS = keep dS' + X^^T zy

Products are of bfloat16 and summed in float32, in which states, decays and the inverse are kept.
Decays a head and step may be of any strength (pairs of steps get exp(c_i - c_j)). Decays of a
channel are split over X and Y, measured from half of the chunk's total, r = c_C / 2: rows of X
carry e^(c - r), those of Y e^(r - c), and as the state enters with e^r and leaves with e^r, both
meet it as they meet each other. They must be weak enough for that, see `tiled_decay.LIMIT`.
"""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.delta_forms import fade, halve, halve_pairs, multiply, pair, turn, visible
from manyform.ops.kernels.lanes import FAST, WIDTH, get, load, put, splat, store, total
from manyform.ops.kernels.tiles import SHAPE, configure, exp2, release, store_half

SIZE = 64
"""Steps in a chunk."""
HALF = SIZE // 2
_LOG2E = np.float32(1.4426950408889634)
_FORGET = np.float32(-200)
"""A log decay whose factor is exactly 0 in float32."""
_EDGE = SIZE + WIDTH  # a row of the transposed mask: a zero, SIZE factors, space


@numba.njit(fastmath=FAST, cache=True)
def _prepare(q, a, k, b, g, reset, strides, row, head, first, steps, key, scale, channel, two,
             x, x_read, y, y_write, keep, totals, sums, write):
    """Rows of X and Y of a chunk, as they meet each other and, for decays of a head, as they meet
    the state.

    totals: exp of the sum of log decays before each step and, one further, up to it, for decays of
    a channel less half of the whole: (65,) or (65, key); keep: (key,), exp of the whole, or of its
    half; sums: (64,), base-2 logarithms, and write (64,), for decays of a head.
    """
    rows = 2 * SIZE if two else SIZE
    at_q = row * strides[0, 0] + first * strides[0, 1] + head * strides[0, 2]
    at_a = row * strides[1, 0] + first * strides[1, 1] + head * strides[1, 2]
    at_k = row * strides[2, 0] + first * strides[2, 1] + head * strides[2, 2]
    at_b = row * strides[3, 0] + first * strides[3, 1] + head * strides[3, 2]
    at_g = row * strides[5, 0] + first * strides[5, 1] + head * strides[5, 2]
    zero, scales = splat(np.float32(0)), splat(np.float32(scale))
    low = (rows - SIZE) * key
    if steps < SIZE:
        x[:] = 0
        x_read[:] = 0
        y[:] = 0
        y_write[:] = 0
    if channel:
        for j in range(0, key, WIDTH):
            whole = zero
            for t in range(steps):
                whole = whole + load(g, at_g + t * strides[5, 1] + j)
            c = whole * splat(np.float32(-0.5) * _LOG2E)
            before = exp2(c)
            store(totals, j, before)
            store(keep, j, exp2(zero - c))
            for t in range(steps):
                c = c + load(g, at_g + t * strides[5, 1] + j) * splat(_LOG2E)
                now = exp2(c)
                back = exp2(zero - c)
                at = t * key + j
                store(totals, at + key, now)
                store_half(x, at, load(a, at_a + t * strides[1, 1] + j) * before)
                store_half(x, at + SIZE * key,
                           load(q, at_q + t * strides[0, 1] + j) * now * scales)
                store_half(y, low + at, load(k, at_k + t * strides[2, 1] + j) * back)
                if two:
                    store_half(y, at, load(b, at_b + t * strides[3, 1] + j) * back)
                before = now
        return
    whole = np.float32(0)
    totals[0] = 1
    for t in range(SIZE):
        if t < steps:
            decay = get(g, at_g + t * strides[5, 1])
            if decay < _FORGET or (reset.size > 0 and reset[row, first + t]):
                decay = _FORGET
            whole += decay * _LOG2E
        sums[t] = whole
    for t in range(0, SIZE, WIDTH):
        sofar = load(sums, t)
        store(totals, t + 1, exp2(sofar))
        store(write, t, exp2(splat(whole) - sofar))
    kept = splat(totals[SIZE])
    for j in range(0, key, WIDTH):
        store(keep, j, kept)
    for t in range(steps):
        shown = splat(np.float32(0 if reset.size > 0 and reset[row, first + t] else 1))
        read_a, read_q, written = splat(totals[t]), splat(totals[t + 1]), splat(write[t])
        for j in range(0, key, WIDTH):
            at = t * key + j
            v = load(a, at_a + t * strides[1, 1] + j) * shown
            store_half(x, at, v)
            store_half(x_read, at, v * read_a)
            v = load(q, at_q + t * strides[0, 1] + j) * scales
            store_half(x, at + SIZE * key, v)
            store_half(x_read, at + SIZE * key, v * read_q)
            v = load(k, at_k + t * strides[2, 1] + j)
            store_half(y, low + at, v)
            store_half(y_write, low + at, v * written)
            if two:
                v = load(b, at_b + t * strides[3, 1] + j)
                store_half(y, at, v)
                store_half(y_write, at, v * written)


@numba.njit(fastmath=FAST, cache=True)
def _values(v, strides, row, head, first, steps, width, into, at):
    """Rows of v, zero after the end."""
    base = row * strides[0] + first * strides[1] + head * strides[2]
    for t in range(steps):
        for j in range(width):
            into[at + t * width + j] = v[base + t * strides[1] + j]
    for t in range(steps * width, SIZE * width):
        into[at + t] = 0


@numba.njit(fastmath=FAST, cache=True)
def _pairs_of_steps(sums, channel, factors):
    """factors: (64, 64), row i, column j: exp(c_i - c_j), what step i sees of step j <= i."""
    for i in range(SIZE):
        here = splat(np.float32(0) if channel else sums[i])
        for j in range(0, SIZE, WIDTH):
            if j > i:
                v = splat(np.float32(0))
            elif channel:
                v = splat(np.float32(1))
            else:
                v = exp2(here - load(sums, j))
            store(factors, i * SIZE + j, v)
        for j in range(i + 1, i // WIDTH * WIDTH + WIDTH):
            factors[i * SIZE + j] = 0


@numba.njit(fastmath=FAST, cache=True)
def _steps_of_pairs(sums, channel, factors):
    """The transpose: row j, column 1 + i; column 0 is zero, so that column i is what a_i sees."""
    for j in range(SIZE):
        base = j * _EDGE
        here = splat(np.float32(0) if channel else sums[j])
        for i in range(0, SIZE, WIDTH):
            if i + WIDTH <= j:
                v = splat(np.float32(0))
            elif channel:
                v = splat(np.float32(1))
            else:
                v = exp2(load(sums, i) - here)
            store(factors, base + 1 + i, v)
        for i in range(j // WIDTH * WIDTH, j):
            factors[base + 1 + i] = 0
        factors[base] = 0


@numba.njit(fastmath=FAST, cache=True)
def _invert(products, width, halves, inverse, words, small, left):
    """inverse: (64, 64) float32 = (I - L)^-1, L the first columns of `products` (64.., width),
    which `halves` holds in bfloat16.

    Both diagonal blocks of 32 row by row: T_i = e_i + sum_{j<i} L_ij T_j; the block below by
    T_22 L_21 T_11.
    """
    inverse[:] = 0
    for i in range(HALF):
        a0, a1 = splat(np.float32(0)), splat(np.float32(0))
        b0, b1 = splat(np.float32(0)), splat(np.float32(0))
        at_a, at_b = i * width, (i + HALF) * width + HALF
        for j in range(i):
            f, h = splat(products[at_a + j]), splat(products[at_b + j])
            up, down = j * SIZE, (j + HALF) * SIZE + HALF
            a0 = a0 + f * load(inverse, up)
            b0 = b0 + h * load(inverse, down)
            if i > WIDTH:
                a1 = a1 + f * load(inverse, up + WIDTH)
                b1 = b1 + h * load(inverse, down + WIDTH)
        up, down = i * SIZE, (i + HALF) * SIZE + HALF
        store(inverse, up, a0)
        store(inverse, up + WIDTH, a1)
        store(inverse, down, b0)
        store(inverse, down + WIDTH, b1)
        inverse[up + i] = 1
        inverse[down + i] = 1
    for i in range(HALF):
        for j in range(0, HALF, WIDTH):
            store(small, i * HALF + j, load(inverse, i * SIZE + j))
            store_half(left, i * HALF + j, load(inverse, (i + HALF) * SIZE + HALF + j))
    halve_pairs(small, HALF, HALF, words)
    multiply(small.ctypes.data, 4 * HALF, True, halves.ctypes.data + 2 * HALF * width, 2 * width,
             words.ctypes.data, 4 * HALF, HALF, HALF, HALF)
    halve_pairs(small, HALF, HALF, words)
    multiply(inverse.ctypes.data + 4 * HALF * SIZE, 4 * SIZE, True, left.ctypes.data, 2 * HALF,
             words.ctypes.data, 4 * HALF, HALF, HALF, HALF)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(q, a, k, b, v, g, reset, strides, dims, scale, channel, two, state, y, states, inverses,
            us, floats, halves, words):
    """y, the state (in place) and what the way back needs.

    q, a, k, b, v, g: flat, strides: (6, 3), theirs over batch, step and head; reset: (batch,
    length) bool or empty; dims: (batch, length, heads, key, value). state: (batch heads, key
    value) float32. y: (batch, length, heads, value), dense and flat. states (.., chunks, key
    value), inverses (.., chunks, 64 64) transposed, us (.., chunks, 64 value): bfloat16.
    floats, halves, words: scratch, a row a worker.
    """
    batch, length, heads, key, value = dims
    chunks, rows = states.shape[1], 2 * SIZE if two else SIZE
    workers, tasks = floats.shape[0], batch * heads
    square = SIZE * SIZE
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[w], halves[w], words[w]
        products, f = f[:2 * SIZE * rows], f[2 * SIZE * rows:]
        factors, f = f[:square], f[square:]
        inverse, f = f[:square], f[square:]
        right, f = f[:SIZE * value], f[SIZE * value:]
        u, f = f[:SIZE * value], f[SIZE * value:]
        small, f = f[:HALF * HALF], f[HALF * HALF:]
        totals, f = f[:(SIZE + 1) * key + WIDTH], f[(SIZE + 1) * key + WIDTH:]
        keep, f = f[:key], f[key:]
        sums, write = f[:SIZE], f[SIZE:2 * SIZE]
        x, h = h[:2 * SIZE * key], h[2 * SIZE * key:]
        x_own, h = h[:2 * SIZE * key], h[2 * SIZE * key:]
        y_, h = h[:rows * key], h[rows * key:]
        y_own, h = h[:rows * key], h[rows * key:]
        x_read, y_write = (x, y_) if channel else (x_own, y_own)
        masked, h = h[:2 * SIZE * rows], h[2 * SIZE * rows:]
        solve, h = h[:square], h[square:]
        uv, h = h[:rows * value], h[rows * value:]
        left = h[:HALF * HALF]
        y_turned, p = p[:rows * key // 2], p[rows * key // 2:]
        write_turned, p = p[:rows * key // 2], p[rows * key // 2:]
        s_pairs, p = p[:key * value // 2], p[key * value // 2:]
        right_pairs, p = p[:HALF * value], p[HALF * value:]
        uv_pairs, p = p[:rows // 2 * value], p[rows // 2 * value:]
        inverse_pairs = p[:HALF * SIZE]
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            row, head = task // heads, task % heads
            s = state[task]
            for n in range(chunks):
                first = n * SIZE
                steps = min(SIZE, length - first)
                _prepare(q, a, k, b, g, reset, strides, row, head, first, steps, key, scale,
                         channel, two, x, x_read, y_, y_write, keep, totals, sums, write)
                _values(v, strides[4], row, head, first, steps, value, uv, (rows - SIZE) * value)
                if not channel or n == 0:
                    _pairs_of_steps(sums, channel, factors)
                turn(y_.ctypes.data, y_turned.ctypes.data, rows, key // 2)
                multiply(products.ctypes.data, 4 * rows, True, x.ctypes.data, 2 * key,
                         y_turned.ctypes.data, 4 * rows, 2 * SIZE, rows, key)
                for r in range(2 * SIZE):
                    mask = (r - SIZE if r >= SIZE else max(r - 1, 0)) * SIZE
                    shown = splat(np.float32(0 if r == 0 else 1))
                    for c in range(0, rows, SIZE):
                        for j in range(0, SIZE, WIDTH):
                            at = r * rows + c + j
                            z = visible(load(products, at), load(factors, mask + j) * shown)
                            store(products, at, z)
                            store_half(masked, at, z)
                _invert(products, rows, masked, inverse, right_pairs, small, left)
                halve(inverse, SIZE, SIZE, solve)
                halve_pairs(inverse, SIZE, SIZE, inverse_pairs)
                turn(inverse_pairs.ctypes.data, inverses[task, n].ctypes.data, HALF, SIZE)
                if channel:
                    fade(s, keep, key, value)
                halve(s, key, value, states[task, n])
                halve_pairs(s, key, value, s_pairs)
                if two:
                    pair(uv.ctypes.data + 2 * SIZE * value,
                         uv_pairs.ctypes.data + 2 * SIZE * value, SIZE, value)
                    multiply(right.ctypes.data, 4 * value, True, masked.ctypes.data + 2 * SIZE,
                             2 * rows, uv_pairs.ctypes.data + 2 * SIZE * value, 4 * value, SIZE,
                             value, SIZE)
                else:
                    for j in range(0, SIZE * value, WIDTH):
                        store(right, j, load(uv, j))
                multiply(right.ctypes.data, 4 * value, False, x_read.ctypes.data, 2 * key,
                         s_pairs.ctypes.data, 4 * value, SIZE, value, key)
                halve_pairs(right, SIZE, value, right_pairs)
                multiply(u.ctypes.data, 4 * value, True, solve.ctypes.data, 2 * SIZE,
                         right_pairs.ctypes.data, 4 * value, SIZE, value, SIZE)
                halve(u, SIZE, value, us[task, n])
                halve_pairs(u, SIZE, value, uv_pairs)
                multiply(right.ctypes.data, 4 * value, True, x_read.ctypes.data + 2 * SIZE * key,
                         2 * key, s_pairs.ctypes.data, 4 * value, SIZE, value, key)
                multiply(right.ctypes.data, 4 * value, False,
                         masked.ctypes.data + 2 * SIZE * rows, 2 * rows, uv_pairs.ctypes.data,
                         4 * value, SIZE, value, rows)
                for t in range(steps):
                    at = ((row * length + first + t) * heads + head) * value
                    for j in range(0, value, WIDTH):
                        store_half(y, at + j, load(right, t * value + j))
                if not channel:
                    fade(s, keep, key, value)
                pair(y_write.ctypes.data, y_turned.ctypes.data, rows, key)
                turn(y_turned.ctypes.data, write_turned.ctypes.data, rows // 2, key)
                multiply(s.ctypes.data, 4 * value, False, write_turned.ctypes.data, 2 * rows,
                         uv_pairs.ctypes.data, 4 * value, key, value, rows)
                if channel:
                    fade(s, keep, key, value)
        release()


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(q, a, k, b, v, g, reset, strides, dims, scale, channel, two, dstate, dy, states,
             inverses, us, dq, da, dk, db, dv, dg, floats, halves, words):
    """Gradients of everything that `forward` read; see there.

    dy: flat and strided like v's, strides[6]. dstate: (batch heads, key value) float32, of the last
    state, in place of the first. dq, da, dk, db, dv: dense bfloat16, flat; dg: dense float32.
    """
    batch, length, heads, key, value = dims
    chunks, rows = states.shape[1], 2 * SIZE if two else SIZE
    workers, tasks = floats.shape[0], batch * heads
    wide = 2 * SIZE
    for w in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        f, h, p = floats[w], halves[w], words[w]
        products, f = f[:rows * wide], f[rows * wide:]
        dproducts, f = f[:rows * wide], f[rows * wide:]
        factors, f = f[:SIZE * _EDGE], f[SIZE * _EDGE:]
        du, f = f[:SIZE * value], f[SIZE * value:]
        z, f = f[:SIZE * value], f[SIZE * value:]
        dx, f = f[:wide * key], f[wide * key:]
        dw, f = f[:rows * key], f[rows * key:]
        totals, f = f[:(SIZE + 1) * key + WIDTH], f[(SIZE + 1) * key + WIDTH:]
        keep, f = f[:key], f[key:]
        ends, f = f[:key], f[key:]
        by_x, f = f[:wide], f[wide:]
        by_y, f = f[:SIZE], f[SIZE:]
        sums, write = f[:SIZE], f[SIZE:2 * SIZE]
        x, h = h[:wide * key], h[wide * key:]
        x_own, h = h[:wide * key], h[wide * key:]
        y_, h = h[:rows * key], h[rows * key:]
        y_own, h = h[:rows * key], h[rows * key:]
        x_read, y_write = (x, y_) if channel else (x_own, y_own)
        masked, h = h[:rows * wide], h[rows * wide:]
        uv, h = h[:rows * value], h[rows * value:]
        zy, h = h[:wide * value], h[wide * value:]
        ds_rows = h[:key * value]
        x_pairs, p = p[:SIZE * key], p[SIZE * key:]
        x_turned, p = p[:SIZE * key], p[SIZE * key:]
        y_pairs, p = p[:rows // 2 * key], p[rows // 2 * key:]
        ds_pairs, p = p[:key * value // 2], p[key * value // 2:]
        s_turned, p = p[:key * value // 2], p[key * value // 2:]
        du_pairs, p = p[:HALF * value], p[HALF * value:]
        zy_pairs, p = p[:SIZE * value], p[SIZE * value:]
        zy_turned, p = p[:SIZE * value], p[SIZE * value:]
        dp_pairs, p = p[:rows * SIZE], p[rows * SIZE:]
        dp_turned = p[:rows * SIZE]
        for task in range(w * tasks // workers, (w + 1) * tasks // workers):
            row, head = task // heads, task % heads
            ds = dstate[task]
            for back in range(chunks):
                n = chunks - 1 - back
                first = n * SIZE
                steps = min(SIZE, length - first)
                s = states[task, n]
                _prepare(q, a, k, b, g, reset, strides, row, head, first, steps, key, scale,
                         channel, two, x, x_read, y_, y_write, keep, totals, sums, write)
                uv[:SIZE * value] = us[task, n]
                if two:
                    _values(v, strides[4], row, head, first, steps, value, uv, SIZE * value)
                _values(dy, strides[6], row, head, first, steps, value, zy, SIZE * value)
                if not channel or back == 0:
                    _steps_of_pairs(sums, channel, factors)
                turn(x.ctypes.data, x_turned.ctypes.data, wide, key // 2)
                multiply(products.ctypes.data, 4 * wide, True, y_.ctypes.data, 2 * key,
                         x_turned.ctypes.data, 4 * wide, rows, wide, key)
                for r in range(rows):
                    for c in range(0, wide, WIDTH):
                        mask = r % SIZE * _EDGE + (c if c < SIZE else c - SIZE + 1)
                        e = visible(load(products, r * wide + c), load(factors, mask))
                        store(products, r * wide + c, e)
                        store_half(masked, r * wide + c, e)
                if channel:
                    fade(ds, keep, key, value)
                halve(ds, key, value, ds_rows)
                halve_pairs(ds, key, value, ds_pairs)
                pair(zy.ctypes.data + 2 * SIZE * value, zy_pairs.ctypes.data + 2 * SIZE * value,
                     SIZE, value)
                multiply(du.ctypes.data, 4 * value, True, y_write.ctypes.data, 2 * key,
                         ds_pairs.ctypes.data, 4 * value, SIZE, value, key)
                multiply(du.ctypes.data, 4 * value, False, masked.ctypes.data + 2 * SIZE, 2 * wide,
                         zy_pairs.ctypes.data + 2 * SIZE * value, 4 * value, SIZE, value, SIZE)
                halve_pairs(du, SIZE, value, du_pairs)
                multiply(z.ctypes.data, 4 * value, True, inverses[task, n].ctypes.data, 2 * SIZE,
                         du_pairs.ctypes.data, 4 * value, SIZE, value, SIZE)
                halve(z, SIZE, value, zy)
                halve_pairs(z, SIZE, value, zy_pairs)
                if two:
                    multiply(z.ctypes.data, 4 * value, True, y_write.ctypes.data + 2 * SIZE * key,
                             2 * key, ds_pairs.ctypes.data, 4 * value, SIZE, value, key)
                    multiply(z.ctypes.data, 4 * value, False, masked.ctypes.data + 2 * SIZE * wide,
                             2 * wide, zy_pairs.ctypes.data, 4 * value, SIZE, value, wide)
                for t in range(steps):
                    at = ((row * length + first + t) * heads + head) * value
                    for j in range(0, value, WIDTH):
                        store_half(dv, at + j, load(z, t * value + j))
                turn(zy.ctypes.data, zy_turned.ctypes.data, wide, value // 2)
                multiply(dproducts.ctypes.data, 4 * wide, True, uv.ctypes.data, 2 * value,
                         zy_turned.ctypes.data, 4 * wide, rows, wide, value)
                by_x[:] = 0
                by_y[:] = 0
                for r in range(rows):
                    line = splat(np.float32(0))
                    for c in range(0, wide, WIDTH):
                        e = load(dproducts, r * wide + c)
                        if not channel:
                            both = e * load(products, r * wide + c)
                            line = line + both
                            store(by_x, c, load(by_x, c) + both)
                        e = e * load(factors, r % SIZE * _EDGE + (c if c < SIZE else c - SIZE + 1))
                        store(dproducts, r * wide + c, e)
                        store_half(masked, r * wide + c, e)
                    if not channel:
                        by_y[r % SIZE] += total(line)
                halve_pairs(dproducts, rows, wide, dp_pairs)
                turn(dp_pairs.ctypes.data, dp_turned.ctypes.data, rows // 2, wide)
                turn(s.ctypes.data, s_turned.ctypes.data, key, value // 2)
                multiply(dx.ctypes.data, 4 * key, True, zy.ctypes.data, 2 * value,
                         s_turned.ctypes.data, 4 * key, wide, key, value)
                turn(ds_rows.ctypes.data, s_turned.ctypes.data, key, value // 2)
                multiply(dw.ctypes.data, 4 * key, True, uv.ctypes.data, 2 * value,
                         s_turned.ctypes.data, 4 * key, rows, key, value)
                for i in range(key):
                    line = splat(np.float32(0))
                    factor = splat(np.float32(1) if channel else keep[i])
                    for j in range(i * value, (i + 1) * value, WIDTH):
                        e = load(ds, j) * factor
                        line = line + e * load(s, j)
                        store(ds, j, e)
                    ends[i] = total(line)
                if channel:
                    for j in range(0, key, WIDTH):
                        line = load(ends, j)
                        for at in range(j, rows * key, key):
                            line = line + load(dw, at) * load(y_, at)
                        store(ends, j, line)
                else:
                    for r in range(wide):
                        line = splat(np.float32(0))
                        factor = splat(totals[r if r < SIZE else r - SIZE + 1])
                        for at in range(r * key, (r + 1) * key, WIDTH):
                            e = load(dx, at)
                            line = line + e * load(x_read, at)
                            store(dx, at, e * factor)
                        by_x[r] += total(line)
                    end = np.float32(0)
                    for i in range(key):
                        end += ends[i]
                    for r in range(rows):
                        line = splat(np.float32(0))
                        factor = splat(write[r % SIZE])
                        for at in range(r * key, (r + 1) * key, WIDTH):
                            e = load(dw, at)
                            line = line + e * load(y_write, at)
                            store(dw, at, e * factor)
                        written = total(line)
                        by_y[r % SIZE] += written
                        end += written
                    ends[0] = end
                pair(y_.ctypes.data, y_pairs.ctypes.data, rows, key)
                multiply(dx.ctypes.data, 4 * key, False, dp_turned.ctypes.data, 2 * rows,
                         y_pairs.ctypes.data, 4 * key, wide, key, rows)
                pair(x.ctypes.data, x_pairs.ctypes.data, wide, key)
                multiply(dw.ctypes.data, 4 * key, False, masked.ctypes.data, 2 * wide,
                         x_pairs.ctypes.data, 4 * key, rows, key, wide)
                if not channel:
                    pair(x_read.ctypes.data, x_pairs.ctypes.data, wide, key)
                turn(x_pairs.ctypes.data, x_turned.ctypes.data, SIZE, key)
                multiply(ds.ctypes.data, 4 * value, False, x_turned.ctypes.data, 2 * wide,
                         zy_pairs.ctypes.data, 4 * value, key, value, wide)
                if channel:
                    fade(ds, keep, key, value)
                base = (row * length + first) * heads + head
                if channel:
                    _finish_channel(x, y_, dx, dw, totals, ends, steps, key, rows, scale, base,
                                    heads, dq, da, dk, db, dg)
                else:
                    _finish_head(dx, dw, by_x, by_y, ends[0], reset, row, first, steps, key, rows,
                                 scale, base, heads, dq, da, dk, db, dg)
        release()


@numba.njit(fastmath=FAST, cache=True)
def _finish_head(dx, dw, by_x, by_y, end, reset, row, first, steps, key, rows, scale, base, heads,
                 dq, da, dk, db, dg):
    """Gradients of rows and of the decays of a head; nothing crosses a reset."""
    scales = splat(np.float32(scale))
    for t in range(steps):
        to = (base + t * heads) * key
        begins = reset.size > 0 and reset[row, first + t]
        shown = splat(np.float32(0 if begins else 1))
        for j in range(0, key, WIDTH):
            at = t * key + j
            store_half(da, to + j, load(dx, at) * shown)
            store_half(dq, to + j, load(dx, at + SIZE * key) * scales)
            store_half(dk, to + j, load(dw, at + (rows - SIZE) * key))
            if rows > SIZE:
                store_half(db, to + j, load(dw, at))
    running = end
    for back in range(steps):
        t = steps - 1 - back
        running += by_x[SIZE + t] - by_y[t]
        if reset.size > 0 and reset[row, first + t]:
            running = np.float32(0)
        put(dg, base + t * heads, running)
        running += by_x[t]


@numba.njit(fastmath=FAST, cache=True)
def _finish_channel(x, y, dx, dw, totals, ends, steps, key, rows, scale, base, heads, dq, da, dk,
                    db, dg):
    """Gradients of rows, which carry their decays, and of the decays of a channel."""
    low = (rows - SIZE) * key
    for j in range(0, key, WIDTH):
        running = load(ends, j)
        for back in range(steps):
            t = steps - 1 - back
            at, to = t * key + j, (base + t * heads) * key + j
            before, now = load(totals, at), load(totals, at + key)
            inverse = splat(np.float32(1)) / now
            grad_a, grad_q, grad_k = load(dx, at), load(dx, at + SIZE * key), load(dw, low + at)
            running = running + load(x, at + SIZE * key) * grad_q - load(y, low + at) * grad_k
            store_half(dk, to, grad_k * inverse)
            if rows > SIZE:
                grad_b = load(dw, at)
                running = running - load(y, at) * grad_b
                store_half(db, to, grad_b * inverse)
            store(dg, to, running)
            running = running + load(x, at) * grad_a
            store_half(da, to, grad_a * before)
            store_half(dq, to, grad_q * now * splat(np.float32(scale)))


def scratch(key, value, rows):
    """(floats, halves, words) of one worker, enough for both passes; multiples of 64 bytes."""
    wide = 2 * SIZE
    floats = (2 * rows * wide + SIZE * _EDGE + 2 * SIZE * value + (wide + rows) * key
              + (SIZE + 1) * key + 2 * SIZE * SIZE + HALF * HALF + 2 * key + wide + 4 * SIZE
              + 2 * WIDTH)
    halves = (2 * (wide + rows) * key + rows * wide + SIZE * SIZE + (rows + wide) * value
              + key * value + HALF * HALF)
    words = (2 * SIZE * key + rows * key + key * value + (HALF + wide + rows // 2) * value
             + 2 * rows * SIZE + HALF * SIZE)
    return tuple(-(-n // 64) * 64 for n in (floats, halves, words))
