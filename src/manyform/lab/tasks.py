"""The run folder: a comparison is a list of tasks, and a finished task is a file.

    DIR/comparison.json          settings, data, machine, sizes and plan; written once, then grown
    DIR/tasks/ARCH/TASK.json     what a finished task measured
    DIR/checkpoints/ARCH/TASK/   where an unfinished training task goes on from
    DIR/models/ARCH/             the model of the first seed
    DIR/results.json, results.csv, curves.csv, report.html   gathered after every task

Files appear whole or not at all, so the folder can be left at any moment.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyform.errors import ManyformError
from manyform.lab.plan import TRIALS
from manyform.lab.probes import PROBES


@dataclass(frozen=True)
class Task:
    """kind: "memory", "tune", "train", "length", "decode" or "probe"; key: which trial, seed or
    probe."""

    arch: str
    kind: str
    key: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.key}" if self.key else self.kind

    @property
    def essential(self) -> bool:
        """True where the architecture has no result without it."""
        return self.kind in ("tune", "train")


def task_list(archs: Sequence[str], seeds: int, probes: bool = True) -> list[Task]:
    """Every task, in the order that makes the report useful early: each stage for all
    architectures before the next, further seeds last."""
    tasks: list[Task] = []
    for arch in archs:
        tasks.append(Task(arch, "memory"))
        tasks += [Task(arch, "tune", str(i + 1)) for i in range(TRIALS)]
    tasks += [Task(arch, "train", "0") for arch in archs]
    named = list(PROBES) if probes else []
    for kind, keys in (("length", [""]), ("decode", [""]), ("probe", named)):
        tasks += [Task(arch, kind, key) for arch in archs for key in keys]
    for seed in range(1, seeds):
        tasks += [Task(arch, "train", str(seed)) for arch in archs]
    return tasks


class RunFolder:
    """Reads and writes the files of one comparison."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        return (self.path / "comparison.json").exists()

    def read(self) -> dict[str, Any]:
        """comparison.json; raises ManyformError where there is none or it is damaged."""
        try:
            return json.loads((self.path / "comparison.json").read_text())
        except FileNotFoundError as error:
            raise ManyformError(f"{self.path} holds no comparison: comparison.json is missing; "
                                "start one with `manyform compare --out DIR`") from error
        except ValueError as error:
            raise ManyformError(f"{self.path / 'comparison.json'} is damaged: {error}") from error

    def write(self, comparison: dict[str, Any]) -> None:
        write_atomically(self.path / "comparison.json", to_json(comparison))

    def task_file(self, task: Task) -> Path:
        return self.path / "tasks" / slug(task.arch) / f"{task.name}.json"

    def checkpoints(self, task: Task) -> Path:
        return self.path / "checkpoints" / slug(task.arch) / task.name

    def model(self, arch: str) -> Path:
        return self.path / "models" / slug(arch)

    def result(self, task: Task) -> dict[str, Any] | None:
        """What the task measured (or {"error": sentence}), None where it has not run."""
        try:
            return json.loads(self.task_file(task).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ManyformError(f"{self.task_file(task)} is damaged ({error}); delete it to have "
                                "this task run again") from error

    def record(self, task: Task, result: dict[str, Any]) -> None:
        write_atomically(self.task_file(task), to_json({"arch": task.arch, "task": task.name,
                                                        **result}))

    def unfinished(self, archs: Sequence[str], seeds: int, probes: bool = True) -> Iterator[Task]:
        """Tasks without a result, failed ones included."""
        for task in task_list(archs, seeds, probes):
            result = self.result(task)
            if result is None or result.get("error"):
                yield task


def slug(name: str) -> str:
    """A folder name for an architecture: itself where that is plain, else made so, with a digest
    that keeps different names apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    if plain == name:
        return plain
    return f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_json(value: Any) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null."""
    def clean(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [clean(x) for x in v]
        return v
    return json.dumps(clean(value), indent=1) + "\n"
