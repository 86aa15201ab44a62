"""No text is on both sides, and each side gets its share."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyform import ManyformError
from manyform.data import load
from manyform.data.split import (
    GAP,
    LEFT_OUT,
    MIN_VALIDATION,
    TRAIN,
    VALIDATION,
    content_key,
    cut_document,
    split,
)


@settings(max_examples=150, deadline=None)
@given(documents=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60_000)), min_size=1,
                          max_size=60),
       seed=st.integers(), share=st.floats(0.01, 0.3))
def test_copies_stay_together_and_shares_hold(documents, seed, share):
    by_key = dict(documents)  # one size a content
    keys = np.array([k for k, _ in documents], dtype=np.uint64)
    sizes = np.array([by_key[k] for k, _ in documents])
    total = int(sizes.sum())
    if total < 1_024:
        with pytest.raises(ManyformError, match="bytes of text, and at least 1024"):
            split(keys, sizes, seed=seed, share=share, name="it")
        return
    plan = split(keys, sizes, seed=seed, share=share, name="it")
    again = split(keys, sizes, seed=seed, share=share, name="it")
    assert np.array_equal(plan.side, again.side)
    for key in np.unique(keys):
        sides = set(plan.side[keys == key].tolist())
        assert len(sides) == 1 or sides == {TRAIN, LEFT_OUT}  # the first copy of a cut document
    target = max(int(share * total), min(MIN_VALIDATION, total // 5))
    whole = int(sizes[plan.side == VALIDATION].sum())
    assert target <= 2 * (whole + plan.tail)
    assert whole + plan.tail <= 1.5 * target + 1
    assert (plan.cut is None) == (plan.tail == 0)
    assert plan.cut is None or plan.side[plan.cut] == TRAIN


def test_order_of_documents_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, 400).astype(np.uint64)
    sizes = rng.integers(1_000, 5_000, 400)
    plan = split(keys, sizes, seed=3, share=0.05, name="it")
    turn = rng.permutation(400)
    turned = split(keys[turn], sizes[turn], seed=3, share=0.05, name="it")
    assert np.array_equal(plan.side[turn], turned.side)
    assert 0.03 < sizes[plan.side == VALIDATION].sum() / sizes.sum() < 0.07
    assert not np.array_equal(plan.side, split(keys, sizes, seed=4, share=0.05, name="it").side)


def test_white_space_does_not_make_another_document():
    assert content_key(b"a b\n  c") == content_key(b"a b\r\n\tc\n") != content_key(b"a b c d")


@settings(max_examples=80, deadline=None)
@given(text=st.text("aé你😀\n ", min_size=300, max_size=900), share=st.floats(0.05, 0.9))
def test_cut_document(text, share):
    raw = text.encode()
    tail = max(1, int(share * len(raw)))
    train, val = cut_document(raw, tail)
    assert raw.startswith(train)
    assert raw.endswith(val)
    assert train.decode() + raw[len(train):len(raw) - len(val)].decode() + val.decode() == text
    gap = len(raw) - len(train) - len(val)
    assert len(val) // 4 <= gap <= GAP + 3 or gap >= GAP
    assert len(val) <= len(raw) / 2 + 4
    assert len(val) >= min(tail, len(raw) // 2) // 2


def test_a_single_document_is_cut_at_a_line_with_a_gap(tmp_path, prose):
    text = prose(60_000).replace("\n", "\\n")[:55_000]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [text, text]))
    data = load(path)
    about = data.describe()
    assert about["split"]["by"] == "a cut of the largest document"
    assert about["split"]["gap_bytes"] == GAP
    assert about["split"]["copies_left_out"] == 1
    train = data.tokenizer.decode(data.tokens("train")[np.arange(data.train_tokens)])
    val = data.tokenizer.decode(data.tokens("val")[np.arange(data.val_tokens)])
    assert text.startswith(train)
    assert text.endswith(val)
    assert len(train) + len(val) + GAP == len(text)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1_000), n=st.integers(2, 40))
def test_nothing_leaks_through_load(tmp_path_factory, seed, n):
    """Documents with copies, some with other line ends: no line is on both sides."""
    folder = tmp_path_factory.mktemp("leak")
    rng = np.random.default_rng(seed)
    texts = [f"document {i} of {seed}\n" + "".join(
        f"{i}-{j}-{seed}\n" for j in range(rng.integers(50, 400))) for i in range(n)]
    texts += [texts[i].replace("\n", "\r\n") for i in rng.integers(0, n, 5)]
    texts += [texts[i] for i in rng.integers(0, n, 5)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": texts[i]}) + "\n"
                            for i in rng.permutation(len(texts))))
    data = load(path, cache=folder, seed=seed)
    lines = []
    for part in ("train", "val"):
        tokens, starts = data.tokens(part), data.documents(part)
        ends = [*starts[1:].tolist(), len(tokens)]
        lines.append(set())
        for a, b in zip(starts.tolist(), ends, strict=True):
            text = data.tokenizer.decode(tokens[np.arange(a, b)])
            lines[-1] |= {s for s in text.split()[4:-1] if "-" in s}
    train, val = lines
    # A cut may divide one line: its first half is no line of the other side by chance.
    assert not {v for v in val & train if v.count("-") == 2}
    assert train
    assert val


def test_too_short_and_bad_share(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short")
    with pytest.raises(ManyformError, match=r"a.txt holds 5 bytes of text, and at least 1024"):
        load(path)
    path.write_text("long enough\n" * 200)
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ManyformError, match="validation share must lie between 0 and 1"):
            load(path, validation=share)
    data = load(path)
    assert data.val_tokens > 200


def test_validation_input_of_its_own(tmp_path, prose):
    pieces = [prose(3_000, seed) for seed in range(8)]
    for name, chosen in [("train.jsonl", pieces[:6]), ("val.jsonl", pieces[5:]),
                         ("same.jsonl", pieces[6:])]:
        (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in chosen))
    data = load(tmp_path / "train.jsonl", validation=tmp_path / "val.jsonl")
    val = data.tokenizer.decode(data.tokens("val")[np.arange(data.val_tokens)])
    assert val == "".join(pieces[5:])
    train = data.tokenizer.decode(data.tokens("train")[np.arange(data.train_tokens)])
    assert train == "".join(pieces[:5])
    about = data.describe()["split"]
    assert about["by"] == "validation input val.jsonl"
    assert (about["copies_left_out"], about["gap_bytes"]) == (1, 0)
    (tmp_path / "val.jsonl").write_text(json.dumps({"text": "changed"}))
    assert load(tmp_path / "train.jsonl", validation=tmp_path / "val.jsonl").val_tokens == 7
    with pytest.raises(ManyformError, match=r"every document of same.jsonl is also in the valid"):
        load(tmp_path / "same.jsonl", validation=tmp_path / "same.jsonl")
