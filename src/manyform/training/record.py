"""metrics.jsonl: one JSON object a line, appended as the run goes, exact after any kill."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Metrics:
    """An append-only file whose length is part of every checkpoint.

    A resumed run cuts the file back to the length that its checkpoint recorded, so that no step
    stands in it twice and no half-written line remains.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb+")
        self._file.seek(0, os.SEEK_END)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line (buffered); numbers that are not finite are written as null."""
        if not all(math.isfinite(v) for v in line.values() if isinstance(v, float)):
            line = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                    for k, v in line.items()}
        self._file.write(json.dumps(line).encode() + b"\n")

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def mark(self) -> int:
        """Force everything to disk; the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, length: int) -> None:
        """Cut the file back to `length` bytes (a shorter file keeps its whole lines)."""
        self._file.flush()
        self._file.seek(0)
        kept = self._file.read(length)
        self._file.truncate(kept.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_metrics(path: str | Path, *, abandoned: bool = False) -> list[dict[str, Any]]:
    """The lines of a metrics file, or of the metrics.jsonl in a run's folder.

    A last line that a kill cut short is left out, and so, unless `abandoned`, are the steps and
    evaluations that a diverged run went back from: each step is there at most once.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for text in file:
            if not text.endswith("\n"):
                break
            line = json.loads(text)
            if "back_to" in line and not abandoned:
                # A step's line is written after it, an evaluation's stands for the steps before it.
                back = line["back_to"]
                lines = [x for x in lines if x["kind"] == "event"
                         or x["step"] < back + (x["kind"] == "eval")]
            lines.append(line)
    return lines
