"""An architecture is data: which mixer and channel each layer has, and what stands around them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from manyform.errors import ManyformError, unknown

POSITIONS = ("none", "learned", "sinusoidal", "axial")
RESIDUALS = ("none", "pre", "post", "residual_dual", "sandwich", "reordered", "deepnorm",
             "parallel", "parallel_two_norms", "reversible")
"""How a block's branches meet the residual stream; the equations are those of `Block`."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a sequence mixer, and a channel mixer or None.

    share: layers with the same name here own one set of weights between them (and a state each);
    None: weights of its own.
    """

    mixer: str
    mixer_options: Mapping[str, Any] = field(default_factory=dict)
    channel: str | None = "gated_mlp"
    channel_options: Mapping[str, Any] = field(default_factory=dict)
    share: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `Model` needs; written as JSON beside the weights.

    pattern: layers, repeated in a cycle to `n_layers`. norm, norm_eps: a name from
    `manyform.norms` and its epsilon (None: the norm's own).
    final_norm: a norm before the head; stacks whose last branch ends in one ("post", "deepnorm")
    have no second. residual: one of `RESIDUALS` (True is "pre", False is "none").
    tie: the head shares the embedding's weights. position: what is added to the embedding.
    max_length: rows of a learned position table. axial_shape, axial_dims: rows and columns of an
    axial one, and the features of each (see `manyform.positions.AxialPositions`).
    embedding_std: standard deviation of the embedding's initial weights. embedding_scale:
    multiplies the embedding's rows (Gemma: sqrt(d_model)). embedding_norm: a norm of the
    embedding, positions included; embedding_map: a linear map behind that (FNet). position_offset:
    the row of the position table for a document's first token (RoBERTa: 2). segments: rows of a
    table of segments; all tokens belong to the first (BERT). head_map: an activation; the head
    then reads norm(activation(linear(features))) (BERT). head_bias: the head adds one. logit_scale,
    logit_cap: logits times the one, then cap * tanh(logits / cap) (Gemma 2).
    exits: after how many layers a token may leave for the head. Training then minimises the mean of
    the losses at every exit and at the end, weighted by depth (Schuster 2022, section 3.4).
    exit_threshold: in evaluation mode a token leaves where the largest probability reaches it;
    None: nobody does. prefix_tokens: learned vectors before every document (see
    `manyform.prefix.Prefix`).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    pattern: tuple[LayerSpec, ...]
    name: str = ""
    norm: str = "rms"
    norm_eps: float | None = None
    final_norm: bool = True
    residual: str = "pre"
    tie: bool = True
    position: str = "none"
    max_length: int = 2048
    axial_shape: tuple[int, int] | None = None
    axial_dims: tuple[int, int] | None = None
    embedding_std: float = 0.02
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    embedding_map: bool = False
    position_offset: int = 0
    segments: int = 0
    head_map: str | None = None
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    exits: tuple[int, ...] = ()
    exit_threshold: float | None = None
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.residual, bool):  # what configurations said before there was a choice
            object.__setattr__(self, "residual", "pre" if self.residual else "none")
        if self.residual not in RESIDUALS:
            raise unknown("residual", self.residual, RESIDUALS)
        for key in ("vocab_size", "d_model", "n_layers", "max_length"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ManyformError(f"{key} must be a whole number of at least 1, not {value!r}")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ManyformError(f"logit_cap must be positive, not {self.logit_cap}")
        if not self.pattern:
            raise ManyformError("a model needs at least one layer in its pattern")
        if self.position not in POSITIONS:
            raise unknown("position", self.position, POSITIONS)
        if self.position_offset < 0 or self.segments < 0:
            raise ManyformError("position_offset and segments must be 0 or more, not "
                                f"{self.position_offset} and {self.segments}")
        for key in ("exits", "axial_shape", "axial_dims"):  # where they were JSON
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        self._check_axial()
        if not isinstance(self.exits, tuple) or list(self.exits) != sorted(
                {n for n in self.exits if isinstance(n, int) and 0 < n < self.n_layers}):
            raise ManyformError("exits must be a list of rising numbers of layers, from 1 to "
                                f"n_layers - 1 = {self.n_layers - 1}, not {self.exits!r}")
        if self.prefix_tokens < 0 or (self.prefix_tokens and self.exits):
            raise ManyformError("prefix_tokens must be 0 or more, and cannot stand beside exits; "
                                f"given: {self.prefix_tokens} and exits={list(self.exits)}")
        if self.exits and self.residual in ("residual_dual", "reversible"):
            raise ManyformError(f"exits cannot read the two streams of residual={self.residual!r}")
        if self.residual == "reversible" and (self.tie or self.head_map is not None):
            raise ManyformError("the head of residual='reversible' reads both streams, 2 d_model "
                                "features: it needs tie=False and no head_map")
        if self.exit_threshold is not None and not (self.exits and 0 < self.exit_threshold <= 1):
            raise ManyformError("exit_threshold is a probability, and needs exits; given: "
                                f"{self.exit_threshold} and exits={list(self.exits)}")
        groups: dict[str, LayerSpec] = {}
        for layer in self.pattern:
            if layer.share is not None and groups.setdefault(layer.share, layer) != layer:
                raise ManyformError(f"layers that share weights as {layer.share!r} must be alike: "
                                    f"{groups[layer.share]} and {layer}")

    def _check_axial(self) -> None:
        given = (self.axial_shape, self.axial_dims)
        if self.position != "axial":
            if given != (None, None):
                raise ManyformError("axial_shape and axial_dims need position='axial', not "
                                    f"{self.position!r}")
            return
        for key, value in zip(("axial_shape", "axial_dims"), given, strict=True):
            if not (isinstance(value, tuple) and len(value) == 2
                    and all(isinstance(n, int) and n > 0 for n in value)):
                raise ManyformError(f"position='axial' needs {key} as two whole numbers of at "
                                    f"least 1, not {value!r}")
        assert self.axial_shape is not None
        assert self.axial_dims is not None
        if sum(self.axial_dims) != self.d_model:
            raise ManyformError(f"axial_dims {self.axial_dims} must add up to d_model="
                                f"{self.d_model}")
        if self.axial_shape[0] * self.axial_shape[1] < self.max_length:
            raise ManyformError(f"axial_shape {self.axial_shape} has fewer places than max_length="
                                f"{self.max_length}")

    @property
    def width(self) -> int:
        """Features that the head reads: of both streams where they are reversible."""
        return self.d_model * (2 if self.residual == "reversible" else 1)

    @property
    def layers(self) -> list[LayerSpec]:
        """The pattern, repeated in a cycle to n_layers."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.n_layers)]

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown or missing key raises ManyformError."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise unknown("configuration key", key, known)
        try:
            pattern = tuple(LayerSpec(**layer) for layer in values["pattern"])
            return cls(**{**values, "pattern": pattern})
        except (KeyError, TypeError) as error:
            raise ManyformError(f"the configuration is not complete: {error}") from error


