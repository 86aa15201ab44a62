"""Titans' memory on matrix tiles against chunks by products, where the processor has tiles."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.ops.test_tiled_ttt import needs_tiles
from torch.nn import functional as F

from manyform.ops import use
from manyform.ops.titans import NeuralMemory, titans


def run(path, length, sizes, chunk, resets, carried, batch=2, heads=2):
    """Results and gradients, also through the last state and into the first."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    def matrices(*shape):
        return [(draw(*shape, a, b) * a**-0.5).requires_grad_()
                for a, b in itertools.pairwise(sizes)]
    q, k, v = draw(3, batch, length, heads, sizes[0])
    leaves = [x.bfloat16().requires_grad_()
              for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
    gates = draw(3, batch, length, heads)
    leaves += [x.detach().requires_grad_() for x in (
        0.1 * torch.sigmoid(gates[0]), F.logsigmoid(3 + gates[1]), F.logsigmoid(gates[2]))]
    initial = matrices(heads)
    leaves += initial
    state = None
    if carried:
        memory, momentum = matrices(batch, heads), matrices(batch, heads)
        leaves += memory + momentum
        state = NeuralMemory(tuple(memory), tuple(momentum), tuple(memory),
                             torch.zeros(batch, dtype=torch.int64))
    reset = torch.rand(batch, length, generator=g) < 0.06 if resets else None
    with use(titans=path):
        y, after = titans(*leaves[:6], tuple(initial), chunk, state, reset)
    outputs = [y, *after.memory, *after.momentum, *after.start]
    grads = torch.autograd.grad(outputs, leaves, [draw(*x.shape).to(x.dtype) for x in outputs],
                                allow_unused=True, materialize_grads=True)
    return [*outputs, after.position, *grads]


@needs_tiles
@pytest.mark.parametrize(("length", "sizes", "chunk", "resets", "carried"), [
    (64, [64, 128, 64], 16, False, False), (300, [32, 64, 32], 16, False, True),
    (77, [48, 96, 96, 48], 16, True, True), (40, [128, 128], 16, True, False),
    (50, [16, 32, 16], 7, True, True)])
def test_equals_the_dual_form(length, sizes, chunk, resets, carried):
    args = length, sizes, chunk, resets, carried
    for got, want in zip(run("tiles", *args), run("dual", *args), strict=True):
        got, want = got.float(), want.float()
        assert (got - want).norm() <= 1.2e-2 * want.norm() + 1e-6


@needs_tiles
def test_causal_and_apart():
    """Nothing reaches back, nor across a reset, within a chunk too."""
    g = torch.Generator().manual_seed(0)
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 40, 1, 16, generator=g).bfloat16()]
    leaves += [x.requires_grad_() for x in -0.2 * torch.rand(3, 1, 40, 1, generator=g)]
    initial = (torch.randn(1, 16, 16, generator=g) / 4, torch.randn(1, 16, 16, generator=g) / 4)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    with use(titans="tiles"):
        y, _ = titans(*leaves[:3], -0.1 * leaves[3], *leaves[4:], initial, 16, None, reset)
    for grad in torch.autograd.grad(y[:, 19].float().sum(), leaves, retain_graph=True):
        assert not grad[:, 20:].any()
        assert grad[:, 18:20].any()
    for grad in torch.autograd.grad(y[:, 30:].float().sum(), leaves):
        assert not grad[:, :21].any()
