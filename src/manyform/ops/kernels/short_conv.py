"""The short convolution and its gradient for the CPU, in one pass over memory each way.

Work is shared out as (row, group of channels). A task walks through time in blocks; for each
vector of channels a block lies in scratch memory together with the K-1 steps before it (and, going
back, the K-1 steps after it), so that taps are plain neighbours there. `reach` says how many taps
back a step may look, which is where resets enter.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    flat,
    load,
    pack,
    shares,
    sigmoid,
    splat,
    store,
    unpack,
)

BLOCK = 64
PART = 1024  # steps of one task where rows are walked in the order of memory
FEW = 8  # up to so many taps that is faster


@numba.njit(fastmath=FAST, inline="always")
def _window(x, xs, state, row, t0, steps, back, width, col, used, into):
    """Inputs of steps t0 - back .. t0 + steps - 1 of one vector of channels, the oldest first."""
    early = min(max(back - t0, 0), back)  # steps that lie in the state
    at = (row * back + back - early) * width + col
    if early > 0:
        pack(state, at, width, early, used, into, 0)
    first = t0 - back + early
    pack(x, row * xs[0] + first * xs[1] + col, xs[1], steps + back - early, used, into,
         early * WIDTH)


@numba.njit(fastmath=FAST, inline="always")
def _filtered(w, padded, bias, col, window, t, taps, reach, row, step):
    """b + sum_i w_{K-1-i} x_{t-i} for one vector of channels."""
    acc = load(bias, col)
    for i in range(taps):
        if reach is None or reach[row, step] >= i:
            acc = acc + (load(w, (taps - 1 - i) * padded + col)
                         * load(window, (t + taps - 1 - i) * WIDTH))
    return acc


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(x, xs, weight, bias, state, reach, silu, y, shape, groups, marks):
    """x: flat with (batch, time) strides xs; weight: (K, padded D); bias: (padded D,); state: flat
    (B, K-1, D); reach: (B, T) int64 or None; y: flat (B, T, D). marks: a tuple of K numbers, so
    that the taps are known when this is compiled and their loops unrolled."""
    batch, length, width = shape
    taps, padded = len(marks), weight.shape[1]
    back = taps - 1
    vectors = padded // WIDTH
    w = weight.reshape(-1)
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        window = np.empty((BLOCK + back) * WIDTH, np.float32)
        out = np.empty(BLOCK * WIDTH, np.float32)
        for t0 in range(0, length, BLOCK):
            steps = min(BLOCK, length - t0)
            for v in range(vectors * group // groups, vectors * (group + 1) // groups):
                col = v * WIDTH
                used = min(WIDTH, width - col)
                _window(x, xs, state, row, t0, steps, back, width, col, used, window)
                for t in range(steps):
                    acc = _filtered(w, padded, bias, col, window, t, taps, reach, row, t0 + t)
                    store(out, t * WIDTH, acc * sigmoid(acc) if silu else acc)
                unpack(out, 0, steps, used, y, (row * length + t0) * width + col, width)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(x, xs, weight, bias, state, reach, silu, dy, dys, dx, dstate, dweight, dbias, shape,
             groups, marks):
    """dx: flat (B, T, D), dstate: flat (B, K-1, D), dweight: (B, K, padded D) and dbias:
    (B, padded D), the last three zero at the call."""
    batch, length, width = shape
    taps, padded = len(marks), weight.shape[1]
    back = taps - 1
    vectors = padded // WIDTH
    w = weight.reshape(-1)
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        window = np.empty((BLOCK + 2 * back) * WIDTH, np.float32)
        # The gradient before the activation, with zeros for the `back` steps before the block
        # (they are no part of it) and for the steps behind the sequence.
        slope = np.zeros((BLOCK + 2 * back) * WIDTH, np.float32)
        grad = np.empty((BLOCK + back) * WIDTH, np.float32)  # gradient of the window
        dw, db = dweight[row].reshape(-1), dbias[row]
        own = back * WIDTH
        for t0 in range(0, length, BLOCK):
            steps = min(BLOCK, length - t0)
            ahead = min(steps + back, length - t0)  # outputs that this block's inputs reach
            slope[(back + ahead) * WIDTH:] = np.float32(0)
            for v in range(vectors * group // groups, vectors * (group + 1) // groups):
                col = v * WIDTH
                used = min(WIDTH, width - col)
                _window(x, xs, state, row, t0, ahead, back, width, col, used, window)
                pack(dy, row * dys[0] + t0 * dys[1] + col, dys[1], ahead, used, slope, own)
                if silu:
                    for t in range(ahead):
                        acc = _filtered(w, padded, bias, col, window, t, taps, reach, row, t0 + t)
                        s = sigmoid(acc)
                        g = load(slope, own + t * WIDTH)
                        store(slope, own + t * WIDTH, g * s * (one + acc * (one - s)))
                total = load(db, col)
                for t in range(steps):
                    total = total + load(slope, own + t * WIDTH)
                store(db, col, total)
                for i in range(0, taps, 4):  # four sums at once: additions of one would wait
                    j, k, m = min(i + 1, back), min(i + 2, back), min(i + 3, back)
                    a, b, c, d = zero, zero, zero, zero
                    for t in range(steps):
                        g = load(slope, own + t * WIDTH)
                        near = back if reach is None else reach[row, t0 + t]
                        if near >= i:
                            a = a + g * load(window, (t + back - i) * WIDTH)
                        if near >= j:
                            b = b + g * load(window, (t + back - j) * WIDTH)
                        if near >= k:
                            c = c + g * load(window, (t + back - k) * WIDTH)
                        if near >= m:
                            d = d + g * load(window, (t + back - m) * WIDTH)
                    store(dw, (back - i) * padded + col, load(dw, (back - i) * padded + col) + a)
                    if i + 1 < taps:
                        store(dw, (back - j) * padded + col,
                              load(dw, (back - j) * padded + col) + b)
                    if i + 2 < taps:
                        store(dw, (back - k) * padded + col,
                              load(dw, (back - k) * padded + col) + c)
                    if i + 3 < taps:
                        store(dw, (back - m) * padded + col,
                              load(dw, (back - m) * padded + col) + d)
                for p in range(0 if t0 == 0 else back, steps + back):  # input t0 + p - back
                    acc = zero
                    for i in range(taps):
                        t = p - back + i
                        if reach is None or (0 <= t < ahead and reach[row, t0 + t] >= i):
                            acc = acc + (load(slope, (p + i) * WIDTH)
                                         * load(w, (back - i) * padded + col))
                    store(grad, p * WIDTH, acc)
                if t0 == 0:
                    unpack(grad, 0, back, used, dstate, row * back * width + col, width)
                unpack(grad, own, steps, used, dx, (row * length + t0) * width + col, width)


@numba.njit(fastmath=FAST, inline="always")
def _early(x, xs, state, row, steps, back, width):
    """The inputs of steps -back .. steps - 1 as dense rows, the state's before those of x."""
    rows = np.empty((back + steps) * width, np.float32)
    rows[:back * width] = state[row * back * width:(row + 1) * back * width]
    for t in range(steps):
        for d in range(0, width, WIDTH):
            store(rows, (back + t) * width + d, load(x, row * xs[0] + t * xs[1] + d))
    return rows


