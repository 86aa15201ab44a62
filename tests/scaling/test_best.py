"""The best size at a budget, as far as the runs determine it."""

import math

import numpy as np
import pytest
from tests.scaling.synthetic import EPOCH, grid, iso, runs

from manyform.errors import ManyformError
from manyform.scaling import Chinchilla, fit, plan
from manyform.scaling.best import best, budget_for, times


@pytest.fixture(scope="module")
def flat():
    """Sizes that hardly matter, as an LSTM's in few steps."""
    law = Chinchilla(0.0, 1.5, 610.0, 1e-3, 0.43)
    params, multiples = np.meshgrid([3e4, 7e4, 1.5e5, 3e5], [10, 20, 40, 80])
    tokens = params * multiples
    noise = np.exp(0.02 * np.random.default_rng(0).standard_normal(tokens.shape))
    return fit(runs(params.ravel(), tokens.ravel(), (law.predict(params, tokens) * noise).ravel()),
               bootstraps=60)


@pytest.fixture(scope="module")
def good():
    return fit(iso(EPOCH, [1e18, 1e19, 1e20, 1e21], noise=0.003), bootstraps=60)


def test_inside_it_is_the_law_with_its_interval(good):
    found, closed = best(good, 1e20), good.optimal(flops=1e20)
    assert found.determined
    assert not found.notes
    assert found.nearest == found.law
    for what in ("params", "tokens", "tokens_per_param", "loss"):
        assert getattr(found.optimum, what) == pytest.approx(getattr(closed, what))
        low, high = found.optimum.intervals[what]
        assert low < getattr(closed, what) < high
    assert found.optimum.intervals["params"] == pytest.approx(closed.intervals["params"], rel=1e-2)
    assert len(found.rows()) == 4


def test_outside_the_distance_is_said(good):
    notes = best(good, 12e21).notes
    assert notes[0].startswith("1.2e+22 FLOPs is 12 times the largest measured budget (1e+21)")
    assert "extrapolation" in notes[0]
    assert "beyond what was measured" in best(good, 3e21).notes[0]
    assert "2.5 times below the smallest measured budget" in best(good, 4e17).notes[0]
    assert (times(2.74), times(9.96), times(1234.5)) == ("2.7", "10", "1,234")
    # Sizes too small for their tokens: the best lies above all that were run.
    cut = fit(grid(EPOCH, sizes=6, ratios=10, noise=0.002, high=5e8), bootstraps=60)
    found = best(cut, cut.largest)
    assert found.law.params > 5e8
    assert found.nearest.params == pytest.approx(5e8)
    assert found.determined
    assert "times above the sizes" in found.notes[-1]


def test_nonsense_is_not_printed(flat):
    for flops in (1e11, 1e13, 1e15):
        found = best(flat, flops)
        assert not found.determined
        assert [value for _, value, _ in found.rows()[:3]] == ["not determined"] * 3
        assert "not determined" in found.notes[-1]
        # What is planned instead lies where runs are, or grows from there as the budget does.
        low, high = found.covered
        assert low <= found.optimum.params <= high
        first, last = found.optimum.intervals["params"]
        assert first == 0 or first > 3e3
        assert last == math.inf or last > low / 10
    text = "\n".join(plan(flat, flops=1e13, inference_tokens=1e9).lines())
    assert "not determined" in text
    assert "under" in text
    assert "e-" not in text
    assert "smaller models" not in text
    assert "serving is not determined either" in text


def test_beyond_the_largest_budget_nothing_gets_determined(flat):
    assert not best(flat, flat.largest).determined
    assert not any(best(flat, flat.largest * x).determined for x in (1.01, 3, 30, 1000))


def test_a_loss_to_reach(good, flat):
    closed = good.counted(good.law, loss=2.4)
    where, (low, high) = budget_for(good, 2.4)
    assert where == pytest.approx(closed.flops)
    assert low < where < high
    made = plan(good, loss=2.4)
    assert made.rows[0][0] == "training FLOPs"
    assert made.optimum.loss == pytest.approx(2.4, abs=1e-6)
    reached, _ = budget_for(flat, 2.5)
    assert best(flat, reached).nearest.loss == pytest.approx(2.5, rel=1e-2)
    for loss, match in ((0.001, "does not reach it"), (50.0, "less than a tenth")):
        with pytest.raises(ManyformError, match=match):
            budget_for(good, loss)


def test_without_bootstraps():
    bare = fit(grid(EPOCH, noise=0.003), bootstraps=0)
    found = best(bare, bare.largest / 100)
    assert found.optimum.intervals == {}
    assert all(span == "" for _, _, span in found.rows())
    with pytest.raises(ManyformError, match="without an interval"):
        best(bare, bare.largest * 11)
    with pytest.raises(ManyformError, match="positive"):
        best(bare, -1.0)
    with pytest.raises(ManyformError, match="no best size"):
        best(fit(grid(EPOCH, sizes=5, ratios=5), "kaplan-n", bootstraps=0), 1e20)
