"""Tokens on disk: built once, memory-mapped ever after.

A folder holds one tokenized input:

- train-00000-<hash>.bin, ..., val-00000-<hash>.bin: token ids, little-endian, one, two or four
  bytes each as the vocabulary needs
- train-documents-<hash>.bin, val-documents-<hash>.bin: the first token of each document, int64
- tokenizer-<hash>.json
- manifest.json: what the input was, what each file above must be, and its own checksum

Every file but the manifest carries the sha256 of its content in its name and is put in place in one
step; the manifest comes last, in one step too. So a folder is complete or has no (or an older)
manifest whatever happens in between, and two processes that build the same input at once write the
same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from manyform.data.sources import Source
from manyform.data.split import (
    LEFT_OUT,
    TRAIN,
    VALIDATION,
    content_key,
    cut_document,
    hold_out,
    split,
)
from manyform.data.tokenizers import Tokenizer
from manyform.errors import ManyformError

FORMAT = 1
SHARD_TOKENS = 1 << 26
ENCODE_BYTES = 4 << 20
"""Text that is encoded at a time."""
TRAINING_BYTES = 64 << 20
"""Text that a tokenizer is trained on at most: evenly spread training documents."""
FULL_CHECK = 64 << 20
"""Files up to this many bytes together are hashed at every opening; of larger ones, those whose
size or time differs from the manifest's."""


class DamagedError(ManyformError):
    """A file of a stored input is missing or is not what its manifest says."""


