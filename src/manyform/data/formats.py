"""One file to documents, whatever its format and compression, always as a stream.

Every function raises ManyformError, one sentence that names the file and the line, where the bytes
are not what they should be.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from manyform.errors import ManyformError

PIECE = 8_000
"""Characters after which a piece of a text file ends at the next blank line; at twice as many it
ends anyway."""
MAX_LINE = 64 << 20
"""Bytes of the longest line that .jsonl and .csv may have, and of the largest file that is held in
memory as one document; a larger file of a folder is cut into pieces."""

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ROWS = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def documents(path: Path, column: str | None) -> Iterator[str]:
    """The documents of one file by its format."""
    kind, name = kind_of(path), path.name
    if kind == ".parquet":
        yield from _parquet(path, column or "text")
        return
    with reading(name), open_bytes(path) as stream:
        if kind in (".jsonl", ".ndjson"):
            yield from jsonl(stream, name, column or "text")
        elif kind in (".csv", ".tsv"):
            yield from _csv(stream, name, column or "text", "," if kind == ".csv" else "\t")
        else:
            yield from pieces(stream, name)


def pieces(stream: Any, name: str) -> Iterator[str]:
    """A long text, a block of bytes at a time, cut into pieces (see `PIECE`)."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, done, at_end = "", 0, False
    while not at_end:
        block = stream.read(1 << 18)
        at_end = not block
        try:
            text += decoder.decode(block, final=at_end)
        except UnicodeDecodeError as error:
            raise ManyformError(
                f"{name} is not UTF-8 text (byte 0x{error.object[error.start]:02x} near offset "
                f"{done + error.start}); convert it to UTF-8 first") from error
        done += len(block)
        start = 0
        while len(text) - start > 2 * PIECE:
            end = _cut(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


def _cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends; more than 2 * PIECE characters follow it."""
    low, high = start + PIECE, start + 2 * PIECE
    if blank := _BLANK_LINE.search(text, low, high):
        return blank.end()
    return max(text.rfind("\n", low, high), text.rfind(" ", low, high)
               if "\n" not in text[low:high] else -1) + 1 or high


def jsonl(stream: Any, name: str, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, name), 1):
        if line.isspace():
            continue
        where = f"line {number} of {name}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManyformError(f"{where} is not JSON: {error.msg} at column {error.colno}"
                                ) from error
        if not isinstance(row, dict):
            raise ManyformError(f"{where} must be a JSON object with the key {column!r}, not "
                                f"{type(row).__name__}")
        if column not in row:
            raise ManyformError(no_such_column(where, column, row))
        yield text_of(row[column], where, column)


def _csv(stream: Any, name: str, column: str, delimiter: str) -> Iterator[str]:
    before = csv.field_size_limit(MAX_LINE)
    try:
        reader = csv.reader(_lines(stream, name), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            raise ManyformError(f"{name} is empty; its first line must name the columns")
        if column not in header:
            raise ManyformError(no_such_column(name, column, header))
        place = header.index(column)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ManyformError(f"line {reader.line_num} of {name} has {len(row)} fields where "
                                    f"the header has {len(header)}")
            yield row[place]
    except csv.Error as error:
        raise ManyformError(f"line {reader.line_num} of {name} is not valid CSV: {error}"
                            ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, column: str) -> Iterator[str]:
    parquet = need("pyarrow.parquet", path.name, "data")
    from pyarrow import ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ManyformError(no_such_column(path.name, column, names))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    yield text_of(value.as_py(), f"row {row} of {path.name}", column)
    except (ArrowException, OSError) as error:
        raise ManyformError(f"{path.name} is not a readable parquet file: {error}") from error


def _lines(stream: Any, name: str) -> Iterator[str]:
    """Lines with their ends; never more than MAX_LINE bytes are held."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ManyformError(f"line {number} of {name} is longer than {MAX_LINE:,} bytes; this "
                                "format holds one row a line")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ManyformError(f"line {number} of {name} is not UTF-8 text (byte 0x"
                                f"{line[error.start]:02x}); convert it to UTF-8 first") from error


def text_of(value: object, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ManyformError(f"{column!r} in {where} must be text, not {type(value).__name__}")
    return value


def kind_of(path: Path) -> str:
    """A row format's suffix, or "text"."""
    suffixes = [s.lower() for s in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    inner = suffixes[-2:-1] if packed else suffixes[-1:]
    kind = inner[0] if inner and inner[0] in _ROWS else "text"
    if kind == ".parquet" and packed:
        raise ManyformError(f"{path.name} is a compressed parquet file, which cannot be read as a "
                            "stream; decompress it (parquet is compressed inside)")
    return kind


def open_bytes(path: Path) -> Any:
    """The file's bytes as a binary stream, decompressed by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        zstandard = need("zstandard", path.name, "data")
        return io.BufferedReader(_Zstandard(zstandard, open(path, "rb")), 1 << 18)
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """Frames of a .zst file, one after the other; a truncated file raises EOFError."""

    def __init__(self, zstandard: Any, file: IO[bytes]) -> None:
        self._module, self._file = zstandard, file
        self._frame: Any = None
        self._ready, self._pending = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._pending or self._file.read(1 << 16)
            self._pending = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(block)
            except self._module.ZstdError as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one sentence."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ManyformError(f"{name} is damaged or cut short: {error}") from error
    except OSError as error:
        raise ManyformError(f"{name} cannot be read: {error.strerror or error}") from error


def need(module: str, what: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ManyformError(f"reading {what} needs the package {package!r}; "
                            f"pip install 'manyform[{extra}]'") from error


def no_such_column(where: str, column: str, known: Any) -> str:
    names = ", ".join(map(str, known)) or "none"
    return f"{where} has no column {column!r}; its columns are: {names} (choose one with column=)"
