"""The linear map before a recurrence: on tiles as exact as its weights' 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import manyform.ops.exact_linear as module
from manyform.ops import count, trace
from manyform.ops.exact_linear import exact_linear
from manyform.ops.kernels.tiles import supported


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Small maps, too, go to the tiles where there are any."""
    monkeypatch.setattr(module, "SMALLEST", 0)


@given(tokens=st.sampled_from((1, 31, 32, 257, 600)), inputs=st.sampled_from((32, 96, 288)),
       outputs=st.sampled_from((32, 160)), seed=st.integers(0, 99), threads=st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_as_exact_as_sixteen_bits_of_the_weights(tokens, inputs, outputs, seed, threads):
    torch.manual_seed(seed)
    x = torch.randn(tokens, inputs).bfloat16().requires_grad_()
    w, b = torch.randn(outputs, inputs).requires_grad_(), torch.randn(outputs).requires_grad_()
    g = torch.randn(tokens, outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16), trace() as seen:
            y = exact_linear(x, w, b)
        y.backward(g)
    finally:
        torch.set_num_threads(before)
    assert seen["exact_linear", "tiles" if supported() else "reference"] == 1
    assert y.dtype == torch.float32
    exact = [v.detach().double().requires_grad_() for v in (x, w, b)]
    wanted = F.linear(*exact)
    wanted.backward(g.double())
    error = (y.double() - wanted).abs()
    size = F.linear(exact[0].abs(), exact[1].abs(), exact[2].abs())
    assert (error <= 2**-16 * size).all()
    for leaf, other, tolerance in zip((x, w, b), exact, (1e-2, 1e-2, 1e-5), strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad - other.grad).norm() <= tolerance * other.grad.norm()


@pytest.mark.parametrize(("dtype", "inputs", "outputs"), [
    (torch.float32, 32, 32), (torch.bfloat16, 40, 32), (torch.bfloat16, 32, 40)])
def test_what_the_tiles_do_not_take_is_a_product_in_the_weights_dtype(dtype, inputs, outputs):
    x, w, b = torch.randn(9, inputs).to(dtype), torch.randn(outputs, inputs), torch.randn(outputs)
    with torch.autocast("cpu", torch.bfloat16), trace() as seen:
        y = exact_linear(x, w, b)
    assert seen["exact_linear", "reference"] == 1
    assert torch.equal(y, F.linear(x.float(), w, b))


def test_counts_its_operations_once():
    with count() as counted:
        exact_linear(torch.randn(3, 5, 32), torch.randn(64, 32), torch.randn(64))
    assert counted.total == 2 * 15 * 32 * 64
