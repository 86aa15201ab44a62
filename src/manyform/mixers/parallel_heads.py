"""Two mixers side by side on the same input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyform.config import parse_pattern
from manyform.contract import (
    COST_ORDER,
    STATE_ORDER,
    Cost,
    CostGrowth,
    Place,
    SequenceMixer,
    StateGrowth,
    build,
    mixer,
)
from manyform.errors import ManyformError, unknown
from manyform.norms import RMSNorm
from manyform.state import State

COMBINE = ("mean", "gate", "sum")


class ParallelState(NamedTuple):
    """The states of the two mixers."""

    first: State
    second: State


@mixer("parallel_heads")
class ParallelHeads(SequenceMixer):
    """y = (norm(first(x)) + norm(second(x))) / 2, each with a learned scale a feature: the
    hybrid heads of Hymba (Dong 2024, "Hymba: A Hybrid-head Architecture for Small Language
    Models", eq. 3), whose heads of attention and Mamba read the same input.

    first, second: mixers, with options if wanted: "attention(window=256)".
    combine: "mean", or "gate": norm(first(x)) sigmoid(norm(second(x))), as Titans combines
    attention with a window and its neural memory (Behrouz 2025, eq. 28 and section 4.2), or "sum":
    first_scale first(x) + second_scale second(x), without norms, as Falcon-H1 has attention beside
    Mamba-2 (Zuo 2025, arXiv:2507.22448, section 2.1).

    Each mixer ends in its own projection, behind which the norm stands; Hymba's norms come before
    one projection that both share.
    """

    shares = True

    def __init__(self, d_model: int, *, place: Place = Place(), first: str = "attention",
                 second: str = "mamba", combine: str = "mean", first_scale: float = 1.0,
                 second_scale: float = 1.0) -> None:
        super().__init__(d_model, place=place)
        if combine not in COMBINE:
            raise unknown("combination", combine, COMBINE)
        if combine != "sum" and (first_scale, second_scale) != (1.0, 1.0):
            raise ManyformError("first_scale and second_scale need combine='sum', not "
                                f"{combine!r}")
        self.combine, self.first_scale, self.second_scale = combine, first_scale, second_scale
        self.first, self.second = (self._part(text) for text in (first, second))
        self.first_norm, self.second_norm = (
            RMSNorm(d_model) if combine != "sum" else None for _ in range(2))
        self.causal = self.first.causal and self.second.causal
        self.packs = self.first.packs and self.second.packs
        self.aligned = all(part.aligned or part.growth[0] in ("none", "constant")
                           for part in (self.first, self.second))
        self.reads_tokens = self.first.reads_tokens or self.second.reads_tokens

    def _part(self, text: str) -> SequenceMixer:
        layers = parse_pattern(text, None)
        if len(layers) != 1 or layers[0].channel is not None:
            raise ManyformError("parallel_heads takes one mixer on each side, such as "
                                f"'attention(window=256)', not {text!r}")
        part = build("mixer", layers[0].mixer, self.d_model, self.place, layers[0].mixer_options)
        assert isinstance(part, SequenceMixer)
        return part

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """The faster of both."""
        (state, cost), (other_state, other_cost) = self.first.growth, self.second.growth
        return (max(state, other_state, key=STATE_ORDER.index),
                max(cost, other_cost, key=COST_ORDER.index))

    @property
    def exactly_causal(self) -> bool:  # type: ignore[override]
        """As its mixers are."""
        return self.first.exactly_causal and self.second.exactly_causal

    def forward(self, x: Tensor, state: ParallelState | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, ParallelState | None]:
        if not self.causal:
            self.whole(state, reset)
        shared = {} if shared is None else shared
        results, after = [], []
        for name, part in (("first", self.first), ("second", self.second)):
            extra: dict[str, Any] = {}
            if part.shares:
                extra["shared"] = shared.setdefault(f"parallel_heads_{name}", {})
            before = None if state is None else getattr(state, name)
            y, end = part(x, before, reset=reset, **extra)
            results.append(y)
            after.append(end)
        return self._combined(*results), ParallelState(*after) if self.causal else None

    def _combined(self, a: Tensor, b: Tensor) -> Tensor:
        if self.first_norm is None or self.second_norm is None:
            return self.first_scale * a + self.second_scale * b
        dtype = a.dtype
        with torch.autocast(a.device.type, enabled=False):  # rounded once, at the end
            a = self.first_norm(a.to(self.first_norm.weight.dtype))
            b = self.second_norm(b.to(self.second_norm.weight.dtype))
            y = (a + b) / 2 if self.combine == "mean" else a * torch.sigmoid(b)
        return y.to(dtype)

    def initial_state(self, batch_size: int, *, device: Any = None) -> ParallelState | None:
        if not self.causal:
            return None
        return ParallelState(*(part.initial_state(batch_size, device=device)
                               for part in (self.first, self.second)))

    def cost(self, length: int) -> Cost:
        """Both mixers'."""
        both = self.first.cost(length) + self.second.cost(length)
        return both if self.causal else Cost(both.flops, 0)
