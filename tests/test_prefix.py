"""Learned tokens before every document: Hymba's meta tokens, Titans' persistent memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manyform
from manyform import ManyformError

ENTRIES = ["llama", "mistral", "mamba2", "hymba", "titans_mag", "min_gru"]


def model(name, tokens=3, **options):
    torch.manual_seed(0)
    made = manyform.create(name, vocab_size=17, d_model=32, n_layers=2, prefix_tokens=tokens,
                           **options).double().eval()
    with torch.no_grad():
        made.prefix.weight.normal_()
    return made


def written_out(made, tokens):
    """One document with its prefix as rows of the embedding, through the blocks alone."""
    x = torch.cat([made.prefix.weight, made.embedding(tokens)])[None]
    h, _ = made.blocks(x, final_norm=made.final_norm)
    return made.logits(h)[0, len(made.prefix.weight):]


@pytest.mark.parametrize("name", ENTRIES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_documents_of_a_row_each_read_the_prefix(name, data):
    """Any packing of rows, cut anywhere: every document as if it stood behind its own prefix."""
    made = model(name)
    length = data.draw(st.integers(1, 14))
    rows = data.draw(st.integers(1, 3))
    tokens = torch.randint(17, (rows, length), generator=torch.Generator().manual_seed(length))
    reset = torch.tensor(data.draw(st.lists(
        st.lists(st.sampled_from([False, False, True]), min_size=length, max_size=length),
        min_size=rows, max_size=rows)))
    cut = data.draw(st.integers(0, length))
    with torch.no_grad():
        first, state = made(tokens[:, :cut], reset=reset[:, :cut])
        second, _ = made(tokens[:, cut:], state, reset=reset[:, cut:])
        got = torch.cat([first, second], 1)
        for row in range(rows):
            begins = [0, *[t for t in range(1, length) if reset[row, t]], length]
            wanted = torch.cat([written_out(made, tokens[row, a:b])
                                for a, b in itertools.pairwise(begins)])
            torch.testing.assert_close(got[row], wanted, rtol=1e-9, atol=1e-9)


def test_the_prefix_learns():
    made = model("llama").train()
    tokens = torch.randint(17, (2, 9))
    loss, _ = made.loss(tokens, tokens)
    loss.backward()
    assert (made.prefix.weight.grad.abs().sum(1) > 0).all()


def test_generation_reads_it_once():
    """Greedy decoding, compiled or not, is what the whole sequence gives."""
    torch.manual_seed(0)
    made = manyform.create("llama", vocab_size=17, d_model=32, n_layers=2, prefix_tokens=4).eval()
    with torch.no_grad():
        made.prefix.weight.normal_()
        for prompt in (torch.tensor([[3, 1]]), torch.tensor([[3, 1], [5, 2]])):
            out = made.generate(prompt, 24, greedy=True).tokens
            wanted = made(out)[0].argmax(-1)[:, 1:-1]
            assert torch.equal(out[:, 2:], wanted)


def test_save_and_load(tmp_path):
    made = model("mamba2").float()
    made.save(tmp_path)
    tokens = torch.randint(17, (1, 5))
    assert torch.equal(manyform.load(tmp_path)(tokens)[0], made(tokens)[0])


@pytest.mark.parametrize(("name", "options", "message"), [
    ("fnet", {}, "needs causal mixers"),
    ("hyena", {}, "cannot be joined"),
    ("tree", {"open": 1, "close": 2}, "reads the tokens themselves"),
    ("llama", {"exits": (1,)}, "cannot stand beside exits"),
])
def test_what_it_cannot_stand_before(name, options, message):
    with pytest.raises(ManyformError, match=message):
        manyform.create(name, vocab_size=17, d_model=32, n_layers=2, prefix_tokens=2, **options)


def test_a_stack_that_sees_some_tokens_only_has_none_that_reads_tokens():
    with pytest.raises(ManyformError, match="reads the tokens themselves"):
        manyform.create("hnet", vocab_size=17, d_model=32, main="tree(open=1, close=2)")
