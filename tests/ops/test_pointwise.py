"""Compiled passes around the recurrences against their equations: values and every gradient."""

from __future__ import annotations

import pytest
import torch

from manyform.ops import use
from manyform.ops.delta_keys import delta_keys
from manyform.ops.gated_norm import gated_norm
from manyform.ops.kernels import available
from manyform.ops.log_sigmoid import log_sigmoid
from manyform.ops.relu_squared import relu_squared
from manyform.ops.residual import residual_add
from manyform.ops.rwkv_keys import rwkv_keys
from manyform.ops.rwkv_output import rwkv_output
from manyform.ops.token_shift import token_shift
from manyform.ops.value_mix import value_mix

pytestmark = pytest.mark.skipif(not available(), reason="numba is not installed")
B, T, H, N = 2, 35, 2, 32
D = H * N


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(operation, tensors, rest, floats, dtype, plain=lambda out: out):
    """tensors: float32; all but those whose index is in `floats` are cast. Equal to the reference
    in float64, within the rounding of the dtype."""
    results = []
    for path, kind in (("reference", torch.float64), ("numba", dtype)):
        leaves = [x.to(dtype if i not in floats else x.dtype) for i, x in enumerate(tensors)]
        leaves = [x.to(torch.float64) if kind == torch.float64 else x for x in leaves]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        with use(**{operation.name: path}):
            out = plain(operation(*leaves, *rest))
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((y * normal(*y.shape, seed=i).to(y.dtype)).sum() for i, y in enumerate(outs))
        results.append((*outs, *torch.autograd.grad(loss, leaves)))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for i, (slow, fast) in enumerate(zip(*results, strict=True)):
        error = (fast.double() - slow).norm() / slow.norm().clamp(min=1e-12)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("mixtures", [1, 6])
@pytest.mark.parametrize("reset", [False, True])
def test_token_shift(dtype, mixtures, reset):
    starts = normal(B, T) > 1.2 if reset else None
    if starts is not None:
        starts[0, 0] = True
    compare(token_shift, [normal(B, T, D), normal(mixtures, D, seed=1), normal(B, D, seed=2)],
            [starts], (1, 2), dtype, lambda out: (*out[0], out[1]))


@DTYPES
def test_rwkv_keys(dtype):
    rows = [normal(B, T, D, seed=i) for i in range(3)]
    params = [normal(D, seed=5 + i) for i in range(4)]
    compare(rwkv_keys, [*rows, *params], [H], (3, 4, 5, 6), dtype)


@DTYPES
def test_rwkv_output(dtype):
    rows = [normal(B, T, H, N, seed=i) for i in range(4)]
    params = [normal(D, seed=5), normal(D, seed=6), normal(H, N, seed=7)]
    compare(rwkv_output, [*rows, normal(B, T, D, seed=8), *params], [], (5, 6, 7), dtype)


@DTYPES
def test_value_mix(dtype):
    compare(value_mix, [*(normal(B, T, D, seed=i) for i in range(3)), normal(D, seed=4)], [], (3,),
            dtype)


@DTYPES
@pytest.mark.parametrize("most", [1.0, 2.0])
def test_delta_keys(dtype, most):
    rows = [normal(B, T, H * (2 * N + 48)), normal(B, T, H, seed=1), normal(B, T, H, seed=2)]
    compare(delta_keys, [*rows, normal(H, seed=3), normal(H, seed=4)], [N, most], (3, 4), dtype)


@DTYPES
def test_delta_keys_without_decay(dtype):
    rows = [normal(B, T, H * (2 * N + 48)), normal(B, T, H, seed=1)]
    compare(delta_keys, rows, [None, None, None, N, 1.0], (), dtype, lambda out: out[:4])


@DTYPES
def test_gated_norm(dtype):
    compare(gated_norm, [normal(B, T, H, N), normal(B, T, D, seed=1), normal(N, seed=2)], [1e-5],
            (2,), dtype)


def test_gate_that_is_part_of_a_projection():
    y, wide, weight = normal(B, T, H, N), normal(B, T, D + 16, seed=1), normal(N, seed=2)
    gate = wide[..., 16:]
    torch.testing.assert_close(gated_norm(y, gate, weight, 1e-5),
                               gated_norm.reference(y, gate, weight, 1e-5))


@DTYPES
def test_relu_squared(dtype):
    compare(relu_squared, [normal(B, 2 * T, D)], [], (), dtype)


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 16.0])
def test_log_sigmoid(dtype, temperature):
    compare(log_sigmoid, [normal(4, 40, 64, scale=8.0)], [temperature], (), dtype)


def test_log_sigmoid_far_from_zero():
    x = torch.tensor([-300.0, -90.0, 90.0, float("nan")]).repeat(4096)
    with use(log_sigmoid="numba"):
        y = log_sigmoid(x.bfloat16())
    assert y.dtype == torch.float32
    assert torch.equal(y[:2], torch.tensor([-300.0, -90.0]))
    assert -1e-30 < y[2] <= 0
    assert y[3].isnan()


def test_a_narrow_branch_is_added_to_a_wide_stream():
    compare(residual_add, [normal(4, 40, 64), normal(4, 40, 64, seed=1)], [], (0,), torch.bfloat16)
    x, y = normal(4, 40, 64), normal(4, 64, 40, seed=1).mT.bfloat16()
    with use(residual_add="numba"):
        assert torch.equal(residual_add(x, y), x + y)


@torch.no_grad()
@pytest.mark.parametrize("operation", [rwkv_keys, rwkv_output, value_mix], ids=lambda f: f.name)
def test_both_forms_round_once(operation):
    """In bfloat16 small calls, which take the reference, give what compiled ones give."""
    if operation is rwkv_output:
        shapes = [(B, T, H, N)] * 4 + [(B, T, D), (D,), (D,), (H, N)]
    else:
        shapes = [(B, T, D)] * 3 + [(D,)] * (4 if operation is rwkv_keys else 1)
    tensors = [normal(*shape, seed=i).to(torch.bfloat16 if len(shape) > 2 else torch.float32)
               for i, shape in enumerate(shapes)]
    results = []
    for path in ("reference", "numba"):
        with use(**{operation.name: path}):
            out = operation(*tensors, *([H] if operation is rwkv_keys else []))
        results.append(out if isinstance(out, tuple) else (out,))
    for small, large in zip(*results, strict=True):
        apart = (small.float() - large.float()).abs()
        assert (apart <= 2.0**-7 * large.float().abs() + 1e-6).all()
        assert (apart > 1e-6).float().mean() < 1e-2
