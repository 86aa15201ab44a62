"""The Fourier form of a long convolution equals the sum that defines it."""

import sys

import pytest
import torch

from manyform.ops import count, use
from manyform.ops.long_conv import fast_size, gated_conv, long_conv, long_conv_flops


def test_fast_size_is_the_next_smooth_number():
    smooth = sorted(2 ** a * 3 ** b * 5 ** c for a in range(12) for b in range(8) for c in range(6))
    for n in range(1, 1500):
        assert fast_size(n) == next(m for m in smooth if m >= n)


@pytest.mark.parametrize("length", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("extra", [-60, 0, 7])
@pytest.mark.parametrize("with_reset", [False, True])
def test_fourier_equals_reference(length, extra, with_reset):
    torch.manual_seed(length)
    x = torch.randn(3, length, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(4, max(1, length + extra), dtype=torch.float64, requires_grad=True)
    reset = torch.rand(3, length) < 0.05 if with_reset else None
    w = torch.randn_like(x)
    results = []
    for path in ("reference", "fft"):
        with use(long_conv=path):
            y = long_conv(x, k, reset)
        results.append([y, *torch.autograd.grad((y * w).sum(), [x, k])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck_and_one_gradient_alone():
    x = torch.randn(2, 70, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(long_conv, (x, k), fast_mode=True)
    both = torch.autograd.grad(long_conv(x, k).sum(), [x, k])
    (dx,) = torch.autograd.grad(long_conv(x, k.detach()).sum(), [x])
    (dk,) = torch.autograd.grad(long_conv(x.detach(), k).sum(), [k])
    torch.testing.assert_close((dx, dk), both)


def test_groups_of_channels(monkeypatch):
    """However many channels are in flight at once, the result is the same."""
    module = sys.modules["manyform.ops.long_conv"]
    x, k = torch.randn(1, 100, 7), torch.randn(7, 100)
    want = long_conv(x, k)
    monkeypatch.setattr(module, "CACHED", 2 * fast_size(199))
    torch.testing.assert_close(long_conv(x, k), want)


def test_non_contiguous_and_bfloat16():
    x, k = torch.randn(4, 2, 100).permute(1, 2, 0), torch.randn(100, 4).T
    torch.testing.assert_close(long_conv(x, k), long_conv(x.contiguous(), k.contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        y = long_conv(x.bfloat16(), k)
    want = long_conv(x.bfloat16().double(), k.double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() < 4e-3 * want.norm()


def test_nothing_crosses_a_reset():
    x, k = torch.randn(2, 200, 3), torch.randn(3, 200)
    want = long_conv(x[:, 90:], k)
    x[:, :90] = float("nan")
    reset = torch.zeros(2, 200, dtype=torch.bool)
    reset[:, 90] = True
    torch.testing.assert_close(long_conv(x, k, reset)[:, 90:], want)


def test_operations():
    with count() as counter:
        long_conv(torch.randn(2, 50, 3), torch.randn(3, 50))
    assert counter.total == long_conv_flops(2, 50, 3)
    assert long_conv_flops(1, 4096, 8) < 2.3 * long_conv_flops(1, 2048, 8)


needs_tiles = pytest.mark.skipif(
    long_conv.choose(torch.zeros(1, 256, 16).bfloat16(), torch.zeros(16, 256)) != "tiles",
    reason="this processor has no matrix tiles")


@needs_tiles
@pytest.mark.parametrize(("batch", "length", "reach"), [(1, 256, 256), (2, 1100, 1100),
                                                        (2, 1024, 700), (1, 2049, 2100)])
def test_tiles_equal_fourier(batch, length, reach):
    """In both gradients too; values in unused memory reach nothing."""
    torch.manual_seed(length)
    x = torch.randn(batch, length, 48).bfloat16()
    k = torch.randn(48, reach).bfloat16().float() / reach ** 0.5
    w = torch.randn(batch, length, 48).bfloat16()
    results = []
    for path, kind in (("tiles", torch.float32), ("fft", torch.float64)):
        inputs = [(x if kind == torch.float32 else x.to(kind)).clone().requires_grad_(),
                  k.to(kind).requires_grad_()]
        with use(long_conv=path):
            y = long_conv(*inputs)
        results.append([y, *torch.autograd.grad((y * w.to(y.dtype)).sum(), inputs)])
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < 5e-3 * want.norm()


@needs_tiles
def test_tiles_are_exactly_causal():
    x, k = torch.randn(1, 600, 16).bfloat16(), torch.randn(16, 600)
    y = long_conv(x, k)
    x[:, 300:] = 100
    assert torch.equal(long_conv(x, k)[:, :300], y[:, :300])


@needs_tiles
def test_gates_around_the_tiles():
    u = torch.randn(2, 500, 48).bfloat16()
    k = torch.randn(16, 500)
    wy, wz = torch.randn(2, 2, 500, 16)
    results = []
    for path, kind in (("tiles", torch.float32), ("reference", torch.float64)):
        inputs = [(u if kind == torch.float32 else u.to(kind)).clone().requires_grad_(),
                  k.to(kind, copy=True).requires_grad_()]
        with use(gated_conv=path):
            y, z = gated_conv(*inputs)
        results.append([y, z, *torch.autograd.grad((y * wy).sum() + (z * wz).sum(), inputs)])
        results[-1] += torch.autograd.grad((gated_conv(*inputs)[1] * wz).sum(), inputs[:1])
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < 8e-3 * want.norm()


@needs_tiles
def test_filters_that_end():
    """Lags beyond the reach are left out, forward and back, wherever the reach falls."""
    torch.manual_seed(0)
    length = 3000
    u = torch.randn(2, length, 96).bfloat16().requires_grad_()
    reach = torch.cat([torch.randint(1, 700, (16,)), torch.full((16,), 1500)])
    inside = torch.arange(length) < reach[:, None]
    k = (torch.randn(32, length) * inside / 30).requires_grad_()
    wy = torch.randn(2, length, 32)
    results = []
    for ends in (reach, None):
        y, _ = gated_conv(u, k, ends)
        results.append([y, *torch.autograd.grad((y * wy).sum(), [u, k])])
    results[1][2] = results[1][2] * inside
    results[0][2] = results[0][2] * inside
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 1e-4 * want.norm()
