"""The pointwise parts of kernel attention: compiled forms against the equations."""

from __future__ import annotations

import pytest
import torch

from manyform.ops import use
from manyform.ops.kernel_features import cosine_features, exp_features


def both(function, dtype, *inputs):
    """Outputs and gradients of the compiled form and of the reference."""
    torch.manual_seed(1)
    results = []
    for path in ("numba", "reference"):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        with use(**{"exp_features": path, "cosine_features": path}):
            y = function(*leaves)
        assert y.dtype == dtype
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        results.append((y, *torch.autograd.grad((y.float() * weights).sum(), leaves)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=tolerance,
                                   atol=tolerance * float(want.detach().float().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_forms_are_the_equations(dtype):
    torch.manual_seed(0)
    x, angle = torch.randn(2, 60, 5, 64), torch.rand(2, 60, dtype=torch.float64)
    shift = torch.rand(2, 60, 5) + 2
    both(lambda a: exp_features(a, shift, 1e-6), dtype, x)
    both(lambda a: cosine_features(a, angle), dtype, x)
    both(lambda a: cosine_features(a[:, :, 1:4], angle[:1]), dtype, x)


def test_gradients():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: exp_features(a, b, 1e-3), (x, shift))
    torch.autograd.gradcheck(lambda a: cosine_features(a, shift[:, :, 0].detach()), (x,))
    wide = torch.randn(2, 60, 4, 64, requires_grad=True)
    level = torch.zeros(2, 60, 4, requires_grad=True)
    exp_features(wide, level, 0.0).sum().backward()
    torch.testing.assert_close(level.grad, -wide.exp().sum(-1), rtol=1e-4, atol=1e-4)
