"""The logarithm of a gate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.operation import operation
from manyform.ops.pointwise import compilable, pointwise


@operation(flops=lambda x, temperature=1.0: 0)
def log_sigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """log(sigmoid(x)) / temperature: of a decay sigmoid(x)^(1 / temperature) (Yang 2023,
    arXiv:2312.06635, eq. 5). x: any shape. In float32, float64 for float64 input."""
    return F.logsigmoid(x if x.dtype == torch.float64 else x.float()) / temperature


@log_sigmoid.path("numba", when=lambda x, temperature=1.0: compilable(x))
def _numba(x: Tensor, temperature: float = 1.0) -> Tensor:
    return pointwise(x, "log_sigmoid", 1, torch.float32, 1 / temperature)
