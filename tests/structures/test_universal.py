"""The Universal Transformer and adaptive computation time, position by position."""

import math

import pytest
import torch

import manyform
from manyform.errors import ManyformError
from manyform.structures.universal import UniversalTransformer


def make(**options):
    torch.manual_seed(0)
    layer = UniversalTransformer(8, **{"steps": 4, **options}).double()
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, std=0.5)
        if name == "halt":
            p.data[-1] = 1.0
    return layer


def ln(module, x):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + 1e-5).sqrt() * module.weight + module.bias


def step(layer, states, n):
    """One step for all positions of one sequence: states is a list of (d,) (Dehghani, eq. 4-6)."""
    d = len(states[0])
    (block,) = layer.block
    H, D = block.mixer.n_heads, block.mixer.head_dim
    W = block.mixer.qkv.weight.view(3, H, D, d)
    inputs = []
    for i, s in enumerate(states):
        P = torch.zeros(d, dtype=torch.float64)
        for j in range(d // 2):
            rate = 10000 ** (2 * j / d)
            P[j] = math.sin(i / rate) + math.sin(n / rate)
            P[d // 2 + j] = math.cos(i / rate) + math.cos(n / rate)
        inputs.append(s + P)
    out = []
    for i, a in enumerate(inputs):
        heads = []
        for h in range(H):
            scores = torch.stack([(W[0, h] @ a) @ (W[1, h] @ b) for b in inputs[:i + 1]])
            p = torch.softmax(scores / math.sqrt(D), 0)
            heads.append(sum(w * (W[2, h] @ b) for w, b in zip(p, inputs[:i + 1], strict=True)))
        A = ln(block.mixer_norm, a + block.mixer.out.weight @ torch.cat(heads))
        transition = block.channel.down.weight @ torch.relu(block.channel.up.weight @ A)
        out.append(ln(block.channel_norm, A + transition))
    return out


@torch.no_grad()
@pytest.mark.parametrize("bias", [-3.0, -1.0, 1.0])
def test_it_is_the_papers_recurrence_with_halting(bias):
    layer = make()
    layer.halt[-1] = bias
    x = torch.randn(7, 8, dtype=torch.float64)
    shared = {}
    got, _ = layer(x[None], shared=shared)
    states, spent = list(x), [0.0] * 7
    outputs, ponder, stopped = [0.0] * 7, [0.0] * 7, [False] * 7
    for n in range(1, 5):
        new = step(layer, states, n)
        for i in range(7):
            if stopped[i]:
                continue
            states[i] = new[i]
            h = float(torch.sigmoid(layer.halt[:-1] @ states[i] + layer.halt[-1]))
            if n == 4 or spent[i] + h >= 0.99:  # N = n, Graves eq. 6; R, eq. 7
                outputs[i] = outputs[i] + (1 - spent[i]) * states[i]
                ponder[i], stopped[i] = n + 1 - spent[i], True
            else:
                outputs[i] = outputs[i] + h * states[i]
                spent[i] += h
    torch.testing.assert_close(got[0], torch.stack(outputs), rtol=1e-6, atol=1e-6)
    want = 0.01 * sum(ponder) / 7
    assert abs(float(shared["losses"]["ponder"]) - want) < 1e-7


@pytest.mark.parametrize("options", [
    {}, {"adaptive": False},
    {"residual": "pre", "norm": "rms", "block": "mamba2 + none : attention(window=9) + mlp"}],
    ids=str)
def test_laws(options):
    manyform.check(UniversalTransformer, d_model=16, steps=2, length=60, **options)


def test_halting_bounds_the_depth_that_is_learned():
    """A bias that halts at once leaves one step; the ponder cost counts it and its remainder."""
    layer = make(ponder=1.0)
    with torch.no_grad():
        layer.halt[-1] = 40.0
    shared = {}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y, _ = layer(x, shared=shared)
    one = make(steps=1, adaptive=False)
    one.block.load_state_dict(layer.block.state_dict())
    torch.testing.assert_close(y, one(x, shared={})[0])
    assert shared["losses"]["ponder"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0, 40.0])
@pytest.mark.parametrize("options", [{}, {"block": "attention(window=5) + none"},
                                     {"residual": "parallel"}], ids=str)
def test_work_left_out_changes_nothing(bias, options):
    """Values, states and gradients with all steps of all positions and without."""
    def run(spares):
        layer = make(**options)
        layer.spares = spares
        layer.halt.data[-1] = bias
        x = torch.randn(3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        shared = {}
        y, state = layer(x, shared=shared)
        z, state = layer(2 * x, state, shared=shared)
        loss = (y * z).sum() + shared["losses"]["ponder"] + sum(
            s[-1].mixer.keys.square().sum() for s in state.steps)
        return y, z, *torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True,
                                          materialize_grads=True)
    for got, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, want)


def test_a_step_that_nobody_runs_leaves_its_state_only():
    layer = make()
    layer.halt.data[-1] = 40.0
    calls = []
    layer.block[0].channel.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 5, 8, dtype=torch.float64), shared={})
    assert len(calls) == 1


def test_the_ponder_cost_reaches_the_halting_unit():
    torch.manual_seed(0)
    model = manyform.create("universal_transformer", vocab_size=11, d_model=16)
    tokens = torch.randint(11, (2, 9))
    model.train().loss(tokens, tokens)[0].backward()
    assert model.blocks[0].mixer.halt.grad.abs().sum() > 0


def test_refusals():
    with pytest.raises(ManyformError, match="steps"):
        UniversalTransformer(8, steps=0)
    with pytest.raises(ManyformError, match="epsilon"):
        UniversalTransformer(8, epsilon=1.0)
    with pytest.raises(ManyformError, match="residual stream of its own"):
        manyform.create("universal_transformer", vocab_size=5, residual="residual_dual")
