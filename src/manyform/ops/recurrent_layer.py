"""One layer of a classic recurrent network: Elman, LSTM or GRU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from manyform.errors import unknown
from manyform.ops.operation import operation

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
Carried = tuple[Tensor, ...]
GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


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


def _library(x: Tensor, state: Carried, weights: Weights, cell: str) -> tuple[Tensor, Carried]:
    kernels: dict[str, Any] = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu, "gru": torch.gru,
                               "lstm": torch.lstm}
    hidden = tuple(s[None] for s in state)
    y, *after = kernels[cell](x, list(hidden) if cell == "lstm" else hidden[0], list(weights), True,
                              1, 0.0, torch.is_grad_enabled(), False, True)
    return y, tuple(s[0] for s in after)


def _widen(state: list[Tensor] | Carried) -> Carried:
    return tuple(s if s.dtype == torch.float64 else s.float() for s in state)
