"""The selective scan and its gradient for the CPU, never holding (batch, length, channels, N).

Sixteen channels at a time in one vector, so that B_t and C_t are scalars to the inner loop and no
sum over lanes is needed there. The forward pass keeps the state only at the start of every chunk
of CHUNK steps; the backward pass recomputes the states of one chunk in scratch memory that stays
in the second-level cache, and walks it in reverse. Work is shared out as (row, group of
channels); sums over channels go to buffers of one group each, added up afterwards in a fixed
order, so results do not depend on timing.

Layout inside: arrays are flat and indexed with strides; a = A log2(e) is (N, D) with D padded
to whole vectors, states are (N, D padded).
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
    exp2,
    flat,
    get,
    load,
    marks,
    pack,
    shares,
    sigmoid,
    softplus,
    splat,
    store,
    total,
    unpack,
)

CHUNK = 32
LN2 = np.float32(0.6931471805599453)


@numba.njit(fastmath=FAST, inline="always")
def _gather(source, at, stride, steps, n, target):
    """`steps` rows of n numbers, one behind the other as float32."""
    for t in range(steps):
        for j in range(n):
            target[t * n + j] = get(source, at + t * stride + j)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def forward(x, xs, dt, dts, b, bs, c, cs, gate, gs, a, skip, bias, reset, states, starts, y,
            shape, groups):
    """y, the state after the last step (in `states`, which holds the first one at the call), and
    the state before each chunk (in `starts`, unless it is empty).

    x, dt, b, c, gate: flat arrays, with (batch, time) strides in xs, dts, bs, cs, gs; y: flat,
    contiguous; skip, bias: (padded D,); reset: (B, T) uint8; gate, bias and reset are empty where
    the operation has none; states: (B, N, padded D); starts: flat (B, chunks, N, padded D).
    """
    batch, length, width, n_state = shape
    padded = a.shape[1]
    vectors = padded // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        first, last = vectors * group // groups, vectors * (group + 1) // groups
        pdt = np.empty(CHUNK * WIDTH, np.float32)
        px = np.empty(CHUNK * WIDTH, np.float32)
        py = np.empty(CHUNK * WIDTH, np.float32)
        pz = np.empty(CHUNK * WIDTH, np.float32)
        pb = np.empty(CHUNK * n_state, np.float32)
        pc = np.empty(CHUNK * n_state, np.float32)
        h = states[row].reshape(-1)
        af = a.reshape(-1)
        for k in range(chunks):
            t0 = k * CHUNK
            steps = min(CHUNK, length - t0)
            _gather(b, row * bs[0] + t0 * bs[1], bs[1], steps, n_state, pb)
            _gather(c, row * cs[0] + t0 * cs[1], cs[1], steps, n_state, pc)
            for v in range(first, last):
                used = min(WIDTH, width - v * WIDTH)
                col = v * WIDTH
                pack(x, row * xs[0] + t0 * xs[1] + col, xs[1], steps, used, px, 0)
                pack(dt, row * dts[0] + t0 * dts[1] + col, dts[1], steps, used, pdt, 0)
                if bias.shape[0] > 0:
                    for t in range(steps):
                        store(pdt, t * WIDTH, softplus(load(pdt, t * WIDTH) + load(bias, col)))
                if starts.shape[0] > 0:
                    for n in range(n_state):
                        store(starts, ((row * chunks + k) * n_state + n) * padded + col,
                              load(h, n * padded + col))
                d_skip = load(skip, col)
                for t in range(steps):
                    if reset.shape[0] > 0 and reset[row, t0 + t]:
                        for n in range(n_state):
                            store(h, n * padded + col, splat(np.float32(0)))
                    xt, dtt = load(px, t * WIDTH), load(pdt, t * WIDTH)
                    u = xt * dtt
                    acc = xt * d_skip
                    for n in range(n_state):
                        at = n * padded + col
                        state = (exp2(dtt * load(af, at)) * load(h, at)
                                 + u * splat(pb[t * n_state + n]))
                        store(h, at, state)
                        acc = acc + splat(pc[t * n_state + n]) * state
                    store(py, t * WIDTH, acc)
                if gate.shape[0] > 0:
                    pack(gate, row * gs[0] + t0 * gs[1] + col, gs[1], steps, used, pz, 0)
                    for t in range(steps):
                        z = load(pz, t * WIDTH)
                        store(py, t * WIDTH, load(py, t * WIDTH) * z * sigmoid(z))
                unpack(py, 0, steps, used, y, (row * length + t0) * width + col, width)


@numba.njit(fastmath=FAST, parallel=True, cache=True)
def backward(x, xs, dt, dts, b, bs, c, cs, gate, gs, a, skip, bias, reset, starts, dy, dys,
             dstates, dx, ddt, db, dc, dgate, da, dskip, dbias, shape, groups):
    """Gradients. dstates: (B, N, padded D), the gradient of the last state at the call and of
    the first one afterwards; dx, ddt, dgate: flat, contiguous (B, T, D); db, dc: (groups, B, T,
    N); da: (B, N, padded D) of a; dskip, dbias: (B, padded D); these three zero at the call."""
    batch, length, width, n_state = shape
    padded = a.shape[1]
    vectors = padded // WIDTH
    chunks = (length + CHUNK - 1) // CHUNK
    for task in numba.prange(batch * groups):
        row, group = task // groups, task % groups
        first, last = vectors * group // groups, vectors * (group + 1) // groups
        pdt = np.empty(CHUNK * WIDTH, np.float32)
        px = np.empty(CHUNK * WIDTH, np.float32)
        pdy = np.empty(CHUNK * WIDTH, np.float32)
        pz = np.empty(CHUNK * WIDTH, np.float32)  # the gate, then its gradient
        slope = np.empty(CHUNK * WIDTH, np.float32)  # of softplus
        pb = np.empty(CHUNK * n_state, np.float32)
        pc = np.empty(CHUNK * n_state, np.float32)
        line = n_state * WIDTH
        h = np.empty((CHUNK + 1) * line, np.float32)  # row t: the state before step t
        e = np.empty(CHUNK * line, np.float32)
        sum_b = np.empty(CHUNK * line, np.float32)
        sum_c = np.empty(CHUNK * line, np.float32)
        g = dstates[row].reshape(-1)
        af = a.reshape(-1)
        daf = da[row].reshape(-1)
        dskipf, dbiasf = dskip[row], dbias[row]
        zero, one = splat(np.float32(0)), splat(np.float32(1))
        for k in range(chunks - 1, -1, -1):
            t0 = k * CHUNK
            steps = min(CHUNK, length - t0)
            _gather(b, row * bs[0] + t0 * bs[1], bs[1], steps, n_state, pb)
            _gather(c, row * cs[0] + t0 * cs[1], cs[1], steps, n_state, pc)
            for i in range(steps * n_state):
                store(sum_b, i * WIDTH, zero)
                store(sum_c, i * WIDTH, zero)
            for v in range(first, last):
                used = min(WIDTH, width - v * WIDTH)
                col = v * WIDTH
                pack(x, row * xs[0] + t0 * xs[1] + col, xs[1], steps, used, px, 0)
                pack(dt, row * dts[0] + t0 * dts[1] + col, dts[1], steps, used, pdt, 0)
                pack(dy, row * dys[0] + t0 * dys[1] + col, dys[1], steps, used, pdy, 0)
                if bias.shape[0] > 0:
                    for t in range(steps):
                        raw = load(pdt, t * WIDTH) + load(bias, col)
                        store(slope, t * WIDTH, sigmoid(raw))
                        store(pdt, t * WIDTH, softplus(raw))
                if gate.shape[0] > 0:
                    pack(gate, row * gs[0] + t0 * gs[1] + col, gs[1], steps, used, pz, 0)
                    for t in range(steps):
                        z, out = load(pz, t * WIDTH), load(pdy, t * WIDTH)
                        s = sigmoid(z)
                        store(pdy, t * WIDTH, out * z * s)
                        store(pz, t * WIDTH, out * s * (one + z * (one - s)))
                for n in range(n_state):
                    store(h, n * WIDTH,
                          load(starts, ((row * chunks + k) * n_state + n) * padded + col))
                for t in range(steps):
                    dtt = load(pdt, t * WIDTH)
                    u = load(px, t * WIDTH) * dtt
                    restart = reset.shape[0] > 0 and reset[row, t0 + t] != 0
                    for n in range(n_state):
                        at = t * line + n * WIDTH
                        decay = zero if restart else exp2(dtt * load(af, n * padded + col))
                        store(e, at, decay)
                        store(h, at + line, decay * load(h, at) + u * splat(pb[t * n_state + n]))
                d_skip = load(skip, col)
                dskip_sum, dbias_sum = load(dskipf, col), load(dbiasf, col)
                for t in range(steps - 1, -1, -1):
                    xt, dtt, dyt = load(px, t * WIDTH), load(pdt, t * WIDTH), load(pdy, t * WIDTH)
                    u = xt * dtt
                    y = xt * d_skip
                    du, rate = zero, zero  # gradients of dt x, and of dt through the decay
                    for n in range(n_state):
                        at, here = t * line + n * WIDTH, n * padded + col
                        i = t * n_state + n
                        state, ct = load(h, at + line), splat(pc[i])
                        y = y + ct * state
                        gt = load(g, here) + ct * dyt
                        store(sum_c, i * WIDTH, load(sum_c, i * WIDTH) + dyt * state)
                        store(sum_b, i * WIDTH, load(sum_b, i * WIDTH) + gt * u)
                        du = du + gt * splat(pb[i])
                        ge = gt * load(e, at)
                        store(g, here, ge)
                        w = ge * load(h, at)
                        rate = rate + w * load(af, here)
                        store(daf, here, load(daf, here) + w * dtt)
                    ddtt = rate * splat(LN2) + du * xt
                    if bias.shape[0] > 0:
                        ddtt = ddtt * load(slope, t * WIDTH)
                        dbias_sum = dbias_sum + ddtt
                    if gate.shape[0] > 0:
                        store(pz, t * WIDTH, load(pz, t * WIDTH) * y)
                    store(pdt, t * WIDTH, ddtt)
                    store(px, t * WIDTH, du * dtt + d_skip * dyt)
                    dskip_sum = dskip_sum + xt * dyt
                store(dskipf, col, dskip_sum)
                store(dbiasf, col, dbias_sum)
                to = (row * length + t0) * width + col
                unpack(px, 0, steps, used, dx, to, width)
                unpack(pdt, 0, steps, used, ddt, to, width)
                if gate.shape[0] > 0:
                    unpack(pz, 0, steps, used, dgate, to, width)
            for t in range(steps):
                for n in range(n_state):
                    i = (t * n_state + n) * WIDTH
                    db[group, row, t0 + t, n] = total(load(sum_b, i))
                    dc[group, row, t0 + t, n] = total(load(sum_c, i))


def scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, gate: Tensor | None, A: Tensor,
         D: Tensor | None, bias: Tensor | None, h: Tensor, reset: Tensor | None, *,
         training: bool, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), the last state (B, D, N), and the states that the gradient needs.

    Arguments as in the operation, dense in their last dimension; float32 or bfloat16.
    """
    batch, length, width = x.shape
    n = A.shape[1]
    a, skip, shift = _padded(A, D, bias)
    padded = a.shape[1]
    states = F.pad(h.detach().transpose(1, 2), (0, padded - width)).contiguous()
    chunks = (length + CHUNK - 1) // CHUNK
    starts = torch.empty(batch * chunks * n * padded if training else 0)
    y = torch.empty(batch, length, width, dtype=x.dtype)
    forward(*_lines(x, dt, b, c, gate), a.numpy(), skip.numpy(), shift.numpy(), marks(reset),
            states.numpy(), starts.numpy(), flat(y), (batch, length, width, n),
            shares(batch, padded // WIDTH, threads))
    return y, states[:, :, :width].transpose(1, 2).contiguous(), starts


def scan_gradient(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, gate: Tensor | None, A: Tensor,
                  D: Tensor | None, bias: Tensor | None, reset: Tensor | None, starts: Tensor,
                  dy: Tensor, dstate: Tensor, *, threads: int) -> tuple[Tensor, ...]:
    """Gradients of x, dt, b, c, gate, A, D, bias and the first state."""
    batch, length, width = x.shape
    n = A.shape[1]
    a, skip, shift = _padded(A, D, bias)
    padded = a.shape[1]
    groups = shares(batch, padded // WIDTH, threads)
    g = F.pad(dstate.transpose(1, 2), (0, padded - width)).contiguous()
    dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=dt.dtype)
    dgate = torch.empty(x.shape if gate is not None else 0, dtype=x.dtype)
    db, dc = torch.empty(2, groups, batch, length, n)
    da, (dskip, dbias) = torch.zeros(batch, n, padded), torch.zeros(2, batch, padded)
    backward(*_lines(x, dt, b, c, gate), a.numpy(), skip.numpy(), shift.numpy(), marks(reset),
             starts.numpy(), *_line(dy), g.numpy(), flat(dx), flat(ddt), db.numpy(), dc.numpy(),
             flat(dgate), da.numpy(), dskip.numpy(), dbias.numpy(), (batch, length, width, n),
             groups)
    return (dx, ddt, db.sum(0), dc.sum(0), dgate, da.sum(0)[:, :width].T, dskip.sum(0)[:width],
            dbias.sum(0)[:width], g[:, :, :width].transpose(1, 2))


def _padded(A: Tensor, D: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A log2(e) as (N, D padded to whole vectors), skip weights and bias (D padded)."""
    more = -A.shape[0] % WIDTH
    a = F.pad(A.detach().float().T * math.log2(math.e), (0, more)).contiguous()
    skip = a.new_zeros(a.shape[1]) if D is None else F.pad(D.detach().float(), (0, more))
    return a, skip, a.new_empty(0) if bias is None else F.pad(bias.detach().float(), (0, more))


def _lines(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, gate: Tensor | None) -> tuple:
    none = x.new_empty(0, 0, 0) if gate is None else gate
    return (*_line(x), *_line(dt), *_line(b), *_line(c), *_line(none))


def _line(x: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    return flat(x), (x.stride(0), x.stride(1))
