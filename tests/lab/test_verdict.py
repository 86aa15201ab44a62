"""The verdict claims what the intervals allow and nothing more."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_results import partial, sample_results

from manyform.lab.plan import parse_budget
from manyform.lab.statistics import compare_all
from manyform.lab.tables import main_table, summary_table
from manyform.lab.verdict import verdict

WINNER = re.compile(r"has a lower|is lowest|lower validation loss|reached the lowest loss, [\d.]+ "
                    r"bits per byte, [\d.]+ \[")


def with_losses(values, results=None):
    """The sample with these final losses in place of its own, its curves moved along."""
    results = copy.deepcopy(results or sample_results(archs=tuple(values), seeds=1))
    for name, losses in values.items():
        a = results["archs"][name]
        first = a["runs"][0]
        a["runs"] = []
        for seed, loss in enumerate(losses):
            run = copy.deepcopy(first)
            shift = loss - first["final_bpb"]
            for point in run["curve"]:
                if point["val_bpb"] is not None:
                    point["val_bpb"] += shift
            a["runs"].append({**run, "seed": seed, "final_bpb": loss})
    return results


losses = st.lists(st.integers(15000, 15400).map(lambda n: n / 1e4), min_size=3, max_size=3)


@given(st.integers(1, 3), losses, losses, losses)
@settings(max_examples=25, deadline=None)
def test_no_winner_whose_interval_contains_zero(seeds, a, b, c):
    values = {"llama": a[:seeds], "mamba2": b[:seeds], "lstm": c[:seeds]}
    found = verdict(with_losses(values))
    comparison = compare_all({n: dict(enumerate(v)) for n, v in values.items()})
    best = found.best[0]
    for claim in found.claims:
        if claim.topic == "quality" and claim.standing == "shown":
            for other in claim.archs[1:]:
                assert comparison.difference(best, other).high < 0
        if claim.topic == "quality" and claim.standing != "shown":
            assert not WINNER.search(claim.text)
    if not all(comparison.difference(best, n).lower for n in values if n != best):
        assert not WINNER.search(found.summary)
    for place in found.pareto:
        if place.status == "dominated":
            assert all(comparison.difference(o, place.arch).high < 0 for o in place.by)


@given(st.permutations(["llama", "mamba2", "lstm", "hyena"]), st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_the_order_of_architectures_does_not_matter(order, seeds):
    results = sample_results(archs=("llama", "mamba2", "lstm", "hyena"), seeds=seeds)
    other = {**results, "archs": {n: results["archs"][n] for n in order}}
    a, b = verdict(results), verdict(other)
    assert a.summary == b.summary
    assert a.best == b.best
    assert {(c.topic, c.standing, frozenset(c.archs)) for c in a.claims} == \
        {(c.topic, c.standing, frozenset(c.archs)) for c in b.claims}
    assert [(p.arch, p.status) for p in a.pareto] == [(p.arch, p.status) for p in b.pareto]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_names_do_not_matter(seeds):
    results = sample_results(seeds=seeds)
    new = {n: f"n{i}" for i, n in enumerate(sorted(results["archs"]))}  # keeps their order
    renamed = {**results, "archs": {new[n]: a for n, a in results["archs"].items()}}
    a, b = verdict(results), verdict(renamed)
    assert tuple(new[n] for n in a.best) == b.best
    assert [(c.topic, c.standing, tuple(new[n] for n in c.archs)) for c in a.claims] == \
        [(c.topic, c.standing, c.archs) for c in b.claims]
    text = a.summary
    for n in sorted(new, key=len, reverse=True):
        text = re.sub(rf"\b{n}\b", new[n], text)
    assert text == b.summary


def test_one_seed_claims_nothing_and_says_what_would():
    found = verdict(sample_results(seeds=1))
    assert found.summary.startswith("In one run each")
    assert "one seed cannot say" in found.summary
    assert all(c.standing == "single" for c in found.claims if c.topic in ("quality", "equal"))
    question = next(q for q in found.open_questions if "two seeds" in q.text)
    assert question.command == "manyform compare --resume runs/six-kinds --seeds 3"
    assert all(p.status != "dominated" for p in found.pareto)


def test_a_tie_is_called_a_tie_with_the_seeds_that_would_decide():
    results = with_losses({"llama": [1.50, 1.53], "mamba2": [1.51, 1.52], "lstm": [1.9, 1.91]})
    found = verdict(results)
    assert set(found.best) == {"llama", "mamba2"}
    assert "share the lowest loss" in found.summary
    tie = next(c for c in found.claims if c.standing == "tie" and c.topic == "quality")
    assert "contains zero" in tie.text
    assert any("take them as equal" in q.text or "would decide it" in q.text
               for q in found.open_questions)


def test_a_clear_winner_is_named_with_its_interval():
    found = verdict(with_losses({"llama": [1.500, 1.502, 1.501], "lstm": [1.901, 1.900, 1.903]}))
    assert found.best == ("llama",)
    claim = next(c for c in found.claims if c.topic == "quality")
    assert claim.standing == "shown"
    assert 0 < claim.figures["low"] < claim.figures["difference"] < claim.figures["high"]


def test_a_lead_over_curves_read_before_their_decay_is_no_claim():
    found = verdict(sample_results(seeds=3))
    seconds = next(c for c in found.claims if c.topic == "equal" and "seconds" in c.text)
    assert seconds.standing == "single"
    assert "part-way" in seconds.text


def test_a_dominated_architecture_is_named_with_those_that_dominate_it():
    places = {p.arch: p for p in verdict(sample_results(seeds=3)).pareto}
    assert places["hyena"].status == "dominated"
    assert "mamba2" in places["hyena"].by
    assert places["lstm"].status == "front"  # worst loss, and the fastest and smallest


def test_growing_states_and_where_latencies_cross():
    text = " ".join(c.text for c in verdict(sample_results()).claims if c.topic == "context")
    assert "llama grows from 1 MiB at 256 tokens of context to 64 MiB at 16k" in text
    assert "overtaken by" in text


def test_probes_are_read_against_chance():
    claims = [c.text for c in verdict(sample_results()).claims if c.topic == "probes"]
    parity = next(c for c in claims if "parity" in c)
    assert "lstm solves it" in parity
    assert "not told from chance" in parity
    assert "llama" in parity.split("not told from chance")[0].split(";")[-1]


def test_commands_that_are_proposed_can_be_given():
    found = verdict(sample_results())
    commands = [q.command for q in found.open_questions if q.command]
    longer = next(c for c in commands if "-longer" in c)
    assert "--budget 60m" in longer
    for command in commands:
        words = command.split()
        if "--budget" in words:
            parse_budget(words[words.index("--budget") + 1])


@pytest.mark.parametrize("results", [
    {}, {"archs": {}}, {"archs": {"a": {}}}, {"archs": {"a": {"error": "broken"}}},
    {"complete": False, "archs": {"a": {"runs": [{"seed": 0, "final_bpb": 1.5}]}}},
    {"archs": {"a": {"runs": [{"seed": 0, "final_bpb": 1.5, "curve": []}]},
               "b": {"runs": [{"seed": 1, "final_bpb": 1.6}], "decode": [], "probes": {}}}}])
def test_anything_may_be_missing(results):
    assert verdict(results).summary
    assert summary_table(results)


def test_a_partial_run_says_so():
    found = verdict(partial(sample_results()))
    assert "has not finished" in found.open_questions[0].text
    assert found.open_questions[0].command == "manyform compare --resume runs/six-kinds"


def test_the_table_marks_the_lowest_and_its_ties_in_bold():
    results = sample_results()
    best = verdict(results).best
    lines = summary_table(results).splitlines()
    bold = [line.split("|")[1].strip() for line in lines if "**" in line]
    assert sorted(bold) == sorted(best)
    assert main_table(results).rows[0][0].text == best[0]


def test_the_table_of_one_seed_marks_none():
    assert "**" not in summary_table(sample_results(seeds=1))


def test_speeds_that_vary_as_much_within_as_between_are_not_told_apart():
    results = sample_results(archs=("llama", "lstm"))
    for name, rates in {"llama": (900, 3000), "lstm": (1000, 1400)}.items():
        for run, rate in zip(results["archs"][name]["runs"], rates, strict=True):
            run["tokens_per_second"] = rate
    found = verdict(results)
    speed = next(c.text for c in found.claims if c.topic == "speed")
    assert "not told apart" in speed
    assert "as fast as" not in found.summary
    assert any("something else was using this machine" in q.text for q in found.open_questions)
