import pytest

from manyform import ManyformError
from manyform.training import TrainConfig, learning_rate


def test_length_of_a_run_in_steps_or_tokens():
    assert TrainConfig().total_steps == 1000
    assert TrainConfig(steps=7).total_steps == 7
    assert TrainConfig(tokens=10_000, batch_size=4, length=32).total_steps == 78
    with pytest.raises(ManyformError, match="not both"):
        TrainConfig(steps=1, tokens=1)


@pytest.mark.parametrize(("key", "value"), [
    ("steps", 0), ("batch_size", 0), ("length", 1.5), ("lr", 0.0), ("optimizer", "sgd"),
    ("schedule", "wdd"), ("precision", "fp16"), ("decay", 1.5), ("clip", -1.0), ("keep", 0),
    ("betas", (0.9, 1.0)), ("momentum", 1.0), ("warmup", -1), ("checkpoint_seconds", 0),
    ("accumulation", 17), ("eval_every", -1), ("patience", 0)])
def test_bad_settings_are_named(key, value):
    with pytest.raises(ManyformError, match=key):
        TrainConfig(**{key: value})


def test_round_trip():
    config = TrainConfig(steps=3, betas=(0.8, 0.9), clip=None)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ManyformError, match="did you mean 'steps'"):
        TrainConfig.from_dict({"step": 3})


def test_wsd():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.2, final_lr=0.1)
    rates = [learning_rate(s, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[99] == pytest.approx(0.1 + 0.9 * 0.05)


def test_cosine_and_constant():
    cosine = TrainConfig(steps=100, lr=2.0, warmup=0, schedule="cosine")
    assert learning_rate(0, cosine) == pytest.approx(2.0)
    assert learning_rate(50, cosine) == pytest.approx(1.0)
    assert learning_rate(99, cosine) < 0.01
    constant = TrainConfig(steps=100, lr=2.0, warmup=0.1, schedule="constant")
    assert learning_rate(4, constant) == pytest.approx(1.0)
    assert learning_rate(99, constant) == 2.0
