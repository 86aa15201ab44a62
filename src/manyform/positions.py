"""Positions as a separate choice: rotary tables with their scalings, and ALiBi slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.errors import ManyformError, unknown
from manyform.ops.rotary import rotary

# Keys of a rope_scaling by type: those that it needs, and those that it may have.
SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "ntk": ({"factor"}, set()),
    "dynamic": ({"factor", "original_length"}, set()),
    "llama3": ({"factor", "original_length", "low", "high"}, set()),
    "yarn": ({"factor", "original_length"}, {"fast", "slow", "temperature", "whole"}),
}


def rotary_frequencies(d: int, base: float = 10000.0,
                       scaling: Mapping[str, Any] | None = None) -> tuple[Tensor, float]:
    """Radians per position of each of the d/2 feature pairs (float64), and the factor on queries
    and keys (1 except under YaRN).

    theta_i = base^(-2i/d) (Su 2021, section 3.2.2). scaling is None or a mapping with `type`,
    `factor` (how many times longer than trained) and, for the last three, `original_length`
    (trained length):
      linear  theta / factor: position interpolation (Chen 2023, eq. 4)
      ntk     base * factor^(d / (d - 2)): the slowest pair is interpolated, the fastest kept
              (Peng 2023, "YaRN", definition 1)
      yarn    pairs that turn more than `fast` (32) times in `original_length` are kept, those that
              turn less than `slow` (1) times are interpolated, a ramp between (ibid., eq. 18, but
              over the index of the pair as in the released code and in every checkpoint, where the
              paper has it over the turns; whole=False leaves the ramp's ends unrounded); queries
              and keys times `temperature`, by default 0.1 ln(factor) + 1 (ibid., eq. 22)
      llama3  pairs that turn more than `high` times in `original_length` are kept, those that turn
              less than `low` times are interpolated, between in proportion to the turns (Llama 3.1,
              released code)
      dynamic theta: the base would change with the length of the whole sequence once that is past
              `original_length` (ibid., appendix A.1), and with it the keys already in a state. Only
              positions within the trained length have one meaning, so `RotaryTable` refuses others.
    Raises ManyformError for an odd d or a scaling of another form.
    """
    if d < 2 or d % 2:
        raise ManyformError("rotary positions turn pairs of features: head_dim (or rotary_dim) "
                            f"must be even, not {d}")
    if not base > 1:
        raise ManyformError(f"rope_base must be larger than 1, not {base}")
    values = _checked(scaling, d)
    kind, factor = values.get("type"), values.get("factor", 1.0)
    original = values.get("original_length", 1)
    if kind == "ntk":
        base = base * factor ** (d / (d - 2))
    theta = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if kind == "linear":
        return theta / factor, 1.0
    if kind == "llama3":
        low, high = values["low"], values["high"]
        kept = ((original * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return kept * theta + (1 - kept) * theta / factor, 1.0
    if kind == "yarn":
        def pair(turns: float) -> float:
            """The (fractional) index of the pair that turns so often in the trained length."""
            return d * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))
        first, last = pair(values.get("fast", 32)), pair(values.get("slow", 1))
        if values.get("whole", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d - 1)
        index = torch.arange(d // 2, dtype=torch.float64)
        kept = 1 - ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
        return (kept * theta + (1 - kept) * theta / factor,
                values.get("temperature", 0.1 * math.log(factor) + 1))
    return theta, 1.0


def _checked(scaling: Mapping[str, Any] | None, d: int) -> dict[str, Any]:
    if scaling is None:
        return {}
    if not isinstance(scaling, Mapping) or "type" not in scaling:
        raise ManyformError("rope_scaling must be None or a mapping such as {'type': 'yarn', "
                            f"'factor': 4.0, 'original_length': 2048}}, not {scaling!r}")
    kind = scaling["type"]
    if kind not in SCALINGS:
        raise unknown("rope_scaling type", kind, SCALINGS)
    needed, optional = SCALINGS[kind]
    for key in scaling:
        if key not in needed | optional | {"type"}:
            raise unknown(f"key of a {kind} rope_scaling", key, needed | optional | {"type"})
    for key in sorted(needed - scaling.keys()):
        raise ManyformError(f"a {kind} rope_scaling needs {key!r}; given: {dict(scaling)!r}")
    factor, original = scaling["factor"], scaling.get("original_length", 1)
    if not isinstance(factor, int | float) or not factor >= 1:
        raise ManyformError(f"the factor of rope_scaling must be at least 1, not {factor!r}")
    if not isinstance(original, int) or original < 1:
        raise ManyformError("the original_length of rope_scaling must be a whole number of at "
                            f"least 1, not {original!r}")
    for key in ("low", "high", "fast", "slow", "temperature"):
        given = scaling.get(key, 1.0)
        if not (isinstance(given, int | float) and given > 0):
            raise ManyformError(f"{key} of rope_scaling must be positive, not {given!r}")
    if kind == "llama3" and not scaling["high"] > scaling["low"]:
        raise ManyformError("a llama3 rope_scaling needs high > low, not "
                            f"{scaling['high']} and {scaling['low']}")
    if kind == "ntk" and d < 4:
        raise ManyformError("an ntk rope_scaling needs a head_dim of at least 4; use 'linear'")
    return dict(scaling)


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
        self.limit: int | None = None
        if scaling is not None and scaling["type"] == "dynamic":
            self.limit = scaling["original_length"]
        key = (tuple(self.frequencies.tolist()), self.factor)
        self._tables = self._shared.setdefault(key, {})

    def rows(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each (at least n, d/2) float32; ManyformError past a limit."""
        if self.limit is not None and n > self.limit:
            raise ManyformError(
                f"position {n - 1} lies past the {self.limit} of the training, where a "
                "dynamic rope_scaling has no meaning that is independent of how the sequence "
                "is cut; use rope_scaling of type 'ntk' or 'yarn' for longer sequences")
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
        elif x.device.type == "cpu" or self.limit is not None:
            cos, sin = self.rows(int(positions.max()) + 1, x.device)
        else:  # asking for the largest position would make the host wait for the device
            cos, sin = (t.flatten(0, -2) for t in self._compute(positions))
            positions = torch.arange(positions.numel(), device=x.device).view(positions.shape)
        return rotary(x, cos, sin, positions)

    def _compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].double() * self.frequencies.to(positions.device)
        return (angle.cos() * self.factor).float(), (angle.sin() * self.factor).float()


