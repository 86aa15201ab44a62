"""The recurrence without erase on matrix tiles against the plain loop, where there are tiles."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_chunked_decay import DECAYS, assert_near, inputs, run
from tests.ops.test_tiled_delta import _tiles

from manyform.ops import chunked_decay
from manyform.ops.matrix_recurrence import matrix_recurrence

pytestmark = pytest.mark.skipif(not _tiles(), reason="this processor has no matrix tiles")


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Small problems take the tiles too; the calls that did are counted."""
    monkeypatch.setattr(chunked_decay, "SMALL", 0)
    calls, plain = [], chunked_decay.tiled_decay.tiled_decay
    monkeypatch.setattr(chunked_decay.tiled_decay, "tiled_decay",
                        lambda *a: calls.append(1) or plain(*a))
    return calls


def rows(decay, strength=0.05, **options):
    return inputs(decay, strength, **{"key": 32, "value": 64, "dtype": torch.bfloat16, **options})


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("length", [64, 149])
def test_equals_the_reference(decay, groups, resets, length, tiled):
    given = rows(decay, groups=groups, resets=resets, length=length)
    # decays of a head alone are one sum over all steps, most of which cancels
    assert_near(run(given, "chunked"), run(given, "reference"), 4e-2 if decay == "head" else 1.5e-2)
    assert bool(tiled) == (decay != "channel" or not resets)


@pytest.mark.parametrize("value", [33, 65, 96, 104])
@pytest.mark.parametrize("decay", DECAYS)
def test_any_width_of_values(decay, value, tiled):
    given = rows(decay, length=71, key=64, value=value, with_state=False)
    assert_near(run(given, "chunked"), run(given, "reference"), 4e-2 if decay == "head" else 1.5e-2)
    assert tiled


@pytest.mark.parametrize("strength", [3.0, 50.0, 500.0])
@pytest.mark.parametrize("resets", [False, True])
def test_strong_decay(strength, resets, tiled):
    given = rows("head_step", strength, resets=resets)
    assert_near(run(given, "chunked"), run(given, "reference"), 1.5e-2)
    assert tiled


def test_strong_decay_of_a_channel_takes_another_form(tiled):
    given = rows("channel", 50.0)
    assert_near(run(given, "chunked"), run(given, "reference"), 3e-2)
    assert not tiled


def test_decays_of_a_channel_near_the_limit(tiled):
    given = rows("channel", length=100)
    g = torch.full_like(given["log_decay"], -1.6).detach()
    g[..., ::2] = 0.0
    g[:, 70, :, 1] = -20.0
    given["log_decay"] = g.requires_grad_()
    assert_near(run(given, "chunked"), run(given, "reference"), 1.5e-2)
    assert tiled


@pytest.mark.parametrize("decay", ["none", "head_step"])
def test_longer_chunks_for_many_features_of_keys(decay, tiled):
    given = rows(decay, key=128, value=32, length=200, groups=1, resets=True)
    assert_near(run(given, "chunked"), run(given, "reference"), 1.5e-2)
    assert tiled


def test_heads_of_a_group_are_cut_where_a_batch_is_small(tiled):
    given = rows("head_step", batch=1, groups=1, heads=6)
    assert_near(run(given, "chunked"), run(given, "reference"), 1.5e-2)


@pytest.mark.parametrize("decay", ["none", "head_step"])
def test_nothing_crosses_a_reset(decay):
    given = rows(decay, batch=1, length=150)
    given["reset"] = torch.zeros(1, 150, dtype=torch.bool)
    given["reset"][0, 70] = True
    y, last = matrix_recurrence(**given)
    names = [n for n in ("q", "k", "v", "log_decay") if given[n] is not None]
    grads = torch.autograd.grad(y[:, 70:].sum() + last.sum(),
                                [given[n] for n in (*names, "state")])
    assert not any(x[:, :70].any() for x in grads[:-1])
    assert not grads[-1].any()


@pytest.mark.parametrize("decay", ["none", "head_step", "channel"])
def test_causal(decay):
    given = rows(decay, batch=1, length=80)
    y, _ = matrix_recurrence(**given)
    names = [n for n in ("q", "k", "v", "log_decay") if given[n] is not None]
    for gradient in torch.autograd.grad(y[:, 37].sum(), [given[n] for n in names]):
        assert not gradient[:, 38:].any()


def test_expanded_and_strided_inputs():
    given = rows("head_step")
    whole = torch.randn(2, 100, 2, 64).bfloat16()
    given["q"], given["k"] = whole[..., ::2], whole.transpose(0, 1).contiguous().transpose(0, 1)[
        ..., :32]
    given["log_decay"] = given["log_decay"].detach()[:, :1].expand(-1, 100, -1)
    assert_near(run(given, "chunked"), run(given, "reference"), 1.5e-2)
