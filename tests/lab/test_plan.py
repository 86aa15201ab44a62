"""Budgets, and what a plan makes of them."""

import math
from dataclasses import replace

import pytest

from manyform.errors import ManyformError
from manyform.lab.plan import (
    MIN_STEPS,
    Plan,
    Shape,
    Timing,
    extend_plan,
    learning_rates,
    make_plan,
    next_rate,
    parse_budget,
)

SHAPE = Shape(length=64, batch_size=8, curve_batches=2, final_batches=4)
FAST = Timing(step=0.01, eval_batch=0.003, flops_per_token=1e6, decode=1.0, length=0.5,
              probe_step=0.004, probe_fixed=0.1)
SLOW = Timing(step=0.04, eval_batch=0.012, flops_per_token=2e6, decode=1.0, length=0.5,
              probe_step=0.008, probe_fixed=0.1)
BOTH = {"fast": FAST, "slow": SLOW}


@pytest.mark.parametrize(("text", "kind", "amount"), [
    ("90s", "time", 90), ("5m", "time", 300), ("2h", "time", 7200), ("1h30m", "time", 5400),
    ("1.5 min", "time", 90), ("20Mtok", "tokens", 20e6), ("500ktok", "tokens", 500e3),
    ("4096 tokens", "tokens", 4096), ("1e15", "flops", 1e15), ("3e12flops", "flops", 3e12)])
def test_budgets_in_three_currencies(text, kind, amount):
    budget = parse_budget(text)
    assert budget.kind == kind
    assert budget.amount == pytest.approx(amount)


@pytest.mark.parametrize("text", ["5", "fast", "", "-5m", "0s", "5x", "0tok", "m5"])
def test_what_is_not_a_budget_is_refused(text):
    with pytest.raises(ManyformError, match="budget"):
        parse_budget(text)


def test_a_time_budget_holds_everything_and_gives_all_the_same_tokens():
    plan = make_plan(parse_budget("5m"), BOTH, SHAPE, spent=20)
    assert plan.archs["fast"].tokens == plan.archs["slow"].tokens == plan.tokens
    total = plan.estimated_seconds["total"]
    assert 0.8 * 300 < total <= 300
    assert plan.estimated_seconds["calibration"] == 20
    assert plan.seeds >= 2
    twice = make_plan(parse_budget("10m"), BOTH, SHAPE, spent=20)
    assert twice.tokens * twice.seeds > plan.tokens * plan.seeds


def test_the_same_seconds_and_the_same_operations():
    plan = make_plan(parse_budget("5m"), BOTH, SHAPE, match="time")
    fast, slow = plan.archs["fast"], plan.archs["slow"]
    assert fast.steps * FAST.step == pytest.approx(slow.steps * SLOW.step, rel=0.02)
    plan = make_plan(parse_budget("5m"), BOTH, SHAPE, match="flops")
    fast, slow = plan.archs["fast"], plan.archs["slow"]
    assert fast.flops == pytest.approx(slow.flops, rel=0.02)
    assert fast.tokens == pytest.approx(2 * slow.tokens, rel=0.02)


@pytest.mark.parametrize("match", ["params", "flops", "time"])
def test_tokens_and_operations_are_ceilings_of_one_run(match):
    plan = make_plan(parse_budget("1Mtok"), BOTH, SHAPE, match=match)
    assert max(a.tokens for a in plan.archs.values()) <= 1e6
    assert plan.tokens > 0.99e6
    plan = make_plan(parse_budget("1e12"), BOTH, SHAPE, match=match)
    assert 0.98e12 < max(a.flops for a in plan.archs.values()) <= 1e12


def test_a_budget_without_room_for_probes_has_none():
    slow = replace(SLOW, probe_step=0.5, probe_fixed=5.0)
    plan = make_plan(parse_budget("40s"), {"slow": slow}, SHAPE)
    assert plan.probe_steps == 0
    assert plan.estimated_seconds["probes"] == 0
    assert min(a.steps for a in plan.archs.values()) >= MIN_STEPS
    assert make_plan(parse_budget("10m"), {"slow": slow}, SHAPE).probe_steps > 0
    with pytest.raises(ManyformError, match="too small"):  # asked for, they are never left out
        make_plan(parse_budget("40s"), {"slow": slow}, SHAPE, probe_steps=100)
    with pytest.raises(ManyformError, match="at least 0"):
        make_plan(parse_budget("40s"), {"slow": slow}, SHAPE, probe_steps=-1)


def test_a_budget_too_small_names_the_least_and_that_is_enough():
    with pytest.raises(ManyformError, match="too small") as refusal:
        make_plan(parse_budget("3s"), BOTH, SHAPE)
    least = next(w for w in str(refusal.value).split() if w[0].isdigit() and w[-1] in "sm"
                 and w != "3s")
    plan = make_plan(parse_budget(least), BOTH, SHAPE)
    assert min(a.steps for a in plan.archs.values()) >= MIN_STEPS
    with pytest.raises(ManyformError, match=r"at least .* tokens"):
        make_plan(parse_budget("1ktok"), BOTH, SHAPE)


def test_more_seeds_only_where_runs_stay_long():
    assert make_plan(parse_budget("40s"), BOTH, SHAPE).seeds == 1 or \
        make_plan(parse_budget("40s"), BOTH, SHAPE).steps >= 100
    assert make_plan(parse_budget("2h"), BOTH, SHAPE).seeds == 3
    assert make_plan(parse_budget("5m"), BOTH, SHAPE, seeds=4).seeds == 4
    with pytest.raises(ManyformError, match="seeds"):
        make_plan(parse_budget("5m"), BOTH, SHAPE, seeds=0)


def test_a_plan_is_json_and_grows_without_changing_what_was_planned():
    plan = make_plan(parse_budget("5m"), {"fast": FAST}, SHAPE)
    assert Plan.from_dict(plan.to_dict()) == plan
    more = extend_plan(plan, {"slow": SLOW})
    assert more.archs["fast"] == plan.archs["fast"]
    assert more.archs["slow"].tokens == plan.archs["fast"].tokens
    assert more.estimated_seconds["total"] > plan.estimated_seconds["total"]


def test_the_search_is_the_same_rule_for_all():
    rates, factor = learning_rates(256)
    assert rates == (1e-3, 3e-3, 9e-3)
    assert next_rate([(1e-3, 2.0), (3e-3, 2.1), (9e-3, 2.5)], factor) == pytest.approx(3.3e-4)
    assert next_rate([(1e-3, 2.5), (3e-3, 2.4), (9e-3, 2.3)], factor) == pytest.approx(2.7e-2)
    inside = next_rate([(1e-3, 2.5), (3e-3, 2.3), (9e-3, math.inf)], factor)
    assert 1e-3 < inside < 3e-3
