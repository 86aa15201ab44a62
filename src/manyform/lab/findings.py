"""What a comparison measured, said in sentences that stay within what the measurements allow.

A claim's `standing` says how far it goes: "shown" where an interval excludes the opposite, "tie"
where it does not, "measured" where a cost was measured and differences within its noise are not
read, "single" where one run is all there is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manyform.lab import curves
from manyform.lab import words as say
from manyform.lab.statistics import Comparison, Difference, compare_all
from manyform.lab.words import bpb, clock, count, factor, millis, power, share, size, words

TIMING_NOISE = 0.10
"""Timings of one machine differ by this much from one minute to the next."""
SOLVED = 0.95
FLAT = 0.02
"""Bits per byte: a change with context smaller than this is called none."""


@dataclass(frozen=True)
class Claim:
    """One sentence. topic: "quality", "equal", "speed", "memory", "context", "length" or "probes";
    figures: the numbers behind it by name."""

    topic: str
    text: str
    standing: str
    archs: tuple[str, ...] = ()
    figures: Mapping[str, float | None] = field(default_factory=dict)


def runs(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Finished runs by architecture, those without any left out."""
    found = {name: [r for r in a.get("runs") or [] if r.get("final_bpb") is not None]
             for name, a in (results.get("archs") or {}).items()}
    return {name: some for name, some in found.items() if some}


