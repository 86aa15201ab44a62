"""A training run to be killed: python victim.py DATASET FOLDER.

It has everything that a resumed run could forget: noise from torch's generator in the forward
pass, two optimizers, a carried state for each of two parts of a batch, evaluations, and a
checkpoint after nearly every step, so that many kills strike in the middle of a save.
"""

import sys

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


CONFIG = TrainConfig(steps=300, batch_size=4, length=16, lr=5e-3, optimizer="muon", tbptt=True,
                     accumulation=2, precision="fp32", eval_every=40, eval_tokens=64,
                     checkpoint_every=7, checkpoint_seconds=0.01, keep=3)

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    train("noisy_gru", open_dataset(sys.argv[1]), CONFIG, sys.argv[2], device="cpu", quiet=True,
          model_options={"d_model": 16, "n_layers": 2, "channel": None})
