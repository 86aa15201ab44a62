"""One layer of a classic recurrent network: Elman, LSTM or GRU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.errors import unknown
from manyform.ops.exact_linear import exact_linear
from manyform.ops.kernels import single, threads, usable
from manyform.ops.linear import weight_gradient
from manyform.ops.operation import operation

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
Carried = tuple[Tensor, ...]
GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
LARGEST = 2**20
"""Recurrent weights up to which the compiled loop keeps them in cache."""


def _flops(x: Tensor, weights: Weights, state: Carried, cell: str = "tanh",
           reset: Tensor | None = None) -> int:
    return 2 * x.shape[0] * x.shape[1] * (weights[0].numel() + weights[1].numel())


@operation(flops=_flops)
def recurrent_layer(x: Tensor, weights: Weights, state: Carried, cell: str = "tanh",
                    reset: Tensor | None = None) -> tuple[Tensor, Carried]:
    """The recurrence of one layer, z_t = W x_t + b and u_t = U h_{t-1} + c, by cell:

    tanh, relu  h = act(z + u)                                           (Elman 1990)
    lstm        i, f, o = sigmoid(z + u), g = tanh(z + u),
                c' = f c + i g, h = o tanh(c')                           (Gers 2000, eq. 1-6)
    gru         r, s = sigmoid(z + u), n = tanh(z + r u),
                h' = (1 - s) n + s h                                     (Cho 2014, eq. 5-8)

    x: (B, T, D); weights: W (G h, D), U (G h, h), b, c (G h), gates in torch's order (i f g o;
    r s n); state: (h,) or (h, c), each (B, h); reset: (B, T) bool, true where the state before
    the step is zero. Returns y: (B, T, h) in the dtype of x and the state after the last step in
    float32 (float64 for float64 weights). The GRU's reset gate stands after the product, as in
    cuDNN, so that both products are one.
    """
    if cell not in GATES:
        raise unknown("cell", cell, GATES)
    w, u, b, c = weights
    carried = [s.to(w.dtype) for s in state]
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            carried = [s * ~reset[:, t, None] for s in carried]
        z = x[:, t].to(w.dtype) @ w.T + b
        v = carried[0] @ u.T + c
        if cell == "lstm":
            i, f, g, o = (z + v).chunk(4, dim=-1)
            memory = f.sigmoid() * carried[1] + i.sigmoid() * g.tanh()
            carried = [o.sigmoid() * memory.tanh(), memory]
        elif cell == "gru":
            (zr, zs, zn), (vr, vs, vn) = z.chunk(3, dim=-1), v.chunk(3, dim=-1)
            n = (zn + (zr + vr).sigmoid() * vn).tanh()
            s = (zs + vs).sigmoid()
            carried = [(1 - s) * n + s * carried[0]]
        else:
            carried = [(z + v).tanh() if cell == "tanh" else (z + v).relu()]
        ys.append(carried[0])
    return torch.stack(ys, dim=1).to(x.dtype), _widen(carried)


@recurrent_layer.path("fused")
def _fused(x: Tensor, weights: Weights, state: Carried, cell: str = "tanh",
           reset: Tensor | None = None) -> tuple[Tensor, Carried]:
    """The library's kernels over the stretches of time between resets, in whichever rows they are.

    (Each document packed as a row of its own is one call instead of many, but the library's
    backward pass over packed rows is quadratic in time: 10 to 50 times slower at the documents of
    real text.)
    """
    dtype = weights[0].dtype
    inner = x.to(dtype)
    state = tuple(s.to(dtype) for s in state)
    cuts = [] if reset is None else reset.any(dim=0).nonzero()[:, 0].tolist()
    edges = sorted({0, *cuts, x.shape[1]})
    ys = []
    with torch.autocast(x.device.type, enabled=False):
        for start, end in pairwise(edges):
            if reset is not None:
                state = tuple(s * ~reset[:, start, None] for s in state)
            y, state = _library(inner[:, start:end], state, weights, cell)
            ys.append(y)
    return torch.cat(ys, dim=1).to(x.dtype), _widen(state)


def _compiled(x: Tensor, weights: Weights, state: Carried, cell: str = "tanh",
              reset: Tensor | None = None) -> bool:
    return (x.shape[1] > 0 and all(w.dtype == torch.float32 for w in weights) and single(x)
            and weights[1].numel() <= LARGEST and usable(x, *weights, *state, reset))


@recurrent_layer.path("numba", when=_compiled)
def _(x: Tensor, weights: Weights, state: Carried, cell: str = "tanh",
      reset: Tensor | None = None) -> tuple[Tensor, Carried]:
    """One compiled loop over time each way, resets and all; see kernels/recurrent."""
    w, u, b, c = weights
    gates, size = GATES[cell], u.shape[1]
    z, carried = exact_linear(x, w, b), [s.float() for s in state]
    more = -size % 32
    if more:  # features that stay zero
        z = F.pad(z.unflatten(-1, (gates, size)), (0, more)).flatten(-2)
        u = F.pad(u.unflatten(0, (gates, size)), (0, more, 0, more)).flatten(0, 1)
        c = F.pad(c.unflatten(0, (gates, size)), (0, more)).flatten()
        carried = [F.pad(s, (0, more)) for s in carried]
    y, *after = _Recurrent.apply(cell, z, u, c, reset, x.dtype, *carried)
    return y[..., :size].to(x.dtype), tuple(s[..., :size] for s in after)


class _Recurrent(torch.autograd.Function):
    """The recurrence alone, given z = W x + b; whole vectors of features. dtype: of the layer's
    input, to which the gradient of U rounds what it multiplies."""

    @staticmethod
    def forward(ctx: Any, cell: str, z: Tensor, u: Tensor, c: Tensor, reset: Tensor | None,
                dtype: torch.dtype, *state: Tensor) -> tuple[Tensor, ...]:
        from manyform.ops.kernels import recurrent as kernel
        from manyform.ops.kernels.lanes import flat, marks
        batch, length, size = (*z.shape[:2], u.shape[1])
        training = any(ctx.needs_input_grad)
        after = [s.clone(memory_format=torch.contiguous_format) for s in state]
        y = torch.empty(batch, length, size, dtype=z.dtype)
        before = torch.empty_like(y) if training else y.new_empty(0)
        kept = torch.empty(before.numel() * kernel.KEPT[cell])
        memory = after[1] if cell == "lstm" else kept.new_empty(0)
        dims = (batch, length, size, GATES[cell])
        threads()
        run: Any = kernel.forward
        run(kernel.CELLS[cell], flat(z.contiguous()), flat(u.T.contiguous()), flat(c), marks(reset),
            flat(after[0]), flat(memory), flat(y), flat(before), flat(kept), dims)
        ctx.cell, ctx.dims, ctx.dtype = cell, dims, dtype
        if training:
            ctx.save_for_backward(u, reset, before, kept)
        return y, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *dafter: Tensor) -> Any:
        from manyform.ops.kernels import recurrent as kernel
        from manyform.ops.kernels.lanes import flat, marks
        u, reset, before, kept = ctx.saved_tensors
        batch, length, _, _ = ctx.dims
        dstate = [d.clone(memory_format=torch.contiguous_format) for d in dafter]
        dmemory = dstate[1] if ctx.cell == "lstm" else kept.new_empty(0)
        dz = torch.empty(batch, length, len(u), dtype=dy.dtype)
        du = torch.empty_like(dz) if ctx.cell == "gru" else dz.new_empty(0)
        threads()
        run: Any = kernel.backward
        run(kernel.CELLS[ctx.cell], flat(kept), flat(before), flat(u.contiguous()), marks(reset),
            flat(dy.contiguous()), flat(dstate[0]), flat(dmemory), flat(dz), flat(du), ctx.dims)
        added = du if ctx.cell == "gru" else dz
        of_u = weight_gradient(added.to(ctx.dtype), before.to(ctx.dtype)).float()
        return None, dz, of_u, added.sum((0, 1), dtype=torch.float32), None, None, *dstate


def _library(x: Tensor, state: Carried, weights: Weights, cell: str) -> tuple[Tensor, Carried]:
    kernels: dict[str, Any] = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu, "gru": torch.gru,
                               "lstm": torch.lstm}
    hidden = tuple(s[None] for s in state)
    y, *after = kernels[cell](x, list(hidden) if cell == "lstm" else hidden[0], list(weights), True,
                              1, 0.0, torch.is_grad_enabled(), False, True)
    return y, tuple(s[0] for s in after)


def _widen(state: list[Tensor] | Carried) -> Carried:
    return tuple(s if s.dtype == torch.float64 else s.float() for s in state)