@numba.njit(fastmath=FAST, inline="always")
def _filter_row(w, bias, width, source, at, stride, d, taps):
    """b + sum_i w_{K-1-i} x_{t-i}, x_t lying at `at` in the source."""
    acc = load(bias, d)
    for i in range(taps):
        acc = acc + load(w, (taps - 1 - i) * width + d) * load(source, at - i * stride + d)
    return acc


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward_rows(x, xs, weight, bias, state, silu, y, shape, marks):
    """`forward` for few taps, whole vectors and no reset: row after row, in the order of memory."""
    batch, length, width = shape
    taps = len(marks)
    back = taps - 1
    parts = (length + PART - 1) // PART
    w = weight.reshape(-1)
    for task in numba.prange(batch * parts):
        row, t0 = task // parts, task % parts * PART
        first = min(back, length) if t0 == 0 else 0
        early = _early(x, xs, state, row, first, back if t0 == 0 else 0, width)
        for t in range(t0, min(t0 + PART, length)):
            to, at = (row * length + t) * width, row * xs[0] + t * xs[1]
            for d in range(0, width, WIDTH):
                acc = (_filter_row(w, bias, width, early, (back + t) * width, width, d, taps)
                       if t < back else _filter_row(w, bias, width, x, at, xs[1], d, taps))
                store(y, to + d, acc * sigmoid(acc) if silu else acc)


