"""The selective scan: every form equals the loop over time, forward and gradient."""

import multiprocessing
import os
import sys
import threading

import pytest
import torch

from manyform.errors import ManyformError
from manyform.ops import count, use
from manyform.ops.selective_scan import selective_scan

FAST = [p for p in selective_scan.paths if p != "reference"]
NAMES = ("x", "dt", "A", "B", "C", "D", "state", "dt_bias", "gate")


def inputs(batch=2, length=9, width=5, n=4, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    x, dt = rand(batch, length, width), 0.3 * rand(batch, length, width).exp()
    a = -rand(width, n).exp()
    b, c, d = rand(batch, length, n), rand(batch, length, n), rand(width)
    state = rand(batch, width, n)
    reset = torch.rand(batch, length, generator=g) < 0.15
    return [t.to(dtype) for t in (x, dt, a, b, c, d, state)], reset


def around(batch=2, length=9, width=5, dtype=torch.float32, seed=1):
    """A bias for the softplus of dt, and a gate."""
    g = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(width, generator=g, dtype=torch.float64)).to(dtype),
            (3 * torch.randn(batch, length, width, generator=g, dtype=torch.float64)).to(dtype)]


def results(path, args, reset):
    args = [t.detach().clone().requires_grad_() for t in args]
    more = dict(zip(("dt_bias", "gate"), args[7:], strict=False))
    with use(selective_scan=path):
        y, after = selective_scan(*args[:7], reset=reset, **more)
    g = torch.Generator().manual_seed(9)
    wy = torch.randn(y.shape, generator=g, dtype=torch.float64)
    wh = torch.randn(after.shape, generator=g, dtype=torch.float64)
    loss = (y.double() * wy).sum() + (after.double() * wh).sum()
    return y.detach(), after.detach(), torch.autograd.grad(loss, args)


def near(got, want, tolerance, what):
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize(("with_reset", "with_gate"), [(False, False), (True, True)])
@pytest.mark.parametrize(("batch", "length", "width", "n"), [
    (2, 9, 5, 4), (1, 1, 16, 16), (3, 67, 33, 3), (1, 130, 48, 16), (2, 64, 40, 1), (5, 33, 16, 5)])
