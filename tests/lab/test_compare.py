"""Whole comparisons, as small as they come: killed, resumed, extended, with failures inside."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyform import lab
from manyform.errors import ManyformError

SMALL = {"budget": "3ktok", "d_model": 32, "n_layers": 1, "length": 16, "batch_size": 4, "seeds": 2,
         "contexts": (16, 64), "probe_steps": 4, "show": False}
TIMINGS = {"seconds", "wall_seconds", "tokens_per_second", "ms_per_token", "ms_low", "ms_high",
           "timing", "estimated_seconds", "minutes", "created", "updated", "command", "machine"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for module in ("argparse", "inspect", "ast", "typing", "tarfile", "socket"):
        source = Path(os.__file__).with_name(f"{module}.py").read_text()
        (folder / f"{module}.txt").write_text(source[:12_000])
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYFORM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    return lab.compare(text, archs="llama,gru", out=tmp_path_factory.mktemp("runs") / "a", **SMALL)


def lasting(value):
    """The results without what a clock decides."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in TIMINGS}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def test_a_comparison_has_everything(undisturbed):
    r = undisturbed
    assert r["complete"]
    assert r["plan"]["tokens"] == 46 * 64
    assert r["data"]["train_tokens"] > 10_000
    for name, a in r["archs"].items():
        assert a["error"] is None, a["error"]
        assert a["entry"]["name"] == name
        # One step of the width of so small a GRU is 5%; nothing comes nearer.
        assert abs(a["params"] / a["target_params"] - 1) <= 0.03
        assert len(a["tuning"]) == 4
        assert a["lr"] in [t["lr"] for t in a["tuning"]]
        assert [run["seed"] for run in a["runs"]] == [0, 1]
        for run in a["runs"]:
            last = run["curve"][-1]
            assert last["tokens"] == r["plan"]["tokens"]
            assert last["flops"] == pytest.approx(a["flops_per_token"] * last["tokens"])
            assert last["val_bpb"] > 0
            assert 0 < run["final_bpb"] < 8
        assert a["peak_memory_bytes"] > 4 * a["params"]
        assert [d["context"] for d in a["decode"]] == [16, 64]
        assert [row["factor"] for row in a["length"]] == [1, 2, 4, 8]
        assert set(a["probes"]) == {"mqar", "parity"}
        for probe, answers in (("mqar", 4), ("parity", 64)):
            found = a["probes"][probe]
            assert found["answers"] == answers
            assert 0 < found["bits"] < 10
            assert 0 < found["brier"] < 2
            assert found["exact"] <= found["accuracy"]
        assert a["paths"]
        assert a["seconds"]["tune"] > 0
    llama, gru = (r["archs"][n]["decode"] for n in ("llama", "gru"))
    assert llama[1]["state_bytes"] > 2 * llama[0]["state_bytes"]
    assert gru[1]["state_bytes"] == gru[0]["state_bytes"]
    assert json.loads((r.path / "results.json").read_text()) == r
    table = (r.path / "results.csv").read_text().splitlines()
    assert len(table) == 3
    columns = dict(zip(table[0].split(","), table[1].split(","), strict=False))
    assert float(columns["parity_bits"]) == r["archs"]["llama"]["probes"]["parity"]["bits"]
    assert 'id="plot-twins"' in r.report.read_text()
    assert len((r.path / "curves.csv").read_text().splitlines()) > 20


def test_two_seeds_differ_and_the_first_model_is_kept(undisturbed):
    import manyform
    for name, a in undisturbed["archs"].items():
        assert a["runs"][0]["final_bpb"] != a["runs"][1]["final_bpb"]
        assert manyform.load(undisturbed.path / "models" / name).num_params() == a["params"]


def command(text, out):
    flags = [f"--{k.replace('n_layers', 'layers').replace('_', '-')}={v}" for k, v in SMALL.items()
             if k not in ("show", "contexts")]
    return [sys.executable, "-c", "from manyform.cli import main; main()", "compare", str(text),
            "--archs", "llama,gru", *flags, "--contexts", "16,64", "--out", str(out),
            "--checkpoint-seconds", "0"]


