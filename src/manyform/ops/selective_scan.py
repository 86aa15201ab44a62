"""The selective scan of Mamba: a diagonal recurrence whose rates depend on the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from manyform.errors import ManyformError
from manyform.ops.kernels import dense, single, threads, usable
from manyform.ops.operation import operation

CHUNK = 64
"""Steps that the torch form scans at once; it holds states of one chunk only."""


def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
           state: Tensor | None = None, reset: Tensor | None = None, *,
           dt_bias: Tensor | None = None, gate: Tensor | None = None) -> int:
    # For each element of the state: dt A, decay h, (dt x) B and its addition, C h and its sum.
    # For each channel: dt x, and D x with its addition.
    return x.numel() * (6 * A.shape[1] + 1 + (2 if D is not None else 0))


@operation(flops=_flops)
def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   state: Tensor | None = None, reset: Tensor | None = None, *,
                   dt_bias: Tensor | None = None, gate: Tensor | None = None,
                   ) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t.

    Equations 2a and 2b of Mamba (Gu & Dao 2023) with A discretised by zero-order hold and B by
    its first-order form dt B, as in the released code (section 3.5.2, algorithm 2). What stands
    around the scan there can be given with it, to save passes over memory: with dt_bias, dt
    becomes softplus(dt + dt_bias); with gate, y becomes y silu(gate).

    x, dt: (B, T, D), dt > 0 once its softplus is taken; A: (D, N), negative; B, C: (B, T, N);
    D: (D,) or None; state h: (B, D, N) or None for zeros; reset: (B, T) bool, true where h_{t-1}
    is forgotten; dt_bias: (D,) or None; gate: (B, T, D) or None.
    Returns y: (B, T, D) in the dtype of x, and h after the last step in float32 (float64 for
    float64 input); everything is accumulated there.
    Raises ManyformError for shapes that do not fit together.
    """
    h = _start(x, dt, A, B, C, state, gate)
    wide = h.dtype
    a, steps, xs = A.to(wide), _steps(dt, dt_bias, wide), x.to(wide)
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], torch.zeros_like(h), h)
        h = (torch.exp(steps[:, t, :, None] * a) * h
             + (steps[:, t] * xs[:, t])[..., None] * B[:, t, None].to(wide))
        ys.append((h * C[:, t, None].to(wide)).sum(-1))
    return _finish(torch.stack(ys, dim=1), x, D, gate), h


@selective_scan.path("torch")
def _doubling(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
              state: Tensor | None = None, reset: Tensor | None = None, *,
              dt_bias: Tensor | None = None, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chunks one after the other; within one, a parallel prefix by doubling (Hillis & Steele
    1986). The backward pass recomputes each chunk's states."""
    h = _start(x, dt, A, B, C, state, gate)
    wide, length = h.dtype, x.shape[1]
    a, steps, ys = A.to(wide), _steps(dt, dt_bias, wide), []
    for lo in range(0, length, CHUNK):
        now = slice(lo, lo + CHUNK)
        args = (x[:, now].to(wide), steps[:, now], a, B[:, now].to(wide), C[:, now].to(wide), h,
                None if reset is None else reset[:, now])
        y, h = (checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)
                if torch.is_grad_enabled() and length > CHUNK else _chunk(*args))
        ys.append(y)
    return _finish(torch.cat(ys, dim=1), x, D, gate), h


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


def _compilable(*args: Tensor | None, **named: Tensor | None) -> bool:
    tensors = (*args, *named.values())
    return usable(*tensors) and single(*tensors)


@selective_scan.path("numba", when=_compilable)
def _compiled(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
              state: Tensor | None = None, reset: Tensor | None = None, *,
              dt_bias: Tensor | None = None, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Vectors of sixteen channels; states only at chunk boundaries; see kernels/selective_scan."""
    h = _start(x, dt, A, B, C, state, gate)
    gate = None if gate is None else gate.to(x.dtype)
    tensors = (x, dt, B, C, gate, A, D, dt_bias, h)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors)
    return _Scan.apply(*tensors, reset, training)


def _one_step(x: Tensor, *rest: Tensor | None, **named: Tensor | None) -> bool:
    return x.shape[1] == 1


@selective_scan.path("step", when=_one_step)
def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
          state: Tensor | None = None, reset: Tensor | None = None, *,
          dt_bias: Tensor | None = None, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One step, for decoding: the loop's body is as light as anything."""
    return selective_scan.reference(x, dt, A, B, C, D, state, reset, dt_bias=dt_bias, gate=gate)


class _Scan(torch.autograd.Function):
    """The compiled loops under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, gate: Tensor | None,
                A: Tensor, D: Tensor | None, dt_bias: Tensor | None, h: Tensor,
                reset: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import selective_scan as kernel
        x, dt, B, C = dense(x), dense(dt), dense(B), dense(C)
        gate = None if gate is None else dense(gate)
        y, after, starts = kernel.scan(x, dt, B, C, gate, A, D, dt_bias, h, reset,
                                       training=training, threads=threads())
        if training:
            ctx.save_for_backward(x, dt, B, C, gate, A, D, dt_bias, reset, starts)
        return y, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        from manyform.ops.kernels import selective_scan as kernel
        *inputs, reset, starts = ctx.saved_tensors
        *grads, dh = kernel.scan_gradient(*inputs, reset, starts, dense(dy), dstate,  # type: ignore[call-arg,misc]
                                          threads=threads())
        cast = [None if t is None else g.to(t.dtype) for t, g in zip(inputs, grads, strict=True)]
        return (*cast, dh, None, None)


def _steps(dt: Tensor, dt_bias: Tensor | None, wide: torch.dtype) -> Tensor:
    return dt.to(wide) if dt_bias is None else F.softplus(dt.to(wide) + dt_bias.to(wide))


def _finish(y: Tensor, x: Tensor, D: Tensor | None, gate: Tensor | None) -> Tensor:
    """The skip and the gate, and back to the dtype of x."""
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if gate is not None:
        y = y * F.silu(gate.to(y.dtype))
    return y.to(x.dtype)


def _start(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None,
           gate: Tensor | None) -> Tensor:
    """The state before the first step, in the wide dtype; arguments checked."""
    if x.ndim != 3 or dt.shape != x.shape or A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ManyformError("selective_scan needs x and dt (batch, length, channels) and A "
                            f"(channels, N), not {tuple(x.shape)}, {tuple(dt.shape)} and "
                            f"{tuple(A.shape)}")
    batch, length, width = x.shape
    n = A.shape[1]
    for name, t, shape in (("B", B, (batch, length, n)), ("C", C, (batch, length, n)),
                           ("gate", gate, (batch, length, width)),
                           ("state", state, (batch, width, n))):
        if t is not None and tuple(t.shape) != shape:
            raise ManyformError(f"{name} of selective_scan must be {shape}, not {tuple(t.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_zeros(batch, width, n, dtype=wide) if state is None else state.to(wide)
