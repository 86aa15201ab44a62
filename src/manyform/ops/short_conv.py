"""The short causal convolution, one filter a channel, in front of many recurrent mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.errors import ManyformError, unknown
from manyform.ops.kernels import dense, single, threads, usable
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
        after = after * _visible(age[..., 0], taps - 1)
    y = y if bias is None else y + bias.to(y.dtype)
    return _activate(y, activation).to(x.dtype), after


def _compilable(x: Tensor, weight: Tensor, bias: Tensor | None = None,
                state: Tensor | None = None, reset: Tensor | None = None,
                activation: str | None = None) -> bool:
    return usable(x, weight, bias, state, reset) and single(x, weight, bias, state)


@short_conv.path("numba", when=_compilable)
def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
              reset: Tensor | None = None, activation: str | None = None,
              ) -> tuple[Tensor, Tensor]:
    """One pass over memory; see kernels/short_conv."""
    state = _start(x, weight, state, activation)
    reach = None if reset is None else steps_since_reset(reset)
    return _Conv.apply(x, weight, bias, state, reach, activation == "silu")


def _one_step(x: Tensor, *rest: Tensor | str | None, **named: Tensor | str | None) -> bool:
    return x.shape[1] == 1


@short_conv.path("step", when=_one_step)
def _step(x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
          reset: Tensor | None = None, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """One step, for decoding: the loop's body is as light as anything."""
    return short_conv.reference(x, weight, bias, state, reset, activation)


class _Conv(torch.autograd.Function):
    """The compiled loops under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
                reach: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import short_conv as kernel
        x, state = dense(x), state.contiguous()
        y = kernel.conv(x, weight, bias, state, reach, silu=silu, threads=threads())
        ctx.save_for_backward(x, weight, bias, state, reach)
        ctx.silu = silu
        kept = state.shape[1]
        last = x[:, max(0, x.shape[1] - kept):].to(state.dtype)
        after = torch.cat([state, last], dim=1)[:, last.shape[1]:]
        return y, after if reach is None else after * _visible(reach, kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        from manyform.ops.kernels import short_conv as kernel
        x, weight, bias, state, reach = ctx.saved_tensors
        dx, dweight, dbias, dstate = kernel.conv_gradient(
            x, weight, bias, state, reach, dense(dy), silu=ctx.silu, threads=threads())
        kept, length = state.shape[1], x.shape[1]
        if reach is not None:
            dafter = dafter * _visible(reach, kept)
        if kept:
            recent = min(kept, length)
            dx[:, length - recent:] += dafter[:, kept - recent:].to(dx.dtype)
            dstate[:, recent:] += dafter[:, :kept - recent]
        return (dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype),
                dstate, None, None)


def _visible(age: Tensor, kept: int) -> Tensor:
    """Which of the last `kept` inputs a next step may see: (B, kept, 1) bool."""
    return age[:, -1:, None] >= torch.arange(kept - 1, -1, -1, device=age.device)[:, None]


def steps_since_reset(reset: Tensor) -> Tensor:
    """Steps since the last reset: (B, T) bool -> (B, T) int64, huge where none came before."""
    steps = torch.arange(reset.shape[1], device=reset.device)
    last = torch.where(reset, steps, torch.iinfo(torch.int64).min // 2).cummax(dim=1).values
    return steps - last


def _start(x: Tensor, weight: Tensor, state: Tensor | None, activation: str | None) -> Tensor:
    """The state before the first step, in the wide dtype; arguments checked."""
    if weight.ndim != 2 or x.ndim != 3 or weight.shape[0] != x.shape[2]:
        raise ManyformError("short_conv needs x (batch, length, channels) and weight (channels, "
                            f"taps), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if activation not in ACTIVATIONS:
        raise unknown("activation of short_conv", activation, map(str, ACTIVATIONS))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if state is None:
        return x.new_zeros(shape, dtype=wide)
    if state.shape != shape:
        raise ManyformError(f"the state of this short_conv is {shape}, not {tuple(state.shape)}")
    return state.to(wide)


def _window(x: Tensor, weight: Tensor, state: Tensor | None, activation: str | None) -> Tensor:
    """The state and the input, one after the other in the wide dtype."""
    start = _start(x, weight, state, activation)
    return torch.cat([start, x.to(start.dtype)], dim=1)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else F.silu(y)
