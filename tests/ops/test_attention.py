"""Every form of attention against the reference, and the reference against a loop."""

import itertools
import math

import pytest
import torch

from manyform.ops import attention as module
from manyform.ops import count, use
from manyform.ops.attention import attention, visible_pairs
from manyform.ops.kernels import available
from manyform.positions import alibi_slopes


def tiled():
    if not available():
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


def facts(batch, heads, groups, length, old, d, *, documents=False, window=None, sinks=0,
          alibi=False, stored=None, dtype=torch.float64):
    """Arguments of a call: `old` cached keys, of which `stored` per row belong to its document."""
    torch.manual_seed(length + old)
    prefix = sinks if old and sinks else 0
    q = torch.randn(batch, heads, length, d).to(dtype).requires_grad_()
    k, v = (torch.randn(batch, groups, prefix + old + length, d).to(dtype).requires_grad_()
            for _ in range(2))
    start = None
    if old or documents:
        begin = old - torch.tensor([(stored or old) + 5 * b for b in range(batch)])
        start = begin[:, None].repeat(1, length)
        if documents:
            for b in range(batch):
                for t in range(length):
                    if t % 13 == 4 + b:
                        start[b, t:] = old + t
    return (q, k, v, start), dict(prefix=prefix, window=window, sinks=sinks,
                                  slopes=alibi_slopes(heads) if alibi else None)


def by_hand(args, options):
    """Query by query, the visible keys picked one by one; also how many pairs there are."""
    q, k, v, start = args
    prefix, window, sinks = options["prefix"], options["window"], options["sinks"]
    batch, heads, length, d = q.shape
    own = k.shape[2] - prefix
    y, pairs = torch.zeros(batch, heads, length, d, dtype=q.dtype), 0
    for b, t in itertools.product(range(batch), range(length)):
        i = own - length + t
        begin = 0 if start is None else int(start[b, t])
        seen = [(prefix + j, i - j) for j in range(max(begin, 0), i + 1)
                if window is None or i - j < window or j - begin < sinks]
        if prefix and begin < 0:
            seen += [(p, i - begin - p) for p in range(prefix) if begin + p < 0]
        pairs += len(seen) * heads
        for h in range(heads):
            g = h // (heads // k.shape[1])
            score = torch.stack([q[b, h, t] @ k[b, g, j] / math.sqrt(d) for j, _ in seen])
            if options["slopes"] is not None:
                score = score - options["slopes"][h] * torch.tensor([float(r) for _, r in seen])
            y[b, h, t] = score.softmax(0) @ v[b, g, [j for j, _ in seen]]
    return y, pairs


