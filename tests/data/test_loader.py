"""What a step sees depends on (seed, step) and on nothing else."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyform import ManyformError
from manyform.data import IGNORE, Batches, Streams, Validation, load
from manyform.data.order import key_of, mix, permute
from manyform.data.store import Tokens


class Rows:
    """A dataset of documents of the given lengths; token i is i, so places can be read off."""

    byte_lengths = None

    def __init__(self, *lengths, shards=1):
        self.size = sum(lengths)
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.parts = Tokens(np.array_split(np.arange(self.size), shards))

    def tokens(self, split):
        return self.parts

    def documents(self, split):
        return self.starts

    def text_bytes(self, split):
        return 3 * self.size


documents = st.lists(st.integers(1, 40), min_size=3, max_size=30)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3_000), seed=st.integers())
def test_permutation_is_a_bijection(size, seed):
    image = permute(np.arange(size), size, key_of(seed, "test"))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_is_wide_and_keyed():
    size = 10**12 + 7
    index = np.array([0, 1, 2, size - 1])
    a, b = (permute(index, size, key_of(s, "test")) for s in (0, 1))
    assert ((a >= 0) & (a < size)).all()
    assert not np.array_equal(a, b)
    place = permute(np.arange(20_000), 20_000, key_of(5, "test"))
    assert abs(np.corrcoef(place, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(place[1:], place[:-1])[0, 1]) < 0.03
    first = np.array([permute(np.array([0]), 10, key_of(s, "test"))[0] for s in range(2_000)])
    assert np.bincount(first, minlength=10).min() > 130
    assert np.unique(mix(np.arange(1_000, dtype=np.uint64))).size == 1_000


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(1, 30), batch_size=st.integers(1, 9),
       seed=st.integers(), step=st.integers(0, 5_000), shards=st.integers(1, 4), data=st.data())
def test_a_batch_is_a_pure_function_of_seed_and_step(lengths, length, batch_size, seed, step,
                                                      shards, data):
    if sum(lengths) <= length:
        return
    one = Batches(Rows(*lengths), batch_size=batch_size, length=length, seed=seed)
    batch = one.batch(step)
    assert batch.tokens.shape == batch.targets.shape == (batch_size, length)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    other = Batches(Rows(*lengths, shards=shards), batch_size=batch_size, length=length, seed=seed)
    other.batch(step + data.draw(st.integers(-step, 50)))  # history does not matter
    same(other.batch(step), batch)
    cut = data.draw(st.integers(0, batch_size - 1))  # nor do micro-batches
    start = step * batch_size
    parts = [other.rows(start + a, b - a) for a, b in ((0, cut), (cut, batch_size)) if b > a]
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    assert torch.equal(torch.cat([marks(p) for p in parts]), marks(batch))
    wider = Batches(Rows(*lengths), batch_size=1, length=length, seed=seed)  # nor the batch size
    assert torch.equal(wider.batch(start).tokens, batch.tokens[:1])


def same(a, b):
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(marks(a), marks(b))


def marks(batch):
    return torch.zeros_like(batch.tokens).bool() if batch.reset is None else batch.reset


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(1, 30), seed=st.integers(0, 99))
def test_targets_and_resets(lengths, length, seed):
    rows = Rows(*lengths)
    if rows.size <= length:
        return
    batch = Batches(rows, batch_size=8, length=length, seed=seed).batch(seed)
    begins = set(rows.starts.tolist())
    for i in range(8):
        for t in range(length):
            token, target = int(batch.tokens[i, t]), int(batch.targets[i, t])
            following = (token + 1) % rows.size
            assert target == (IGNORE if following in begins else following)
            assert bool(marks(batch)[i, t]) == (t > 0 and token in begins)
            if t:
                assert token == (int(batch.tokens[i, t - 1]) + 1) % rows.size
    assert batch.reset is None or batch.reset.any()
    assert batch.counted == int((batch.targets >= 0).sum())


@settings(max_examples=30, deadline=None)
@given(lengths=documents, length=st.integers(1, 20), seed=st.integers())
def test_an_epoch_sees_every_token_at_most_once(lengths, length, seed):
    rows = Rows(*lengths)
    if rows.size <= length:
        return
    batches = Batches(rows, batch_size=1, length=length, seed=seed)
    for epoch in range(2):
        seen = batches.rows(epoch * batches.windows, batches.windows).tokens.flatten()
        assert len(seen) == len(seen.unique()) == rows.size // length * length


def test_each_epoch_has_its_own_order_and_cuts():
    n, length = 1_000, 7
    batches = Batches(Rows(n), batch_size=1, length=length, seed=0)
    first, second = (batches.rows(e * batches.windows, batches.windows).tokens[:, 0]
                     for e in (0, 1))
    assert first[0] % length != second[0] % length
    # Steps from window to window do not depend on where the ring was cut.
    assert not torch.equal(first.diff() % n, second.diff() % n)


def test_samples_past_a_block_continue():
    batches = Batches(Rows(500), batch_size=7, length=3, seed=0)
    joined = torch.cat([batches.batch(s).tokens for s in range(300)])
    assert torch.equal(joined, Batches(Rows(500), batch_size=2_100, length=3, seed=0)
                       .batch(0).tokens)


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(1, 12), batch_size=st.integers(1, 4),
       seed=st.integers(), data=st.data())
def test_streams_continue_and_reset(lengths, length, batch_size, seed, data):
    rows = Rows(*lengths)
    if rows.size < batch_size * length:
        with pytest.raises(ManyformError, match="give more text, or a smaller batch or length"):
            Streams(rows, batch_size=batch_size, length=length, seed=seed)
        return
    streams = Streams(rows, batch_size=batch_size, length=length, seed=seed)
    begins = set(rows.starts.tolist())
    epoch = data.draw(st.integers(0, 3))
    first = epoch * streams.steps_per_epoch
    steps = [streams.batch(first + i) for i in range(streams.steps_per_epoch)]
    seen = torch.cat([b.tokens.flatten() for b in steps])
    assert len(seen) == len(seen.unique())
    assert marks(steps[0])[:, 0].all()
    for i, batch in enumerate(steps):
        for t in range(length):
            for row in range(batch_size):
                token, target = int(batch.tokens[row, t]), int(batch.targets[row, t])
                assert bool(marks(batch)[row, t]) == (token in begins or (i == 0 and t == 0))
                assert target in (IGNORE, token + 1)
                following = (batch.tokens[row, t + 1] if t + 1 < length else
                             steps[i + 1].tokens[row, 0] if i + 1 < len(steps) else None)
                if following is not None:
                    assert target == (IGNORE if int(following) in begins else int(following))
    step = first + data.draw(st.integers(0, streams.steps_per_epoch - 1))
    fresh = Streams(rows, batch_size=batch_size, length=length, seed=seed)
    same(fresh.batch(step), streams.batch(step))
    row = data.draw(st.integers(0, batch_size - 1))
    assert torch.equal(fresh.rows(step * batch_size + row, 1).tokens[0],
                       streams.batch(step).tokens[row])


def test_streams_lay_documents_anew_each_epoch():
    streams = Streams(Rows(*[10] * 50), batch_size=2, length=5, seed=0)
    n = streams.steps_per_epoch
    a, b = (torch.cat([streams.batch(e * n + i).tokens for i in range(n)]) for e in (0, 1))
    assert not torch.equal(a, b)
    with pytest.raises(ManyformError, match="rows 1 to 2 are not of one step"):
        streams.rows(1, 2)


@settings(max_examples=60, deadline=None)
@given(lengths=documents, length=st.integers(1, 50), batch_size=st.integers(1, 5))
def test_validation_covers_every_token_once(lengths, length, batch_size):
    rows = Rows(*lengths)
    validation = Validation(rows, length=length, batch_size=batch_size)
    targets = torch.cat([b.targets.flatten() for b in validation])
    expected = sorted(set(range(rows.size)) - set(rows.starts.tolist()))
    assert sorted(targets[targets != IGNORE].tolist()) == expected
    assert len(list(validation)) == len(validation)
    assert validation.counts == (len(expected), 3.0 * len(expected))
    assert all(b.tokens.shape[1] == length for b in validation)
    assert all(b.tokens.max() < rows.size for b in validation)
    if expected:
        assert validation.bits_per_byte(1.5) == pytest.approx(1.5 / math.log(2) / 3)


def test_a_part_of_validation_is_spread_evenly():
    rows = Rows(1_001)
    part = Validation(rows, length=10, max_tokens=50)
    assert [int(r[0]) for b in part for r in b.tokens] == [0, 200, 400, 600, 800]
    assert Validation(rows, length=10, max_tokens=10**9).counts[0] == 1_000
    assert Validation(rows, length=10, max_tokens=3).counts[0] == 10
    with pytest.raises(IndexError):
        part[1]


def test_bits_per_byte_of_real_tokens(tmp_path, prose):
    path = tmp_path / "a.txt"
    path.write_text("größer: " + prose(90_000))
    data = load(path, tokenizer="bpe:400")
    validation = data.validation(128)
    tokens, text = validation.counts
    first = data.tokens("val")[data.documents("val")]
    assert text == data.text_bytes("val") - data.byte_lengths[first].sum()
    assert tokens == data.val_tokens - len(first)
    assert data.bits_per_byte(2.0) == pytest.approx(2.0 / math.log(2) * tokens / text)
    assert data.validation(64, 500).counts[0] <= 500


def test_dataset_makes_loaders(tmp_path, prose):
    path = tmp_path / "a.txt"
    path.write_text(prose(90_000))
    data = load(path)
    batch = data.batches(batch_size=3, length=20, seed=1).batch(4)
    same(batch, Batches(data, batch_size=3, length=20, seed=1).batch(4))
    held = data.batches(batch_size=3, length=20, seed=1, split="val")
    assert held.batch(0).tokens.shape == (3, 20)
    assert data.streams(batch_size=3, length=20, seed=1).batch(0).reset.any()
    moved = batch.to("meta")
    assert moved.tokens.device.type == "meta"
    text = data.tokenizer.decode(batch.tokens[0].tolist())
    assert text in path.read_text()


def test_errors():
    with pytest.raises(ManyformError, match="has 5 tokens, and a window of length 5 needs 6"):
        Batches(Rows(5), batch_size=1, length=5, seed=0)
    with pytest.raises(ManyformError, match="batch_size must be at least 1, not 0"):
        Batches(Rows(50), batch_size=0, length=5, seed=0)
    with pytest.raises(ManyformError, match="unknown split 'valid'; did you mean 'val'"):
        Batches(Rows(50), batch_size=1, length=5, seed=0, split="valid")
    with pytest.raises(ManyformError, match="counted from 0, not -1"):
        Batches(Rows(50), batch_size=1, length=5, seed=0).batch(-1)
