"""Batches in an exact order: which tokens a step sees is a pure function of (seed, step).

`Batches` numbers its samples n = step * batch_size + row. Each epoch the training tokens, taken as
a ring of N, are cut into N // length windows from a place of its own, and a pseudo-random
permutation sends n to a window. So a position in training is one integer, and a batch can be loaded
whole, in parts or by several workers, with the same rows.

`Streams` is for truncated backpropagation: row b of step s + 1 continues row b of step s, and the
state is carried. Each epoch lays the documents in an order of its own and cuts the row of all of
them into batch_size streams.

Document boundaries are marks, not tokens. `reset` is true where a token is the first of a document,
and such a token is not a target (it becomes IGNORE): nothing that precedes it tells of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyform.data.order import key_of, mix, permute
from manyform.data.store import Tokens
from manyform.errors import ManyformError, unknown

IGNORE = -100
"""The target that is not counted, `Model.loss`'s default."""

_BLOCK = 1_024


class Stored(Protocol):
    """What a loader needs of a dataset."""

    @property
    def byte_lengths(self) -> NDArray[np.int64] | None: ...
    def tokens(self, split: str) -> Tokens: ...
    def documents(self, split: str) -> NDArray[np.int64]: ...
    def text_bytes(self, split: str) -> int: ...


