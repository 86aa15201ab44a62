"""Transformer-XL against the paper's equations, and its forms against each other."""

import math

import pytest
import torch

import manyform
from manyform.errors import ManyformError
from manyform.mixers.transformer_xl import TransformerXL
from manyform.ops import count, trace, use
from manyform.ops.kernels import available
from manyform.ops.relative_attention import BLOCK, relative_attention


def make(d=12, **options):
    torch.manual_seed(0)
    layer = TransformerXL(d, **{"n_heads": 3, "memory": 5, **options}).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def paper(layer, hidden, memory):
    """Dai 2019, section 3.3, for one sequence, hidden: (T, d): pair by pair."""
    T, d = hidden.shape
    H, D = layer.n_heads, layer.head_dim
    W = layer.qkv.weight.view(3, H, D, d)
    W_R = layer.distance.weight.view(H, D, d)
    heads = []
    for h in range(H):
        rows = []
        for i in range(T):
            logits, values = [], []
            for j in range(max(0, i - memory), i + 1):
                R = torch.zeros(d, dtype=torch.float64)
                for m in range(d // 2):
                    angle = (i - j) / 10000 ** (2 * m / d)
                    R[m], R[d // 2 + m] = math.sin(angle), math.cos(angle)
                q, k = W[0, h] @ hidden[i], W[1, h] @ hidden[j]
                a, b = q @ k, q @ (W_R[h] @ R)
                c, e = layer.content_bias[h] @ k, layer.position_bias[h] @ (W_R[h] @ R)
                logits.append((a + b + c + e) / math.sqrt(D))
                values.append(W[2, h] @ hidden[j])
            p = torch.softmax(torch.stack(logits), 0)
            rows.append((p[:, None] * torch.stack(values)).sum(0))
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1) @ layer.out.weight.T


@torch.no_grad()
@pytest.mark.parametrize("memory", [1, 5, 40])
def test_it_is_the_papers_equation(memory):
    layer, x = make(memory=memory), torch.randn(2, 17, 12, dtype=torch.float64)
    y, _ = layer(x)
    for row in range(2):
        torch.testing.assert_close(y[row], paper(layer, x[row], memory), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_segments_with_the_previous_ones_as_memory():
    """Recurrence over segments (section 3.2): hidden states of the segment before, once more
    through the projections, give what the state gives."""
    layer, x = make(memory=8), torch.randn(1, 24, 12, dtype=torch.float64)
    whole, _ = layer(x)
    state = None
    for n in range(0, 24, 8):
        y, state = layer(x[:, n:n + 8], state)
        context = x[0, max(0, n - 8):n + 8]
        want = paper(layer, context, 8)[-8:]
        torch.testing.assert_close(y[0], want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(y, whole[:, n:n + 8], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_forms_agree_forward_and_backward(length):
    old, window = 9, 70
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in
               (length, length + old, length + old))
    table = torch.randn(min(window, length + old), 6, dtype=torch.float64)
    weight = torch.randn(12, 6, dtype=torch.float64)
    u, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    start = torch.full((2, length), -3)
    start[1] = old - 2
    start[0, length // 2:] = old + length // 2
    leaves = [t.requires_grad_() for t in (q, k, v, weight, u, w)]
    results = []
    for path in (None, "reference", "blocked"):
        with use(path):
            y = relative_attention(q, k, v, table, weight, u, w, start, window=window)
        results.append([y, *torch.autograd.grad(y.cos().sum(), leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def tiled():
    if not available():
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@pytest.mark.skipif(not tiled(), reason="no matrix tiles here")
@pytest.mark.parametrize(("batch", "heads", "length", "old", "d", "window", "documents"), [
    (1, 2, 128, 0, 32, 20, False), (2, 3, 97, 0, 64, 40, True), (2, 2, 70, 33, 32, 50, False),
    (1, 2, 70, 40, 32, 300, True), (1, 1, 64, 64, 96, 65, False)])
def test_tiles_agree_with_the_reference(batch, heads, length, old, d, window, documents):
    torch.manual_seed(0)
    total = length + old
    q, k, v = (torch.randn(batch, n, heads, d).bfloat16().transpose(1, 2).requires_grad_()
               for n in (length, total, total))
    table = torch.randn(min(window, total), 24).bfloat16()
    weight = (torch.randn(heads * d, 24) / 5).requires_grad_()
    u, w = (torch.randn(heads, d).requires_grad_() for _ in range(2))
    start = None
    if documents:  # one every 37 tokens; the first began before the memory
        start = torch.arange(length) // 37 * 37 + old
        start[:37] = -5
        start = start.expand(batch, -1)
    slope = torch.randn(batch, heads, length, d)
    results = []
    for form in ("amx", "reference"):
        with use(relative_attention=form):
            y = relative_attention(q, k, v, table, weight, u, w, start, window=window)
        results.append([y, *torch.autograd.grad((y * slope).sum(), (q, k, v, weight, u, w))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got.detach().double() - want.detach().double()).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("options", [{}, {"memory": 3, "n_heads": 2}, {"memory": 200},
                                     {"d_model": 64, "n_heads": 2}], ids=str)
def test_laws(options):
    manyform.check(TransformerXL, **{"d_model": 16, "memory": 24, **options})


def test_one_query_takes_the_folded_form():
    layer = make()
    _, state = layer(torch.randn(1, 9, 12, dtype=torch.float64))
    with trace() as seen, torch.no_grad():
        layer(torch.randn(1, 1, 12, dtype=torch.float64), state)
    assert ("relative_attention", "folded") in seen


def test_cost_and_errors():
    layer = make(memory=6)
    with count() as counted, torch.no_grad():
        layer(torch.randn(1, 20, 12, dtype=torch.float64))
    assert counted.total == layer.cost(20).flops
    assert layer.growth == ("window", "linear")
    with pytest.raises(ManyformError, match="memory"):
        TransformerXL(16, memory=0)
