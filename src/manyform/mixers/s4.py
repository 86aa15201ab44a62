"""S4: the structured state space model with the HiPPO matrix."""

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
from manyform.ops.dplr_ssm import System, bilinear, dplr_ssm, kernel_by_powers, kernel_flops, powers
from manyform.ops.long_conv import long_conv_flops


class S4State(NamedTuple):
    """h: (batch, d_model, d_state / 2, 2), real and imaginary part, one of each conjugate pair."""

    h: Tensor


@mixer("s4")
class S4(SequenceMixer):
    """A state space a channel, then GELU and a gated linear map across channels.

        x' = (diag(rates) - P P*) x + B u,  y = C x + D u,  out = GLU(W gelu(y) + b)

    Gu, Goel & Re 2022, "Efficiently Modeling Long Sequences with Structured State Spaces": the
    HiPPO-LegS matrix in its diagonal plus low-rank form (theorem 1), bilinear discretisation with
    a step dt a channel, log-uniform in [dt_min, dt_max]. `ops.dplr_ssm` has it as one long
    convolution and as the recurrence whose state a stream carries. C is the parameter where the
    paper learns C (1 - Abar^L) for one fixed length L, so that every length has one filter.

    d_state: N, counting both halves of the conjugate pairs; N / 2 complex numbers are kept.
    """

    state_growth = "constant"
    cost_growth = "T log T"
    # A Fourier transform spreads rounding over the whole sequence (about 1e-7, backwards too).
    exactly_causal = False

    def __init__(self, d_model: int, *, place: Place = Place(), d_state: int = 64,
                 dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        super().__init__(d_model, place=place)
        if d_state < 2 or d_state % 2:
            raise ManyformError(f"d_state must be an even number of at least 2, not {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ManyformError("dt_min and dt_max must satisfy 0 < dt_min <= dt_max, not "
                                f"{dt_min} and {dt_max}")
        self.pairs = d_state // 2
        rates, p, b = legs(d_state)

        def copies(v: Tensor) -> nn.Parameter:
            return nn.Parameter(v.float().expand(d_model, *v.shape).clone())
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(d_model))
        self.log_A_real = copies(torch.log(-rates.real))
        self.A_imag = copies(rates.imag)
        self.P, self.B = copies(torch.view_as_real(p)), copies(torch.view_as_real(b))
        self.C = nn.Parameter(torch.view_as_real(
            torch.randn(d_model, self.pairs, dtype=torch.complex64)).clone())
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = Linear(d_model, 2 * d_model)

    def system(self) -> System:
        """The discrete system of every channel."""
        rates = torch.complex(-self.log_A_real.exp(), self.A_imag)
        p, b, c = (torch.view_as_complex(v) for v in (self.P, self.B, self.C))
        return bilinear(rates, p, b, c, self.log_dt.exp()[:, None])

    def kernel(self, length: int) -> Tensor:
        """The filter that the layer convolves each channel with, D aside: (d_model, length)."""
        return kernel_by_powers(powers(self.system(), 32), length)

    def forward(self, x: Tensor, state: S4State | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, S4State]:
        y, h = dplr_ssm(x, self.system(), self.D, None if state is None else state.h, reset)
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), S4State(h)

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> S4State:
        dtype = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        return S4State(torch.zeros(batch_size, self.d_model, self.pairs, 2, dtype=dtype,
                                   device=device or self.D.device))

    def cost(self, length: int) -> Cost:
        """The filter, one long convolution, the state after it, and the map across channels."""
        d = self.d_model
        flops = (kernel_flops(d, self.pairs, length) + long_conv_flops(1, length, d)
                 + length * d * (4 * self.pairs + 4 * d))
        return Cost(flops, 4 * d * 2 * self.pairs)

    def hints(self) -> Mapping[str, Hint]:
        """A, B and dt: no decay, a quarter of the learning rate (Gu 2022, appendix D.2: 0.001 for
        them where the rest takes 0.004 or 0.01)."""
        slow = Hint(weight_decay=False, lr_scale=0.25)
        return dict.fromkeys(("log_dt", "log_A_real", "A_imag", "P", "B"), slow)


def legs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS (Gu 2020) of n states as diag(rates) - p p*, and its b, one of each pair.

    A_ij = -sqrt((2 i + 1) (2 j + 1)) below the diagonal, -(i + 1) on it; B_i = sqrt(2 i + 1).
    With P_i = sqrt(i + 1/2), A + P P^T + 1/2 is skew, so that a unitary matrix makes it diagonal
    (Gu 2022, appendix C.1). Returns (rates, p, b), complex128 (n / 2,) each.
    """
    i = torch.arange(n, dtype=torch.float64)
    b = torch.sqrt(2 * i + 1)
    lower = -torch.outer(b, b).tril(-1)
    skew = (lower - lower.T) / 2
    frequency, v = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    frequency, v = frequency[n // 2:], v[:, n // 2:]  # ascending: the positive ones
    inward = v.conj().T
    return (torch.complex(torch.full_like(frequency, -0.5), frequency),
            inward @ torch.sqrt(i + 0.5).to(v.dtype), inward @ b.to(v.dtype))
