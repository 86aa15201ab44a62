"""Mamba-3: a state space with a trapezoidal step and complex rates, in the form of rotations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.norms import RMSNorm
from manyform.ops.gates import scale_heads, silu_gate
from manyform.ops.linear_scan import linear_scan
from manyform.ops.mamba3 import mamba3_keys
from manyform.ops.matrix_recurrence import matrix_recurrence

SLOWEST = 1e-4
"""The least -A (released code)."""


class Mamba3State(NamedTuple):
    """turn: (batch, n_heads, pairs, 2), the cosine and sine of the angle by which the features have
    turned; ssm: (batch, n_heads, d_state, head_dim), the recurrence; key: (batch, n_heads, d_state)
    and value: (batch, n_heads, head_dim) of the last step. All float32."""

    turn: Tensor
    ssm: Tensor
    key: Tensor
    value: Tensor


@mixer("mamba3")
class Mamba3(SequenceMixer):
    """S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t k_{t-1} v_{t-1}^T + l_t dt_t k_t v_t^T,
    y_t = S_t^T q_t + D v_t, a head at a time, with a = exp(A dt) (Lahoti 2026, "Mamba-3", the
    single-input single-output form of the released code).

    z, v, B, C, dt, A, l, w = in_proj(u): dt = softplus(dt + dt_bias), A < 0 and the trapezoid's
    weight l = sigmoid(l) of each head and step; q and k are C and B, normalised, with a bias a
    head, turned by the angles that pi tanh(w) dt adds up to: the imaginary part of a complex A.
    out_proj(y * silu(z)). No convolution.

    d_state: features of B and C. expand: inner width over d_model. head_dim: features of v in a
    head, the largest divisor of the inner width up to 64 if None. n_groups: groups of heads that
    share B and C. rope_fraction: the part of the features of B and C that turns. dt_min, dt_max:
    range of the initial steps, log-uniform. Biases of B and C and D start at one; dt_bias and D
    have no weight decay. Linear layers start uniform within 1 / sqrt(fan in), out_proj divided by
    the square root of the depth.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int = 128,
                 expand: float = 2.0, head_dim: int | None = None, n_groups: int = 1,
                 rope_fraction: float = 0.5, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        super().__init__(d_model, place=place)
        inner = round(expand * d_model)
        for name, value in (("expand * d_model", inner), ("n_groups", n_groups),
                            ("head_dim", 1 if head_dim is None else head_dim)):
            if value < 1:
                raise ManyformError(f"{name} of mamba3 must be at least 1, not {value}")
        if not 0 < dt_min <= dt_max:
            raise ManyformError(f"mamba3 needs 0 < dt_min <= dt_max, not {dt_min} and {dt_max}")
        self.pairs = int(d_state * rope_fraction) // 2
        if not 0 < rope_fraction <= 1 or self.pairs < 1:
            raise ManyformError("d_state and rope_fraction of mamba3 must leave a pair of features "
                                f"to turn, which {d_state} and {rope_fraction} do not")
        size = head_dim or max(s for s in range(1, 65) if inner % (s * n_groups) == 0 or s == 1)
        if inner % (size * n_groups):
            raise ManyformError(f"the inner width {inner} of mamba3 must be a multiple of head_dim "
                                f"* n_groups = {size} * {n_groups}")
        self.inner, self.d_state, self.head_dim, self.n_groups = inner, d_state, size, n_groups
        self.n_heads = inner // size
        self.widths = [inner, inner, n_groups * d_state, n_groups * d_state, *[self.n_heads] * 3,
                       self.pairs]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.B_norm, self.C_norm = RMSNorm(d_state, eps=1e-5), RMSNorm(d_state, eps=1e-5)
        self.B_bias, self.C_bias = (
            nn.Parameter(torch.ones(self.n_heads, d_state)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.out_proj = Linear(inner, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(place.count))
            dt = torch.exp(torch.empty(self.n_heads).uniform_(math.log(dt_min), math.log(dt_max)))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, state: Mamba3State | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, Mamba3State]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        old = self.initial_state(len(x), device=x.device) if state is None else state
        wide, groups = old.ssm.dtype, (self.n_groups, self.d_state)
        z, v, b, c, dt, rate, blend, turn = self.in_proj(x).split(self.widths, dim=-1)
        v = v.unflatten(-1, (self.n_heads, self.head_dim))
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        log_a = -dt * heavy_tail(rate.to(wide)).clamp(min=SLOWEST)
        new = dt * torch.sigmoid(blend.to(wide))  # what k_t v_t weighs; k_{t-1} v_{t-1}: dt - new
        angle = self._angles(turn.to(wide), dt, old.turn, reset)
        cos, sin = torch.cos(angle), torch.sin(angle)
        q, k, dot = mamba3_keys(self.C_norm(c.unflatten(-1, groups)),
                                self.B_norm(b.unflatten(-1, groups)), self.C_bias, self.B_bias,
                                cos, sin)
        # Up to the key of step t, S_t depends on that of step t - 1 alone: a_t (S_{t-1} + (1 - l_t)
        # dt_t k_{t-1} v_{t-1}^T), so the recurrence takes keys and values one step late.
        late = dt - new + F.pad(new[:, :-1], (0, 0, 1, 0))
        late = late * log_a.exp()
        if reset is not None:
            late = late.masked_fill(reset[..., None], 0.0)
        keys = torch.cat([old.key[:, None].to(k.dtype), k[:, :-1]], dim=1)
        values = torch.cat([old.value[:, None].to(v.dtype), v[:, :-1]], dim=1)
        y, ssm = matrix_recurrence(q, keys, scale_heads(values, late), log_a, None, old.ssm, reset)
        y = y + scale_heads(v, new * dot)
        key, value = k[:, -1].to(wide), v[:, -1].to(wide)
        ssm = ssm + (new[:, -1, :, None] * key)[..., None] * value[:, :, None]
        turned = torch.stack([cos[:, -1], sin[:, -1]], dim=-1)
        return self.out_proj(silu_gate(y, z, v, self.D)), Mamba3State(turned, ssm, key, value)

    def _angles(self, turn: Tensor, dt: Tensor, before: Tensor, reset: Tensor | None) -> Tensor:
        """The sum of pi tanh(turn) dt since the document began: (batch, length, heads, pairs)."""
        steps = (math.pi * torch.tanh(turn)[:, :, None] * dt[..., None]).flatten(2)
        whole = torch.ones(1, 1, 1, dtype=steps.dtype, device=steps.device).expand(steps.shape)
        first = torch.atan2(before[..., 1], before[..., 0])
        sums, _ = linear_scan(whole, steps, first.flatten(1), reset)
        return sums.unflatten(-1, (self.n_heads, self.pairs))

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> Mamba3State:
        """Nothing turned and nothing seen, in float32 (float64 for a float64 mixer)."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        turn, ssm, key, value = (
            torch.zeros(batch_size, self.n_heads, *shape, dtype=dtype, device=device)
            for shape in ((self.pairs, 2), (self.d_state, self.head_dim), (self.d_state,),
                          (self.head_dim,)))
        turn[..., 0] = 1.0
        return Mamba3State(turn, ssm, key, value)

    def cost(self, length: int) -> Cost:
        """Matrix products, the recurrence and the sums of angles; a state of fixed size."""
        products = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        ssm, turns = self.inner * self.d_state, self.n_heads * self.pairs
        element = torch.promote_types(self.D.dtype, torch.float32).itemsize
        return Cost(length * (products + 5 * ssm + 2 * turns),
                    element * (ssm + 2 * turns + self.n_heads * self.d_state + self.inner))

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay on the steps and the skip."""
        return {name: Hint(weight_decay=False) for name in ("dt_bias", "D")}


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0, 1 / (1 - x) for x < 0: positive, and smooth at 0 (released code)."""
    return x.clamp(min=0) + 1 / (1 - x.clamp(max=0))
