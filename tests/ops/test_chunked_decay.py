"""The chunked form of the matrix recurrence without the delta rule, held to the reference."""

from __future__ import annotations

import pytest
import torch

from manyform.ops import chunked_decay, trace, use
from manyform.ops.matrix_recurrence import matrix_recurrence

DECAYS = ["none", "head", "head_step", "channel"]
STRENGTHS = {"weak": 0.05, "mixed": 3.0, "strong": 50.0}


def inputs(decay, strength=0.05, *, batch=2, length=100, groups=2, heads=4, key=8, value=6,
           dtype=torch.float64, resets=False, with_state=True, seed=0):
    """Random arguments; of decays, most are weak, some of the given strength."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    shape = {"none": None, "head": (heads,), "head_step": (batch, length, heads),
             "channel": (batch, length, heads, key)}[decay]
    g = None
    if shape is not None:
        g = -normal(*shape).abs() * 0.05
        g = torch.where(torch.rand(shape, generator=random) < 0.2, g * strength / 0.05, g)
    reset = torch.rand(batch, length, generator=random) < 0.06 if resets else None
    given = {"q": normal(batch, length, groups, key), "k": normal(batch, length, groups, key),
             "v": normal(batch, length, heads, value), "log_decay": g, "state": None}
    if with_state:
        given["state"] = normal(batch, heads, key, value)
    given = {n: None if x is None else x.to(torch.float32 if n in ("state", "log_decay")
                                            and dtype == torch.bfloat16 else dtype)
             .requires_grad_() for n, x in given.items()}
    return {**given, "reset": reset, "scale": 0.7}


def run(given, path):
    """Outputs and the gradients of a fixed random function of them."""
    given = {n: x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point()
             else x for n, x in given.items()}
    with use(matrix_recurrence=path):
        y, last = matrix_recurrence(**given)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=random)
    ((y * weight).sum() + (last * torch.randn(last.shape, generator=random)).sum()).backward()
    grads = {n: x.grad for n, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    return {"y": y.detach(), "last": last.detach(), **grads}


def assert_near(fast, slow, tolerance):
    for name, expected in slow.items():
        given = torch.zeros_like(expected) if fast[name] is None else fast[name]
        error = (given.double() - expected.double()).norm() / (expected.double().norm() + 1e-2)
        assert given.dtype == expected.dtype, name
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_equals_the_reference_in_float64(decay, strength, resets):
    given = inputs(decay, STRENGTHS[strength], resets=resets)
    assert_near(run(given, "chunked"), run(given, "reference"), 1e-10)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("decay", DECAYS)
def test_any_length_without_a_state(decay, length):
    given = inputs(decay, 3.0, length=length, with_state=False)
    assert_near(run(given, "chunked"), run(given, "reference"), 1e-10)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_float32(decay, strength):
    given = inputs(decay, STRENGTHS[strength], dtype=torch.float32, resets=True)
    assert_near(run(given, "chunked"), run(given, "reference"), 2e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_stays_near_float64(decay, strength, groups):
    given = inputs(decay, STRENGTHS[strength], dtype=torch.bfloat16, groups=groups, key=32,
                   value=32)
    fast = run(given, "chunked")
    slow = run({n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for n, x in given.items()}, "reference")
    assert fast["y"].dtype == torch.bfloat16
    assert fast["last"].dtype == torch.float32
    for name, expected in slow.items():
        # The gradient of a strong decay is a small difference of large terms.
        bound = 0.06 if name == "log_decay" else 0.015
        assert (fast[name].double() - expected).norm() / expected.norm() < bound, name


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("strength", ["weak", "mixed", "strong"])
@pytest.mark.parametrize("decay", DECAYS)
def test_compiled_passes(decay, strength, resets, monkeypatch):
    monkeypatch.setattr(chunked_decay, "SMALL", 0)
    value = 33 if decay == "none" else 16  # 33: a column for a sum, as linear attention has
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 0.02)):
        given = inputs(decay, STRENGTHS[strength], dtype=dtype, resets=resets, key=16, value=value)
        exact = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                 for n, x in given.items()}
        fast, slow = run(given, "chunked"), run(exact, "reference")
        for name, expected in slow.items():
            limit = 3 * bound if name == "log_decay" else bound
            assert (fast[name].double() - expected).norm() < limit * (expected.norm() + 1e-2), name


@pytest.mark.parametrize("decay", ["head_step", "channel"])
@pytest.mark.parametrize("strongest", [-1e4, -float("inf")])
def test_a_decay_that_forgets_all_is_finite_and_exact(decay, strongest):
    given = inputs(decay, 0.05, dtype=torch.float32)
    given["log_decay"] = given["log_decay"].detach().clone()
    given["log_decay"][:, 40::7] = strongest
    fast, slow = run(given, "chunked"), run(given, "reference")
    fast["log_decay"], slow["log_decay"] = (  # the reference itself has 0 * inf there
        torch.where(given["log_decay"] == strongest, 0.0, x["log_decay"]) for x in (fast, slow))
    assert_near(fast, slow, 2e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("resets", [False, True])
def test_step_equals_the_reference(decay, resets):
    given = inputs(decay, 3.0, length=1, resets=resets)
    assert_near(run(given, "step"), run(given, "reference"), 1e-12)
    given["state"] = None
    assert_near(run(given, "step"), run(given, "reference"), 1e-12)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        given = inputs(decay, 3.0, length=1, resets=resets, dtype=dtype, value=16)
        with torch.no_grad(), use(matrix_recurrence="step"):
            y, last = matrix_recurrence(**given)
        expected = run(given, "reference")
        assert_near({"y": y, "last": last}, {n: expected[n] for n in ("y", "last")}, bound)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_the_future_and_other_documents_have_no_gradient_at_all(decay, strength):
    given = inputs(decay, STRENGTHS[strength], dtype=torch.float32)
    reset = torch.zeros(2, 100, dtype=torch.bool)
    reset[:, [20, 70]] = True
    given["reset"] = reset
    with use(matrix_recurrence="chunked"):
        y, _ = matrix_recurrence(**given)
    y[:, 30].sum().backward()
    for name in ("q", "k", "v"):
        grad = given[name].grad
        assert grad[:, 31:].count_nonzero() == 0
        assert grad[:, :20].count_nonzero() == 0
        assert grad[:, 30].count_nonzero() > 0
    assert given["state"].grad.count_nonzero() == 0
    if decay in ("head_step", "channel"):
        assert given["log_decay"].grad[:, 31:].count_nonzero() == 0
        assert given["log_decay"].grad[:, :21].count_nonzero() == 0


@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(decay):
    given = inputs(decay, 3.0, batch=1, length=5, groups=1, heads=2, key=2, value=2, resets=True)
    names = [n for n, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*args):
        with use(matrix_recurrence="chunked"):
            return matrix_recurrence(**{**given, **dict(zip(names, args, strict=True))})
    assert torch.autograd.gradcheck(function, tuple(given[n] for n in names))


def test_preferred_forms():
    given = inputs("channel", length=5)
    with trace() as seen:
        matrix_recurrence(**given)
        matrix_recurrence(**inputs("channel", length=1))
    assert set(seen) == {("matrix_recurrence", "chunked"), ("matrix_recurrence", "step")}


@pytest.mark.parametrize("decay", DECAYS)
def test_views_and_autocast(decay):
    given = inputs(decay, dtype=torch.float32, key=32, value=32)
    plain = run(given, "chunked")
    turned = dict(given)
    for name in ("q", "k", "v"):
        turned[name] = given[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert_near(run(turned, "chunked"), plain, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(given, "chunked")
    assert_near({"y": cast["y"]}, {"y": plain["y"]}, 0.015)
