"""Quick probes of two abilities that language-model loss hides: recall and state tracking.

Both are trained from nothing with one small model of each architecture, the same steps and the
same examples for all, and scored on fresh examples, one independent answer a sequence, so that
the binomial interval is honest. Every accuracy comes with its continuous twins, which move before
it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyform.scaling.emergence import Twins, twins

D_MODEL, N_LAYERS, BATCH, TESTED = 64, 2, 32, 512
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Probe:
    """sample(count, length, generator) -> (tokens, targets), both (count, length) int64, with
    -100 where nothing is asked. share: of the plan's probe steps that this one is trained for."""

    name: str
    vocab_size: int
    train_length: int
    test_length: int
    chance: float
    sample: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    setting: str
    share: float = 1.0

    def steps(self, planned: int) -> int:
        """Training steps, of the plan's number."""
        return max(1, round(self.share * planned))


def mqar(count: int, length: int, generator: torch.Generator, *, pairs: int = 4, symbols: int = 16,
         ) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Arora 2023, "Zoology", section 3).

    `pairs` distinct keys, each followed by its value, then every key once more at a random place
    among blanks; there the value is asked. Tokens: 0 blank, 1..symbols keys, then the values.
    """
    rank = torch.rand(count, symbols, generator=generator).argsort(1)
    keys = 1 + rank[:, :pairs]
    values = 1 + symbols + torch.randint(symbols, (count, pairs), generator=generator)
    tokens = torch.zeros(count, length, dtype=torch.int64)
    targets = torch.full((count, length), -100, dtype=torch.int64)
    tokens[:, 0:2 * pairs:2], tokens[:, 1:2 * pairs:2] = keys, values
    free = length - 2 * pairs
    places = 2 * pairs + torch.rand(count, free, generator=generator).argsort(1)[:, :pairs]
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return tokens, targets


def parity(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Running parity of random bits: the smallest regular language that needs a state that
    flips (Hahn 2020; Grazzi 2024)."""
    tokens = torch.randint(2, (count, length), generator=generator)
    return tokens, tokens.cumsum(1) % 2


PROBES = {p.name: p for p in (
    Probe("mqar", 33, 24, 24, 1 / 16, mqar,
          "4 of 16 keys with values of 16, each asked once within 24 tokens"),
    Probe("parity", 2, 16, 64, 1 / 2, parity,
          "running parity of bits, trained at length 16, scored at the last bit of length 64", 0.3),
)}


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927): hits of n independent trials."""
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def examples(probe: Probe, stream: int, index: int, count: int, length: int,
             ) -> tuple[Tensor, Tensor]:
    """Batch `index` of stream 0 (training) or 1 (test): a pure function of its arguments."""
    generator = torch.Generator().manual_seed((stream << 31) + index)  # it keeps 32 bits
    return probe.sample(count, length, generator)


@torch.inference_mode()
def score(model: torch.nn.Module, probe: Probe, length: int) -> tuple[Twins, Twins]:
    """(last, whole) of `TESTED` fresh sequences: the last answer of each, by itself, and all the
    answers of a sequence, where `exact` asks that every one is right."""
    device = next(model.parameters()).device
    model.eval()
    chances, answers = [], []
    for index in range(0, TESTED // BATCH):
        tokens, targets = examples(probe, 1, index, BATCH, length)
        chances.append(model(tokens.to(device))[0].float().cpu().log_softmax(-1))
        answers.append(targets)
    log_probs, targets = torch.cat(chances).numpy(), torch.cat(answers)
    asked = targets != -100
    place = (asked * torch.arange(length)).argmax(1, keepdim=True)
    last = asked & (torch.arange(length) == place)
    right = targets.clamp_min(0)
    return twins(log_probs, right, last), twins(log_probs, right, asked)
