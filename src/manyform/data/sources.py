"""Where text comes from: every kind of input becomes a stream of documents.

A document is a `str` that holds at least one character that is not white space. What a document is
depends on the input:

- `None` or "stdlib": each .py file of the Python standard library on this machine, but for tests
  and character tables (a file of that name is "./stdlib")
- a text file: pieces of about 8,000 to 16,000 characters, cut at blank lines where there are any,
  else at line ends, else at spaces, so that one long file can be split by document too
- a folder or a glob pattern: each text file (hidden files are left out)
- .jsonl, .parquet, .csv, .tsv: each row's text column
- "-": standard input, read as a text file, or as .jsonl where a column is named
- "hf:owner/name[:config][:split]": each row of a Hugging Face dataset

Text and row files may be compressed (.gz, .bz2, .xz, .zst). Everything is read as a stream.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import platform
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from manyform.data import formats
from manyform.data.formats import (
    documents,
    jsonl,
    kind_of,
    need,
    no_such_column,
    open_bytes,
    pieces,
    reading,
    text_of,
)
from manyform.errors import ManyformError

STDLIB_BYTES = 20_000_000
"""Default cap on the text taken from the standard library."""
SMALL_INPUT = 64 << 20
"""Inputs up to this many bytes are compared by content each time, larger ones by size and time
first."""

# Tests, and the machine-made character tables of `encodings`, say little about how people write.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
                    "encodings"}


class Source:
    """A stream of documents that can be read again: `for text in source`.

    name: for reports. identity: what names the same input in a later process. files: what the
    documents come from (none for standard input and hf:). skipped: files that were left out by the
    last reading because they are not UTF-8 text. max_bytes: the text ends there; the last
    document is cut.
    """

    def __init__(self, name: str, identity: str, read: Callable[[Source], Iterator[str]], *,
                 files: tuple[Path, ...] = (), version: str = "",
                 max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ManyformError(f"max_bytes must be at least 1, not {max_bytes}")
        self.name, self.identity, self.files = name, identity, files
        self.max_bytes = max_bytes
        self.skipped: list[str] = []
        self._read = read
        self._version = version

    def __iter__(self) -> Iterator[str]:
        """Documents in a fixed order, empty ones left out.

        Raises ManyformError where the input cannot be read as text or holds none.
        """
        self.skipped.clear()
        total = 0
        for text in self._read(self):
            if not text or text.isspace():
                continue
            try:
                raw = text.encode()
            except UnicodeEncodeError as error:
                raise ManyformError(
                    f"{self.name} holds a document that is not valid Unicode (half of a surrogate "
                    f"pair after {text[max(0, error.start - 20):error.start]!r}); write it again "
                    "as UTF-8") from error
            if self.max_bytes is not None and total + len(raw) >= self.max_bytes:
                rest = raw[:self.max_bytes - total].decode(errors="ignore")
                if rest and not rest.isspace():
                    yield rest
                return
            total += len(raw)
            yield text
        if not total:
            if self.skipped:
                raise ManyformError(f"none of the {len(self.files)} files of {self.name} is UTF-8 "
                                    "text; convert them to UTF-8 first")
            raise ManyformError(f"{self.name} holds no text; give an input that does")

    def fingerprint(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the input is now; two fingerprints with equal "content" mean the same text.

        known: an earlier fingerprint; where no file's size or time has changed since, and the
        input is too large to be read each time, its content hash is taken over.
        """
        if not self.files:
            return {"content": self._version, "stamp": "", "bytes": 0, "taken": time.time()}
        stamp, total, newest = hashlib.sha256(), 0, 0.0
        with reading(self.name):
            for path in self.files:
                info = path.stat()
                stamp.update(f"{path}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
                total, newest = total + info.st_size, max(newest, info.st_mtime)
            # A file written within the clock's grain of the last look may have changed unseen.
            if (known and total > SMALL_INPUT and known["stamp"] == stamp.hexdigest()
                    and newest < known["taken"] - 2):
                return known
            taken, content = time.time(), hashlib.sha256(self._version.encode())
            for path in self.files:
                content.update(f"\0{path}\0{path.stat().st_size}\0".encode())
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        content.update(block)
        return {"content": content.hexdigest(), "stamp": stamp.hexdigest(), "bytes": total,
                "taken": taken}


def open_source(spec: str | Path | None = None, *, column: str | None = None,
                max_bytes: int | None = None) -> Source:
    """The documents of `spec` (see the module's first lines for what it may be).

    column: the text column of row formats, "text" by default; refused for inputs that have none.
    max_bytes: stop after so many bytes of text (for the standard library 20 MB by default).
    Raises ManyformError where nothing is found, or an option does not apply.
    """
    given = "stdlib" if spec is None else str(spec)
    if given == "stdlib":
        _no_column(column, "the standard library")
        return _stdlib(STDLIB_BYTES if max_bytes is None else max_bytes)
    if given == "-":
        return _standard_input(column, max_bytes)
    if given.startswith("hf:"):
        return _hugging_face(given, column or "text", max_bytes)
    path = Path(given).expanduser()
    if path.is_file():
        if kind_of(path) == "text":
            _no_column(column, path.name)
        return Source(path.name, str(path.resolve()), lambda _: documents(path, column),
                      files=(path.resolve(),), max_bytes=max_bytes)
    if path.is_dir():
        files = _walk(path)
        if not files:
            raise ManyformError(f"the folder {path} holds no files; give one that does")
        name = path.resolve().name or str(path)
    elif glob.has_magic(given):
        matches = (Path(p) for p in glob.glob(str(path), recursive=True))
        files = tuple(sorted(p.resolve() for p in matches if p.is_file()))
        if not files:
            raise ManyformError(f"no file matches the pattern {given!r}")
        name = path.name
    else:
        raise ManyformError(_not_found(path))
    if all(kind_of(f) == "text" for f in files):
        _no_column(column, name)
    return Source(name, str(path.resolve()), lambda source: _folder(source, column), files=files,
                  max_bytes=max_bytes)


def _stdlib(max_bytes: int) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _STDLIB_LEFT_OUT]
        found += [Path(folder, n) for n in names if n.endswith(".py")]
    files = tuple(sorted(found, key=lambda p: p.relative_to(root).as_posix()))
    if not files:
        raise ManyformError(f"this Python keeps no library source in {root}; give a text file, a "
                            "folder or another input")
    return Source(f"Python {platform.python_version()} standard library", f"stdlib:{root}",
                  lambda source: _folder(source, None), files=files, max_bytes=max_bytes)


