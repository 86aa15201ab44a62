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
from manyform.linear import Linear
from manyform.ops.diagonal_ssm import diagonal_kernel, diagonal_ssm

DISCRETIZATIONS = ("zoh", "bilinear")
INITS = ("lin", "inv")


class S4DState(NamedTuple):
    """h: (batch, d_model, d_state / 2, 2), real and imaginary part of each oscillator."""

    h: Tensor


class DiagonalMixer(SequenceMixer):
    """What mixers around a diagonal state space share: its parameters and its discretisation.

    log_dt, log_A_real, A_imag, C, D: of x' = A x + u, y = 2 Re(C x) + D u with
    A = -exp(log_A_real) + i A_imag, a step dt a channel, log-uniform in [dt_min, dt_max].
    """

    discretization = "zoh"
    system_lr = 1.0

    def _make_system(self, channels: int, d_state: int, init: str, dt_min: float, dt_max: float,
                     ) -> None:
        if d_state < 2 or d_state % 2:
            raise ManyformError(f"d_state must be an even number of at least 2, not {d_state}")
        if init not in INITS:
            raise unknown("init", init, INITS)
        if not 0 < dt_min <= dt_max:
            raise ManyformError("dt_min and dt_max must satisfy 0 < dt_min <= dt_max, not "
                                f"{dt_min} and {dt_max}")
        self.pairs = d_state // 2
        n = torch.arange(self.pairs, dtype=torch.float32)
        frequency = (math.pi * n if init == "lin"
                     else d_state / math.pi * (d_state / (2 * n + 1) - 1))
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(channels))
        self.log_A_real = nn.Parameter(torch.full((channels, self.pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(frequency.repeat(channels, 1))
        self.C = nn.Parameter(torch.view_as_real(
            torch.randn(channels, self.pairs, dtype=torch.complex64)).clone())
        self.D = nn.Parameter(torch.randn(channels))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The discrete system (a, b, c) of h_t = a h_{t-1} + b u_t, y_t = 2 Re(c h_t), complex
        (channels, d_state / 2) each (Gu 2022, section 3.1, with B = 1)."""
        dt = self.log_dt.exp()[:, None]
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        c = torch.view_as_complex(self.C)
        if self.discretization == "zoh":
            a = torch.exp(dt * A)
            return a, (a - 1) / A, c
        inverse = 1 / (1 - dt / 2 * A)
        return inverse * (1 + dt / 2 * A), dt * inverse, c

    def _zeros(self, *shape: int, device: torch.device | str | None) -> Tensor:
        """In the dtype and place of a state: float32, or float64 for a float64 mixer."""
        dtype = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        return torch.zeros(*shape, dtype=dtype, device=device or self.D.device)

    def hints(self) -> Mapping[str, Hint]:
        """A and dt: no decay, and the family's share of the learning rate."""
        return dict.fromkeys(("log_dt", "log_A_real", "A_imag"),
                             Hint(weight_decay=False, lr_scale=self.system_lr))


@mixer("s4d")
class S4D(DiagonalMixer):
    """A bank of damped oscillators a channel, then GELU and a gated linear map across channels.

        h' = A h + B u,  y = 2 Re(C h) + D u,  out = GLU(W gelu(y) + b)

    Gu, Goel, Gupta & Re 2022, "On the Parameterization and Initialization of Diagonal State Space
    Models": A = -exp(log_A_real) + i A_imag, B = 1 (section 3.4), a step dt a channel, log-uniform
    in [dt_min, dt_max].

    d_state: N, counting both halves of the conjugate pairs; N / 2 complex numbers are kept.
    discretization: "zoh" (zero-order hold) or "bilinear" (section 3.1).
    init: "lin", A_n = -1/2 + i pi n (eq. 9), or "inv", A_n = -1/2 + i N/pi (N/(2n+1) - 1) (eq. 8).
    """

    state_growth = "constant"
    cost_growth = "linear"
    # Gu 2022, appendix: 0.001 for A and dt where the rest takes 0.004 or 0.01.
    system_lr = 0.25

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int = 64,
                 discretization: str = "zoh", init: str = "lin", dt_min: float = 1e-3,
                 dt_max: float = 1e-1) -> None:
        super().__init__(d_model, place=place)
        if discretization not in DISCRETIZATIONS:
            raise unknown("discretization", discretization, DISCRETIZATIONS)
        self.discretization = discretization
        self._make_system(d_model, d_state, init, dt_min, dt_max)
        self.out_proj = Linear(d_model, 2 * d_model)

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
        return S4DState(self._zeros(batch_size, self.d_model, self.pairs, 2, device=device))

    def cost(self, length: int) -> Cost:
        d = self.d_model
        return Cost(length * d * (16 * self.pairs + 2) + 4 * d * d * length, 4 * d * 2 * self.pairs)
