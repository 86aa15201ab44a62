"""Longformer, BigBird and Sparse Transformer: the laws, and the papers' patterns key by key."""

import itertools
import math

import pytest
import torch

import manyform
from manyform import Place
from manyform.errors import ManyformError
from manyform.mixers.sparse_attention import BigBird, Longformer, SparseTransformer, where

LAWS = [
    (Longformer, dict(window=7)),
    (Longformer, dict(window=7, globals=3, n_heads=4, kv_heads=2, bias=True)),
    (Longformer, dict(window=5, globals=2, dilation=3, dilated_heads=1, n_heads=2)),
    (Longformer, dict(window=7, globals=3, causal=False)),
    (Longformer, dict(window=6, dilation=2, causal=False, position="none")),
    (BigBird, dict(block=4)),
    (BigBird, dict(block=4, causal=False, n_heads=4)),
    (BigBird, dict(block=4, random="first", random_blocks=2)),
    (BigBird, dict(block=4, random="first", random_blocks=2, causal=False, dense_length=24,
                   bias=True, out_bias=False)),
    (SparseTransformer, dict()),
    (SparseTransformer, dict(stride=5, position="none")),
    (SparseTransformer, dict(factors="fixed")),
    (SparseTransformer, dict(factors="fixed", stride=8, summary=2, heads="split", n_heads=4)),
]


@pytest.mark.parametrize(("cls", "options"), LAWS)
def test_laws(cls, options):
    manyform.check(cls, length=70, **options)


def make(cls, d_model=16, **options):
    torch.manual_seed(3)
    layer = cls(d_model, n_heads=4, place=options.pop("place", Place()), **options).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def turned(x, positions, base=10000.0):
    """Rotary positions as a product of complex numbers (which the mixer keeps in float32)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-torch.arange(half) / half).double()
    pairs = torch.complex(x[..., :half], x[..., half:])
    turn = torch.complex(angle.cos().float().double(), angle.sin().float().double())
    pairs = pairs * turn[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def by_hand(layer, x, sees, q_weight=None, kv_weight=None):
    """Dense attention, head by head and query by query, over the keys j with sees(h, i, j)."""
    batch, length, _ = x.shape
    heads, groups, d = layer.n_heads, layer.kv_heads, layer.head_dim
    weight = layer.qkv.weight
    q = x @ (weight[:heads * d] if q_weight is None else q_weight).T
    kv = x @ (weight[heads * d:] if kv_weight is None else kv_weight).T
    places = torch.arange(length)
    q = turned(q.view(batch, length, heads, d), places)
    k, v = kv.view(batch, length, 2 * groups, d).split(groups, 2)
    k = turned(k, places)
    y = torch.zeros(batch, length, heads, d, dtype=x.dtype)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        g = h * groups // heads
        seen = [j for j in range(length) if sees(h, i, j)]
        if seen:
            p = (k[b, seen, g] @ q[b, i, h] / math.sqrt(d)).softmax(0)
            y[b, i, h] = p @ v[b, seen, g]
    return y.flatten(2) @ layer.out.weight.T


def close(layer, x, want):
    got, _ = layer(x)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)


X = torch.randn(1, 90, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_longformer_causal():
    """Section 3.1 with the window before the query; the last two heads see every third token."""
    layer = make(Longformer, window=5, globals=2, dilation=3, dilated_heads=2, kv_heads=2)

    def sees(h, i, j):
        step = 3 if h >= 2 else 1
        return j <= i and (j < 2 or ((i - j) % step == 0 and (i - j) // step < 5))
    close(layer, X, by_hand(layer, X, sees))


@torch.no_grad()
def test_longformer_both_ways():
    layer = make(Longformer, window=6, globals=3, causal=False)
    local = by_hand(layer, X, lambda h, i, j: i >= 3 and (j < 3 or abs(i - j) <= 3))
    everywhere = by_hand(layer, X, lambda h, i, j: i < 3, layer.global_q.weight,
                         layer.global_kv.weight)
    close(layer, X, local + everywhere)
    fresh = Longformer(16, globals=3, causal=False)
    both = torch.cat([fresh.global_q.weight, fresh.global_kv.weight])
    assert torch.equal(both, fresh.qkv.weight)


def blocks_of(layer, length, causal):
    """The intervals of each head and query, (heads, length, intervals)."""
    low, high, _ = layer.pattern(where(None, length, length, causal), 0)
    return low[0], high[0]


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_bigbird(causal):
    """Window, globals and exactly `random_blocks` others, whole blocks, the same at any length."""
    size, length = 4, 90
    layer = make(BigBird, block=size, window_blocks=3, global_blocks=1, random_blocks=3,
                 causal=causal)
    low, high = blocks_of(layer, length, causal)
    seen = torch.zeros(4, length, length, dtype=torch.bool)
    for h, i, m in itertools.product(range(4), range(length), range(low.shape[-1])):
        assert not seen[h, i, low[h, i, m]:high[h, i, m]].any()  # no key twice
        seen[h, i, low[h, i, m]:high[h, i, m]] = True
    close(layer, X, by_hand(layer, X, lambda h, i, j: bool(seen[h, i, j])))
    blocks, choices = -(-length // size), set()
    for h, n in itertools.product(range(4), range(blocks)):
        i = min(n * size + size - 1, length - 1)  # the last token of its block sees it whole
        got = {m for m in range(blocks) if seen[h, i, m * size]}
        assert got == {m for m in range(blocks) if seen[h, i, min(m * size + 3, length - 1)]}
        fixed = {0, n, n - 1, n - 2} if causal else {0, n - 1, n, n + 1, blocks - 1}
        fixed = {m for m in fixed if 0 <= m < blocks}
        if not causal and n in (0, blocks - 1):
            assert got == set(range(blocks))
            continue
        others = (set(range(n)) if causal else set(range(blocks))) - fixed
        assert got >= fixed
        assert len(got - fixed) == min(3, len(others))
        assert got - fixed <= others
        choices.add((n, *sorted(got - fixed)))
    assert len(choices) > blocks + 4  # heads choose differently
    if causal:
        shorter, _ = blocks_of(layer, 50, True)
        assert torch.equal(shorter, low[:, :50])


@torch.no_grad()
def test_bigbird_that_reads_its_first_block_again():
    """Keys of the first block count three times where they are seen, those of short documents once;
    both documents packed into a row."""
    layer = make(BigBird, block=4, random="first", random_blocks=2, causal=False, dense_length=20,
                 position="none")
    long, short = X[:, :62], X[:, 62:80]
    reset = torch.zeros(1, 80, dtype=torch.bool)
    reset[:, [0, 62]] = True
    got, _ = layer(X[:, :80], reset=reset)
    for x, dense, y in ((long, False, got[:, :62]), (short, True, got[:, 62:])):
        length, heads, d = x.shape[1], 4, 4
        last = (length - 1) // 4
        q, k, v = (x @ layer.qkv.weight.T).view(length, 3, heads, d).permute(1, 2, 0, 3)
        out = torch.zeros(length, heads, d, dtype=x.dtype)
        for h, i in itertools.product(range(heads), range(length)):
            n, times = i // 4, torch.zeros(length, dtype=x.dtype)
            for j in range(length):
                m = j // 4
                if dense or n in (0, last):
                    times[j] = 1
                elif m == 0:
                    times[j] = 3
                elif abs(m - n) <= 1 or m == last:
                    times[j] = 1
            p = times * (k[h] @ q[h, i] / 2).exp()
            out[i, h] = p @ v[h] / p.sum()
        assert torch.allclose(y[0], out.flatten(1) @ layer.out.weight.T, rtol=1e-9, atol=1e-10)


def test_bigbird_saves_its_choice():
    first, second = make(BigBird, block=4), BigBird(16, n_heads=4, block=4).double()
    before, _ = blocks_of(second, 90, True)
    second.load_state_dict(first.state_dict())
    assert not torch.equal(before, blocks_of(first, 90, True)[0])
    assert torch.equal(blocks_of(second, 90, True)[0], blocks_of(first, 90, True)[0])
    assert torch.equal(first(X)[0], second(X)[0])


@torch.no_grad()
@pytest.mark.parametrize("heads", ["merged", "split", "layers"])
@pytest.mark.parametrize("factors", ["strided", "fixed"])
@pytest.mark.parametrize("stride", [None, 16])
def test_sparse_transformer(factors, heads, stride):
    """Section 4.3: A1 = the last l, or those of one's block; A2 = every l-th, or the summaries."""
    layer = make(SparseTransformer, factors=factors, heads=heads, stride=stride,
                 summary=2 if factors == "fixed" else None, place=Place(1, 2))

    def sees(h, i, j):
        step = stride
        if stride is None:
            step = 2
            while step * step <= i:
                step *= 2
        first = i - j < step if factors == "strided" else i // step == j // step
        second = (i - j) % step == 0 if factors == "strided" else j % step >= step - 2
        both = {"merged": first or second, "split": first if h < 2 else second, "layers": second}
        return j <= i and both[heads]
    close(layer, X, by_hand(layer, X, sees))


