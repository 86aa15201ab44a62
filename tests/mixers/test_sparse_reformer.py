"""Reformer and differential attention: the laws, and the equations token by token."""

import math

import pytest
import torch

import manyform
from manyform import Place
from manyform.errors import ManyformError
from manyform.mixers.differential_attention import DifferentialAttention
from manyform.mixers.reformer import Reformer


@pytest.mark.parametrize(("cls", "options"), [
    (Reformer, dict(chunk=4, buckets=4, hashes=2)),
    (Reformer, dict(chunk=4, buckets=4, hashes=2, causal=False, position="none")),
    (Reformer, dict(chunk=4, buckets=[2, 4], hashes=2, hash_seed=3)),
    (Reformer, dict(chunk=4, buckets=[2, 4], hashes=2, causal=False, released=True, multiple=8)),
    (Reformer, dict(chunk=80, causal=False, released=True, position="none")),
    (DifferentialAttention, dict()),
    (DifferentialAttention, dict(window=6, position="none")),
])
def test_laws(cls, options):
    manyform.check(cls, length=70, **options)


X = torch.randn(60, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make(cls, **options):
    torch.manual_seed(3)
    layer = cls(16, **options).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hashes", [1, 3])
def test_reformer(causal, hashes):
    """Kitaev 2020, section 2: hash, sort, cut into chunks; then one query after the other."""
    chunk, d, n = 4, 8, 60
    layer = make(Reformer, n_heads=2, buckets=6, hashes=hashes, chunk=chunk, causal=causal,
                 position="none")
    shared = (X @ layer.qk.weight.T).view(n, 2, d)
    value = (X @ layer.v.weight.T).view(n, 2, d)
    y, alone = torch.zeros(n, 2, d, dtype=torch.float64), 0
    for h in range(2):
        buckets = []
        for turn in layer.rotations:
            both = torch.cat([shared[:, h] @ turn, -(shared[:, h] @ turn)], 1)
            buckets.append(both.argmax(1).tolist())
        for i in range(n):
            seen = []
            for bucket in buckets:
                if causal:
                    mine = [j for j in range(i) if bucket[j] == bucket[i]]
                    seen += mine[-2 * chunk:]
                else:
                    order = sorted(range(n), key=lambda j: (bucket[j], j))
                    place = {j: s // chunk for s, j in enumerate(order)}
                    seen += [j for j in range(n) if j != i and bucket[j] == bucket[i]
                             and place[i] - 1 <= place[j] <= place[i]]
            alone += not seen
            seen = seen or [i]
            score = torch.stack([shared[i, h] @ shared[j, h] / shared[j, h].norm() for j in seen])
            y[i, h] = score.softmax(0) @ value[seen, h]
    assert alone or hashes > 1 or not causal
    got, _ = layer(X[None])
    assert torch.allclose(got[0], y.flatten(1) @ layer.out.weight.T, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("hashes", "n"), [(1, 60), (3, 57), (2, 4)])
def test_reformer_as_released(hashes, n):
    """Sort, fill up, lay the rounds one behind the other, cut; then one query after the other."""
    chunk, d = 4, 8
    layer = make(Reformer, n_heads=2, buckets=[2, 4], hashes=hashes, chunk=chunk, causal=False,
                 released=True, multiple=12, position="none")
    shared = (X[:n] @ layer.qk.weight.T).view(n, 2, d)
    value = (X[:n] @ layer.v.weight.T).view(n, 2, d)
    y = torch.zeros(n, 2, d, dtype=torch.float64)
    for h in range(2):
        laid = []
        for turn in layer.rotations[h]:
            z = shared[:, h] @ turn
            low, high = (torch.cat([part, -part], 1).argmax(1).tolist()
                         for part in (z[:, :1], z[:, 1:]))
            bucket = [a + 2 * b for a, b in zip(low, high, strict=True)]
            laid += sorted(range(n), key=lambda j: (bucket[j], j))
            laid += [None] * (-n % 12)
        chunks = [laid[s:s + chunk] for s in range(0, len(laid), chunk)]
        for i in range(n):
            seen = list(range(i)) if n <= chunk else [
                j for c, own in enumerate(chunks) if i in own for j in chunks[c - 1] + own
                if j is not None and j < i]
            seen = seen or [i]
            score = torch.stack([shared[i, h] @ shared[j, h]
                                 / (shared[j, h].square().mean() + 1e-6).sqrt() / math.sqrt(d)
                                 for j in seen])
            y[i, h] = score.softmax(0) @ value[seen, h]
    got, _ = layer(X[None, :n])
    assert torch.allclose(got[0], y.flatten(1) @ layer.out.weight.T, rtol=1e-9, atol=1e-10)


def test_reformer_draws_its_rotations_from_a_seed():
    layer = Reformer(16, n_heads=2, buckets=4, hashes=3, causal=False, released=True, hash_seed=7)
    torch.manual_seed(7)
    assert torch.equal(layer.rotations, torch.randn(2, 8, 3, 2).transpose(1, 2))


def test_reformer_saves_its_rotations():
    first, second = make(Reformer), Reformer(16).double()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(X[None])[0], second(X[None])[0])


@torch.no_grad()
def test_differential_attention():
    """Ye 2024, eq. 1 to 3, with rotary positions left out."""
    layer = make(DifferentialAttention, n_heads=2, position="none", place=Place(3, 8))
    d, n = layer.head_dim, 60
    assert d == 4
    q, k, v = (X @ layer.qkv.weight.T).chunk(3, 1)
    start = 0.8 - 0.6 * math.exp(-0.3 * 3)
    lam = (math.exp(layer.lambda_q1 @ layer.lambda_k1)
           - math.exp(layer.lambda_q2 @ layer.lambda_k2) + start)
    heads = []
    for h in range(2):
        maps = []
        for part in range(2):
            columns = slice((2 * h + part) * d, (2 * h + part + 1) * d)
            score = q[:, columns] @ k[:, columns].T / math.sqrt(d)
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            maps.append(score.masked_fill(future, -math.inf).softmax(1))
        y = (maps[0] - lam * maps[1]) @ v[:, 2 * h * d:2 * (h + 1) * d]
        y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.head_norm
        heads.append((1 - start) * y)
    got, _ = layer(X[None])
    assert torch.allclose(got[0], torch.cat(heads, 1) @ layer.out.weight.T, rtol=1e-9, atol=1e-9)
    fresh = DifferentialAttention(64, place=Place(0, 2))
    assert fresh.start == pytest.approx(0.2)
    assert fresh.growth == ("linear", "quadratic")
    assert DifferentialAttention(64, window=8).growth == ("window", "linear")


@pytest.mark.parametrize(("cls", "options", "words"), [
    (Reformer, dict(buckets=5), "buckets must be even"),
    (Reformer, dict(buckets=[4, 3]), "even factors"),
    (Reformer, dict(hashes=0), "at least 1"),
    (Reformer, dict(released=True), "needs causal=False"),
    (Reformer, dict(causal=False, multiple=64), "needs released=True"),
    (Reformer, dict(causal=False, released=True, multiple=65), "multiple of chunk=64"),
    (Reformer, dict(position="alibi"), "unknown position"),
    (DifferentialAttention, dict(position="alibi"), "unknown position"),
])
def test_bad_options(cls, options, words):
    with pytest.raises(ManyformError, match=words):
        cls(32, **options)


def test_differential_attention_needs_an_even_width():
    with pytest.raises(ManyformError, match="give an even one"):
        DifferentialAttention(33)
