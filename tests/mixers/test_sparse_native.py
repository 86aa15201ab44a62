"""Native sparse attention and block attention: the laws, and the equations token by token."""

import math

import pytest
import torch

import manyform
from manyform.errors import ManyformError
from manyform.mixers.block_attention import BlockAttention
from manyform.mixers.native_sparse_attention import NativeSparseAttention
from manyform.ops import use
from manyform.ops.block_choice import block_choice
from manyform.ops.kernels import available


def tiled():
    if not available():
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


def poison(monkeypatch):
    """New memory holds NaN, or the most negative numbers."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan if x.is_floating_point() else -1)
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(("cls", "options"), [
    (BlockAttention, dict(chunk=8)),
    (BlockAttention, dict(chunk=5, n_heads=4, kv_heads=2)),
    (NativeSparseAttention, dict(size=8, stride=4, block=8, number=4, window=6)),
    (NativeSparseAttention, dict(size=4, stride=4, block=8, number=5, window=20, n_heads=4,
                                 kv_heads=2)),
    # Heads as rows of one product, where there are matrix tiles.
    (NativeSparseAttention, dict(size=8, stride=4, block=8, number=4, window=6, n_heads=4,
                                 kv_heads=2, head_dim=32)),
])
def test_laws(cls, options):
    manyform.check(cls, length=70, **options)


def make(cls, **options):
    torch.manual_seed(3)
    layer = cls(16, n_heads=4, kv_heads=2, **options).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def turned(x, place):
    """Rotary positions of x (..., head_dim) at one place, as a product of complex numbers (whose
    parts the mixers keep in float32)."""
    half = x.shape[-1] // 2
    angle = place * 10000.0 ** (-torch.arange(half) / half).double()
    turn = torch.complex(angle.cos().float().double(), angle.sin().float().double())
    pairs = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([pairs.real, pairs.imag], -1)


def attend(q, keys, values):
    """One query over lists of keys and values."""
    p = (torch.stack(keys) @ q / math.sqrt(q.shape[0])).softmax(0)
    return p @ torch.stack(values), p


X = torch.randn(75, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_block_attention():
    layer, size, d = make(BlockAttention, chunk=9), 9, 4
    rows = (X @ layer.qkv.weight.T).view(75, 8, d)
    y = torch.zeros(75, 4, d, dtype=torch.float64)
    for h in range(4):
        g = h // 2
        k = [turned(rows[t, 4 + g], t) for t in range(75)]
        v = list(rows[:, 6 + g])
        k_sum, v_sum = [], []
        for n in range(75 // size):
            part = range(n * size, (n + 1) * size)
            share = torch.stack([k[t] @ layer.pool[g] / math.sqrt(d) for t in part]).softmax(0)
            k_sum.append(sum(a * k[t] for a, t in zip(share, part, strict=True)))
            v_sum.append(sum(a * v[t] for a, t in zip(share, part, strict=True)))
        for t in range(75):
            n = t // size
            y[t, h], _ = attend(turned(rows[t, h], t), k[n * size:t + 1] + k_sum[:n],
                                v[n * size:t + 1] + v_sum[:n])
    got, state = layer(X[None])
    assert torch.allclose(got[0], y.flatten(1) @ layer.out.weight.T, rtol=1e-9, atol=1e-10)
    assert state.keys.shape[2] == 75 % size
    assert state.summary_keys.shape[2] == 75 // size


def compressed(network, block):
    hidden = torch.nn.functional.gelu(network.up.weight @ (block + network.position).flatten()
                                      + network.up.bias)
    return network.down.weight @ hidden + network.down.bias


@torch.no_grad()
def test_native_sparse_attention():
    """Yuan 2025, eq. 5 to 12, for one query after the other; blocks counted from 0."""
    size, stride, block, number, window, d = 8, 4, 8, 4, 6, 4
    layer = make(NativeSparseAttention, size=size, stride=stride, block=block, number=number,
                 window=window)
    rows = (X @ layer.qkv.weight.T).view(75, 16, d)
    gates = torch.sigmoid(X @ layer.gate.weight.T + layer.gate.bias).view(75, 3, 4)
    y = torch.zeros(75, 4, d, dtype=torch.float64)
    free = 0
    for g in range(2):
        key = [turned(rows[t, 4 + g], t) for t in range(75)]
        near_key = [turned(rows[t, 6 + g], t) for t in range(75)]
        raw_key, value, near_value, raw_value = (rows[:, n + g] for n in (8, 10, 12, 14))
        ends = range(size - 1, 75, stride)
        few_key = [turned(compressed(layer.compress_key, raw_key[e - size + 1:e + 1]), e)
                   for e in ends]
        few_value = [compressed(layer.compress_value, raw_value[e - size + 1:e + 1]) for e in ends]
        for t in range(75):
            seen = sum(e <= t for e in ends)
            worth = [0.0] * (t // block + 1)
            for h in (2 * g, 2 * g + 1):
                q = turned(rows[t, h], t)
                if seen:
                    part, p = attend(q, few_key[:seen], few_value[:seen])
                    y[t, h] += gates[t, 0, h] * part
                    for j in range(len(worth)):
                        for a in range(block // stride):
                            for b in range(size // stride):
                                i = block // stride * j + a - b
                                worth[j] += p[i].item() if 0 <= i < seen else 0.0
                part, _ = attend(q, near_key[max(0, t - window + 1):t + 1],
                                 list(near_value[max(0, t - window + 1):t + 1]))
                y[t, h] += gates[t, 2, h] * part
            always = {0, t // block, max(t // block - 1, 0)}
            others = sorted(set(range(len(worth))) - always, key=lambda j: -worth[j])
            free += len(others) > number - len(always)
            chosen = always | set(others[:number - len(always)])
            tokens = [i for i in range(t + 1) if i // block in chosen]
            for h in (2 * g, 2 * g + 1):
                part, _ = attend(turned(rows[t, h], t), [key[i] for i in tokens],
                                 [value[i] for i in tokens])
                y[t, h] += gates[t, 1, h] * part
    assert free > 60  # queries that really choose
    got, _ = layer(X[None])
    assert torch.allclose(got[0], y.flatten(1) @ layer.out.weight.T, rtol=1e-9, atol=1e-10)


def test_forms_of_the_choice_agree():
    torch.manual_seed(0)
    length, stride, size = 700, 4, 8
    q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, 180, 8)
    start = torch.tensor([[0], [128]])  # the second row holds two documents
    at = torch.arange(length)[None]
    start = torch.where(at < start, torch.zeros_like(start), start)
    own = at - start
    count = ((own - size + 1).div(stride, rounding_mode="floor") + 1).clamp(min=0)
    first = torch.where(start > 0, 31, 0)
    settings = dict(size=size, stride=stride, block=8, number=6)
    chosen = block_choice(q, k, first, count, own, **settings)
    with use("reference"):
        want = block_choice(q, k, first, count, own, **settings)
    assert torch.equal(chosen.sort(-1).values, want.sort(-1).values)
    mine = (own // 8)[:, None, :, None]
    assert (chosen <= mine).all()
    for fixed in (torch.zeros_like(mine), mine, (mine - 1).clamp(min=0)):
        assert (chosen == fixed).any(-1).all()
    assert ((chosen >= 0).sum(-1) == (mine[..., 0] + 1).clamp(max=6)).all()


@pytest.mark.skipif(not tiled(), reason="needs matrix tiles")
def test_the_compiled_choice_is_that_of_the_reference(monkeypatch):
    """In bfloat16, over two documents, with memory that holds NaN before it is written."""
    torch.manual_seed(0)
    length, stride, size = 700, 4, 8
    q, k = torch.randn(2, 4, length, 32).bfloat16(), torch.randn(2, 2, 180, 32).bfloat16()
    at = torch.arange(length)[None]
    start = torch.where(at < torch.tensor([[0], [128]]), 0, torch.tensor([[0], [128]]))
    own = at - start
    count = ((own - size + 1).div(stride, rounding_mode="floor") + 1).clamp(min=0)
    args = (q, k, torch.where(start > 0, 31, 0), count, own)
    settings = dict(size=size, stride=stride, block=8, number=6)
    with use(block_choice="reference"):
        want = block_choice(*args, **settings).sort(-1).values
    poison(monkeypatch)
    with use(block_choice="amx"):
        got = block_choice(*args, **settings).sort(-1).values
    assert (got == want).all(-1).float().mean() > 0.998  # ties to within rounding may fall anyhow
    assert ((got >= 0) == (want >= 0)).all()


def test_cost_grows_slowly():
    """Quadratic with a small factor: far below attention at 16 thousand tokens."""
    dense = manyform.contract.build("mixer", "attention", 256, manyform.Place(), {"n_heads": 4})
    for layer in (NativeSparseAttention(256, n_heads=4), BlockAttention(256, n_heads=4)):
        assert layer.cost(16384).flops < dense.cost(16384).flops / 3
        assert layer.growth == ("linear", "quadratic")


@pytest.mark.parametrize(("cls", "options", "words"), [
    (BlockAttention, dict(chunk=0), "chunk must be at least 1"),
    (BlockAttention, dict(kv_heads=3, n_heads=4), "must divide"),
    (NativeSparseAttention, dict(stride=5), "must divide size"),
    (NativeSparseAttention, dict(number=2), "number must be at least 3"),
])
def test_bad_options(cls, options, words):
    with pytest.raises(ManyformError, match=words):
        cls(32, **options)
