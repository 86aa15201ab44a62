"""What RWKV-7 does to what it has read from its memory: norm, bonus and gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation


@operation(flops=lambda y, r, k, v, gate, weight, bias, r_k: 0)
def rwkv_output(y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor,
                bias: Tensor, r_k: Tensor) -> Tensor:
    """(norm(y) weight + bias + (sum of r k r_k) v) gate, norm and sum over a head (Peng 2025,
    eqs. 20-21, with the released code's epsilon of 64e-5 for heads of 64).

    y, r, k, v: (B, T, H, N); gate: (B, T, H N); weight, bias: (H N,); r_k: (H, N).
    Returns (B, T, H N) in the dtype of gate.
    """
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(y.to(wide), y.shape[-1:], eps=1e-5 * y.shape[-1])
    normed = normed.flatten(2) * weight + bias
    bonus = (r.to(wide) * k * r_k).sum(-1, keepdim=True) * v
    return ((normed + bonus.flatten(2)) * gate).to(gate.dtype)


def _compiled(y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor,
              bias: Tensor, r_k: Tensor) -> bool:
    tensors = (y, r, k, v, gate, weight, bias, r_k)
    return (usable(*tensors) and single(*tensors) and y.shape[-1] % 16 == 0
            and y.numel() >= 4096)


@rwkv_output.path("numba", when=_compiled)
def _numba(y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor,
           r_k: Tensor) -> Tensor:
    return _Output.apply(y, r, k, v, gate, weight, bias, r_k)


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        from manyform.ops.kernels import rwkv as kernel
        from manyform.ops.kernels.lanes import flat
        tensors = tuple(x.contiguous() for x in tensors)
        out, size = torch.empty_like(tensors[4]), tensors[0].shape[-1]
        threads()
        run: Any = kernel.output
        run(*(flat(x) for x in tensors), size, 1e-5 * size, flat(out))
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        from manyform.ops.kernels import rwkv as kernel
        from manyform.ops.kernels.lanes import flat
        tensors = ctx.saved_tensors
        size, d = tensors[0].shape[-1], tensors[5].numel()
        outs = [torch.empty_like(x) for x in tensors[:5]]
        partial = torch.empty(threads(), 3 * d)
        run: Any = kernel.output_back
        run(*(flat(x) for x in tensors), size, 1e-5 * size, flat(g.contiguous()),
            *(flat(x) for x in outs), partial.numpy())
        weight, bias, r_k = partial.sum(0).view(3, d).unbind(0)
        return (*outs, weight, bias, r_k.view_as(tensors[7]))
