"""Reading further than trained: rotary positions, interpolated ones, ALiBi.

Press 2021 (arXiv:2108.12409), figure 1: rotary positions break some hundred tokens past the length
of training, ALiBi holds or improves. Chen 2023 (arXiv:2306.15595): past that length rotary scores
are ruined, interpolated ones stay bounded, and after a little training at the new length (at most
1000 steps) a model reads it about as well as it read the old one, where plain rotary positions need
far more training.

Here (two layers of width 64, from 64 bytes to 512): rotary positions go from 2.23 bits per byte to
5.03, interpolated ones are at 4.36 at every length before, and at 2.82 after 60 steps of training;
ALiBi goes from 2.62 to 2.64. Not reproduced at this size: plain rotary positions learn the new
length as fast (2.67 after the same 60 steps). Neighbouring bytes matter most to so small a model,
and eightfold interpolation is hardest on them.
"""

import copy

import pytest
import torch
from tests.behaviour import runs

import manyform
import manyform.data
from manyform.training import TrainConfig
from manyform.training.trainer import Trainer

pytestmark = pytest.mark.slow
PRESS, CHEN = "Press 2021 (arXiv:2108.12409), figure 1", "Chen 2023 (arXiv:2306.15595)"
TRAINED, LENGTHS = 64, (64, 128, 256, 512)
FACTOR = LENGTHS[-1] // TRAINED


@torch.no_grad()
def bits(model, data, length):
    """Bits per byte of the same bytes, 16 at each of 32 places, with `length` bytes to read."""
    ends = range(LENGTHS[-1], LENGTHS[-1] + 32 * 300, 300)
    rows = torch.stack([data[e - length:e + 1] for e in ends])
    model.eval()
    logits = model(rows[:, :-1])[0][:, -16:]
    model.train()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, -16:].flatten())
    return float(loss) / 0.6931471805599453


def sampler(data, rows, length):
    batches = data.batches(batch_size=rows, length=length, seed=0)

    def sample(step, generator):
        batch = batches.batch(step)
        return batch.tokens, batch.targets
    return sample


def tuned(model, data, steps):
    """A copy, trained for `steps` steps at the greatest length."""
    model = copy.deepcopy(model)
    trainer = Trainer(model, runs.Made(sampler(data, 4, LENGTHS[-1]), 1), TrainConfig(
        steps=steps, batch_size=4, length=LENGTHS[-1], lr=1e-3, schedule="constant", warmup=0.1,
        precision="fp32", spike=0.0))
    while not trainer.done:
        trainer.step()
    return model


def interpolated(model, name, **options):
    other = manyform.create(name, **options, rope_scaling={"type": "linear", "factor": FACTOR})
    other.load_state_dict(model.state_dict())
    return other


def test_alibi_and_interpolation_reach_beyond_the_training_length(record):
    data = manyform.data.load(None, tokenizer="bytes", max_bytes=2_000_000)
    validation = torch.cat([b.tokens.flatten() for b in data.validation(512, 20_000)])
    sizes = dict(head_dim=16, d_model=64)
    models = {name: runs.train(name, sampler(data, 32, TRAINED), steps=800, length=TRAINED,
                               vocab=data.vocab_size, rows=32, lr=3e-3, layers=2, **sizes)
              for name in ("llama", "alibi")}
    models["rotary"] = models.pop("llama")
    models["interpolated"] = interpolated(models["rotary"], "llama", vocab_size=data.vocab_size,
                                          n_layers=2, **sizes)
    for name in ("rotary", "interpolated"):
        models[f"{name}_tuned"] = tuned(models[name], data, 60)
    found = {name: [bits(model, validation, n) for n in LENGTHS]
             for name, model in models.items()}
    near, far = ({name: shares[at] for name, shares in found.items()} for at in (0, -1))
    alibi = far["alibi"] < 1.1 * near["alibi"] and far["rotary"] > 1.5 * near["rotary"]
    bounded = (far["interpolated"] < 1.1 * near["interpolated"]
               and far["interpolated"] < 0.95 * far["rotary"])
    lengths = f"bits per byte at {' / '.join(map(str, LENGTHS))}, trained at {TRAINED}"
    record(f"{lengths}: ALiBi and rotary positions", claim="ALiBi holds, rotary positions break",
           source=PRESS, reproduced=alibi, **{k: found[k] for k in ("alibi", "rotary")})
    record(f"{lengths}: interpolated rotary positions", source=CHEN,
           claim="bounded beyond the trained length, and after a little training there far ahead "
                 "of plain rotary positions with the same", reproduced=bounded and
           far["interpolated_tuned"] < 0.95 * far["rotary_tuned"],
           **{k: v for k, v in found.items() if "interpolated" in k or "tuned" in k})
    assert alibi
    assert bounded
    assert far["interpolated_tuned"] < 0.7 * far["rotary"]
