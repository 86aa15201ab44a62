"""Which documents are for training and which for validation.

The side of a document is decided by a hash of its content, so copies of a document are always on
the same side; white space is not counted, so a copy with other line ends or indentation is a copy.
Documents are taken for validation in the order of their seeded hashes until their size is nearest
to the wanted share.

Where whole documents cannot make up half of that share (one document, or a few large ones), the
end of the largest becomes validation text, and the text just before it, the gap, is used by
neither, so that no sentence continues from one side to the other. Copies of that document are left
out: cut elsewhere by a few bytes, they would leak.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyform.data.order import key_of, mix
from manyform.errors import ManyformError

MIN_TEXT = 1_024
"""Bytes of text below which nothing can be trained and validated."""
MIN_VALIDATION = 16_384
"""Bytes of validation text that small inputs aim for, while it is at most a fifth of the whole."""
GAP = 1_024
"""Bytes between training and validation text where a document is cut, at most a quarter of the
validation text."""

TRAIN, VALIDATION, LEFT_OUT = 0, 1, 2


class Split(NamedTuple):
    """side: (documents,) TRAIN, VALIDATION or LEFT_OUT. cut: the document whose last `tail` bytes
    are for validation and the others for training, or None."""

    side: NDArray[np.int8]
    cut: int | None
    tail: int


def content_key(raw: bytes) -> int:
    """64 bits of a hash of the document without its white space."""
    words = b"".join(raw.split())
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def split(keys: NDArray[np.uint64], sizes: NDArray[np.int64], *, seed: int, share: float,
          name: str) -> Split:
    """Choose the validation documents.

    keys: `content_key` of each document. sizes: their bytes. share: of the bytes, for validation;
    at least `MIN_VALIDATION` bytes, but no more than a fifth. name: of the input, for errors.
    Raises ManyformError where the text is too short to be split.
    """
    if not 0 < share < 1:
        raise ManyformError(f"the validation share must lie between 0 and 1, not {share}")
    total = int(sizes.sum())
    if total < MIN_TEXT:
        raise ManyformError(f"{name} holds {total} bytes of text, and at least {MIN_TEXT} are "
                            "needed to train on some and validate on the rest")
    target = max(int(share * total), min(MIN_VALIDATION, total // 5))
    unique, first, group = np.unique(keys, return_index=True, return_inverse=True)
    weight = np.bincount(group, weights=sizes).astype(np.int64)
    order = np.argsort(mix(unique ^ key_of(seed, "split")), kind="stable")
    order = order[weight[order] <= target]
    reached = np.cumsum(weight[order])
    count = int(np.searchsorted(reached, target)) + 1
    if count > len(order):
        count = len(order)
    elif count > 1 and reached[count - 1] - target > target - reached[count - 2]:
        count -= 1
    chosen = np.full(len(unique), TRAIN, dtype=np.int8)
    chosen[order[:count]] = VALIDATION
    side = chosen[group]
    missing = target - int(weight[order[:count]].sum())
    if 2 * missing <= target:
        return Split(side, None, 0)
    largest = int(np.argmax(np.where(chosen == TRAIN, sizes[first], 0)))
    side[group == largest] = LEFT_OUT
    side[first[largest]] = TRAIN
    return Split(side, int(first[largest]), missing)


def hold_out(keys: NDArray[np.uint64], given: NDArray[np.bool_], *, name: str) -> Split:
    """The split where validation documents come from an input of their own.

    given: (documents,) bool, true for those; copies of them in the training input are left out.
    Raises ManyformError where nothing is left to train on.
    """
    side = np.where(given, VALIDATION, np.where(np.isin(keys, keys[given]), LEFT_OUT, TRAIN))
    if not (side == TRAIN).any():
        raise ManyformError(f"every document of {name} is also in the validation input; give "
                            "training text that is not")
    return Split(side.astype(np.int8), None, 0)


def cut_document(raw: bytes, tail: int) -> tuple[bytes, bytes]:
    """Training and validation text of one document, with the gap between them.

    The validation text begins at a line where one begins nearby, else at a character, and is at
    most half of the document.
    """
    start = max(len(raw) - tail, len(raw) // 2)
    line = raw.find(b"\n", start, start + min(2_048, (len(raw) - start) // 2)) + 1
    start = _character(raw, line or start)
    return raw[:_character(raw, start - min(GAP, (len(raw) - start) // 4))], raw[start:]


def _character(raw: bytes, at: int) -> int:
    """The last position up to `at` where a UTF-8 character begins."""
    while 0 < at < len(raw) and raw[at] & 0xC0 == 0x80:
        at -= 1
    return at
