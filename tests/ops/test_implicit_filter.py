"""The compiled window of an implicit filter equals its equation."""

import pytest
import torch

from manyform.ops import use
from manyform.ops.implicit_filter import implicit_filter, reach


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_windowed_equals_reference(shift):
    torch.manual_seed(0)
    length, width, d = 300, 24, 32
    shapes = [(width, 5), (width, width), (d, width)]
    inputs = [torch.randn(s) * 0.1 for s in shapes] + [torch.randn(width) * 0.1 for _ in range(2)]
    inputs += [torch.full((width,), 14.0), torch.randn(d)]
    decay, out = torch.linspace(3, 1500, d), torch.randn(d, length)
    results = []
    for path, kind in (("windowed", torch.float32), ("reference", torch.float64)):
        w = [t.to(kind, copy=True).requires_grad_() for t in inputs]
        with use(implicit_filter=path), torch.autocast("cpu", torch.bfloat16):
            k = implicit_filter(length, w[:3], w[3:5], w[5], decay.to(kind), shift, w[6], 40)
        results.append([k, *torch.autograd.grad((k * out).sum(), w)])
    assert results[0][0].dtype == torch.bfloat16
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm()


def test_filters_end_where_reach_says():
    length, d = 600, 16
    w = [torch.randn(8, 5), torch.randn(d, 8)]
    decay = torch.linspace(3, 60, d)
    with torch.autocast("cpu", torch.bfloat16), use(implicit_filter="windowed"):
        k = implicit_filter(length, w, [torch.zeros(8)], torch.ones(8), decay, 0.0,
                            torch.zeros(d), 40)
    ends = reach(decay, 0.0, 40)
    assert int(ends.min()) < length
    for c in range(d):
        assert not k[c, int(ends[c]):].any()
    assert reach(decay, 0.1, 40) is None
