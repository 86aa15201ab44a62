import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

import manyform
from manyform import ManyformError
from manyform.training import TrainConfig, read_metrics, train
from manyform.training.record import Metrics
from manyform.training.trainer import Trainer

CONFIG = TrainConfig(steps=24, batch_size=4, length=16, lr=5e-3, precision="fp32", eval_every=8,
                     eval_tokens=256, checkpoint_every=6, checkpoint_seconds=None)
SMALL = {"d_model": 16, "n_layers": 1}


def go(dataset, folder, config=CONFIG, **options):
    return train("gru", dataset, config, folder, model_options=SMALL, device="cpu", quiet=True,
                 **options)


def losses(folder):
    """Everything in the metrics that does not depend on time."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
            for line in read_metrics(folder)]


def stop_after(monkeypatch, steps, action):
    """Do `action` at the end of the given step, once."""
    plain = Trainer.step

    def step(self):
        result = plain(self)
        if result.step + 1 == steps:
            action()
        return result
    monkeypatch.setattr(Trainer, "step", step)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    torch.set_num_threads(1)
    return go(dataset, folder)


def test_the_folder(whole, dataset):
    folder = whole.folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json",
        "train.json"]
    about = json.loads((folder / "train.json").read_text())
    assert about["config"]["steps"] == 24
    assert about["data"]["content_hash"] == dataset.content_hash
    assert about["machine"]["fp32_gflops"] > 0
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000018", "step-00000024"]
    loaded = manyform.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.model.parameters(),
                                                 strict=True))


def test_the_result_and_the_metrics(whole):
    assert (whole.status, whole.steps, whole.tokens) == ("finished", 24, 24 * 64)
    assert whole.best_nats == whole.evaluation.nats
    lines = losses(whole.folder)
    steps = [x for x in lines if x["kind"] == "step"]
    assert [x["step"] for x in steps] == list(range(24))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["bits_per_byte"] == pytest.approx(steps[0]["loss"] / math.log(2))
    assert [x["step"] for x in lines if x["kind"] == "eval"] == [8, 16, 24]
    assert lines[-1]["val_bits_per_byte"] == pytest.approx(lines[-1]["val_loss"] / math.log(2))


def test_a_finished_run_is_not_trained_again(whole, dataset):
    before = (whole.folder / "metrics.jsonl").read_bytes()
    again = go(dataset, whole.folder)
    assert (again.status, again.steps) == ("finished", 24)
    assert again.evaluation == whole.evaluation
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint(dataset, tmp_path, whole, monkeypatch, number):
    with monkeypatch.context() as patch:
        stop_after(patch, 10, lambda: os.kill(os.getpid(), number))
        first = go(dataset, tmp_path / "run")
    assert (first.status, first.steps) == ("interrupted", 10)
    second = go(dataset, tmp_path / "run")
    assert second.status == "finished"
    assert losses(tmp_path / "run") == losses(whole.folder)


def test_a_crash_continues_from_the_last_checkpoint(dataset, tmp_path, whole, monkeypatch):
    def crash():
        raise RuntimeError("power")
    with monkeypatch.context() as patch:
        stop_after(patch, 15, crash)
        with pytest.raises(RuntimeError, match="power"):
            go(dataset, tmp_path)
    assert losses(tmp_path)[-1]["step"] >= 12
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    go(dataset, tmp_path)
    assert losses(tmp_path) == losses(whole.folder)


def test_a_damaged_checkpoint_is_named(dataset, tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        go(dataset, tmp_path)
    path = tmp_path / "checkpoints" / "step-00000014" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    train("gru", dataset, CONFIG, tmp_path, model_options=SMALL, device="cpu")
    said = capsys.readouterr().out
    assert "step-00000014 is damaged: model.safetensors" in said
    assert "continuing at step 12" in said
    assert losses(tmp_path) == losses(whole.folder)


def test_other_settings_are_refused_and_named(whole, dataset):
    with pytest.raises(ManyformError, match=r"lr=0\.005 there and 0\.1 now"):
        go(dataset, whole.folder, replace(CONFIG, lr=0.1))
    with pytest.raises(ManyformError, match=r"another model \(pattern, name\)"):
        train("lstm", dataset, CONFIG, whole.folder, model_options=SMALL, device="cpu", quiet=True)
    go(dataset, whole.folder, replace(CONFIG, keep=5, checkpoint_seconds=9.0))


def test_a_folder_with_other_things_is_refused(dataset, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ManyformError, match="something other than a run"):
        go(dataset, tmp_path)


def test_a_vocabulary_too_small_is_refused(dataset, tmp_path):
    model = manyform.create("gru", vocab_size=10, **SMALL)
    with pytest.raises(ManyformError, match="256 different tokens"):
        train(model, dataset, CONFIG, tmp_path, quiet=True)


def poison(monkeypatch, bad):
    """Make the loss of the given batches infinite."""
    plain = Trainer._gradients
    monkeypatch.setattr(Trainer, "_gradients", lambda self, batch: (
        plain(self, batch) * (float("inf") if self.position in bad else 1.0)))


def test_divergence_goes_back_and_on_to_other_data(dataset, tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, patience=3)
    poison(monkeypatch, {8, 9, 10})
    done = train("gru", dataset, config, tmp_path / "a", model_options=SMALL, device="cpu")
    said = capsys.readouterr().out
    assert "back to step 6" in said
    assert done.status == "finished"
    lines = losses(tmp_path / "a")
    steps = [x for x in lines if x["kind"] == "step"]
    assert [x["step"] for x in steps] == list(range(24))
    assert [x["position"] for x in steps] == [*range(6), *range(11, 29)]
    everything = read_metrics(tmp_path / "a", abandoned=True)
    assert [x["step"] for x in everything if x.get("event") == "non-finite"] == [8, 9, 10]
    # Interrupted right after it went back, the run still ends alike.
    with monkeypatch.context() as patch:
        stop_after(patch, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
        go(dataset, tmp_path / "b", config)
    go(dataset, tmp_path / "b", config)
    assert losses(tmp_path / "b") == lines


def test_divergence_for_good_stops_with_a_report(dataset, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(8, 1000)))
    with pytest.raises(ManyformError, match="lower learning rate"):
        go(dataset, tmp_path, replace(CONFIG, patience=3))
    assert read_metrics(tmp_path, abandoned=True)[-1]["event"] == "stopped"


def test_muon_tbptt_and_accumulation_run(dataset, tmp_path):
    done = go(dataset, tmp_path, replace(CONFIG, optimizer="muon", tbptt=True, accumulation=2,
                                         steps=6, schedule="cosine"))
    assert done.status == "finished"


def test_metrics_cut_to_a_length(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"kind": "step", "step": 0, "loss": float("nan")})
    mark = metrics.mark()
    metrics.write({"kind": "step", "step": 1, "loss": 2.0})
    metrics.close()
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.cut(mark)
    metrics.write({"kind": "step", "step": 1, "loss": 3.0})
    metrics.cut(10**6)  # a file shorter than it was: its whole lines stay
    metrics.close()
    assert [x["loss"] for x in read_metrics(tmp_path)] == [None, 3.0]


def test_no_arguments_that_cannot_apply(dataset, tmp_path):
    with pytest.raises(ManyformError, match="model_options"):
        train(manyform.create("gru", vocab_size=256, **SMALL), dataset, CONFIG, tmp_path,
              model_options=SMALL)
    with pytest.raises(ManyformError, match="cannot be used here"):
        train("gru", dataset, CONFIG, tmp_path, device="cuda:99", model_options=SMALL)
