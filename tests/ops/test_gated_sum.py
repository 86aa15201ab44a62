"""The gated sum of three results: the compiled form against the equation, and its gradients."""

import torch

from manyform.ops import use
from manyform.ops.gated_sum import gated_sum


def facts(dtype, wide):
    torch.manual_seed(0)
    gates = torch.rand(2, 40, 3, 4, dtype=wide, requires_grad=True)
    parts = [torch.randn(2, 4, 40, 16).to(dtype).requires_grad_() for _ in range(3)]
    return gates, *parts


def test_equation():
    gates, a, b, c = facts(torch.float64, torch.float64)
    y = gated_sum(gates, a, b, c)
    want = gates[1, 7, 0, 2] * a[1, 2, 7] + gates[1, 7, 1, 2] * b[1, 2, 7]
    torch.testing.assert_close(y[1, 7, 2], want + gates[1, 7, 2, 2] * c[1, 2, 7])


def test_forms_agree():
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        args = facts(dtype, torch.float32)
        results = []
        for form in ("numba", "reference"):
            with use(gated_sum=form):
                y = gated_sum(*args)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), args)))
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype
            got, want = got.detach().double(), want.detach().double()
            assert (got - want).norm() <= tolerance * want.norm()
