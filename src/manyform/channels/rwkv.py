"""RWKV channel mixing: squared-ReLU networks that also see the step before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyform.channels.mlp import network
from manyform.contract import Cost, Hint, Mixer, Place, channel
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.ops.token_shift import token_shift
from manyform.precision import compute_dtype


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
        self.key = Linear(d_model, hidden, bias=False)
        self.value = Linear(hidden, d_model, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, Tensor]:
        x = x.to(compute_dtype(x))
        (mixed,), last = token_shift(x, self.shift[None], state, reset)
        return network(mixed, self.key, self.value, "relu2"), last

    def initial_state(self, batch_size: int, *, device: Any = None) -> Tensor:
        wide = torch.float64 if self.shift.dtype == torch.float64 else torch.float32
        return torch.zeros(batch_size, self.d_model, dtype=wide, device=device)

    def cost(self, length: int) -> Cost:
        weights = self.key.weight.numel() + self.value.weight.numel()
        element = 8 if self.shift.dtype == torch.float64 else 4
        return Cost(2 * weights * length, element * self.d_model)


class _Gated(Mixer):
    """y_t = sigmoid(W_r x^r_t) * W_v relu(W_k x^k_t)^2, x^k and x^r shares of x_t and x_{t-1}.

    time_mix: (2, d_model), the share of the present step for k and for r. W_k is orthogonal at the
    start, W_r and W_v zero. The state is the last step's features, (batch, d_model) in float32.
    """

    def __init__(self, d_model: int, place: Place, hidden: int, power: float) -> None:
        super().__init__(d_model, place=place)
        rest = 1 - place.index / place.count
        share = (torch.arange(d_model) / d_model) ** rest**power
        self.time_mix = nn.Parameter(share.repeat(2, 1))
        self.key = Linear(d_model, hidden, bias=False)
        self.receptance = Linear(d_model, d_model, bias=False)
        self.value = Linear(hidden, d_model, bias=False)
        nn.init.orthogonal_(self.key.weight, gain=max(1.0, hidden / d_model) ** 0.5)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, Tensor]:
        x = x.to(compute_dtype(x))
        (xk, xr), last = token_shift(x, 1 - self.time_mix, state, reset)
        y = network(xk, self.key, self.value, "relu2")
        return torch.sigmoid(self.receptance(xr)) * y, last

    def initial_state(self, batch_size: int, *, device: Any = None) -> Tensor:
        wide = torch.float64 if self.time_mix.dtype == torch.float64 else torch.float32
        return torch.zeros(batch_size, self.d_model, dtype=wide, device=device)

    def cost(self, length: int) -> Cost:
        weights = sum(layer.weight.numel() for layer in (self.key, self.receptance, self.value))
        element = 8 if self.time_mix.dtype == torch.float64 else 4
        return Cost(2 * weights * length, element * self.d_model)


@channel("rwkv4_channel")
class RWKV4Channel(_Gated):
    """Channel mixing of RWKV-4 (Peng 2023, section 3; initialisation of the released code).

    expansion: hidden features for one of d_model.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expansion: float = 4.0) -> None:
        if expansion <= 0:
            raise ManyformError(f"expansion must be positive, not {expansion}")
        super().__init__(d_model, place, max(1, round(expansion * d_model)), power=1.0)

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay at all, as in the released code."""
        return {name: Hint(weight_decay=False) for name, _ in self.named_parameters()}


@channel("rwkv6_channel")
class RWKV6Channel(_Gated):
    """Channel mixing of RWKV-5 and RWKV-6 (Peng 2024, "Eagle and Finch"; initialisation
    of the released code).

    expansion: hidden features for one of d_model, rounded down to a multiple of 32.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), expansion: float = 3.5) -> None:
        if expansion <= 0:
            raise ManyformError(f"expansion must be positive, not {expansion}")
        hidden = max(32, int(expansion * d_model) // 32 * 32)
        super().__init__(d_model, place, hidden, power=3.0)

    def hints(self) -> Mapping[str, Hint]:
        """No weight decay on the shares of the token shift."""
        return {"time_mix": Hint(weight_decay=False)}
