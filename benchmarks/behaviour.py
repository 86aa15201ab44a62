"""The behaviour of the family beside what papers say: `python -m benchmarks --only behaviour`.

The slow tests in tests/behaviour train small models and keep what came out in
results/behaviour.json with `keep`; this writes the table of docs/behaviour.md from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, between

RECORD = RESULTS / "behaviour.json"
PAGE = Path(__file__).parents[1] / "docs" / "behaviour.md"


def keep(run: str, *, claim: str, source: str, reproduced: bool, minutes: float,
         **figures: float | list[float]) -> None:
    """Put one run's figures into the record, in place of older ones of the same name.

    claim: what the source says, in few words and with its figure. reproduced: whether it came out
    so here. minutes: of one processor.
    """
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[run] = {"claim": claim, "source": source, "reproduced": bool(reproduced),
                  "ours": {name: _rounded(value) for name, value in figures.items()},
                  "cpu_minutes": round(minutes, 2)}
    RECORD.write_text(json.dumps(dict(sorted(known.items(), key=lambda item: item[0].lower())),
                                 indent=1) + "\n")


def markdown(record: dict[str, Any]) -> str:
    """One table: a row a run."""
    rows = ["| run | claim | source | ours | reproduced | minutes |", "|---|---|---|---|---|---:|"]
    for run, line in record.items():
        ours = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}"
                         for name, value in line["ours"].items())
        spent = line.get("cpu_minutes", 0.0)  # shared by the rows of a test: with its first
        minutes = f"{spent:.1f}" if spent >= 0.05 else ""
        rows.append(f"| {run} | {line['claim']} | {line['source']} | {ours} | "
                    f"{'yes' if line['reproduced'] else '**no**'} | {minutes} |")
    return "\n".join(rows) + "\n"


def behaviour() -> str:
    """Put the table between the page's markers, and return it."""
    table = markdown(json.loads(RECORD.read_text()))
    between(PAGE, "behaviour", table)
    return table


def _rounded(value: float | list[float]) -> float | list[float]:
    return [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4)


def _shown(value: float | list[float]) -> str:
    if isinstance(value, list):
        return " / ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}" if abs(value) < 0.01 else (
        f"{value:.2f}")
