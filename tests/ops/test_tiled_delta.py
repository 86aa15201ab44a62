"""The delta rule on matrix tiles against the plain loop, where the processor has tiles."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_chunked_delta import assert_close, inputs, run

from manyform.ops import chunked_delta
from manyform.ops.kernels import available
from manyform.ops.matrix_recurrence import matrix_recurrence


def _tiles() -> bool:
    if not available():
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


pytestmark = pytest.mark.skipif(not _tiles(), reason="this processor has no matrix tiles")


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Small problems take the tiles too; the calls that did are counted."""
    monkeypatch.setattr(chunked_delta, "SMALL", 0)
    calls, plain = [], chunked_delta.tiled_delta.tiled_delta
    monkeypatch.setattr(chunked_delta.tiled_delta, "tiled_delta",
                        lambda *a: calls.append(1) or plain(*a))
    return calls


@pytest.mark.parametrize("decay", ["none", "head", "step", "channel"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length", [64, 150])
def test_equals_reference(decay, shared, reset, length, tiled):
    args = inputs(decay, shared=shared, reset=reset, length=length, key=32, value=64,
                  dtype=torch.bfloat16)
    # decays of a head alone are one sum over all steps, most of which cancels
    tolerance = 4e-2 if decay == "head" else 1.5e-2
    assert_close(run(args, "chunked_delta"), run(args, "reference"), tolerance)
    assert bool(tiled) == (decay != "channel" or not reset)


@pytest.mark.parametrize("strength", [8.0, 500.0])
def test_strong_decay(strength):
    args = inputs("step", strength=strength, length=100, key=32, value=32, dtype=torch.bfloat16)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), 1.5e-2)


def test_grouped_heads_without_state():
    args = inputs("step", shared=False, heads=4, groups=2, state=False, length=70, key=32,
                  value=32, dtype=torch.bfloat16)
    assert_close(run(args, "chunked_delta"), run(args, "reference"), 1.5e-2)


def test_nothing_crosses_a_reset():
    q, k, v, g, (a, b), s, _, scale = inputs("step", shared=False, batch=1, length=150, key=32,
                                             value=32, dtype=torch.bfloat16)
    reset = torch.zeros(1, 150, dtype=torch.bool)
    reset[0, 70] = True
    y, last = matrix_recurrence(q, k, v, g, (a, b), s, reset, scale)
    leaves = [x for x in (q, k, v, g, a, b) if x is not None]
    grads = torch.autograd.grad(y[:, 70:].sum() + last.sum(), [*leaves, s])
    assert not any(x[:, :70].any() for x in grads[:-1])
    assert not grads[-1].any()


def test_causal():
    q, k, v, g, (a, b), s, _, scale = inputs("channel", shared=False, batch=1, length=80, key=32,
                                             value=32, dtype=torch.bfloat16)
    y, _ = matrix_recurrence(q, k, v, g, (a, b), s, None, scale)
    for gradient in torch.autograd.grad(y[:, 37].sum(), [q, k, v, g, a, b]):
        assert not gradient[:, 38:].any()


@pytest.mark.parametrize("shared", [True, False])
def test_decays_of_a_channel_near_the_limit(shared, tiled):
    q, k, v, g, (a, b), s, reset, scale = inputs("channel", shared=shared, length=100, key=32,
                                                 value=32, dtype=torch.bfloat16)
    g = torch.full_like(g, -1.6).detach()
    g[..., ::2] = 0.0
    g[:, 70, :, 1] = -20.0
    g.requires_grad_()
    args = q, k, v, g, (a, b), s, reset, scale
    assert_close(run(args, "chunked_delta"), run(args, "reference"), 1.5e-2)
    assert tiled