class Batch(NamedTuple):
    """tokens, targets: (rows, length) int64; targets are the tokens that follow, or IGNORE.

    reset: (rows, length) bool, true where a document begins, or None where none does. In batches
    that start from the initial state the first column is never marked: it needs no reset.
    """

    tokens: Tensor
    targets: Tensor
    reset: Tensor | None

    @property
    def counted(self) -> int:
        """Targets that are not IGNORE."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.tokens.to(device, non_blocking=True),
                     self.targets.to(device, non_blocking=True),
                     None if self.reset is None else self.reset.to(device, non_blocking=True))


class Batches:
    """Shuffled windows: `batch(step)` for any step, in any order, gives the same rows each time.

    data: a dataset. batch_size: rows. length: tokens a row. seed: chooses the order, any whole
    number. split: "train" or "val". Raises ManyformError where the split is shorter than a row.
    """

    def __init__(self, data: Stored, *, batch_size: int, length: int, seed: int,
                 split: str = "train") -> None:
        _at_least_one(batch_size=batch_size, length=length)
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self._ring = _Ring(data, split, length)
        self.windows = self._ring.size // length
        """Windows an epoch."""
        self._order, self._offset = key_of(seed, "windows"), key_of(seed, "offset")
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.rows(step * self.batch_size, self.batch_size)

    def rows(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1 of the endless sequence of samples; step s is the
        samples from s * batch_size on. Micro-batches and parallel workers take parts of a step."""
        _at_least_one(count=count)
        if start < 0:
            raise ManyformError(f"steps and samples are counted from 0, not {start}")
        first, last = start // _BLOCK, (start + count - 1) // _BLOCK
        starts = np.concatenate([self._block(i) for i in range(first, last + 1)])
        return self._ring.batch(starts[start - first * _BLOCK:][:count], self.length)

    def _block(self, i: int) -> NDArray[np.int64]:
        """Where the windows of _BLOCK samples start; computed together because that is cheap."""
        if i not in self._blocks:
            self._blocks = {k: v for k, v in self._blocks.items() if k >= i - 1 and k <= i + 1}
            self._blocks[i] = self._starts(np.arange(i * _BLOCK, (i + 1) * _BLOCK))
        return self._blocks[i]

    def _starts(self, sample: NDArray[np.int64]) -> NDArray[np.int64]:
        epoch = (sample // self.windows).astype(np.uint64)
        window = permute(sample % self.windows, self.windows, mix(self._order ^ mix(epoch)))
        offset = mix(self._offset ^ mix(epoch)) % np.uint64(self._ring.size)
        return (offset.astype(np.int64) + window * self.length) % self._ring.size


class Streams:
    """Contiguous rows for truncated backpropagation: carry the model's state from step to step.

    Arguments as for `Batches`. At the first step of each epoch, `steps_per_epoch` apart, every row
    starts anew, which its `reset` says, so a carried state needs no other care.
    """

    def __init__(self, data: Stored, *, batch_size: int, length: int, seed: int,
                 split: str = "train") -> None:
        _at_least_one(batch_size=batch_size, length=length)
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self._tokens, self._documents = data.tokens(split), data.documents(split)
        self._size = len(self._tokens)
        self._stride = self._size // batch_size
        self.steps_per_epoch = self._stride // length
        if not self.steps_per_epoch:
            raise ManyformError(f"{batch_size} streams of {length} tokens need more than the "
                                f"{self._size} tokens of the {split} split; give more text, or a "
                                "smaller batch or length")
        self._order = key_of(seed, "streams")
        self._laid: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.rows(step * self.batch_size, self.batch_size)

    def rows(self, start: int, count: int) -> Batch:
        """Rows of one step: those from start % batch_size on, of step start // batch_size."""
        _at_least_one(count=count)
        step, first = divmod(start, self.batch_size)
        if start < 0 or first + count > self.batch_size:
            raise ManyformError(f"rows {start} to {start + count - 1} are not of one step of "
                                f"{self.batch_size} rows")
        epoch, within = divmod(step, self.steps_per_epoch)
        order, starts = self._lay(epoch)
        row = np.arange(first, first + count, dtype=np.int64)[:, None]
        place = (row * self._stride + within * self.length
                 + np.arange(self.length + 1)) % self._size
        which = np.searchsorted(starts, place, side="right") - 1
        begins = place == starts[which]
        tokens = self._tokens[self._documents[order[which]] + place - starts[which]]
        if within == 0:
            begins[:, 0] = True
        return _batch(tokens, begins)

    def _lay(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents in the order of an epoch, and where each begins in that order."""
        if self._laid is None or self._laid[0] != epoch:
            count = len(self._documents)
            key = mix(self._order ^ mix(np.array([epoch], dtype=np.uint64)))
            order = permute(np.arange(count), count, key)
            lengths = np.diff(self._documents, append=self._size)[order]
            self._laid = epoch, order, np.cumsum(lengths) - lengths
        return self._laid[1:]


class Validation:
    """A fixed list of batches that covers the validation split once, and its bits per byte.

    data, length, split: as for `Batches`. max_tokens: at most so many tokens (one window at least),
    in windows spread evenly over the split. batch_size: rows of a batch; the last may have fewer.
    """

    def __init__(self, data: Stored, *, length: int, max_tokens: int | None = None,
                 batch_size: int = 16, split: str = "val") -> None:
        _at_least_one(length=length, batch_size=batch_size)
        self._data, self._split = data, split
        self.length, self.batch_size = length, batch_size
        self._ring = _Ring(data, split, 1)
        windows = -(-(self._ring.size - 1) // length)
        count = windows
        if max_tokens is not None:
            _at_least_one(max_tokens=max_tokens)
            count = min(windows, max(1, max_tokens // length))
        self._starts = np.arange(count, dtype=np.int64) * windows // count * length

    def __len__(self) -> int:
        return -(-len(self._starts) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`; in the split's last window, tokens past its end are 0 and not counted."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        starts = self._starts[index * self.batch_size:(index + 1) * self.batch_size]
        return self._ring.batch(starts, self.length, around=False)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def counts(self) -> tuple[int, float]:
        """Targets that are counted, and the bytes of text they stand for."""
        lengths = self._data.byte_lengths
        targets = [b.targets[b.targets != IGNORE].numpy() for b in self]
        count = sum(map(len, targets))
        if lengths is not None:
            return count, float(sum(int(lengths[t].sum()) for t in targets))
        return count, count * self._data.text_bytes(self._split) / self._ring.size

    def bits_per_byte(self, nats_per_token: float) -> float:
        """From the mean loss over all counted targets of these batches."""
        tokens, text = self.counts
        return nats_per_token / math.log(2) * tokens / text


class _Ring:
    """The tokens of a split, the last followed by the first, and where documents begin."""

    def __init__(self, data: Stored, split: str, length: int) -> None:
        if split not in ("train", "val"):
            raise unknown("split", split, ("train", "val"))
        self._tokens = data.tokens(split)
        self.size = len(self._tokens)
        if self.size <= length:
            raise ManyformError(f"the {split} split has {self.size} tokens, and a window of length "
                                f"{length} needs {length + 1}; give more text or a shorter length")
        starts = data.documents(split)
        self._begins = np.concatenate([starts, self.size + starts[starts <= length]])

    def batch(self, starts: NDArray[np.int64], length: int, *, around: bool = True) -> Batch:
        """Windows of length + 1 tokens from `starts`, for use from the initial state."""
        places = starts[:, None] + np.arange(length + 1)
        begins = np.zeros(places.shape, dtype=bool)
        low = np.searchsorted(self._begins, starts)
        count = np.searchsorted(self._begins, starts + length + 1) - low
        for row in np.flatnonzero(count):
            begins[row, self._begins[low[row]:low[row] + count[row]] - starts[row]] = True
        begins[:, 0] = False
        tokens = self._tokens[places % self.size]
        if around:
            return _batch(tokens, begins)
        past = places >= self.size
        tokens[past] = 0
        return _batch(tokens, begins & ~past, past)


def _batch(tokens: NDArray[np.int64], begins: NDArray[np.bool_],
           past: NDArray[np.bool_] | None = None) -> Batch:
    """From windows of length + 1 tokens and where documents begin in them."""
    targets = tokens[:, 1:].copy()
    targets[begins[:, 1:] if past is None else (begins | past)[:, 1:]] = IGNORE
    reset = torch.from_numpy(begins[:, :-1].copy()) if begins[:, :-1].any() else None
    return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), reset)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ManyformError(f"{name} must be at least 1, not {value}")
