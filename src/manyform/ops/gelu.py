"""The activation of GPT-2's feed-forward network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda x: 0)
def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


@gelu_tanh.path("numba", when=lambda x: usable(x) and x.dtype in (torch.float32, torch.bfloat16)
                and x.numel() % 16 == 0 and x.numel() >= 8192)
def _numba(x: Tensor) -> Tensor:
    return _GELU.apply(x)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from manyform.ops.kernels import gelu as kernel
        from manyform.ops.kernels.lanes import flat
        x = x.contiguous()
        y = torch.empty_like(x)
        threads()
        kernel.forward(flat(x), flat(y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        from manyform.ops.kernels import gelu as kernel
        from manyform.ops.kernels.lanes import flat
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        threads()
        kernel.backward(flat(g.contiguous()), flat(x), flat(dx))
        return dx
