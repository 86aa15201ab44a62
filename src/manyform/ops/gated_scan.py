"""A running average whose weights the input chooses: the recurrence of QRNN and minGRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.errors import ManyformError
from manyform.ops.kernels import dense, single, threads, usable
from manyform.ops.linear_scan import linear_scan
from manyform.ops.operation import operation


@operation(flops=lambda keep, value, state=None, reset=None: 3 * value.numel())
def gated_scan(keep: Tensor, value: Tensor, state: Tensor | None = None,
               reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = s_t h_{t-1} + (1 - s_t) v_t with s = sigmoid(keep) (Bradbury 2016, "Quasi-Recurrent
    Neural Networks", eq. 3; Feng 2024, "Were RNNs All We Needed?", section 3.1).

    keep, value: (B, T, D); state h: (B, D) or None for zeros; reset: (B, T) bool, true where
    h_{t-1} is forgotten.
    Returns h: (B, T, D) in the dtype of value, and h after the last step in float32 (float64 for
    float64 input); everything is accumulated there.
    Raises ManyformError for shapes that do not fit together.
    """
    a, b = _terms(keep, value)
    h, last = linear_scan.reference(a, b, state, reset)
    return h.to(value.dtype), last


@gated_scan.path("torch")
def _parallel(keep: Tensor, value: Tensor, state: Tensor | None = None,
              reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Through `linear_scan`."""
    a, b = _terms(keep, value)
    h, last = linear_scan(a, b, state, reset)
    return h.to(value.dtype), last


@gated_scan.path("numba", when=lambda keep, value, state=None, reset=None: (
    usable(keep, value, state, reset) and single(keep, value, state) and value.ndim == 3
    and value.shape[2] % 16 == 0))
def _compiled(keep: Tensor, value: Tensor, state: Tensor | None = None,
              reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One pass over memory each way, the gates inside; see kernels/linear_scan."""
    _check(keep, value)
    shape = (value.shape[0], value.shape[2])
    if state is not None and tuple(state.shape) != shape:
        raise ManyformError(f"the state of gated_scan must be {shape}, not {tuple(state.shape)}")
    h = torch.zeros(shape) if state is None else state.float()
    return _Scan.apply(keep, value, h, reset)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor, value: Tensor, h: Tensor, reset: Tensor | None,
                ) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import linear_scan as kernel
        keep, value = dense(keep), dense(value)
        y, after = kernel.gated_scan(keep, value, h, reset, threads())
        ctx.save_for_backward(keep, value, y, h, reset)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        from manyform.ops.kernels import linear_scan as kernel
        keep, value, y, h, reset = ctx.saved_tensors
        return (*kernel.gated_gradient(keep, value, y, h, reset, dense(dy), dlast, threads()),
                None)


def _check(keep: Tensor, value: Tensor) -> None:
    if value.ndim != 3 or keep.shape != value.shape:
        raise ManyformError("gated_scan needs keep and value (batch, length, channels), not "
                            f"{tuple(keep.shape)} and {tuple(value.shape)}")


def _terms(keep: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    _check(keep, value)
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    keep = keep.to(wide)
    return torch.sigmoid(keep), torch.sigmoid(-keep) * value.to(wide)
