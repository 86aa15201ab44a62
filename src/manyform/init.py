"""Weight initialisations that several architectures share."""

from __future__ import annotations

import math

import torch
from torch import nn

from manyform.contract import Mixer, Place
from manyform.linear import Linear


def linear(d_in: int, d_out: int, *, bias: bool = False, std: float = 0.02) -> Linear:
    """A linear layer with normal weights of the given standard deviation and zero bias.

    0.02 is GPT-2's value (Radford 2019, released code), kept by LLaMA and most since.
    """
    layer = Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def residual_std(place: Place, std: float = 0.02) -> float:
    """Standard deviation for projections back into the residual stream: std / sqrt(2 n_layers).

    GPT-2 (Radford 2019, section 2.3), two residual branches a layer.
    """
    return std / math.sqrt(2 * place.count)


@torch.no_grad()
def deepnorm_weights(part: Mixer, beta: float) -> None:
    """Initial weights of a branch in a DeepNorm stack (Wang 2022, figure 2): Xavier's, those on the
    way of values (value and output projections, feed-forward maps) with a gain of `beta`.

    Raises ManyformError for a mixer or channel that does not tell them apart.
    """
    scaled, others = part.deepnorm_weights()
    for weight in scaled:
        nn.init.xavier_normal_(weight, gain=beta)
    for weight in others:
        nn.init.xavier_normal_(weight)
