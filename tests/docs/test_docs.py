"""The examples in the documentation run as they are printed."""

import re
import sys
from pathlib import Path

import manyform

DOCS = Path(__file__).parents[2] / "docs"


def test_the_mixer_of_the_guide_obeys_the_laws(tmp_path, monkeypatch):
    page = (DOCS / "add-a-mixer.md").read_text()
    module, use = re.findall(r"```python\n(.*?)```", page, re.S)[:2]
    (tmp_path / "mymixer.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {}
    quick = 'manyform.check("mymixer:MyAverage", precisions=["float32"], length=40)'
    exec(use.replace('manyform.check("my_average")', quick), names)
    assert names["model"].blocks[0].mixer.rate.sigmoid().mean() > 0.97  # memory=50 arrived
    report = manyform.check(sys.modules["mymixer"].MyAverage, length=40)
    assert report.passed
