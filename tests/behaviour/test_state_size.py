"""How much a fixed state can recall: multi-query associative recall against state size.

Arora 2023 (arXiv:2312.04927), figure 2: attention 1.0 at every width, convolutions and fixed states
fall behind; Arora 2024 (Based, arXiv:2402.18668), figure 2: recall rises with the bytes of the
state, and at equal bytes some states hold more than others.

Here, at width 32 and 1500 steps of 64 rows: of 8 pairs attention recalls 0.998, a delta rule 0.98
with enough state and 0.15 with a small one; of 4 pairs Mamba-2 0.94 and 0.34, where 0.33 is knowing
which values came and not with which key. It needs a head with weights of its own and a greater
learning rate: with the embedding's, at 4e-3, it stays at 0.34 (docs/lab-notes.md). Not reproduced:
linear attention, as yet trained with the tied head only, stays at 0.33. Its figures are recorded
and not asserted.
"""

import pytest
from tests.behaviour import runs, tasks

pytestmark = pytest.mark.slow
SOURCE = "Arora 2024 (arXiv:2402.18668), figure 2"
WIDTH = 32
SIZES = {"linear_attention": (4, {}, dict(n_heads=16), dict(n_heads=1)),
         "mamba2": (4, dict(lr=1e-2, tie=False), dict(d_state=1, head_dim=16),
                    dict(d_state=32, head_dim=16)),
         "gated_delta_net": (8, {}, dict(n_heads=8, head_dim=2), dict(n_heads=2, head_dim=16))}
"""For each the number of pairs, among 4 times as many symbols, what its training changes, a small
state and a large one."""


def recalled(mixer, pairs, training, **options):
    """Right answers of a short convolution and, above it, the mixer, as the baselines
    of Arora 2024 stand; and the bytes of the state after all tokens."""
    def recall(rows):
        return lambda generator: tasks.associative_recall(rows, pairs, 4 * pairs, generator)
    options = ", ".join(f"{k}={v}" for k, v in options.items())
    model = runs.train(f"gated_conv : {mixer}({options})", lambda step, g: recall(64)(g),
                       steps=1500, length=3 * pairs, vocab=8 * pairs, d_model=WIDTH,
                       stop=lambda m: tasks.accuracy(m, recall(256)) > 0.995,
                       **{"lr": 4e-3, **training})
    return tasks.accuracy(model, recall(512)), model.cost(3 * pairs).state_bytes


def test_attention_recalls(record):
    share, size = recalled("attention", 8, {}, head_dim=32)
    record("multi-query recall of 8 pairs: attention", claim="1.0 at every width",
           source="Arora 2023 (arXiv:2312.04927), figure 2", reproduced=share > 0.95, share=share,
           state_bytes=size)
    assert share > 0.95


@pytest.mark.parametrize("name", SIZES)
def test_recall_rises_with_the_state(name, record):
    pairs, training, *sizes = SIZES[name]
    (small, few), (large, many) = (recalled(name, pairs, training, **options) for options in sizes)
    record(f"multi-query recall of {pairs} pairs: {name}", source=SOURCE,
           claim="recall rises with the bytes of the state", reproduced=large > small + 0.5,
           share=[small, large], state_bytes=[few, many], chance=1 / (4 * pairs))
    assert many > 3 * few
    if name != "linear_attention":
        assert large > small + 0.5
