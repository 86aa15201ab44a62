"""WKV of RWKV-4 and its gradient for the CPU.

Sixteen channels a vector; rows and groups of channels are shared out over the threads. The forward
pass keeps the two sums only at the start of every chunk of CHUNK steps; the backward pass
recomputes them within a chunk and walks it in reverse. Exponents are in base 2 inside, and every
sum (values, weights, and the gradients of both) is kept divided by its largest term.

The gradient. With s = dy / (B_{t-1} + e^{u+k}) and f = s e^{u+k} (v - y), GA and GB the gradients
of A_t and B_t:
    dv = s e^{u+k} + e^k GA      dk = f + e^k (GA v + GB)      du = sum f
    dw = sum e^w (GA A_{t-1} + GB B_{t-1})      GA' = s + e^w GA      GB' = -s y + e^w GB
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    exp2,
    flat,
    load,
    marks,
    maximum,
    shares,
    splat,
    store,
)

CHUNK = 32
LOG2E = np.float32(1.4426950408889634)
NOTHING = np.float32(-1.4e38)  # the operation's -1e38, in base 2


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(k, v, decay, first, reset, sums, starts, y, shape, groups):
    """k, v, y: flat (B, T, D); decay, first: (D,) in base 2; reset: (B, T) uint8 or empty; sums:
    flat (B, 3, D), num, den and exponent, updated; starts: flat (B, chunks, 3, D) or empty."""
    batch, length, width = shape
    vectors, chunks = width // WIDTH, (length + CHUNK - 1) // CHUNK
    zero, log2e = splat(np.float32(0)), splat(LOG2E)
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        low, high = vectors * group // groups * WIDTH, vectors * (group + 1) // groups * WIDTH
        for c in range(chunks):
            for j in range(low, high, WIDTH):
                at = row * 3 * width + j
                p, q, o = load(sums, at), load(sums, at + width), load(sums, at + 2 * width)
                if starts.shape[0] > 0:
                    to = (row * chunks + c) * 3 * width + j
                    store(starts, to, p)
                    store(starts, to + width, q)
                    store(starts, to + 2 * width, o)
                w, u = load(decay, j), load(first, j)
                for t in range(c * CHUNK, min(length, (c + 1) * CHUNK)):
                    if reset.shape[0] > 0 and reset[row, t] != 0:
                        p, q, o = zero, zero, splat(NOTHING)
                    i = (row * length + t) * width + j
                    key, value = load(k, i) * log2e, load(v, i)
                    top = maximum(u + key, o)
                    old, new = exp2(o - top), exp2(u + key - top)
                    store(y, i, (old * p + new * value) / (old * q + new))
                    top = maximum(key, o + w)
                    old, new = exp2(o + w - top), exp2(key - top)
                    p, q, o = old * p + new * value, old * q + new, top
                store(sums, at, p)
                store(sums, at + width, q)
                store(sums, at + 2 * width, o)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(k, v, decay, first, reset, starts, dy, dsums, dk, dv, dweights, shape, groups):
    """dsums: flat (B, 3, D), at the call the gradients of the last num and den and minus the last
    exponent, afterwards the gradients of the first num and den; dk, dv: flat (B, T, D); dweights:
    flat (B, 2, D), gradients of decay and first, zero at the call."""
    batch, length, width = shape
    vectors, chunks = width // WIDTH, (length + CHUNK - 1) // CHUNK
    zero, log2e = splat(np.float32(0)), splat(LOG2E)
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        low, high = vectors * group // groups * WIDTH, vectors * (group + 1) // groups * WIDTH
        before = np.empty(CHUNK * 3 * WIDTH, np.float32)
        for c in range(chunks - 1, -1, -1):
            t0 = c * CHUNK
            steps = min(CHUNK, length - t0)
            for j in range(low, high, WIDTH):
                to = (row * chunks + c) * 3 * width + j
                p, q, o = load(starts, to), load(starts, to + width), load(starts, to + 2 * width)
                o_first = o
                w, u = load(decay, j), load(first, j)
                for t in range(steps):
                    if reset.shape[0] > 0 and reset[row, t0 + t] != 0:
                        p, q, o = zero, zero, splat(NOTHING)
                    at = 3 * t * WIDTH
                    store(before, at, p)
                    store(before, at + WIDTH, q)
                    store(before, at + 2 * WIDTH, o)
                    i = (row * length + t0 + t) * width + j
                    key, value = load(k, i) * log2e, load(v, i)
                    top = maximum(key, o + w)
                    old, new = exp2(o + w - top), exp2(key - top)
                    p, q, o = old * p + new * value, old * q + new, top
                here = row * 3 * width + j
                gp, gq = load(dsums, here), load(dsums, here + width)
                go = load(dsums, here + 2 * width)
                to = row * 2 * width + j
                dw, du = load(dweights, to), load(dweights, to + width)
                for t in range(steps - 1, -1, -1):
                    at = 3 * t * WIDTH
                    p, q = load(before, at), load(before, at + WIDTH)
                    o = load(before, at + 2 * WIDTH)
                    i = (row * length + t0 + t) * width + j
                    key, value = load(k, i) * log2e, load(v, i)
                    top = maximum(u + key, o)
                    old, new = exp2(o - top), exp2(u + key - top)
                    below = old * q + new
                    y = (old * p + new * value) / below
                    s = load(dy, i) / below
                    f = s * new * (value - y)
                    later = exp2(key + go)
                    store(dv, i, s * new + later * gp)
                    store(dk, i, f + later * (gp * value + gq))
                    du = du + f
                    dw = dw + exp2(w + o + go) * (gp * p + gq * q)
                    if reset.shape[0] > 0 and reset[row, t0 + t] != 0:
                        gp, gq, go = zero, zero, splat(NOTHING)
                    else:
                        low_top = zero - top
                        new_go = maximum(low_top, go + w)
                        mine, kept = exp2(low_top - new_go), exp2(go + w - new_go)
                        gp, gq, go = mine * s + kept * gp, kept * gq - mine * s * y, new_go
                if c == 0:
                    scale = exp2(go + o_first)
                    gp, gq = gp * scale, gq * scale
                store(dsums, here, gp)
                store(dsums, here + width, gq)
                store(dsums, here + 2 * width, go)
                store(dweights, to, dw)
                store(dweights, to + width, du)


def average(k: Tensor, v: Tensor, decay: Tensor, first: Tensor, sums: tuple[Tensor, ...],
            reset: Tensor | None, training: bool, threads: int,
            ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """y (B, T, D), the sums (num, den, max) after the last step, and those that the gradient needs.

    Arguments as in the operation; k and v contiguous, float32 or bfloat16, D a multiple of 16.
    """
    batch, length, width = k.shape
    now = torch.stack([t.detach().float() for t in sums], dim=1)
    now[:, 2] *= float(LOG2E)
    starts = torch.empty(batch * -(-length // CHUNK) * 3 * width if training else 0)
    y = torch.empty(v.shape, dtype=v.dtype)
    forward(flat(k), flat(v), _base2(decay), _base2(first), marks(reset), flat(now), flat(starts),
            flat(y), (batch, length, width), shares(batch, width // WIDTH, threads))
    return y, (now[:, 0].clone(), now[:, 1].clone(), now[:, 2] / float(LOG2E)), starts


def average_gradient(k: Tensor, v: Tensor, decay: Tensor, first: Tensor, top: Tensor,
                     starts: Tensor, reset: Tensor | None, dy: Tensor, dnum: Tensor, dden: Tensor,
                     threads: int) -> tuple[Tensor, ...]:
    """Gradients of k, v, decay, first, and of num and den before the first step."""
    batch, length, width = k.shape
    dsums = torch.stack([dnum, dden, top * -float(LOG2E)], dim=1)
    dk, dv = torch.empty(k.shape, dtype=k.dtype), torch.empty(v.shape, dtype=v.dtype)
    dweights = torch.zeros(batch, 2, width)
    backward(flat(k), flat(v), _base2(decay), _base2(first), marks(reset), flat(starts), flat(dy),
             flat(dsums), flat(dk), flat(dv), flat(dweights), (batch, length, width),
             shares(batch, width // WIDTH, threads))
    ddecay, dfirst = dweights.sum(0)
    return dk, dv, ddecay, dfirst, dsums[:, 0], dsums[:, 1]


def _base2(x: Tensor) -> np.ndarray:
    return (x.detach().float() * float(LOG2E)).contiguous().numpy()
