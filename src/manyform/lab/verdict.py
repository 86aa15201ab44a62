"""The verdict: what a comparison has shown, what it has not, and what would decide the rest."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyform.lab import curves, findings
from manyform.lab.findings import Claim, leaders, ranked
from manyform.lab.statistics import Comparison, compare_all
from manyform.lab.words import bpb, context, count, factor, plural, power, size, words

TOPICS = {"quality": "Quality", "equal": "Equal tokens, operations, seconds", "speed": "Training",
          "memory": "Training", "context": "Decoding and state", "length": "Longer contexts",
          "probes": "Probes"}


UNEVEN = 1.3
"""Runs of one architecture whose speeds differ by more than this were disturbed."""


@dataclass(frozen=True)
class OpenQuestion:
    """Something the runs leave open. command: what would decide it, None where no single one
    would."""

    text: str
    command: str | None = None


@dataclass(frozen=True)
class Standing:
    """An architecture's place over quality, speed and memory together.

    status: "front" (none is at least as good on every axis), "open" (one is by the measured means,
    but its lower loss is not beyond doubt) or "dominated" (beyond doubt). by: those that are.
    """

    arch: str
    status: str
    by: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Verdict:
    """summary: the answer in a sentence or two; best: the lowest loss and all that are tied with
    it."""

    summary: str
    claims: list[Claim]
    open_questions: list[OpenQuestion]
    pareto: list[Standing]
    best: tuple[str, ...]


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Read results.json's contents, complete or not.

    No difference in loss is claimed whose simultaneous interval contains zero, none at all from
    one seed, and no difference in speed within the noise of timings.
    """
    values = findings.finals(results)
    if not values:
        failed = [n for n, a in (results.get("archs") or {}).items() if a.get("error")]
        text = "No architecture has finished a training run"
        text += f"; {words(failed)} failed." if failed else " yet."
        return Verdict(text, findings.memory(results), [], [], ())
    comparison = compare_all(values)
    best = tuple(leaders(comparison))
    claims = [*findings.quality(results, comparison), *findings.equal(results),
              *findings.training_speed(results), *findings.memory(results),
              *findings.context(results), *findings.length(results), *findings.probes(results)]
    return Verdict(_summary(results, comparison), claims, _open(results, comparison),
                   pareto(results, comparison), best)


def _summary(results: Mapping[str, Any], comparison: Comparison) -> str:
    """The answer first, then what it costs."""
    order, best = ranked(comparison), leaders(comparison)
    first = order[0]
    if len(order) == 1:
        return f"{first} reached {bpb(comparison.mean(first))} bits per byte; nothing else has " \
               "finished yet."
    lead = f"{first} reached the lowest loss, {bpb(comparison.mean(first))} bits per byte"
    d = comparison.difference(first, order[1])
    if all(comparison.difference(first, n).low is None for n in order[1:]):
        best = [first]
        text = f"In one run each, {lead}, {findings.gap(d)} below {order[1]}; one seed cannot " \
               "say whether that would hold again"
    elif len(best) > 1:
        means = sorted(comparison.mean(n) for n in best)
        text = f"{words(best)} share the lowest loss, {bpb(means[0])} to {bpb(means[-1])} bits " \
               "per byte: no interval tells them apart"
    else:
        text = f"{lead}, {findings.gap(d)} below {order[1]}"
        text += " and further below the rest" if len(order) > 2 else ""
    return f"{text}.{_costs(results, best)}"


def _costs(results: Mapping[str, Any], best: list[str]) -> str:
    """The training rate and the state of the best, against the cheapest."""
    parts = []
    rates = {n: statistics.median(r) for n, r in findings.speeds(results).items()}
    every = findings.speeds(results)
    if len(rates) > 1:
        top = max(sorted(rates), key=lambda n: rates[n])
        slower = [n for n in best if n in rates and n != top and
                  findings.faster(every[top], every[n])]
        if top in best and len(rates) > 1:
            parts.append(f"{top} trains at {count(rates[top])} tokens/s")
        elif slower:
            nearest = max(slower, key=lambda n: rates[n])
            parts.append(f"{top} trains {factor(rates[top] / rates[nearest])} as fast as {nearest} "
                         f"({count(rates[top])} tokens/s)")
    states = {n: s for n in results["archs"]
              if (s := findings.decode(results, n, "state_bytes"))}
    contexts = set.intersection(*(set(s) for s in states.values())) if states else set()
    if len(states) > 1 and contexts:
        far = max(contexts)
        order = sorted(states, key=lambda n: (states[n][far], n))
        low, high = order[0], order[-1]
        if states[high][far] > 2 * states[low][far]:
            parts.append(f"at {context(far)} tokens of context a state takes "
                         f"{size(states[low][far])} with {low} and {size(states[high][far])} with "
                         f"{high}")
    text = "; ".join(parts)
    if parts and parts[0].startswith("at "):
        text = f"A{text[1:]}"
    return f" {text}." if text else ""


