"""Filters that are functions of the position: a network of sines under a decaying window."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation


@dataclass
class FilterMemo:
    """The filter last worked out without gradients, and the weights that it belongs to."""

    key: tuple = ()
    filter: Tensor = field(default_factory=lambda: torch.empty(0, 0))


def filter_flops(length: int, weights: Sequence[Tensor]) -> int:
    """Operations of `length` positions: one product a weight matrix."""
    return 2 * length * sum(w.numel() for w in weights)


def _flops(length: int, weights: Sequence[Tensor], biases: Sequence[Tensor], frequency: Tensor,
           decay: Tensor, shift: float, skip: Tensor, reference_length: int,
           memo: FilterMemo | None = None) -> int:
    return filter_flops(length, weights)


@operation(flops=_flops)
def implicit_filter(length: int, weights: Sequence[Tensor], biases: Sequence[Tensor],
                    frequency: Tensor, decay: Tensor, shift: float, skip: Tensor,
                    reference_length: int, memo: FilterMemo | None = None) -> Tensor:
    """k_l = W_n s(... s(W_1 s(W_0 z_l + b_0) + b_1) ...) (exp(-decay t_l) + shift) + skip [l = 0].

    s(u) = sin(frequency u). Position features, t_l = l / (R - 1) and R = reference_length:
    z_l = (t_l, cos(2 pi f_m l / R) .., -sin(2 pi f_m l / R) ..), f_m evenly spaced from 1e-4 to
    M - 1 (Poli 2023, Hyena, section 3.3 and appendix D.3). Every l >= 0 has a value: past R the
    waves repeat nearly, t and the window go on.

    weights: W_0 (E, 2M + 1), hidden (E, E), last (D, E); biases: one (E,) a weight but the last;
    frequency: (E,); decay, skip: (D,). Returns (D, length) in the dtype of the weights, computed
    outside autocast, except that the "windowed" path under autocast to bfloat16 gives that. memo:
    where the "kept" path remembers the filter between calls.
    """
    t, h = _features(length, weights[0].shape[1], reference_length, weights[0].dtype,
                     weights[0].device)
    with torch.autocast(h.device.type, enabled=False):
        for w, b in zip(weights[:-1], biases, strict=True):
            h = torch.sin(frequency[:, None] * torch.addmm(b[:, None], w, h))
        k = torch.mm(weights[-1], h)
    k = k * (_window(t, decay) + shift)
    return torch.cat([k[:, :1] + skip[:, None], k[:, 1:]], dim=1)


@functools.lru_cache(maxsize=4)
def _features(length: int, count: int, reference_length: int, dtype: torch.dtype,
              device: torch.device) -> tuple[Tensor, Tensor]:
    """Times t_l (length,) and position features z_l (count, length), the same for every layer."""
    bands = (count - 1) // 2
    with torch.inference_mode(False), torch.no_grad():
        steps = torch.arange(length, dtype=dtype, device=device)
        t = steps / max(1, reference_length - 1)
        waves = torch.linspace(1e-4, bands - 1, bands, dtype=dtype, device=device)
        phase = waves[:, None] * (2 * math.pi / reference_length) * steps
        return t, torch.cat([t[None], phase.cos(), -phase.sin()])


def _window(t: Tensor, decay: Tensor) -> Tensor:
    """exp(-decay t): (D, length), as products of exp(-decay (t_i + t_j)) of two short tables."""
    length = t.shape[0]
    size = math.isqrt(length - 1) + 1
    coarse, fine = (torch.exp(-decay[:, None] * part) for part in (t[::size], t[:size]))
    return (coarse[:, :, None] * fine[:, None]).flatten(1)[:, :length]


def _windowed_applies(length: int, weights: Sequence[Tensor], biases: Sequence[Tensor],
                      frequency: Tensor, decay: Tensor, *_: object, **__: object) -> bool:
    """Training under autocast to bfloat16 on a CPU."""
    return (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and usable(*weights, decay) and weights[-1].dtype == torch.float32
            and weights[-1].shape[0] % 16 == 0 and length >= 256 and not decay.requires_grad)


@implicit_filter.path("windowed", when=_windowed_applies)
def _windowed(length: int, weights: Sequence[Tensor], biases: Sequence[Tensor],
              frequency: Tensor, decay: Tensor, shift: float, skip: Tensor,
              reference_length: int, memo: FilterMemo | None = None) -> Tensor:
    """Times as rows; hidden layers in float32, whose sines magnify errors, the last in bfloat16."""
    _, z = _features(length, weights[0].shape[1], reference_length, weights[0].dtype,
                     weights[0].device)
    with torch.autocast("cpu", enabled=False):
        h = z.T
        for w, b in zip(weights[:-1], biases, strict=True):
            h = torch.sin(torch.addmm(b, h, w.T) * frequency)
        return _LastLayer.apply(h, weights[-1], decay, shift, skip, reference_length).T


def reach(decay: Tensor, shift: float, reference_length: int) -> Tensor | None:
    """The lag from which the "windowed" path gives zero, (D,) int64; None if it never does.

    There the window has fallen to 2^-30, far below the rounding of a bfloat16 sum.
    """
    if shift != 0:
        return None
    steps = 30 * math.log(2) * max(1, reference_length - 1) / decay.detach().double()
    return steps.ceil().long() + 1


class _LastLayer(torch.autograd.Function):
    """k = h W^T * window, and skip at the first time: h (L, E), W (D, E) -> (L, D) bfloat16."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, decay: Tensor, shift: float, skip: Tensor,
                reference_length: int) -> Tensor:
        ctx.window = decay, 1 / max(1, reference_length - 1), shift
        half, weight = h.to(torch.bfloat16), weight.to(torch.bfloat16)
        k = _apply_window(torch.mm(half, weight.T), *ctx.window)
        k[0] += skip
        ctx.save_for_backward(half, weight)
        return k

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:
        half, weight = ctx.saved_tensors
        g = _apply_window(dk.to(torch.bfloat16).contiguous(), *ctx.window)
        dh, dweight = torch.mm(g, weight).float(), torch.mm(g.T, half).float()
        return dh, dweight, None, None, dk[0].float(), None


def _apply_window(x: Tensor, decay: Tensor, unit: float, shift: float) -> Tensor:
    from manyform.ops.kernels import implicit_filter as kernel
    from manyform.ops.kernels.lanes import flat
    y = torch.empty_like(x)
    threads()
    kernel.window(flat(x), flat(decay), unit, shift, flat(y), x.shape[0])
    return y


def _remembers(*args: object, memo: FilterMemo | None = None) -> bool:
    return memo is not None and not torch.is_grad_enabled()


@implicit_filter.path("kept", when=_remembers)
def _kept(length: int, weights: Sequence[Tensor], biases: Sequence[Tensor], frequency: Tensor,
          decay: Tensor, shift: float, skip: Tensor, reference_length: int,
          memo: FilterMemo) -> Tensor:
    """The filter of an earlier call, while the weights are the same; its length doubles.

    Whoever changes weights other than in place through torch or by replacing them must clear the
    memo; the mixer does so at every call that records gradients.
    """
    key = (shift, reference_length,
           *((w.data_ptr(), w._version, w.dtype) for w in (*weights, *biases, frequency, skip)))
    if memo.key != key:
        memo.key, memo.filter = key, memo.filter[:, :0]
    if memo.filter.shape[1] < length:
        room = max(length, 2 * memo.filter.shape[1])
        memo.filter = implicit_filter.reference(room, weights, biases, frequency, decay, shift,
                                                skip, reference_length)
    return memo.filter[:, :length]