CASES = [dict(), dict(alibi=True), dict(documents=True), dict(window=5), dict(window=1),
         dict(window=5, sinks=2), dict(window=6, sinks=3, documents=True, alibi=True),
         dict(old=9), dict(old=9, alibi=True), dict(old=9, stored=4),
         dict(old=4, window=5, sinks=2, stored=9), dict(old=4, window=5, sinks=2, stored=3),
         dict(old=4, window=5, sinks=3, stored=5, documents=True, alibi=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("length", [1, 17])
@torch.no_grad()
def test_reference_and_count(case, length):
    args, options = facts(2, 4, 2, length, **{"old": 0, "d": 4, **case})
    expected, pairs = by_hand(args, options)
    with use("reference"), count() as counted:
        got = attention(*args, **options)
    assert torch.allclose(expected, got, atol=1e-12)
    assert counted.total == 4 * 4 * pairs


def compare(path, args, options, tolerance):
    args = [*args]
    dy = torch.randn(args[0].shape).to(args[0].dtype)
    results = []
    for name in ("reference", path):
        with use(attention=name):
            y = attention(*args, **options)
        results.append([y, *torch.autograd.grad(y, args[:3], dy)])
    for expected, got in zip(*results, strict=True):
        assert got.dtype == args[0].dtype
        error = (expected.double() - got.double()).norm()
        assert error <= tolerance * (expected.double().norm() + 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sdpa(case, length, groups, dtype):
    args, options = facts(2, 4, groups, length, **{"old": 0, "d": 8, "dtype": dtype, **case})
    compare("sdpa", args, options, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
@pytest.mark.parametrize("length", [65, 100])
def test_blocked(case, length, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    args, options = facts(2, 2, 1, length, **{"old": 0, "d": 4, **case})
    compare("blocked", args, options, 1e-10)


def test_blocked_looks_only_at_the_window(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    seen = []
    whole = module._sdpa
    monkeypatch.setattr(module, "_sdpa", lambda q, k, *a, **o: (
        seen.append(k.shape[2]), whole(q, k, *a, **o))[1])
    args, options = facts(1, 2, 1, 320, 0, 4, window=20, sinks=3)
    with use(attention="blocked"):
        attention(*args, **options)
    assert len(seen) == 20
    assert max(seen) <= 3 + 16 * 3 + 16


@pytest.mark.parametrize("length", [1, 5, 40])
def test_visible_pairs(length):
    for window, sinks in itertools.product([None, 1, 3, 39, 40, 99], [0, 1, 4, 50]):
        pairs = sum(min(i + 1, window or 99) + min(max(i + 1 - (window or 99), 0), sinks)
                    for i in range(length))
        assert visible_pairs(length, window, sinks) == pairs


TILED = [dict(length=32), dict(length=33, groups=1), dict(length=300), dict(length=70, d=44),
         dict(length=290, groups=1, d=64),
         dict(length=160, d=128, alibi=True), dict(length=200, window=1),
         dict(length=300, window=70), dict(length=130, documents=True, window=9, groups=1),
         dict(length=200, documents=True), dict(length=200, documents=True, window=9, alibi=True),
         dict(length=700, d=64, window=600, batch=1), dict(length=64, window=100, sinks=0),
         dict(length=40, window=100, sinks=3), dict(length=300, window=33, sinks=5, groups=1),
         dict(length=333, documents=True, window=40, sinks=70)]


@pytest.mark.skipif(not tiled(), reason="this processor has no matrix tiles")
@pytest.mark.parametrize("case", TILED, ids=str)
def test_tiles(case):
    args, options = facts(**{"batch": 2, "heads": 2, "groups": 2, "old": 0, "d": 32,
                             "dtype": torch.bfloat16, **case})
    dy, results = torch.randn(args[0].shape), []
    for path, dtype in (("reference", torch.float32), ("amx", torch.bfloat16)):
        wide = [x.to(dtype) for x in args[:3]]
        with use(attention=path):
            y = attention(*wide, args[3], **options)
        with torch.no_grad(), use(attention=path):
            assert torch.equal(y, attention(*wide, args[3], **options))
        results.append([y, *torch.autograd.grad(y, args[:3], dy.to(dtype))])
    for expected, got in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        error = (expected.float() - got.float()).norm()
        assert error <= 0.006 * (expected.float().norm() + 1)


@pytest.mark.skipif(not tiled(), reason="this processor has no matrix tiles")
def test_tiles_are_causal_and_take_any_strides():
    torch.manual_seed(0)
    x = torch.randn(2, 100, 3, 4, 32).bfloat16().requires_grad_()
    q, k, v = x.permute(2, 0, 3, 1, 4)
    with use(attention="amx"):
        y = attention(q, k, v)
        close = attention(q.contiguous(), k.flip(-1).flip(-1), v.clone())
    assert torch.equal(y, close)
    for i in (0, 31, 40, 98):
        (g,) = torch.autograd.grad(y[1, :, i].float().sum(), x, retain_graph=True)
        assert g[1, i + 1:].eq(0).all()
        assert g[0].eq(0).all()
        assert g[1, :i + 1].ne(0).any()


@pytest.mark.skipif(not tiled(), reason="this processor has no matrix tiles")
def test_tiles_show_what_is_not_finite():
    q, k, v = torch.randn(3, 1, 1, 64, 32).bfloat16()
    v[0, 0, 40] = math.nan
    with use(attention="amx"):
        y = attention(q, k, v)
        assert y[0, 0, :32].isfinite().all()
        assert y[0, 0, 40:].isnan().all()
        k[0, 0, 50] = math.nan
        assert attention(q, k, torch.ones_like(v))[0, 0, 50:].isnan().all()


@pytest.mark.skipif(not available(), reason="numba is not installed")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decode(case, groups, dtype):
    if case.get("documents"):
        case = {**case, "documents": False}
    args, options = facts(2, 4, groups, 1, **{"old": 0, "d": 32, "dtype": dtype, **case})
    with use("reference"):
        expected = attention(*args, **options)
    with use(attention="decode"):
        got = attention(*args, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert got.dtype == dtype
    assert torch.allclose(expected, got, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not available(), reason="numba is not installed")
@torch.no_grad()
def test_decode_of_many_keys_in_a_growing_cache():
    cache = torch.randn(2, 2, 3000, 64)[:, :, 100:2900]
    q = torch.randn(2, 8, 1, 64)
    with use(attention="reference"):
        expected = attention(q, cache, cache.flip(3))
    with use(attention="decode"):
        got = attention(q, cache, cache.flip(3))
    assert torch.allclose(expected, got, atol=1e-5)
