"""The page as text: self-contained, escaped, complete or partial, every figure with its source."""

import base64
import csv
import io
import itertools
import json
import re

import numpy as np
import pytest
from sample_results import partial, sample_results

from manyform.errors import ManyformError
from manyform.lab.frame import PALETTE
from manyform.lab.report import page, write_report

EVIL = '<img src=x onerror="window.pwned=1">'


def without_scripts(text):
    return re.sub(r"<script(?! type=\"application/json\").*?</script>", "", text, flags=re.S)


@pytest.fixture(scope="module")
def text():
    return page(sample_results())


def test_it_is_written_beside_the_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(sample_results(archs=("llama", "lstm"))))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_folder_without_results_and_a_damaged_one_are_refused(tmp_path):
    with pytest.raises(ManyformError, match="missing"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ManyformError, match="damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_nothing_is_fetched(text):
    outside = without_scripts(text)
    links = re.findall(r"(?:src|href|action)=\"([^\"]*)\"", outside)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in outside
    assert "default-src 'none'" in outside


def test_no_button_uploads(text):
    script = text.rsplit("<script>", 1)[1]
    assert 'plotlyServerURL: ""' in script
    assert "modeBarButtons: [" in script


def test_what_users_name_is_text_and_never_markup():
    results = sample_results(archs=("llama", "lstm"))
    results["data"]["name"] = EVIL
    results["command"] = f"manyform compare '{EVIL}' --budget 5m --out x"
    results["settings"]["data"] = EVIL
    results["archs"][EVIL] = {**results["archs"].pop("lstm"), "error": f"</script>{EVIL}"}
    results["archs"][EVIL]["entry"]["family"] = EVIL
    results["archs"][EVIL]["notes"] = [EVIL]
    results["archs"]["llama"]["runs"][0]["events"] = [{"step": 1, "event": EVIL}]
    found = page(results)
    assert "<img" not in without_scripts(found)
    assert "&lt;img" in found
    payload = re.search(r'<script type="application/json" id="figures">(.*?)</script>', found, re.S)
    assert "<" not in payload[1]
    assert EVIL in json.loads(payload[1])["archs"]


def test_every_figure_names_its_command_and_offers_its_data(text):
    figures = re.findall(r"<figure.*?</figure>", text.split("<script type=")[0], re.S)
    assert len(figures) >= 12
    for figure in figures:
        assert "manyform compare --archs llama," in figure
        assert "results.json: archs" in figure
        packed = re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', figure)[1]
        rows = list(csv.reader(io.StringIO(base64.b64decode(packed).decode())))
        assert len(rows) > 1
        assert len({len(r) for r in rows}) == 1


def test_csv_keeps_full_precision(text):
    packed = re.search(r'download="results.csv" href="data:[^,]*,([^"]+)"', text)[1]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(packed).decode())))
    runs = sample_results()["archs"]["llama"]["runs"]
    mine = next(r for r in rows if r["architecture"] == "llama")
    assert float(mine["bits per byte"]) == pytest.approx(
        sum(r["final_bpb"] for r in runs) / len(runs), abs=1e-12)


def test_a_partial_run_is_shown_and_named_partial():
    found = page(partial(sample_results()))
    assert "<strong>Partial.</strong>" in found
    assert "2 of 12 training runs are done" in found
    assert "RuntimeError: it could not be built" in found
    assert "<strong>Partial.</strong>" not in page(sample_results())


@pytest.mark.parametrize("results", [
    {}, {"archs": {"a": {}}, "complete": False},
    {"archs": {"a": {"error": "broken"}}, "plan": None, "data": None},
    {"archs": {"a": {"runs": [{"seed": 0, "final_bpb": 1.5, "curve": []}], "entry": None}}}])
def test_anything_may_be_missing(results):
    found = page(results)
    assert found.startswith("<!doctype html>")
    assert "{{" not in found.split("<script type=")[0].replace("{{\"", "")


def test_tables_have_headings_for_columns_and_rows(text):
    for table in re.findall(r"<table>.*?</table>", text, re.S):
        assert '<th scope="col"' in table
        assert table.count('<th scope="row"') == table.count("<tr") - 1


def test_no_private_path_is_shown():
    results = sample_results(archs=("llama", "lstm"))
    results["data"]["path"] = "/home/someone/.cache/tokens"
    assert "/home/someone" not in page(results)


# Colours

def _linear(colour):
    c = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _contrast(a, b):
    x, y = sorted(float(_linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (a, b))
    return y / x


def _lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira & Fernandes 2009, severity 1
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]])}


@pytest.mark.parametrize(("theme", "background"), [(0, "#fdfdfc"), (1, "#14171b")])
def test_colours_stand_out_and_stay_apart(theme, background):
    colours = [pair[theme] for pair in PALETTE]
    assert min(_contrast(c, background) for c in colours) >= 3
    for matrix in DEFICIENCIES.values():
        seen = [_lab(matrix @ _linear(c)) for c in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15