class AxialPositions(nn.Module):
    """Position p of a table of rows and columns is [rows[p // columns]; columns[p % columns]]: far
    fewer parameters than positions times features (Ho 2019, arXiv:1912.12180; Reformer's released
    code).

    shape: number of rows and of columns; dims: features of each.
    """

    def __init__(self, shape: tuple[int, int], dims: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.empty(n, d)) for n, d in zip(
            shape, dims, strict=True))
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: (...) int64 -> (..., sum of dims)."""
        n = self.columns.shape[0]
        return torch.cat([F.embedding(positions // n, self.rows),
                          F.embedding(positions % n, self.columns)], dim=-1)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head's linear bias, (heads,) float32 (Press 2021, section 3).

    For a power of two n: 2^(-8/n), 2^(-16/n), ...; otherwise those of the next smaller power of
    two, then every other one of the next larger, as in the released code.
    """
    floor = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / floor) for i in range(floor)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / floor) for i in range(heads - floor)]
    return torch.tensor(slopes)


def document_positions(before: Tensor, length: int, reset: Tensor | None) -> Tensor:
    """Tokens since the document began, for each of `length` new tokens.

    before: (batch,) position of the first new token if nothing resets; reset: (batch, length)
    bool or None -> (batch, length) int64.
    """
    steps = torch.arange(length, device=before.device)
    positions = before[:, None] + steps
    if reset is None:
        return positions
    start = torch.where(reset, steps, -1).cummax(dim=1).values
    return torch.where(start >= 0, steps - start, positions)


def sinusoidal(positions: Tensor, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sine and cosine at geometric wavelengths (Vaswani 2017, section 3.5): (...) -> (..., d)."""
    half = (d + 1) // 2
    index = torch.arange(half, device=positions.device, dtype=dtype)
    rate = torch.exp(index * (-math.log(10000.0) / half))
    angle = positions[..., None].to(dtype) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :d]
