"""Text to tokens and back: bytes, BPE trained on the data, or a given tokenizer.json.

No tokenizer adds tokens of its own: where a document begins is told by the `reset` marks of a batch
(see `manyform.data.loader`), so every token stands for text and bits per byte needs no correction.
"""

from __future__ import annotations

import abc
import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyform.errors import ManyformError

_BYTES_JSON = '{"manyform": "bytes"}\n'


class Tokenizer(abc.ABC):
    """What every tokenizer offers.

    name: for reports. vocab_size: ids are below it. byte_lengths: (vocab_size,) int64, bytes of
    text that each token stands for, or None where that depends on its neighbours. unknown: the id
    that replaces text outside the vocabulary, or None.
    """

    name: str
    vocab_size: int
    byte_lengths: NDArray[np.int64] | None = None
    unknown: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned little-endian type that holds every id."""
        small = self.vocab_size <= 1 << 8
        return np.dtype("u1" if small else "<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def hash(self) -> str:
        """sha256 of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> NDArray[Any]:
        """Ids of `text`, one-dimensional."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Ids of each text."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that form no character become U+FFFD."""

    @abc.abstractmethod
    def decoder(self) -> StreamDecoder:
        """A decoder that takes ids as they come; see `StreamDecoder`."""

    @abc.abstractmethod
    def to_json(self) -> str:
        """The tokenizer as JSON text; `load_tokenizer` reads it from a file."""

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, in one step."""
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_text(self.to_json(), encoding="utf-8", newline="")
        os.replace(partial, target)

    def _check(self, ids: Iterable[int]) -> list[int]:
        known = [int(i) for i in ids]
        for i in known:
            if not 0 <= i < self.vocab_size:
                raise ManyformError(f"token {i} is outside the vocabulary of {self.vocab_size}")
        return known


class StreamDecoder(abc.ABC):
    """Text as tokens arrive: `push(ids)` gives what is certain so far, `close()` the rest.

    The pieces joined are `decode` of all ids; a character whose bytes are spread over several
    tokens is given out whole.
    """

    @abc.abstractmethod
    def push(self, ids: int | Iterable[int]) -> str:
        """More ids; the text that they complete."""

    @abc.abstractmethod
    def close(self) -> str:
        """What was still waiting for more bytes."""


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: 256 tokens and nothing else."""

    name = "bytes"
    vocab_size = 256
    byte_lengths = np.ones(256, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self._check(ids)).decode(errors="replace")

    def decoder(self) -> StreamDecoder:
        return _ByteStream(self, [bytes([i]) for i in range(256)])

    def to_json(self) -> str:
        return _BYTES_JSON


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, without the special tokens its template would add.

    `pieces` holds each token's bytes where the tokenizer is byte-level (as trained here, GPT-2,
    Llama 3); other kinds decode through the library.
    """

    def __init__(self, text: str, *, name: str) -> None:
        from tokenizers import Tokenizer as Library
        try:
            self._library = Library.from_str(text)
        except Exception as error:
            raise ManyformError(f"{name} is not a tokenizer.json that the tokenizers library "
                                f"reads: {error}") from error
        # For batches of fixed shape; here they would invent or lose text.
        self._library.no_padding()
        self._library.no_truncation()
        self.name = name
        self._json = text
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ManyformError(f"{name} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.pieces = _byte_pieces(json.loads(text), vocabulary, self.vocab_size)
        if self.pieces is not None:
            self.byte_lengths = np.array([len(p) for p in self.pieces], dtype=np.int64)
        unknown = getattr(self._library.model, "unk_token", None)
        self.unknown = vocabulary.get(unknown) if unknown else None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=self.dtype) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        known = self._check(ids)
        if self.pieces is not None:
            return b"".join(self.pieces[i] for i in known).decode(errors="replace")
        return self._library.decode(known, skip_special_tokens=False)

    def decoder(self) -> StreamDecoder:
        return _ByteStream(self, self.pieces) if self.pieces is not None else _TextStream(self)

    def to_json(self) -> str:
        return self._json


class _ByteStream(StreamDecoder):
    def __init__(self, tokenizer: Tokenizer, pieces: Sequence[bytes]) -> None:
        self._tokenizer, self._pieces = tokenizer, pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        known = self._tokenizer._check([ids] if isinstance(ids, int) else ids)
        return self._decoder.decode(b"".join(self._pieces[i] for i in known))

    def close(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _TextStream(StreamDecoder):
    """For tokenizers whose text depends on neighbours: decode a short history, give what is new."""

    HISTORY, WAIT = 32, 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given, self._waiting = "", 0

    def push(self, ids: int | Iterable[int]) -> str:
        return "".join(self._one(i) for i in ([ids] if isinstance(ids, int) else ids))

    def _one(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A character has at most four bytes: after as many tokens a U+FFFD is there to stay.
        if text.endswith("�") and self._waiting < self.WAIT:
            self._waiting += 1
            return ""
        return self._give(text)

    def _give(self, text: str) -> str:
        new = text[len(self._given):]
        self._given, self._waiting = text, 0
        if len(self._ids) > 2 * self.HISTORY:
            self._ids = self._ids[-self.HISTORY:]
            self._given = self._tokenizer.decode(self._ids)
        return new

    def close(self) -> str:
        rest = self._give(self._tokenizer.decode(self._ids)) if self._waiting else ""
        self._ids, self._given = [], ""
        return rest


def train_bpe(texts: Iterator[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE (Sennrich 2016 on the bytes of GPT-2's pre-tokens), without unknown tokens.

    A text that is too small for so many merges gives a smaller vocabulary.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(texts, trainer)
    return JsonTokenizer(library.to_str(), name=f"bpe:{vocab_size}")


def bpe_size(spec: str) -> int | None:
    """N of "bpe:N", None for another spec; raises ManyformError where N is no size."""
    if not spec.startswith("bpe:"):
        return None
    digits = spec.removeprefix("bpe:").replace("_", "")
    if not digits.isdecimal() or not 256 < int(digits) <= 1 << 24:
        raise ManyformError(f"a trained tokenizer reads like bpe:1024, with a vocabulary larger "
                            f"than the 256 bytes, not {spec!r}")
    return int(digits)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """"bytes", or the path of a tokenizer.json (or of a folder that holds one).

    Raises ManyformError where there is none, or it cannot be read.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManyformError(f"a tokenizer is 'bytes', 'bpe:N' or the path of a tokenizer.json, and "
                            f"{str(spec)!r} cannot be read: {error}") from error
    if text.strip() == _BYTES_JSON.strip():
        return ByteTokenizer()
    return JsonTokenizer(text, name=path.name if path.name != "tokenizer.json"
                         else f"{path.resolve().parent.name}/tokenizer.json")


def _byte_pieces(description: dict[str, Any], vocabulary: dict[str, int],
                 size: int) -> list[bytes] | None:
    """Each token's bytes, or None where the tokenizer is not byte-level."""
    if (description.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    added = {t["content"] for t in description.get("added_tokens") or []}
    table = _byte_of_character()
    pieces = [b""] * size
    for token, i in vocabulary.items():
        if token in added:
            pieces[i] = token.encode()
        elif all(c in table for c in token):
            pieces[i] = bytes(table[c] for c in token)
        else:
            return None
    return pieces


def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others, in order,
    as the characters from U+0100 on (Radford 2019, section 2.2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return ({chr(b): b for b in printable}
            | {chr(256 + i): b for i, b in enumerate(others)})
