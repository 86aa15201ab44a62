"""`sweep`: rules, one trunk for many budgets, and the same results however it is run."""

import random
import shutil
import sys

import pytest

from manyform.errors import ManyformError
from manyform.lab import cells, sweep
from manyform.lab.cells import branch_file, read_plan, read_result, trial_file
from manyform.lab.ladder import (
    batch_rule,
    cost,
    fork,
    parse_sizes,
    rung_from,
    rungs,
    scaled_rate,
    size_of,
    train_config,
)
from manyform.lab.measure import seeded, validate
from manyform.lab.tasks import to_json, write_atomically
from manyform.scaling import load
from manyform.training import Trainer
from manyform.training.schedule import learning_rate

SMALL = {"archs": "lstm", "sizes": "4k,8k", "tokens_per_param": "2,4", "length": 16,
         "show": False, "bootstraps": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text with something to learn."""
    rng = random.Random(0)
    words = ["state", "value", "mixer", "channel", "block", "model", "scan", "law", "run", "cost"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=60)) for _ in range(150)))
    return path


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    return sweep(text, **SMALL, out=tmp_path_factory.mktemp("sweep") / "a")


def test_rules_at_their_reference():
    assert scaled_rate(0.01, 8e4, 1e4) == pytest.approx(0.005)
    assert batch_rule(108e6) == 160 * 2048
    (rung,) = rungs([108_000_000], 2048)
    assert (rung.rows, rung.tokens_per_step) == (160, 327_680)
    assert rung.warmup * rung.tokens_per_step == pytest.approx(108e6, rel=0.01)
    assert train_config(rung, 100, 1e-3, 0, "fp32").betas[1] == 0.99
    (large,) = rungs([1_000_000_000], 2048)
    assert train_config(large, 100, 1e-3, 0, "fp32").betas[1] == 0.95


def test_a_branch_leaves_the_trunk_where_the_rate_begins_to_fall():
    (rung,) = rungs([20_000], 32, multiples=(5, 11, 20))
    for steps in rung.steps:
        whole = train_config(rung, steps, 1e-2, 0, "fp32")
        trunk = train_config(rung, rung.steps[-1], 1e-2, 0, "fp32", trunk=True)
        rates = [learning_rate(i, whole) for i in range(steps)]
        assert rates[:fork(steps) + 1] == [learning_rate(i, trunk) for i in range(fork(steps) + 1)]
        assert rates[fork(steps) + 1] < rates[fork(steps)]
        assert rung.warmup <= rung.steps[0] / 4


def test_ladders():
    ladder = rungs([10_000, 40_000], 32, budgets=[6e9, 6e10, 6e13])
    # The last would be 100,000 tokens a parameter, and the first too few for the larger size.
    assert [len(r.steps) for r in ladder] == [2, 1]
    for rung, tokens in ((ladder[0], 1e5), (ladder[1], 2.5e5)):
        assert rung.steps[0] * rung.tokens_per_step == pytest.approx(tokens, rel=0.2)
    assert parse_sizes("1M,50k, 2e5") == [50_000, 200_000, 1_000_000]
    for bad in ("", "12", "50q", "-3k"):
        with pytest.raises(ManyformError):
            parse_sizes(bad)
    with pytest.raises(ManyformError, match="no budget gives"):
        rungs([10_000_000], 32, budgets=[1e9])
    small = rungs([10_000], 32, multiples=(4, 8))
    assert cost(small, [1.0], 1) == 4 * small[0].steps[1] + small[0].trained
    assert abs(size_of("llama", 100_000, 256, 64).deviation) < 0.03


def test_the_table_of_a_sweep(done):
    assert done.complete
    assert not done.failures
    runs = load(done.path)
    assert len(runs) == 4
    assert runs.metric == "bits per byte"
    assert runs.convention == "total"
    assert runs.clusters.max() == 1  # two runs of two budgets each
    assert done.laws is None
    assert "too few" in done.why
    assert not list((done.path / "checkpoints").glob("*/*"))


def test_a_rate_at_the_edge_is_said(tmp_path):
    def tried(arch, *scores):
        for i, (lr, bpb) in enumerate(scores):
            write_atomically(trial_file(tmp_path, arch, i), to_json({"lr": lr, "bpb": bpb}))

    tried("high", (0.003, 3.1), (0.009, 2.9), (0.026, 2.71), (0.078, 2.70))
    tried("low", (0.003, 2.5), (0.009, 2.9), (0.026, 3.0), (0.001, 2.4))
    tried("within", (0.003, 2.5), (0.009, 2.9), (0.026, None), (0.001, 2.6))
    said = cells.rates_at_edge(tmp_path, ["high", "low", "within", "none"])
    assert "high (0.078, the highest), low (0.001, the lowest): one beyond it" in said
    assert "within" not in said
    assert cells.rates_at_edge(tmp_path, ["within"]) == ""


def test_a_branch_is_the_run_of_its_budget(done):
    """Bit for bit what training that budget from the start gives."""
    from manyform.data import open_dataset
    plan = read_plan(done.path)
    data = open_dataset(plan["data"]["path"])
    rung = rung_from(plan["ladder"][1])
    for steps in rung.steps:
        found = read_result(branch_file(done.path, "lstm", rung, 0, steps))
        size = size_of("lstm", rung.params, data.vocab_size, rung.length)
        config = train_config(rung, steps, found["lr"], 0, plan["precision"])
        trainer = Trainer(seeded(size, data.vocab_size, 0, "cpu"), data.batches(
            batch_size=rung.rows, length=rung.length, seed=0), config)
        while not trainer.done:
            trainer.step()
        validation = data.validation(rung.length, plan["val_tokens"], batch_size=plan["val_rows"])
        assert validate(trainer.model, validation, trainer.precision) == found["bpb"]


def test_an_accuracy_has_its_twins(done):
    from manyform.data import open_dataset
    from manyform.lab.exact import exact_match
    from manyform.scaling.emergence import twins
    plan = read_plan(done.path)
    data = open_dataset(plan["data"]["path"])
    rung = rung_from(plan["ladder"][0])
    found = read_result(branch_file(done.path, "lstm", rung, 0, rung.steps[0]))
    assert found["exact_tokens"] == 8
    assert 0 < found["span_nats"] < 6
    model = seeded(size_of("lstm", rung.params, data.vocab_size, rung.length), data.vocab_size, 0,
                   "cpu")
    got = exact_match(model, data.validation(16, 64, batch_size=4), "fp32", span=4)
    batch = data.validation(16, 64, batch_size=4)[0]
    logs = model(batch.tokens, reset=batch.reset)[0].log_softmax(-1).detach().numpy()
    want = twins(logs.reshape(-1, 4, logs.shape[-1]), batch.targets.numpy().reshape(-1, 4))
    assert got.items == want.items == 16
    for name in ("exact", "log_prob", "bits", "brier"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=1e-5), name


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("after", [5, 37, 70])
def test_a_killed_sweep_goes_on_to_the_same_results(done, text, tmp_path, monkeypatch, after):
    count = 0
    step = Trainer.step

    def dying(self):
        nonlocal count
        count += 1
        if count == after:
            raise _KilledError
        return step(self)

    monkeypatch.setattr(Trainer, "step", dying)
    options = {**SMALL, "out": tmp_path / "a", "checkpoint_seconds": 0.001}
    with pytest.raises(_KilledError):
        sweep(text, **options)
    got = sweep(text, **options)
    assert count > after
    assert got.complete
    assert (got.path / "runs.csv").read_text() == (done.path / "runs.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["slurm-local", "ray"])
def test_executors_give_the_same_results(done, text, tmp_path, executor):
    pytest.importorskip("ray" if executor == "ray" else "submitit")
    got = sweep(text, **SMALL, out=tmp_path / "a", executor=executor)
    assert not got.failures
    assert (got.path / "runs.csv").read_text() == (done.path / "runs.csv").read_text()


def test_going_on_adds_architectures_and_refuses_other_settings(done, text):
    before = (done.path / "runs.csv").read_text()
    with pytest.raises(ManyformError, match=r"tokens_per_param=\[2.0, 4.0\]"):
        sweep(text, **{**SMALL, "tokens_per_param": "2,8"}, out=done.path)
    got = sweep(text, **{**SMALL, "archs": "lstm,rnn"}, out=done.path)
    assert (done.path / "runs.csv").read_text().startswith(before)
    assert got.runs.archs == ["lstm", "rnn"]


def test_a_further_seed_is_added_to_the_same_runs(done, text, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(done.path, folder)
    before = (folder / "runs.csv").read_text().splitlines()
    again = sweep(text, **SMALL, out=folder, seeds=2)
    after = (folder / "runs.csv").read_text().splitlines()
    assert again.complete
    assert len(after) - 1 == 2 * (len(before) - 1)
    assert set(before) < set(after)
    assert "--seeds 2" in read_plan(folder)["command"]
    with pytest.raises(ManyformError, match="seeds=2"):
        sweep(text, **SMALL, out=folder)


def test_what_cannot_be_swept(text, tmp_path):
    for change, match in (({"sizes": "4k", "budget": "5m"}, "not both"),
                          ({"budgets": "1e12"}, "not both"), ({"archs": "lama"}, "llama"),
                          ({"seeds": 0}, "seeds"), ({"executor": "rey"}, "did you mean 'ray'")):
        with pytest.raises(ManyformError, match=match):
            sweep(text, **{**SMALL, **change}, out=tmp_path / "x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ManyformError, match="something other"):
        sweep(text, **SMALL, out=tmp_path / "other")
    assert cells.Piece("lstm", 0, 1).name == "lstm, size 1, seed 1"


def test_a_budget_chooses_the_sizes(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["manyform.lab.sweep"], "_run", lambda folder, plan, *a: plan)
    plan = sweep(text, archs="lstm", budget="1e14", length=16, show=False, out=tmp_path / "a")
    ladder = [rung_from(r) for r in plan["ladder"]]
    assert len(ladder) == 4
    spent = cost(ladder, [6.0 * r.params * r.tokens_per_step for r in ladder], 1)
    assert 0.7e14 < spent <= 1e14
    # A time budget by the speed of each architecture, a part of it kept back.
    monkeypatch.setattr(sys.modules["manyform.lab.sweep"], "_speed", lambda *a: 1e14 / 510)
    plan = sweep(text, archs="lstm", budget="10m", length=16, show=False, out=tmp_path / "c")
    timed = [rung_from(r) for r in plan["ladder"]]
    assert abs(timed[0].params / ladder[0].params - 1) < 0.1
    with pytest.raises(ManyformError, match="too small"):
        sweep(text, archs="lstm", budget="1e10", length=16, show=False, out=tmp_path / "b")
    with pytest.raises(ManyformError, match="time or FLOPs"):
        sweep(text, archs="lstm", budget="1Mtok", length=16, show=False, out=tmp_path / "b")
