"""The chunked forms of the delta rule against the plain loop: values, gradients, odd cases."""

from __future__ import annotations

import pytest
import torch

from manyform.ops import chunked_delta, use
from manyform.ops.chunked_delta import _chunk_size, unit_inverse
from manyform.ops.matrix_recurrence import matrix_recurrence

DECAYS = ["none", "head", "step", "channel"]


def inputs(decay, *, shared=True, batch=2, length=77, heads=2, groups=2, key=8, value=6,
           dtype=torch.float64, strength=0.5, state=True, reset=False, seed=0):
    """Leaves of a stable recurrence: erase along normalised keys."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q = normal(batch, length, groups, key)
    k = torch.nn.functional.normalize(normal(batch, length, groups, key), dim=-1)
    v = normal(batch, length, heads, value)
    a = -k * torch.rand(batch, length, groups, 1, generator=gen, dtype=torch.float64) * 1.5
    shape = {"none": None, "head": (heads,), "step": (batch, length, heads),
             "channel": (batch, length, heads, key)}[decay]
    g = None if shape is None else -strength * torch.rand(shape, generator=gen, dtype=torch.float64)
    b = k if shared else k + 0.1 * normal(batch, length, groups, key)
    s = normal(batch, heads, key, value) if state else None
    starts = torch.rand(batch, length, generator=gen) < 0.08 if reset else None
    q, k, v, a, s, b_ = (None if x is None else x.to(dtype).requires_grad_()
                         for x in (q, k, v, a, s, b))
    if g is not None:
        g = g.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    return q, k, v, g, (a, k if shared else b_), s, starts, 0.7


def run(args, path):
    """Output, state and every gradient of a fixed random functional of both."""
    q, k, v, g, erase, s, reset, scale = args
    with use(matrix_recurrence=path):
        y, last = matrix_recurrence(*args)
    gen = torch.Generator().manual_seed(1)
    leaves = [x for x in (q, k, v, g, *erase, s) if x is not None]
    wide = last.dtype
    loss = ((y.to(wide) * torch.randn(y.shape, generator=gen, dtype=wide)).sum()
            + (last * torch.randn(last.shape, generator=gen, dtype=wide)).sum())
    return y, last, *torch.autograd.grad(loss, leaves)


def assert_close(fast, slow, tolerance):
    for i, (x, y) in enumerate(zip(fast, slow, strict=True)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        error = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12)
        assert error < tolerance, f"result {i}: relative error {error:.2e}"


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reset", [False, True])
def test_equals_reference(decay, shared, reset):
    args = inputs(decay, shared=shared, reset=reset)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), 1e-10)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 64, 65, 130])
def test_any_length(length):
    for decay in ("step", "channel"):
        args = inputs(decay, length=length, shared=False, reset=True)
        assert_close(run(args, "chunked_delta"), run(args, "reference"), 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shared", [True, False])
def test_grouped_heads_without_state(decay, shared):
    args = inputs(decay, shared=shared, heads=4, groups=2, state=False, length=40)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shared", [True, False])
def test_lower_precision(decay, dtype, tolerance, shared, monkeypatch):
    monkeypatch.setattr(chunked_delta, "SMALL", 0)
    args = inputs(decay, shared=shared, dtype=dtype, length=150, reset=True, key=16, value=16)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), tolerance)


def test_gradcheck():
    q, k, v, g, (a, b), s, reset, scale = inputs("channel", shared=False, batch=1, length=5, key=3,
                                                 value=2, reset=True)

    def function(q, k, v, g, a, b, s):
        with use(matrix_recurrence="chunked_delta"):
            return matrix_recurrence(q, k, v, g, (a, b), s, reset, scale)
    assert torch.autograd.gradcheck(function, (q, k, v, g, a, b, s))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_step(decay, shared, reset, state):
    args = inputs(decay, shared=shared, length=1, heads=4, groups=2, state=state)
    if reset:
        args = (*args[:6], torch.tensor([[True], [False]]), args[7])
    with torch.no_grad():
        assert matrix_recurrence.choose(*args) == "delta_step"
        with use(matrix_recurrence="reference"):
            expected = matrix_recurrence(*args)
        assert_close(matrix_recurrence(*args), expected, 1e-12)


@pytest.mark.parametrize("decay", ["step", "channel"])
@pytest.mark.parametrize("strength", [2.0, 8.0, 500.0])
def test_strong_decay_stays_exact_and_finite(decay, strength):
    args = inputs(decay, shared=False, strength=strength, reset=True, dtype=torch.float32)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), 2e-5)


def test_strong_decay_takes_smaller_chunks():
    weak, strong = torch.full((1, 128, 1, 2), -0.6065), torch.full((1, 128, 1, 2), -3.0)
    assert [_chunk_size(g, 128) for g in (weak, strong, 100 * strong)] == [64, 16, None]
    assert _chunk_size(100 * strong[..., 0], 128) == 64


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_crosses_a_reset(decay):
    q, k, v, g, (a, b), s, _, scale = inputs(decay, shared=False, batch=1, length=100)
    reset = torch.zeros(1, 100, dtype=torch.bool)
    reset[0, 70] = True
    y, last = matrix_recurrence(q, k, v, g, (a, b), s, reset, scale)
    leaves = [x for x in (q, k, v, a, b, s) if x is not None]
    if g is not None and g.ndim > 1:
        leaves.append(g)
    for gradient, leaf in zip(torch.autograd.grad(y[:, 70:].sum() + last.sum(), leaves), leaves,
                              strict=True):
        assert not (gradient[:, :70] if leaf is not s else gradient).any()


@pytest.mark.parametrize("decay", ["none", "step", "channel"])
def test_causal(decay):
    q, k, v, g, (a, b), s, _, scale = inputs(decay, shared=False, batch=1, length=80)
    y, _ = matrix_recurrence(q, k, v, g, (a, b), s, None, scale)
    leaves = [x for x in (q, k, v, a, b, g) if x is not None]
    for gradient in torch.autograd.grad(y[:, 37].sum(), leaves):
        assert not gradient[:, 38:].any()


def test_under_autocast_and_non_contiguous():
    args = inputs("step", dtype=torch.float32, length=50)
    plain = matrix_recurrence(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(matrix_recurrence(*args), plain, 1e-6)
    q, k, v, g, (a, b), s, reset, scale = args
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, a)]
    y = matrix_recurrence(turned[0], turned[1], turned[2], g, (turned[3], turned[1]),
                          s.mT.contiguous().mT, reset, scale)
    assert_close(y, plain, 1e-6)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_unit_inverse(size):
    lower = torch.randn(3, size, size, dtype=torch.float64).tril(-1) / size**0.5
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(unit_inverse(lower) @ (eye - lower), eye.expand(3, -1, -1), atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_compiled_channel_decay(dtype, tolerance, shared, length, monkeypatch):
    monkeypatch.setattr(chunked_delta, "SMALL", 0)
    args = inputs("channel", shared=shared, dtype=dtype, length=length, key=32, value=16, heads=3,
                  groups=3)
    assert chunked_delta._compiled(args[3], None)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shared", [True, False])
def test_compiled_mask(dtype, tolerance, shared, monkeypatch):
    monkeypatch.setattr(chunked_delta, "SMALL", 0)
    args = inputs("step", shared=shared, dtype=dtype, length=150, key=32, value=16)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), tolerance)
