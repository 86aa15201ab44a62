"""What a layer's paper asks for must arrive in the update, whichever optimizer makes it."""

import pytest
import torch
from torch import nn

from manyform import Hint, ManyformError
from manyform.channels import MLP
from manyform.config import LayerSpec, ModelConfig
from manyform.model import Model
from manyform.training import TrainConfig, param_groups
from manyform.training.optimizer import Optimizer


class Hinted(MLP):
    """An MLP that asks for twice the rate on one matrix and no decay on the other."""

    def __init__(self, d_model, **options):
        super().__init__(d_model, **options)
        self.table = nn.Parameter(torch.ones(4, d_model))

    def hints(self):
        return {"up.weight": Hint(lr_scale=2.0), "down.weight": Hint(weight_decay=False),
                "table": Hint(lr_scale=0.5)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = Model(ModelConfig(vocab_size=11, d_model=16, n_layers=1, tie=False,
                              pattern=(LayerSpec("gru", channel="mlp"),)))
    built.blocks[0].channel = Hinted(16)
    return built


UP, DOWN, TABLE = (f"blocks.0.channel.{n}" for n in ("up.weight", "down.weight", "table"))
GRU = "blocks.0.mixer.input_weight"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_hold_the_hints(model, optimizer):
    groups = param_groups(model, TrainConfig(optimizer=optimizer, lr=0.01, weight_decay=0.3))
    of = {name: g for g in groups for name in g["names"]}
    assert set(of) == {name for name, _ in model.named_parameters()}
    assert of[UP]["lr_scale"] == 2.0
    assert of[UP]["lr"] == 0.02
    assert of[UP]["weight_decay"] == 0.3
    assert of[DOWN]["weight_decay"] == 0.0
    assert of["final_norm.weight"]["weight_decay"] == 0.0
    kinds = {name: g["kind"] for name, g in of.items()}
    assert kinds[UP] == kinds[GRU] == optimizer
    # Not maps between features: without decay, narrow, or outside the blocks.
    for name in (DOWN, TABLE, "embedding.weight", "head.weight", "final_norm.weight"):
        assert kinds[name] == "adamw"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_hints_reach_the_update(model, optimizer):
    config = TrainConfig(optimizer=optimizer, weight_decay=0.5, lr=0.01)
    params = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in params.items()}
    made = Optimizer(model, config)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    made.step(0.1)  # without a gradient only the decay, p <- p (1 - lr lr_scale decay), is left
    for name, factor in ((UP, 1 - 0.2 * 0.5), (DOWN, 1.0), (TABLE, 1 - 0.05 * 0.5),
                         (GRU, 1 - 0.1 * 0.5), ("final_norm.weight", 1.0)):
        torch.testing.assert_close(params[name].detach(), before[name] * factor)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rate_scales_the_step(model, optimizer):
    """The same gradient on two matrices of one shape: the hinted one moves twice as far."""
    config = TrainConfig(optimizer=optimizer, weight_decay=0.0, lr=0.01)
    other = MLP(16)
    model.blocks[0].channel.other = other.up
    made = Optimizer(model, config)
    gradient = torch.randn(64, 16)
    up, plain = model.blocks[0].channel.up.weight, other.up.weight
    before = up.detach().clone(), plain.detach().clone()
    up.grad, plain.grad = gradient.clone(), gradient.clone()
    made.step(0.03)
    torch.testing.assert_close(up.detach() - before[0], 2 * (plain.detach() - before[1]),
                               rtol=1e-4, atol=1e-6)
    assert (plain.detach() - before[1]).square().mean().sqrt() == pytest.approx(0.03, rel=0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_by_name(model, optimizer):
    config = TrainConfig(optimizer=optimizer)
    made = Optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    made.step(0.01)
    saved = {n: {k: v.clone() for k, v in s.items()} for n, s in made.state_dict().items()}
    fresh = Optimizer(model, config)
    fresh.load_state_dict(saved)
    again = fresh.state_dict()
    assert set(again) == {n for n, _ in model.named_parameters()}
    assert all(torch.equal(again[n][k], saved[n][k]) for n in saved for k in saved[n])
    with pytest.raises(ManyformError, match="elsewhere"):
        fresh.load_state_dict({"elsewhere": {}})
