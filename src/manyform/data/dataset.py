"""`load`: from any input to tokens that are ready to train on."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyform.data import store
from manyform.data.loader import Batches, Streams, Validation
from manyform.data.sources import open_source
from manyform.data.tokenizers import Tokenizer, bpe_size, load_tokenizer, train_bpe
from manyform.errors import ManyformError


class Dataset:
    """A stored, tokenized input with a training and a validation split.

    name: of the input. path: the folder it is stored in. content_hash: sha256 of the documents in
    order. tokenizer: what made the tokens. vocab_size, train_tokens, val_tokens: counts.
    bytes_per_token: UTF-8 bytes of text per token, over both splits.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._manifest = manifest
        self.tokenizer: Tokenizer = load_tokenizer(path / manifest["tokenizer"]["file"]["file"])
        self.tokenizer.name = manifest["tokenizer"]["name"]
        self._splits = {name: store.open_split(path, manifest, name) for name in ("train", "val")}
        parts = manifest["splits"].values()
        self.name: str = manifest["name"]
        self.content_hash: str = manifest["content_hash"]
        self.vocab_size = self.tokenizer.vocab_size
        self.train_tokens, self.val_tokens = (p["tokens"] for p in parts)
        self.bytes_per_token = (sum(p["bytes"] for p in parts)
                                / (self.train_tokens + self.val_tokens))

    @property
    def byte_lengths(self) -> NDArray[np.int64] | None:
        """Bytes of text each token stands for, or None where the tokenizer cannot say exactly."""
        exact = all(p["exact_bytes"] for p in self._manifest["splits"].values())
        return self.tokenizer.byte_lengths if exact else None

    def tokens(self, split: str) -> store.Tokens:
        """All tokens of "train" or "val", documents one after the other."""
        return self._splits[split][0]

    def documents(self, split: str) -> NDArray[np.int64]:
        """The place of each document's first token in `tokens(split)`."""
        return self._splits[split][1]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of a split's text."""
        return int(self._manifest["splits"][split]["bytes"])

    def batches(self, *, batch_size: int, length: int, seed: int, split: str = "train") -> Batches:
        """Shuffled windows; see `Batches`."""
        return Batches(self, batch_size=batch_size, length=length, seed=seed, split=split)

    def streams(self, *, batch_size: int, length: int, seed: int, split: str = "train") -> Streams:
        """Contiguous rows for carried state; see `Streams`."""
        return Streams(self, batch_size=batch_size, length=length, seed=seed, split=split)

    def validation(self, length: int, max_tokens: int | None = None, *,
                   batch_size: int = 16) -> Validation:
        """A fixed list of validation batches; see `Validation`."""
        return Validation(self, length=length, max_tokens=max_tokens, batch_size=batch_size)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """From a mean loss over the whole validation split; `Validation.bits_per_byte` is exact
        for a part of it."""
        return self._whole.bits_per_byte(nats_per_token)

    @cached_property
    def _whole(self) -> Validation:
        return Validation(self, length=4_096)

    def verify(self) -> None:
        """Hash every stored file; raises ManyformError naming one that is damaged."""
        store.verify(self.path, self._manifest, full=True)

    def describe(self) -> dict[str, Any]:
        """JSON values for reports."""
        m = self._manifest
        return {
            "name": self.name, "content_hash": self.content_hash, "input": m["request"]["input"],
            "tokenizer": self.tokenizer.name, "tokenizer_hash": m["tokenizer"]["hash"],
            "vocab_size": self.vocab_size, "bytes_per_token": self.bytes_per_token,
            "exact_bytes": self.byte_lengths is not None,
            "train": self._describe("train"), "val": self._describe("val"),
            "split": {"by": self._split_by(), "seed": m["split_seed"],
                      "gap_bytes": m["gap_bytes"], "copies_left_out": m["copies_left_out"]},
            "skipped_files": m["skipped"],
        }

    def _split_by(self) -> str:
        m = self._manifest
        if m["held_out"]:
            return f"validation input {m['held_out']}"
        return "a cut of the largest document" if m["cut"] else "document"

    def _describe(self, split: str) -> dict[str, int]:
        part = self._manifest["splits"][split]
        return {key: part[key] for key in ("documents", "tokens", "bytes")}


def load(spec: str | Path | None = None, *, tokenizer: str | Path | Tokenizer = "bytes",
         column: str | None = None, cache: str | Path | None = None, seed: int = 0,
         validation: float | str | Path = 0.05, max_bytes: int | None = None) -> Dataset:
    """The tokens of an input, from the cache where it has not changed since it was stored.

    spec: None for the Python standard library, or a file, folder, pattern, "-" or hf: dataset
      (`manyform.data.sources`). column: the text column of row formats.
    tokenizer: "bytes", "bpe:N" (trained on the training documents), the path of a tokenizer.json,
      or a `Tokenizer`.
    cache: the folder to store in, by default the user's cache folder (or $MANYFORM_CACHE).
    validation: the share of the text that is for validation, or a second input whose documents
      are; copies of those are left out of training.
    seed: chooses the validation documents. The order of training has a seed of its own
      (`Dataset.batches`).
    max_bytes: use only so much of the text.

    A damaged store is built again, with a warning that names the damaged file. Raises ManyformError
    where the input or the tokenizer cannot be used.
    """
    source = open_source(spec, column=column, max_bytes=max_bytes)
    held_out = (None if isinstance(validation, int | float)
                else open_source(validation, column=column))
    sources = [source] if held_out is None else [source, held_out]
    share = 0.05 if isinstance(validation, str | Path) else float(validation)
    identity, choose = _tokenizer(tokenizer)
    request = {"format": store.FORMAT, "input": source.identity, "column": column,
               "max_bytes": source.max_bytes, "tokenizer": identity, "seed": seed,
               "validation": share if held_out is None else held_out.identity}
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name)[:48].strip("-.") or "input"
    folder = store.cache_folder(cache) / "tokens" / f"{stem}-{digest[:16]}"
    try:
        manifest = store.read_manifest(folder)
        if manifest is not None and store.is_current(folder, manifest, sources):
            store.verify(folder, manifest)
            return Dataset(folder, manifest)
    except store.DamagedError as error:
        warnings.warn(f"{error}; it is built again from {source.name}", stacklevel=2)
    store.build(folder, source, choose, seed=seed, share=share, request=request,
                held_out=held_out)
    for read in sources:
        if read.skipped:
            warnings.warn(f"{len(read.skipped)} files of {read.name} are not UTF-8 text and were "
                          f"left out (the first: {read.skipped[0]})", stacklevel=2)
    return open_dataset(folder)


def open_dataset(path: str | Path) -> Dataset:
    """A stored input by its folder (`Dataset.path`), whether or not the input is still there.

    Raises ManyformError where the folder holds none, or a file of it is damaged.
    """
    folder = Path(path)
    manifest = store.read_manifest(folder)
    if manifest is None:
        raise ManyformError(f"{folder} holds no stored tokens; use manyform.data.load to make some")
    store.verify(folder, manifest)
    return Dataset(folder, manifest)


def _tokenizer(spec: str | Path | Tokenizer,
               ) -> tuple[str, Callable[[Iterator[str]], Tokenizer]]:
    """What names the tokenizer, and how to get it from the training documents."""
    if isinstance(spec, str) and (size := bpe_size(spec)) is not None:
        return f"bpe:{size}", lambda texts: train_bpe(texts, size)
    ready = spec if isinstance(spec, Tokenizer) else load_tokenizer(spec)
    return ready.hash, lambda _: ready
