"""The linear recurrence for the CPU: one pass over memory each way, in the order of memory.

Rows and groups of channels are shared out over the threads. Each walks over time, and at every
step over its vectors of sixteen channels, whose states stay in the first-level cache. The gradient
reads h_{t-1} from the outputs, so nothing is kept beside them.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from manyform.ops.kernels.lanes import FAST, WIDTH, flat, load, marks, shares, sigmoid, splat, store


@numba.njit(inline="always")
def _stretch(task, groups, vectors):
    """The row of a task, and where its group of channels begins and ends."""
    row, group = task // groups, task % groups
    return row, vectors * group // groups * WIDTH, vectors * (group + 1) // groups * WIDTH


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(a, sa, b, sb, reset, states, y, shape, groups):
    """a, b: flat, with (batch, time) strides in sa, sb; reset: (B, T) uint8 or empty; states: flat
    (B, D), the first ones at the call and the last ones afterwards; y: flat (B, T, D)."""
    batch, length, width = shape
    vectors = width // WIDTH
    for task in numba.prange(batch * groups):
        row, low, high = _stretch(task, groups, vectors)
        for t in range(length):
            cut = reset.shape[0] > 0 and reset[row, t] != 0
            at_a, at_b, at_y = row * sa[0] + t * sa[1], row * sb[0] + t * sb[1], row * length + t
            for j in range(low, high, WIDTH):
                h = load(b, at_b + j)
                if not cut:
                    h = load(a, at_a + j) * load(states, row * width + j) + h
                store(states, row * width + j, h)
                store(y, at_y * width + j, h)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(a, sa, y, first, reset, dy, sdy, dstates, da, db, shape, groups):
    """dstates: flat (B, D), the gradient of the last states at the call and of the first ones
    afterwards; da, db: flat (B, T, D)."""
    batch, length, width = shape
    vectors, zero = width // WIDTH, splat(np.float32(0))
    for task in numba.prange(batch * groups):
        row, low, high = _stretch(task, groups, vectors)
        for t in range(length - 1, -1, -1):
            cut = reset.shape[0] > 0 and reset[row, t] != 0
            at_a, at_dy = row * sa[0] + t * sa[1], row * sdy[0] + t * sdy[1]
            at = (row * length + t) * width
            for j in range(low, high, WIDTH):
                g = load(dy, at_dy + j) + load(dstates, row * width + j)
                store(db, at + j, g)
                if cut:
                    store(da, at + j, zero)
                    store(dstates, row * width + j, zero)
                else:
                    if t > 0:
                        before = load(y, at - width + j)
                    else:
                        before = load(first, row * width + j)
                    store(da, at + j, g * before)
                    store(dstates, row * width + j, g * load(a, at_a + j))


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward_gated(keep, sk, value, sv, reset, states, y, shape, groups):
    """As `forward`, with a = sigmoid(keep) and b = (1 - a) value."""
    batch, length, width = shape
    vectors, one = width // WIDTH, splat(np.float32(1))
    for task in numba.prange(batch * groups):
        row, low, high = _stretch(task, groups, vectors)
        for t in range(length):
            cut = reset.shape[0] > 0 and reset[row, t] != 0
            at_k, at_v, at_y = row * sk[0] + t * sk[1], row * sv[0] + t * sv[1], row * length + t
            for j in range(low, high, WIDTH):
                s = sigmoid(load(keep, at_k + j))
                h = (one - s) * load(value, at_v + j)
                if not cut:
                    h = s * load(states, row * width + j) + h
                store(states, row * width + j, h)
                store(y, at_y * width + j, h)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward_gated(keep, sk, value, sv, y, first, reset, dy, sdy, dstates, dkeep, dvalue, shape,
                   groups):
    """As `backward`, for keep and value."""
    batch, length, width = shape
    vectors, zero, one = width // WIDTH, splat(np.float32(0)), splat(np.float32(1))
    for task in numba.prange(batch * groups):
        row, low, high = _stretch(task, groups, vectors)
        for t in range(length - 1, -1, -1):
            cut = reset.shape[0] > 0 and reset[row, t] != 0
            at_k, at_v = row * sk[0] + t * sk[1], row * sv[0] + t * sv[1]
            at_dy, at = row * sdy[0] + t * sdy[1], (row * length + t) * width
            for j in range(low, high, WIDTH):
                s = sigmoid(load(keep, at_k + j))
                g = load(dy, at_dy + j) + load(dstates, row * width + j)
                change, carried = zero - load(value, at_v + j), zero
                if not cut:
                    carried = g * s
                    if t > 0:
                        change = change + load(y, at - width + j)
                    else:
                        change = change + load(first, row * width + j)
                store(dkeep, at + j, g * change * s * (one - s))
                store(dvalue, at + j, g * (one - s))
                store(dstates, row * width + j, carried)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward_complex(a, b, sb, reset, states, y, shape, groups):
    """a: (2 N,); states: flat (B, 2 N); y: flat (B, T, 2 N); each real parts first."""
    batch, length, width = shape
    half = width // 2
    vectors = half // WIDTH
    for task in numba.prange(batch * groups):
        row, low, high = _stretch(task, groups, vectors)
        for t in range(length):
            cut = reset.shape[0] > 0 and reset[row, t] != 0
            at_b, at_y, at_h = row * sb[0] + t * sb[1], (row * length + t) * width, row * width
            for j in range(low, high, WIDTH):
                re, im = load(b, at_b + j), load(b, at_b + half + j)
                if not cut:
                    a_re, a_im = load(a, j), load(a, half + j)
                    old_re, old_im = load(states, at_h + j), load(states, at_h + half + j)
                    re = re + a_re * old_re - a_im * old_im
                    im = im + a_re * old_im + a_im * old_re
                store(states, at_h + j, re)
                store(states, at_h + half + j, im)
                store(y, at_y + j, re)
                store(y, at_y + half + j, im)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward_complex(a, y, first, reset, dy, sdy, dstates, da, db, shape, groups):
    """da: flat (B, 2 N), zero at the call; the others as for real decays."""
    batch, length, width = shape
    half = width // 2
    vectors, zero = half // WIDTH, splat(np.float32(0))
    for task in numba.prange(batch * groups):
        row, low, high = _stretch(task, groups, vectors)
        for t in range(length - 1, -1, -1):
            cut = reset.shape[0] > 0 and reset[row, t] != 0
            at_dy, at, at_h = row * sdy[0] + t * sdy[1], (row * length + t) * width, row * width
            for j in range(low, high, WIDTH):
                k = half + j
                re = load(dy, at_dy + j) + load(dstates, at_h + j)
                im = load(dy, at_dy + k) + load(dstates, at_h + k)
                store(db, at + j, re)
                store(db, at + k, im)
                if cut:
                    store(dstates, at_h + j, zero)
                    store(dstates, at_h + k, zero)
                else:
                    if t > 0:
                        h_re, h_im = load(y, at - width + j), load(y, at - width + k)
                    else:
                        h_re, h_im = load(first, at_h + j), load(first, at_h + k)
                    a_re, a_im = load(a, j), load(a, k)
                    store(da, at_h + j, load(da, at_h + j) + re * h_re + im * h_im)
                    store(da, at_h + k, load(da, at_h + k) + im * h_re - re * h_im)
                    store(dstates, at_h + j, a_re * re + a_im * im)
                    store(dstates, at_h + k, a_re * im - a_im * re)


def scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, threads: int,
         ) -> tuple[Tensor, Tensor]:
    """All states (B, T, D) in the dtype of b, and the last one; arguments as in the operation,
    dense in their last dimension, D a multiple of sixteen."""
    y, states = torch.empty(b.shape, dtype=b.dtype), _copy(h)
    forward(flat(a), a.stride()[:2], flat(b), b.stride()[:2], marks(reset), flat(states), flat(y),
            tuple(b.shape), shares(b.shape[0], b.shape[2] // WIDTH, threads))
    return y, states


def scan_gradient(a: Tensor, y: Tensor, h: Tensor, reset: Tensor | None, dy: Tensor,
                  dlast: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the first state."""
    da, db = torch.empty(a.shape, dtype=a.dtype), torch.empty(y.shape, dtype=y.dtype)
    dstates = _copy(dlast)
    backward(flat(a), a.stride()[:2], flat(y), flat(h.contiguous()), marks(reset), flat(dy),
             dy.stride()[:2], flat(dstates), flat(da), flat(db), tuple(y.shape),
             shares(y.shape[0], y.shape[2] // WIDTH, threads))
    return da, db, dstates


def gated_scan(keep: Tensor, value: Tensor, h: Tensor, reset: Tensor | None, threads: int,
               ) -> tuple[Tensor, Tensor]:
    """The same for a = sigmoid(keep) and b = (1 - a) value."""
    y, states = torch.empty(value.shape, dtype=value.dtype), _copy(h)
    forward_gated(flat(keep), keep.stride()[:2], flat(value), value.stride()[:2], marks(reset),
                  flat(states), flat(y), tuple(value.shape),
                  shares(value.shape[0], value.shape[2] // WIDTH, threads))
    return y, states


def gated_gradient(keep: Tensor, value: Tensor, y: Tensor, h: Tensor, reset: Tensor | None,
                   dy: Tensor, dlast: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keep, value and the first state."""
    dkeep, dvalue = torch.empty(y.shape, dtype=keep.dtype), torch.empty(y.shape, dtype=y.dtype)
    dstates = _copy(dlast)
    backward_gated(flat(keep), keep.stride()[:2], flat(value), value.stride()[:2], flat(y),
                   flat(h.contiguous()), marks(reset), flat(dy), dy.stride()[:2], flat(dstates),
                   flat(dkeep), flat(dvalue), tuple(y.shape),
                   shares(y.shape[0], y.shape[2] // WIDTH, threads))
    return dkeep, dvalue, dstates


def complex_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, threads: int,
                 ) -> tuple[Tensor, Tensor]:
    """The same for a constant complex a."""
    y, states = torch.empty(b.shape, dtype=b.dtype), _copy(h)
    forward_complex(flat(a), flat(b), b.stride()[:2], marks(reset), flat(states), flat(y),
                    tuple(b.shape), shares(b.shape[0], b.shape[2] // 2 // WIDTH, threads))
    return y, states


def complex_gradient(a: Tensor, y: Tensor, h: Tensor, reset: Tensor | None, dy: Tensor,
                     dlast: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the first state."""
    da, db = torch.zeros(h.shape), torch.empty(y.shape, dtype=y.dtype)
    dstates = _copy(dlast)
    backward_complex(flat(a), flat(y), flat(h.contiguous()), marks(reset), flat(dy),
                     dy.stride()[:2], flat(dstates), flat(da), flat(db), tuple(y.shape),
                     shares(y.shape[0], y.shape[2] // 2 // WIDTH, threads))
    return da.sum(0), db, dstates


def _copy(h: Tensor) -> Tensor:
    return h.detach().clone(memory_format=torch.contiguous_format)
