"""Zamba2's shared block against its equations, and what its layers share."""

import math

import pytest
import torch

import manyform
from manyform.errors import ManyformError
from manyform.laws import check
from manyform.structures.zamba2 import Zamba2

SMALL = {"n_heads": 2, "rank": 3, "width": 12, "d_state": 4, "head_dim": 4}


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def rms(x, weight, eps=1e-5):
    return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps) * weight


def heard(layer, use, stream, entrance):
    """What the layer hears of its shared block at every position: (T, d) each, in plain loops."""
    a, d = layer.attention, layer.d_model
    size = a.head_dim
    maps = a.qkv.weight.split(2 * d)
    q, k, v = ([] for _ in range(3))
    for t in range(len(stream)):
        u = rms(torch.cat([stream[t], entrance[t]]), layer.attention_norm.weight)
        for found, W, extra in zip((q, k, v), maps, (use.q, use.k, use.v), strict=True):
            found.append((W + extra.up.weight @ extra.down.weight) @ u)
    result = []
    for t in range(len(stream)):
        heads = []
        for h in range(a.n_heads):
            at = slice(h * size, (h + 1) * size)
            scores = [(q[t][at] @ k[s][at]).item() / math.sqrt(size / 2) for s in range(t + 1)]
            total = sum(math.exp(s) for s in scores)
            heads.append(sum(math.exp(s) / total * v[i][at] for i, s in enumerate(scores)))
        n = rms(a.out.weight @ torch.cat(heads), layer.mlp_norm.weight)
        W = layer.mlp.gate_up.weight + use.gate_up.up.weight @ use.gate_up.down.weight
        gate, up = (W @ n).chunk(2)
        gelu = torch.tensor([g * 0.5 * (1 + math.erf(g / math.sqrt(2))) for g in gate.tolist()])
        result.append(use.out.weight @ (layer.mlp.down.weight @ (gelu * up)))
    return torch.stack(result)


@torch.no_grad()
def test_two_layers_are_the_papers_equations_with_additions_of_their_own():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = moved(manyform.create("zamba2 + none @ one", vocab_size=9, d_model=8, n_layers=2,
                                      position="none", **SMALL)).eval()
        tokens = torch.randint(0, 9, (1, 6))
        entrance = model.embedding.weight[tokens[0]]
        (block,) = model.blocks
        stream = entrance
        for use in block.mixer.uses:
            h = stream + heard(block.mixer, use, stream, entrance)
            h = torch.stack([rms(row, use.norm.weight) for row in h])
            stream = stream + use.mamba(h[None])[0][0]
        got, _ = model.blocks(entrance[None])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got[0], stream, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [
    {"dt_limit": (0.1, 1.0), "bias": True}, {"adapt_attention": False, "position": "none"}])
def test_laws(options):
    torch.manual_seed(0)
    check(moved(Zamba2(16, **{**SMALL, **options})), length=21)


def test_layers_share_the_block_and_nothing_else():
    model = manyform.create("mamba2 + none : zamba2 + none @ one", vocab_size=9, d_model=16,
                            n_layers=6, **SMALL)
    assert len(model.blocks) == 4
    assert len(model.blocks[1].mixer.uses) == 3
    once = manyform.create("mamba2 + none : zamba2 + none @ one", vocab_size=9, d_model=16,
                           n_layers=2, **SMALL)
    own = sum(p.numel() for p in once.blocks[1].mixer.uses.parameters())
    mamba = sum(p.numel() for p in once.blocks[0].parameters())
    assert model.num_params() == once.num_params() + 2 * (own + mamba)


def test_refusals():
    for options, match in (({"rank": 0}, "rank"), ({"position": "alibi"}, "position of zamba2")):
        with pytest.raises(ManyformError, match=match):
            Zamba2(16, **options)
    model = manyform.create("zamba2 + none @ one", vocab_size=9, d_model=16, n_layers=2, **SMALL)
    with pytest.raises(ManyformError, match="stand in the stack itself"):
        model.blocks[0].mixer(torch.zeros(1, 2, 16), shared={})