def finals(results: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Validation bits per byte after training, by architecture and seed."""
    return {name: {r["seed"]: float(r["final_bpb"]) for r in some}
            for name, some in runs(results).items()}


def ranked(comparison: Comparison) -> list[str]:
    """Names from the lowest mean up."""
    return sorted(comparison.names, key=lambda n: (comparison.mean(n), n))


def leaders(comparison: Comparison) -> list[str]:
    """The lowest mean and all that no interval tells from it, in order of their means."""
    order = ranked(comparison)
    return order[:1] + [n for n in order[1:] if not comparison.difference(order[0], n).lower]


def gap(d: Difference) -> str:
    """The difference b - a of an a that is below b, with its interval."""
    if d.low is None or d.high is None:
        return f"{-d.mean:.3f}"
    near = min(abs(d.low), abs(d.high))  # digits enough to see on which side of zero it ends
    digits = 3 if near >= 0.001 else 4 if near >= 0.0001 else 6
    return f"{-d.mean:.{digits}f} [{-d.high:.{digits}f}, {-d.low:.{digits}f}]"


def quality(results: Mapping[str, Any], comparison: Comparison) -> list[Claim]:
    """Which validation loss is lowest, and what cannot be told apart."""
    terms = _terms(results)
    order = ranked(comparison)
    best = order[0]
    if len(order) < 2:
        return [Claim("quality", f"{best} reached {bpb(comparison.mean(best))} bits per "
                      "byte; "
                      "there is nothing yet to compare it with.", "single", (best,),
                      {best: comparison.mean(best)})]
    figures: dict[str, float | None] = {n: comparison.mean(n) for n in order}
    compared = [n for n in order[1:] if comparison.difference(best, n).low is not None]
    if not compared:
        d = comparison.difference(best, order[1])
        return [Claim("quality", f"{terms}, one run each, {best} ended lowest at "
                      f"{bpb(figures[best])} bits per byte, {gap(d)} below {order[1]}. One seed "
                      "has no interval, so this is what happened once and no claim about the "
                      "architectures.", "single", tuple(order), figures)]
    claims = []
    below = [n for n in compared if comparison.difference(best, n).lower]
    tied = [n for n in compared if n not in below]
    missing = [n for n in order[1:] if n not in compared]
    if below:
        nearest = comparison.difference(best, below[0])
        who = "all others" if len(below) == len(order) - 1 and len(below) > 1 else words(below)
        least = f", {gap(nearest)} less than {below[0]}" + (", the nearest" if len(below) > 1
                                                            else "")
        claims.append(Claim(
            "quality", f"{terms}, {best} has a lower validation loss than {who}: "
            f"{bpb(figures[best])} bits per byte{least}.", "shown", (best, *below),
            {**figures, "difference": -nearest.mean, "low": -(nearest.high or 0.0),
             "high": -(nearest.low or 0.0)}))
    if tied:
        parts = [f"{n} ({gap(comparison.difference(best, n))} above)" for n in tied]
        claims.append(Claim(
            "quality", f"{terms}, {best} ({bpb(figures[best])}) and {words(parts)} are tied: "
            + ("this interval contains" if len(tied) == 1 else "these intervals contain")
            + " zero, and the order of the means is no evidence.", "tie", (best, *tied), figures))
    if missing:
        claims.append(Claim("quality", f"For {words(missing)} there are fewer than two seeds in "
                            "common with the rest yet, and nothing is claimed.", "single",
                            tuple(missing), figures))
    return claims


def _terms(results: Mapping[str, Any]) -> str:
    """What was equal when the runs ended."""
    plan = results.get("plan") or {}
    match = plan.get("match", "params")
    if match == "params":
        return f"At equal tokens ({count(plan['tokens'])})" if plan.get("tokens") \
            else "At equal tokens"
    return f"At equal training {'FLOPs' if match == 'flops' else 'seconds'}"


MATCHED = {"params": "tokens", "flops": "flops", "time": "seconds"}
"""The axis on which all runs end together, by what was matched."""


def equal(results: Mapping[str, Any]) -> list[Claim]:
    """The order under the two other readings of equal (`quality` tells the matched one), each
    read from the curves at the most that all reached."""
    claims = []
    matched = MATCHED.get((results.get("plan") or {}).get("match", "params"))
    for axis in (a for a in curves.AXES if a != matched):
        found = curves.reading(runs(results), axis)
        if found is None:
            continue
        comparison = compare_all(found.values)
        claims.append(_equal(found, comparison))
    return claims


def _equal(found: curves.Reading, comparison: Comparison) -> Claim:
    order = ranked(comparison)
    best, tied = order[0], leaders(comparison)
    amount = {"tokens": count, "flops": power, "seconds": clock}[found.axis](found.amount)
    head = f"At equal {curves.AXES[found.axis]} ({amount})"
    figures: dict[str, float | None] = {n: comparison.mean(n) for n in order}
    figures[found.axis] = found.amount
    told = f"{bpb(comparison.mean(best))}; {order[1]} {bpb(comparison.mean(order[1]))}"
    early = [n for n in order if found.share[n] < 0.95]
    # A curve read before its learning rate has decayed is above what a run of that length would
    # reach, so a lead over such a curve proves nothing.
    doubtful = [n for n in early if n != best and found.share[n] < found.share[best] - 0.05]
    single = all(comparison.difference(best, n).low is None for n in order[1:])
    if single:
        several = max(map(len, found.values.values())) > 1
        why = "fewer than two seeds of a pair can be read there" if several else "one run each"
        text, standing = f"{head}, {best} reads lowest ({told}); {why}.", "single"
    elif len(tied) > 1:
        text, standing = f"{head}, {words(tied)} are not told apart.", "tie"
    elif doubtful:
        text, standing = f"{head}, {best} reads lowest ({told}).", "single"
    else:
        text, standing = f"{head}, {best} is lowest ({told}).", "shown"
    if early:
        text += (f" {words(early)} {'is' if len(early) == 1 else 'are'} read part-way (from "
                 f"{share(min(found.share[n] for n in early))} of the run on), before the learning "
                 "rate has decayed, which reads too high"
                 + (", so this is no claim." if doubtful and not single and len(tied) == 1
                    else "."))
    return Claim("equal", text, standing, tuple(order), figures)


# Costs

def speeds(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Training tokens a second of every run."""
    found = {name: [float(r["tokens_per_second"]) for r in some if r.get("tokens_per_second")]
             for name, some in runs(results).items()}
    for name, a in (results.get("archs") or {}).items():
        if not found.get(name) and a.get("tokens_per_second"):
            found[name] = [float(a["tokens_per_second"])]
    return {name: rates for name, rates in found.items() if rates}


def faster(a: list[float], b: list[float]) -> bool:
    """Whether a is faster beyond doubt: every run of it than every run of b, by more than noise."""
    return min(a) > max(b) and \
        statistics.median(a) > (1 + TIMING_NOISE) * statistics.median(b)


def decode(results: Mapping[str, Any], name: str, key: str = "ms_per_token") -> dict[int, float]:
    """{context: value} where it was measured."""
    rows = results["archs"][name].get("decode") or []
    return {int(r["context"]): float(r[key]) for r in rows if r.get(key) is not None}


def _quicker(results: Mapping[str, Any], a: str, b: str, context: int) -> bool:
    """Whether a decodes faster than b there: quartiles apart and by more than noise."""
    rows = [next(r for r in results["archs"][n]["decode"] if r["context"] == context)
            for n in (a, b)]
    ms = [float(r["ms_per_token"]) for r in rows]
    return ms[0] * (1 + TIMING_NOISE) < ms[1] and \
        (rows[0].get("ms_high") or ms[0]) < (rows[1].get("ms_low") or ms[1])


def training_speed(results: Mapping[str, Any]) -> list[Claim]:
    """Who trains fastest, and how far apart fastest and slowest are."""
    rates = {n: statistics.median(r) for n, r in speeds(results).items()}
    if len(rates) < 2:
        return []
    order = sorted(rates, key=lambda n: (-rates[n], n))
    every = speeds(results)
    level = [n for n in order[1:] if not faster(every[order[0]], every[n])]
    last = order[-1]
    who = f"{order[0]} trains fastest, at {count(rates[order[0]])} tokens a second"
    if level:
        who = (f"The training speeds of {words([order[0], *level])} are not told apart "
               f"({count(rates[order[0]])} to {count(min(rates[n] for n in level))} tokens a "
               "second, which is within what runs of one architecture differ by)")
    tail = "" if last in level else f", {factor(rates[order[0]] / rates[last])} the rate of {last}"
    return [Claim("speed", f"{who}{tail}.", "measured", tuple(order),
                  {n: rates[n] for n in order})]


def memory(results: Mapping[str, Any]) -> list[Claim]:
    """Peak memory of a training step."""
    peaks = {n: float(a["peak_memory_bytes"]) for n, a in (results.get("archs") or {}).items()
             if a.get("peak_memory_bytes")}
    if len(peaks) < 2:
        return []
    order = sorted(peaks, key=lambda n: (peaks[n], n))
    low, high = order[0], order[-1]
    return [Claim("memory", f"A training step takes the least memory with {low} "
                  f"({size(peaks[low])}) and the most with {high} ({size(peaks[high])}, "
                  f"{factor(peaks[high] / peaks[low])}).", "measured", tuple(order), dict(peaks))]


def context(results: Mapping[str, Any]) -> list[Claim]:
    """How decoding time and state grow with context, and where a growing one passes the rest."""
    names = [n for n in results.get("archs") or {} if len(decode(results, n)) > 1]
    states = {n: decode(results, n, "state_bytes") for n in names}
    constant = sorted(n for n in names if max(states[n].values()) <= min(states[n].values()))
    growing = sorted(set(names) - set(constant))
    claims = []
    if constant:
        each = ", ".join(f"{n} {size(max(states[n].values()))}" for n in constant)
        claims.append(Claim("context", f"The state of {words(constant)} stays the same at every "
                            f"context: {each}.", "measured", tuple(constant),
                            {n: max(states[n].values()) for n in constant}))
    for name in growing:
        first, last = min(states[name]), max(states[name])
        text = (f"The state of {name} grows from {size(states[name][first])} at "
                f"{say.context(first)} tokens of context to {size(states[name][last])} at "
                f"{say.context(last)}")
        passed = {n: c for n in constant
                  if (c := curves.crossing(states[name], states[n])) is not None}
        if passed:
            text += ", passing " + words(f"{n} at about {count(c)} tokens"
                                          for n, c in passed.items())
        claims.append(Claim("context", text + ".", "measured", (name, *passed),
                            {"first": states[name][first], "last": states[name][last], **passed}))
    return claims + _latency(results, names, constant, growing)


def _latency(results: Mapping[str, Any], names: list[str], constant: list[str],
             growing: list[str]) -> list[Claim]:
    """Who decodes fastest at the longest context that all reached, and where orders turn."""
    contexts = set.intersection(*(set(decode(results, n)) for n in names)) if names else set()
    if len(names) < 2 or not contexts:
        return []
    far = max(contexts)
    ms = {n: decode(results, n)[far] for n in names}
    order = sorted(ms, key=lambda n: (ms[n], n))
    level = [n for n in order[1:] if not _quicker(results, order[0], n, far)]
    best = words([order[0], *level])
    claims = [Claim(
        "context", f"At {say.context(far)} tokens of context {best} "
        + ("decodes fastest" if not level else "decode fastest, too close to tell apart")
        + f" ({millis(ms[order[0]])} ms a token); {order[-1]} takes {millis(ms[order[-1]])} ms.",
        "measured", tuple(order), dict(ms))]
    for name in growing:
        turns = {}
        for other in constant:
            where = curves.crossing(decode(results, name), decode(results, other))
            shared = set(decode(results, name)) & set(decode(results, other))
            if where is not None and _quicker(results, name, other, min(shared)) \
                    and _quicker(results, other, name, max(shared)):
                turns[other] = where
        if turns:
            text = words(f"{n} beyond about {count(c)}" for n, c in turns.items())
            claims.append(Claim("context", f"{name} decodes faster at short contexts and is "
                                f"overtaken by {text} tokens.", "measured", (name, *turns), turns))
    return claims


# Length and probes

def length(results: Mapping[str, Any]) -> list[Claim]:
    """What happens beyond the training length."""
    kept: list[tuple[str, str]] = []
    used: list[tuple[str, str]] = []
    lost: list[tuple[str, str]] = []
    cut: list[tuple[str, str]] = []
    figures: dict[str, float | None] = {}
    far = 1
    for name, a in (results.get("archs") or {}).items():
        rows = {int(r["factor"]): r for r in a.get("length") or []}
        if 1 not in rows or len(rows) < 2 or rows[1].get("bpb") is None:
            continue
        reached = max(f for f, r in rows.items() if r.get("bpb") is not None)
        change = rows[reached]["bpb"] - rows[1]["bpb"]
        far = max(far, *rows)
        figures[name] = change
        if reached < max(rows):
            cut.append((name, f"{name} (at most {reached}x)"))
        elif change > FLAT:
            lost.append((name, f"{name} ({change:+.3f})"))
        else:
            (used if change < -FLAT else kept).append((name, f"{name} ({change:+.3f})"))
    head = f"With {far}x the training length as context"
    parts = [(used, "predicts better", "predict better"), (kept, "neither gains nor loses",
             "neither gain nor lose"), (lost, "gets worse", "get worse"),
             (cut, "cannot be run", "cannot be run")]
    said = [f"{words(t for _, t in group)} {one if len(group) == 1 else many}"
            for group, one, many in parts if group]
    if not said:
        return []
    return [Claim("length", f"{head}, " + "; ".join(said) + ". These are changes in bits per byte "
                  "of the same text, on the model of the first seed, without an interval over "
                  "seeds.", "single", tuple(figures), figures)]


def probes(results: Mapping[str, Any]) -> list[Claim]:
    """Who solves each probe and who is at chance."""
    claims = []
    archs = results.get("archs") or {}
    for probe in sorted({p for a in archs.values() for p in a.get("probes") or {}}):
        found = {n: a["probes"][probe] for n, a in archs.items()
                 if probe in (a.get("probes") or {})}
        solved = [n for n, r in found.items() if r["low"] >= SOLVED]
        chance = [n for n, r in found.items() if r["low"] <= r["chance"] <= r["high"]]
        under = [n for n, r in found.items() if r["high"] < r["chance"]]
        partly = [n for n, r in found.items() if r["low"] > r["chance"] and n not in solved]
        parts = []
        if solved:
            parts.append(f"{words(solved)} {'solves' if len(solved) == 1 else 'solve'} it "
                         f"(at least {share(SOLVED)} right)")
        if partly:
            each = words(f"{n} ({share(found[n]['accuracy'])}, "
                         f"{share(found[n]['low'])} to {share(found[n]['high'])})" for n in partly)
            parts.append(f"{each} {'is' if len(partly) == 1 else 'are'} above chance")
        if chance:
            parts.append(f"{words(chance)} {'is' if len(chance) == 1 else 'are'} not told from "
                         "chance")
        if under:
            parts.append(f"{words(under)} {'is' if len(under) == 1 else 'are'} below chance")
        level = share(next(iter(found.values()))["chance"])
        claims.append(Claim(
            "probes", f"{title(probe)} (chance {level}): " + "; ".join(parts)
            + ". One training run each: the intervals cover the test examples, not the seeds.",
            "shown" if solved or partly else "tie", tuple(found),
            {n: r["accuracy"] for n, r in found.items()}))
    return claims


def title(probe: str) -> str:
    """A probe's name as a heading."""
    return {"mqar": "Recall (MQAR)", "parity": "State tracking (parity)"}.get(probe, probe)
