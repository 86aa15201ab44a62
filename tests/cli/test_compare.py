"""`manyform compare` as it is typed."""

import subprocess
import sys

import pytest

from manyform.cli.compare import _numbers
from manyform.errors import ManyformError


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-c", "from manyform.cli import main; main()", "compare",
                           *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_errors_are_one_sentence(tmp_path):
    ended = run("--archs", "lama", "--out", str(tmp_path / "x"))
    assert ended.returncode == 2
    assert "llama" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "x").exists()
    ended = run("--resume", str(tmp_path / "x"))
    assert ended.returncode == 2
    assert "holds no comparison" in ended.stderr


def test_contexts_are_whole_numbers():
    assert _numbers("256,1024") == [256, 1024]
    with pytest.raises(ManyformError, match="whole numbers"):
        _numbers("256,many")
