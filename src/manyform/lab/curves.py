"""Readings of training curves: what each architecture had reached at equal tokens, operations or
seconds; how fast it was still falling; where two costs cross."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "training seconds"}


@dataclass(frozen=True)
class Reading:
    """Bits per byte of every architecture and seed at `amount` of `axis`, the most that all have
    reached. share: how far into its own run each was read, from 0 to 1 (the slowest seed)."""

    axis: str
    amount: float
    values: Mapping[str, Mapping[int, float]]
    share: Mapping[str, float]


def validation(run: Mapping[str, Any], axis: str) -> list[tuple[float, float]]:
    """(amount, bits per byte) of every look at the validation text, in order."""
    points = [(p.get(axis), p.get("val_bpb")) for p in run.get("curve") or []]
    return sorted((float(x), float(y)) for x, y in points
                  if x is not None and y is not None and x > 0)


def at(points: Sequence[tuple[float, float]], amount: float) -> float | None:
    """The curve at `amount`, straight between points on a logarithmic axis; None outside it."""
    if not points or amount > points[-1][0] * (1 + 1e-9) or amount < points[0][0] * (1 - 1e-9):
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= amount <= x1:
            w = math.log(amount / x0) / math.log(x1 / x0) if x1 > x0 else 1.0
            return y0 + w * (y1 - y0)
    return points[-1][1] if amount >= points[-1][0] else points[0][1]


def reading(runs: Mapping[str, Sequence[Mapping[str, Any]]], axis: str) -> Reading | None:
    """All runs at the largest amount of `axis` that every one of them reached; architectures whose
    first look came later are left out. None where fewer than two can be read."""
    curves = {name: {run["seed"]: validation(run, axis) for run in some}
              for name, some in runs.items()}
    ends = [points[-1][0] for rows in curves.values() for points in rows.values() if points]
    if not ends:
        return None
    amount = min(ends)
    values, share = {}, {}
    for name, rows in curves.items():
        found = {seed: at(points, amount) for seed, points in rows.items()}
        kept = {seed: y for seed, y in found.items() if y is not None}
        if kept:
            values[name] = kept
            share[name] = amount / max(rows[s][-1][0] for s in kept)
    return Reading(axis, amount, values, share) if len(values) > 1 else None


def last_halving(run: Mapping[str, Any]) -> float | None:
    """How many bits per byte the validation loss fell over the second half of the tokens."""
    points = validation(run, "tokens")
    if len(points) < 2:
        return None
    middle = at(points, points[-1][0] / 2)
    return None if middle is None else middle - points[-1][1]


def crossing(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """The context at which a, below b before, is above it after (straight lines on log-log axes
    between measured contexts); None where it does not happen, or happens more than once."""
    common = sorted(set(a) & set(b))
    gaps = [math.log(a[c] / b[c]) for c in common]
    found = [i for i in range(len(gaps) - 1) if gaps[i] * gaps[i + 1] < 0]
    if len(found) != 1 or gaps[0] >= 0:
        return None
    i = found[0]
    w = gaps[i] / (gaps[i] - gaps[i + 1])
    return math.exp((1 - w) * math.log(common[i]) + w * math.log(common[i + 1]))
