"""The scaling report: whole, self-contained, and with what its charts need."""

import json
import re

import numpy as np
import pytest
from tests.scaling.synthetic import EPOCH, grid, iso, runs

from manyform.errors import ManyformError
from manyform.lab.frame import plotly
from manyform.lab.scaling_report import Jump, page, write_report
from manyform.scaling import Chinchilla, emergence, fit, fit_archs
from manyform.scaling.table import join


def figures(text):
    return json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S)[1])


def test_one_law(tmp_path):
    found = fit(iso(EPOCH, [1e18, 1e19, 1e20, 1e21], noise=0.003), bootstraps=60)
    path = write_report(found, tmp_path / "law.html", title="A <law>")
    text = path.read_text()
    assert "{{" not in text.split("<script>")[0]
    assert "A &lt;law&gt;" in text
    assert not re.search(r'(src|href)="https?:', text.replace(plotly(), ""))
    data = figures(text)
    (arch,) = data["archs"].values()
    assert len(arch["draws"]) == 60
    assert len(arch["profiles"]) == 4
    assert arch["frontier"]["low"][0] < arch["frontier"]["loss"][0] < arch["frontier"]["high"][0]
    assert 'id="plot-chances"' not in text
    assert write_report(found, tmp_path).name == "scaling.html"


def test_several_architectures():
    other = Chinchilla(1.8172, 100.0, 2085.43, 0.25, 0.3658)
    table = join([grid(EPOCH, sizes=5, ratios=5, arch="llama"),
                  grid(other, sizes=5, ratios=5, seed=1, arch="lstm")])
    text = page(fit_archs(table, bootstraps=60))
    data = figures(text)
    assert list(data["archs"]) == ["llama", "lstm"]
    assert len(data["archs"]["lstm"]["chance"]) == len(data["budgets"])
    assert 'id="plot-chances"' in text
    assert '<option value="lstm"' in text
    header = text.split("<header>")[1].split("</header>")[0]
    assert "the largest budget measured for all" in header
    assert '<b class="arch">' in header
    assert 'id="ahead"' in text
    assert "run against run" not in text  # no two runs have one size and one number of tokens


def test_what_is_to_know_of_the_runs_is_in_the_header():
    found = fit(grid(EPOCH, sizes=5, ratios=5), bootstraps=60)
    text = page(found, notes=["The best rate is at the <edge>."])
    header = text.split("<header>")[1].split("</header>")[0]
    assert "The best rate is at the &lt;edge&gt;." in header
    assert "at the largest measured budget" in header


def test_sizes_that_do_not_matter():
    """As an LSTM's do in few steps: many bootstraps then have a best size below one parameter."""
    law = Chinchilla(0.0, 1.5, 610.0, 1e-3, 0.43)
    params, multiples = np.meshgrid([3e4, 7e4, 1.5e5, 3e5], [10, 20, 40, 80])
    tokens = params * multiples
    noise = np.exp(0.02 * np.random.default_rng(0).standard_normal(tokens.shape))
    table = runs(params.ravel(), tokens.ravel(), (law.predict(params, tokens) * noise).ravel())
    found = fit(table, bootstraps=60)
    assert any(d.alpha < 0.002 for d in found.draws)
    text = page(found)
    assert "not determined by these runs" in text.split("<header>")[1].split("</header>")[0]
    (arch,) = figures(text)["archs"].values()
    assert arch["approaches"][-1]["a"] is None


def test_laws_of_one_quantity_have_no_page():
    with pytest.raises(ManyformError, match="not kaplan-n"):
        page(fit(grid(EPOCH, sizes=5, ratios=5), "kaplan-n", bootstraps=0))


def test_jumps_are_drawn_with_their_twins():
    found = fit(grid(EPOCH, sizes=5, ratios=5), bootstraps=0)
    scale = np.geomspace(1e17, 1e22, 12)
    nats = 0.01 + 3e4 * scale**-0.27
    exact = np.exp(-20 * nats)
    text = page(found, jumps={"": Jump(scale, exact, nats, 8, emergence(scale, exact, nats, 500))})
    (arch,) = figures(text)["archs"].values()
    assert np.allclose(arch["jump"]["expected"], exact, atol=0.02)
    assert 'id="plot-twin"' in text
    assert "chi-square" in text
