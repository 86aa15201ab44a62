"""The chunked diagonal state space model equals its recurrence, and its kernel its response."""

import pytest
import torch

from manyform.errors import ManyformError
from manyform.ops import count, use
from manyform.ops.diagonal_ssm import diagonal_kernel, diagonal_ssm, powers

D, N = 5, 3


def system(dtype=torch.float64):
    torch.manual_seed(0)
    a = torch.polar(torch.rand(D, N, dtype=dtype) * 0.5 + 0.5, torch.rand(D, N, dtype=dtype) * 3)
    b, c = (torch.complex(*torch.randn(2, D, N, dtype=dtype)) for _ in range(2))
    return [t.requires_grad_() for t in (a, b, c, torch.randn(D, dtype=dtype))]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 131])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_chunked_equals_reference(length, with_state, with_reset):
    a, b, c, skip = system()
    x = torch.randn(3, length, D, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, D, N, 2, dtype=torch.float64, requires_grad=True) if with_state else None
    reset = torch.rand(3, length) < 0.1 if with_reset else None
    if reset is not None:
        reset[1] = False  # a row that goes on beside rows that begin anew
    inputs = [x, a, b, c, skip] + ([state] if with_state else [])
    wy, wh = torch.randn_like(x), torch.randn(3, D, N, 2, dtype=torch.float64)
    results = []
    for path in ("reference", "chunked") if length > 4 else ("reference",) * 2:
        with use(diagonal_ssm=path):
            y, h = diagonal_ssm(x, a, b, c, skip, state, reset)
        results.append([y, h, *torch.autograd.grad((y * wy).sum() + (h * wh).sum(), inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    a, b, c, skip = system()
    x = torch.randn(1, 7, D, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(1, 7, dtype=torch.bool)
    reset[0, 3] = True
    assert torch.autograd.gradcheck(
        lambda *t: diagonal_ssm(*t, reset=reset), (x, a, b, c, skip), fast_mode=True)


def test_kernel_is_the_impulse_response():
    a, b, c, skip = system()
    impulse = torch.zeros(1, 77, D, dtype=torch.float64)
    impulse[:, 0] = 1
    y, _ = diagonal_ssm(impulse, a, b, c)
    torch.testing.assert_close(diagonal_kernel(a, b, c, 77), y[0].T)
    for length in (1, 2, 3, 10):
        torch.testing.assert_close(diagonal_kernel(a, b, c, length), y[0, :length].T)


def test_powers():
    a = system()[0].detach()
    torch.testing.assert_close(powers(a, 6), torch.stack([a ** i for i in range(6)], -1))


def test_nothing_crosses_a_reset():
    """Not even what is not finite."""
    a, b, c, skip = (t.detach() for t in system())
    x = torch.randn(1, 100, D, dtype=torch.float64)
    clean, _ = diagonal_ssm(x[:, 40:], a, b, c, skip)
    x[:, :40] = float("nan")
    reset = torch.zeros(1, 100, dtype=torch.bool)
    reset[0, 40] = True
    y, h = diagonal_ssm(x, a, b, c, skip, reset=reset)
    torch.testing.assert_close(y[:, 40:], clean)
    assert h.isfinite().all()


def test_precision_and_dtypes():
    a, b, c, skip = (t.detach().to(torch.complex64 if t.is_complex() else torch.float32)
                     for t in system())
    x = torch.randn(2, 90, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = diagonal_ssm(x.bfloat16(), a, b, c, skip)
    want, _ = diagonal_ssm(x.bfloat16().double(), a.to(torch.complex128), b.to(torch.complex128),
                           c.to(torch.complex128), skip.double())
    assert y.dtype == torch.bfloat16
    assert h.dtype == torch.float32
    assert (y.double() - want).norm() < 5e-3 * want.norm()


def test_operations_and_errors():
    a, b, c, skip = (t.detach() for t in system())
    x = torch.randn(2, 9, D, dtype=torch.float64)
    with count() as counter:
        diagonal_ssm(x, a, b, c, skip)
    assert counter.total == 2 * 9 * D * (16 * N + 2)
    with pytest.raises(ManyformError, match="state of this call"):
        diagonal_ssm(x, a, b, c, state=torch.zeros(1, D, N, 2))
