import sys
from types import ModuleType

import pytest

from manyform import ManyformError
from manyform.training.screen import Screen, duration
from manyform.training.tracking import Tracker
from manyform.training.trainer import StepResult


def result(step):
    return StepResult(step, step, 2.0, 1.0, 1e-3, 1000, 0.5, 1e9)


def test_plain_lines(capsys):
    with Screen(total=3, peak_flops=1e10, bits=1.5) as screen:
        for step in range(3):
            screen.step(result(step))
        screen.evaluation(3, 1.9, 2.7)
        screen.say("a [bold] line")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/3  loss 2.0000  3.0000 bits/byte  2,000 tok/s  20.0% of peak  1s left",
        "step 3/3  loss 2.0000  3.0000 bits/byte  2,000 tok/s  20.0% of peak  0s left",
        "step 3/3  validation loss 1.9000  2.7000 bits/byte",
        "a [bold] line"]


def test_live_line(monkeypatch):
    import io

    from rich.console import Console
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(
        file=out, force_terminal=True, width=120, **options))
    with Screen(total=2, peak_flops=1e10, bits=None) as screen:
        screen.step(result(0))
        screen.evaluation(1, 1.9, None)
        screen.say("an event")
        screen.step(result(1))
    text = out.getvalue()
    assert "step 2/2" in text
    assert "loss 2.0000  val 1.9000  2,000 tok/s" in text
    assert "an event" in text


def test_quiet(capsys):
    with Screen(total=1, peak_flops=1e10, bits=None, quiet=True) as screen:
        screen.step(result(0))
        screen.say("x")
    assert capsys.readouterr().out == ""


def test_duration():
    assert [duration(s) for s in (5, 125, 7260)] == ["5s", "2m05s", "2h01m"]


def test_a_tracker_shaped_like_wandb(tmp_path, monkeypatch):
    calls = []
    module = ModuleType("my_tracker")
    module.init = lambda **k: calls.append(("init", k))
    module.log = lambda values, step: calls.append(("log", values, step))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "my_tracker", module)
    tracker = Tracker("my_tracker", folder=tmp_path / "run", config={"lr": 1})
    tracker.log({"loss": 2.0}, 3)
    tracker.finish()
    assert calls == [("init", {"project": "manyform", "name": "run", "config": {"lr": 1}}),
                     ("log", {"loss": 2.0}, 3), ("finish",)]


def test_trackers_that_cannot_be_used(tmp_path):
    with pytest.raises(ManyformError, match="pip install no_such_tracker"):
        Tracker("no_such_tracker", folder=tmp_path, config={})
    with pytest.raises(ManyformError, match="has no init"):
        Tracker("json", folder=tmp_path, config={})


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = Tracker("tensorboard", folder=tmp_path, config={"lr": 1})
    tracker.log({"loss": 2.0}, 3)
    tracker.finish()
    assert list((tmp_path / "tensorboard").glob("events*"))
