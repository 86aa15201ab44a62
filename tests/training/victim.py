"""A training run to be killed.

It has everything that a resumed run could forget: noise from torch's generator in the forward
pass, two optimizers, a carried state for each of two parts of a batch, evaluations, and a
checkpoint after nearly every step, so that many kills strike in the middle of a save.
"""

import torch

from manyform import mixer
from manyform.data import open_dataset
from manyform.mixers.recurrent import GRU
from manyform.training import TrainConfig, train


@mixer("noisy_gru")
class NoisyGRU(GRU):
    """A GRU with dropout on its input."""

    def forward(self, x, state=None, *, reset=None):
        return super().forward(torch.nn.functional.dropout(x, 0.1, self.training), state,
                               reset=reset)


SETTINGS = dict(batch_size=4, length=16, lr=5e-3, optimizer="muon", tbptt=True, accumulation=2,
                precision="fp32", eval_every=20, eval_tokens=64, checkpoint_every=7,
                checkpoint_seconds=0.03, keep=3)


def run(dataset, folder, steps):
    """Train `steps` steps in `folder` on the stored tokens in `dataset`, or go on with it."""
    torch.set_num_threads(1)
    train("noisy_gru", open_dataset(dataset), TrainConfig(steps=steps, **SETTINGS), folder,
          device="cpu", quiet=True, model_options={"d_model": 16, "n_layers": 2, "channel": None})
