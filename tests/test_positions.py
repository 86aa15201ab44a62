"""Rotary tables and scalings, ALiBi slopes."""

import math

import pytest
import torch

from manyform.errors import ManyformError
from manyform.ops import use
from manyform.ops.rotary import rotary
from manyform.positions import RotaryTable, alibi_slopes, rotary_frequencies


def test_scores_depend_on_distance_only():
    table = RotaryTable(8)
    q, k = torch.randn(2, 1, 1, 1, 8)
    q, k = q.expand(1, 50, 1, 8), k.expand(1, 50, 1, 8)
    score = table.turn(q)[0, :, 0] @ table.turn(k)[0, :, 0].T
    for distance in (0, 3, 20):
        line = score.diagonal(-distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 16), (2, 300, 4, 64)])
@pytest.mark.parametrize("rows", [False, True])
def test_fast_form_equals_reference(dtype, shape, rows):
    table = RotaryTable(shape[-1])
    x = torch.randn(shape[0], shape[1], shape[2] + 2, shape[3]).to(dtype)
    positions = torch.randint(0, 999, shape[:2] if rows else shape[1:2])
    results = []
    for path in ("reference", None):
        with use(path):
            a = x.clone().requires_grad_()
            y = table.turn(a[:, :, 1:-1], positions)
            y.float().square().sum().backward()
            (g,) = torch.autograd.grad((table.turn(a[:, :, 1:-1], positions) * 2).sum(), a)
            results.append((y.detach(), a.grad, g))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 0}[dtype]
    for expected, got in zip(*results, strict=True):
        assert got.dtype == dtype
        assert torch.allclose(expected.double(), got.double(), rtol=tolerance, atol=tolerance)


def test_gradient_in_float64():
    table = RotaryTable(4)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: table.turn(x), (x,))


def test_positions_far_away_keep_their_angle():
    table = RotaryTable(4)
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    position = 1_000_000
    y = table.turn(x, torch.tensor([position]))
    theta = rotary_frequencies(4)[0]
    a, b = x[0, 0, 0, :2], x[0, 0, 0, 2:]
    c, s = (position * theta).cos(), (position * theta).sin()
    assert torch.allclose(y[0, 0, 0], torch.cat([a * c - b * s, b * c + a * s]), atol=1e-6)


def test_scalings():
    theta, factor = rotary_frequencies(8)
    assert factor == 1
    assert torch.allclose(theta, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64))
    linear, _ = rotary_frequencies(8, scaling={"type": "linear", "factor": 4})
    assert torch.allclose(linear, theta / 4)
    ntk, _ = rotary_frequencies(8, scaling={"type": "ntk", "factor": 4.0})
    assert ntk[0] == theta[0]
    assert math.isclose(ntk[-1], theta[-1] / 4)
    yarn, factor = rotary_frequencies(
        64, scaling={"type": "yarn", "factor": 4.0, "original_length": 2048})
    plain, _ = rotary_frequencies(64)
    assert torch.equal(yarn[:5], plain[:5])
    assert torch.allclose(yarn[-3:], plain[-3:] / 4)
    assert ((yarn <= plain) & (yarn >= plain / 4)).all()
    assert math.isclose(factor, 0.1 * math.log(4) + 1)


@pytest.mark.parametrize(("scaling", "word"), [
    ({"type": "yarm", "factor": 2}, "yarn"), ({"type": "linear"}, "factor"), ("yarn", "mapping"),
    ({"type": "yarn", "factor": 2.0}, "original_length"),
    ({"type": "ntk", "factor": 0.5}, "least 1"),
    ({"type": "linear", "factor": 2, "original_length": 9}, "original_length"),
    ({"type": "yarn", "factor": 2, "original_length": 0}, "original_length")])
def test_bad_scalings_are_refused(scaling, word):
    with pytest.raises(ManyformError, match=word):
        RotaryTable(8, scaling=scaling)


def test_odd_width_is_refused():
    with pytest.raises(ManyformError, match="even"):
        RotaryTable(7)


def test_alibi_slopes():
    assert torch.allclose(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9))
    # 12 heads: those of 8, then 2^-0.5, 2^-1.5, ... (Press 2021, released code)
    assert torch.allclose(alibi_slopes(12)[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    assert torch.allclose(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_reference_is_the_equation():
    x = torch.tensor([[[[1.0, 0.0]]]])
    y = rotary(x, torch.tensor([[0.6]]), torch.tensor([[0.8]]), torch.tensor([0]))
    assert torch.allclose(y[0, 0, 0], torch.tensor([0.6, 0.8]))
