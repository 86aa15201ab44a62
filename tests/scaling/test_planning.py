"""Planning with published and fitted laws."""

import numpy as np
import pytest
from tests.scaling.synthetic import EPOCH, grid

from manyform.errors import ManyformError
from manyform.scaling import PUBLISHED, fit
from manyform.scaling.planning import DEVICES, gpu_flops, history, plan


@pytest.mark.parametrize(("name", "flops", "params", "tokens"), [
    ("chinchilla-1", 5.76e23, 67e9, 1.5e12), ("chinchilla-2", 6.88e23, 67e9, 1.7e12),
    ("chinchilla", 1.71e24, 67e9, 4.1e12), ("chinchilla", 1.62e20, 1e9, 27.1e9)])
def test_published_rules_give_the_published_sizes(name, flops, params, tokens):
    """Tables 3 and A3 of Hoffmann 2022, whose digits are rounded."""
    best = PUBLISHED[name].law.optimal(flops=flops)
    assert best.params == pytest.approx(params, rel=0.06)
    assert best.tokens == pytest.approx(tokens, rel=0.09)


def test_twenty_tokens_a_parameter_and_the_exponent():
    best = PUBLISHED["chinchilla-epoch"].law.optimal(flops=5.76e23)
    assert 15 < best.tokens_per_param < 25
    assert pytest.approx(0.513, abs=1e-3) == PUBLISHED["chinchilla-epoch"].law.a


def test_what_the_rules_say_of_the_past():
    rows = {(v.model, v.rule): v for v in history()}
    # Kaplan's rule would have had GPT-3 larger still; Chinchilla's smaller, on four to six times
    # the tokens.
    assert rows["GPT-3", "kaplan"].too_large < 0.5
    assert 2 < rows["GPT-3", "chinchilla-1"].too_large < 5
    assert 2 < rows["GPT-3", "chinchilla-1"].too_little < 5
    assert rows["Gopher", "chinchilla-1"].too_little > rows["GPT-3", "chinchilla-1"].too_little
    assert rows["Chinchilla", "chinchilla-1"].too_large == pytest.approx(1, abs=0.1)
    for v in rows.values():  # both sides of one budget
        assert v.too_large == pytest.approx(v.too_little, rel=1e-6)


def test_budgets():
    by_flops = plan("chinchilla-epoch", flops=gpu_flops(1000, "h100", 0.4))
    by_hours = plan("chinchilla-epoch", gpu_hours=1000, device="h100", utilisation=0.4)
    assert by_hours.optimum == by_flops.optimum
    assert gpu_flops(1, "a100", 1.0) == 3600 * DEVICES["a100"]
    by_loss = plan("chinchilla-epoch", loss=by_flops.optimum.loss)
    assert by_loss.optimum.flops == pytest.approx(by_flops.optimum.flops)
    for options, match in (({}, "one of"), ({"flops": 1e20, "loss": 2.0}, "one of"),
                           ({"gpu_hours": 1, "device": "h1000"}, "unknown device"),
                           ({"gpu_hours": 1, "utilisation": 3}, "utilisation"),
                           ({"loss": 1.2}, "below the floor"), ({"flops": -1}, "positive")):
        with pytest.raises(ManyformError, match=match):
            plan("chinchilla-epoch", **options)
    with pytest.raises(ManyformError, match="unknown published law"):
        plan("chinchila", flops=1e20)
    with pytest.raises(ManyformError, match="knows no losses"):
        plan("kaplan", loss=2.0)


def test_smaller_models_cost_more_to_train_and_less_to_serve():
    got = plan("chinchilla-epoch", flops=1e21)
    assert got.smaller[0].training == pytest.approx(1)
    costs = [s.training for s in got.smaller]
    assert costs == sorted(costs)
    for s in got.smaller:
        assert EPOCH.predict(s.params, s.tokens) == pytest.approx(got.optimum.loss, rel=1e-6)


def test_serving_is_counted_in():
    got = plan("chinchilla-epoch", flops=1e22, inference_tokens=1e12)
    serving, best = got.serving, got.optimum
    assert serving.optimum.params < best.params
    assert EPOCH.predict(serving.optimum.params, serving.optimum.tokens) == pytest.approx(
        best.loss, rel=1e-6)
    sizes = np.geomspace(best.params / 20, best.params * 1.5, 4000)
    tokens = EPOCH.tokens_for(sizes, best.loss)
    totals = 6 * sizes * tokens + 2 * sizes * 1e12
    assert serving.total == pytest.approx(totals.min(), rel=1e-5)
    assert 0 < serving.saved < 1
    little = plan("chinchilla-epoch", flops=1e22, inference_tokens=1.0).serving
    assert little.optimum.params == pytest.approx(best.params, rel=0.01)
    with pytest.raises(ManyformError, match="predicts the loss"):
        plan("chinchilla-1", flops=1e22, inference_tokens=1e12)


def test_nothing_is_extrapolated_silently():
    far = plan("chinchilla", flops=1e26)
    assert "largest run behind this law" in " ".join(far.warnings)
    assert "range from" in " ".join(far.warnings)
    fitted = fit(grid(EPOCH, noise=0.003), bootstraps=50)
    got = plan(fitted, flops=fitted.largest * 50, inference_tokens=1e12)
    assert "50 times the largest measured" in got.warnings[0]
    text = "\n".join(got.lines())
    for part in ("warning: ", "[", "tokens per parameter", "serving", "smaller models"):
        assert part in text
    assert plan(fitted, flops=fitted.largest / 30).warnings == ()
    with pytest.raises(ManyformError, match="without an interval"):
        plan(fit(grid(EPOCH, noise=0.003), bootstraps=0), flops=1e27)


def test_the_counting_of_a_law_is_said():
    assert "non-embedding" in " ".join(plan("kaplan", flops=1e20).warnings)
