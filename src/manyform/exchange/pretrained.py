"""Checkpoints of `transformers` in and out, as models and as whole folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyform.errors import ManyformError, unknown
from manyform.exchange import folder as folders
from manyform.exchange.families import FAMILIES
from manyform.exchange.family import Family, NoInit, names
from manyform.exchange.folder import Weights, carry, fresh, parse_size, read_json, write_json
from manyform.exchange.tokenizer import ORIGIN, bytes_as_json
from manyform.exchange.wrapped import OWN, wrap
from manyform.model import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}


def load_pretrained(path: str | Path, *, dtype: torch.dtype | str = torch.float32,
                    device: str | torch.device = "cpu") -> Model:
    """A model from a folder of `config.json` and safetensors as Hugging Face writes them.

    dtype: of the parameters; "stored" keeps that of the files. Raises ManyformError for a family
    or a setting that has no equal here, and for missing, surplus, misshapen or damaged tensors,
    by name.
    """
    source = _existing(path)
    values = read_json(source / "config.json")
    family = _family(values, source)
    config = family.read_config(values, str(source / "config.json"))
    weights = Weights(source)
    with NoInit():
        model = Model(config)
    model.to(weights.dtype() if dtype == "stored" else _dtype(dtype))
    _read_weights(model, family, weights)
    return model.to(device).eval()


def _existing(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ManyformError(f"there is no folder {folder}; give one that holds a checkpoint "
                            "(config.json and safetensors)")
    return folder


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def _family(values: dict[str, Any], source: Path) -> Family:
    kind = values.get("model_type")
    if kind is None:
        hint = ("it is a folder of manyform; read it with manyform.load" if "pattern" in values
                else f"known: {', '.join(FAMILIES)}")
        raise ManyformError(f"{source / 'config.json'} names no model_type; {hint}")
    if kind == OWN.model_type:
        return OWN
    if kind not in FAMILIES:
        raise ManyformError(f"checkpoints of model_type {kind!r} cannot be read; known: "
                            f"{', '.join(FAMILIES)}")
    return FAMILIES[kind]


@torch.no_grad()
def _read_weights(model: Model, family: Family, weights: Weights) -> None:
    """Fill the model's parameters; every tensor of the files is used, or named in the error."""
    found = family.found(weights.shapes)
    own = model.state_dict()
    places = family.places(model)
    where = str(weights.folder)
    wanted = {theirs: shape for place in places
              for theirs, shape in zip(place.theirs, place.shapes(own), strict=True)}
    missing = [n for n in wanted if n not in found]
    if missing:
        raise ManyformError(f"{where} lacks {names(missing)}")
    copies = _copies(model, family, weights, found)
    surplus = [name for n, name in found.items() if n not in wanted and n not in copies
               and not n.endswith(family.ignored)]
    if surplus:
        raise ManyformError(f"{where} holds tensors that a {family.model_type} model of this "
                            f"config.json does not have: {names(surplus)}")
    wrong = [f"{found[n]} is {weights.shapes[found[n]]}, not {shape}"
             for n, shape in wanted.items() if weights.shapes[found[n]] != shape]
    if wrong:
        raise ManyformError(f"the tensors in {where} do not fit its config.json: {names(wrong)}")
    for place in places:
        parts = place.read([weights.get(found[theirs]) for theirs in place.theirs])
        for name, part in zip(place.ours, parts, strict=True):
            own[name].copy_(part)


def _copies(model: Model, family: Family, weights: Weights, found: dict[str, str]) -> set[str]:
    """The names under which the files hold shared tensors, such as a tied embedding, once more;
    ManyformError where a copy differs."""
    begins = dict(family.copies(model)) if family.copies is not None else {}
    if model.config.tie:
        begins[f"{family.top['head']}.weight"] = f"{family.top['embedding']}.weight"
    originals = {copy: original + copy.removeprefix(begin) for begin, original in begins.items()
                 for copy in found if copy.startswith(begin)}
    for copy, original in originals.items():
        if original in found and not torch.equal(weights.get(found[copy]),
                                                 weights.get(found[original])):
            raise ManyformError(f"{weights.folder} ties {copy} to {original} in its config.json, "
                                "and holds other values for it")
    return {copy for copy, original in originals.items() if original in found}