def test_every_form_equals_the_reference(path, with_reset, with_gate, batch, length, width,
                                         n):
    if path == "step" and length != 1:
        pytest.skip("the step form is for one step")
    args, reset = inputs(batch, length, width, n)
    reset = reset if with_reset else None
    if with_gate:
        args += around(batch, length, width)
    y, after, grads = results(path, args, reset)
    want_y, want_after, want_grads = results("reference", [a.double() for a in args], reset)
    assert (y.dtype, after.dtype) == (torch.float32, torch.float32)
    near(y, want_y, 2e-6, "y")
    near(after, want_after, 2e-6, "state")
    for name, got, want in zip(NAMES, grads, want_grads, strict=False):
        near(got, want, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("path", ["torch", "numba"])
def test_bfloat16_activations_with_float32_parameters(path):
    args, reset = inputs(2, 70, 48, 16)
    args += around(2, 70, 48)
    low = [t.bfloat16() if name in ("x", "dt", "B", "C", "gate") else t
           for name, t in zip(NAMES, args, strict=True)]
    y, after, grads = results(path, low, reset)
    want_y, want_after, want_grads = results("reference", [t.float() for t in low], reset)
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    near(y, want_y, 4e-3, "y")
    near(after, want_after, 2e-6, "state")
    for name, arg, got, want in zip(NAMES, low, grads, want_grads, strict=True):
        assert got.dtype == arg.dtype
        near(got, want, 1e-2, f"gradient of {name}")


@pytest.mark.parametrize("path", ["torch", "reference"])
def test_float64_gradients(path, monkeypatch):
    monkeypatch.setattr(sys.modules["manyform.ops.selective_scan"], "CHUNK", 3)
    args, _ = inputs(2, 5, 2, 2, torch.float64)
    args += around(2, 5, 2, torch.float64)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = True
    with use(selective_scan=path):
        assert torch.autograd.gradcheck(
            lambda *a: selective_scan(*a[:7], reset=reset, dt_bias=a[7], gate=a[8]),
            [a.requires_grad_() for a in args])


@pytest.mark.parametrize("path", ["torch", "numba"])
def test_strided_input_equals_dense_input(path):
    args, reset = inputs(2, 40, 32, 4)
    x, dt, a, b, c, d, state = args
    both = torch.cat([x, b, c], dim=2)
    x_view, b_view, c_view = both.split([32, 4, 4], dim=2)
    dt_view = dt.transpose(1, 2).contiguous().transpose(1, 2)
    with use(selective_scan=path):
        want, want_state = selective_scan(x, dt, a, b, c, d, state, reset)
        got, got_state = selective_scan(x_view, dt_view, a, b_view, c_view, d, state,
                                        reset.T.contiguous().T)
    assert torch.equal(got, want)
    assert torch.equal(got_state, want_state)


@pytest.mark.parametrize("path", ["torch", "numba", "reference"])
def test_cuts_do_not_matter_and_the_state_is_not_changed(path):
    (x, dt, a, b, c, d, state), reset = inputs(2, 100, 20, 8)
    before = state.clone()
    with use(selective_scan=path):
        whole, end = selective_scan(x, dt, a, b, c, d, state, reset)
        h, parts = state, []
        for lo, hi in [(0, 1), (1, 40), (40, 41), (41, 100)]:
            y, h = selective_scan(*(t[:, lo:hi] for t in (x, dt)), a,
                                  *(t[:, lo:hi] for t in (b, c)), d, h, reset[:, lo:hi])
            parts.append(y)
    near(torch.cat(parts, 1), whole, 1e-6, "y")
    near(h, end, 1e-6, "state")
    assert torch.equal(state, before)


@pytest.mark.parametrize("path", ["torch", "numba"])
def test_no_skip_no_state_and_large_steps(path):
    (x, dt, a, b, c, _, _), _ = inputs(1, 50, 16, 4)
    dt = dt * 1000  # the decay underflows to nothing
    with use(selective_scan=path):
        y, h = selective_scan(x, dt, a, b, c)
    with use(selective_scan="reference"):
        want, want_h = selective_scan(x, dt, a, b, c)
    near(y, want, 1e-6, "y")
    near(h, want_h, 1e-6, "state")


@pytest.mark.parametrize("path", FAST)
def test_a_bad_number_is_seen(path):
    (x, dt, a, b, c, d, state), _ = inputs(1, 1 if path == "step" else 40, 16, 4)
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[0, 0, 3] = bad
        with use(selective_scan=path):
            y, _ = selective_scan(spoiled, dt, a, b, c, d, state)
        assert not torch.isfinite(y[0, 0, 3])
        assert torch.isfinite(y[..., :3]).all()


def test_two_threads_at_once():
    args, reset = inputs(2, 200, 64, 8)
    want = selective_scan(*args, reset=reset)[0]
    got = []
    workers = [threading.Thread(target=lambda: got.append(selective_scan(*args, reset=reset)[0]))
               for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(got) == 4
    assert all(torch.equal(g, want) for g in got)


def _child(queue):
    torch.set_num_threads(1)
    args, reset = inputs(1, 40, 16, 4)
    queue.put((selective_scan.choose(*args, reset=reset),
               selective_scan(*args, reset=reset)[0].sum().item()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_uses_the_torch_form():
    args, reset = inputs(1, 40, 16, 4)
    want = selective_scan(*args, reset=reset)[0].sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    path, got = queue.get(timeout=60)
    child.join(timeout=60)
    assert path == "torch"
    assert got == pytest.approx(want, rel=1e-4)


def test_cost_and_refusals():
    (x, dt, a, b, c, d, state), _ = inputs(2, 9, 5, 4)
    with count() as counted:
        selective_scan(x, dt, a, b, c, d)
    assert counted.total == 2 * 9 * 5 * (6 * 4 + 3)
    with pytest.raises(ManyformError, match="dt"):
        selective_scan(x, dt[:, 1:], a, b, c)
    with pytest.raises(ManyformError, match="B of selective_scan"):
        selective_scan(x, dt, a, b[..., 1:], c)
    with pytest.raises(ManyformError, match="state"):
        selective_scan(x, dt, a, b, c, d, state[..., 1:])
