"""Parity and modular arithmetic beyond the lengths of training, for gates and delta rules.

Grazzi 2024 (arXiv:2411.12537), table 3, scaled accuracy of the best of 3 seeds after 20 thousand
steps (parity) or 100 thousand (arithmetic) of 256 rows, at lengths from 40 to 256. Parity comes out
so here with a thirtieth of the rows.

Not reproduced: arithmetic. After 1200 steps of 64 rows, a three-hundredth of the published
training, every model answers the first digits of an expression (0.16 to 0.42 of scaled accuracy
within the lengths of training, where two digits are 0.1) and none anything beyond them, so that the
low figures of mLSTM and Mamba say nothing yet either.
"""

import pytest
import torch
from tests.behaviour import runs, tasks

pytestmark = pytest.mark.slow
SOURCE = "Grazzi 2024 (arXiv:2411.12537), table 3"
SLSTM = dict(d_model=64, n_heads=1, weight_decay=0.1)  # as in xLSTM's own runs
DELTA = dict(n_heads=4, head_dim=8)
NEGATIVE = {**DELTA, "negative_eigenvalues": True}
PARITY, ARITHMETIC = (runs.bits, 2), (tasks.modular_arithmetic, tasks.MODULUS)
TRAINED = 40


def scaled(model, task, *, beyond):
    """Scaled accuracy (1 perfect, 0 chance) within the lengths of training, or at the positions
    from there to 255."""
    make, answers = task
    length, start = (256, TRAINED) if beyond else (TRAINED, 0)
    return tasks.scaled(tasks.accuracy(model, lambda g: make(128, length, g), beyond=start),
                        1 / answers)


def trained(name, task, steps, *, lr=3e-3, seed=0, d_model=32, **options):
    """Trained on lengths 3 to 40, until perfect beyond them or for `steps` steps."""
    make, answers = task
    vocab = answers if make is runs.bits else tasks.MODULUS + tasks.SIGNS

    def sample(step, generator):
        length = int(torch.randint(3, TRAINED + 1, (1,), generator=generator))
        return make(64, length, generator)
    return runs.train(name, sample, steps=steps, length=TRAINED, vocab=vocab, seed=seed, lr=lr,
                      d_model=d_model, stop=lambda m: scaled(m, task, beyond=True) > 0.999,
                      **options)


def found(model, task):
    return {where: scaled(model, task, beyond=where == "beyond") for where in ("within", "beyond")}


@pytest.mark.parametrize(("name", "claimed", "steps", "options"), [
    ("slstm", 1.0, 3000, SLSTM),
    ("mlstm", 0.087, 1000, {}),
    ("delta_net", 0.017, 1000, DELTA),
    ("delta_net", 1.0, 3000, NEGATIVE),
], ids=["slstm", "mlstm", "delta_net [0, 1]", "delta_net [-1, 1]"])
def test_parity(name, claimed, steps, options, record, request):
    shares = found(trained(name, PARITY, steps, **options), PARITY)
    good = shares["beyond"] > 0.9 if claimed == 1.0 else shares["beyond"] < 0.2
    record(f"parity, trained to 40, at 256: {request.node.callspec.id}", source=SOURCE,
           claim=f"{claimed:.3f} of scaled accuracy", reproduced=good, **shares)
    assert good


@pytest.mark.parametrize(("name", "claimed", "options"), [
    ("slstm", 0.787, SLSTM),
    ("mlstm", 0.040, {}),
    ("mamba", 0.095, {}),
    ("delta_net", 0.314, DELTA),
    ("delta_net", 0.971, NEGATIVE),
], ids=["slstm", "mlstm", "mamba", "delta_net [0, 1]", "delta_net [-1, 1]"])
def test_modular_arithmetic(name, claimed, options, record, request):
    shares = found(trained(name, ARITHMETIC, 1200, **options), ARITHMETIC)
    record(f"arithmetic modulo 5, trained to 40, at 256: {request.node.callspec.id}",
           source=SOURCE, claim=f"{claimed:.3f} of scaled accuracy", **shares,
           reproduced=shares["within"] > 0.9 and abs(shares["beyond"] - claimed) < 0.1)
    assert shares["within"] > 0.12
