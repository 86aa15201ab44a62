"""Positions as a separate choice: rotary tables with their scalings, and ALiBi slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manyform.errors import ManyformError, unknown
from manyform.ops.rotary import rotary

SCALINGS = ("linear", "ntk", "yarn")


def rotary_frequencies(d: int, base: float = 10000.0,
                       scaling: Mapping[str, Any] | None = None) -> tuple[Tensor, float]:
    """Radians per position of each of the d/2 feature pairs (float64), and the factor on queries
    and keys (1 except under YaRN).

    theta_i = base^(-2i/d) (Su 2021, section 3.2.2). scaling is None or a mapping with `type`,
    `factor` (how many times longer than trained) and, for yarn, `original_length` (trained length):
      linear  theta / factor: position interpolation (Chen 2023, eq. 4)
      ntk     base * factor^(d / (d - 2)): the slowest pair is interpolated, the fastest kept
              (Peng 2023, "YaRN", definition 1)
      yarn    pairs that turn more than 32 times in `original_length` are kept, those that turn less
              than once are interpolated, a ramp between (ibid., eq. 18, but over the index of the
              pair as in the released code and in every checkpoint, where the paper has it over the
              turns); queries and keys times 0.1 ln(factor) + 1, the temperature (ibid., eq. 22)
    Raises ManyformError for an odd d or a scaling of another form.
    """
    if d < 2 or d % 2:
        raise ManyformError("rotary positions turn pairs of features: head_dim must be even, "
                            f"not {d}")
    if not base > 1:
        raise ManyformError(f"rope_base must be larger than 1, not {base}")
    kind, factor, original = _checked(scaling, d)
    if kind == "ntk":
        base = base * factor ** (d / (d - 2))
    theta = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if kind == "linear":
        return theta / factor, 1.0
    if kind == "yarn":
        def pair(turns: float) -> float:
            """The (fractional) index of the pair that turns so often in the trained length."""
            return d * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))
        first, last = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), d - 1)
        index = torch.arange(d // 2, dtype=torch.float64)
        kept = 1 - ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
        return kept * theta + (1 - kept) * theta / factor, 0.1 * math.log(factor) + 1
    return theta, 1.0


def _checked(scaling: Mapping[str, Any] | None, d: int) -> tuple[str | None, float, int]:
    if scaling is None:
        return None, 1.0, 1
    if not isinstance(scaling, Mapping) or "type" not in scaling:
        raise ManyformError("rope_scaling must be None or a mapping such as {'type': 'yarn', "
                            f"'factor': 4.0, 'original_length': 2048}}, not {scaling!r}")
    kind = scaling["type"]
    if kind not in SCALINGS:
        raise unknown("rope_scaling type", kind, SCALINGS)
    wanted = {"type", "factor"} | ({"original_length"} if kind == "yarn" else set())
    for key in scaling:
        if key not in wanted:
            raise unknown(f"key of a {kind} rope_scaling", key, wanted)
    for key in sorted(wanted - scaling.keys()):
        raise ManyformError(f"a {kind} rope_scaling needs {key!r}; given: {dict(scaling)!r}")
    factor, original = scaling["factor"], scaling.get("original_length", 1)
    if not isinstance(factor, int | float) or not factor >= 1:
        raise ManyformError(f"the factor of rope_scaling must be at least 1, not {factor!r}")
    if not isinstance(original, int) or original < 1:
        raise ManyformError("the original_length of rope_scaling must be a whole number of at "
                            f"least 1, not {original!r}")
    if kind == "ntk" and d < 4:
        raise ManyformError("an ntk rope_scaling needs a head_dim of at least 4; use 'linear'")
    return kind, float(factor), original


class RotaryTable:
    """Cosines and sines by position, grown as needed, one copy per device for equal frequencies.

    The angles are computed in float64 and kept in float32, so that a position has the same angle
    wherever a sequence is cut.
    """

    _shared: dict[tuple[Any, ...], dict[torch.device, tuple[Tensor, Tensor]]] = {}

    def __init__(self, d: int, *, base: float = 10000.0,
                 scaling: Mapping[str, Any] | None = None) -> None:
        with torch.device("cpu"):  # values, not parameters: wanted also on the meta device
            self.frequencies, self.factor = rotary_frequencies(d, base, scaling)
        key = (tuple(self.frequencies.tolist()), self.factor)
        self._tables = self._shared.setdefault(key, {})

    def rows(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each (at least n, d/2) float32."""
        found = self._tables.get(device)
        if found is None or found[0].shape[0] < n:
            size = max(256, 1 << max(n - 1, 1).bit_length())
            with torch.inference_mode(False):  # a table made while sampling also serves training
                found = self._compute(torch.arange(size, device=device))
            self._tables[device] = found
        return found

    def turn(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn x: (B, T, H, d) by positions: (T,) or (B, T) int64, or 0 ... T-1 if None."""
        if positions is None:
            cos, sin = self.rows(x.shape[1], x.device)
            positions = torch.arange(x.shape[1], device=x.device)
        elif x.device.type == "cpu":
            cos, sin = self.rows(int(positions.max()) + 1, x.device)
        else:  # asking for the largest position would make the host wait for the device
            cos, sin = (t.flatten(0, -2) for t in self._compute(positions))
            positions = torch.arange(positions.numel(), device=x.device).view(positions.shape)
        return rotary(x, cos, sin, positions)

    def _compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].double() * self.frequencies.to(positions.device)
        return (angle.cos() * self.factor).float(), (angle.sin() * self.factor).float()


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head's linear bias, (heads,) float32 (Press 2021, section 3).

    For a power of two n: 2^(-8/n), 2^(-16/n), ...; otherwise those of the next smaller power of
    two, then every other one of the next larger, as in the released code.
    """
    floor = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / floor) for i in range(floor)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / floor) for i in range(heads - floor)]
    return torch.tensor(slopes)
