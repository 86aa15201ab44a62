"""Linear attention, retention and gated linear attention: the laws, the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyform import ManyformError
from manyform.laws import check
from manyform.mixers.linear_attention import GatedLinearAttention, LinearAttention, Retention

MIXERS = [LinearAttention, Retention, GatedLinearAttention]


@pytest.mark.parametrize("cls", MIXERS)
def test_laws(cls):
    torch.manual_seed(0)
    check(cls(32, n_heads=2))


@pytest.mark.parametrize("cls", MIXERS)
@pytest.mark.parametrize("d", [6, 16, 48, 200])
def test_default_heads_fit_any_width(cls, d):
    mixer = cls(d)
    y, state = mixer(torch.randn(2, 5, d))
    assert y.shape == (2, 5, d)
    assert state.memory.shape[1] == mixer.n_heads


def test_linear_attention_is_a_normalised_average():
    torch.manual_seed(0)
    mixer = LinearAttention(16, n_heads=2).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in mixer.in_proj(x).chunk(3, dim=-1))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    expected = (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v
    expected = mixer.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_retention_has_the_parallel_form_of_its_paper():
    torch.manual_seed(0)
    mixer = Retention(16, n_heads=2).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    q, k, v, gate = mixer.in_proj(x).split([16, 16, 32, 32], dim=-1)
    q, k = (torch.view_as_complex(torch.stack(t.unflatten(-1, (2, 2, 4)).unbind(-2), -1))
            for t in (q, k))
    angle = torch.arange(40)[:, None, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)
    scores = torch.einsum("bthd,bshd->bhts", q * turn, (k * turn).conj()).real
    steps = torch.arange(40)[:, None] - torch.arange(40)
    gamma = (1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64)))[:, None, None]
    scores = (scores * gamma**steps.clamp(min=0)).tril() / 8**0.5
    y = torch.einsum("bhts,bshd->bthd", scores, v.unflatten(-1, (2, 16)))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    expected = mixer.out_proj(y.flatten(2) * F.silu(gate))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-5, atol=1e-7)


def test_gla_decays_at_the_papers_rate():
    mixer = GatedLinearAttention(32)
    with torch.no_grad():
        mixer.decay_proj.weight.zero_()
        mixer.decay_proj.bias.zero_()
    x = torch.randn(1, 9, 32)
    _, one = mixer(x)
    _, two = mixer(torch.cat([x, torch.zeros(1, 16, 32)], dim=1))
    torch.testing.assert_close(two.memory, one.memory * 0.5)  # sixteen steps of (1/2)^(1/16)


@pytest.mark.parametrize(("cls", "options"), [
    (LinearAttention, {"n_heads": 3}), (Retention, {"n_heads": 3}), (Retention, {"expand_v": 0.3}),
    (GatedLinearAttention, {"expand_k": 0.0}), (GatedLinearAttention, {"gate_rank": 0}),
    (LinearAttention, {"eps": 0.0}), (Retention, {"n_heads": 32})])
def test_options_that_do_not_fit_are_refused(cls, options):
    with pytest.raises(ManyformError):
        cls(32, **options)
