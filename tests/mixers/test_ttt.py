"""Test-time training: the laws, the gradient steps taken by autograd, cuts inside mini-batches."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyform import ManyformError
from manyform.laws import check
from manyform.mixers.ttt import TestTimeTraining
from manyform.ops.ttt import _loss_gradient, _LossGradient


@pytest.mark.parametrize("options", [dict(n_heads=2), dict(inner="mlp", n_heads=1, head_dim=6,
                                                            mini_batch=5)], ids=str)
def test_laws(options):
    torch.manual_seed(0)
    check(TestTimeTraining(16, **options), length=45)


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_gradient_steps(inner):
    """Section 2.4: the loss of each token, differentiated by autograd at the mini-batch's start."""
    torch.manual_seed(0)
    layer = TestTimeTraining(6, inner=inner, n_heads=1, head_dim=6, mini_batch=4).double()
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    q, k, v = (x[0] @ layer.qkv.weight.T).split(6, dim=-1)

    def turned(z, place):
        theta = place * 10000 ** (-torch.arange(3, dtype=torch.float64) / 3)
        a, b = z.chunk(2)
        return torch.cat([a * theta.cos() - b * theta.sin(), b * theta.cos() + a * theta.sin()])

    def net(weights, z):
        h = z
        for i, w in enumerate(weights):
            h = (F.gelu(h, approximate="tanh") if i else h) @ w[:-1] + w[-1]
        scale, shift = layer.inner_norm[:, 0]
        return z + F.layer_norm(h, (6,), eps=1e-6) * scale + shift

    base = [w[0].detach().requires_grad_() for w in layer.initial]
    sums = [torch.zeros_like(w) for w in base]
    y, _ = layer(x)
    for t in range(11):
        place = t % 4
        loss = (net(base, turned(k[t], place)) - v[t]).square().sum() / 2
        rate = torch.sigmoid(layer.rate(x[0, t])) * layer.lr / 6
        found = torch.autograd.grad(loss, base)
        sums = [s + rate * g for s, g in zip(sums, found, strict=True)]
        factor = (1 / (place + 1) + layer.place_scale[place]).clamp(min=0)
        now = [w - factor * s for w, s in zip(base, sums, strict=True)]
        want = layer.out_proj(layer.norm(net(now, turned(q[t], place))))
        # the rotary table's angles are kept in float32
        torch.testing.assert_close(y[0, t], want, rtol=1e-6, atol=1e-6)
        if place == 3:
            base = [w.detach().requires_grad_() for w in now]
            sums = [torch.zeros_like(w) for w in base]


def test_cuts_inside_a_mini_batch():
    """Rows that stand at different places of their mini-batches go on together."""
    torch.manual_seed(0)
    layer = TestTimeTraining(8, n_heads=1, mini_batch=4).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 3], reset[1, 5], reset[1, 6] = True, True, True
    y, _ = layer(x, reset=reset)
    first, carried = layer(x[:, :9], reset=reset[:, :9])
    assert carried.position.tolist() == [2, 3]
    second, after = layer(x[:, 9:], carried)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-10, atol=1e-12)
    alone, end = layer(x[1:, 6:])
    torch.testing.assert_close(alone[0], y[1, 6:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after.weights[0][1], end.weights[0][0])


def test_sizes_and_refusals():
    for d in (1, 2, 7, 16, 100, 2048):
        with torch.device("meta"):
            TestTimeTraining(d)
    for options in ({"inner": "cnn"}, {"mini_batch": 0}, {"lr": 0.0}, {"n_heads": 0},
                    {"head_dim": 3}):
        with pytest.raises(ManyformError):
            TestTimeTraining(16, **options)


def test_the_gradient_of_the_loss_gradient():
    """The hand-written derivative against the formula that autograd differentiates."""
    torch.manual_seed(0)
    args = [torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 5))]
    w = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    want, got = _loss_gradient(*args), _LossGradient.apply(*args[:2], args[2][:, :, None])
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y, args, w) for y in (want, got)), strict=True):
        torch.testing.assert_close(a, b)
