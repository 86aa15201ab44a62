"""The pointwise operations: the compiled pass equals the plain formula, forward and backward."""

from __future__ import annotations

import pytest
import torch

from manyform.ops import use
from manyform.ops.gates import divide_by_last, elu_plus_one, scale_and_keep, scale_heads, silu_gate
from manyform.ops.kernels import available

pytestmark = pytest.mark.skipif(not available(), reason="the compiled passes need numba")


def both(op, dtype, *given):
    """Results and gradients of the compiled and of the plain form, the latter in float64."""
    found = []
    activations = [g.shape[-1] > 8 for g in given]  # the others are parameters, in float32
    for path in ("numba", "reference"):
        leaves = [g.to(dtype if wide else torch.float32) for g, wide in
                  zip(given, activations, strict=True)]
        leaves = [(x.double() if path == "reference" else x).detach().requires_grad_()
                  for x in leaves]
        # slices of wider rows, as mixers give them
        inputs = [torch.cat([x, x], -1)[..., :x.shape[-1]] if wide else x
                  for x, wide in zip(leaves, activations, strict=True)]
        with use(**{op.name: path}):
            y = op(*inputs)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (y.double() * weight).sum().backward()
        found.append([y, *(x.grad for x in leaves)])
    return zip(*found, strict=True)


def by_last(y):
    return divide_by_last(y, 1e-6)


by_last.name = divide_by_last.name


def twice(x, factor):
    scaled, kept = scale_and_keep(x, factor)
    return torch.cat([scaled, kept], -1)


twice.name = scale_and_keep.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["elu_plus_one", "silu_gate", "silu_gate_skip", "scale_heads",
                                  "scale_and_keep", "divide_by_last"])
def test_compiled_equals_plain(name, dtype):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random) * 2

    y, z, u = normal(3, 75, 5, 32), normal(3, 75, 160), normal(3, 75, 5, 32)
    cases = {"elu_plus_one": (elu_plus_one, z), "silu_gate": (silu_gate, y, z),
             "silu_gate_skip": (silu_gate, y, z, u, normal(5)),
             "scale_heads": (scale_heads, y, normal(3, 75, 5)),
             "scale_and_keep": (twice, y, normal(3, 75, 5)),
             "divide_by_last": (by_last, normal(3, 75, 5, 33).abs() + 0.5)}
    op, *given = cases[name]
    for fast, plain in both(op, dtype, *given):
        assert fast.shape == plain.shape
        error = (fast.double() - plain).norm() / plain.norm()
        assert error < (2e-6 if dtype == torch.float32 else 4e-3)


def test_what_is_kept_alone_passes_its_gradient_on():
    x, factor = torch.randn(4, 64, 5, 32, requires_grad=True), torch.randn(4, 64, 5)
    with use(scale_and_keep="numba"):
        scale_and_keep(x, factor)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
