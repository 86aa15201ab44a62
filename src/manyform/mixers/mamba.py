"""Mamba: a state space whose rates the input chooses, behind a short convolution and a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError, unknown
from manyform.linear import Linear
from manyform.norms import RMSNorm
from manyform.ops.rms_norm import rms_norm
from manyform.ops.selective_scan import selective_scan
from manyform.ops.short_conv import short_conv

SELECTION_NORMS = (None, "plain", "learned")


class MambaState(NamedTuple):
    """conv: (batch, conv_size - 1, inner), the last inputs of the convolution; ssm: (batch,
    inner, d_state), the state of the recurrence. Both float32."""

    conv: Tensor
    ssm: Tensor


@mixer("mamba")
class Mamba(SequenceMixer):
    """The selective state space of Gu & Dao 2023 (figure 3, algorithm 2).

    x, z = in_proj(u); x = silu(short_conv(x)); dt, B, C = x_proj(x);
    y = selective_scan(x, softplus(dt_proj(dt)), A, B, C, D); out_proj(y * silu(z)).

    d_state: N, states a channel. expand: inner width over d_model. conv_size: taps of the
    convolution. dt_rank: rank of the projection to dt, ceil(d_model / 16) by default. dt_min,
    dt_max: range of the initial steps, log-uniform (section 3.6). A starts at -1 .. -N (S4D-real),
    D at one, and neither has weight decay. Initialisation as in the released code: the linear
    layers uniform within 1 / sqrt(fan in), out_proj divided by the square root of the depth.

    bias: on in_proj and out_proj; conv_bias: on the convolution. selection_norm: RMSNorm on dt, B
    and C, with learned scales ("learned": Jamba, Lieber 2024, section 6.4) or without ("plain":
    Falcon Mamba, Zuo 2024, section 3.2), and selection_eps.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int = 16,
                 expand: float = 2.0, conv_size: int = 4, dt_rank: int | None = None,
                 dt_min: float = 1e-3, dt_max: float = 1e-1, bias: bool = False,
                 conv_bias: bool = True, selection_norm: str | None = None,
                 selection_eps: float = 1e-6) -> None:
        super().__init__(d_model, place=place)
        inner = round(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        for name, value in (("d_state", d_state), ("expand * d_model", inner),
                            ("conv_size", conv_size), ("dt_rank", rank)):
            if value < 1:
                raise ManyformError(f"{name} of mamba must be at least 1, not {value}")
        if not 0 < dt_min <= dt_max:
            raise ManyformError(f"mamba needs 0 < dt_min <= dt_max, not {dt_min} and {dt_max}")
        if selection_norm not in SELECTION_NORMS:
            raise unknown("selection_norm", selection_norm, map(str, SELECTION_NORMS))
        self.inner, self.d_state, self.conv_size, self.dt_rank = inner, d_state, conv_size, rank
        self.expand, self.bias, self.selection_norm = expand, bias, selection_norm
        self.selection_eps = selection_eps
        self.in_proj = Linear(d_model, 2 * inner, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, conv_size))
        self.conv_bias: nn.Parameter | None
        self.register_parameter("conv_bias",
                                nn.Parameter(torch.empty(inner)) if conv_bias else None)
        self.x_proj = Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, d_model, bias=bias)
        if selection_norm == "learned":
            self.dt_norm, self.b_norm, self.c_norm = (
                RMSNorm(n, eps=selection_eps) for n in (rank, d_state, d_state))
        for tensor in (self.conv_weight, self.conv_bias):
            if tensor is not None:
                nn.init.uniform_(tensor, -(conv_size**-0.5), conv_size**-0.5)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(place.count))
            dt = torch.exp(torch.empty(inner).uniform_(math.log(dt_min), math.log(dt_max)))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, state: MambaState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, MambaState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        old_conv, old_ssm = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = short_conv(u, self.conv_weight, self.conv_bias, old_conv, reset, "silu")
        low, b, c = self._selection(u)
        y, ssm = selective_scan(u, self.dt_proj(low), -self.A_log.exp(), b, c, self.D, old_ssm,
                                reset, dt_bias=self.dt_bias, gate=z)
        return self.out_proj(y), MambaState(conv, ssm)

    def _selection(self, u: Tensor) -> list[Tensor]:
        """dt before its projection, B and C, normed where the options say so."""
        parts = list(self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1))
        if self.selection_norm == "learned":
            return [norm(x) for norm, x in zip((self.dt_norm, self.b_norm, self.c_norm), parts,
                                               strict=True)]
        if self.selection_norm == "plain":
            return [rms_norm(x, x.new_ones(x.shape[-1]), self.selection_eps) for x in parts]
        return parts

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> MambaState:
        """Zeros, in float32 (float64 for a float64 mixer)."""
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return MambaState(
            torch.zeros(batch_size, self.conv_size - 1, self.inner, dtype=dtype, device=device),
            torch.zeros(batch_size, self.inner, self.d_state, dtype=dtype, device=device))

    def cost(self, length: int) -> Cost:
        """Matrix products, the convolution's and the scan's operations; a state of fixed size."""
        products = 2 * sum(layer.weight.numel() for layer in (
            self.in_proj, self.x_proj, self.dt_proj, self.out_proj))
        conv = 2 * self.conv_size * self.inner
        scan = self.inner * (6 * self.d_state + 3)
        state = 4 * self.inner * (self.conv_size - 1 + self.d_state)
        return Cost(length * (products + conv + scan), state)

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay on what sets the rates and the skip."""
        return {name: Hint(weight_decay=False) for name in ("A_log", "D", "dt_bias")}
