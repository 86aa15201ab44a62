"""The short convolution: forms agree, cuts do not matter, nothing crosses a reset."""

import pytest
import torch

from manyform.errors import ManyformError
from manyform.ops import count, use
from manyform.ops.short_conv import short_conv


def inputs(batch=2, length=11, channels=5, taps=4, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    x, w, b = rand(batch, length, channels), rand(channels, taps), rand(channels)
    reset = torch.rand(batch, length, generator=g) < 0.2
    return x, w, b, rand(batch, taps - 1, channels), reset


def grads(path, x, w, b, state, reset, activation):
    args = [t.detach().clone().requires_grad_() for t in (x, w, b, state)]
    with use(short_conv=path):
        y, after = short_conv(*args, reset=reset, activation=activation)
    g = torch.Generator().manual_seed(9)
    weigh = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    loss = (y * weigh).float().sum() + (after * torch.arange(1, after.numel() + 1).reshape(
        after.shape).to(after.dtype) / after.numel()).sum()
    return y.detach(), after.detach(), torch.autograd.grad(loss, args)


@pytest.mark.parametrize("path", [p for p in short_conv.paths if p != "reference"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("batch", "length", "channels", "taps"),
                         [(2, 11, 5, 4), (1, 1, 3, 4), (3, 2, 33, 3), (1, 200, 70, 4),
                          (2, 9, 16, 1), (2, 5, 130, 7)])
@pytest.mark.parametrize("with_reset", [False, True])
def test_every_form_equals_the_reference(path, activation, batch, length, channels, taps,
                                         with_reset):
    if path == "step" and length != 1:
        pytest.skip("the step form is for one step")
    x, w, b, state, reset = inputs(batch, length, channels, taps)
    reset = reset if with_reset else None
    y, after, gs = grads(path, x, w, b, state, reset, activation)
    want_y, want_after, want_gs = grads("reference", x, w, b, state, reset, activation)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, want_after)
    for got, want in zip(gs, want_gs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["numba", "torch", "reference"])
def test_bfloat16_input_keeps_float32_inside(path):
    x, w, b, state, reset = inputs(2, 37, 48, 4)
    low = x.bfloat16()
    y, after, gs = grads(path, low, w, b, state, reset, "silu")
    want, want_after, want_gs = grads("reference", low.float(), w, b, state, reset, "silu")
    assert y.dtype == torch.bfloat16
    assert after.dtype == torch.float32
    assert torch.equal(after, want_after)
    torch.testing.assert_close(y.float(), want, rtol=8e-3, atol=1e-3)
    for got, expected in zip(gs, want_gs, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2 * expected.std())


@pytest.mark.parametrize("path", ["numba", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_stream_gives_the_same_answer(path, dtype):
    x, w, b, _, reset = inputs(2, 23, 40, 4, dtype)
    with use(short_conv=path):
        whole, end = short_conv(x, w, b, None, reset, "silu")
        state, parts = None, []
        for lo, hi in [(0, 1), (1, 2), (2, 9), (9, 10), (10, 23)]:
            y, state = short_conv(x[:, lo:hi], w, b, state, reset[:, lo:hi], "silu")
            parts.append(y)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # the last bit of SiLU may differ
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=tolerance, atol=tolerance)
    assert torch.equal(state, end)


def test_strided_input_and_missing_bias():
    x, w, _, _, _ = inputs(2, 11, 32, 4)
    wide = torch.cat([x, x], dim=2)
    for view in (wide[..., :32], x.transpose(1, 2).contiguous().transpose(1, 2)):
        got, _ = short_conv(view, w)
        with use(short_conv="reference"):
            want, _ = short_conv(x, w)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["torch", "reference"])
def test_float64_gradients(path):
    args = [t.requires_grad_() for t in inputs(2, 5, 3, 3, torch.float64)[:4]]
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = True
    with use(short_conv=path):
        assert torch.autograd.gradcheck(
            lambda *a: short_conv(*a, reset=reset, activation="silu"), args)


def test_cost_and_refusals():
    x, w, b, state, _ = inputs(2, 11, 5, 4)
    with count() as c:
        short_conv(x, w, b)
    assert c.total == 2 * 4 * 2 * 11 * 5
    with pytest.raises(ManyformError, match="channels"):
        short_conv(x, w[:4])
    with pytest.raises(ManyformError, match="state"):
        short_conv(x, w, b, state[:, 1:])
    with pytest.raises(ManyformError, match="activation"):
        short_conv(x, w, b, activation="relu")
