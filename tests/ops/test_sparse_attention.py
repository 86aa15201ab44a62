"""Attention over intervals: every form against the reference, and the reference against a loop."""

import itertools
import math

import pytest
import torch

from manyform.errors import ManyformError
from manyform.ops import count, use
from manyform.ops.kernels import available
from manyform.ops.sparse_attention import kept_pairs, sparse_attention


def tiled():
    if not available():
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


def facts(batch, heads, groups, patterns, length, keys, d, *, own=True, dtype=torch.float64):
    """Three random intervals a query; every seventh query sees nothing, some intervals touch."""
    torch.manual_seed(length + keys)
    q = torch.randn(batch, heads, length, d).to(dtype).requires_grad_()
    k, v = (torch.randn(batch, groups, keys, d).to(dtype).requires_grad_() for _ in range(2))
    points = torch.randint(0, keys + 1, (batch if own else 1, patterns, length, 6)).sort(-1).values
    points[:, :, 1::5, 3] = points[:, :, 1::5, 2] = points[:, :, 1::5, 1]
    low, high = points[..., 0::2].clone(), points[..., 1::2].clone()
    low[:, :, ::7], high[:, :, ::7] = 0, 0
    return q, k, v, low, high


SHAPES = [(2, 4, 2, 2, 70, 200, 32), (1, 4, 1, 4, 97, 130, 64), (1, 2, 2, 1, 33, 257, 32),
          (2, 2, 1, 1, 64, 64, 32), (1, 1, 1, 1, 1, 90, 32),
          (2, 12, 2, 1, 70, 150, 32), (1, 8, 1, 1, 150, 90, 256)]


