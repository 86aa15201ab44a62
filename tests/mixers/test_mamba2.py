"""Mamba-2: the laws, the formula, the recipe."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyform import ManyformError
from manyform.contract import param_hints
from manyform.laws import check
from manyform.mixers.mamba2 import Mamba2


@pytest.mark.parametrize("options", [{}, {"n_groups": 2, "head_dim": 8}])
def test_laws(options):
    torch.manual_seed(0)
    check(Mamba2(16, d_state=8, **options))


@pytest.mark.parametrize("d", [6, 16, 48, 200])
def test_default_heads_fit_any_width(d):
    y, _ = Mamba2(d, d_state=4)(torch.randn(2, 5, d))
    assert y.shape == (2, 5, d)


def test_equals_the_equations():
    torch.manual_seed(0)
    mixer = Mamba2(8, d_state=4, head_dim=4, n_groups=2).double()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    z, xbc, dt = mixer.in_proj(x).split([16, 32, 4], dim=-1)
    xbc = F.conv1d(xbc.mT, mixer.conv_weight[:, None], mixer.conv_bias, padding=3, groups=32)
    u, b, c = F.silu(xbc[..., :30].mT).split([16, 8, 8], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias)
    state, ys = torch.zeros(2, 4, 4, 4, dtype=torch.float64), []
    for t in range(30):
        ut = u[:, t].view(2, 4, 4)
        bt, ct = (s[:, t].view(2, 2, 4).repeat_interleave(2, dim=1) for s in (b, c))
        keep = torch.exp(-mixer.A_log.exp() * dt[:, t])
        state = state * keep[..., None, None] + torch.einsum("bhk,bhv,bh->bhkv", bt, ut, dt[:, t])
        ys.append(torch.einsum("bhkv,bhk->bhv", state, ct) + mixer.D[:, None] * ut)
    y = (torch.stack(ys, dim=1).flatten(2) * F.silu(z)).view(2, 30, 2, 8)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(2)
    got, after = mixer(x)
    torch.testing.assert_close(got, mixer.out_proj(y))
    torch.testing.assert_close(after.ssm, state)


def test_recipe():
    mixer = Mamba2(64)
    hints = param_hints(mixer)
    assert not any(hints[name].weight_decay for name in ("A_log", "D", "dt_bias", "norm_weight"))
    assert hints["in_proj.weight"].weight_decay
    assert 1 <= mixer.A_log.exp().min() <= mixer.A_log.exp().max() <= 16
    dt = F.softplus(mixer.dt_bias)
    assert 0.0009 < dt.min() <= dt.max() < 0.11


@pytest.mark.parametrize("options", [{"head_dim": 5}, {"n_groups": 3}, {"d_state": 0},
                                     {"dt_min": 0.2}, {"conv_size": 0}, {"expand": 0.0}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(ManyformError):
        Mamba2(16, **options)
