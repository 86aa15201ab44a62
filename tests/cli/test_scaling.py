"""`manyform scaling` and `manyform sweep` as they are typed."""

from pathlib import Path

import pytest
from tests.scaling.synthetic import EPOCH, grid

from manyform.cli import main
from manyform.scaling import Chinchilla

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "scaling" / "runs.csv"


def run(capsys, *arguments):
    """(exit code, what was printed, what was complained of)."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as ended:
        code = ended.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    table = grid(EPOCH, sizes=5, ratios=5, noise=0.003)
    (folder / "wild.csv").write_text("Model Size,Training FLOP,loss\n" + "\n".join(
        f"{n},{c},{loss}" for n, c, loss in zip(table.params, table.flops, table.loss,
                                                strict=True)))
    other = grid(Chinchilla(1.8172, 100.0, 2085.43, 0.25, 0.3658), sizes=5, ratios=5, seed=1)
    (folder / "two.csv").write_text("arch,params,tokens,loss\n" + "\n".join(
        f"{name},{n},{d},{loss}" for name, t in (("llama", table), ("lstm", other))
        for n, d, loss in zip(t.params, t.tokens, t.loss, strict=True)))
    return folder


def test_fit(capsys, tables):
    code, out, _ = run(capsys, "scaling", "fit", str(tables / "wild.csv"), "--bootstraps", "60",
                       "--report", str(tables / "law.html"))
    assert code == 0
    for part in ("E + A / N^alpha", "Held out", "2: isoFLOP parabolas", "3: the fitted law",
                 f"report: {tables / 'law.html'}"):
        assert part in out, part
    assert (tables / "law.html").stat().st_size > 10**6


def test_several_architectures(capsys, tables):
    code, out, _ = run(capsys, "scaling", "fit", str(tables / "two.csv"), "--bootstraps", "60")
    assert code == 0
    assert "Which is ahead" in out
    assert "shared: E, alpha, beta" in out
    code, out, _ = run(capsys, "scaling", "fit", str(tables / "two.csv"), "--arch", "lstm",
                       "--bootstraps", "60")
    assert code == 0
    assert "25 points" in out
    code, _, err = run(capsys, "scaling", "fit", str(tables / "two.csv"), "--law", "kaplan")
    assert code == 2
    assert "name one with --arch" in err


def test_columns_and_refusals(capsys, tables, tmp_path):
    (tmp_path / "t.csv").write_text("how big,tokens,loss\n1,2,3\n")
    code, _, err = run(capsys, "scaling", "fit", str(tmp_path / "t.csv"))
    assert code == 2
    assert "--columns params=HEADER" in err
    code, _, err = run(capsys, "scaling", "fit", str(tmp_path / "t.csv"), "--columns",
                       "params=how big")
    assert code == 2
    assert "1 runs are too few" in err
    code, _, err = run(capsys, "scaling", "fit", str(tmp_path / "t.csv"), "--columns", "params")
    assert "reads like" in err
    code, _, err = run(capsys, "scaling", "fit", str(tmp_path / "none.csv"))
    assert code == 2
    assert "neither a file" in err


def test_plan(capsys, tables):
    code, out, _ = run(capsys, "scaling", "plan", "--law", "chinchilla", "--flops", "5.76e23",
                       "--inference-tokens", "1e12")
    assert code == 0
    for part in ("40.4B", "serving 1T tokens", "kaplan", "warning"):
        assert part in out, part
    code, out, _ = run(capsys, "scaling", "plan", str(tables / "wild.csv"), "--flops", "1e24",
                       "--bootstraps", "60")
    assert "times the largest measured budget" in out
    assert "[" in out
    code, out, _ = run(capsys, "scaling", "plan", str(tables / "two.csv"), "--flops", "1e20",
                       "--bootstraps", "60")
    assert "chance to have the least loss" in out
    code, out, _ = run(capsys, "scaling", "plan", str(tables / "two.csv"), "--loss", "2.5",
                       "--bootstraps", "60")
    assert "cheapest way to a loss of 2.5" in out
    code, out, _ = run(capsys, "scaling", "plan", str(EXAMPLE), "--arch", "lstm", "--flops", "1e13",
                       "--bootstraps", "60")
    assert "not determined" in out
    assert "under" in out
    assert "e-" not in out
    code, out, err = run(capsys, "scaling", "plan", str(tables / "two.csv"), "--loss", "0.1",
                         "--bootstraps", "60")
    assert code == 2
    assert "does not reach it" in out
    assert "no architecture of the table has a plan" in err
    code, out, _ = run(capsys, "scaling", "plan", "--history")
    assert "GPT-3: 175B parameters on 300B tokens" in out
    assert "times too large" in out
    assert run(capsys, "scaling", "plan")[0] == 2


def test_sweep_and_compare_refuse_what_makes_no_sense(capsys, tmp_path):
    code, _, err = run(capsys, "sweep", "--sizes", "10k", "--budget", "5m", "--out",
                       str(tmp_path / "x"))
    assert code == 2
    assert "not both" in err
    code, _, err = run(capsys, "sweep", "--slurm", "partition", "--out", str(tmp_path / "x"))
    assert "reads like slurm_partition" in err
    code, _, err = run(capsys, "compare", "--scale", "--layers", "3")
    assert code == 2
    assert "--layers has no meaning with --scale" in err
    assert not (tmp_path / "x").exists()


def test_help_names_the_commands(capsys):
    _, out, _ = run(capsys)
    assert "manyform scaling" in out
    assert "manyform sweep" in out
