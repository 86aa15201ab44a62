"""Fixed linear state spaces, a channel by itself, and their gradient on the CPU: S4D and S4.

Sixteen channels at a time in one vector, so that no sum over lanes is needed. The pairs of a
diagonal system are independent and walk through a chunk one after another; S4's meet in every
step, so there a loop over the pairs lies inside the loop over time. The forward pass keeps the
state only at the start of every chunk of CHUNK steps. The backward pass recomputes the states of
one chunk in scratch memory that stays in the cache, walks it in reverse, and sums the gradients of
the system pair by pair, in registers.

A system's numbers lie as (groups of channels, pairs, kinds, lanes), the kinds being
a, b, 2 c, real and imaginary, and for S4 e and f too; see `ops.dplr_ssm.System`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels.lanes import FAST, WIDTH, flat, load, marks, pack, splat, store, unpack

CHUNK = 64
PAIR = 2 * WIDTH


@numba.njit(fastmath=FAST, inline="always")
def _read(table, h, at, here, pairs, kinds):
    """Re(f . h) of sixteen channels."""
    r = splat(np.float32(0))
    for p in range(pairs):
        k = at + (p * kinds + 8) * WIDTH
        r = r + (load(table, k) * load(h, here + p * PAIR)
                 - load(table, k + WIDTH) * load(h, here + p * PAIR + WIDTH))
    return r


@numba.njit(fastmath=FAST, inline="always")
def _step(table, at, pairs, kinds, x, r, h, here, to):
    """The state after x and r = Re(f . h), from `here` to `to` in h; returns 2 Re(c . h) and
    Re(f . h) of the new state."""
    zero = splat(np.float32(0))
    y, z, s, u = zero, zero, zero, zero
    for p in range(pairs):
        k = at + p * kinds * WIDTH
        ar, ai = load(table, k), load(table, k + WIDTH)
        hr, hi = load(h, here + p * PAIR), load(h, here + p * PAIR + WIDTH)
        nr = load(table, k + 2 * WIDTH) * x + ar * hr - ai * hi
        ni = load(table, k + 3 * WIDTH) * x + ar * hi + ai * hr
        nr = nr - load(table, k + 6 * WIDTH) * r
        ni = ni - load(table, k + 7 * WIDTH) * r
        store(h, to + p * PAIR, nr)
        store(h, to + p * PAIR + WIDTH, ni)
        y = y + load(table, k + 4 * WIDTH) * nr
        z = z + load(table, k + 5 * WIDTH) * ni
        s = s + load(table, k + 8 * WIDTH) * nr
        u = u + load(table, k + 9 * WIDTH) * ni
    return y - z, s - u


@numba.njit(fastmath=FAST, inline="always")
def _back(table, at, pairs, kinds, grads, after, q, to):
    """From the gradient of a state, at `after` in grads, and q, that of the Re(f . h) it was made
    with, the gradient of the state before, written to `to`."""
    for p in range(pairs):
        k = at + p * kinds * WIDTH
        ar, ai = load(table, k), load(table, k + WIDTH)
        lr, li = load(grads, after + p * PAIR), load(grads, after + p * PAIR + WIDTH)
        gr, gi = ar * lr + ai * li, ar * li - ai * lr
        gr = gr + load(table, k + 8 * WIDTH) * q
        gi = gi - load(table, k + 9 * WIDTH) * q
        store(grads, to + p * PAIR, gr)
        store(grads, to + p * PAIR + WIDTH, gi)


@numba.njit(fastmath=FAST, inline="always")
def _meet(table, at, pairs, kinds, grads, here, gt):
    """Add the gradient of the output, gt, to that of the state at `here` in grads; returns the
    gradients of x and of Re(f . h) of the state before."""
    zero = splat(np.float32(0))
    dxr, dxi, q, v = zero, zero, zero, zero
    for p in range(pairs):
        k = at + p * kinds * WIDTH
        lr = load(grads, here + p * PAIR) + load(table, k + 4 * WIDTH) * gt
        li = load(grads, here + p * PAIR + WIDTH) - load(table, k + 5 * WIDTH) * gt
        store(grads, here + p * PAIR, lr)
        store(grads, here + p * PAIR + WIDTH, li)
        dxr = dxr + load(table, k + 2 * WIDTH) * lr
        dxi = dxi + load(table, k + 3 * WIDTH) * li
        q = q - load(table, k + 6 * WIDTH) * lr
        v = v - load(table, k + 7 * WIDTH) * li
    return dxr + dxi, q + v


@numba.njit(fastmath=FAST, inline="always")
def _numbers(table, at):
    """a, b and 2 c of one pair, each real part first."""
    return (load(table, at), load(table, at + WIDTH),
            load(table, at + 2 * WIDTH), load(table, at + 3 * WIDTH),
            load(table, at + 4 * WIDTH), load(table, at + 5 * WIDTH))


@numba.njit(fastmath=FAST, inline="always")
def _walk(ar, ai, br, bi, hr, hi, x):
    """a h + b x of one pair."""
    return br * x + ar * hr - ai * hi, bi * x + ar * hi + ai * hr


@numba.njit(fastmath=FAST, inline="always")
def _add(sums, at, value):
    store(sums, at, load(sums, at) + value)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(x, xs, table, skip, reset, states, starts, y, shape):
    """y, the state after the last step (in `states`, which holds the first one at the call), and
    the state before each chunk (in `starts`, unless it is empty).

    x: flat with (batch, time) strides xs; table: flat; skip: (padded D,); reset: (B, T) uint8 or
    empty; states: flat (B, groups, pairs, 2, lanes); starts: flat (B, groups, chunks, pairs, 2,
    lanes); y: flat (B, T, D).
    """
    batch, length, width, pairs, kinds = shape
    groups = (width + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    line = pairs * PAIR
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        col, at = group * WIDTH, group * pairs * kinds * WIDTH
        used = min(WIDTH, width - col)
        px = np.empty(CHUNK * WIDTH, np.float32)
        h = states[task * line:(task + 1) * line]
        d_skip = load(skip, col)
        r = _read(table, h, at, 0, pairs, kinds)
        for k in range(chunks):
            t0 = k * CHUNK
            steps = min(CHUNK, length - t0)
            if starts.shape[0] > 0:
                starts[(task * chunks + k) * line:(task * chunks + k + 1) * line] = h
            pack(x, row * xs[0] + t0 * xs[1] + col, xs[1], steps, used, px, 0)
            for t in range(steps):
                if reset.shape[0] > 0 and reset[row, t0 + t] != 0:
                    h[:] = np.float32(0)
                    r = splat(np.float32(0))
                xt = load(px, t * WIDTH)
                out, r = _step(table, at, pairs, kinds, xt, r, h, 0, 0)
                store(px, t * WIDTH, out + d_skip * xt)
            unpack(px, 0, steps, used, y, (row * length + t0) * width + col, width)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(x, xs, dy, dys, table, skip, reset, starts, adjoint, dx, dtable, dskip, shape):
    """Gradients; adjoint: flat like the states, that of the last state at the call and that of the
    first one after it. dtable: flat (B, groups, pairs, kinds, lanes), dskip: (B, padded D)."""
    batch, length, width, pairs, kinds = shape
    groups = (width + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    line = pairs * PAIR
    hop = line + WIDTH  # rows of scratch must not share their sets of the first-level cache
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        col, at = group * WIDTH, group * pairs * kinds * WIDTH
        used = min(WIDTH, width - col)
        px = np.empty(CHUNK * WIDTH, np.float32)
        pg = np.empty(CHUNK * WIDTH, np.float32)
        pdx = np.empty(CHUNK * WIDTH, np.float32)
        pr = np.empty((CHUNK + 1) * WIDTH, np.float32)
        pq = np.empty(CHUNK * WIDTH, np.float32)
        # Rows of states and of their gradients; what lies before a reset is the row of zeros.
        hs = np.zeros((CHUNK + 2) * hop, np.float32)
        ls = np.empty((CHUNK + 1) * hop, np.float32)
        nothing = (CHUNK + 1) * hop
        before = np.empty(CHUNK, np.int64)
        g = adjoint[task * line:(task + 1) * line]
        zero = splat(np.float32(0))
        d_skip, dskip_sum = load(skip, col), zero
        own = task * pairs * kinds * WIDTH
        for back in range(chunks):
            k = chunks - 1 - back
            t0 = k * CHUNK
            steps = min(CHUNK, length - t0)
            hs[:line] = starts[(task * chunks + k) * line:(task * chunks + k + 1) * line]
            pack(x, row * xs[0] + t0 * xs[1] + col, xs[1], steps, used, px, 0)
            pack(dy, row * dys[0] + t0 * dys[1] + col, dys[1], steps, used, pg, 0)
            r = _read(table, hs, at, 0, pairs, kinds)
            for t in range(steps):
                fresh = reset.shape[0] > 0 and reset[row, t0 + t] != 0
                before[t] = nothing if fresh else t * hop
                if fresh:
                    r = zero
                store(pr, t * WIDTH, r)
                _, r = _step(table, at, pairs, kinds, load(px, t * WIDTH), r, hs,
                             before[t], (t + 1) * hop)
            last = (steps - 1) * hop
            ls[last:last + line] = g
            for back_t in range(steps):
                t = steps - 1 - back_t
                here = t * hop
                to = here - hop if t > 0 else CHUNK * hop
                gt = load(pg, t * WIDTH)
                dxt, q = _meet(table, at, pairs, kinds, ls, here, gt)
                if before[t] == nothing:
                    q = zero
                    ls[to:to + line] = np.float32(0)
                else:
                    _back(table, at, pairs, kinds, ls, here, q, to)
                store(pq, t * WIDTH, q)
                store(pdx, t * WIDTH, dxt + d_skip * gt)
                dskip_sum = dskip_sum + gt * load(px, t * WIDTH)
            g[:] = ls[CHUNK * hop:CHUNK * hop + line]
            for p in range(pairs):
                dar, dai, dbr, dbi, dcr, dci = zero, zero, zero, zero, zero, zero
                ear, eai, der, dei, dfr, dfi = zero, zero, zero, zero, zero, zero
                for t in range(steps):
                    here, old = t * hop + p * PAIR, before[t] + p * PAIR
                    lr, li = load(ls, here), load(ls, here + WIDTH)
                    xt, gt = load(px, t * WIDTH), load(pg, t * WIDTH)
                    dbr, dbi = dbr + lr * xt, dbi + li * xt
                    dcr = dcr + gt * load(hs, here + hop)
                    dci = dci - gt * load(hs, here + hop + WIDTH)
                    hr, hi = load(hs, old), load(hs, old + WIDTH)
                    dar, ear = dar + lr * hr, ear + li * hi
                    dai, eai = dai + li * hr, eai - lr * hi
                    r, q = load(pr, t * WIDTH), load(pq, t * WIDTH)
                    der, dei = der - lr * r, dei - li * r
                    dfr, dfi = dfr + q * hr, dfi - q * hi
                k = own + p * kinds * WIDTH
                _add(dtable, k, dar + ear)
                _add(dtable, k + WIDTH, dai + eai)
                _add(dtable, k + 2 * WIDTH, dbr)
                _add(dtable, k + 3 * WIDTH, dbi)
                _add(dtable, k + 4 * WIDTH, dcr)
                _add(dtable, k + 5 * WIDTH, dci)
                _add(dtable, k + 6 * WIDTH, der)
                _add(dtable, k + 7 * WIDTH, dei)
                _add(dtable, k + 8 * WIDTH, dfr)
                _add(dtable, k + 9 * WIDTH, dfi)
            unpack(pdx, 0, steps, used, dx, (row * length + t0) * width + col, width)
        store(dskip, row * groups * WIDTH + col, dskip_sum)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward_pairs(x, xs, table, skip, reset, states, starts, y, shape):
    """`forward` without e and f. Two pairs at a time walk through a chunk, their numbers in
    registers; the number of pairs is even."""
    batch, length, width, pairs, kinds = shape
    groups = (width + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    line = pairs * PAIR
    zero = splat(np.float32(0))
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        col, at = group * WIDTH, group * pairs * kinds * WIDTH
        used = min(WIDTH, width - col)
        px = np.empty(CHUNK * WIDTH, np.float32)
        py = np.empty(CHUNK * WIDTH, np.float32)
        h = states[task * line:(task + 1) * line]
        d_skip = load(skip, col)
        for k in range(chunks):
            t0 = k * CHUNK
            steps = min(CHUNK, length - t0)
            if starts.shape[0] > 0:
                starts[(task * chunks + k) * line:(task * chunks + k + 1) * line] = h
            pack(x, row * xs[0] + t0 * xs[1] + col, xs[1], steps, used, px, 0)
            for t in range(steps):
                store(py, t * WIDTH, d_skip * load(px, t * WIDTH))
            for p in range(0, pairs, 2):
                i, j = at + p * kinds * WIDTH, at + (p + 1) * kinds * WIDTH
                ar, ai, br, bi, cr, ci = _numbers(table, i)
                dr, di, er, ei, fr, fi = _numbers(table, j)
                hr, hi = load(h, p * PAIR), load(h, p * PAIR + WIDTH)
                gr, gi = load(h, p * PAIR + 2 * WIDTH), load(h, p * PAIR + 3 * WIDTH)
                for t in range(steps):
                    if reset.shape[0] > 0 and reset[row, t0 + t] != 0:
                        hr, hi, gr, gi = zero, zero, zero, zero
                    xt = load(px, t * WIDTH)
                    hr, hi = _walk(ar, ai, br, bi, hr, hi, xt)
                    gr, gi = _walk(dr, di, er, ei, gr, gi, xt)
                    out = load(py, t * WIDTH) + cr * hr - ci * hi
                    store(py, t * WIDTH, out + fr * gr - fi * gi)
                store(h, p * PAIR, hr)
                store(h, p * PAIR + WIDTH, hi)
                store(h, p * PAIR + 2 * WIDTH, gr)
                store(h, p * PAIR + 3 * WIDTH, gi)
            unpack(py, 0, steps, used, y, (row * length + t0) * width + col, width)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward_pairs(x, xs, dy, dys, table, skip, reset, starts, adjoint, dx, dtable, dskip, shape):
    """`backward` without e and f: pair after pair walks forth and back through a chunk."""
    batch, length, width, pairs, kinds = shape
    groups = (width + WIDTH - 1) // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    line = pairs * PAIR
    zero = splat(np.float32(0))
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        col, at = group * WIDTH, group * pairs * kinds * WIDTH
        used = min(WIDTH, width - col)
        px = np.empty(CHUNK * WIDTH, np.float32)
        pg = np.empty(CHUNK * WIDTH, np.float32)
        pdx = np.empty(CHUNK * WIDTH, np.float32)
        hs = np.empty((CHUNK + 1) * PAIR, np.float32)
        g = adjoint[task * line:(task + 1) * line]
        d_skip, dskip_sum = load(skip, col), zero
        own = task * pairs * kinds * WIDTH
        for back in range(chunks):
            k = chunks - 1 - back
            t0 = k * CHUNK
            steps = min(CHUNK, length - t0)
            first = (task * chunks + k) * line
            pack(x, row * xs[0] + t0 * xs[1] + col, xs[1], steps, used, px, 0)
            pack(dy, row * dys[0] + t0 * dys[1] + col, dys[1], steps, used, pg, 0)
            for t in range(steps):
                gt = load(pg, t * WIDTH)
                store(pdx, t * WIDTH, d_skip * gt)
                dskip_sum = dskip_sum + gt * load(px, t * WIDTH)
            for p in range(pairs):
                i = at + p * kinds * WIDTH
                ar, ai, br, bi, cr, ci = _numbers(table, i)
                hr, hi = load(starts, first + p * PAIR), load(starts, first + p * PAIR + WIDTH)
                store(hs, 0, hr)
                store(hs, WIDTH, hi)
                for t in range(steps):
                    if reset.shape[0] > 0 and reset[row, t0 + t] != 0:
                        hr, hi = zero, zero
                    xt = load(px, t * WIDTH)
                    hr, hi = _walk(ar, ai, br, bi, hr, hi, xt)
                    store(hs, (t + 1) * PAIR, hr)
                    store(hs, (t + 1) * PAIR + WIDTH, hi)
                gr, gi = load(g, p * PAIR), load(g, p * PAIR + WIDTH)
                dar, dai, ear, eai = zero, zero, zero, zero
                dbr, dbi, dcr, dci = zero, zero, zero, zero
                for bacintot in range(steps):
                    t = steps - 1 - bacintot
                    xt, gt = load(px, t * WIDTH), load(pg, t * WIDTH)
                    lr, li = gr + cr * gt, gi - ci * gt
                    store(pdx, t * WIDTH, load(pdx, t * WIDTH) + br * lr + bi * li)
                    dbr, dbi = dbr + lr * xt, dbi + li * xt
                    dcr = dcr + gt * load(hs, (t + 1) * PAIR)
                    dci = dci - gt * load(hs, (t + 1) * PAIR + WIDTH)
                    if reset.shape[0] > 0 and reset[row, t0 + t] != 0:
                        gr, gi = zero, zero
                    else:
                        hr, hi = load(hs, t * PAIR), load(hs, t * PAIR + WIDTH)
                        dar, ear = dar + lr * hr, ear + li * hi
                        dai, eai = dai + li * hr, eai - lr * hi
                        gr, gi = ar * lr + ai * li, ar * li - ai * lr
                store(g, p * PAIR, gr)
                store(g, p * PAIR + WIDTH, gi)
                into = own + p * kinds * WIDTH
                _add(dtable, into, dar + ear)
                _add(dtable, into + WIDTH, dai + eai)
                _add(dtable, into + 2 * WIDTH, dbr)
                _add(dtable, into + 3 * WIDTH, dbi)
                _add(dtable, into + 4 * WIDTH, dcr)
                _add(dtable, into + 5 * WIDTH, dci)
            unpack(pdx, 0, steps, used, dx, (row * length + t0) * width + col, width)
        store(dskip, row * groups * WIDTH + col, dskip_sum)


def scan(x: Tensor, kinds: Tensor, skip: Tensor | None, state: Tensor, reset: Tensor | None, *,
         training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), the last state (B, D, P, 2), and the states that the gradient needs.

    kinds: (D, P, 6 or 10) float32, see above; x: dense in its last dimension.
    """
    batch, length, width = x.shape
    kinds, given = _even(kinds), state.shape[2]
    states, ranked = _lanes(_even(state, kinds.shape[1])), kinds.shape[2] == 10
    chunks = (length + CHUNK - 1) // CHUNK
    starts = torch.empty(chunks * states.numel() if training else 0)
    y = torch.empty(batch, length, width, dtype=x.dtype)
    (forward if ranked else forward_pairs)(
        flat(x), x.stride()[:2], flat(_lanes(kinds)), _skip(skip, width).numpy(), marks(reset),
        flat(states), starts.numpy(), flat(y), (batch, length, width, *kinds.shape[1:]))
    return y, _channels(states, width)[:, :, :given].contiguous(), starts


