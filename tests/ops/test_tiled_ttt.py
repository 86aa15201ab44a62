"""Test-time training on matrix tiles against the dual form, where the processor has tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from manyform.ops import use
from manyform.ops.kernels import available
from manyform.ops.tiled_ttt import mini_batches
from manyform.ops.ttt import TTTState, ttt


def _tiles() -> bool:
    if not available():
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


needs_tiles = pytest.mark.skipif(not _tiles(), reason="this processor has no matrix tiles")


def run(path, length, sizes, size, resets, carried, batch=2, heads=2):
    """Results and gradients, also through the last state and into the first."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()
    head_dim = sizes[0]
    qkv = [draw(batch, length, heads, head_dim, dtype=torch.bfloat16) for _ in range(3)]
    rate = (torch.rand(batch, length, heads, generator=g) / head_dim).requires_grad_()
    scale = (1 / torch.arange(1, size + 1)).requires_grad_()
    norm = (torch.tensor([1.0, 0.0])[:, None, None] + 0.1 * draw(2, heads, head_dim)
            ).detach().requires_grad_()
    initial = [(0.05 * draw(heads, a + 1, b)).detach().requires_grad_()
               for a, b in itertools.pairwise(sizes)]
    leaves = [*qkv, rate, scale, norm, *initial]
    state = None
    if carried:
        weights = [(0.05 * draw(batch, heads, a + 1, b)).detach().requires_grad_()
                   for a, b in itertools.pairwise(sizes)]
        leaves += weights
        state = TTTState(tuple(weights), tuple(torch.zeros_like(w) for w in weights),
                         torch.zeros(batch, dtype=torch.int64))
    reset = torch.rand(batch, length, generator=g) < 0.06 if resets else None
    with use(ttt=path):
        y, after = ttt(*leaves[:6], tuple(initial), state, reset)
    outputs = [y, *after.weights, *after.sums]
    grads = torch.autograd.grad(outputs, leaves, [torch.randn(x.shape, generator=g).to(x.dtype)
                                                  for x in outputs],
                                allow_unused=True, materialize_grads=True)
    return [*outputs, after.position, *grads]


@needs_tiles
@pytest.mark.parametrize(("length", "sizes", "size", "resets", "carried"), [
    (64, [64] * 2, 16, False, False), (75, [64] * 2, 16, False, True),
    (90, [48] * 2, 16, True, True), (40, [128] * 2, 16, True, False),
    (50, [16] * 2, 7, True, True), (64, [64, 256, 64], 16, False, False),
    (330, [32, 64, 32], 16, True, True), (60, [16, 32, 48, 16], 7, False, True)])
def test_equals_the_dual_form(length, sizes, size, resets, carried):
    args = length, sizes, size, resets, carried
    for got, want in zip(run("tiles", *args), run("dual", *args), strict=True):
        got, want = got.float(), want.float()
        assert (got - want).norm() <= 6e-3 * want.norm() + 1e-6


@needs_tiles
def test_causal_and_apart():
    """Nothing reaches back, nor across a reset, within a mini-batch too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 1, 16, generator=g).bfloat16().requires_grad_()
               for _ in range(3))
    norm = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 1, 16)
    initial = 0.1 * torch.randn(1, 17, 16, generator=g)
    rate, scale = torch.full((1, 40, 1), 0.1), 1 / torch.arange(1, 17)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    with use(ttt="tiles"):
        y, _ = ttt(q, k, v, rate, scale, norm, (initial,), None, reset)
    for grad in torch.autograd.grad(y[:, 19].float().sum(), [q, k, v], retain_graph=True):
        assert not grad[:, 20:].any()
        assert grad[:, 19].any()
    for grad in torch.autograd.grad(y[:, 30:].float().sum(), [q, k, v]):
        assert not grad[:, :21].any()


def test_where_mini_batches_begin():
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, [0, 6]] = True
    reset[1, 1] = True
    starts, fresh, position = mini_batches(2, 9, 4, reset)
    assert starts.tolist() == [[0, 4, 6, 9], [0, 1, 5, 9]]
    assert fresh.tolist() == [[True, False, True], [False, True, False]]
    assert position.tolist() == [3, 0]
    starts, fresh, position = mini_batches(1, 9, 4, None)
    assert starts.tolist() == [[0, 4, 8, 9]]
    assert position.tolist() == [1]
    assert not fresh.any()