@numba.njit(fastmath=FAST, inline="always")
def _slope_row(w, bias, width, source, at, stride, dy, to, silu, taps, ring, slot, dw, db, counts):
    """The gradient before the activation of one step, into a slot of the ring, and its share of
    those of the weights if it counts."""
    one = splat(np.float32(1))
    for d in range(0, width, WIDTH):
        g = load(dy, to + d)
        if silu:
            acc = _filter_row(w, bias, width, source, at, stride, d, taps)
            s = sigmoid(acc)
            g = g * s * (one + acc * (one - s))
        store(ring, slot + d, g)
        if counts:
            store(db, d, load(db, d) + g)
            for i in range(taps):
                k = (taps - 1 - i) * width + d
                store(dw, k, load(dw, k) + g * load(source, at - i * stride + d))


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward_rows(x, xs, weight, bias, state, silu, dy, dys, dx, dstate, dweight, dbias, shape,
                  marks):
    """`backward` for few taps, whole vectors and no reset; dweight: (B parts, K, D) and dbias:
    (B parts, D), zero at the call. The slopes of the last K steps lie in a ring of rows."""
    batch, length, width = shape
    taps = len(marks)
    back = taps - 1
    parts = (length + PART - 1) // PART
    w = weight.reshape(-1)
    for task in numba.prange(batch * parts):
        row, t0 = task // parts, task % parts * PART
        end = min(t0 + PART, length)
        first = min(back, length) if t0 == 0 else 0
        early = _early(x, xs, state, row, first, back if t0 == 0 else 0, width)
        ring = np.zeros(taps * width, np.float32)
        dw, db = dweight[task].reshape(-1), dbias[task]
        for t in range(t0, end + back):
            slot = t % taps * width
            at, to = row * xs[0] + t * xs[1], row * dys[0] + t * dys[1]
            if t >= length:
                ring[slot:slot + width] = np.float32(0)
            elif t < back:
                _slope_row(w, bias, width, early, (back + t) * width, width, dy, to, silu, taps,
                           ring, slot, dw, db, t < end)
            else:
                _slope_row(w, bias, width, x, at, xs[1], dy, to, silu, taps, ring, slot, dw, db,
                           t < end)
            s = t - back  # the input whose last output this was
            if s < t0 and t0 > 0:
                continue
            for d in range(0, width, WIDTH):
                acc = splat(np.float32(0))
                for i in range(taps):
                    acc = acc + (load(ring, (s + i) % taps * width + d)
                                 * load(w, (back - i) * width + d))
                if s < 0:
                    store(dstate, (row * back + t) * width + d, acc)
                else:
                    store(dx, (row * length + s) * width + d, acc)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reach: Tensor | None, *,
         silu: bool, threads: int) -> Tensor:
    """y (B, T, D); x dense in its last dimension, state contiguous (B, K-1, D) float32."""
    y = torch.empty(x.shape, dtype=x.dtype)
    marks = (0,) * weight.shape[1]
    if _by_rows(x, weight, reach):
        forward_rows(*_line(x), *_padded(weight, bias), flat(state), silu, flat(y),
                     tuple(x.shape), marks)
        return y
    forward(*_line(x), *_padded(weight, bias), flat(state), _array(reach), silu, flat(y),
            tuple(x.shape), shares(x.shape[0], -(-x.shape[2] // WIDTH), threads), marks)
    return y


def conv_gradient(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
                  reach: Tensor | None, dy: Tensor, *, silu: bool, threads: int,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, given that of y."""
    batch, length, width = x.shape
    w, b = _padded(weight, bias)
    dx, dstate = torch.empty(x.shape, dtype=x.dtype), torch.zeros(state.shape)
    marks = (0,) * weight.shape[1]
    if _by_rows(x, weight, reach):
        tasks = batch * -(-length // PART)
        dw, db = torch.zeros(tasks, *w.shape), torch.zeros(tasks, width)
        backward_rows(*_line(x), w, b, flat(state), silu, *_line(dy), flat(dx), flat(dstate),
                      dw.numpy(), db.numpy(), tuple(x.shape), marks)
        return dx, dw.sum(0).T, db.sum(0), dstate
    dw, db = torch.zeros(batch, *w.shape), torch.zeros(batch, *b.shape)
    backward(*_line(x), w, b, flat(state), _array(reach), silu, *_line(dy), flat(dx),
             flat(dstate), dw.numpy(), db.numpy(), tuple(x.shape),
             shares(x.shape[0], -(-x.shape[2] // WIDTH), threads), marks)
    return dx, dw.sum(0)[:, :width].T, db.sum(0)[:width], dstate


def _padded(weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights as (K, D padded to whole vectors) and bias (padded D,), zero where there is none."""
    more = -weight.shape[0] % WIDTH
    w = F.pad(weight.detach().float().T, (0, more)).contiguous()
    b = w.new_zeros(w.shape[1]) if bias is None else F.pad(bias.detach().float(), (0, more))
    return w.numpy(), b.numpy()


def _by_rows(x: Tensor, weight: Tensor, reach: Tensor | None) -> bool:
    return reach is None and x.shape[2] % WIDTH == 0 and weight.shape[1] <= FEW


def _line(x: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    return flat(x), (x.stride(0), x.stride(1))


def _array(reach: Tensor | None) -> np.ndarray | None:
    return None if reach is None else reach.numpy()
