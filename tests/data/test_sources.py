"""Every kind of input gives its documents; every kind of bad input gives one sentence."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import types

import pytest

from manyform import ManyformError
from manyform.data import formats, open_source, sources

TEXTS = ["first\ndocument", "zweites, größer: 你好", 'third "quoted", with\na line']


def compress(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".bz2":
        path.write_bytes(bz2.compress(data))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(data))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as parallel compressors write
        path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    else:
        path.write_bytes(data)
    return path


def write_rows(path, column="text"):
    import csv
    buffer = io.StringIO()
    if ".jsonl" in path.name:
        for text in TEXTS:
            buffer.write(json.dumps({"id": 1, column: text}, ensure_ascii=False) + "\n")
    else:
        writer = csv.writer(buffer, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerow(["id", column])
        writer.writerows([i, text] for i, text in enumerate(TEXTS))
    return compress(path, buffer.getvalue().encode())


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_rows(tmp_path, kind, suffix):
    assert list(open_source(write_rows(tmp_path / f"rows.{kind}{suffix}"))) == TEXTS
    path = write_rows(tmp_path / f"body.{kind}{suffix}", "body")
    assert list(open_source(path, column="body")) == TEXTS
    with pytest.raises(ManyformError, match=r"no column 'text'; its columns are: id, body"):
        list(open_source(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_text_file_is_cut_into_pieces_that_join_to_the_whole(tmp_path, prose, suffix):
    text = prose(300_000)
    path = compress(tmp_path / f"a.txt{suffix}", text.encode())
    pieces = list(open_source(path))
    assert "".join(pieces) == text
    assert all(formats.PIECE <= len(p) <= 2 * formats.PIECE for p in pieces[:-1])
    assert all(p.endswith("\n\n") for p in pieces[:-1])
    assert list(open_source(str(path))) == pieces


def test_pieces_end_at_lines_then_spaces_then_anywhere(tmp_path):
    lines = "word word\n" * 5_000
    (tmp_path / "lines").write_text(lines)
    assert all(p.endswith("\n") for p in open_source(tmp_path / "lines"))
    (tmp_path / "spaces").write_text("word " * 10_000)
    assert all(p.endswith(" ") for p in open_source(tmp_path / "spaces"))
    (tmp_path / "solid").write_text("é" * 100_000)
    pieces = list(open_source(tmp_path / "solid"))
    assert "".join(pieces) == "é" * 100_000
    assert max(map(len, pieces)) == 2 * formats.PIECE


def test_huge_line_is_read_as_a_stream():
    class Endless:
        given = 0

        def read(self, size):
            self.given += size
            return b"x" * size
    stream = Endless()
    pieces = formats.pieces(stream, "endless")
    for _ in range(200):
        next(pieces)
    assert stream.given < 200 * 2 * formats.PIECE + (1 << 20)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_huge_row_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(formats, "MAX_LINE", 1_000)
    path = tmp_path / f"long.{kind}"
    path.write_text('text\n"' + "x" * 5_000 + '"\n' if kind == "csv"
                    else json.dumps({"text": "x" * 5_000}))
    with pytest.raises(ManyformError, match=r"line \d of long.* is longer than 1,000 bytes"):
        list(open_source(path))


def test_unclosed_quote_does_not_swallow_the_file(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text('text\n"never closed\nmore\n')
    with pytest.raises(ManyformError, match=r"line \d of q.csv is not valid CSV"):
        list(open_source(path))


def test_csv_row_of_other_width(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text("id,text\n1,a\n2\n")
    with pytest.raises(ManyformError, match=r"line 3 of w.csv has 1 fields where the header has 2"):
        list(open_source(path))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [*TEXTS, None, ""], "n": [1, 2, 3, 4, 5]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert list(open_source(path)) == TEXTS
    with pytest.raises(ManyformError, match="no column 'body'; its columns are: text, n"):
        list(open_source(path, column="body"))
    with pytest.raises(ManyformError, match=r"'n' in row 1 of a.parquet must be text, not int"):
        list(open_source(path, column="n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManyformError, match=r"a.parquet is not a readable parquet file"):
        list(open_source(path))


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    for module, name in [("pyarrow.parquet", "a.parquet"), ("zstandard", "a.txt.zst")]:
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ManyformError, match=r"pip install 'manyform\[data\]'"):
            list(open_source(tmp_path / name))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ManyformError, match=r"pip install 'manyform\[hf\]'"):
        open_source("hf:owner/name")


@pytest.mark.parametrize(("spec", "call"), [
    ("hf:o/n", ("o/n", None, "train")),
    ("hf:o/n:validation", ("o/n", None, "validation")),
    ("hf:o/n:en", ("o/n", "en", "train")),
    ("hf:o/n:en:test[:10%]", ("o/n", "en", "test[:10%]")),
    ("hf:o/n::test", ("o/n", None, "test")),
])
def test_hugging_face_specs(monkeypatch, spec, call):
    class Rows(list):
        column_names = ("text", "id")
        _fingerprint = "f1"

        def select_columns(self, names):
            return [{k: row[k] for k in names} for row in self]

    def load_dataset(name, config, *, split):
        assert (name, config, split) == call
        return Rows({"text": t, "id": 0} for t in TEXTS)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = open_source(spec)
    assert list(source) == TEXTS
    assert source.fingerprint()["content"] == "f1"
    with pytest.raises(ManyformError, match="no column 'body'"):
        open_source(spec, column="body")


def test_hugging_face_local_folder(tmp_path):
    pytest.importorskip("datasets")
    write_rows(tmp_path / "train.jsonl")
    assert list(open_source(f"hf:{tmp_path}")) == TEXTS


def test_folder_and_glob(tmp_path):
    root = tmp_path / "corpus"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "a.txt").write_text("a " * 20_000)
    (root / "b" / "c.md").write_text("c")
    (root / "b" / "empty.md").write_text(" \n")
    (root / ".git" / "config").write_text("hidden")
    (root / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    write_rows(root / "z.jsonl.gz")
    source = open_source(root)
    assert list(source) == ["a " * 20_000, "c", *TEXTS]
    assert source.skipped == ["picture.png"]
    assert list(open_source(str(root / "**" / "*.md"))) == ["c"]
    with pytest.raises(ManyformError, match="no file matches the pattern"):
        open_source(str(root / "*.none"))


def test_large_file_of_a_folder_is_cut(tmp_path, monkeypatch, prose):
    monkeypatch.setattr(formats, "MAX_LINE", 50_000)
    text = prose(120_000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "big.txt").write_text(text)
    compress(tmp_path / "d" / "packed.txt.gz", text.encode())
    pieces = list(open_source(tmp_path / "d"))
    assert len(pieces) > 10
    assert "".join(pieces) == text + text


def test_standard_input(monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    given("größer\n".encode())
    source = open_source("-")
    assert list(source) == list(source) == ["größer\n"]
    given(b'{"body": "one"}\n{"body": "two"}\n')
    assert list(open_source("-", column="body")) == ["one", "two"]
    given(b"")
    with pytest.raises(ManyformError, match="standard input holds no text"):
        list(open_source("-"))


def test_standard_library():
    source = open_source()
    texts = list(source)
    names = [p.name for p in source.files]
    assert len(texts) > 300
    assert 4_000_000 < sum(map(len, texts)) <= sources.STDLIB_BYTES
    assert "argparse.py" in names
    assert not any("site-packages" in p.parts or "test" in p.parts for p in source.files)
    small = list(open_source("stdlib", max_bytes=10_000))
    assert sum(len(t.encode()) for t in small) == 10_000
    assert texts[:len(small) - 1] == small[:-1]
    assert texts[len(small) - 1].startswith(small[-1])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "garbage"])
def test_damaged_archives(tmp_path, prose, suffix, harm):
    path = compress(tmp_path / f"a.txt{suffix}", prose(50_000).encode())
    data = path.read_bytes()
    path.write_bytes(data[:-30] if harm == "cut" else b"garbage" + data)
    with pytest.raises(ManyformError, match=r"a.txt\.\w+ (is damaged or cut|cannot be read)"):
        list(open_source(path))


@pytest.mark.parametrize(("name", "data", "sentence"), [
    ("empty.txt", b"", "empty.txt holds no text"),
    ("blank.txt", b" \n\n", "blank.txt holds no text"),
    ("empty.csv", b"", "empty.csv is empty; its first line must name the columns"),
    ("empty.jsonl", b"", "empty.jsonl holds no text"),
    ("latin.txt", b"abc" * 100_000 + b"\xe9t\xe9", "not UTF-8 text .byte 0xe9 near offset 300000"),
    ("cut.txt", "é".encode()[:1], "cut.txt is not UTF-8 text"),
    ("utf16.txt", "text".encode("utf-16"), "utf16.txt is not UTF-8 text"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of bad.jsonl is not JSON"),
    ("list.jsonl", b'["a"]\n', "must be a JSON object with the key 'text', not list"),
    ("number.jsonl", b'{"text": 3}\n', "'text' in line 1 of number.jsonl must be text, not int"),
    ("half.jsonl", b'{"text": "a \\ud800 b"}\n', "half.jsonl holds .* not valid Unicode"),
    ("latin.csv", b"text\n\xe9\n", "line 2 of latin.csv is not UTF-8"),
    ("a.parquet.gz", b"", "is a compressed parquet file"),
])
def test_bad_content(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ManyformError, match=sentence):
        list(open_source(tmp_path / name))


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(open_source(tmp_path / "a.txt")) == ["hello"]


def test_bad_requests(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    (tmp_path / "binary").mkdir()
    with pytest.raises(ManyformError, match=r"did you mean .*shakespeare\.txt"):
        open_source(tmp_path / "shakespear.txt")
    with pytest.raises(ManyformError, match="there is no input 'nowhere'"):
        open_source("nowhere")
    with pytest.raises(ManyformError, match=r"the folder .* holds no files"):
        open_source(tmp_path / "binary")
    with pytest.raises(ManyformError, match=r"column='text' applies to .* has no columns"):
        open_source(tmp_path / "shakespeare.txt", column="text")
    with pytest.raises(ManyformError, match=r"column='text' applies to"):
        open_source("stdlib", column="text")
    with pytest.raises(ManyformError, match="max_bytes must be at least 1"):
        open_source("stdlib", max_bytes=0)
    with pytest.raises(ManyformError, match=r"reads like hf:owner/name"):
        open_source("hf:")
    (tmp_path / "binary" / "a.png").write_bytes(b"\xff")
    with pytest.raises(ManyformError, match="none of the 1 files of binary is UTF-8"):
        list(open_source(tmp_path / "binary"))


def test_fingerprint_sees_every_change(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = open_source(path)
    first = source.fingerprint()
    assert source.fingerprint(first)["content"] == first["content"]
    info = path.stat()
    path.write_text("two")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # same size, same time, other text
    assert source.fingerprint(first)["content"] != first["content"]

    monkeypatch.setattr(sources, "SMALL_INPUT", 0)  # now size and time are trusted ...
    os.utime(path, (1e9, 1e9))
    known = source.fingerprint()
    monkeypatch.setattr(sources.hashlib, "sha256", lambda *a: pytest.fail("read")
                        if a else _Stamp(known["stamp"]))
    assert source.fingerprint(known) is known
    monkeypatch.undo()
    monkeypatch.setattr(sources, "SMALL_INPUT", 0)
    path.write_text("six")  # ... unless the time is new
    assert source.fingerprint(known)["content"] != known["content"]


def test_a_file_written_within_the_clocks_grain_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL_INPUT", 0)
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = open_source(path)
    known, info = source.fingerprint(), path.stat()
    path.write_text("two")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert source.fingerprint(known)["content"] != known["content"]


class _Stamp:
    def __init__(self, value):
        self.value = value

    def update(self, _):
        pass

    def hexdigest(self):
        return self.value