# Quality, speed and memory together

def pareto(results: Mapping[str, Any], comparison: Comparison) -> list[Standing]:
    """Where each finished architecture stands; axes that either of two lacks are left out of
    their comparison, apart from the loss."""
    places = []
    for name in ranked(comparison):
        by_means = [o for o in comparison.names if o != name
                    and _as_good(results, comparison, o, name)]
        certain = [o for o in by_means if comparison.difference(o, name).lower]
        if certain:
            text = (f"{name} is beaten by {words(certain)}: a lower loss beyond doubt, at no "
                    "higher cost on any axis measured.")
            places.append(Standing(name, "dominated", tuple(certain), text))
        elif by_means:
            text = (f"{name} is behind {words(by_means)} in every mean, but its loss is not "
                    "beyond doubt higher.")
            places.append(Standing(name, "open", tuple(by_means), text))
        else:
            places.append(Standing(name, "front", (), f"{name} is on the front: no other is as "
                                   "good on every axis."))
    return places


def _as_good(results: Mapping[str, Any], comparison: Comparison, a: str, b: str) -> bool:
    """Whether a's mean loss is lower than b's and a costs no more anywhere, noise aside."""
    if comparison.mean(a) >= comparison.mean(b):
        return False
    x, y = results["archs"][a], results["archs"][b]
    rates = findings.speeds(results)
    noise = 1 + findings.TIMING_NOISE
    costs = [(x.get("peak_memory_bytes"), y.get("peak_memory_bytes"), 1.01)]
    if a in rates and b in rates:
        costs.append((1 / statistics.median(rates[a]), 1 / statistics.median(rates[b]), noise))
    for key, slack in (("ms_per_token", noise), ("state_bytes", 1.01)):
        left, right = findings.decode(results, a, key), findings.decode(results, b, key)
        far = max(set(left) | set(right), default=None)
        if far is not None and left and right:  # one that cannot reach a context costs infinitely
            costs.append((left.get(far, float("inf")), right.get(far, float("inf")), slack))
    return all(p <= slack * q for p, q, slack in costs if p is not None and q is not None)


# What would decide what is open

def _open(results: Mapping[str, Any], comparison: Comparison) -> list[OpenQuestion]:
    plan = results.get("plan") or {}
    questions = []
    if results.get("complete") is False:
        questions.append(OpenQuestion("The comparison has not finished: what is missing is empty "
                                      "below, and intervals may still change.", _resume(results)))
    questions += _seeds(results, comparison)
    questions += _longer(results, comparison)
    if plan.get("match", "params") == "params" and len(comparison.names) > 1:
        for axis, match in (("flops", "flops"), ("seconds", "time")):
            found = curves.reading(findings.runs(results), axis)
            if found is None or min(found.share.values()) > 0.95:
                continue
            then = compare_all(found.values)
            if ranked(then)[0] != ranked(comparison)[0]:
                questions.append(OpenQuestion(
                    f"At equal {curves.AXES[axis]}, {ranked(then)[0]} reads lowest where "
                    f"{ranked(comparison)[0]} is at equal tokens. A comparison planned for equal "
                    f"{curves.AXES[axis]} would decide, since each run then ends its own schedule.",
                    rerun(results, f"match-{match}", match=match)))
    uneven = {n: max(r) / min(r) for n, r in findings.speeds(results).items()
              if max(r) > UNEVEN * min(r)}
    if uneven:
        most = max(uneven, key=lambda n: (uneven[n], n))
        questions.append(OpenQuestion(
            f"Two runs of {most} differ {factor(uneven[most])} in speed, so something else was "
            "using this machine: speeds, latencies and readings at equal seconds are rough. Losses "
            "at equal tokens are not touched by it. A quiet machine would decide."))
    edge = [n for n, a in results["archs"].items() if a.get("lr_at_edge")]
    if edge:
        questions.append(OpenQuestion(
            f"The best learning rate of {words(edge)} lies at the edge of those tried, so "
            f"{'it' if len(edge) == 1 else 'they'} may do better with one beyond it."))
    failed = [n for n, a in results["archs"].items() if a.get("error")]
    if failed:
        questions.append(OpenQuestion(f"{words(failed)} failed; the reason is given below.",
                                      _resume(results)))
    return questions


