"""Filters that are functions of the position: a small network with sines, under a decaying window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    outside autocast. memo: where the "kept" path remembers the filter between calls.
    """
    kind = {"dtype": weights[0].dtype, "device": weights[0].device}
    bands = (weights[0].shape[1] - 1) // 2
    steps = torch.arange(length, **kind)
    t = steps / max(1, reference_length - 1)
    phase = (torch.linspace(1e-4, bands - 1, bands, **kind)[:, None]
             * (2 * math.pi / reference_length) * steps)
    h = torch.cat([t[None], phase.cos(), -phase.sin()])
    with torch.autocast(h.device.type, enabled=False):
        for w, b in zip(weights[:-1], biases, strict=True):
            h = torch.sin(frequency[:, None] * torch.addmm(b[:, None], w, h))
        k = torch.mm(weights[-1], h)
    k = k * (torch.exp(-t * decay[:, None]) + shift)
    return torch.cat([k[:, :1] + skip[:, None], k[:, 1:]], dim=1)


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
