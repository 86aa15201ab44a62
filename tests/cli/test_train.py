import json
import subprocess
import sys

import pytest

from manyform import ManyformError, cli
from manyform.cli.train import parse_count, parse_option


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYFORM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a small text\n" for i in range(400)))
    return path


def run(*arguments):
    """Exit code of the command line."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code
    return 0


SMALL = ["--d-model", 16, "--layers", 1, "--steps", 4, "--batch-size", 2, "--length", 16,
         "--eval-tokens", 64]


def test_train(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "gru", text, "-o", out, *SMALL, "--lr", 0.01) == 0
    said = capsys.readouterr().out
    assert "training gru" in said
    assert "finished in" in said
    assert json.loads((out / "train.json").read_text())["config"]["lr"] == 0.01
    assert run("train", "gru", text, "-o", out, *SMALL, "--lr", 0.02) == 2
    assert "lr=0.01 there and 0.02 now" in capsys.readouterr().err


def test_options_of_the_architecture(text, tmp_path):
    out = tmp_path / "run"
    assert run("train", "llama", text, "-o", out, *SMALL, "-q", "-O", "kv_heads=1",
               "-O", "window=8") == 0
    layer = json.loads((out / "config.json").read_text())["pattern"][0]
    assert layer["mixer_options"]["window"] == 8


def test_mistakes_are_one_red_sentence(text, tmp_path, capsys):
    for arguments, message in (
            (["train", "lama", text], "did you mean 'llama'"),
            (["train", "gru", tmp_path / "none.txt"], "none.txt"),
            (["train", "gru", text, "--tokens", "many"], "number of tokens"),
            (["train", "gru", text, "-O", "window"], "window=64"),
            (["train", "gru", text, "-o", tmp_path / "x", "-O", "windw=3"], "windw"),
            (["trian"], "did you mean 'train'")):
        assert run(*arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert message in said.err
        assert "Traceback" not in said.err


def test_help_imports_no_command():
    code = ("import sys; from manyform.cli import main; main(['--help']); "
            "print([m for m in ('typer', 'manyform.cli.train', 'manyform.data', 'numba', 'rich') "
            "if m in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "manyform train" in said.stdout
    assert said.stdout.splitlines()[-1] == "[]"


def test_counts():
    assert parse_count("500") == 500
    assert parse_count("20Mtok") == 20_000_000
    assert parse_count("1.5k") == 1500
    assert parse_count("3e6") == 3_000_000
    for bad in ("", "x", "-5", "0", "inf"):
        with pytest.raises(ManyformError):
            parse_count(bad)


def test_options():
    assert parse_option("window=64") == ("window", 64)
    assert parse_option("base=1e4") == ("base", 1e4)
    assert parse_option("tie=false") == ("tie", False)
    assert parse_option("position=alibi") == ("position", "alibi")
