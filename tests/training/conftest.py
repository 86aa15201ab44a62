"""A small text, and one thread: for models this small threads cost more than they give."""

import random

import pytest
import torch

from manyform.data import load

WORDS = ["the", "state", "is", "a", "value", "model", "learns", "to", "read", "every", "word"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_text(path, words=6000):
    source = random.Random(0)
    lines = [" ".join(source.choice(WORDS) for _ in range(12)) for _ in range(words // 12)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return load(write_text(folder / "text.txt"), cache=folder / "cache")