def _seeds(results: Mapping[str, Any], comparison: Comparison) -> list[OpenQuestion]:
    """How many seeds would separate what is tied with the lowest."""
    best = leaders(comparison)
    if len(comparison.names) < 2 or len(best) < 2:
        return []
    most = max(len(v) for v in comparison.values.values())
    if most < 2:
        return [OpenQuestion("Differences between architectures need at least two seeds; three "
                             "give much narrower intervals.", _resume(results, seeds=3))]
    first, questions = best[0], []
    for other in best[1:]:
        d = comparison.difference(first, other)
        if d.low is None or d.high is None:
            continue
        needed = comparison.seeds_needed(first, other)
        if needed is None:
            questions.append(OpenQuestion(
                f"{first} and {other} differ by {-d.mean:.3f} bits per byte in the mean, and more "
                f"than 64 seeds would be needed to decide it: take them as equal. A difference "
                f"larger than {max(abs(d.low), abs(d.high)):.3f} is excluded."))
        else:
            needed = max(needed, most + 1)
            questions.append(OpenQuestion(
                f"Whether {first} is below {other}: if the difference and the spread stay as they "
                f"are, about {plural(needed, 'seed')} would decide it (there "
                f"{'is' if most == 1 else 'are'} {most}).", _resume(results, seeds=needed)))
    return questions


def _longer(results: Mapping[str, Any], comparison: Comparison) -> list[OpenQuestion]:
    """Whether more training could change the order of the first two."""
    order = ranked(comparison)
    if len(order) < 2:
        return []
    runs = findings.runs(results)
    falls = {n: statistics.fmean(f) for n in order
             if (f := [x for r in runs[n] if (x := curves.last_halving(r)) is not None])}
    if len(falls) < 2:
        return []
    first = order[0]
    # Whoever fell faster over the second half by more than the lead may pass it in a run twice
    # as long.
    if first not in falls:
        return []
    near = {n: comparison.mean(n) - comparison.mean(first) for n in order[1:] if n in falls
            and falls[n] - falls[first] > 0.5 * (comparison.mean(n) - comparison.mean(first))}
    if not near:
        steep = max(falls.values())
        if steep > 0.05:
            return [OpenQuestion(
                f"Losses were still falling (by up to {steep:.2f} bits per byte over the second "
                "half), so this order is that of short training; a larger budget says how it "
                "goes on.", rerun(results, "longer", times=4))]
        return []
    name = min(near, key=lambda n: (near[n], n))
    return [OpenQuestion(
        f"{words(sorted(near))} fell faster than {first} over the second half of training "
        f"({name} by {falls[name]:.3f} bits per byte, {first} by {falls[first]:.3f}), and the lead "
        f"over {name} is {near[name]:.3f}: a longer run may change the order.",
        rerun(results, "longer", times=4))]


# Commands

def _words(results: Mapping[str, Any]) -> list[str]:
    try:
        return shlex.split(results.get("command") or "")
    except ValueError:
        return []


def _resume(results: Mapping[str, Any], *, seeds: int | None = None) -> str | None:
    """The command that goes on in the same folder."""
    given = _words(results)
    if "--out" not in given[:-1]:
        return None
    out = given[given.index("--out") + 1]
    return shlex.join(["manyform", "compare", "--resume", out]
                      + (["--seeds", str(seeds)] if seeds else []))


def rerun(results: Mapping[str, Any], suffix: str, *, times: float | None = None,
          match: str | None = None) -> str | None:
    """The same comparison in another folder, with `times` the budget or another match."""
    given = _words(results)
    if "--out" not in given[:-1] or "--budget" not in given[:-1]:
        return None
    out = given.index("--out") + 1
    given[out] = f"{given[out].rstrip('/')}-{suffix}"
    if times is not None:
        at = given.index("--budget") + 1
        given[at] = _budget(given[at], times)
    if match is not None:
        if "--match" in given[:-1]:
            given[given.index("--match") + 1] = match
        else:
            given[out - 1:out - 1] = ["--match", match]
    return shlex.join(given)


def _budget(text: str, times: float) -> str:
    """A budget in the same kind of unit."""
    from manyform.lab.plan import parse_budget
    budget = parse_budget(text)
    amount = budget.amount * times
    if budget.kind == "time":
        return f"{amount / 60:g}m" if amount % 60 == 0 else f"{amount:.0f}s"
    if budget.kind == "flops":
        return power(amount)
    for value, unit in ((1e9, "Gtok"), (1e6, "Mtok"), (1e3, "ktok")):
        if amount >= value:
            return f"{amount / value:g}{unit}"
    return f"{amount:g}tok"
