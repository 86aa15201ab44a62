"""The token shift of RWKV: each step mixes its features with those of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from manyform.errors import ManyformError
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
    change = before - x
    mixed = tuple(torch.addcmul(x, change, w) for w in weights.to(x.dtype).unbind(0))
    return mixed, x[:, -1].to(wide)
