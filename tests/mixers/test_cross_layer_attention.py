"""Attention whose keys and values several layers share."""

import pytest
import torch

import manyform
from manyform import ManyformError
from manyform.laws import check
from manyform.mixers.attention import Attention
from manyform.mixers.cross_layer_attention import CrossLayerAttention

PAIR = "cross_layer_attention({0}) : cross_layer_attention({0}{1}borrows=True)"


def pair(options="", **settings):
    torch.manual_seed(0)
    return manyform.create(PAIR.format(options, ", " if options else ""), vocab_size=17,
                           **{"d_model": 32, "n_layers": 2, **settings})


@pytest.mark.parametrize("options", ["", "window=9, sinks=2, n_heads=4, kv_heads=2, qk_norm=True",
                                     "position='alibi', n_heads=4, kv_heads=1"])
def test_laws(options):
    check(pair(options), length=49)


def test_deep_norm_scales_what_a_borrower_has():
    check(pair(residual="deepnorm"), length=49, precisions=["float64"])


def test_borrowed_keys_are_the_lenders():
    """A borrower is attention whose keys and values are projected from the lender's input."""
    torch.manual_seed(0)
    lender, borrower = (CrossLayerAttention(32, n_heads=4, kv_heads=2, borrows=b).double()
                        for b in (False, True))
    x, z = torch.randn(2, 2, 11, 32, dtype=torch.float64)
    reset = torch.rand(2, 11) < 0.3
    shared = {}
    y, _ = lender(x, reset=reset, shared=shared)
    got, state = borrower(z, reset=reset, shared=shared)
    assert state is None
    plain = Attention(32, n_heads=4, kv_heads=2).double()
    plain.load_state_dict(lender.state_dict())
    assert torch.equal(y, plain(x, reset=reset)[0])
    keys = lender.qkv(x)[..., 32:]
    plain.out.load_state_dict(borrower.out.state_dict())
    want, _ = plain.attend(z, torch.cat([borrower.qkv(z), keys], -1), None, reset)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_state_is_kept_once():
    model, apart = pair(), manyform.create("attention", vocab_size=17, d_model=32, n_layers=2)
    assert model.cost(64).state_bytes - 8 == (apart.cost(64).state_bytes - 8) / 2
    assert model.cost(64).flops < apart.cost(64).flops


def test_generation():
    """Decoding, whose compiled step these layers do without, gives what whole sequences give."""
    model = pair("window=9, sinks=2").eval()
    prompt = torch.tensor([[3, 1]])
    out = model.generate(prompt, 24, greedy=True).tokens
    assert torch.equal(out[:, 2:], model(out)[0].argmax(-1)[:, 1:-1])


@pytest.mark.parametrize(("pattern", "message"), [
    ("cross_layer_attention(borrows=True)", "there is none here"),
    ("attention : cross_layer_attention(borrows=True)", "there is none here"),
    ("cross_layer_attention(window=4) : cross_layer_attention(borrows=True)", "same kv_heads"),
    ("cross_layer_attention(kv_heads=1) : cross_layer_attention(kv_heads=2, borrows=True)",
     "same kv_heads"),
])
def test_nothing_to_borrow(pattern, message):
    model = manyform.create(pattern, vocab_size=17, d_model=32, n_heads=2, n_layers=2)
    with pytest.raises(ManyformError, match=message):
        model(torch.zeros(1, 3, dtype=torch.int64))
