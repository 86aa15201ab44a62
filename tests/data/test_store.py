"""Stored tokens are found again, checked, and built again where they are damaged."""

import json
import os
import random
import shutil
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from manyform import ManyformError
from manyform.data import cache_folder, dataset, load, open_dataset, open_source, store
from manyform.data.tokenizers import ByteTokenizer, JsonTokenizer


@pytest.fixture
def text(tmp_path, prose):
    path = tmp_path / "a.txt"
    path.write_text(prose(200_000))
    return path


@pytest.fixture
def builds(monkeypatch):
    """How often something was built."""
    count = []
    real = store.build
    monkeypatch.setattr(store, "build", lambda *a, **k: (count.append(1), real(*a, **k)))
    return count


def everything(data, split):
    return data.tokens(split)[np.arange(len(data.tokens(split)))]


def test_all_text_is_there_once(text):
    data = load(text)
    parts = [everything(data, s).astype(np.uint8).tobytes() for s in ("train", "val")]
    assert sorted(b"".join(parts)) == sorted(text.read_bytes())
    about = data.describe()
    assert json.loads(json.dumps(about)) == about
    assert data.train_tokens + data.val_tokens == 200_000
    assert 5_000 < data.val_tokens < 25_000
    assert data.bytes_per_token == 1
    assert data.vocab_size == 256
    assert data.name == "a.txt"
    assert np.log2(np.e) == pytest.approx(data.bits_per_byte(1.0))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_second_opening_builds_nothing(text, builds, tokenizer):
    first = load(text, tokenizer=tokenizer)
    second = load(text, tokenizer=tokenizer)
    assert len(builds) == 1
    assert first.content_hash == second.content_hash
    assert first.tokenizer.hash == second.tokenizer.hash
    assert np.array_equal(everything(first, "train"), everything(second, "train"))
    os.utime(text)  # touched, same text
    load(text, tokenizer=tokenizer)
    assert len(builds) == 1
    text.write_text(text.read_text()[:-1] + "!")
    assert load(text, tokenizer=tokenizer).content_hash != first.content_hash
    assert len(builds) == 2


