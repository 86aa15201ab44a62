"""The squared rectifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda x: 0)
def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So 2021, "Primer", section 3). x: any shape."""
    return torch.relu(x).square()


def _compiled(x: Tensor) -> bool:
    return usable(x) and single(x) and x.numel() % 16 == 0 and x.numel() >= 8192


@relu_squared.path("numba", when=_compiled)
def _numba(x: Tensor) -> Tensor:
    return _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from manyform.ops.kernels import relu_squared as kernel
        from manyform.ops.kernels.lanes import flat
        x = x.contiguous()
        y = torch.empty_like(x)
        threads()
        run: Any = kernel.forward
        run(flat(x), flat(y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        from manyform.ops.kernels import relu_squared as kernel
        from manyform.ops.kernels.lanes import flat
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        threads()
        run: Any = kernel.backward
        run(flat(g.contiguous()), flat(x), flat(dx))
        return dx
