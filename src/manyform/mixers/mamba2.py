"""Mamba-2: a state space whose heads decay as a whole, so that it is also a masked attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError, unknown
from manyform.linear import Linear
from manyform.ops.gates import scale_and_keep, silu_gate
from manyform.ops.matrix_recurrence import matrix_recurrence
from manyform.ops.rms_norm import rms_norm
from manyform.ops.short_conv import short_conv

OUT_NORMS = ("gated", "before_gate", "none")


class Mamba2State(NamedTuple):
    """conv: (batch, conv_size - 1, channels), the last inputs of the convolution; ssm: (batch,
    n_heads, d_state, head_dim), the state of the recurrence. Both float32."""

    conv: Tensor
    ssm: Tensor


@mixer("mamba2")
class Mamba2(SequenceMixer):
    """S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t, a head with one A < 0
    (Dao & Gu 2024, "Transformers are SSMs", section 7.1 and figure 6, the parallel block).

    z, x, B, C, dt = in_proj(u); x, B, C = silu(short_conv(x, B, C)); dt = softplus(dt + dt_bias);
    out_proj(norm(y * silu(z))).

    d_state: features of B and C. expand: inner width over d_model. head_dim: features of x in a
    head, the largest divisor of the inner width up to 64 if None. n_groups: groups of heads that
    share B and C, and over which the norm is taken. conv_size: taps of the convolution. dt_min,
    dt_max: range of the initial steps, log-uniform. A starts uniform in -16 .. -1 and D at one;
    they and dt_bias have no weight decay. Linear layers start uniform within 1 / sqrt(fan in),
    out_proj divided by the square root of the depth, as in the released code.

    bias: on in_proj and out_proj; conv_bias: on the convolution. out_norm: "gated" as above, or
    norm(y) * silu(z) ("before_gate"), or no norm ("none"), as Falcon-H1 has them; norm_eps: of the
    norm. dt_limit: dt stays within these bounds (released code). scales: multiply z, x, B, C
    and dt behind in_proj (Falcon-H1).
    """

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int = 128,
                 expand: float = 2.0, head_dim: int | None = None, n_groups: int = 1,
                 conv_size: int = 4, dt_min: float = 1e-3, dt_max: float = 1e-1,
                 bias: bool = False, conv_bias: bool = True, out_norm: str = "gated",
                 norm_eps: float = 1e-5,
                 dt_limit: tuple[float, float] | None = None,
                 scales: Sequence[float] | None = None) -> None:
        super().__init__(d_model, place=place)
        inner = round(expand * d_model)
        for name, value in (("d_state", d_state), ("expand * d_model", inner),
                            ("n_groups", n_groups), ("conv_size", conv_size),
                            ("head_dim", 1 if head_dim is None else head_dim)):
            if value < 1:
                raise ManyformError(f"{name} of mamba2 must be at least 1, not {value}")
        if not 0 < dt_min <= dt_max:
            raise ManyformError(f"mamba2 needs 0 < dt_min <= dt_max, not {dt_min} and {dt_max}")
        size = head_dim or max(s for s in range(1, 65) if inner % (s * n_groups) == 0 or s == 1)
        if inner % (size * n_groups):
            raise ManyformError(f"the inner width {inner} of mamba2 must be a multiple of head_dim "
                                f"* n_groups = {size} * {n_groups}")
        if out_norm not in OUT_NORMS:
            raise unknown("out_norm of mamba2", out_norm, OUT_NORMS)
        if dt_limit is not None and not 0 <= dt_limit[0] < dt_limit[1]:
            raise ManyformError(f"dt_limit of mamba2 is a pair 0 <= low < high, not {dt_limit}")
        if scales is not None and len(scales) != 5:
            raise ManyformError("scales of mamba2 are five numbers, for z, x, B, C and dt, not "
                                f"{scales!r}")
        self.scales = None if scales is None else tuple(scales)
        self.expand, self.bias, self.out_norm, self.norm_eps = expand, bias, out_norm, norm_eps
        self.dt_limit = None if dt_limit is None else tuple(dt_limit)
        self.inner, self.d_state, self.head_dim = inner, d_state, size
        self.n_heads, self.n_groups, self.conv_size = inner // size, n_groups, conv_size
        self.conv_width = inner + 2 * n_groups * d_state
        self.in_proj = Linear(d_model, inner + self.conv_width + self.n_heads, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_width, conv_size))
        self.conv_bias: nn.Parameter | None
        self.register_parameter("conv_bias",
                                nn.Parameter(torch.empty(self.conv_width)) if conv_bias else None)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm_weight: nn.Parameter | None
        self.register_parameter("norm_weight", None if out_norm == "none" else
                                nn.Parameter(torch.ones(inner)))
        self.out_proj = Linear(inner, d_model, bias=bias)
        for tensor in (self.conv_weight, self.conv_bias):
            if tensor is not None:
                nn.init.uniform_(tensor, -(conv_size**-0.5), conv_size**-0.5)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(place.count))
            dt = torch.exp(torch.empty(self.n_heads).uniform_(math.log(dt_min), math.log(dt_max)))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, state: Mamba2State | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, Mamba2State]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        old_conv, old_ssm = (None, None) if state is None else state
        shared = self.n_groups * self.d_state
        projected = self.in_proj(x)
        if self.scales is not None:
            projected = projected * self._scale_row(projected)
        z, xbc, dt = projected.split([self.inner, self.conv_width, self.n_heads], dim=-1)
        xbc, conv = short_conv(xbc, self.conv_weight, self.conv_bias, old_conv, reset, "silu")
        u, b, c = xbc.split([self.inner, shared, shared], dim=-1)
        b, c = (part.unflatten(-1, (self.n_groups, self.d_state)) for part in (b, c))
        u = u.unflatten(-1, (self.n_heads, self.head_dim))
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        if self.dt_limit is not None:
            dt = dt.clamp(*self.dt_limit)
        write, u = scale_and_keep(u, dt)
        y, ssm = matrix_recurrence(c, b, write, -self.A_log.exp() * dt, None, old_ssm, reset)
        if self.out_norm == "before_gate":
            y = self._norm((y + u * self.D[:, None].to(y.dtype)).flatten(-2)) * F.silu(z)
        else:
            y = self._norm(silu_gate(y, z, u, self.D))
        return self.out_proj(y), Mamba2State(conv, ssm)

    def _scale_row(self, like: Tensor) -> Tensor:
        """`scales`, each repeated over its features."""
        assert self.scales is not None
        shared = self.n_groups * self.d_state
        return torch.cat([like.new_full((n,), scale) for n, scale in zip(
            (self.inner, self.inner, shared, shared, self.n_heads), self.scales, strict=True)])

    def _norm(self, y: Tensor) -> Tensor:
        if self.norm_weight is None:
            return y
        if self.n_groups == 1:
            return rms_norm(y, self.norm_weight, self.norm_eps)
        groups = y.unflatten(-1, (self.n_groups, -1))
        unit = torch.ones_like(self.norm_weight[:groups.shape[-1]])
        return rms_norm(groups, unit, self.norm_eps).flatten(-2) * self.norm_weight.to(y.dtype)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> Mamba2State:
        """Zeros, in float32 (float64 for a float64 mixer)."""
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return Mamba2State(
            torch.zeros(batch_size, self.conv_size - 1, self.conv_width, dtype=dtype,
                        device=device),
            torch.zeros(batch_size, self.n_heads, self.d_state, self.head_dim, dtype=dtype,
                        device=device))

    def cost(self, length: int) -> Cost:
        """Matrix products, the convolution and the recurrence; a state of fixed size."""
        products = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        conv = 2 * self.conv_size * self.conv_width
        ssm = self.inner * self.d_state
        element = torch.promote_types(self.A_log.dtype, torch.float32).itemsize
        return Cost(length * (products + conv + 5 * ssm),
                    element * ((self.conv_size - 1) * self.conv_width + ssm))

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay on what sets the rates and the skip."""
        return {name: Hint(weight_decay=False) for name in ("A_log", "D", "dt_bias")}