_PART = re.compile(r"(?:(\d+)\s+)?(.+?)(?:\s*@\s*(\w+))?", re.DOTALL)
_COLON = re.compile(r"\s+:\s*|:\s+|(?<=\w):(?=\d+\s)|(?<=\)):")


def parse_pattern(text: str, channel: str | None = "gated_mlp") -> list[LayerSpec]:
    """Layers from text: "3 mamba2 : 1 attention" is four layers.

    A mixer may carry options, and a channel mixer of its own (`none`: no channel mixer) where it
    differs from `channel`: "2 mamba + none : attention(window=256) + gated_mlp(expansion=3.0)".
    Layers that end in the same "@ name" share one set of weights: "6 mamba2 : attention @ all".
    Raises ManyformError for anything else.
    """
    layers: list[LayerSpec] = []
    for part in _COLON.split(text.strip()):
        match = _PART.fullmatch(part.strip())
        if not match or (count := int(match[1] or 1)) < 1:
            raise ManyformError(f"a pattern reads like '3 mamba2 : 1 attention', not {text!r}")
        mixer, *more = split_outside(match[2], "+")
        if len(more) > 1:
            raise ManyformError(f"a layer has one mixer and one channel, not {match[2]!r}")
        name, options = _call(mixer, text)
        own, own_options = _call(more[0], text) if more else (channel, {})
        layers += [LayerSpec(name, options, None if own == "none" else own, own_options,
                             match[3])] * count
    return layers


def split_outside(text: str, separator: str) -> list[str]:
    """The pieces of `text` between separators that stand outside parentheses, stripped."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _call(text: str, pattern: str) -> tuple[str, dict[str, Any]]:
    """"attention(window=256)" -> ("attention", {"window": 256})."""
    match = re.fullmatch(r"([\w.:]+)\s*(?:\((.*)\))?", text.strip(), re.DOTALL)
    if not match:
        raise ManyformError(f"a pattern reads like '3 mamba2 : 1 attention(window=256)', not "
                            f"{pattern!r}")
    if match[2] is None:
        return match[1], {}
    try:
        call = ast.parse(f"f({match[2]})", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        return match[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ManyformError(f"the options of {match[1]} in {pattern!r} must read like "
                            "window=256, position='rotary'") from error


def merge_options(specs: Sequence[LayerSpec], defaults: Mapping[str, Any],
                  overrides: Mapping[str, Any],
                  accepted: Mapping[str, Mapping[str, set[str]]]) -> tuple[LayerSpec, ...]:
    """Fill in the options of a pattern's mixers and channels.

    A default goes to all that have such an option and do not set it. An override goes to those
    that set it in the pattern or, where none does, to all that have it. accepted: {"mixer":
    {name: options}, "channel": {name: options}}. An option that none takes raises ManyformError.
    """
    every = set().union(*(names for kind in accepted.values() for names in kind.values()))
    for key in {**defaults, **overrides}:
        if key not in every:
            settings = {f.name for f in fields(ModelConfig)} - {"pattern", "name"} | {"channel"}
            raise unknown("option", key, every | settings)
    written = {key for s in specs for key in (*s.mixer_options, *s.channel_options)}

    def take(kind: str, name: str | None, old: Mapping[str, Any]) -> dict[str, Any]:
        mine = accepted[kind].get(name or "", set())
        return {**{k: v for k, v in defaults.items() if k in mine}, **old,
                **{k: v for k, v in overrides.items()
                   if k in mine and (k in old or k not in written)}}
    return tuple(replace(s, mixer_options=take("mixer", s.mixer, s.mixer_options),
                         channel_options=take("channel", s.channel, s.channel_options))
                 for s in specs)
