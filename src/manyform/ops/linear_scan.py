"""The linear recurrence, channel by channel: real decays that change, complex ones that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.errors import ManyformError
from manyform.ops.kernels import dense, single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda a, b, state=None, reset=None: 2 * b.numel())
def linear_scan(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
                ) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, element by element (Martin & Cundy 2018, "Parallelizing linear
    recurrent neural nets over sequence length", eq. 4).

    a, b: (B, T, D); a near 1 wants float32, since bfloat16 has nothing between 0.996 and 1.
    state h: (B, D) or None for zeros; reset: (B, T) bool, true where h_{t-1} is forgotten.
    Returns h: (B, T, D) in the dtype of b, and h after the last step in float32 (float64 for
    float64 input); everything is accumulated there.
    Raises ManyformError for shapes that do not fit together.
    """
    h = _start(a, b, state)
    a, wide, hs = a.to(h.dtype), b.to(h.dtype), []
    for t in range(b.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = a[:, t] * h + wide[:, t]
        hs.append(h)
    return torch.stack(hs, dim=1).to(b.dtype), h


@operation(flops=lambda a, b, state=None, reset=None: 4 * b.numel())
def complex_scan(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
                 ) -> tuple[Tensor, Tensor]:
    """h_t = a h_{t-1} + b_t for complex h, element by element, with a constant a (Orvieto 2023,
    "Resurrecting recurrent neural networks for long sequences", eq. 1 with a diagonal matrix).

    a: (2 N,), the real parts, then the imaginary parts; b: (B, T, 2 N), in the same order, as real
    matrix products leave it; state h: (B, 2 N) or None for zeros; reset: (B, T) bool, true where
    h_{t-1} is forgotten.
    Returns h: (B, T, 2 N) in the dtype of b, and h after the last step in float32 (float64 for
    float64 input); everything is accumulated there.
    Raises ManyformError for shapes that do not fit together.
    """
    h = _start_complex(a, b, state)
    a_re, a_im = a.to(h.dtype).chunk(2)
    wide, hs = b.to(h.dtype), []
    for t in range(b.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        re, im = h.chunk(2, dim=-1)
        h = torch.cat([a_re * re - a_im * im, a_re * im + a_im * re], dim=-1) + wide[:, t]
        hs.append(h)
    return torch.stack(hs, dim=1).to(b.dtype), h


@linear_scan.path("torch")
def _parallel(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
              ) -> tuple[Tensor, Tensor]:
    """A parallel prefix by doubling (Hillis & Steele 1986), forwards and backwards in time."""
    h = _start(a, b, state)
    a = a.to(h.dtype)
    if reset is not None:
        a = a.masked_fill(reset[..., None], 0.0)
    hs = _Prefix.apply(a, b.to(h.dtype), h)
    return hs.to(b.dtype), hs[:, -1]


@complex_scan.path("torch")
def _parallel_complex(a: Tensor, b: Tensor, state: Tensor | None = None,
                      reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with torch's complex numbers."""
    h = _start_complex(a, b, state)
    factors = _complex(a.to(h.dtype)).expand(*b.shape[:2], -1)
    if reset is not None:
        factors = factors.masked_fill(reset[..., None], 0.0)
    hs = _Prefix.apply(factors, _complex(b.to(h.dtype)), _complex(h))
    hs = torch.cat([hs.real, hs.imag], dim=-1)
    return hs.to(b.dtype), hs[:, -1]


def _compilable(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
                ) -> bool:
    """Whole vectors of sixteen channels (of real parts and of imaginary ones)."""
    vector = 16 if a.ndim == 3 else 32
    return (usable(a, b, state, reset) and single(a, b, state) and b.ndim == 3
            and b.shape[2] % vector == 0)


@linear_scan.path("numba", when=_compilable)
def _compiled(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
              ) -> tuple[Tensor, Tensor]:
    """One pass over memory each way, sixteen channels at a time; see kernels/linear_scan."""
    return _Scan.apply(a, b, _start(a, b, state), reset)


@complex_scan.path("numba", when=_compilable)
def _compiled_complex(a: Tensor, b: Tensor, state: Tensor | None = None,
                      reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As for real decays; a lies on sixteen channels for the whole sequence."""
    return _Scan.apply(a.to(torch.float32), b, _start_complex(a, b, state), reset, True)


@linear_scan.path("step", when=lambda a, b, state=None, reset=None: b.shape[1] == 1)
def _step(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
          ) -> tuple[Tensor, Tensor]:
    """One step, for decoding: the loop's body is as light as anything."""
    return linear_scan.reference(a, b, state, reset)


@complex_scan.path("step", when=lambda a, b, state=None, reset=None: b.shape[1] == 1)
def _complex_step(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
                  ) -> tuple[Tensor, Tensor]:
    """One step, for decoding."""
    return complex_scan.reference(a, b, state, reset)


class _Prefix(torch.autograd.Function):
    """All h_t at once for a, b: (B, T, D) and h_0: (B, D), real or complex. The gradient runs the
    same recurrence from the last step to the first, so only h is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        first = b[:, :1] + a[:, :1] * h[:, None]
        hs = _prefix(a, torch.cat([first, b[:, 1:]], dim=1))
        ctx.save_for_backward(a, h, hs)
        return hs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, hs = ctx.saved_tensors
        coming = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).conj()
        db = _prefix(coming.flip(1), dhs.flip(1)).flip(1)
        before = torch.cat([h[:, None], hs[:, :-1]], dim=1)
        return db * before.conj(), db, db[:, 0] * a[:, 0].conj()


def _prefix(a: Tensor, b: Tensor) -> Tensor:
    """Before each round, element t of b holds what steps (t - reach, t] add to h_t, and that of a
    the decay over them; after it, twice as many."""
    reach = 1
    while reach < b.shape[1]:
        b = torch.cat([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], dim=1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], dim=1)
        reach *= 2
    return b


class _Scan(torch.autograd.Function):
    """constant: a is complex and the same at every step."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None,
                constant: bool = False) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import linear_scan as kernel
        a, b = dense(a), dense(b)
        run = kernel.complex_scan if constant else kernel.scan
        y, after = run(a, b, h, reset, threads())
        ctx.save_for_backward(a, y, h, reset)
        ctx.constant = constant
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        from manyform.ops.kernels import linear_scan as kernel
        a, y, h, reset = ctx.saved_tensors
        run = kernel.complex_gradient if ctx.constant else kernel.scan_gradient
        return (*run(a, y, h, reset, dense(dy), dlast, threads()), None, None)


def _complex(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, dim=-1))


def _start(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """The state before the first step, in the wide dtype; arguments checked."""
    if b.ndim != 3 or a.shape != b.shape:
        raise ManyformError("linear_scan needs a and b (batch, length, channels), not "
                            f"{tuple(a.shape)} and {tuple(b.shape)}")
    return _state(b, state, "linear_scan")


def _start_complex(a: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    if b.ndim != 3 or b.shape[2] % 2 or tuple(a.shape) != (b.shape[2],):
        raise ManyformError("complex_scan needs a (2 channels,) and b (batch, length, 2 channels), "
                            f"not {tuple(a.shape)} and {tuple(b.shape)}")
    return _state(b, state, "complex_scan")


def _state(b: Tensor, state: Tensor | None, name: str) -> Tensor:
    shape = (b.shape[0], b.shape[2])
    if state is not None and tuple(state.shape) != shape:
        raise ManyformError(f"the state of {name} must be {shape}, not {tuple(state.shape)}")
    wide = torch.float64 if b.dtype == torch.float64 else torch.float32
    return b.new_zeros(shape, dtype=wide) if state is None else state.to(wide)
