import math

import pytest
import torch

import manyform
from manyform import ManyformError
from manyform.training import evaluate


@pytest.fixture
def model(dataset):
    torch.manual_seed(0)
    return manyform.create("gru", vocab_size=dataset.vocab_size, d_model=16, n_layers=1)


def test_the_mean_over_all_targets(model, dataset):
    whole = evaluate(model, dataset.validation(32, batch_size=1000), precision="fp32")
    parts = evaluate(model, dataset.validation(32, batch_size=3), precision="fp32")
    assert parts.nats == pytest.approx(whole.nats, rel=1e-5)
    assert parts.tokens == whole.tokens
    assert whole.bits_per_byte == pytest.approx(whole.nats / math.log(2))  # a byte a token
    assert model.training


def test_a_model_that_knows_nothing(model, dataset):
    with torch.no_grad():
        model.head.weight.zero_()
    found = evaluate(model, dataset.validation(32), precision="fp32")
    assert found.nats == pytest.approx(math.log(256), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(8, rel=1e-5)


def test_nothing_to_evaluate_on(model):
    with pytest.raises(ManyformError, match="nothing to evaluate"):
        evaluate(model, [])
