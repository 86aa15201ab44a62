"""S4D: the diagonal structured state space model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError, unknown
from manyform.ops.diagonal_ssm import diagonal_kernel, diagonal_ssm

DISCRETIZATIONS = ("zoh", "bilinear")
INITS = ("lin", "inv")


class S4DState(NamedTuple):
    """h: (batch, d_model, d_state / 2, 2), real and imaginary part of each oscillator."""

    h: Tensor


@mixer("s4d")
class S4D(SequenceMixer):
    """A bank of damped oscillators a channel, then GELU and a gated linear map across channels.

        h' = A h + B u,  y = 2 Re(C h) + D u,  out = GLU(W gelu(y) + b)

    Gu, Goel, Gupta & Re 2022, "On the Parameterization and Initialization of Diagonal State Space
    Models": A = -exp(log_A_real) + i A_imag, B = 1 (section 3.4), a step dt a channel, log-uniform
    in [dt_min, dt_max]. Training convolves chunk by chunk, streaming steps the recurrence.

    d_state: N, counting both halves of the conjugate pairs; N / 2 complex numbers are kept.
    discretization: "zoh" (zero-order hold) or "bilinear" (section 3.1).
    init: "lin", A_n = -1/2 + i pi n (eq. 9), or "inv", A_n = -1/2 + i N/pi (N/(2n+1) - 1) (eq. 8).
    """

    state_growth = "constant"
    cost_growth = "linear"

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int = 64,
                 discretization: str = "zoh", init: str = "lin", dt_min: float = 1e-3,
                 dt_max: float = 1e-1) -> None:
        super().__init__(d_model, place=place)
        if d_state < 2 or d_state % 2:
            raise ManyformError(f"d_state must be an even number of at least 2, not {d_state}")
        if discretization not in DISCRETIZATIONS:
            raise unknown("discretization", discretization, DISCRETIZATIONS)
        if init not in INITS:
            raise unknown("init", init, INITS)
        if not 0 < dt_min <= dt_max:
            raise ManyformError("dt_min and dt_max must satisfy 0 < dt_min <= dt_max, not "
                                f"{dt_min} and {dt_max}")
        self.pairs = d_state // 2
        self.discretization = discretization
        n = torch.arange(self.pairs, dtype=torch.float32)
        frequency = (math.pi * n if init == "lin"
                     else d_state / math.pi * (d_state / (2 * n + 1) - 1))
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(d_model))
        self.log_A_real = nn.Parameter(torch.full((d_model, self.pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(frequency.repeat(d_model, 1))
        self.C = nn.Parameter(torch.view_as_real(
            torch.randn(d_model, self.pairs, dtype=torch.complex64)).clone())
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The discrete system (a, b, c) of h_t = a h_{t-1} + b u_t, y_t = 2 Re(c h_t), complex
        (d_model, d_state / 2) each (Gu 2022, section 3.1, with B = 1)."""
        dt = self.log_dt.exp()[:, None]
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        c = torch.view_as_complex(self.C)
        if self.discretization == "zoh":
            a = torch.exp(dt * A)
            return a, (a - 1) / A, c
        inverse = 1 / (1 - dt / 2 * A)
        return inverse * (1 + dt / 2 * A), dt * inverse, c

    def kernel(self, length: int) -> Tensor:
        """The filter that the layer convolves each channel with: (d_model, length)."""
        return diagonal_kernel(*self.system(), length)

    def forward(self, x: Tensor, state: S4DState | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, S4DState]:
        y, h = diagonal_ssm(x, *self.system(), skip=self.D, reset=reset,
                            state=None if state is None else state.h)
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), S4DState(h)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> S4DState:
        dtype = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        return S4DState(torch.zeros(batch_size, self.d_model, self.pairs, 2, dtype=dtype,
                                    device=device or self.D.device))

    def cost(self, length: int) -> Cost:
        d = self.d_model
        return Cost(length * d * (16 * self.pairs + 2) + 4 * d * d * length, 4 * d * 2 * self.pairs)

    def hints(self) -> Mapping[str, Hint]:
        """A and dt: no decay, a quarter of the learning rate (Gu 2022, appendix: 0.001 for them
        where the rest takes 0.004 or 0.01)."""
        slow = Hint(weight_decay=False, lr_scale=0.25)
        return {"log_dt": slow, "log_A_real": slow, "A_imag": slow}
