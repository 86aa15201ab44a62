"""Sums of values and of weights: the form on matrix tiles against the equations in float64."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_tiled_delta import _tiles

from manyform.ops import chunked_decay, trace, use
from manyform.ops.kernel_average import cosine_sums, random_sums, weighted_sums

pytestmark = pytest.mark.skipif(not _tiles(), reason="this processor has no matrix tiles")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small problems take the tiles too."""
    monkeypatch.setattr(chunked_decay, "SMALL", 0)


def rows(length, groups=2, heads=2, key=32, value=32, memory=None):
    """q, k, v and a state of positive last column, in bfloat16's numbers."""
    gen = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).bfloat16()

    state = normal(2, heads, memory or key, value + 1).float()
    return (normal(2, length, groups, key), normal(2, length, groups, key),
            normal(2, length, heads, value), state)


def both(function, leaves, tolerance=1.5e-2):
    """Results and gradients on tiles, and in float64 by the equations."""
    results = []
    for path in ("tiles", "reference"):
        given = [x.clone() if path == "tiles" else x.double() for x in leaves]
        given = [x.requires_grad_() for x in given]
        with use(path), trace() as seen:
            y, weights, *after = function(*given)
        assert any(form == path for _, form in seen)
        gen = torch.Generator().manual_seed(1)
        # as an average is, which is what the two are for
        size = weights.double().abs() + 1.0
        loss = sum((x * torch.randn(x.shape, generator=gen, dtype=torch.float64)).sum()
                   for x in (y / size[..., None], after[0]))
        results.append((y, weights, *after, *torch.autograd.grad(loss, given)))
    for i, (fast, slow) in enumerate(zip(*results, strict=True)):
        error = (fast.double() - slow).norm() / slow.norm().clamp(min=1e-12)
        assert error < tolerance, f"result {i}: relative error {error:.2e}"


def documents(length, resets):
    return torch.arange(length).remainder(50).eq(20).expand(2, -1) if resets else None


@pytest.mark.parametrize("decay", ["none", "weak", "strong"])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("length", "groups", "key", "value"), [
    (149, 1, 32, 64), (64, 2, 64, 33), (300, 2, 128, 32)])
def test_weighted_sums(decay, resets, length, groups, key, value):
    q, k, v, state = rows(length, groups, 2, key, value)
    q, k = q.abs(), k.abs()
    reset = documents(length, resets)
    if decay == "none":
        both(lambda q, k, v, s: weighted_sums(q, k, v, None, s, reset, 0.3), (q, k, v, state))
        return
    g = -torch.rand(2, length, 2) * (0.1 if decay == "weak" else 20.0)
    # where little but the own value is seen, the average hardly depends on queries and keys
    both(lambda q, k, v, s, g: weighted_sums(q, k, v, g, s, reset, 0.3), (q, k, v, state, g),
         1.5e-2 if decay == "weak" else 5e-2)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("length", [64, 300])
def test_cosine_sums(resets, length):
    q, k, v, state = rows(length, key=64, memory=128)
    angle = torch.linspace(0, 1.5, length, dtype=torch.float64)[None]
    both(lambda q, k, v, s: cosine_sums(q, k, v, angle, s, documents(length, resets)),
         (q, k, v, state))


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("length", "features"), [(70, 96), (300, 128)])
def test_random_sums(resets, begun, length, features):
    q, k, v, state = rows(length, memory=features)
    projection = torch.randn(features, 32, generator=torch.Generator().manual_seed(2))
    reset = documents(length, resets)
    if begun:
        top = torch.tensor([[0.5, 3.0], [-1.0, 1.0]])
        both(lambda q, k, v, s: random_sums(q, k, v, projection.to(s.dtype), 1e-4,
                                            top.to(s.dtype), s.abs(), reset), (q, k, v, state))
    else:
        both(lambda q, k, v: random_sums(q, k, v, projection.to(
            torch.promote_types(v.dtype, torch.float32)), 1e-4, None, None, reset), (q, k, v))


def test_nothing_looks_ahead_or_into_another_document():
    q, k, v, _ = (x.requires_grad_() for x in rows(150, memory=96))
    reset = torch.arange(150).eq(70).expand(2, -1)
    y, weights, _, _ = random_sums(q, k, v, torch.randn(96, 32), 1e-4, None, None, reset)
    for gradient in torch.autograd.grad(y[:, 100].sum() + weights[:, 100].sum(), [q, k, v]):
        assert not gradient[:, 101:].any()
        assert not gradient[:, :70].any()
        assert gradient[:, 100].any()
