"""A run killed with SIGKILL at random moments, in the middle of saves included, ends bit for bit
like one that was left alone."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyform.training import read_metrics

VICTIM = Path(__file__).with_name("victim.py")


def start(dataset, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(VICTIM), str(dataset.path), str(folder)],
                            stdout=subprocess.PIPE, env=environment, text=True)


def losses(folder):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
            for line in read_metrics(folder)]


def kill_often(dataset, tmp_path, kills, seed):
    chance = random.Random(seed)
    killed, aside = 0, 0
    folder = tmp_path / "killed"
    while True:
        process = start(dataset, folder)
        assert process.stdout.readline() == "ready\n"
        if killed < kills:
            before = _last_step(folder)
            deadline = time.monotonic() + 60
            while (_last_step(folder) <= before and process.poll() is None
                   and time.monotonic() < deadline):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3))
        else:
            process.wait(timeout=120)
        finished = process.poll() is not None
        process.kill()
        process.wait()
        process.stdout.close()
        if finished:
            assert process.returncode == 0
            break
        killed += 1
        aside += any((folder / "checkpoints").glob(".writing-*"))
    whole = start(dataset, tmp_path / "whole")
    assert whole.wait(timeout=120) == 0
    whole.stdout.close()
    assert losses(folder) == losses(tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    return killed, aside


def _last_step(folder):
    names = [p.name for p in (folder / "checkpoints").glob("step-*")]
    return max((int(n.removeprefix("step-")) for n in names), default=-1)


def test_killed_five_times(dataset, tmp_path):
    killed, _ = kill_often(dataset, tmp_path, 5, seed=1)
    assert killed >= 3


@pytest.mark.slow
def test_killed_twenty_times(dataset, tmp_path):
    killed, during_a_save = kill_often(dataset, tmp_path, 20, seed=2)
    assert killed >= 15
    assert during_a_save >= 1
