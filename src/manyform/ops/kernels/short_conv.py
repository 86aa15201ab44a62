"""The short convolution and its gradient for the CPU, in one pass over memory each way.

Work is shared out as (row, group of channels). A task walks through time in blocks; for each
vector of channels a block lies in scratch memory together with the K-1 steps before it (and, going
back, the K-1 steps after it), so that taps are plain neighbours there. `reach` says how many taps
back a step may look, which is where resets enter.
"""

from __future__ import annotations

import math

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
    sigmoid,
    splat,
    store,
    unpack,
)

BLOCK = 64


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


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(x, xs, weight, bias, state, reach, silu, y, shape, groups):
    """x: flat with (batch, time) strides xs; weight: (K, padded D); bias: (padded D,); state: flat
    (B, K-1, D); reach: (B, T) int64 or empty; y: flat (B, T, D)."""
    batch, length, width = shape
    taps, padded = weight.shape
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
                    near = min(back, reach[row, t0 + t]) if reach.shape[0] > 0 else back
                    acc = load(bias, col)
                    for i in range(near + 1):
                        acc = acc + (load(w, (back - i) * padded + col)
                                     * load(window, (t + back - i) * WIDTH))
                    store(out, t * WIDTH, acc * sigmoid(acc) if silu else acc)
                unpack(out, 0, steps, used, y, (row * length + t0) * width + col, width)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(x, xs, weight, bias, state, reach, silu, dy, dys, dx, dstate, dweight, dbias, shape,
             groups):
    """dx: flat (B, T, D), dstate: flat (B, K-1, D), dweight: (B, K, padded D) and dbias:
    (B, padded D), the last three zero at the call."""
    batch, length, width = shape
    taps, padded = weight.shape
    back = taps - 1
    vectors = padded // WIDTH
    w = weight.reshape(-1)
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        window = np.empty((BLOCK + 2 * back) * WIDTH, np.float32)
        slope = np.empty((BLOCK + back) * WIDTH, np.float32)  # gradient before the activation
        grad = np.empty((BLOCK + back) * WIDTH, np.float32)  # gradient of the window
        dw, db = dweight[row].reshape(-1), dbias[row]
        for t0 in range(0, length, BLOCK):
            steps = min(BLOCK, length - t0)
            ahead = min(steps + back, length - t0)  # outputs that this block's inputs reach
            for v in range(vectors * group // groups, vectors * (group + 1) // groups):
                col = v * WIDTH
                used = min(WIDTH, width - col)
                _window(x, xs, state, row, t0, ahead, back, width, col, used, window)
                pack(dy, row * dys[0] + t0 * dys[1] + col, dys[1], ahead, used, slope, 0)
                for t in range(ahead):
                    g = load(slope, t * WIDTH)
                    if silu:
                        near = min(back, reach[row, t0 + t]) if reach.shape[0] > 0 else back
                        acc = load(bias, col)
                        for i in range(near + 1):
                            acc = acc + (load(w, (back - i) * padded + col)
                                         * load(window, (t + back - i) * WIDTH))
                        s = sigmoid(acc)
                        g = g * s * (one + acc * (one - s))
                        store(slope, t * WIDTH, g)
                    if t < steps:
                        store(db, col, load(db, col) + g)
                for i in range(taps):
                    k = (back - i) * padded + col
                    acc = load(dw, k)
                    for t in range(steps):
                        if reach.shape[0] == 0 or reach[row, t0 + t] >= i:
                            acc = acc + load(slope, t * WIDTH) * load(window,
                                                                      (t + back - i) * WIDTH)
                    store(dw, k, acc)
                for p in range(0 if t0 == 0 else back, steps + back):  # input t0 + p - back
                    acc = zero
                    for i in range(max(0, back - p), min(taps, ahead + back - p)):
                        t = p - back + i
                        if reach.shape[0] == 0 or reach[row, t0 + t] >= i:
                            acc = acc + load(slope, t * WIDTH) * load(w, (back - i) * padded + col)
                    store(grad, p * WIDTH, acc)
                if t0 == 0:
                    unpack(grad, 0, back, used, dstate, row * back * width + col, width)
                unpack(grad, back * WIDTH, steps, used, dx, (row * length + t0) * width + col,
                       width)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reach: Tensor | None, *,
         silu: bool, threads: int) -> Tensor:
    """y (B, T, D); x dense in its last dimension, state contiguous (B, K-1, D) float32."""
    y = torch.empty(x.shape, dtype=x.dtype)
    forward(*_line(x), *_padded(weight, bias), flat(state), _array(reach), silu, flat(y),
            tuple(x.shape), _groups(x, threads))
    return y


def conv_gradient(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
                  reach: Tensor | None, dy: Tensor, *, silu: bool, threads: int,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, given that of y."""
    batch, _, width = x.shape
    w, b = _padded(weight, bias)
    dx, dstate = torch.empty(x.shape, dtype=x.dtype), torch.zeros(state.shape)
    dw, db = torch.zeros(batch, *w.shape), torch.zeros(batch, *b.shape)
    backward(*_line(x), w, b, flat(state), _array(reach), silu, *_line(dy), flat(dx),
             flat(dstate), dw.numpy(), db.numpy(), tuple(x.shape), _groups(x, threads))
    return dx, dw.sum(0)[:, :width].T, db.sum(0)[:width], dstate


def _padded(weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights as (K, D padded to whole vectors) and bias (padded D,), zero where there is none."""
    more = -weight.shape[0] % WIDTH
    w = F.pad(weight.detach().float().T, (0, more)).contiguous()
    b = w.new_zeros(w.shape[1]) if bias is None else F.pad(bias.detach().float(), (0, more))
    return w.numpy(), b.numpy()


def _line(x: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    return flat(x), (x.stride(0), x.stride(1))


def _array(reach: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), np.int64) if reach is None else reach.numpy()


def _groups(x: Tensor, threads: int) -> int:
    """Groups of channels, so that rows times groups share out evenly over the threads."""
    return min(threads // math.gcd(x.shape[0], threads), -(-x.shape[2] // WIDTH))