def test_a_killed_comparison_ends_like_an_undisturbed_one(text, undisturbed, tmp_path):
    out = tmp_path / "b"
    marks = [out / "checkpoints" / "llama" / "tune-3", out / "checkpoints" / "gru" / "train-0",
             out / "tasks" / "llama" / "train-1.json"]
    for mark in marks:
        process = subprocess.Popen(command(text, out), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if mark.is_file() or (mark.is_dir() and list(mark.glob("step-0000001*"))) or (
                    mark.is_dir() and "tune" in mark.name):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, output
        json.loads((out / "results.json").read_text())  # valid at any moment
    ended = subprocess.run(command(text, out), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert lasting(results) == lasting(dict(undisturbed))


def test_a_later_architecture_and_a_further_seed(text, undisturbed, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(undisturbed.path, out)
    before = {f: f.read_bytes() for f in out.glob("tasks/*/*.json")}
    r = lab.compare(resume=out, archs="rnn", seeds=3, show=False)
    assert list(r["archs"]) == ["llama", "gru", "rnn"]
    assert [len(a["runs"]) for a in r["archs"].values()] == [3, 3, 3]
    assert r["archs"]["rnn"]["planned"]["tokens"] == r["plan"]["tokens"]
    assert r["archs"]["rnn"]["target_params"] == r["archs"]["llama"]["params"]
    assert all(f.read_bytes() == content for f, content in before.items())
    assert r["complete"]


def test_a_folder_from_before_the_twins_goes_on_and_says_what_it_lacks(
        text, undisturbed, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(undisturbed.path, out)
    for file in out.glob("tasks/*/probe-*.json"):
        task = json.loads(file.read_text())
        for key in ("log_prob", "bits", "brier", "exact", "answers", "exact_bits", "exact_brier",
                    "bits_at_train_length"):
            del task["result"][key]
        file.write_text(json.dumps(task))
    r = lab.compare(resume=out, show=False)
    assert r["complete"]
    assert "bits" not in r["archs"]["gru"]["probes"]["parity"]
    page = r.report.read_text()
    assert "The probes of llama and gru hold accuracies alone" in page.replace(
        "gru and llama", "llama and gru")
    assert 'id="plot-twins"' not in page
    for file in out.glob("tasks/gru/probe-*.json"):
        file.unlink()
    again = lab.compare(resume=out, show=False)
    assert again["archs"]["gru"]["probes"]["parity"]["bits"] == \
        undisturbed["archs"]["gru"]["probes"]["parity"]["bits"]
    page = again.report.read_text()
    assert "The probes of llama hold accuracies alone" in page
    assert 'id="plot-twins"' in page


def test_other_settings_are_refused_on_the_same_folder(text, undisturbed):
    with pytest.raises(ManyformError, match="length=16"):
        lab.compare(text, archs="llama,gru", out=undisturbed.path, **{**SMALL, "length": 32})
    with pytest.raises(ManyformError, match="budget"):
        lab.compare(resume=undisturbed.path, budget="5ktok", show=False)
    with pytest.raises(ManyformError, match="2 seeds already"):
        lab.compare(resume=undisturbed.path, seeds=1, show=False)
    with pytest.raises(ManyformError, match="holds no comparison"):
        lab.compare(resume=undisturbed.path / "nowhere", show=False)


def test_changed_data_is_refused(text, undisturbed, tmp_path):
    out = tmp_path / "d"
    shutil.copytree(undisturbed.path, out)
    facts = json.loads((out / "comparison.json").read_text())
    facts["data"]["content_hash"] = "0" * 64
    (out / "comparison.json").write_text(json.dumps(facts))
    with pytest.raises(ManyformError, match="data has changed"):
        lab.compare(resume=out, show=False)


MIXERS = '''
import torch
from manyform import Cost, SequenceMixer


class Mean(SequenceMixer):
    """Running mean of the past."""

    def __init__(self, d_model, *, place=None):
        super().__init__(d_model)
        self.w = torch.nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, state=None, *, reset=None):
        total, n = self.initial_state(len(x), device=x.device) if state is None else state
        sums = total[:, None] + self.w(x).float().cumsum(1)
        count = n[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device)
        return (sums / count[..., None]).to(x.dtype), (sums[:, -1], count[:, -1])

    def initial_state(self, batch_size, *, device=None):
        return (torch.zeros(batch_size, self.d_model, device=device),
                torch.zeros(batch_size, device=device))

    def cost(self, length):
        return Cost(2 * self.d_model ** 2 * length, 4 * self.d_model + 4)


class Breaks(Mean):
    """Fails in the middle of training, as a bug in someone's layer would."""

    calls = 0

    def forward(self, x, state=None, *, reset=None):
        if self.training and x.shape[1] == 16:
            Breaks.calls += 1
            if Breaks.calls > 60:
                raise ValueError("the layer broke")
        return super().forward(x, state, reset=reset)


class Explodes(Mean):
    """A loss that is never finite."""

    def forward(self, x, state=None, *, reset=None):
        y, state = super().forward(x, state, reset=reset)
        return y * float("nan"), state
'''


def test_mixers_of_ones_own_and_failures_that_stop_nothing_else(text, tmp_path, monkeypatch):
    (tmp_path / "mymixers.py").write_text(MIXERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    r = lab.compare(text, archs=["mymixers:Mean", "mymixers:Breaks", "mymixers:Explodes"],
                    out=tmp_path / "run", **{**SMALL, "seeds": 1})
    good, broken, wild = r["archs"].values()
    assert good["error"] is None
    assert len(good["runs"]) == 1
    assert "the layer broke" in broken["error"]
    assert "diverged" in wild["error"]
    assert not broken["runs"]
    assert not wild["runs"]
    assert r["complete"]


def test_what_cannot_be_compared_is_refused(text, tmp_path):
    out = tmp_path / "e"
    with pytest.raises(ManyformError, match="unknown"):
        lab.compare(text, archs="lama", out=out, **SMALL)
    with pytest.raises(ManyformError, match="too small"):
        lab.compare(text, archs="gru", out=out, **{**SMALL, "budget": "100tok"})
    with pytest.raises(ManyformError, match="no unit"):
        lab.compare(text, archs="gru", out=out, **{**SMALL, "budget": "5"})
    with pytest.raises(ManyformError, match="match must be"):
        lab.compare(text, archs="gru", out=out, **{**SMALL, "match": "size"})
    with pytest.raises(ManyformError, match="names no architecture"):
        lab.compare(text, archs="", out=out, **SMALL)
    for archs in ("fnet", "gru,fnet", "gru,performer(causal=False)"):
        with pytest.raises(ManyformError, match="--objective masked"):
            lab.compare(text, archs=archs, out=out, **SMALL)
    assert not out.exists()


def test_widths_that_the_first_architecture_cannot_have_are_passed_over(text, tmp_path):
    """mistral has four queries a key: no whole groups at 384, a rung that the plan looks at."""
    free = {**SMALL, "d_model": None, "n_layers": None, "seeds": 1, "probe_steps": 0}
    r = lab.compare(text, archs="mistral", out=tmp_path / "a", **free)
    assert r["complete"]
    assert r["archs"]["mistral"]["error"] is None
    assert r["archs"]["mistral"]["probes"] == {}  # none were asked for
    assert "The plan has no probes" in (tmp_path / "a" / "report.html").read_text()
    with pytest.raises(ManyformError, match="kv_groups must divide n_heads=6"):
        lab.compare(text, archs="mistral", out=tmp_path / "b", **{**free, "d_model": 384})


def test_compiling_does_not_use_up_a_time_budget(text, tmp_path, capsys, monkeypatch):
    """A budget that compiling alone exceeds: the loops are made to compile inside it for real."""
    import numba

    from manyform.lab import compare as _  # noqa: F401
    module = sys.modules["manyform.lab.compare"]
    admit = module._Comparison._admit

    def admit_and_compile(self, names, shape):
        timings = admit(self, names, shape)
        begun, n = time.perf_counter(), 0
        while time.perf_counter() - begun < 12:
            n += 1
            numba.njit(lambda x, n=n: x + n)(1.0)
        return timings
    monkeypatch.setattr(module._Comparison, "_admit", admit_and_compile)
    settings = {k: v for k, v in SMALL.items() if k not in ("budget", "seeds", "show")}
    r = lab.compare(text, archs="rnn", out=tmp_path / "a", budget="12s", **settings)
    assert r["complete"]
    assert "Compiling loops for this machine took" in capsys.readouterr().out
