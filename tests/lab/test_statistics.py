"""Intervals of a few seeds: what they cover, and that they never claim too much."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyform.lab import curves, words
from manyform.lab.statistics import compare_all

losses = st.floats(0.5, 5.0, allow_nan=False).map(lambda x: round(x, 4))


@st.composite
def tables(draw, least_seeds=1):
    names = draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=4, unique=True))
    seeds = draw(st.integers(least_seeds, 3))
    return {n: {s: draw(losses) for s in range(seeds)} for n in names}


def test_two_architectures_are_the_paired_t_test():
    from scipy.stats import ttest_rel
    a, b = [1.52, 1.55, 1.49, 1.60], [1.61, 1.62, 1.60, 1.66]
    d = compare_all({"a": dict(enumerate(a)), "b": dict(enumerate(b))}).difference("a", "b")
    want = ttest_rel(a, b).confidence_interval(0.95)
    assert (d.low, d.high) == pytest.approx((want.low, want.high))


def test_one_seed_decides_nothing():
    comparison = compare_all({"a": {0: 1.0}, "b": {0: 5.0}})
    assert not comparison.difference("a", "b").decided
    assert comparison.interval("a").low is None


def test_seeds_that_are_copies_are_no_evidence():
    comparison = compare_all({"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 2.0}})
    assert not comparison.difference("a", "b").decided


def test_a_shift_that_all_share_does_not_widen_differences():
    values = {"a": {0: 1.0, 1: 2.01}, "b": {0: 1.5, 1: 2.50}, "c": {0: 1.8, 1: 2.805}}
    d = compare_all(values).difference("a", "b")
    assert d.decided
    assert d.high < 0
    assert compare_all(values).interval("a").half > 1  # the mean itself is far less certain


def test_simultaneous_intervals_hold_together():
    """Among four equal architectures with three seeds, any wrong claim in about 5% of tables."""
    draw = random.Random(3)
    wrong = 0
    for _ in range(400):
        order = [draw.gauss(0, 0.02) for _ in range(3)]
        values = {n: {s: 2 + order[s] + draw.gauss(0, 0.005) for s in range(3)} for n in "abcd"}
        comparison = compare_all(values)
        wrong += any(comparison.difference(a, b).decided for a in "abcd" for b in "abcd" if a < b)
    assert wrong / 400 < 0.08


def test_intervals_of_means_cover():
    draw = random.Random(5)
    hits = 0
    for _ in range(300):
        order = [draw.gauss(0, 0.01) for _ in range(3)]
        values = {n: {s: 2 + order[s] + draw.gauss(0, 0.01) for s in range(3)} for n in "abcd"}
        found = compare_all(values).interval("a")
        hits += found.low <= 2 <= found.high
    assert hits / 300 > 0.91


@given(tables())
@settings(max_examples=40, deadline=None)
def test_differences_are_antisymmetric_and_in_the_order_of_paired_means(table):
    comparison = compare_all(table)
    names = sorted(table)
    for a in names:
        for b in names:
            d, back = comparison.difference(a, b), comparison.difference(b, a)
            assert d.mean == pytest.approx(-back.mean)
            if d.low is not None:
                assert d.low <= d.mean <= d.high
                assert (d.low, d.high) == pytest.approx((-back.high, -back.low))
            assert d.decided == (d.low is not None and not d.low <= 0 <= d.high)


@given(tables(least_seeds=2))
@settings(max_examples=10, deadline=None)
def test_seeds_needed_is_more_where_nothing_is_decided(table):
    comparison = compare_all(table)
    a, b = sorted(table)[:2]
    d = comparison.difference(a, b)
    needed = comparison.seeds_needed(a, b)
    if needed is not None and d.low is not None and not d.decided:
        assert needed > d.n


def test_missing_seeds_are_left_out_of_pairs():
    comparison = compare_all({"a": {0: 1.0, 1: 1.1}, "b": {0: 2.0, 1: 2.12}, "c": {0: 3.0}})
    assert comparison.difference("a", "b").n == 2
    assert comparison.difference("a", "c").low is None


def test_a_curve_is_read_between_its_points_and_not_outside():
    points = [(100.0, 3.0), (400.0, 2.0)]
    assert curves.at(points, 200.0) == pytest.approx(2.5)
    assert curves.at(points, 100.0) == 3.0
    assert curves.at(points, 50.0) is None
    assert curves.at(points, 500.0) is None


def test_costs_cross_once_or_not_at_all():
    growing, constant = {256: 1.0, 1024: 2.0, 4096: 8.0}, {256: 4.0, 1024: 4.0, 4096: 4.0}
    assert curves.crossing(growing, constant) == pytest.approx(2048)
    assert curves.crossing(constant, growing) is None
    assert curves.crossing({1: 1.0, 2: 3.0, 4: 1.0}, {1: 2.0, 2: 2.0, 4: 2.0}) is None


@pytest.mark.parametrize(("given_", "want"), [
    (words.count(1_234_567), "1.23M"), (words.count(999), "999"), (words.count(None), ""),
    (words.context(16384), "16k"), (words.context(1000), "1k"), (words.size(1536), "1.5 KiB"),
    (words.clock(75), "1m15s"), (words.power(1.7e13), "1.70e13"), (words.power(1e4), "1.00e4"),
    (words.words(["a", "b", "c"]), "a, b and c"), (words.plural(2, "seed"), "two seeds")])
def test_numbers_read_well(given_, want):
    assert given_ == want
