"""The feed-forward network in one pass over its tokens, against float64, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import manyform.ops.feed_forward as module
from manyform.channels.mlp import MLP, GatedMLP
from manyform.ops import count, trace, use
from manyform.ops.feed_forward import ACTIVATIONS, feed_forward
from manyform.ops.kernels.tiles import supported

EQUATIONS = {"swiglu": lambda z: F.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1],
             "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu,
             "relu2": lambda z: F.relu(z).square()}
tiles = pytest.mark.skipif(not supported(), reason="needs a processor with matrix tiles")


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Small networks, too, go to the tiles; memory that nobody wrote is NaN."""
    monkeypatch.setattr(module, "SMALLEST", 0)
    empty, like = torch.empty, torch.empty_like

    def poisoned(make, *args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -1)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty, *a, **k))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(like, *a, **k))


def network(tokens, d, hidden, activation, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    gates = 2 if activation == "swiglu" else 1
    x, g = torch.randn(tokens, d), torch.randn(tokens, d)
    up, down = torch.randn(gates * hidden, d) / d**0.5, torch.randn(d, hidden) / hidden**0.5
    return [z.to(dtype).requires_grad_() for z in (x, up, down)], g.bfloat16()


def results(run, leaves, g):
    """y and all gradients, leaves being let go of."""
    y = run(*leaves)
    y.backward(g.to(y.dtype))
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [y.detach(), *grads]


def exact(leaves, g, activation):
    """The equation in float64, of operands that are rounded to bfloat16."""
    leaves = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    return results(lambda x, up, down: F.linear(EQUATIONS[activation](F.linear(x, up)), down),
                   leaves, g)


def close(got, wanted, tolerance):
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@tiles
@given(tokens=st.sampled_from((1, 2, 31, 33, 257, 600)), d=st.sampled_from((32, 64, 160)),
       hidden=st.integers(8, 200), activation=st.sampled_from(list(ACTIVATIONS)),
       seed=st.integers(0, 99), threads=st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_tiles_agree_with_the_equation(tokens, d, hidden, activation, seed, threads):
    leaves, g = network(tokens, d, hidden, activation, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16), use(feed_forward="tiles"):
            got = results(lambda *a: feed_forward(*a, activation), leaves, g)
    finally:
        torch.set_num_threads(before)
    assert [z.dtype for z in got] == [torch.bfloat16] + 3 * [torch.float32]
    # a single element of relu's gradient may lie on the other side of zero
    tolerance = 2e-2 if activation == "relu" and tokens * hidden < 2000 else 1e-2
    for ours, wanted in zip(got, exact(leaves, g, activation), strict=True):
        close(ours, wanted, tolerance)


@tiles
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_are_no_less_exact_than_the_steps(activation):
    leaves, g = network(700, 96, 250, activation)
    wanted = exact(leaves, g, activation)
    errors = {}
    for path in ("tiles", "steps"):
        with torch.autocast("cpu", torch.bfloat16), use(feed_forward=path):
            got = results(lambda *a: feed_forward(*a, activation), leaves, g)
        errors[path] = [float((a.double() - b).norm() / b.norm())
                        for a, b in zip(got, wanted, strict=True)]
    assert all(a < 1.1 * b for a, b in zip(*errors.values(), strict=True))


@tiles
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_seen(activation, bad):
    (x, up, down), _ = network(100, 32, 64, activation, dtype=torch.bfloat16)
    with torch.no_grad():
        x[37, 5] = bad
        y = feed_forward(x, up, down, activation)
    broken = ~y.isfinite().all(-1)
    assert broken[37]
    assert broken.sum() == 1


@tiles
def test_far_away_gates_are_shut_or_open():
    x = torch.eye(32)[:2].bfloat16() * torch.tensor([[-300.0], [300.0]]).bfloat16()
    up = torch.cat([torch.ones(32, 32), torch.eye(32)]).bfloat16()
    with torch.no_grad():
        y = feed_forward(x, up, torch.eye(32).bfloat16())
    assert torch.equal(y[0], torch.zeros(32))
    assert y[1, 1] == 90112  # 300^2 in bfloat16


@pytest.mark.parametrize("path", ["reference", "steps"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_forms_have_its_gradients(path, activation):
    leaves, _ = network(5, 6, 4, activation, dtype=torch.float64)
    with use(feed_forward=path):
        assert torch.autograd.gradcheck(lambda *a: feed_forward(*a, activation), leaves)


@pytest.mark.parametrize(("make", "activation"), [
    (lambda **o: GatedMLP(64, **o), "swiglu"), (lambda **o: MLP(64, **o), "gelu_tanh"),
    (lambda **o: MLP(64, activation="relu", **o), "relu"),
    (lambda **o: MLP(64, activation="relu2", **o), "relu2")])
def test_channels_take_it_where_they_are_two_plain_maps(make, activation):
    x = torch.randn(2, 40, 64)

    def taken(layer):
        with torch.autocast("cpu", torch.bfloat16), trace() as seen:
            layer(x)
        return [path for name, path in seen if name == "feed_forward"]
    plain = make()
    assert taken(plain) == ["tiles" if supported() else "steps"]
    assert taken(make(bias=True)) == []
    calls = []
    plain.down.register_forward_hook(lambda *_: calls.append(1))
    assert taken(plain) == []
    assert calls == [1]
    other = make()
    other.down = nn.Sequential(other.down)  # as an adapter would stand there
    assert taken(other) == []
    frozen = make().requires_grad_(False)
    frozen.down.weight.requires_grad_()
    assert taken(frozen) == ["steps"]


def test_counts_its_operations_once():
    (x, up, down), _ = network(7, 32, 16, "swiglu")
    for path in feed_forward.paths:
        with torch.autocast("cpu", torch.bfloat16, enabled=path == "tiles"), count() as counted:
            if path != "tiles" or supported():
                with use(feed_forward=path):
                    feed_forward(x, up, down)
                assert counted.total == 2 * 7 * 32 * 3 * 16