@pytest.mark.parametrize(("layer", "growth"), [
    (Longformer(32, window=16, globals=2), 1), (Longformer(32, window=16, causal=False), 1),
    (BigBird(32, block=8), 1), (BigBird(32, block=8, causal=False), 1),
    (SparseTransformer(32), 1.5), (SparseTransformer(32, factors="fixed", heads="split"), 1.5)])
def test_cost_grows_as_declared(layer, growth):
    """Kept pairs, without the projections, at lengths a factor of 16 apart."""
    projections = 2 * (layer.qkv.weight.numel() + layer.out.weight.numel())
    pairs = [layer.cost(t).flops - projections * t for t in (1024, 16384)]
    assert math.log(pairs[1] / pairs[0], 16) == pytest.approx(growth, abs=0.07)
    assert layer.growth[1] == {1: "linear", 1.5: "T sqrt T"}[growth]


@torch.no_grad()
def test_window_bounds_the_state():
    layer = Longformer(32, window=8, globals=2, dilation=2)
    _, state = layer(torch.randn(2, 60, 32))
    assert state.keys.shape[2] == 14
    assert state.first_keys.shape[2] == 2
    assert manyform.state.nbytes(state) == 2 * layer.cost(60).state_bytes
    assert Longformer(32, causal=False).initial_state(1) is None


@pytest.mark.parametrize(("cls", "options", "words"), [
    (Longformer, dict(window=0), "window must be at least 1"),
    (Longformer, dict(dilated_heads=9), "at most all"),
    (Longformer, dict(position="alibi"), "unknown position"),
    (BigBird, dict(causal=False, window_blocks=4), "must be odd"),
    (BigBird, dict(block=0), "block must be at least 1"),
    (SparseTransformer, dict(factors="dense"), "unknown factors"),
    (SparseTransformer, dict(heads="both"), "unknown heads"),
    (SparseTransformer, dict(summary=4), "needs factors='fixed'"),
    (SparseTransformer, dict(factors="fixed", stride=4, summary=8), "not smaller"),
    (BigBird, dict(random="frist"), "did you mean 'first'"),
    (BigBird, dict(dense_length=9), "dense_length=9 needs causal=False"),
])
def test_bad_options(cls, options, words):
    with pytest.raises(ManyformError, match=words):
        cls(32, **options)