def save_pretrained(model: Model, path: str | Path, *, family: str | None = None,
                    like: str | Path | None = None, dtype: torch.dtype | str | None = None,
                    max_shard_size: int | str = "5GB") -> str:
    """Write a model so that `transformers.AutoModelForCausalLM.from_pretrained(path)` reads it; the
    family's name.

    family: a `model_type`; None takes the first that can say all that this model is, and where
    none can "manyform": a class of ours, shipped with the folder, which `trust_remote_code=True`
    (and manyform installed) loads. like: a folder whose tokenizer and generation settings, and
    keys of config.json that say nothing about logits, are carried along. dtype: of the tensors in
    the files, by default that of the parameters. Tied weights are written once. Raises
    ManyformError for a family that cannot represent the model, with the first difference, and
    where `path` already holds weights.
    """
    shard_bytes = parse_size(max_shard_size)
    source = None if like is None else _existing(like)
    origin = _origin(source)
    record, values = _choose(model, family, origin)
    kind = next(model.parameters()).dtype if dtype is None else _dtype(dtype)
    target = fresh(path)
    if record is None:
        values, places = wrap(model, target), OWN.places(model)
    else:
        places = record.places(model)
        kept = {k: v for k, v in origin.items() if k not in values and _about_use(k, record)}
        values = {**values, **(kept if origin.get("model_type") == record.model_type else {})}
    own = model.state_dict()
    extra = dict(record.constants(model)) if record is not None and record.constants else {}
    made = {n: (place, i) for place in places for i, n in enumerate(place.theirs)}

    def tensor(theirs: str) -> Tensor:
        if theirs in extra:
            return extra[theirs].to(kind)
        place, i = made[theirs]
        part = place.write({name: own[name].cpu() for name in place.ours})[i]
        return (part.to(kind) if part.is_floating_point() else part).contiguous().clone()
    sizes = {n: torch.Size(shape).numel() * kind.itemsize for place in places
             for n, shape in zip(place.theirs, place.shapes(own), strict=True)}
    sizes |= {n: t.numel() * kind.itemsize for n, t in extra.items()}
    folders.write_weights(target, sizes, tensor, shard_bytes)
    write_json(target / "config.json", {**values, "dtype": str(kind).removeprefix("torch.")})
    if source is not None:
        carry(source, target)
    bytes_as_json(target)
    return "manyform" if record is None else record.model_type


def _choose(model: Model, family: str | None, origin: dict[str, Any],
            ) -> tuple[Family | None, dict[str, Any]]:
    """The record that can say all that the model is, and its config.json; None for our class."""
    if family is not None and family != "manyform":
        if family not in FAMILIES:
            raise unknown("family", family, [*FAMILIES, "manyform"])
        return FAMILIES[family], FAMILIES[family].write_config(model)
    if family is None:
        likely = (origin.get("model_type"), model.config.name)
        for record in sorted(FAMILIES.values(), key=lambda r: r.model_type not in likely):
            try:
                return record, record.write_config(model)
            except ManyformError:
                continue
    return None, {}


def _origin(source: Path | None) -> dict[str, Any]:
    """The config.json of the checkpoint that a folder came from or is; empty where there is none.
    """
    for name in (ORIGIN, "config.json"):
        if source is not None and (source / name).is_file():
            values = read_json(source / name)
            if "model_type" in values:
                return values
    return {}


def _about_use(key: str, family: Family) -> bool:
    from manyform.exchange.settings import HARMLESS
    return key in HARMLESS | family.harmless and key not in (
        "torch_dtype", "dtype", "transformers_version", "auto_map", "architectures")


def import_folder(source: str | Path, target: str | Path, *,
                  dtype: torch.dtype | str = "stored") -> Model:
    """Turn a Hugging Face folder into one of manyform's (see `Model.save`), tokenizer and
    generation settings included; the model. Raises as `load_pretrained` does."""
    model = load_pretrained(source, dtype=dtype)
    folder = fresh(target)
    model.save(folder)
    carry(Path(source).expanduser(), folder)
    write_json(folder / ORIGIN, read_json(Path(source).expanduser() / "config.json"))
    return model


def export_folder(source: str | Path, target: str | Path, *, family: str | None = None,
                  dtype: torch.dtype | str | None = None, max_shard_size: int | str = "5GB") -> str:
    """Turn a folder of manyform's into a Hugging Face one; the family's name. dtype: by default
    that of the folder's files. Raises as `save_pretrained` does."""
    from manyform.model import load
    folder = _existing(source)
    kind = Weights(folder).dtype() if dtype is None else dtype
    return save_pretrained(load(folder), target, family=family, like=folder, dtype=kind,
                           max_shard_size=max_shard_size)