class Tokens:
    """All tokens of one split as one long row, from one or more memory-mapped shards."""

    def __init__(self, shards: list[NDArray[Any]]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at `positions` (any shape), as int64."""
        if len(self._shards) == 1:
            return self._shards[0][positions].astype(np.int64)
        found = np.empty(positions.shape, dtype=np.int64)
        shard = np.searchsorted(self._starts, positions, side="right") - 1
        for i in np.unique(shard):
            here = shard == i
            found[here] = self._shards[i][positions[here] - self._starts[i]]
        return found


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where stored inputs live: `cache`, else $MANYFORM_CACHE, else the user's cache folder as the
    platform has it."""
    if cache is not None:
        return Path(cache).expanduser()
    if given := os.environ.get("MANYFORM_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "manyform" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "manyform"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "manyform"


def build(folder: Path, source: Source, tokenizer: Callable[[Iterator[str]], Tokenizer], *,
          seed: int, share: float, request: dict[str, Any], held_out: Source | None = None,
          shard_tokens: int = SHARD_TOKENS) -> None:
    """Read `source` once, split it, tokenize it and store it in `folder`.

    seed, share: for `split`; held_out: the validation documents, instead of a share.
    tokenizer: given the training documents, the tokenizer to use. request: kept in the manifest.
    Raises ManyformError where the source cannot be read or is too short, or the tokenizer does not
    know its text, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as spool:
            _build(folder, source, tokenizer, spool, seed, share, request, held_out,
                   shard_tokens)
    except OSError as error:
        raise ManyformError(f"tokens cannot be stored in {folder}: {error.strerror or error}; set "
                            "MANYFORM_CACHE to a folder with room") from error


def _build(folder: Path, source: Source, choose: Callable[[Iterator[str]], Tokenizer],
           spool: IO[bytes], seed: int, share: float, request: dict[str, Any],
           held_out: Source | None, shard_tokens: int) -> None:
    sources = [source] if held_out is None else [source, held_out]
    fingerprints = [s.fingerprint() for s in sources]
    content, sizes, hashes, counts = hashlib.sha256(), array("q"), array("Q"), []
    for text_source in sources:
        for text in text_source:
            raw = text.encode()
            content.update(len(raw).to_bytes(8, "little"))
            content.update(raw)
            sizes.append(len(raw))
            hashes.append(content_key(raw))
            spool.write(raw)
        counts.append(len(sizes))
    length, keys = np.frombuffer(sizes, dtype=np.int64), np.frombuffer(hashes, dtype=np.uint64)
    if held_out is None:
        plan = split(keys, length, seed=seed, share=share, name=source.name)
    else:
        plan = hold_out(keys, np.arange(len(keys)) >= counts[0], name=source.name)
    starts = np.cumsum(length) - length

    def read(i: int) -> bytes:
        spool.seek(int(starts[i]))
        return spool.read(int(length[i]))

    def documents(wanted: int) -> Iterator[str]:
        for i in range(len(length)):
            if i == plan.cut:
                yield cut_document(read(i), plan.tail)[wanted].decode()
            elif plan.side[i] == wanted:
                yield read(i).decode()

    def sample() -> Iterator[str]:
        every = 1 + int(length[plan.side == TRAIN].sum()) // TRAINING_BYTES
        for i, text in enumerate(documents(TRAIN)):
            if i % every == 0:
                yield text

    chosen = choose(sample())
    splits = {name: _encode(folder, name, documents(side), chosen, shard_tokens)
              for name, side in (("train", TRAIN), ("val", VALIDATION))}
    _refuse_unknown(splits, chosen, source.name)
    used = sum(s["bytes"] for s in splits.values())
    left_out = plan.side == LEFT_OUT
    manifest = {
        "format": FORMAT, "name": source.name, "request": request,
        "inputs": fingerprints, "content_hash": content.hexdigest(),
        "skipped": sum(len(s.skipped) for s in sources), "split_seed": seed,
        "validation_share": share, "held_out": None if held_out is None else held_out.name,
        "cut": plan.cut is not None, "copies_left_out": int(left_out.sum()),
        "gap_bytes": int(length[~left_out].sum()) - used,
        "tokenizer": {"name": chosen.name, "hash": chosen.hash, "vocab_size": chosen.vocab_size,
                      "file": _put(folder, "tokenizer", ".json", chosen.to_json().encode())},
        "dtype": chosen.dtype.str, "splits": splits,
    }
    _write_manifest(folder, manifest)
    keep = {f["file"] for f in _files(manifest)} | {"manifest.json"}
    for old in folder.iterdir():
        # What another process is writing now is young; what a killed one left grows old. It may
        # be gone already, or (on Windows) open elsewhere.
        with contextlib.suppress(OSError):
            if old.name not in keep and old.stat().st_mtime < time.time() - 3_600:
                old.unlink()


def _encode(folder: Path, name: str, documents: Iterator[str], tokenizer: Tokenizer,
            shard_tokens: int) -> dict[str, Any]:
    """Tokenize documents into the shards of one split; the split's part of the manifest."""
    shards: list[dict[str, Any]] = []
    starts = array("q")
    tokens = text_bytes = unknown = exact = 0
    pending: list[NDArray[Any]] = []
    waiting = 0

    def flush(everything: bool) -> None:
        nonlocal waiting, pending
        while waiting >= shard_tokens or (everything and waiting):
            joined = np.concatenate(pending)
            block = joined[:shard_tokens].astype(tokenizer.dtype)
            shards.append(_put(folder, f"{name}-{len(shards):05d}", ".bin", block.tobytes()))
            pending = [joined[shard_tokens:]]
            waiting = len(pending[0])

    for group in _groups(documents):
        for text, ids in zip(group, tokenizer.encode_batch(group), strict=True):
            if not len(ids):
                continue
            starts.append(tokens)
            tokens += len(ids)
            text_bytes += len(text.encode())
            if tokenizer.unknown is not None:
                unknown += int((ids == tokenizer.unknown).sum())
            if tokenizer.byte_lengths is not None:
                exact += int(tokenizer.byte_lengths[ids].sum())
            pending.append(ids)
            waiting += len(ids)
        flush(False)
    flush(True)
    offsets = _put(folder, f"{name}-documents", ".bin",
                   np.frombuffer(starts, dtype=np.int64).astype("<i8").tobytes())
    return {"tokens": tokens, "bytes": text_bytes, "documents": len(starts), "unknown": unknown,
            "exact_bytes": exact == text_bytes, "shards": shards, "offsets": offsets}


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _refuse_unknown(splits: dict[str, Any], tokenizer: Tokenizer, name: str) -> None:
    tokens = sum(s["tokens"] for s in splits.values())
    unknown = sum(s["unknown"] for s in splits.values())
    if not splits["train"]["tokens"] or not splits["val"]["tokens"]:
        raise ManyformError(f"{tokenizer.name} makes no tokens of the text of {name}; use another "
                            "tokenizer")
    if unknown > 0.001 * tokens:
        raise ManyformError(
            f"{tokenizer.name} sends {unknown / tokens:.1%} of the tokens of {name} to its unknown "
            "token, which makes bits per byte meaningless; use 'bytes' or 'bpe:N'")


def _put(folder: Path, stem: str, suffix: str, data: bytes) -> dict[str, Any]:
    """Write a file that is named by its content, in one step; its entry in the manifest."""
    digest = hashlib.sha256(data).hexdigest()
    target = folder / f"{stem}-{digest[:16]}{suffix}"
    if not target.exists() or _hash(target) != digest:
        _replace(target, data)
    return {"file": target.name, "bytes": len(data), "sha256": digest,
            "mtime_ns": target.stat().st_mtime_ns}


def _replace(target: Path, data: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    sealed = {**manifest, "checksum": _checksum(manifest)}
    _replace(folder / "manifest.json", (json.dumps(sealed, indent=1) + "\n").encode())


def _checksum(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stored input, or None where there is none (or one of another format).

    Raises DamagedError where it is not what was written.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("checksum") != _checksum(manifest):
        raise DamagedError(f"{path} is damaged: its checksum differs")
    return manifest if manifest["format"] == FORMAT else None


def is_current(folder: Path, manifest: dict[str, Any], sources: list[Source]) -> bool:
    """Whether the inputs still have the content that was stored; a new size-and-time stamp of the
    same content is remembered."""
    known = manifest["inputs"]
    now = [s.fingerprint(k) for s, k in zip(sources, known, strict=True)]
    if [f["content"] for f in now] != [f["content"] for f in known]:
        return False
    if [f["stamp"] for f in now] != [f["stamp"] for f in known]:
        manifest["inputs"] = now
        _write_manifest(folder, manifest)
    return True


def verify(folder: Path, manifest: dict[str, Any], *, full: bool = False) -> None:
    """Hold the files to the manifest; raises DamagedError naming the first that differs.

    full: hash every file, however large.
    """
    full = full or sum(f["bytes"] for f in _files(manifest)) <= FULL_CHECK
    for entry in _files(manifest):
        path = folder / entry["file"]
        try:
            info = path.stat()
            if info.st_size != entry["bytes"]:
                raise DamagedError(f"{path} has {info.st_size} bytes where {entry['bytes']} were "
                              "written")
            if (full or info.st_mtime_ns != entry["mtime_ns"]) and _hash(path) != entry["sha256"]:
                raise DamagedError(f"{path} is damaged: its checksum differs")
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error


def open_split(folder: Path, manifest: dict[str, Any], name: str,
               ) -> tuple[Tokens, NDArray[np.int64]]:
    """The tokens of one split and the first token of each of its documents."""
    part = manifest["splits"][name]
    try:
        shards = [np.asarray(np.memmap(folder / s["file"], dtype=manifest["dtype"], mode="r"))
                  for s in part["shards"]]
        starts = np.fromfile(folder / part["offsets"]["file"], dtype="<i8").astype(np.int64)
    except (OSError, ValueError) as error:
        raise DamagedError(f"the {name} tokens in {folder} cannot be opened: {error}") from error
    return Tokens(shards), starts


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    parts = manifest["splits"].values()
    return [manifest["tokenizer"]["file"],
            *(p["offsets"] for p in parts), *(s for p in parts for s in p["shards"])]


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
