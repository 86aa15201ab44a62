"""The page of behaviours and its record."""

import json

import benchmarks.behaviour
from benchmarks.behaviour import PAGE, RECORD, keep, markdown


def test_the_page_shows_every_run_of_the_record():
    page = PAGE.read_text()
    assert [run for run in json.loads(RECORD.read_text()) if f"| {run} |" not in page] == []


def test_a_run_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.behaviour, "RECORD", tmp_path / "behaviour.json")
    line = dict(claim="all", source="A 2024", minutes=1.234)
    for share in (0.5, 0.123456):
        keep("b", reproduced=share < 0.5, share=share, at=[1.0, 0.5], steps=2000, **line)
    keep("A", reproduced=False, **line)
    rows = markdown(json.loads((tmp_path / "behaviour.json").read_text())).splitlines()[2:]
    assert rows == ["| A | all | A 2024 |  | **no** | 1.2 |",
                    "| b | all | A 2024 | share 0.12, at 1.00 / 0.50, steps 2,000 | yes | 1.2 |"]
