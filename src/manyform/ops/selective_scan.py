"""The selective scan of Mamba: a diagonal recurrence whose rates depend on the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyform.errors import ManyformError
from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation

CHUNK = 64
"""Steps that the torch form scans at once; it holds states of one chunk only."""


def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
           state: Tensor | None = None, reset: Tensor | None = None) -> int:
    # For each element of the state: dt A, decay h, (dt x) B and its addition, C h and its sum.
    # For each channel: dt x, and D x with its addition.
    return x.numel() * (6 * A.shape[1] + 1 + (2 if D is not None else 0))


@operation(flops=_flops)
def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   state: Tensor | None = None, reset: Tensor | None = None,
                   ) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t.

    Equations 2a and 2b of Mamba (Gu & Dao 2023) with A discretised by zero-order hold and B by
    its first-order form dt B, as in the released code (section 3.5.2, algorithm 2).

    x, dt: (B, T, D), dt > 0 (after its softplus); A: (D, N), negative; B, C: (B, T, N);
    D: (D,) or None; reset: (B, T) bool, true where h_{t-1} is forgotten; state h: (B, D, N) or
    None for zeros. Returns y: (B, T, D) in the dtype of x, and h after the last step in float32
    (float64 for float64 input); everything is accumulated there.
    Raises ManyformError for shapes that do not fit together.
    """
    h = _start(x, dt, A, B, C, state)
    wide = h.dtype
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], torch.zeros_like(h), h)
        dt_t, x_t = dt[:, t].to(wide), x[:, t].to(wide)
        h = (torch.exp(dt_t[..., None] * A.to(wide)) * h
             + (dt_t * x_t)[..., None] * B[:, t, None].to(wide))
        y = (h * C[:, t, None].to(wide)).sum(-1)
        ys.append(y if D is None else y + D.to(wide) * x_t)
    return torch.stack(ys, dim=1).to(x.dtype), h


@selective_scan.path("torch")
def _doubling(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
              state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chunks one after the other; within one, a parallel prefix by doubling (Hillis & Steele
    1986). The backward pass recomputes each chunk's states."""
    h = _start(x, dt, A, B, C, state)
    wide, length = h.dtype, x.shape[1]
    a, ys = A.to(wide), []
    for lo in range(0, length, CHUNK):
        now = slice(lo, lo + CHUNK)
        args = (x[:, now].to(wide), dt[:, now].to(wide), a, B[:, now].to(wide),
                C[:, now].to(wide), h, None if reset is None else reset[:, now])
        y, h = (checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)
                if torch.is_grad_enabled() and length > CHUNK else _chunk(*args))
        ys.append(y)
    y = torch.cat(ys, dim=1)
    if D is not None:
        y = y + D.to(wide) * x.to(wide)
    return y.to(x.dtype), h


def _chunk(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor,
           reset: Tensor | None) -> tuple[Tensor, Tensor]:
    decay = torch.exp(dt[..., None] * a)  # (B, L, D, N)
    if reset is not None:
        decay = decay * ~reset[..., None, None]
    u = (dt * x)[..., None] * b[:, :, None]
    u = torch.cat([u[:, :1] + decay[:, :1] * h[:, None], u[:, 1:]], dim=1)
    step = 1
    while step < x.shape[1]:  # before: element t holds steps (t - step, t]; after: twice as many
        u = torch.cat([u[:, :step], u[:, step:] + decay[:, step:] * u[:, :-step]], dim=1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        step *= 2
    return (u * c[:, :, None]).sum(-1), u[:, -1]


@selective_scan.path("numba", when=lambda *args, **named: (
    usable(*args, *named.values()) and single(*args, *named.values())))
def _compiled(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
              state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Vectors of sixteen channels; states only at chunk boundaries; see kernels/selective_scan."""
    h = _start(x, dt, A, B, C, state)
    tensors = (x, dt, A, B, C, D, h)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors)
    return _Scan.apply(*tensors, reset, training)


@selective_scan.path("step", when=lambda x, *rest, **named: x.shape[1] == 1)
def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
          state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One step, for decoding."""
    return selective_scan.reference(x, dt, A, B, C, D, state, reset)


class _Scan(torch.autograd.Function):
    """The compiled loops, called with contiguous rows and A padded to whole vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                D: Tensor | None, h: Tensor, reset: Tensor | None, training: bool) -> Any:
        from manyform.ops.kernels import selective_scan as kernel
        y, after, starts = kernel.scan(*(_rows(t) for t in (x, dt, B, C)), A, D, h, reset,
                                       training, threads())
        if training:
            ctx.save_for_backward(x, dt, A, B, C, D, reset, starts)
            ctx.state_dtype = h.dtype
        return y, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> Any:
        from manyform.ops.kernels import selective_scan as kernel
        x, dt, A, B, C, D, reset, starts = ctx.saved_tensors
        dx, ddt, dA, dB, dC, dD, dh = kernel.scan_gradient(
            *(_rows(t) for t in (x, dt, B, C)), A, D, reset, starts, _rows(dy), dstate, threads())
        return (dx, ddt, dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype),
                None if D is None else dD.to(D.dtype), dh.to(ctx.state_dtype), None, None)


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _start(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> Tensor:
    """The state before the first step, in the wide dtype; arguments checked."""
    if x.ndim != 3 or dt.shape != x.shape or A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ManyformError("selective_scan needs x and dt (batch, length, channels) and A "
                            f"(channels, N), not {tuple(x.shape)}, {tuple(dt.shape)} and "
                            f"{tuple(A.shape)}")
    batch, length, width = x.shape
    n = A.shape[1]
    for name, t, shape in (("B", B, (batch, length, n)), ("C", C, (batch, length, n)),
                           ("state", state, (batch, width, n))):
        if t is not None and tuple(t.shape) != shape:
            raise ManyformError(f"{name} of selective_scan must be {shape}, not {tuple(t.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_zeros(batch, width, n, dtype=wide) if state is None else state.to(wide)
