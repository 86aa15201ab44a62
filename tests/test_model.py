"""The model: contract, positions, loss, cost, files."""

import json

import pytest
import torch

import manyform
from manyform.model import document_positions, sinusoidal


def small(name="gru", **options):
    torch.manual_seed(0)
    return manyform.create(name, **{"vocab_size": 11, "d_model": 16, "n_layers": 2, **options})


def test_loss_is_the_mean_over_counted_targets():
    model = small()
    tokens, targets = torch.randint(0, 11, (2, 8)), torch.randint(0, 11, (2, 8))
    targets[0, :3] = -100
    loss, _ = model.loss(tokens, targets)
    logits, _ = model(tokens)
    want = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), targets.reshape(-1))
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "alibi", "none"])
def test_positions_restart_with_a_document_and_go_on_with_a_state(position):
    model = small("llama", position=position).double()
    tokens = torch.randint(0, 11, (1, 12))
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 5] = True
    packed, _ = model(tokens, reset=reset)
    alone, _ = model(tokens[:, 5:])
    torch.testing.assert_close(packed[:, 5:], alone)
    _, state = model(tokens[:, :4], reset=reset[:, :4])
    later, _ = model(tokens[:, 4:], state, reset=reset[:, 4:])
    torch.testing.assert_close(later, packed[:, 4:])


def test_document_positions():
    reset = torch.tensor([[False, False, True, False], [True, False, False, False]])
    got = document_positions(torch.tensor([7, 3]), 4, reset)
    assert got.tolist() == [[7, 8, 0, 1], [0, 1, 2, 3]]


def test_sinusoidal_positions_by_the_formula():
    got = sinusoidal(torch.tensor([3]), 4)
    want = torch.tensor([[3.0, 3 / 100, 3.0, 3 / 100]])
    torch.testing.assert_close(got, torch.cat([want[:, :2].sin(), want[:, 2:].cos()], 1))


def test_past_the_learned_positions_is_refused():
    model = small("gpt2", max_length=8)
    _, state = model(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(manyform.ManyformError, match="past the learned position table of 8 rows"):
        model(torch.zeros(1, 1, dtype=torch.int64), state)


def test_cost_adds_up_and_names_the_paths():
    model = small(tie=False, channel=None)
    cost = model.cost(100)
    assert cost.params == 11 * 16 * 2 + 2 * (2 * 3 * 16 * 16 + 2 * 3 * 16)
    assert cost.flops == 100 * (2 * 2 * 2 * 3 * 16 * 16 + 2 * 16 * 11)
    assert cost.state_bytes == 8 + 2 * 16 * 4
    assert cost.training_flops_per_token == 3 * cost.flops / 100
    assert cost.paths["recurrent_layer"] == "numba"
    with pytest.raises(manyform.ManyformError, match="length must be at least 1"):
        model.cost(0)


def test_bad_tokens_are_refused():
    with pytest.raises(manyform.ManyformError, match=r"tokens must be \(batch, length\) int64"):
        small()(torch.zeros(3))


def test_damaged_files_are_named(tmp_path):
    model = small()
    with pytest.raises(manyform.ManyformError, match="holds no saved model"):
        manyform.load(tmp_path)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 32}))
    with pytest.raises(manyform.ManyformError, match="do not fit"):
        manyform.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(manyform.ManyformError, match="unknown configuration key 'depth'"):
        manyform.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(manyform.ManyformError, match="cannot be read"):
        manyform.load(tmp_path)


@pytest.mark.parametrize("name", [e.name for e in manyform.catalog() if e.causal])
def test_no_tokens_change_nothing(name):
    model = manyform.create(name, vocab_size=17, d_model=32).double().eval()
    tokens, none = torch.randint(17, (2, 5)), torch.zeros(2, 0, dtype=torch.int64)
    with torch.no_grad():
        for state in (None, model(tokens)[1]):
            logits, after = model(none, state, reset=none.bool())
            assert logits.shape == (2, 0, 17)
            torch.testing.assert_close(model(tokens, after)[0], model(tokens, state)[0])
