"""Test-time training: the state is a network that learns to reconstruct what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops import tiled_ttt
from manyform.ops.fast_weights import GELU, Blocks, Weights, where
from manyform.ops.operation import operation

EPS = 1e-6


class TTTState(NamedTuple):
    """weights: those before the current mini-batch, (B, H, inputs + 1, outputs) a layer, biases
    last; sums: of the mini-batch's gradients times their rates, of the same shapes; position: (B,)
    int64, tokens of the mini-batch so far."""

    weights: Weights
    sums: Weights
    position: Tensor


def _flops(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
           initial: Weights, state: TTTState | None = None, reset: Tensor | None = None) -> int:
    sizes = [w[0, :-1].numel() for w in initial]
    return rate.numel() * (6 * sum(sizes) + 2 * sum(sizes[1:]))


@operation(flops=_flops)
def ttt(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
        initial: Weights, state: TTTState | None = None, reset: Tensor | None = None,
        ) -> tuple[Tensor, TTTState]:
    """W_t = W - scale_i sum_{s <= t} rate_s grad l(W; x_s),  y_t = f(q_t; W_t)

    with W the weights before the mini-batch of len(scale) tokens, i the place of t in it, and the
    sum over its tokens (Sun 2024, "Learning to (Learn at Test Time)", section 2.4 and the released
    code). l(W; x) = 1/2 |f(k; W) - v|^2, and f(x; W) = x + LN(net(x; W)) with net one linear layer
    or two with a GELU between.

    q, k, v: (B, T, H, D); rate: (B, T, H); scale: (C,); norm: (2, H, D), scale and shift of LN;
    initial: (H, inputs + 1, outputs) a layer, biases last, the weights at a document's beginning;
    reset: (B, T) bool, true where a document begins.
    Returns y: (B, T, H, D) in the dtype of v, and the state in float32 (float64 for float64 input),
    in which all is computed.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    weights, sums, position = _start(len(q), initial, state, wide)
    fresh = _expand(len(q), initial, wide)
    q_, k_, v_, rates = (x.to(wide).transpose(1, 2) for x in (q, k, v, rate))
    last, ys = len(scale) - 1, []
    with torch.autocast(v.device.type, enabled=False):
        for t in range(q.shape[1]):
            if reset is not None:
                weights = where(reset[:, t], fresh, weights)
                sums = where(reset[:, t], _zeros(sums), sums)
                position = torch.where(reset[:, t], 0, position)
            x, target = k_[:, :, t:t + 1], v_[:, :, t:t + 1] - k_[:, :, t:t + 1]
            inputs, results = GELU.run(weights, x)
            errors = GELU.gradients(weights, results, _loss_gradient(results[-1], target, norm))
            step = rates[:, :, t, None, None]
            sums = tuple(s + step * i.mT @ e for s, i, e in zip(sums, inputs, errors, strict=True))
            factor = scale.to(wide)[position][:, None, None, None]
            now = tuple(w - factor * s for w, s in zip(weights, sums, strict=True))
            query = q_[:, :, t:t + 1]
            ys.append(query + _norm(GELU.run(now, query)[1][-1], norm))
            weights = where(position == last, now, weights)
            sums = where(position == last, _zeros(sums), sums)
            position = (position + 1) % (last + 1)
    y = torch.cat(ys, dim=2).transpose(1, 2)
    return y.to(v.dtype), TTTState(weights, sums, position)


