"""The token shift of RWKV: each step mixes its features with those of the step before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.errors import ManyformError
from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda x, weights, state=None, reset=None: 0)
def token_shift(x: Tensor, weights: Tensor, state: Tensor | None = None,
                reset: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """y^n_t = x_t + (x_{t-1} - x_t) * w^n for n mixtures of the same x (Peng 2025, eq. 3).

    x: (B, T, D); weights: (n, D); state: (B, D), the features before the first, None for zeros;
    reset: (B, T) bool, true where a document begins (the step before is zero there).
    Returns n tensors (B, T, D) in the dtype of x, and the next state: the last x in float32
    (float64 for float64 input), in which bfloat16 features are exact.
    Raises ManyformError for shapes that do not fit together.
    """
    if weights.ndim != 2 or weights.shape[1] != x.shape[-1]:
        raise ManyformError("token_shift needs x (batch, length, d) and weights (mixtures, d), not "
                            f"{tuple(x.shape)} and {tuple(weights.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = x.new_zeros(x.shape[0], 1, x.shape[2]) if state is None else state.to(x.dtype)[:, None]
    before = torch.cat([first, x[:, :-1]], dim=1)
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
    mixed = tuple(torch.lerp(x, before, w) for w in weights.to(x.dtype).unbind(0))
    return mixed, x[:, -1].to(wide)


def _compiled(x: Tensor, weights: Tensor, state: Tensor | None = None,
              reset: Tensor | None = None) -> bool:
    return (usable(x, weights, state, reset) and single(x, weights, state)
            and x.shape[-1] % 16 == 0 and x.shape[1] > 1)


@token_shift.path("numba", when=_compiled)
def _numba(x: Tensor, weights: Tensor, state: Tensor | None = None, reset: Tensor | None = None,
           ) -> tuple[tuple[Tensor, ...], Tensor]:
    if weights.ndim != 2 or weights.shape[1] != x.shape[-1]:
        return token_shift.reference(x, weights, state, reset)  # which says what is wrong
    first = x.new_zeros(len(x), x.shape[2], dtype=torch.float32) if state is None else state.float()
    return _Shift.apply(x, weights.to(x.dtype), first, reset), x[:, -1].float()


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, first: Tensor, reset: Tensor | None,
                ) -> tuple[Tensor, ...]:
        from manyform.ops.kernels import token_shift as kernel
        from manyform.ops.kernels.lanes import flat
        x, weights, first = x.contiguous(), weights.contiguous(), first.contiguous()
        cut = torch.zeros(0, dtype=torch.bool) if reset is None else reset.contiguous()
        ys = tuple(torch.empty_like(x) for _ in weights)
        threads()
        run: Any = kernel.forward
        run(flat(x), flat(weights), flat(first), cut.view(-1).numpy(), *x.shape[1:],
            tuple(flat(y) for y in ys))
        ctx.save_for_backward(x, weights, first, cut)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> Any:
        from manyform.ops.kernels import token_shift as kernel
        from manyform.ops.kernels.lanes import flat
        x, weights, first, cut = ctx.saved_tensors
        dx, dfirst = torch.empty_like(x), torch.empty_like(first)
        partial = torch.empty(threads(), weights.numel())
        run: Any = kernel.backward
        run(flat(x), flat(weights), flat(first), cut.view(-1).numpy(), *x.shape[1:],
            tuple(flat(g.contiguous()) for g in gs), flat(dx), flat(dfirst), partial.numpy())
        return dx, partial.sum(0).view_as(weights).to(weights.dtype), dfirst, None
