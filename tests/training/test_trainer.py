import copy
from types import SimpleNamespace

import pytest
import torch

import manyform
from manyform import ManyformError
from manyform.config import LayerSpec, ModelConfig
from manyform.model import Model
from manyform.training import TrainConfig, Trainer


class RandomBatches:
    """Batches of random tokens, for tests that need no text."""

    def __init__(self, rows=4, length=12, vocab=11, ignore=0.0):
        self.rows, self.length, self.vocab, self.ignore = rows, length, vocab, ignore

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        window = torch.randint(0, self.vocab, (self.rows, self.length + 1), generator=generator)
        targets = window[:, 1:].clone()
        skip = torch.rand(targets.shape, generator=generator) < self.ignore
        targets[skip] = -100
        return SimpleNamespace(tokens=window[:, :-1], targets=targets, reset=None)


def build(name="gru", seed=0, **options):
    torch.manual_seed(seed)
    return manyform.create(name, vocab_size=11, d_model=16, n_layers=1, **options)


def config(**changes):
    return TrainConfig(**{"steps": 20, "batch_size": 4, "length": 12, "precision": "fp32",
                          "lr": 1e-2, **changes})


def gradients(trainer, batch):
    trainer._gradients(batch)
    return [p.grad.clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_gives_the_gradients_of_the_whole_batch(parts):
    batches = RandomBatches(ignore=0.4)  # parts with different numbers of targets
    whole = Trainer(build().double(), batches, config())
    cut = Trainer(build().double(), batches, config(accumulation=parts))
    for a, b in zip(gradients(whole, batches.batch(0)), gradients(cut, batches.batch(0)),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    loss = [t.step().loss for t in (whole, cut)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-9)


def test_training_lowers_the_loss():
    batches = RandomBatches()
    batches.batch = lambda step: RandomBatches.batch(batches, 0)
    trainer = Trainer(build(), batches, config(steps=60))
    first = trainer.step()
    while not trainer.done:
        last = trainer.step()
    assert last.step == 59
    assert last.loss < 0.7 * first.loss
    assert trainer.tokens == 60 * 48
    assert first.flops == pytest.approx(3 * trainer.model.cost(12).flops * 4)


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"tbptt": True},
                                     {"tbptt": True, "accumulation": 2}])
def test_state_dict_continues_bit_for_bit(options):
    trainer = Trainer(build(), RandomBatches(), config(**options))
    for _ in range(4):
        trainer.step()
    saved = copy.deepcopy(trainer.state_dict())
    after = [trainer.step() for _ in range(4)]
    other = Trainer(build(seed=1), RandomBatches(), config(**options))
    other.load_state_dict(saved)
    again = [other.step() for _ in range(4)]
    assert [(r.loss, r.grad_norm, r.lr) for r in after] == [
        (r.loss, r.grad_norm, r.lr) for r in again]
    assert all(torch.equal(a, b) for a, b in zip(
        trainer.model.parameters(), other.model.parameters(), strict=True))


def test_carried_state_changes_what_a_step_sees():
    carried = Trainer(build(), RandomBatches(), config(tbptt=True))
    plain = Trainer(build(), RandomBatches(), config())
    assert carried.step().loss == plain.step().loss
    assert carried.step().loss != plain.step().loss


def test_tbptt_is_refused_where_the_state_grows():
    config_ = ModelConfig(vocab_size=11, d_model=16, n_layers=1, position="learned",
                          pattern=(LayerSpec("gru"),))
    with pytest.raises(ManyformError, match="position table"):
        Trainer(Model(config_), RandomBatches(), config(tbptt=True))
    grown = build()
    grown.blocks[0].mixer.__class__ = type("Growing", (type(grown.blocks[0].mixer),),
                                           {"growth": ("linear", "quadratic")})
    with pytest.raises(ManyformError, match="Growing grows"):
        Trainer(grown, RandomBatches(), config(tbptt=True))


def test_a_step_that_is_not_finite_changes_nothing_but_the_place():
    trainer = Trainer(build(), RandomBatches(), config(tbptt=True))
    trainer.step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    hook = trainer.model.final_norm.register_forward_hook(lambda *a: a[-1] * float("nan"))
    result = trainer.step()
    hook.remove()
    assert result.event == "non-finite"
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
    assert (trainer.step_count, trainer.position) == (2, 2)
    assert trainer.step().event == ""  # no state that is not finite was carried on


def test_clip_bounds_the_gradient():
    loose = Trainer(build(), RandomBatches(), config(clip=None, spike=0.0))
    tight = Trainer(build(), RandomBatches(), config(clip=1e-3))
    norms = []
    for trainer in (loose, tight):
        trainer.optimizer.step = lambda lr, t=trainer: norms.append(
            torch.nn.utils.get_total_norm(t.optimizer.gradients()).item())
        trainer.step()
    assert norms[0] > 1e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-4)


def test_bf16_stays_near_fp32():
    results = [Trainer(build("llama"), RandomBatches(), config(precision=p)).step()
               for p in ("fp32", "bf16")]
    assert results[0].loss == pytest.approx(results[1].loss, rel=2e-2)
    assert results[0].loss != results[1].loss
