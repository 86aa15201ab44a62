"""The operations around the mixers: norm, gated activation, loss; compiled against reference."""

import pytest
import torch

from manyform.ops import trace, use
from manyform.ops.cross_entropy import linear_cross_entropy
from manyform.ops.gelu import gelu_tanh
from manyform.ops.layer_norm import layer_norm
from manyform.ops.rms_norm import rms_norm
from manyform.ops.swiglu import swiglu

BF16, F32 = torch.bfloat16, torch.float32


def both(function, inputs, weights):
    """Outputs and gradients of the compiled form and of the reference."""
    results = []
    for path in ("numba", "reference"):
        with use(path), trace() as seen:
            y = function(*inputs)
        assert {p for _, p in seen} == {path}
        wanted = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
        results.append((y, *torch.autograd.grad((y.float() * weights).sum(), wanted)))
    return list(zip(*results, strict=True))


def close(pairs, dtype):
    for got, want in pairs:
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < (1e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize(("dtype", "out"), [(F32, None), (F32, BF16), (BF16, None)])
@pytest.mark.parametrize("shape", [(3, 131, 64), (7000, 16)])
def test_rms_norm(dtype, out, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    w = torch.randn(shape[-1], requires_grad=True)
    close(both(rms_norm, (x, w, 1e-6, out), torch.randn(shape)), out or dtype)


@pytest.mark.parametrize(("dtype", "out"), [(F32, None), (F32, BF16), (BF16, None)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(dtype, out, with_bias):
    x = (torch.randn(3, 131, 64) * 2 + 3).to(dtype).requires_grad_()
    w = torch.randn(64, requires_grad=True)
    b = torch.randn(64, requires_grad=True) if with_bias else None
    close(both(layer_norm, (x, w, b, 1e-5, out), torch.randn(3, 131, 64)), out or dtype)


def test_rms_norm_of_a_view_and_of_a_width_without_a_compiled_form():
    x = torch.randn(64, 3, 64).transpose(0, 1)
    w = torch.rand(64)
    with use("reference"):
        want = rms_norm(x, w)
    torch.testing.assert_close(rms_norm(x, w), want)
    with trace() as seen:
        rms_norm(torch.randn(5000, 7), torch.rand(7))
    assert list(seen) == [("rms_norm", "torch")]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_swiglu_with_gates_from_tiny_to_huge(dtype):
    x = torch.randn(5, 33, 128)
    x[..., :64] *= torch.logspace(-3, 2.5, 64)
    x = x.to(dtype).requires_grad_()
    pairs = both(swiglu, (x,), torch.randn(5, 33, 64))
    close(pairs, dtype)
    assert all(bool(torch.isfinite(got).all()) for got, _ in pairs)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gelu_with_inputs_from_tiny_to_huge(dtype):
    x = torch.randn(7, 33, 64)
    x *= torch.logspace(-3, 2, 64)
    x = x.to(dtype).requires_grad_()
    close(both(gelu_tanh, (x,), torch.randn(7, 33, 64)), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("vocab", [5, 65, 1024])
def test_cross_entropy(dtype, vocab, monkeypatch):
    monkeypatch.setattr("manyform.ops.cross_entropy._LOGITS_AT_ONCE", 100 * vocab)
    h = (torch.randn(333, 24) * 3).to(dtype).requires_grad_()
    w = torch.randn(vocab, 24, requires_grad=True)
    targets = torch.randint(0, vocab, (333,))
    targets[[3, 200]] = -100
    close(both(linear_cross_entropy, (h, w, targets), torch.ones(())), dtype)


def test_cross_entropy_ignoring_all_targets_is_zero():
    h, w = torch.randn(4, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    loss = linear_cross_entropy(h, w, torch.full((4,), -100))
    grads = torch.autograd.grad(loss, (h, w))
    assert float(loss.detach()) == 0
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad):
    h, w = torch.randn(64, 64), torch.randn(32, 64)
    h[3, 3] = bad
    assert not torch.isfinite(linear_cross_entropy(h, w, torch.zeros(64, dtype=torch.int64)))
    x = torch.randn(64, 256)
    x[3, 3] = bad
    assert not bool(torch.isfinite(rms_norm(x, torch.ones(256))).all())
    assert not bool(torch.isfinite(layer_norm(x, torch.ones(256), None)).all())
    assert not bool(torch.isfinite(swiglu(x)).all())
    assert not bool(torch.isfinite(gelu_tanh(x)).all())


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="vocabulary of 5"):
        linear_cross_entropy(torch.randn(2, 16), torch.randn(5, 16), torch.tensor([1, 5]))


def test_compiled_forms_write_every_element(monkeypatch):
    """Memory that a kernel forgets to write would show as NaN."""
    real_empty_like, real_new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like",
                        lambda *a, **k: real_empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda *a, **k: real_new_empty(*a, **k).fill_(float("nan")))
    x = torch.randn(100, 64, requires_grad=True)
    x2 = torch.randn(100, 128, requires_grad=True)
    for y, inputs in ((rms_norm(x, torch.ones(64)), x), (swiglu(x2), x2), (gelu_tanh(x2), x2),
                      (layer_norm(x, torch.ones(64), None), x)):
        (g,) = torch.autograd.grad(y.sum(), inputs)
        assert bool(torch.isfinite(y).all())
        assert bool(torch.isfinite(g).all())
