"""The linear recurrent unit: a diagonal complex recurrence that forgets at learned, fixed rates."""

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
from manyform.ops.linear_scan import complex_scan


class LRUState(NamedTuple):
    """hidden: (batch, 2 d_state), real parts, then imaginary parts, float32."""

    hidden: Tensor


@mixer("lru")
class LRU(SequenceMixer):
    """h_t = L h_{t-1} + exp(gamma_log) B x_t, y_t = Re(C h_t) + D x_t, out = GLU(W gelu(y) + b)

    (Orvieto 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", sections 3.2 to 3.4
    and appendix A), with a diagonal complex L = exp(-exp(nu_log) + i exp(theta_log)).

    d_state: complex numbers of h, d_model if None. r_min, r_max, max_phase: |L| starts uniform in
    area between the two radii, its angle between 0 and max_phase; gamma_log starts where h keeps
    the variance of its input, at log sqrt(1 - |L|^2). B and C: real parts, then imaginary ones.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int | None = None,
                 r_min: float = 0.9, r_max: float = 0.999, max_phase: float = 2 * math.pi,
                 ) -> None:
        super().__init__(d_model, place=place)
        n = d_model if d_state is None else d_state
        if n < 1:
            raise ManyformError(f"d_state of lru must be at least 1, not {n}")
        if not 0 <= r_min < r_max < 1 or max_phase <= 0:
            raise ManyformError("lru needs 0 <= r_min < r_max < 1 and max_phase > 0, not "
                                f"{r_min}, {r_max} and {max_phase}")
        self.d_state = n
        square = torch.empty(n).uniform_(max(r_min**2, 1e-8), r_max**2)
        self.nu_log = nn.Parameter(torch.log(-0.5 * square.log()))
        self.theta_log = nn.Parameter(torch.log(max_phase * torch.rand(n).clamp(min=1e-8)))
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-square))
        self.B = nn.Parameter(torch.randn(2 * n, d_model) / math.sqrt(2 * d_model))
        self.C = nn.Parameter(torch.randn(d_model, 2 * n) / math.sqrt(n))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor, state: LRUState | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, LRUState]:
        """x: (batch, length, d_model) -> the same shape, and the state after the last step."""
        radius, angle = torch.exp(-self.nu_log.exp()), self.theta_log.exp()
        rate = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        u = F.linear(x, self.gamma_log.exp().repeat(2)[:, None] * self.B)
        h, hidden = complex_scan(rate, u, None if state is None else state.hidden, reset)
        re, im = self.C.chunk(2, dim=1)
        y = F.linear(h, torch.cat([re, -im], dim=1)) + (self.D * x).to(h.dtype)
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), LRUState(hidden)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> LRUState:
        """Zeros, in float32 (float64 for a float64 mixer)."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        return LRUState(torch.zeros(batch_size, 2 * self.d_state, dtype=dtype, device=device))

    def cost(self, length: int) -> Cost:
        """Matrix products and the recurrence; a state of fixed size."""
        products = 2 * (self.B.numel() + self.C.numel() + self.out_proj.weight.numel())
        element = torch.promote_types(self.D.dtype, torch.float32).itemsize
        return Cost(length * (products + 8 * self.d_state), element * 2 * self.d_state)

    def hints(self) -> Mapping[str, Hint]:
        """What makes the recurrence learns at a quarter of the rate, without weight decay (section
        3.3 and appendix)."""
        return dict.fromkeys(("nu_log", "theta_log", "gamma_log", "B"),
                             Hint(weight_decay=False, lr_scale=0.25))
