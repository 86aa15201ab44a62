"""The diagonal state space model: a bank of damped oscillators a channel (DSS, S4D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.errors import ManyformError
from manyform.ops.kernels import dense, single, threads, usable
from manyform.ops.operation import operation

CHUNK = 64


def _flops(x: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None,
           state: Tensor | None = None, reset: Tensor | None = None) -> int:
    # Six real multiply-adds update a complex state, two read it.
    return x.numel() * (16 * a.shape[1] + (2 if skip is not None else 0))


@operation(flops=_flops)
def diagonal_ssm(x: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None,
                 state: Tensor | None = None, reset: Tensor | None = None,
                 ) -> tuple[Tensor, Tensor]:
    """h_t = a h_{t-1} + b x_t,   y_t = 2 Re(sum_n c_n h_{t,n}) + skip x_t, each channel by itself.

    Gu 2022 ("On the Parameterization and Initialization of Diagonal State Space Models", eq. 1
    to 5): half of the conjugate pairs of a real system, hence twice the real part. Equally a
    convolution with `diagonal_kernel(a, b, c, length)`.

    x: (B, T, D); a, b, c: (D, N) complex, |a| <= 1; skip: (D,) or None; state: (B, D, N, 2), real
    and imaginary part, or None (zeros); reset: (B, T) bool, true where h_{t-1} is forgotten.
    Returns y: (B, T, D) in the dtype of x, and h after the last step as (B, D, N, 2) in float32
    (float64 for float64 input).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_ = x.to(wide)
    h = _start(x_, a, state)
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], torch.zeros_like(h), h)
        h = a * h + b * x_[:, t, :, None]
        ys.append(2 * (c * h).real.sum(-1))
    y = torch.stack(ys, dim=1)
    if skip is not None:
        y = y + skip * x_
    return y.to(x.dtype), torch.view_as_real(h)


def _start(x: Tensor, a: Tensor, state: Tensor | None) -> Tensor:
    """The state before the first step, (B, D, N) complex."""
    kind = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    if state is None:
        return a.new_zeros(x.shape[0], *a.shape, dtype=kind)
    if state.shape != (x.shape[0], *a.shape, 2):
        raise ManyformError(f"the state of this call must be {(x.shape[0], *a.shape, 2)}, not "
                            f"{tuple(state.shape)}")
    return torch.view_as_complex(state.contiguous()).to(kind)


def powers(a: Tensor, count: int) -> Tensor:
    """a^0, a^1, ..., a^(count - 1) on a new last dimension, by doubling.

    Doubling rounds log2(count) times; exp(l log a) would lose digits of the phase as l grows.
    """
    table = torch.ones_like(a)[..., None]
    while table.shape[-1] < count:
        table = torch.cat([table, table * (table[..., -1:] * a[..., None])], dim=-1)
    return table[..., :count]