def test_reference_is_the_sum_over_the_kept_keys():
    q, k, v, low, high = facts(2, 4, 2, 2, 9, 14, 4)
    with use("reference"):
        y = sparse_attention(q, k, v, low, high, scale=0.7)
    for b, h, t in itertools.product(range(2), range(4), range(9)):
        seen = [j for j in range(14) for m in range(3)
                if low[b, h // 2, t, m] <= j < high[b, h // 2, t, m]]
        weight = [math.exp(0.7 * (q[b, h, t] @ k[b, h // 2, j]).item()) for j in seen]
        want = sum(w * v[b, h // 2, j] for w, j in zip(weight, seen, strict=True))
        want = want / sum(weight) if seen else torch.zeros(4, dtype=torch.float64)
        assert torch.allclose(y[b, h, t], want, rtol=1e-12, atol=1e-12)


# The gathered form serves more than one block of 64 keys, the tiles 32 queries or more.
FORMS = [(shape, "gathered", dtype, tolerance) for shape in SHAPES if shape[5] > 64
         for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5),
                                  (torch.bfloat16, 1e-2))]
FORMS += [pytest.param(shape, "amx", torch.bfloat16, 1e-2,
                       marks=pytest.mark.skipif(not tiled(), reason="no matrix tiles here"))
          for shape in SHAPES if shape[4] >= 32]


@pytest.mark.parametrize(("shape", "path", "dtype", "tolerance"), FORMS)
@pytest.mark.parametrize("own", [True, False])
def test_forms_agree(shape, own, path, dtype, tolerance):
    args = facts(*shape, own=own, dtype=dtype)
    weights = torch.randn(args[0].shape).to(dtype)
    results = []
    for form in (path, "reference"):
        with use(sparse_attention=form):
            y = sparse_attention(*args)
        grads = torch.autograd.grad((y * weights).sum(), args[:3])
        results.append((y, *grads))
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        error = (got.detach().double() - want.detach().double()).norm()
        assert error <= tolerance * want.detach().double().norm()


def test_gradients_of_the_reference():
    q, k, v, low, high = facts(1, 2, 1, 2, 6, 8, 3)
    with use("reference"):
        assert torch.autograd.gradcheck(lambda *a: sparse_attention(*a, low, high), (q, k, v))


def test_operations_are_those_of_the_kept_pairs():
    q, k, v, low, high = facts(2, 4, 2, 2, 70, 200, 32, own=False)
    with count() as counter:
        sparse_attention(q, k, v, low, high)
    assert counter.total == 4 * 32 * kept_pairs(low, high) * 2 * 2
    assert kept_pairs(torch.tensor([5, 3]), torch.tensor([7, 1])) == 2


@pytest.mark.skipif(not tiled(), reason="needs matrix tiles")
@pytest.mark.parametrize("shape", SHAPES[-2:])
def test_gradients_of_keys_are_shared_out_among_threads(shape, monkeypatch):
    args = facts(*shape, dtype=torch.bfloat16)
    results = []
    for workers in (1, 3):
        monkeypatch.setattr("manyform.ops.tiled_intervals.threads", lambda n=workers: n)
        y = sparse_attention(*args)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), args[:3])))
    for one, three in zip(*results, strict=True):
        assert (one.detach().double() - three.detach().double()).norm() <= 1e-2 * one.norm()


@pytest.mark.skipif(not tiled(), reason="needs matrix tiles")
def test_rows_of_memory_apart():
    """Queries and keys may be slices of one projection, and gradients may come transposed."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 96, 6, 32).bfloat16().requires_grad_()
    step = torch.arange(96)
    low, high = ((step - 20).clamp(min=0)[None, None, :, None], step[None, None, :, None] + 1)
    results = []
    for form in ("amx", "reference"):
        q, k, v = (x.transpose(1, 2) for x in qkv.split(2, dim=2))
        with use(sparse_attention=form):
            y = sparse_attention(q, k, v, low, high).transpose(1, 2).reshape(2, 96, 64)
        (grad,) = torch.autograd.grad(y.float().square().sum(), qkv)
        results.append((y.detach().double(), grad.double()))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


@pytest.mark.skipif(not tiled(), reason="needs matrix tiles")
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] >= 32])
def test_a_window_beside_choices_in_memory_that_held_something_else(shape, monkeypatch):
    """Side by side and gathered meetings in one call, every new byte of memory set before."""
    q, k, v, low, high = facts(*shape, dtype=torch.bfloat16)
    end = (torch.arange(shape[4]) + 1).clamp(max=shape[5])[:, None].expand_as(low[..., :1])
    begin = (end - 20).clamp(min=0)
    low = torch.cat([torch.minimum(low, begin), begin], -1)
    high = torch.cat([torch.minimum(high, begin), end], -1)
    results = []
    for form in ("reference", "amx"):
        with use(sparse_attention=form):
            y = sparse_attention(q, k, v, low, high)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))))
        empty = torch.empty

        def poisoned(*args, _empty=empty, **kwargs):
            x = _empty(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else -1)
        monkeypatch.setattr(torch, "empty", poisoned)
    for want, got in zip(*results, strict=True):
        want, got = want.detach().double(), got.detach().double()
        assert (got - want).norm() <= 2e-2 * want.norm()


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, low, high = facts(2, 4, 2, 2, 9, 14, 4)
    with pytest.raises(ManyformError, match="do not fit"):
        sparse_attention(q, k, v, low[:, :, :5], high[:, :, :5])
    with pytest.raises(ManyformError, match="do not fit"):
        sparse_attention(q, k, v, low.repeat(1, 2, 1, 1)[:, :3], high.repeat(1, 2, 1, 1)[:, :3])


def test_gathered_takes_heads_that_lie_behind_the_sequence_in_memory():
    """Whole blocks need no padding, which would otherwise have made a dense copy."""
    q, k, v = (torch.randn(1, 128, 2, 16, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    high = (torch.arange(128) + 1)[None, None, :, None]
    low = (high - 20).clamp(min=0)
    with use(sparse_attention="gathered"):
        got = sparse_attention(q, k, v, low, high)
    with use(sparse_attention="reference"):
        want = sparse_attention(q, k, v, low, high)
    torch.testing.assert_close(got, want)
