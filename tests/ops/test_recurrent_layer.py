"""The compiled recurrent layer and torch's kernels against the plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyform.ops import trace, use
from manyform.ops.recurrent_layer import GATES, LARGEST, recurrent_layer


def _inputs(cell: str, batch: int, length: int, d_in: int, size: int) -> list[torch.Tensor]:
    rows, states = GATES[cell] * size, 2 if cell == "lstm" else 1
    return [torch.randn(batch, length, d_in), torch.randn(rows, d_in) / d_in**0.5,
            torch.randn(rows, size) / size**0.5, torch.randn(rows), torch.randn(rows),
            *(torch.randn(batch, size) for _ in range(states))]


def _run(path: str, cell: str, inputs: list[torch.Tensor], reset: torch.Tensor | None,
         dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs, last state, and the gradients of all inputs under one random weighting."""
    leaves = [v.to(dtype).requires_grad_() for v in inputs]
    with use(recurrent_layer=path):
        y, state = recurrent_layer(leaves[0], tuple(leaves[1:5]), tuple(leaves[5:]), cell, reset)
    found = [y, *state]
    torch.manual_seed(1)
    sum((v * torch.randn(v.shape).to(v.dtype)).sum() for v in found).backward()
    return [v.detach() for v in found] + [v.grad for v in leaves]


@pytest.mark.parametrize("path", ["numba", "fused"])
@pytest.mark.parametrize("cell", GATES)
@given(batch=st.integers(1, 9), length=st.integers(1, 12), d_in=st.sampled_from((5, 32)),
       size=st.sampled_from((3, 16, 32, 40, 96)), seed=st.integers(0, 999), resets=st.booleans())
@settings(max_examples=12, deadline=None)
def test_agrees_with_the_loop(path, cell, batch, length, d_in, size, seed, resets):
    torch.manual_seed(seed)
    inputs = _inputs(cell, batch, length, d_in, size)
    reset = torch.rand(batch, length) < 0.3 if resets else None
    wanted = _run("reference", cell, inputs, reset, torch.float64)
    for a, b in zip(_run(path, cell, inputs, reset, torch.float32), wanted, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("cell", GATES)
def test_bfloat16_inputs_under_autocast(cell):
    torch.manual_seed(0)
    x, *rest = _inputs(cell, 4, 20, 32, 64)
    wanted = _run("reference", cell, [x.bfloat16(), *rest], None, torch.float64)
    leaves = [x.bfloat16().requires_grad_(), *(v.requires_grad_() for v in rest)]
    with torch.autocast("cpu", torch.bfloat16), trace() as seen:
        y, state = recurrent_layer(leaves[0], tuple(leaves[1:5]), tuple(leaves[5:]), cell)
    assert seen["recurrent_layer", "numba"] == 1
    assert y.dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in state)
    torch.manual_seed(1)
    sum((v * torch.randn(v.shape).to(v.dtype)).sum() for v in (y, *state)).backward()
    for a, b in zip([y, *state, *(v.grad for v in leaves)], wanted, strict=True):
        error = (a.detach().double() - b).norm() / b.norm()
        # a rounded sum near 0 switches a rectified unit on or off
        assert error < (0.2 if cell == "relu" else 0.02), error


def test_weights_beyond_the_cache_and_other_precisions_go_to_torch():
    size = int((LARGEST // 4) ** 0.5) + 16
    x, *rest = _inputs("lstm", 1, 2, 4, size)
    with trace() as seen, torch.no_grad():
        recurrent_layer(x, tuple(rest[:4]), tuple(rest[4:]), "lstm")
        x, *rest = (v.double() for v in _inputs("lstm", 1, 2, 4, 8))
        recurrent_layer(x, tuple(rest[:4]), tuple(rest[4:]), "lstm")
    assert seen["recurrent_layer", "fused"] == 2


def test_the_callers_state_stays_as_it_is():
    x, *rest = _inputs("lstm", 2, 3, 8, 32)
    kept = [v.clone() for v in rest[4:]]
    recurrent_layer(x, tuple(rest[:4]), tuple(rest[4:]), "lstm")
    assert all(torch.equal(a, b) for a, b in zip(kept, rest[4:], strict=True))
