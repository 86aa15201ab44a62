"""The probes: well-posed, seeded, and solvable by what should solve them."""

import math

import pytest
import torch

from manyform.errors import ManyformError
from manyform.lab.measure import run_probe
from manyform.lab.probes import PROBES, TESTED, examples, mqar, score, wilson


def test_recall_asks_for_the_value_of_each_key_once():
    tokens, targets = mqar(16, 48, torch.Generator().manual_seed(0), pairs=8, symbols=32)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        store = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(store) == 8
        asked = {k: v for k, v in zip(row, answers, strict=True) if v != -100}
        assert asked == store
        assert all(1 <= k <= 32 < v <= 64 for k, v in store.items())


def test_parity_is_the_running_one():
    tokens, targets = examples(PROBES["parity"], 0, 0, 4, 10)
    assert targets[:, -1].tolist() == (tokens.sum(1) % 2).tolist()


def test_examples_are_a_function_of_stream_and_index():
    probe = PROBES["mqar"]
    assert torch.equal(examples(probe, 0, 3, 4, 48)[0], examples(probe, 0, 3, 4, 48)[0])
    assert not torch.equal(examples(probe, 0, 3, 4, 48)[0], examples(probe, 1, 3, 4, 48)[0])
    assert not torch.equal(examples(probe, 0, 3, 4, 48)[0], examples(probe, 0, 4, 4, 48)[0])


def test_wilson_against_published_values():
    # Newcombe 1998, table I, method 3: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_probe_reports_chance_and_an_interval_and_can_be_repeated():
    first = run_probe("gru", PROBES["parity"], 10, torch.device("cpu"))
    again = run_probe("gru", PROBES["parity"], 10, torch.device("cpu"))
    assert first["chance"] == 0.5
    assert first["low"] < first["accuracy"] < first["high"]
    assert first["accuracy"] == again["accuracy"]
    assert "3 steps" in first["setting"]
    assert first["answers"] == 64
    assert first["bits"] == pytest.approx(-first["log_prob"] / math.log(2))
    assert {k: first[k] for k in ("bits", "exact_bits", "brier", "exact", "bits_at_train_length")} \
        == {k: again[k] for k in ("bits", "exact_bits", "brier", "exact", "bits_at_train_length")}


class Known(torch.nn.Module):
    """Gives every token of parity's answers the chances it is told: first of the right one."""

    def __init__(self, right):
        super().__init__()
        self.chances = torch.nn.Parameter(torch.tensor(right))

    def forward(self, tokens):
        answer = tokens.cumsum(1) % 2
        right = self.chances[:tokens.shape[1]].expand(tokens.shape)
        return torch.stack([torch.where(answer == k, right, 1 - right) for k in (0, 1)],
                           -1).log(), None


def test_the_twins_are_of_the_answers_that_were_scored():
    last, whole = score(Known([0.9, 0.6, 0.8]), PROBES["parity"], 3)
    assert last.exact == whole.exact == 1.0
    assert (last.items, last.tokens, whole.tokens) == (TESTED, 1, 3)
    assert last.log_prob == pytest.approx(math.log(0.8), rel=1e-6)
    assert last.bits == pytest.approx(-math.log2(0.8), rel=1e-6)
    assert last.brier == pytest.approx(2 * 0.2**2, rel=1e-5)
    assert whole.bits == pytest.approx(-math.log2(0.9 * 0.6 * 0.8) / 3, rel=1e-6)
    assert whole.brier == pytest.approx(2 * (0.1**2 + 0.4**2 + 0.2**2) / 3, rel=1e-5)
    last, whole = score(Known([0.9, 0.4, 0.8]), PROBES["parity"], 3)
    assert (last.exact, whole.exact) == (1.0, 0.0)


def test_of_recall_only_the_questions_are_scored():
    class Blank(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(33))
            self.logits.data[17:] = 20.0  # any value, never a key or a blank

        def forward(self, tokens):
            return self.logits.expand(*tokens.shape, 33), None
    last, whole = score(Blank(), PROBES["mqar"], 24)
    assert whole.tokens == 4
    assert last.bits == pytest.approx(4, abs=1e-4)
    assert whole.brier == pytest.approx(15 / 16, abs=1e-4)


def test_an_option_that_the_architecture_lacks_is_refused():
    with pytest.raises(ManyformError, match="unknown option"):
        run_probe("gru", PROBES["parity"], 1, torch.device("cpu"), options={"window": 3})
