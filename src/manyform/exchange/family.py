"""A family of checkpoints as one record, and what is done with any such record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyform.config import ModelConfig
from manyform.errors import ManyformError
from manyform.exchange.settings import Draft, Fields, Setting, Unfit
from manyform.exchange.tensors import Place, Rules, places
from manyform.model import Model
from manyform.positions import RotaryTable


@dataclass(frozen=True)
class Family:
    """Everything that tells one `model_type` of Hugging Face checkpoints from another.

    model_type, architecture: as in config.json. settings: read and write config.json. mixer,
    channel: of every layer, unless a setting lists the layers. top: where parameters outside the
    blocks lie; block: those within, after `layer` ("model.layers.{i}."). prefix: what checkpoints
    of the bare model leave out of names. harmless: further keys without a meaning for logits.
    ignored: endings of tensors that are computed, not learned. aliases: pieces of names that some
    files have, and what stands for them here. constants: tensors that files have and models here
    have not, since no logit depends on them, by name; written, and when they are read `ignored`.
    copies: beginnings of names under which files may hold shared tensors once more, and what those
    of the originals begin with.
    """

    model_type: str
    architecture: str
    settings: tuple[Setting, ...]
    top: Rules
    block: Rules
    layer: str = "model.layers.{i}."
    prefix: str = "model."
    mixer: str = "attention"
    channel: str | None = "gated_mlp"
    harmless: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    aliases: tuple[tuple[str, str], ...] = ()
    constants: Callable[[Model], Mapping[str, Tensor]] | None = None
    copies: Callable[[Model], Mapping[str, str]] | None = None

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """config.json to our configuration; ManyformError naming what has no equal."""
        theirs, draft = Fields(values, where), Draft()
        for setting in self.settings:
            setting.read(theirs, draft)
        theirs.refuse_the_rest(self.model_type, self.harmless)
        return draft.finish(self.model_type, self.mixer, self.channel)

    def write_config(self, model: Model) -> dict[str, Any]:
        """The model's config.json. What is written is read again and must give the same model, so
        nothing of ours is left out; ManyformError naming the first difference."""
        theirs: dict[str, Any] = {"architectures": [self.architecture],
                                  "model_type": self.model_type}
        try:
            for setting in self.settings:
                setting.write(model, theirs)
            back = on_meta(self.read_config(theirs))
        except (Unfit, ManyformError) as error:
            raise ManyformError(f"this model is no {self.model_type}: {error}") from error
        difference = first_difference(anatomy(model), anatomy(back))
        if difference:
            raise ManyformError(f"this model is no {self.model_type}: {difference}")
        return theirs

    def found(self, names: Iterable[str]) -> dict[str, str]:
        """The names of a file's tensors by those that the rules give: without the aliases, and
        with the prefix that files of a bare model leave out."""
        given = list(names)
        bare = self.prefix and not any(n.startswith(self.prefix) for n in given)
        result = {}
        for name in given:
            full = self.prefix + name if bare else name
            for there, here in self.aliases:
                full = full.replace(there, here)
            result[full] = name
        return result

    def places(self, model: Model) -> list[Place]:
        """Where the parameters lie in a checkpoint."""
        try:
            return places(model, self.top, self.block, self.layer)
        except KeyError as error:
            raise ManyformError(f"{self.model_type} has no place for {error.args[0]}") from error


def on_meta(config: ModelConfig) -> Model:
    """The model's shape, without memory for its weights."""
    with torch.device("meta"):
        return Model(config)


IRRELEVANT = {"place", "training", "config", "rope_base", "rope_scaling", "qk_norm_eps"}
"""Attributes that say nothing, or what the parts of a module say as well."""


def anatomy(model: Model) -> dict[str, Any]:
    """What makes a model the function that it is, apart from its weights' values: the class, the
    plain attributes and the parameters' shapes of every module, by name. (Layers that share their
    weights appear once.)"""
    config = model.config.to_dict()
    parts: dict[str, Any] = {}
    for key, value in config.items():
        if key not in ("pattern", "name", "embedding_std", "max_length", "norm", "norm_eps"):
            parts[f"setting {key}"] = value
    for name, module in model.named_modules():
        where = name or "model"
        parts[f"class of {where}"] = type(module).__name__
        for key, value in vars(module).items():
            if key.startswith("_") or key in IRRELEVANT:
                continue
            if isinstance(value, RotaryTable):
                parts[f"{where}.{key}"] = (tuple(value.frequencies.tolist()), value.factor,
                                           value.limit)
            elif _plain(value):
                parts[f"{where}.{key}"] = value
    for name, p in model.named_parameters():
        parts[f"shape of {name}"] = tuple(p.shape)
    return parts


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first part that differs, in words; empty if none does."""
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        if ours.get(key) != theirs.get(key):
            return f"its {key} is {ours.get(key)!r}, not {theirs.get(key)!r}"
    return ""


def names(things: Iterable[str], shown: int = 4) -> str:
    """A few names, and how many more."""
    found = list(things)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + more


class NoInit(torch.overrides.TorchFunctionMode):
    """Within it random initialisation is left out, for models whose weights are read next."""

    SKIPPED = (nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.orthogonal_,
               nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_,
               nn.init.xavier_normal_, torch.Tensor.normal_, torch.Tensor.uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func in self.SKIPPED:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