def diagonal_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """K_l = 2 Re(sum_n c_n a_n^l b_n) for l < length (Gu 2022, eq. 5): (D, N) -> (D, length) real.

    The Vandermonde product in two levels, l = i m + j: powers a^j and a^{im} are tables of about
    sqrt(length) columns, so nothing of D x N x length is ever held.
    """
    m = max(1, round(length ** 0.5))
    rows = -(-length // m)
    fine = powers(a, m + 1)
    coarse = powers(fine[..., m], rows) * (c * b)[..., None]
    left = torch.cat([coarse.real, -coarse.imag], dim=1).transpose(1, 2)
    right = torch.cat([fine.real, fine.imag], dim=1)[..., :m]
    with torch.autocast(a.device.type, enabled=False):
        return 2 * torch.bmm(left, right).reshape(a.shape[0], rows * m)[:, :length]


@diagonal_ssm.path("chunked", when=lambda x, *_, **__: x.shape[1] > 4)
def _chunked(x: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None,
             state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Matrix products alone: inside a chunk the convolution as a Toeplitz matrix, between chunks
    the state, whose steps from chunk to chunk are the only loop.

    Documents are laid out to begin with a chunk of their own, zeros behind their last token; a
    reset then only cuts the link between two chunks, exactly.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, d = x.shape
    size, n = min(CHUNK, length), a.shape[1]
    slots: Tensor | None = None
    if reset is None:
        count, fresh = -(-length // size), None
        padded = F.pad(x, (0, 0, 0, count * size - length))
        last_chunk = torch.full((batch,), count - 1, device=x.device)
        last_length = torch.full((batch,), length - (count - 1) * size, device=x.device)
    else:
        slots, fresh = _align(reset, size)
        count = fresh.shape[1]
        padded = x.new_zeros(batch, count * size, d).scatter(
            1, slots[..., None].expand(-1, -1, d), x)
        last_chunk, last_length = slots[:, -1] // size, slots[:, -1] % size + 1

    with torch.autocast(x.device.type, enabled=False):
        table = powers(a, size + 1)
        kernel = 2 * ((c * b)[..., None] * table[..., :size]).real.sum(1)
        if skip is not None:
            kernel = torch.cat([kernel[:, :1] + skip[:, None], kernel[:, 1:]], dim=1)
        # toeplitz[d, j, i] = K[i - j]; write[d, j] = b a^(size-1-j); read[d, :, i] = 2 c a^(i+1).
        toeplitz = F.pad(kernel, (size - 1, 0)).unfold(1, size, 1).flip(1)
        write = torch.view_as_real((b[..., None] * table[..., :size].flip(-1)).transpose(1, 2)
                                   .contiguous()).flatten(2)
        read = torch.view_as_real((2 * c[..., None] * table[..., 1:]).conj().resolve_conj()
                                  .transpose(1, 2).contiguous()).flatten(2).transpose(1, 2)

        chunks = _Turn.apply(padded.to(wide).view(-1, d)).view(d, batch * count, size)
        written = (chunks @ write).view(d, batch, count, n, 2)
        before = _ChunkScan.apply(table[..., size], torch.view_as_complex(written),
                                  _start(x, a, state).transpose(0, 1), fresh)
        flat = torch.view_as_real(before).view(d, batch * count, 2 * n)
        y = torch.baddbmm(chunks @ toeplitz, flat, read)
        y = _Turn.apply(y.view(d, -1)).view(batch, count * size, d).to(x.dtype)

        # The last chunk may be short: its tokens, moved to the chunk's end, are written alone.
        rows = torch.arange(batch, device=x.device)
        steps = torch.arange(size, device=x.device) - (size - last_length)[:, None]
        tail = chunks.view(d, batch, count, size)[:, rows, last_chunk]
        tail = torch.where(steps >= 0, tail.gather(2, steps.clamp(min=0).expand(d, -1, -1)), 0)
        decay = table[..., last_length].permute(0, 2, 1)
        final = (torch.view_as_complex((tail @ write).view(d, batch, n, 2))
                 + decay * before[:, rows, last_chunk])
    if slots is None:
        y = y[:, :length]
    else:
        y = y.gather(1, slots[..., None].expand(-1, -1, d))
    return y.contiguous(), torch.view_as_real(final.transpose(0, 1).contiguous())


def _align(reset: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each token goes if every document begins with a new chunk of `size`.

    reset: (B, T) bool -> slots (B, T) int64, and fresh (B, chunks) bool: true for the chunks that
    do not continue the one before.
    """
    steps = torch.arange(reset.shape[1], device=reset.device)
    position = steps - torch.where(reset, steps, 0).cummax(dim=1).values
    opens = position % size == 0
    chunk = opens.cumsum(1) - 1
    count = int(chunk[:, -1].max()) + 1
    fresh = torch.zeros(reset.shape[0], count, dtype=torch.bool, device=reset.device)
    fresh = fresh.scatter_reduce(1, chunk, reset, "amax")
    return chunk * size + position % size, fresh


class _Turn(torch.autograd.Function):
    """A transposed copy of a matrix whose gradient is one too: batched products want both dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.T.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].T.contiguous()


class _ChunkScan(torch.autograd.Function):
    """The state before each chunk: s_0 given, s_{j+1} = r s_j + u_j, zero where chunk is fresh.

    r: (D, N), u: (D, B, chunks, N), s_0: (D, B, N), complex; fresh: (B, chunks) bool or None.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, u: Tensor, start: Tensor, fresh: Tensor | None) -> Tensor:
        s = torch.empty_like(u)
        cuts = _cuts(fresh)
        now = start
        for j in range(u.shape[2]):
            if j in cuts:
                now = torch.where(cuts[j], 0, now)
            s[:, :, j] = now
            now = torch.addcmul(u[:, :, j], r[:, None], now)
        ctx.save_for_backward(r, s)
        ctx.cuts = cuts
        return s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        r, s = ctx.saved_tensors
        (g,) = grads
        du = torch.empty_like(s)
        back = r[:, None].conj().resolve_conj()
        after = torch.zeros_like(s[:, :, 0])
        for j in reversed(range(s.shape[2])):
            du[:, :, j] = after
            after = torch.addcmul(g[:, :, j], back, after)
            if j in ctx.cuts:
                after = torch.where(ctx.cuts[j], 0, after)
        dr = (du * s.conj()).sum((1, 2))
        return dr, du, after, None


def _cuts(fresh: Tensor | None) -> dict[int, Tensor]:
    """The chunks where some row is fresh, with the mask of those rows."""
    if fresh is None:
        return {}
    return {j: fresh[:, j, None] for j in fresh.any(0).nonzero().flatten().tolist()}


def _compilable(x: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None,
                state: Tensor | None = None, reset: Tensor | None = None) -> bool:
    return (x.shape[1] > 1 and usable(x, a, b, c, skip, state, reset) and single(x, skip, state)
            and a.dtype == torch.complex64)


@diagonal_ssm.path("numba", when=_compilable)
def _compiled(x: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None,
              state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, sixteen channels at a time; see kernels/state_space."""
    start = torch.view_as_real(_start(x, a, state))
    return compiled_scan(x, (a, b, 2 * c), skip, start, reset)


def compiled_scan(x: Tensor, system: tuple[Tensor, ...], skip: Tensor | None, state: Tensor,
                  reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the last state by kernels/state_space: system (a, b, 2 c), complex (D, P) each, with
    e and f behind them for the matrix of S4; state: (B, D, P, 2) float32."""
    kinds = torch.cat([torch.view_as_real(part.resolve_conj()) for part in system], dim=-1)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, kinds, skip, state))
    return _Recurrence.apply(x, kinds, skip, state, reset, training)


class _Recurrence(torch.autograd.Function):
    """The compiled loops under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kinds: Tensor, skip: Tensor | None, state: Tensor,
                reset: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import state_space as kernel
        x = dense(x)
        threads()
        y, after, starts = kernel.scan(x, kinds, skip, state, reset, training=training)
        if training:
            ctx.save_for_backward(x, kinds, skip, reset, starts)
        return y, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        from manyform.ops.kernels import state_space as kernel
        x, kinds, skip, reset, starts = ctx.saved_tensors
        threads()
        dx, dkinds, dskip, dstate = kernel.scan_gradient(
            x, kinds, skip, reset, starts, dense(dy), dafter)
        return dx, dkinds, None if skip is None else dskip, dstate, None, None
