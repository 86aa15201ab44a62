"""The sum of a residual stream and a branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation
from manyform.ops.pointwise import SMALL


@operation(flops=lambda x, y: 0)
def residual_add(x: Tensor, y: Tensor) -> Tensor:
    """x + y (He 2015, eq. 1): a stream and a branch, of one shape, in the wider of both dtypes."""
    return x + y


def _mixed(x: Tensor, y: Tensor) -> bool:
    """True for a float32 stream and a bfloat16 branch, which torch would first make wide."""
    return (x.dtype == torch.float32 and y.dtype == torch.bfloat16 and x.shape == y.shape
            and x.numel() >= SMALL and x.numel() % 16 == 0 and usable(x, y))


@residual_add.path("numba", when=_mixed)
def _(x: Tensor, y: Tensor) -> Tensor:
    return _ResidualAdd.apply(x, y)


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        from manyform.ops.kernels import residual as kernel
        from manyform.ops.kernels.lanes import flat
        x, y = x.contiguous(), y.contiguous()
        out = torch.empty_like(x)
        threads()
        kernel.add(flat(x), flat(y), flat(out))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return g, g.bfloat16()
