from types import SimpleNamespace

import pytest
import torch

import manyform
from manyform import ManyformError
from manyform.generation import Sampling, generate

VOCAB = 13


@pytest.fixture(scope="module", params=["gru", "llama"])
def model(request):
    torch.manual_seed(0)
    built = manyform.create(request.param, vocab_size=VOCAB, d_model=16, n_layers=2)
    with torch.no_grad():  # sharp enough that choices differ
        built.head.weight.mul_(40)
    return built


@pytest.fixture
def prompt():
    return torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))


def by_hand(model, tokens, new):
    """The likeliest continuation, each token from the whole text anew."""
    for _ in range(new):
        logits, _ = model(tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[:, -new:]


def test_greedy_equals_the_whole_text_anew(model, prompt):
    found = model.generate(prompt, 9, greedy=True)
    assert torch.equal(found.tokens, by_hand(model, prompt, 9))
    assert found.lengths.tolist() == [9, 9, 9]
    assert found.state.position.tolist() == [16, 16, 16]


def test_a_long_prompt_is_read_in_chunks(model, prompt, monkeypatch):
    whole = model.generate(prompt, 5, greedy=True).tokens
    monkeypatch.setattr("manyform.generation._PREFILL", 3)
    assert torch.equal(model.generate(prompt, 5, greedy=True).tokens, whole)


def test_continued_from_a_state(model, prompt, tmp_path):
    whole = model.generate(torch.cat([prompt, prompt], 1), 6, greedy=True)
    _, state = model(prompt)
    manyform.state.save(state, tmp_path / "state")
    state = manyform.state.load(tmp_path / "state", model.initial_state(3))
    for _ in range(2):  # the state given is not changed
        assert torch.equal(model.generate(prompt, 6, greedy=True, state=state).tokens,
                           whole.tokens)
    first = model.generate(prompt, 4, greedy=True)
    text = torch.cat([prompt, first.tokens, prompt], 1)
    assert torch.equal(model.generate(prompt, 5, greedy=True, state=first.state).tokens,
                       by_hand(model, text, 5))


def test_the_seed_decides_each_row_alone(model, prompt):
    whole = model.generate(prompt, 20, seed=5).tokens
    assert torch.equal(model.generate(prompt, 20, seed=5).tokens, whole)
    assert not torch.equal(model.generate(prompt, 20, seed=6).tokens, whole)
    assert torch.equal(model.generate(prompt[2:], 20, seed=7).tokens, whole[2:])
    swapped = model.generate(prompt.flip(0), 20, seed=[7, 6, 5]).tokens
    assert torch.equal(swapped.flip(0), whole)


def test_stream_and_stop(model, prompt):
    seen = []
    free = model.generate(prompt, 12, seed=0)
    stop = int(free.tokens[0, 4])
    found = model.generate(prompt, 12, seed=0, stop=stop, stream=seen.append)
    assert torch.equal(torch.stack(seen, 1), found.tokens)
    for row, free_row, length in zip(found.tokens, free.tokens, found.lengths, strict=True):
        hits = (free_row == stop).nonzero()
        expected = int(hits[0]) + 1 if len(hits) else 12
        assert length == expected
        assert torch.equal(row[:length], free_row[:length])
        assert bool((row[length:] == stop).all())
    assert model.generate(prompt[:1], 12, seed=0, stop={stop}).tokens.shape == (
        1, int(found.lengths[0]))


def test_no_new_tokens_reads_the_prompt(model, prompt):
    found = model.generate(prompt, 0)
    assert found.tokens.shape == (3, 0)
    assert found.state.position.tolist() == [7, 7, 7]


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "greedy=True"), ({"temperature": -1.0}, "positive"),
    ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"min_p": 1.5}, "min_p"),
    ({"greedy": True, "top_k": 3}, "top_k cannot apply"),
    ({"greedy": True, "temperature": 0.5}, "temperature cannot apply"),
    ({"greedy": True, "seed": 1}, "seed cannot apply"),
    ({"stop": VOCAB}, "stop token"), ({"seed": [1]}, "1 seeds were given for 3 rows")])
def test_options_that_cannot_apply(model, prompt, options, message):
    with pytest.raises(ManyformError, match=message):
        model.generate(prompt, 2, **options)


def test_bad_prompts(model, prompt):
    for bad, message in ((prompt[:, :0], "at least one token"), (prompt[0], "batch, length"),
                         (prompt.float(), "int64"), (prompt + VOCAB, "outside the vocabulary"),
                         (prompt - VOCAB, "outside the vocabulary")):
        with pytest.raises(ManyformError, match=message):
            model.generate(bad, 2)
    with pytest.raises(ManyformError, match="max_new_tokens"):
        model.generate(prompt, -1)
    with pytest.raises(ManyformError, match="2 rows and the prompt 3"):
        model.generate(prompt, 2, state=model.initial_state(2))


def test_a_model_that_looks_ahead_is_refused(prompt):
    with pytest.raises(ManyformError, match="not causal"):
        generate(SimpleNamespace(causal=False), prompt, 3)


LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0]])


def shares(sampling, logits=LOGITS, n=2000):
    """How often each token is drawn at evenly spread uniform numbers: (batch, vocab)."""
    count = torch.zeros_like(logits)
    for i in range(n):
        count[torch.arange(len(logits)),
              sampling.draw(logits, lambda u=(i + 0.5) / n: [u] * len(logits))] += 1
    return count / n


@pytest.mark.parametrize(("options", "kept"), [
    ({}, 5), ({"temperature": 2.0}, 5), ({"top_k": 2}, 2), ({"top_k": 99}, 5), ({"top_p": 0.7}, 2),
    ({"top_p": 1e-9}, 1), ({"min_p": 0.1}, 3), ({"top_k": 4, "top_p": 0.9, "min_p": 0.01}, 3),
    ({"min_p": 0.1, "top_p": 0.7}, 2), ({"min_p": 1.0}, 1)])
def test_draws_follow_the_distribution(options, kept):
    expected = (LOGITS[0] / options.get("temperature", 1.0)).softmax(-1)
    expected[kept:] = 0
    expected /= expected.sum()
    found = shares(Sampling(**options))
    torch.testing.assert_close(found[0], expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1], expected.flip(0), atol=2e-3, rtol=0)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")]])
    for u in (0.0, 0.5, 1 - 1e-16):
        for options in ({}, {"top_p": 0.99}, {"top_k": 4}):
            assert int(Sampling(**options).draw(logits, lambda u=u: [u])) in (1, 3)