def test_each_request_has_its_own_store(text, builds):
    for options in ({}, {"tokenizer": "bpe:300"}, {"seed": 1}, {"validation": 0.2},
                    {"max_bytes": 50_000}):
        load(text, **options)
    assert len(builds) == 5
    assert load(text, max_bytes=50_000).train_tokens < 50_000
    load(text)
    assert len(builds) == 5


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("shard_tokens", [97, 7_000, 1 << 20])
def test_shards_are_one_row(text, tmp_path, tokenizer, shard_tokens):
    if shard_tokens == 97:
        text.write_text(text.read_text()[:1_500])
    whole = load(text, tokenizer=tokenizer)
    store.build(tmp_path / "cut", open_source(text), lambda _: whole.tokenizer, seed=0, share=0.05,
                request={"input": ""}, shard_tokens=shard_tokens)
    cut = open_dataset(tmp_path / "cut")
    for split in ("train", "val"):
        assert np.array_equal(everything(cut, split), everything(whole, split))
        assert np.array_equal(cut.documents(split), whole.documents(split))
    names = [p.name for p in (tmp_path / "cut").glob("train-0*.bin")]
    assert len(names) == len({n.split("-")[1] for n in names}) == -(-whole.train_tokens
                                                                    // shard_tokens)


@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove"])
@pytest.mark.parametrize("which", ["train-0", "val-0", "train-documents", "tokenizer", "manifest"])
def test_damage_is_named_and_repaired(text, which, harm):
    good = load(text)
    expected = everything(good, "train")
    path = next(p for p in good.path.iterdir() if p.name.startswith(which))
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes({"flip": data, "cut": data[:-1], "grow": data + b"\n}"}[harm])
    with pytest.raises(ManyformError, match={
            "manifestremove": "holds no stored tokens", "train-0cut": rf"{path.name} has \d+ bytes"
            }.get(which + harm, path.name)):
        open_dataset(good.path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = load(text)
    if harm != "remove" or which != "manifest":  # without a manifest there was nothing yet
        assert path.name in str(seen[0].message)
        assert "built again from a.txt" in str(seen[0].message)
    assert np.array_equal(everything(again, "train"), expected)
    open_dataset(good.path).verify()


def test_large_stores_are_checked_by_size_and_time(text, monkeypatch):
    monkeypatch.setattr(store, "FULL_CHECK", 0)
    data = load(text)
    path = next(data.path.glob("train-0*.bin"))
    monkeypatch.setattr(store, "_hash", lambda p: pytest.fail("hashed"))
    load(text)
    monkeypatch.undo()
    monkeypatch.setattr(store, "FULL_CHECK", 0)
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    info = path.stat()
    path.write_bytes(raw)
    with pytest.raises(ManyformError, match=path.name):
        open_dataset(data.path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(ManyformError, match=path.name):
        open_dataset(data.path).verify()


def test_a_build_that_dies_leaves_what_was_there(text, monkeypatch):
    data = load(text)
    text.write_text(text.read_text() + "more")

    def die(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(store, "_write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        load(text)
    monkeypatch.undo()
    assert open_dataset(data.path).content_hash == data.content_hash


def test_two_builds_at_once(text):
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda _: load(text), range(4)))
    assert len({d.content_hash for d in every}) == 1
    open_dataset(every[0].path).verify()
    assert not list(every[0].path.glob("*.partial"))


def test_old_leftovers_are_removed(text):
    data = load(text)
    old = data.path / "x.partial"
    old.write_bytes(b"x")
    os.utime(old, (1e9, 1e9))
    young = data.path / "y.partial"
    young.write_bytes(b"y")
    text.write_text(text.read_text() + "more")
    load(text)
    assert not old.exists()
    assert young.exists()


def test_open_without_the_input(text, tmp_path):
    data = load(text)
    text.unlink()
    assert open_dataset(data.path).content_hash == data.content_hash
    shutil.copytree(data.path, tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "elsewhere").train_tokens == data.train_tokens
    with pytest.raises(ManyformError, match="holds no stored tokens"):
        open_dataset(tmp_path)


def test_standard_input_is_known_by_its_content(builds, prose, monkeypatch):
    import io
    hashes = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(
            buffer=io.BytesIO(prose(30_000, seed).encode())))
        hashes.append(load("-").content_hash)
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(builds) == 2


def test_given_tokenizers(text, tmp_path, builds):
    trained = load(text, tokenizer="bpe:300").tokenizer
    trained.save(tmp_path / "tokenizer.json")
    a, b = load(text, tokenizer=tmp_path / "tokenizer.json"), load(text, tokenizer=trained)
    assert a.tokenizer.hash == b.tokenizer.hash == trained.hash
    assert a.path == b.path
    assert len(builds) == 2
    assert a.byte_lengths is not None
    assert load(text, tokenizer=ByteTokenizer()).vocab_size == 256


def test_bpe_is_trained_on_training_text_only(tmp_path):
    path = tmp_path / "a.jsonl"
    rng = random.Random(0)
    stems = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": f" {s}" * 100}) + "\n" for s in stems))
    data = load(path, tokenizer="bpe:2000")
    pieces = {}
    for split in ("train", "val"):
        starts = data.documents(split)
        texts = [data.tokenizer.decode(data.tokens(split)[np.arange(s, s + 8) % len(
            data.tokens(split))])[:8] for s in starts]
        pieces[split] = {len(data.tokenizer.encode(t)) for t in texts}
    assert pieces["train"] == {1}
    assert min(pieces["val"]) > 1


def test_unknown_tokens_are_refused(text):
    from tokenizers import Tokenizer, models, pre_tokenizers
    library = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    words = JsonTokenizer(library.to_str(), name="words")
    with pytest.raises(ManyformError, match=r"words sends \d+\.\d% of the tokens of a.txt to its"):
        load(text, tokenizer=words)


def test_skipped_files_are_told(tmp_path, prose):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text(prose(20_000))
    (folder / "b.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match=r"1 files of mixed are not UTF-8 .*the first: b.bin"):
        data = load(folder)
    assert data.describe()["skipped_files"] == 1


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MANYFORM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, place in [("linux", "xdg/manyform"), ("win32", "local/manyform/Cache"),
                            ("darwin", "Library/Caches/manyform")]:
        monkeypatch.setattr(store.sys, "platform", platform)
        assert cache_folder() == tmp_path / place


def test_unwritable_cache_is_one_sentence(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ManyformError, match=r"tokens cannot be stored in .* set MANYFORM_CACHE"):
        load(text, cache=tmp_path / "file")


def test_standard_library_is_the_default(builds):
    data = load(max_bytes=100_000)
    assert data.name.startswith("Python ")
    assert load("stdlib", max_bytes=100_000).content_hash == data.content_hash
    assert len(builds) == 1
    assert dataset.load is load
