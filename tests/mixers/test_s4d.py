"""S4D: laws, initialisation, discretisation, and what its kernel is."""

import math

import pytest
import torch

from manyform.contract import param_hints
from manyform.errors import ManyformError
from manyform.laws import check
from manyform.mixers.s4d import S4D


@pytest.mark.parametrize("options", [{}, {"discretization": "bilinear", "init": "inv"}])
def test_laws(options):
    check(S4D, precisions=("float64", "bfloat16"), length=80, d_model=16, d_state=8, **options)


def test_initialisation():
    """Gu 2022, equations 8 and 9."""
    lin, inv = S4D(4), S4D(4, init="inv")
    n = torch.arange(32)
    torch.testing.assert_close(lin.A_imag[2], math.pi * n)
    torch.testing.assert_close(inv.A_imag[2], 64 / math.pi * (64 / (2 * n + 1) - 1))
    torch.testing.assert_close(lin.log_A_real.exp(), torch.full((4, 32), 0.5))
    dt = S4D(1000).log_dt.exp()
    assert 1e-3 <= dt.min() < 1.2e-3
    assert 0.08 < dt.max() <= 1e-1


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_discrete_system_follows_the_continuous_one(discretization):
    """A small step makes both rules the samples of dt * 2 Re(C exp(A t))."""
    torch.manual_seed(0)
    layer = S4D(3, d_state=6, discretization=discretization, dt_min=1e-4, dt_max=1e-4).double()
    t = 1e-4 * torch.arange(500, dtype=torch.float64)
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    C = torch.view_as_complex(layer.C)
    want = 1e-4 * 2 * (C[..., None] * torch.exp(A[..., None] * t)).real.sum(1)
    got = layer.kernel(500)
    assert (got - want).norm() < 2e-3 * want.norm()


def test_zero_order_hold_is_exact_for_constant_input():
    """For u = 1 the state of x' = A x + u is (exp(A t) - 1) / A at every sample."""
    torch.manual_seed(0)
    layer = S4D(2, d_state=4).double()
    a, b, _ = layer.system()
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    h = torch.zeros_like(A)
    for _ in range(50):
        h = a * h + b
    torch.testing.assert_close(h, (torch.exp(50 * layer.log_dt.exp()[:, None] * A) - 1) / A)


def test_hints_and_errors():
    hints = param_hints(S4D(8))
    for name in ("log_dt", "log_A_real", "A_imag"):
        assert hints[name].lr_scale == 0.25
        assert not hints[name].weight_decay
    assert hints["C"].weight_decay
    for options, message in (({"d_state": 3}, "even"), ({"discretization": "foh"}, "unknown"),
                             ({"init": "legs"}, "unknown"), ({"dt_min": 1.0}, "dt_min")):
        with pytest.raises(ManyformError, match=message):
            S4D(8, **options)
