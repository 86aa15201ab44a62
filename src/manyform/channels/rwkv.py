"""RWKV channel mixing: a squared-ReLU network that also sees the step before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Mixer, Place, channel
from manyform.errors import ManyformError
from manyform.ops.relu_squared import relu_squared
from manyform.ops.token_shift import token_shift


@channel("rwkv_channel")
class RWKVChannel(Mixer):
    """y_t = W_v relu(W_k (x_t + (x_{t-1} - x_t) * mu))^2 (Peng 2025, section 4.2).

    expansion: hidden features for one of d_model. Initialised as the released code does. The state
    is the last step's features, (batch, d_model) in float32.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expansion: float = 4.0) -> None:
        super().__init__(d_model, place=place)
        if expansion <= 0:
            raise ManyformError(f"expansion must be positive, not {expansion}")
        hidden = max(1, round(expansion * d_model))
        rest = 1 - place.index / place.count
        self.shift = nn.Parameter(1 - (torch.arange(d_model) / d_model) ** rest**4)
        self.key = nn.Linear(d_model, hidden, bias=False)
        self.value = nn.Linear(hidden, d_model, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        (mixed,), last = token_shift(x, self.shift[None], state, reset)
        return self.value(relu_squared(self.key(mixed))), last

    def initial_state(self, batch_size: int, *, device: Any = None) -> Tensor:
        wide = torch.float64 if self.shift.dtype == torch.float64 else torch.float32
        return torch.zeros(batch_size, self.d_model, dtype=wide, device=device)

    def cost(self, length: int) -> Cost:
        weights = self.key.weight.numel() + self.value.weight.numel()
        element = 8 if self.shift.dtype == torch.float64 else 4
        return Cost(2 * weights * length, element * self.d_model)
