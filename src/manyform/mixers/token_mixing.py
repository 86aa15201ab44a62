"""Token mixing without attention, looking both ways: Fourier transforms (FNet) and a network over
the positions (MLP-Mixer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.ops.fourier_mix import fourier_mix, fourier_mix_flops
from manyform.state import State


class _WholeRow(SequenceMixer):
    """No state, one document a row."""

    causal = False
    packs = False
    state_growth = "none"

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None) -> State:
        """None: what looks ahead has no state."""
        return None


@mixer("fnet")
class FNet(_WholeRow):
    """The real part of the Fourier transform over the sequence and the features (Lee-Thorp 2021,
    "FNet", eq. 3): no parameters.

    orthonormal: divide by sqrt(length * d_model), so that outputs are as large as inputs. The paper
    does not, and needs the norm of a post-norm block behind the sum.
    """

    cost_growth = "T log T"

    def __init__(self, d_model: int, *, place: Place = Place(), orthonormal: bool = False) -> None:
        super().__init__(d_model, place=place)
        self.orthonormal = orthonormal

    def forward(self, x: Tensor, state: State = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, None]:
        """x: (batch, length, d_model) -> the same shape, and None. Raises ManyformError for a state
        and for `reset`: the transform mixes the whole row."""
        self.whole(state, reset)
        y = fourier_mix(x)
        return (y * (x.shape[1] * x.shape[2]) ** -0.5 if self.orthonormal else y), None

    def cost(self, length: int) -> Cost:
        """One transform."""
        return Cost(fourier_mix_flops(length, self.d_model), 0)


@mixer("mlp_mixer")
class MLPMixer(_WholeRow):
    """y = W_2 gelu(W_1 x + b_1) + b_2 down the sequence, the same network for every feature
    (Tolstikhin 2021, "MLP-Mixer", eq. 1).

    W_1 has a column and W_2 a row for each position, so that sequences have at most `max_length`
    tokens (shorter ones use the first). hidden: the network's width, d_model / 2 if None, as in
    the paper's table 1. Initialised as the paper's code has it: Xavier's weights, biases near zero.
    """

    cost_growth = "linear"

    def __init__(self, d_model: int, *, place: Place = Place(), hidden: int | None = None,
                 max_length: int = 2048) -> None:
        super().__init__(d_model, place=place)
        hidden = max(1, d_model // 2) if hidden is None else hidden
        if hidden < 1 or max_length < 1:
            raise ManyformError("hidden and max_length must be at least 1, not "
                                f"{hidden} and {max_length}")
        self.hidden, self.max_length = hidden, max_length
        self.up = Linear(max_length, hidden)
        self.down = Linear(hidden, max_length)
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor, state: State = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, None]:
        """x: (batch, length, d_model) -> the same shape, and None. Raises ManyformError for a
        state, for `reset` and past `max_length`."""
        self.whole(state, reset)
        length = x.shape[1]
        if length > self.max_length:
            raise ManyformError(
                f"mlp_mixer was built for at most {self.max_length} tokens and is given {length}; "
                "create it with a larger max_length")
        h = F.gelu(self.up.weight[:, :length] @ x + self.up.bias[:, None])
        y = self.down.weight[:length] @ h + self.down.bias[:length, None]
        return y, None

    def cost(self, length: int) -> Cost:
        """Two products down the sequence."""
        return Cost(4 * self.hidden * length * self.d_model, 0)
