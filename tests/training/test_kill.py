"""A run killed with SIGKILL at random moments, in the middle of saves included, ends bit for bit
like one that was left alone."""

import multiprocessing
import random
import sys
import time
from pathlib import Path

import pytest

from manyform.training import read_metrics


@pytest.fixture
def start(monkeypatch, dataset):
    """Starts a process that trains in a folder. Where the system can, each is forked from one that
    has imported everything: what is killed is a real process, but it starts at once."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["manyform.training", "manyform.data", "manyform.mixers"])
    import victim

    def start_(folder, steps):
        process = context.Process(target=victim.run, args=(str(dataset.path), str(folder),
                                                           steps))
        process.start()
        return process
    yield start_
    sys.modules.pop("victim")


def losses(folder):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
            for line in read_metrics(folder)]


def kill_often(start, tmp_path, kills, steps, seed):
    """Train in one folder with `kills` kills and in another without: the same in the end.

    Returns how many kills struck, and how many of them while a checkpoint was being written.
    """
    chance = random.Random(seed)
    killed, in_a_save = 0, 0
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    while True:
        process = start(folder, steps)
        if killed < kills:
            before = _last_step(folder)
            while _last_step(folder) <= before and process.is_alive():
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.2))
            process.kill()
        process.join(timeout=300)
        if process.exitcode == 0:
            break
        assert process.exitcode not in (1, None), "it failed before it was killed"
        killed += 1
        in_a_save += any((folder / "checkpoints").glob(".writing-*"))
    process = start(whole, steps)
    process.join(timeout=300)
    assert process.exitcode == 0
    assert losses(folder) == losses(whole)
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    return killed, in_a_save


def _last_step(folder):
    names = [p.name for p in (folder / "checkpoints").glob("step-*")]
    return max((int(n.removeprefix("step-")) for n in names), default=-1)


def test_killed_five_times(start, tmp_path):
    killed, _ = kill_often(start, tmp_path, 5, 60, seed=1)
    assert killed >= 3


@pytest.mark.slow
def test_killed_twenty_times(start, tmp_path):
    killed, in_a_save = kill_often(start, tmp_path, 20, 300, seed=2)
    assert killed >= 15
    assert in_a_save >= 1
