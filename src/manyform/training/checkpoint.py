"""Checkpoints that survive a kill at any moment: written aside, forced to disk, renamed, checked.

    checkpoints/step-00000500/
      config.json, model.safetensors    the model: `manyform.load` reads this folder
      tensors.safetensors               optimizer, random generators, carried state
      values.json                       every number and the places of the tensors
      manifest.json                     SHA-256 and size of each file above, and its own SHA-256

A folder under its final name is whole unless the disk damaged it, and then the checksums say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from manyform.errors import ManyformError
from manyform.model import Model

_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".writing-"


class DamagedError(ManyformError):
    """A checkpoint that is not what was written; the message names the folder and the file."""


def save(root: Path, step: int, model: Model, state: dict[str, Any], *, anchor: bool) -> Path:
    """Write the checkpoint of `step` under `root`, whole or not at all; returns its folder.

    state: a tree of dicts, lists, tensors and JSON values, without the model's weights. anchor: a
    healthy state at a step-count boundary, to which a diverged run may go back.
    """
    final = root / f"step-{step:08d}"

    def write(folder: Path) -> None:
        from safetensors.torch import save_file
        model.save(folder)
        tensors: dict[str, Tensor] = {}
        skeleton = _split(state, tensors)
        save_file(tensors, str(folder / "tensors.safetensors"))
        (folder / "values.json").write_text(json.dumps(skeleton))
        files = sorted(p for p in folder.iterdir())
        manifest = {"format": 1, "step": step, "anchor": anchor, "files": {
            p.name: {"sha256": _checksum(p), "bytes": p.stat().st_size} for p in files}}
        manifest["sha256"] = _own_checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    write_folder(final, write)
    return final


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `final`, force it to disk, and give it that name."""
    aside = final.parent / f"{_ASIDE}{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for path in aside.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync_folder(aside)
    if final.exists():  # a folder cannot be renamed over another one
        old = final.parent / f"{_ASIDE}old-{final.name}"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    aside.rename(final)
    _sync_folder(final.parent)


def load(folder: Path, model: Model) -> dict[str, Any]:
    """Check every file of a checkpoint, put the weights into `model`, return the state.

    Raises DamagedError, before the model is touched, where a file is missing or altered.
    """
    from safetensors.torch import load_file
    verify(folder)
    weights = load_file(str(folder / "model.safetensors"))
    if model.config.tie:
        weights["head.weight"] = weights["embedding.weight"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ManyformError(f"the checkpoint {folder} is of another model: {error}") from error
    tensors = load_file(str(folder / "tensors.safetensors"))
    return _join(json.loads((folder / "values.json").read_text()), tensors)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their checksums; DamagedError if not."""
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"the checkpoint {folder} is damaged: {name} is missing")
        if path.stat().st_size != facts["bytes"] or _checksum(path) != facts["sha256"]:
            raise DamagedError(f"the checkpoint {folder} is damaged: {name} is not what was "
                               "written (its checksum differs)")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; DamagedError if it cannot be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("sha256", None) != _own_checksum(manifest):
            raise ValueError("its checksum differs")
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"the checkpoint {folder} is damaged: its manifest cannot be read "
                           f"({error})") from error
    return manifest


def folders(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, the newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)),
                  key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ManyformError(f"{folder} is not a checkpoint: its name is not step-NNNNNNNN")
    return int(match[1])


def load_newest(root: Path, model: Model, report: Callable[[str], None], *,
                anchor: bool = False) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint (with anchor=True of the newest anchor), or None.

    Every damaged one on the way is named through `report` and set aside, as is whatever a kill
    left half-written.
    """
    if root.is_dir():
        for path in root.glob(f"{_ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)
    for folder in folders(root):
        try:
            if anchor and not read_manifest(folder)["anchor"]:
                continue
            return load(folder, model)
        except DamagedError as error:
            report(f"{error}; using the one before it")
            target = root / f"damaged-{folder.name}"
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
    return None


def rotate(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the newest anchor."""
    found = folders(root)
    anchors = [p for p in found if _is_anchor(p)]
    for folder in found[keep:]:
        if folder not in anchors[:1]:
            _delete(folder)


def drop_after(root: Path, step: int) -> None:
    """Delete the checkpoints later than `step` (the path that a diverged run leaves)."""
    for folder in folders(root):
        if step_of(folder) > step:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Rename first: a kill in the middle must not leave half a checkpoint under its name."""
    doomed = folder.parent / f"{_ASIDE}old-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_anchor(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder)["anchor"])
    except DamagedError:
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor moved into `tensors` and a mark in its place."""
    if isinstance(tree, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = tree.detach().contiguous()
        return {"tensor": key}
    if isinstance(tree, dict):
        return {"dict": {k: _split(v, tensors) for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        return [_split(v, tensors) for v in tree]
    return tree


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {k: _join(v, tensors) for k, v in tree["dict"].items()}
    if isinstance(tree, list):
        return [_join(v, tensors) for v in tree]
    return tree
