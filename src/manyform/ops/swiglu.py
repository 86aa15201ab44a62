"""The gated activation of a gated MLP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from manyform.ops.operation import operation


@operation(flops=lambda gate, up: 0)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6 without the linear maps); any two equal shapes."""
    return F.silu(gate) * up
