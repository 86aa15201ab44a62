"""The probes: well-posed, seeded, and solvable by what should solve them."""

import pytest
import torch

from manyform.errors import ManyformError
from manyform.lab.measure import run_probe
from manyform.lab.probes import PROBES, examples, mqar, wilson


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


def test_an_option_that_the_architecture_lacks_is_refused():
    with pytest.raises(ManyformError, match="unknown option"):
        run_probe("gru", PROBES["parity"], 1, torch.device("cpu"), options={"window": 3})
