"""The linear map: its gradient of weights on tiles against float64, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import manyform.ops.linear as module
from manyform.linear import Linear
from manyform.ops import count, trace
from manyform.ops.kernels.tiles import supported
from manyform.ops.linear import linear, weight_gradient

ROUNDING = 1e-5 if supported() else 8e-3
"""Of a sum over tokens: on tiles it stays in float32, torch rounds it to bfloat16."""


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products, too, go to the tiles where there are any."""
    monkeypatch.setattr(module, "SMALLEST", 0)


def _close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-30)


@given(tokens=st.sampled_from((1, 2, 31, 32, 33, 257, 600)), out=st.integers(1, 100),
       into=st.integers(1, 100), seed=st.integers(0, 99), threads=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_sum_over_tokens_of_any_shape(tokens, out, into, seed, threads):
    torch.manual_seed(seed)
    g, x = torch.randn(tokens, out).bfloat16(), torch.randn(tokens, into).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = weight_gradient(g, x)
    finally:
        torch.set_num_threads(before)
    assert got.dtype == (torch.float32 if supported() else torch.bfloat16)
    wanted = g.double().T @ x.double()
    size = (g.double().abs().T @ x.double().abs()).max()  # the sum itself may cancel
    rounding = 0 if supported() else ROUNDING * wanted.abs().max()
    assert (got.double() - wanted).abs().max() <= 1e-6 * size + rounding


@pytest.mark.parametrize(("out", "into"), [(1500, 64), (64, 1500), (1056, 1040)])
def test_wide_matrices_and_rows_that_lie_apart(out, into):
    g, x = torch.randn(700, 2 * out).bfloat16()[:, out:], torch.randn(700, into + 8).bfloat16()
    x = x[:, :into]
    _close(weight_gradient(g, x), g.double().T @ x.double(), ROUNDING)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_under_autocast_agrees_with_torch(bias, dtype):
    layer = Linear(48, 80, bias=bias)
    x = torch.randn(2, 300, 48, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 300, 80)
    with torch.autocast("cpu", torch.bfloat16), trace() as seen:
        y = layer(x)
    assert seen["linear", "tiles" if supported() else "reference"] == 1
    assert y.dtype == torch.bfloat16
    y.backward(g.bfloat16())
    leaves = [x, *layer.parameters()]
    exact = [v.detach().bfloat16().double().requires_grad_() for v in leaves]
    F.linear(exact[0], *exact[1:]).backward(g.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, F.linear(x, *leaves[1:]))
    for leaf, wanted, tolerance in zip(leaves, exact, (4e-3, ROUNDING, ROUNDING), strict=False):
        assert leaf.grad.dtype == leaf.dtype
        _close(leaf.grad, wanted.grad, tolerance)


def test_frozen_weights_and_inputs_cost_no_gradient():
    layer = Linear(32, 32)
    x = torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        layer.weight.requires_grad_(False)
        with trace() as seen:
            layer(x)
    assert seen["linear", "reference"] == 1


@pytest.mark.parametrize("setting", ["fp32", "no grad", "float64 under autocast"])
def test_other_precisions_are_torchs(setting):
    layer, x = Linear(32, 32), torch.randn(64, 32)
    if setting == "float64 under autocast":
        layer, x = layer.double(), x.double()
    with (torch.autocast("cpu", torch.bfloat16, enabled=setting != "fp32"),
          torch.set_grad_enabled(setting != "no grad"), trace() as seen):
        layer(x)
    assert seen["linear", "reference"] == 1


def test_counts_its_operations_once():
    layer = Linear(32, 16)
    with count() as counted:
        linear(torch.randn(3, 5, 32), layer.weight)
    assert counted.total == 2 * 3 * 5 * 32 * 16
