"""The learning rate at each step."""

from __future__ import annotations

import math

from manyform.training.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0) of `config.total_steps`.

    Linear warm-up to lr over warmup_steps, then by `schedule`:
    constant  lr
    wsd       lr, and over the last `decay` share of all steps linearly to final_lr * lr
              (Hu 2024; Haegele 2024)
    cosine    final_lr * lr + (1 - final_lr) * lr * (1 + cos(pi t)) / 2, t from 0 to 1
              (Loshchilov & Hutter 2017)
    """
    total, warmup = config.total_steps, config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    low = config.final_lr
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay * total))
        left = min(1.0, (total - step) / decay_steps) if config.decay > 0 else 1.0
        return config.lr * (low + (1 - low) * max(0.0, left))
    if config.schedule == "cosine":
        t = min(1.0, (step - warmup) / max(1, total - warmup))
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * t)))
    return config.lr
