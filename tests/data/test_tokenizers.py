"""Tokens stand for text exactly, and come back as they arrive."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyform import ManyformError
from manyform.data import load_tokenizer
from manyform.data.tokenizers import ByteTokenizer, JsonTokenizer, bpe_size, train_bpe

CORPUS = ["the cat sat on the mat. " * 40, "größer und größer 你好 😀\n" * 20,
          "def f(x):\n    return x\n" * 20]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(CORPUS), 300)


@pytest.fixture(scope="module")
def piecewise():
    """A tokenizer that is not byte-level: metaspace words with byte fallback, as SentencePiece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁t"]
    library = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "t")],
                                   unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return JsonTokenizer(library.to_str(), name="pieces")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_round_trip_and_exact_bytes(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=40), data=st.data())
def test_stream_decoder_joins_to_decode(bpe, ids, data):
    for tokenizer in (ByteTokenizer(), bpe):
        stream = tokenizer.decoder()
        out, left = "", list(ids)
        while left:
            n = data.draw(st.integers(1, len(left)))
            out += stream.push(left[:n])
            left = left[n:]
        assert out + stream.close() == tokenizer.decode(ids)


def test_stream_gives_whole_characters():
    stream = ByteTokenizer().decoder()
    assert [stream.push(b) for b in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert stream.push("é".encode()[0]) == ""
    assert stream.close() == "�"


def test_tokenizer_that_is_not_byte_level(piecewise):
    assert piecewise.byte_lengths is None
    assert piecewise.unknown == 0
    text = "the cat 你好 sat " * 30 + "end"
    ids = piecewise.encode(text)
    assert piecewise.decode(ids) == text
    stream = piecewise.decoder()
    pushed = [stream.push(int(i)) for i in ids]
    assert "".join(pushed) + stream.close() == text
    assert "�" not in "".join(pushed)
    stream = piecewise.decoder()
    noise = [1 + 0xF0] * 20  # bytes that never form a character do not stop the stream
    assert any(stream.push(i) for i in noise)


def test_bpe_is_smaller_and_complete(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert train_bpe(iter(CORPUS), 300).hash == bpe.hash
    assert train_bpe(iter(["abab"]), 5_000).vocab_size < 300


def test_save_and_load(tmp_path, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path)
        for spec in (path, tmp_path, str(path)):
            again = load_tokenizer(spec)
            assert again.hash == tokenizer.hash
            assert np.array_equal(again.encode(CORPUS[1]), tokenizer.encode(CORPUS[1]))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_special_tokens_are_not_added(bpe):
    from tokenizers import Tokenizer, processors
    library = Tokenizer.from_str(bpe.to_json())
    library.add_special_tokens(["<|end|>"])
    library.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 300)])
    library.enable_truncation(4)
    library.enable_padding(length=50)
    given = JsonTokenizer(library.to_str(), name="given")
    assert given.vocab_size == 301
    assert np.array_equal(given.encode(CORPUS[0]), bpe.encode(CORPUS[0]))
    assert given.decode([300]) == "<|end|>"


def test_dtypes_grow_with_the_vocabulary():
    tokenizer = ByteTokenizer()
    for size, dtype in [(256, "u1"), (257, "<u2"), (65_536, "<u2"), (65_537, "<u4")]:
        tokenizer.vocab_size = size
        assert tokenizer.dtype == np.dtype(dtype)


def test_errors(tmp_path, bpe):
    with pytest.raises(ManyformError, match="token 256 is outside the vocabulary of 256"):
        ByteTokenizer().decode([3, 256])
    with pytest.raises(ManyformError, match="token -1 is outside"):
        bpe.decoder().push(-1)
    for spec in ("bpe:", "bpe:x", "bpe:256", "bpe:-5"):
        with pytest.raises(ManyformError, match="reads like bpe:1024"):
            bpe_size(spec)
    assert bpe_size("bpe:32_000") == 32_000
    with pytest.raises(ManyformError, match="a tokenizer is 'bytes', 'bpe:N' or the path"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ManyformError, match=r"bad.json is not a tokenizer.json that"):
        load_tokenizer(tmp_path / "bad.json")