def scan_gradient(x: Tensor, kinds: Tensor, skip: Tensor | None, reset: Tensor | None,
                  starts: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, kinds, skip and the first state."""
    batch, length, width = x.shape
    kinds, given = _even(kinds), kinds.shape[1]
    adjoint, ranked = _lanes(_even(dstate, kinds.shape[1])), kinds.shape[2] == 10
    groups = adjoint.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype)
    dtable = torch.zeros(batch, groups, *kinds.shape[1:], WIDTH)
    dskip = torch.empty(batch, groups * WIDTH)
    (backward if ranked else backward_pairs)(
        flat(x), x.stride()[:2], flat(dy), dy.stride()[:2], flat(_lanes(kinds)),
        _skip(skip, width).numpy(), marks(reset), starts.numpy(), flat(adjoint), flat(dx),
        flat(dtable), flat(dskip), (batch, length, width, *kinds.shape[1:]))
    return (dx, _channels(dtable.sum(0), width)[:, :given], dskip.sum(0)[:width],
            _channels(adjoint, width)[:, :, :given])


def _even(x: Tensor, pairs: int | None = None) -> Tensor:
    """(.., P, K) with a pair of zeros behind where P is odd."""
    return F.pad(x, (0, 0, 0, (pairs or x.shape[-2] + x.shape[-2] % 2) - x.shape[-2]))


def _lanes(x: Tensor) -> Tensor:
    """(.., D, P, K) -> a copy (.., groups, P, K, lanes), zeros in the lanes behind D."""
    padded = F.pad(x.detach().float(), (0, 0, 0, 0, 0, -x.shape[-3] % WIDTH))
    return padded.unflatten(-3, (-1, WIDTH)).movedim(-3, -1).clone(
        memory_format=torch.contiguous_format)


def _channels(x: Tensor, width: int) -> Tensor:
    """The inverse of `_lanes`."""
    return x.movedim(-1, -3).flatten(-4, -3)[..., :width, :, :].contiguous()


def _skip(skip: Tensor | None, width: int) -> Tensor:
    padded = width + -width % WIDTH
    return (torch.zeros(padded) if skip is None
            else F.pad(skip.detach().float(), (0, padded - width)))
