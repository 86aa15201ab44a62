"""Recall and extrapolation."""

import pytest
import torch
from tests.behaviour import runs

import manyform
import manyform.data

pytestmark = pytest.mark.slow
PAIRS, SYMBOLS = 12, 48


def recall(rows, generator):
    """Multi-query associative recall (Arora 2023, section 3): pairs, then every key again."""
    keys = 1 + torch.rand(rows, SYMBOLS, generator=generator).argsort(1)[:, :PAIRS]
    values = 1 + SYMBOLS + torch.randint(SYMBOLS, (rows, PAIRS), generator=generator)
    order = torch.rand(rows, PAIRS, generator=generator).argsort(1)
    tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
    targets = torch.full_like(tokens, -100)
    targets[:, 2 * PAIRS:] = values.gather(1, order)
    return tokens, targets


@torch.no_grad()
def recall_accuracy(model):
    tokens, targets = recall(512, torch.Generator().manual_seed(99))
    model.eval()
    got = model(tokens)[0].argmax(-1)
    model.train()
    asked = targets >= 0
    return float((got[asked] == targets[asked]).double().mean())


def trained(name, **options):
    return runs.train(name, lambda step, g: recall(64, g), steps=6000, length=3 * PAIRS,
                      vocab=1 + 2 * SYMBOLS, lr=2e-3, weight_decay=0.1,
                      stop=lambda m: recall_accuracy(m) > 0.995, **options)


def test_attention_recalls_where_a_small_fixed_state_cannot(record):
    attention = recall_accuracy(trained("llama", head_dim=64))
    small = recall_accuracy(trained("mamba", d_state=1, expand=1))
    good = attention > 0.95 and small < 0.7
    record(f"multi-query recall of {PAIRS} pairs: attention and a small state",
           claim="attention 1.0 at every width, a fixed state falls behind",
           source="Arora 2023 (arXiv:2312.04927), figure 2", reproduced=good, llama=attention,
           mamba_with_1_state_a_channel=small, chance=1 / SYMBOLS)
    assert good


TRAINED = 64


@torch.no_grad()
def loss_at(model, data, length):
    """Bits per byte of the same bytes (16 at each of 16 places) with `length` bytes to read."""
    ends = range(8 * TRAINED, 8 * TRAINED + 16 * 600, 600)
    rows = torch.stack([data[e - length:e + 1] for e in ends])
    model.eval()
    logits = model(rows[:, :-1])[0][:, -16:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, -16:].flatten())
    model.train()
    return float(loss) / 0.6931471805599453


def test_alibi_extrapolates_where_learned_positions_break(record):
    data = manyform.data.load(None, tokenizer="bytes", max_bytes=2_000_000)
    batches = data.batches(batch_size=32, length=TRAINED, seed=0)

    def sample(step, generator):
        batch = batches.batch(step)
        return batch.tokens, batch.targets
    validation = torch.cat([b.tokens.flatten() for b in data.validation(512, 20_000)])
    found = {}
    for name in ("alibi", "gpt2"):
        model = runs.train(name, sample, steps=1200, length=TRAINED, vocab=data.vocab_size, rows=32,
                           lr=3e-3, d_model=128, layers=2, max_length=8 * TRAINED, head_dim=16)
        found[name] = [loss_at(model, validation, n) for n in (TRAINED, 8 * TRAINED)]
    ratios = {name: far / near for name, (near, far) in found.items()}
    good = ratios["alibi"] < 1.1 and ratios["gpt2"] > 1.2
    record(f"bits per byte at {TRAINED} / {8 * TRAINED}, trained at {TRAINED}: ALiBi and learned "
           "positions", claim="ALiBi holds or improves at longer inputs, others break",
           source="Press 2021 (arXiv:2108.12409), figure 1", reproduced=good, **found)
    assert good
