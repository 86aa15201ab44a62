"""Mamba: the laws, its initialisation, and an independent transcription of its equations."""

import pytest
import torch
from torch.nn import functional as F

import manyform
from manyform.contract import Place
from manyform.errors import ManyformError
from manyform.mixers.mamba import Mamba
from manyform.ops import use
from manyform.state import nbytes


def test_the_laws():
    torch.manual_seed(0)
    manyform.check(Mamba(20, place=Place(0, 2)))  # 40 channels: the last vector is half full


def test_the_laws_with_other_options():
    torch.manual_seed(0)
    manyform.check(Mamba(24, d_state=5, expand=1.5, conv_size=1, dt_rank=3))


def by_the_book(m, u):
    """Algorithm 2 and figure 3 of Gu & Dao 2023, one token at a time, with torch's convolution."""
    x, z = (u @ m.in_proj.weight.T).chunk(2, dim=-1)
    taps = m.conv_weight.shape[1]
    x = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), m.conv_weight[:, None], m.conv_bias,
                 groups=m.inner).transpose(1, 2)
    x = x * torch.sigmoid(x)
    low, b, c = torch.split(x @ m.x_proj.weight.T, [m.dt_rank, m.d_state, m.d_state], dim=-1)
    delta = torch.log(1 + torch.exp(low @ m.dt_proj.weight.T + m.dt_bias))
    a = -torch.exp(m.A_log)
    h = torch.zeros(u.shape[0], m.inner, m.d_state, dtype=u.dtype)
    ys = []
    for t in range(u.shape[1]):
        a_bar = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], a))
        b_bar = torch.einsum("bd,bn->bdn", delta[:, t], b[:, t])
        h = a_bar * h + b_bar * x[:, t, :, None]
        ys.append(torch.einsum("bdn,bn->bd", h, c[:, t]) + m.D * x[:, t])
    y = torch.stack(ys, dim=1) * (z * torch.sigmoid(z))
    return y @ m.out_proj.weight.T, h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_papers_mamba(dtype):
    torch.manual_seed(1)
    m = Mamba(24).to(dtype)
    u = torch.randn(2, 75, 24, dtype=dtype)
    y, state = m(u)
    want, h = by_the_book(m, u)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.ssm, h, rtol=tolerance, atol=tolerance)


def test_initialisation():
    torch.manual_seed(0)
    m = Mamba(256, place=Place(0, 4))
    dt = F.softplus(m.dt_bias)
    assert 1e-3 <= dt.min() < 2e-3
    assert 5e-2 < dt.max() <= 1e-1 * (1 + 1e-5)
    assert torch.allclose(m.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert torch.equal(m.D, torch.ones(512))
    assert m.dt_rank == 16
    assert m.out_proj.weight.abs().max() <= 512**-0.5 / 2
    assert {k for k, h in m.hints().items() if not h.weight_decay} == {"A_log", "D", "dt_bias"}


def test_bfloat16_training_is_near_float32():
    torch.manual_seed(0)
    m = Mamba(64)
    x = torch.randn(2, 130, 64)
    y, _ = m(x)
    want = torch.autograd.grad(y.square().sum(), list(m.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        low, state = m(x)
    got = torch.autograd.grad(low.float().square().sum(), list(m.parameters()))
    assert state.ssm.dtype == state.conv.dtype == torch.float32
    assert (low - y).norm() < 0.02 * y.norm()
    for (name, _), a, b in zip(m.named_parameters(), got, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm(), name


def test_poisoned_memory_does_not_leak(monkeypatch):
    torch.manual_seed(0)
    m = Mamba(20, d_state=3)
    x = torch.randn(2, 70, 20)

    def run():
        y, state = m(x)
        grads = torch.autograd.grad(y.sum() + state.ssm.sum(), list(m.parameters()))
        return [y.detach(), *state, *grads]
    want = run()
    real = torch.empty

    def poisoned(*args, **kwargs):
        t = real(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t
    monkeypatch.setattr(torch, "empty", poisoned)
    for a, b in zip(run(), want, strict=True):
        assert torch.equal(a, b)


def test_state_and_refusals():
    m = Mamba(16)
    assert nbytes(m.initial_state(3)) == 3 * m.cost(10).state_bytes
    with pytest.raises(ManyformError, match="dt_min"):
        Mamba(16, dt_min=0.2)
    with pytest.raises(ManyformError, match="d_state"):
        Mamba(16, d_state=0)
    with pytest.raises(ManyformError, match="state"):
        m(torch.randn(1, 2, 16), Mamba(32).initial_state(1))


@pytest.mark.parametrize("path", ["torch", "numba"])
def test_long_sequences_stay_finite(path):
    torch.manual_seed(0)
    m = Mamba(16)
    with use(selective_scan=path), torch.no_grad():
        y, state = m(10 * torch.randn(1, 700, 16))
    assert torch.isfinite(y).all()
    assert torch.isfinite(state.ssm).all()
