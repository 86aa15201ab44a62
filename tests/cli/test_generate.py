import pytest
import torch

import manyform
from manyform import cli
from manyform.data import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `manyform train` leaves, without the training."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    manyform.create("gru", vocab_size=256, d_model=16, n_layers=1).save(path)
    load_tokenizer("bytes").save(path / "tokenizer.json")
    return path


def run(capsys, *arguments):
    code = 0
    try:
        cli.main(["generate", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code or 0, said.out, said.err


def test_prints_the_prompt_and_the_model_s_own_continuation(folder, capsys):
    code, out, _ = run(capsys, folder, "-p", "Ein Bär", "-n", 30, "--seed", 4)
    assert code == 0
    tokens = torch.tensor([list("Ein Bär".encode())])
    expected = manyform.load(folder).generate(tokens, 30, seed=4).tokens[0]
    assert out == "Ein Bär" + bytes(expected.tolist()).decode(errors="replace") + "\n"
    assert run(capsys, folder, "-p", "Ein Bär", "-n", 30, "--seed", 4)[1] == out


def test_continues_from_a_saved_state(folder, capsys, tmp_path):
    state = tmp_path / "state.safetensors"
    whole = run(capsys, folder, "-p", "abcd", "-n", 8, "--greedy")[1]
    run(capsys, folder, "-p", "ab", "-n", 0, "--save-state", state)
    rest = run(capsys, folder, "-p", "cd", "-n", 8, "--greedy", "--state", state)[1]
    assert whole == "abcd" + rest


def test_mistakes(folder, capsys, tmp_path):
    for arguments, message in (
            ([tmp_path / "none", "-p", "x"], "no folder"), ([tmp_path, "-p", "x"], "tokenizer"),
            ([folder, "-p", ""], "prompt is empty"),
            ([folder, "-p", "x", "--top-p", 2], "top_p"),
            ([folder, "-p", "x", "--greedy", "--seed", 1], "seed cannot apply"),
            ([folder, "-p", "x", "--state", tmp_path / "none"], "cannot read a state")):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert message in err