@ttt.path("dual")
def _(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
      initial: Weights, state: TTTState | None = None, reset: Tensor | None = None,
      ) -> tuple[Tensor, TTTState]:
    """A mini-batch at a time, as matrix products; see `fast_weights`."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, size = len(q), len(scale)
    with torch.autocast(v.device.type, enabled=False):
        weights, sums, position = _start(batch, initial, state, wide)
        fresh = _expand(batch, initial, wide)
        blocks = Blocks(batch, q.shape[1], size, None if state is None else position, reset,
                        q.device)
        parts = [blocks.split(x.to(wide)).transpose(2, 3).unbind(1) for x in (q, k, v)]
        rates = (blocks.split(rate.to(wide)) * blocks.valid[..., None]).transpose(2, 3).unbind(1)
        mix = -scale.to(wide)[:, None]
        causal = mix * torch.ones(size, size, dtype=wide, device=q.device).tril()
        new = blocks.fresh.any(0).tolist() if reset is not None else [False] * blocks.count
        held: list[_Held] = []
        ys = []
        for n, (q_, k_, v_, step) in enumerate(zip(*parts, rates, strict=True)):
            begun = sums if n == 0 and state is not None else None  # a mini-batch under way
            if new[n]:
                weights = where(blocks.fresh[:, n], fresh, weights)
                if begun is not None:
                    begun = where(blocks.fresh[:, n], _zeros(sums), begun)
            inputs, results = GELU.run(weights, k_)
            last = _LossGradient.apply(results[-1], v_ - k_, norm.to(wide)[:, :, None])
            errors = [step[..., None] * e for e in GELU.gradients(weights, results, last)]
            read = GELU.read(q_, weights, begun, inputs, errors, None, mix, causal)
            ys.append(q_ + _norm(read, norm))
            held.append(_Held(weights, begun, inputs, errors))
            if n + 1 < len(rates):  # the next one begins there, or with a document
                weights = tuple(
                    torch.baddbmm(w.flatten(0, 1), i.flatten(0, 1).mT, (mix[-1] * e).flatten(0, 1)
                                  ).view(w.shape) for w, i, e in zip(weights, inputs, errors,
                                                                     strict=True))
                if begun is not None:
                    weights = _stepped(weights, begun, mix[-1])
        weights, sums = _at_the_end(held, blocks, mix[-1])
        y = blocks.join(torch.stack(ys, dim=1).transpose(2, 3))
    return y.to(v.dtype), TTTState(weights, sums, blocks.position)


def _tiles(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
           initial: Weights, state: TTTState | None = None, reset: Tensor | None = None) -> bool:
    return tiled_ttt.applies(q, v, scale, initial, None if state is None else state.position)


@ttt.path("tiles", when=_tiles)
def _(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, norm: Tensor,
      initial: Weights, state: TTTState | None = None, reset: Tensor | None = None,
      ) -> tuple[Tensor, TTTState]:
    wide = torch.float32
    begin = tuple(w.to(wide) for w in initial)
    old, *_ = _start(len(q), begin, state, wide)
    y, (weights, sums), position = tiled_ttt.tiled_ttt(
        q.to(v.dtype), k.to(v.dtype), v, rate.to(wide), scale.to(wide), norm.to(wide), begin, old,
        reset)
    return y, TTTState(weights, sums, position)


class _Held(NamedTuple):
    """A mini-batch: the weights before it, sums of an earlier call or None, and its inputs and
    errors."""

    weights: Weights
    begun: Weights | None
    inputs: list[Tensor]
    errors: list[Tensor]


def _at_the_end(held: list[_Held], blocks: Blocks, mix: Tensor) -> tuple[Weights, Weights]:
    """The weights and the sums after each row's last token."""
    count = len(held)
    ends = ([count] * len(blocks.valid) if blocks.plain
            else blocks.valid.any(-1).sum(1).tolist())

    def of(take: Callable[[_Held], Sequence[Tensor]]) -> list[Tensor]:
        """A tensor a layer, each row's from its last mini-batch."""
        if all(n == count for n in ends):
            return list(take(held[-1]))
        each = [take(h) for h in held]
        return [torch.stack([each[n - 1][layer][row] for row, n in enumerate(ends)])
                for layer in range(len(each[0]))]
    weights = of(lambda h: h.weights)
    begun = of(lambda h: _zeros(h.weights) if h.begun is None else h.begun)
    sums = tuple(s + i.mT @ e for s, i, e in zip(
        begun, of(lambda h: h.inputs), of(lambda h: h.errors), strict=True))
    full = blocks.position == 0
    return (where(full, _stepped(tuple(weights), sums, mix), tuple(weights)),
            where(full, _zeros(sums), sums))


class _LossGradient(torch.autograd.Function):
    """`_loss_gradient` with its own gradient, in a third of the passes. norm: (2, H, 1, D)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, norm: Tensor) -> Tensor:
        variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
        inverse = (variance + EPS).rsqrt()
        unit = (z - mean) * inverse
        error = unit * norm[0] + norm[1] - target
        grad = error * norm[0]
        along = (grad * unit).mean(-1, keepdim=True)
        out = (grad - grad.mean(-1, keepdim=True) - unit * along) * inverse
        ctx.save_for_backward(unit, inverse, error, along, out, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, w: Tensor) -> Any:
        unit, inverse, error, along, out, norm = ctx.saved_tensors
        scale = norm[0]
        meet = (w * unit).mean(-1, keepdim=True)
        dgrad = (w - w.mean(-1, keepdim=True) - unit * meet) * inverse
        scaled = dgrad * scale
        dunit = scaled * scale - (w * along + error * scale * meet) * inverse
        turned = (dunit * unit).mean(-1, keepdim=True) + (w * out).mean(-1, keepdim=True)
        dz = (dunit - dunit.mean(-1, keepdim=True) - unit * turned) * inverse
        dscale = (dgrad * (error + unit * scale)).sum((0, 2))
        return dz, -scaled, torch.stack([dscale, scaled.sum((0, 2))])[:, :, None]


def _stepped(weights: Weights, sums: Weights, mix: Tensor) -> Weights:
    return tuple(w + mix * s for w, s in zip(weights, sums, strict=True))


def _zeros(weights: Weights) -> Weights:
    return tuple(torch.zeros_like(w) for w in weights)


def _expand(batch: int, initial: Weights, wide: torch.dtype) -> Weights:
    return tuple(w.to(wide).expand(batch, -1, -1, -1) for w in initial)


def _start(batch: int, initial: Weights, state: TTTState | None, wide: torch.dtype) -> TTTState:
    if state is None:
        weights = _expand(batch, initial, wide)
        return TTTState(weights, _zeros(weights),
                        torch.zeros(batch, dtype=torch.int64, device=weights[0].device))
    return TTTState(tuple(w.to(wide) for w in state.weights),
                    tuple(s.to(wide) for s in state.sums), state.position)


def _norm(z: Tensor, norm: Tensor) -> Tensor:
    """LN of z (B, H, C, D), with a scale and a shift a head."""
    scale, shift = norm.to(z.dtype)[:, :, None]
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * scale + shift


def _loss_gradient(z: Tensor, target: Tensor, norm: Tensor) -> Tensor:
    """The gradient of 1/2 |LN(z) - target|^2 with respect to z, written out so that it can be
    differentiated again."""
    scale, shift = norm.to(z.dtype)[:, :, None]
    centred = z - z.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    unit = centred * inverse
    grad = (unit * scale + shift - target) * scale
    along = (grad * unit).mean(-1, keepdim=True)
    return (grad - grad.mean(-1, keepdim=True) - unit * along) * inverse
