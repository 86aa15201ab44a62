"""A cache of its own for every test, and texts to fill it with."""

import random

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MANYFORM_CACHE", str(folder))
    return folder


@pytest.fixture
def prose():
    """prose(n, seed): n bytes of lines of made-up words, with blank lines between paragraphs."""
    def make(size: int, seed: int = 0) -> str:
        rng = random.Random(seed)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(300)]
        out, length = [], 0
        while length < size:
            line = " ".join(rng.choices(words, k=9)) + ("\n\n" if rng.random() < 0.2 else "\n")
            out.append(line)
            length += len(line)
        return "".join(out)[:size]
    return make
