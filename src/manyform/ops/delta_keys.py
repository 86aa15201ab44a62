"""What delta-rule networks make of their projections before the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.kernels import single, threads, usable
from manyform.ops.operation import operation

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


@operation(flops=lambda *arguments: 0)
def delta_keys(qkv: Tensor, beta: Tensor, alpha: Tensor | None, A_log: Tensor | None,
               dt_bias: Tensor | None, size: int, most: float) -> Terms:
    """Unit queries and keys, rates and decays (Yang 2024, "Gated Delta Networks", section 3):

        g = -exp(A_log) softplus(alpha + dt_bias)       beta' = most sigmoid(beta)
        q / |q|      k' = beta' k / |k|      -exp(g) k / |k|, the erase term

    qkv: (B, T, 2 H size + H V), queries, keys and values of H heads side by side; beta, alpha:
    (B, T, H); A_log, dt_bias: (H,); no decay (g = 0) where alpha, A_log and dt_bias are None.
    Returns q, k', v and the erase term, (B, T, H, .) in the dtype of qkv, and g in float32
    (float64 for float64 input), or None.
    """
    heads = beta.shape[-1]
    shape = (*qkv.shape[:2], heads, -1)
    q, k, v = qkv.tensor_split((heads * size, 2 * heads * size), dim=-1)
    q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    share = most * torch.sigmoid(beta.to(wide))
    g, kept = None, torch.ones_like(share)
    if alpha is not None and A_log is not None and dt_bias is not None:
        g = -A_log.exp() * F.softplus(alpha.to(wide) + dt_bias)
        kept = g.exp()

    def unit(x: Tensor, factor: Tensor | float) -> Tensor:
        x = x.to(wide)
        return (x * (torch.rsqrt(x.square().sum(-1) + 1e-6) * factor)[..., None]).to(qkv.dtype)

    return unit(q, 1.0), unit(k, share), v, unit(k, -kept), g


def _compiled(qkv: Tensor, beta: Tensor, alpha: Tensor | None, A_log: Tensor | None,
              dt_bias: Tensor | None, size: int, most: float) -> bool:
    tensors = (qkv, beta, alpha, A_log, dt_bias)
    value = qkv.shape[-1] // beta.shape[-1] - 2 * size
    return (usable(*tensors) and single(*tensors) and size % 16 == 0 and value % 16 == 0
            and qkv.shape[1] > 1)


@delta_keys.path("numba", when=_compiled)
def _numba(qkv: Tensor, beta: Tensor, alpha: Tensor | None, A_log: Tensor | None,
           dt_bias: Tensor | None, size: int, most: float) -> Terms:
    q, k, v, erase, g = _Keys.apply(qkv, beta, alpha, A_log, dt_bias, size, most)
    return q, k, v, erase, None if alpha is None else g


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, beta: Tensor, alpha: Tensor | None, A_log: Tensor | None,
                dt_bias: Tensor | None, size: int, most: float) -> tuple[Tensor, ...]:
        from manyform.ops.kernels import delta_keys as kernel
        from manyform.ops.kernels.lanes import flat
        qkv, beta = qkv.contiguous(), beta.contiguous()
        batch, length, heads = beta.shape
        value = qkv.shape[-1] // heads - 2 * size
        empty = qkv.new_empty(0, dtype=torch.float32)
        decays = alpha is not None and A_log is not None and dt_bias is not None
        alpha = alpha.contiguous() if alpha is not None else empty.to(beta.dtype)
        rate = A_log.exp() if A_log is not None else empty
        bias = dt_bias if dt_bias is not None else empty
        q, k, erase = (qkv.new_empty(batch, length, heads, size) for _ in range(3))
        v = qkv.new_empty(batch, length, heads, value)
        g = qkv.new_empty(beta.shape if decays else 0, dtype=torch.float32)
        ctx.dims, ctx.most = (batch * length, heads, size, value), most
        threads()
        run: Any = kernel.forward
        run(flat(qkv), flat(beta), flat(alpha), flat(rate), flat(bias), ctx.dims, most,
            *(flat(x) for x in (q, k, v, erase, g)))
        ctx.save_for_backward(qkv, beta, alpha, rate, bias, g)
        return q, k, v, erase, g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from manyform.ops.kernels import delta_keys as kernel
        from manyform.ops.kernels.lanes import flat
        qkv, beta, alpha, rate, bias, g = ctx.saved_tensors
        dqkv, dbeta, dalpha = (torch.empty_like(x) for x in (qkv, beta, alpha))
        partial = torch.empty(threads(), 2 * beta.shape[-1])
        run: Any = kernel.backward
        run(*(flat(x) for x in (qkv, beta, alpha, rate, bias)), ctx.dims, ctx.most, flat(g),
            *(flat(x.contiguous()) for x in grads), flat(dqkv), flat(dbeta), flat(dalpha),
            partial.numpy())
        if not g.numel():
            return dqkv, dbeta, None, None, None, None, None
        return dqkv, dbeta, dalpha, *partial.sum(0).chunk(2), None, None