def _standard_input(column: str | None, max_bytes: int | None) -> Source:
    """Kept in a temporary file, so that it can be hashed first and read after."""
    kept = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the source)
    digest = hashlib.sha256()
    with reading("standard input"):
        while block := sys.stdin.buffer.read(1 << 20):
            digest.update(block)
            kept.write(block)

    def read(_: Source) -> Iterator[str]:
        kept.seek(0)
        with reading("standard input"):
            if column:
                yield from jsonl(kept, "standard input", column)
            else:
                yield from pieces(kept, "standard input")
    return Source("standard input", f"-:{digest.hexdigest()}", read, version=digest.hexdigest(),
                  max_bytes=max_bytes)


def _hugging_face(spec: str, column: str, max_bytes: int | None) -> Source:
    parts = re.split(r":(?![^\[]*\])", spec.removeprefix("hf:"))
    if not parts[0] or len(parts) > 3:
        raise ManyformError(f"a Hugging Face dataset reads like hf:owner/name[:config][:split], "
                            f"not {spec!r}")
    name, config, split = parts[0], None, "train"
    if len(parts) == 3:
        config, split = parts[1] or None, parts[2] or "train"
    elif len(parts) == 2 and re.match(r"(train|validation|valid|test|dev)\b", parts[1]):
        split = parts[1]
    elif len(parts) == 2:
        config = parts[1]
    datasets = need("datasets", spec, "hf")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise ManyformError(f"the dataset {spec} cannot be loaded: {error}") from error
    if column not in rows.column_names:
        raise ManyformError(no_such_column(spec, column, rows.column_names))

    def read(_: Source) -> Iterator[str]:
        for i, row in enumerate(rows.select_columns([column]), 1):
            yield text_of(row[column], f"row {i} of {spec}", column)
    version = str(getattr(rows, "_fingerprint", "")) or f"{spec}:{len(rows)}"
    return Source(spec, spec, read, version=version, max_bytes=max_bytes)


def _folder(source: Source, column: str | None) -> Iterator[str]:
    """Each text file a document; row files by their rows; text that is not UTF-8 is skipped."""
    for path in source.files:
        if kind_of(path) != "text" or path.stat().st_size > formats.MAX_LINE:
            yield from documents(path, column)
            continue
        with reading(path.name), open_bytes(path) as stream:
            raw = stream.read(formats.MAX_LINE + 1)
        if len(raw) > formats.MAX_LINE:  # a small compressed file that holds a large text
            yield from documents(path, column)
            continue
        try:
            yield raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            source.skipped.append(path.name)


def _walk(folder: Path) -> tuple[Path, ...]:
    """Every file below that is not hidden, ordered by its path."""
    found = []
    for here, folders, names in os.walk(folder.resolve()):
        folders[:] = [f for f in folders if not f.startswith((".", "__pycache__"))]
        found += [Path(here, n) for n in names if not n.startswith(".")]
    return tuple(sorted((p for p in found if p.is_file()), key=Path.as_posix))


def _no_column(column: str | None, name: str) -> None:
    if column is not None:
        raise ManyformError(f"column={column!r} applies to .jsonl, .parquet, .csv, .tsv and hf: "
                            f"inputs, and {name} has no columns")


def _not_found(path: Path) -> str:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    hint = f"did you mean {str(path.parent / near[0])!r}?" if near else (
        "give a text file, a folder, a pattern, '-' or hf:owner/name, or nothing for the Python "
        "standard library")
    return f"there is no input {str(path)!r}; {hint}"
