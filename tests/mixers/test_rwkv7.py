"""RWKV-7 time mixing and channel mixing: the laws, the equation, what layers share, the recipe."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyform import ManyformError, Model, Place
from manyform.channels.rwkv import RWKVChannel
from manyform.config import LayerSpec, ModelConfig
from manyform.contract import param_hints
from manyform.laws import check
from manyform.mixers.rwkv7 import RWKV7
from manyform.ops.token_shift import token_shift


def small_model():
    torch.manual_seed(0)
    layer = LayerSpec("rwkv7", {"head_dim": 8}, "rwkv_channel")
    return Model(ModelConfig(vocab_size=24, d_model=16, n_layers=3, pattern=(layer,), norm="layer"))


@pytest.mark.parametrize("build", [
    lambda: RWKV7(32, head_dim=16),
    lambda: RWKV7(24, place=Place(1, 2)),
    lambda: RWKVChannel(16),
    small_model,
])
def test_laws(build):
    torch.manual_seed(0)
    check(build())


def test_equation():
    """The second layer's time mixing with a first value, step by step, values by keys."""
    torch.manual_seed(0)
    net = RWKV7(16, place=Place(1, 3), head_dim=8).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, first = torch.randn(2, 11, 16).double().unbind(0)
    got, state = net(x[None], shared={"rwkv7_first_value": first[None]})
    memory, before = torch.zeros(2, 8, 8).double(), torch.zeros(16).double()
    for t in range(11):
        xr, xd, xk, xv, xa, xg = (x[t] + (before - x[t]) * mu for mu in net.shift)
        before = x[t]
        r, k, v = net.receptance(xr), net.key(xk), net.value(xv)
        decay = torch.exp(-torch.tensor(-0.5).double().exp()
                          * torch.sigmoid(net.w0 + torch.tanh(xd @ net.w1) @ net.w2))
        rate = torch.sigmoid(net.a0 + xa @ net.a1 @ net.a2)
        v = v + (first[t] - v) * torch.sigmoid(net.v0 + xv @ net.v1 @ net.v2)
        kappa = F.normalize((k * net.k_k).view(2, 8), dim=-1)
        k = (k * (1 + (rate - 1) * net.k_a)).view(2, 8)
        r, v, y = r.view(2, 8), v.view(2, 8), []
        for h in range(2):
            erase = torch.outer(kappa[h], rate.view(2, 8)[h] * kappa[h])
            memory[h] = memory[h] @ (torch.diag(decay.view(2, 8)[h]) - erase)
            memory[h] += torch.outer(v[h], k[h])
            out = F.layer_norm(memory[h] @ r[h], (8,), eps=8e-5)
            out = out * net.norm_weight.view(2, 8)[h] + net.norm_bias.view(2, 8)[h]
            y.append(out + (r[h] * k[h] * net.r_k[h]).sum() * v[h])
        y = net.output(torch.cat(y) * (torch.sigmoid(xg @ net.g1) @ net.g2))
        assert torch.allclose(got[0, t], y, atol=1e-9)
    assert torch.allclose(state.memory[0].mT, memory)


def test_later_layers_read_the_first_value():
    torch.manual_seed(0)
    shared = {}
    first, second = RWKV7(16), RWKV7(16, place=Place(1, 2))
    torch.nn.init.normal_(second.output.weight)
    x = torch.randn(1, 5, 16)
    first(x, shared=shared)
    assert list(shared) == ["rwkv7_first_value"]
    with_first, alone = second(x, shared=shared)[0], second(x)[0]
    assert not torch.allclose(with_first, alone)
    assert torch.equal(alone, second(x, shared={})[0])


def test_recipe():
    model = small_model()
    hints = param_hints(model)
    decayed = {name.split(".", 3)[-1] for name, hint in hints.items()
               if hint.weight_decay and "mixer" in name}
    assert decayed == {f"{n}.weight" for n in ("receptance", "key", "value", "output")}
    assert [hints[f"blocks.{i}.mixer.w0"].lr_scale for i in range(3)] == [2.0] * 3
    time = model.blocks[2].mixer
    assert not time.output.weight.any()
    assert not model.blocks[2].channel.value.weight.any()
    assert torch.allclose(time.key.weight @ time.key.weight.T, 0.01 * torch.eye(16), atol=1e-5)
    assert torch.allclose(time.norm_weight, torch.ones(16))
    assert float(time.w0.detach()[0]) == pytest.approx(-6 + 0.5 - 2.5)
    assert float(time.w0.detach()[-1]) == pytest.approx(0.5 + 2.5)


def test_any_width():
    for d in (1, 7, 16, 33, 100, 192):
        for module in (RWKV7(d), RWKVChannel(d)):
            assert module(torch.randn(1, 3, d))[0].shape == (1, 3, d)
    assert RWKV7(192).head_dim == 64


def test_refusals():
    for options in ({"head_dim": 5}, {"decay_rank": 0}, {"gate_rank": -1}):
        with pytest.raises(ManyformError):
            RWKV7(16, **options)
    with pytest.raises(ManyformError):
        RWKVChannel(16, expansion=0.0)
    with pytest.raises(ManyformError):
        token_shift(torch.zeros(1, 2, 3), torch.zeros(1, 4))
