"""The linear layer of mixers, channels and models."""

from __future__ import annotations

from torch import Tensor, nn

from manyform.ops.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` by the `linear` operation, which learns faster on some processors.

    Parameters, initialisation and the equation y = x W^T + b are torch's. (..., in) -> (..., out).
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
