"""The short causal convolution, one filter a channel, in front of many recurrent mixers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.errors import ManyformError, unknown
from manyform.ops.operation import operation

ACTIVATIONS = (None, "silu")


def _flops(x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
           reset: Tensor | None = None, activation: str | None = None) -> int:
    return 2 * weight.shape[1] * x.numel()


@operation(flops=_flops)
def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
               reset: Tensor | None = None, activation: str | None = None,
               ) -> tuple[Tensor, Tensor]:
    """y_t = f(b + sum_k w_k * x_{t-K+1+k}), k = 0 .. K-1, channel by channel; w_{K-1} meets x_t.

    A causal depthwise convolution as in H3 and Mamba (Gu & Dao 2023, section 3.4), with f the
    identity (activation=None) or SiLU ("silu"). No tap reaches across a reset.

    x: (B, T, D); weight: (D, K); bias: (D,) or None; reset: (B, T) bool, true where a document
    begins; state: (B, K-1, D), the K-1 inputs before x in time order, None for zeros.
    Returns y: (B, T, D) in the dtype of x, and the next state, which is zero where an input lies
    before the last reset. The state is float32 (float64 for float64 input), in which bfloat16
    inputs are exact: a cut stream reads the same numbers as one that is not cut.
    Raises ManyformError for shapes that do not fit together.
    """
    window = _window(x, weight, state, activation)
    taps = weight.shape[1]
    w = weight.to(window.dtype)
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:  # forget every input before t where a document begins at t
            old = window[:, : t + taps - 1] * ~reset[:, t, None, None]
            window = torch.cat([old, window[:, t + taps - 1 :]], dim=1)
        y = (window[:, t : t + taps] * w.T).sum(1)
        ys.append(_activate(y if bias is None else y + bias.to(y.dtype), activation))
    return torch.stack(ys, dim=1).to(x.dtype), window[:, x.shape[1] :]


@short_conv.path("torch")
def _shifted(x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
             reset: Tensor | None = None, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """A sum of K shifted products, the taps that would cross a reset masked out."""
    window = _window(x, weight, state, activation)
    length, taps = x.shape[1], weight.shape[1]
    w = weight.to(window.dtype)
    age = None if reset is None else steps_since_reset(reset)[..., None]
    y = window[:, taps - 1 :] * w[:, -1]
    for back in range(1, taps):
        tap = window[:, taps - 1 - back : taps - 1 - back + length] * w[:, taps - 1 - back]
        y = y + (tap if age is None else tap * (age >= back))
    after = window[:, length:]
    if age is not None:
        after = after * (age[:, -1:] >= torch.arange(taps - 2, -1, -1, device=x.device)[:, None])
    y = y if bias is None else y + bias.to(y.dtype)
    return _activate(y, activation).to(x.dtype), after


def steps_since_reset(reset: Tensor) -> Tensor:
    """Steps since the last reset: (B, T) bool -> (B, T) int64, huge where none came before."""
    steps = torch.arange(reset.shape[1], device=reset.device)
    last = torch.where(reset, steps, torch.iinfo(torch.int64).min // 2).cummax(dim=1).values
    return steps - last


def _window(x: Tensor, weight: Tensor, state: Tensor | None, activation: str | None) -> Tensor:
    """The state and the input, one after the other in the wide dtype; arguments checked."""
    if weight.ndim != 2 or x.ndim != 3 or weight.shape[0] != x.shape[2]:
        raise ManyformError("short_conv needs x (batch, length, channels) and weight (channels, "
                            f"taps), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if activation not in ACTIVATIONS:
        raise unknown("activation of short_conv", activation, map(str, ACTIVATIONS))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if state is None:
        state = x.new_zeros(shape, dtype=wide)
    elif state.shape != shape:
        raise ManyformError(f"the state of this short_conv is {shape}, not {tuple(state.shape)}")
    return torch.cat([state.to(wide), x.to(wide)], dim=1)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else F.silu(y)
