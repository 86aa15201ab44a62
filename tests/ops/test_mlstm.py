"""The mLSTM's memory: the fast form is the loop, whatever the gates, documents and cuts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyform.ops import use
from manyform.ops.mlstm import Memory, mlstm


def arguments(length, dtype=torch.float64, gate=3.0, batch=2, heads=2, key=8, value=16):
    torch.manual_seed(length)
    q, k = torch.randn(2, batch, length, heads, key, dtype=dtype)
    v = torch.randn(batch, length, heads, value, dtype=dtype)
    i, f = gate * torch.randn(2, batch, length, heads, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, i, F.logsigmoid(f).detach())]


@pytest.mark.parametrize("length", [1, 2, 17, 64, 150])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("gate", [0.5, 12.0])
def test_forms_agree(length, eps, gate):
    given = arguments(length, gate=gate)
    torch.manual_seed(0)
    state = Memory(torch.randn(2, 2, 8, 17, dtype=torch.float64),
                   torch.randn(2, 2, dtype=torch.float64))
    reset = torch.rand(2, length) < 0.1
    for before, marks in ((None, None), (state, reset)):
        results = []
        for path in ("recurrence", "reference"):
            with use(mlstm=path):
                h, after = mlstm(*given, before, marks, eps)
            grads = torch.autograd.grad(h.square().sum(), given)
            results.append([h, *after, *grads])
        for a, b in zip(*results, strict=True):
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * scale)


def test_unstabilised():
    """The memory without a stabiliser, from the definition, where it does not overflow."""
    q, k, v, i, log_f = arguments(12, gate=1.0)
    memory = torch.zeros(2, 2, 8, 16, dtype=torch.float64)
    norm = torch.zeros(2, 2, 8, dtype=torch.float64)
    h, _ = mlstm(q, k, v, i, log_f)
    for t in range(12):
        f_t, i_t = log_f[:, t].exp()[..., None], i[:, t].exp()[..., None]
        memory = f_t[..., None] * memory + torch.einsum("bhk,bhv->bhkv", i_t * k[:, t], v[:, t])
        norm = f_t * norm + i_t * k[:, t]
        q_t = q[:, t] / 8**0.5
        want = torch.einsum("bhk,bhkv->bhv", q_t, memory)
        want = want / (norm * q_t).sum(-1).abs().clamp(min=1)[..., None]
        torch.testing.assert_close(h[:, t], want, rtol=1e-9, atol=1e-10)


def test_gates_far_beyond_the_range_of_float32():
    """Input gates up to e^500 and closed ones: finite, and as in float64."""
    q, k, v, i, log_f = arguments(80, gate=200.0)
    want, _ = mlstm(q, k, v, i, log_f)
    got, after = mlstm(*(x.detach().float() for x in (q, k, v, i, log_f)))
    assert torch.isfinite(after.matrix).all()
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_cuts_and_bfloat16():
    given = arguments(130, torch.float32, heads=2, key=32, value=32)
    whole, end = mlstm(*given)
    state, hs = None, []
    for part in zip(*(x.split([1, 63, 40, 26], 1) for x in given), strict=True):
        h, state = mlstm(*part, state)
        hs.append(h)
    torch.testing.assert_close(torch.cat(hs, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.m, end.m)
    q, k, v, i, log_f = (x.detach() for x in given)
    whole, _ = mlstm(q, k, v, i - 9, log_f)  # a denominator near zero would magnify rounding
    low, after = mlstm(q.bfloat16(), k.bfloat16(), v.bfloat16(), i - 9, log_f)
    assert low.dtype == torch.bfloat16
    assert after.matrix.dtype == after.m.dtype == torch.float32
    assert (low - whole).norm() < 0.03 * whole.norm()
