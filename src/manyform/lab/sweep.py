"""`sweep`: a ladder of sizes per architecture on your data, and the scaling laws that it gives."""

from __future__ import annotations

import csv
import io
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyform.config import split_outside
from manyform.errors import ManyformError
from manyform.lab import ladder as rules
from manyform.lab import live
from manyform.lab.calibrate import step_seconds
from manyform.lab.cells import (
    Piece,
    branch_file,
    rates_at_edge,
    read_plan,
    read_result,
    trial_file,
    work,
)
from manyform.lab.compare import _checked, _describe, _entry, _spec
from manyform.lab.executors import run_all, sentence
from manyform.lab.ladder import Rung, rung_from
from manyform.lab.measure import seeded
from manyform.lab.plan import TRIALS, parse_budget
from manyform.lab.scaling_report import Jump, write_report
from manyform.lab.tasks import to_json, write_atomically
from manyform.scaling import Families, Runs, emergence, fit_archs, load
from manyform.scaling.fit import FAR

DEFAULT_ARCHS = ("llama", "mamba2", "gated_delta_net", "lstm")
SAFETY = 0.85  # of a time budget is planned; the rest absorbs noise and evaluation
VAL_TOKENS = 131_072
VAL_ROWS = 16
_PROBED = (30_000, 300_000)  # sizes at which a time budget is calibrated
_COLUMNS = ("arch", "run", "seed", "params", "tokens", "flops", "bpb", "convention",
            "unique_tokens", "lr", "batch_tokens", "steps", "warmup_steps", "d_model", "n_layers",
            "exact", "exact_tokens", "spans", "span_nats", "span_brier")


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep's folder, the runs that are finished, the laws that they carry (None where they carry
    none yet, and `why`), the page or None, and what failed (piece: sentence). notes: what to know
    of the runs, a sentence each."""

    path: Path
    runs: Runs | None
    laws: Families | None
    why: str
    report: Path | None
    failures: dict[str, str]
    complete: bool
    notes: tuple[str, ...] = ()


def sweep(data: str | Path | None = None, *, archs: Sequence[str] | str | None = None,
          sizes: Sequence[int] | str | None = None,
          tokens_per_param: Sequence[float] | str | None = None,
          budgets: Sequence[float] | str | None = None, budget: str | None = None,
          seeds: int = 1, length: int = 128, tokenizer: str = "bytes", column: str | None = None,
          device: str = "auto", executor: str = "local",
          executor_options: Mapping[str, Any] | None = None, out: str | Path | None = None,
          checkpoint_seconds: float = 20.0, bootstraps: int = 1000, show: bool = True) -> Sweep:
    """Train a ladder of sizes of each architecture and fit a scaling law to each.

    data, archs, tokenizer, column, device: as in `compare`. sizes: target parameters of the rungs,
      smallest first (None: four, each 2.5 times the one before, from the budget).
    tokens_per_param: the token budgets of every rung; or budgets: training FLOPs of an isoFLOP
      grid. budget: what the whole sweep may take: time ("30m") or FLOPs ("1e15"); needed where
      sizes are not given, and only there.
    seeds: runs of every cell. length: tokens a row. executor: see `manyform.lab.executors`;
      executor_options go to submitit. out: the run folder (a dated one if None); an existing one
      goes on where it was left, and new architectures and further seeds are added to it.
    checkpoint_seconds: how often an unfinished run is saved. bootstraps: behind the intervals.

    Batch, warm-up and learning rate follow from the size (`manyform.lab.ladder`); the learning rate
    of the smallest size is searched for, four trials for each architecture.
    Raises ManyformError for settings that make no sweep or differ from the folder's.
    """
    folder = Path(out) if out else Path("runs") / f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a mixer of your own is imported from where you stand
    if isinstance(archs, str):
        archs = [a for a in split_outside(archs, ",") if a]
    names = _checked(archs) if archs else []
    settings = {
        "data": _spec(data), "sizes": _sizes(sizes),
        "tokens_per_param": _floats(tokens_per_param, "tokens per parameter"),
        "budgets": _floats(budgets, "budgets"), "budget": budget, "seeds": seeds,
        "length": length, "tokenizer": str(tokenizer), "column": column, "device": device}
    _check(settings)
    screen = live.display(show)
    try:
        if (folder / "sweep.json").exists():
            plan = _reopen(folder, settings, names, screen)
        else:
            plan = _open(folder, settings, names or list(DEFAULT_ARCHS), screen)
        return _run(folder, plan, executor, dict(executor_options or {}), checkpoint_seconds,
                    bootstraps, screen)
    except KeyboardInterrupt:
        screen.say(f"\nStopped. The same command with --out {folder} goes on.")
        raise
    finally:
        screen.close()


# Planning

def _check(settings: dict[str, Any]) -> None:
    if settings["sizes"] is None and settings["budget"] is None:
        settings["budget"] = "30m"
    if settings["sizes"] is not None and settings["budget"] is not None:
        raise ManyformError("give sizes or budget, not both: a budget chooses the sizes")
    if settings["tokens_per_param"] is not None and settings["budgets"] is not None:
        raise ManyformError("give tokens_per_param or budgets (an isoFLOP grid), not both")
    if settings["budgets"] is not None and settings["sizes"] is None:
        raise ManyformError("an isoFLOP grid needs its sizes: give sizes with budgets")
    for key in ("seeds", "length"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise ManyformError(f"{key} must be a whole number of at least 1, not "
                                f"{settings[key]!r}")


def _open(folder: Path, settings: dict[str, Any], names: list[str], screen: live.Silent,
          ) -> dict[str, Any]:
    """Make the plan of a new sweep and write it down."""
    from manyform import __version__
    from manyform.data import load as load_data
    from manyform.training.machine import find_device, machine_facts, resolve_precision
    if folder.is_dir() and any(folder.iterdir()):
        raise ManyformError(f"{folder} holds something other than a sweep; give a folder that is "
                            "new or empty")
    device = find_device(settings["device"])
    screen.say("Reading the data and measuring this machine …")
    data = load_data(settings["data"], tokenizer=settings["tokenizer"], column=settings["column"])
    if len(data.tokens("val")) <= settings["length"]:
        raise ManyformError(f"the validation split of {data.name} has "
                            f"{len(data.tokens('val')):,} tokens, fewer than length "
                            f"{settings['length']}; give more text or a shorter length")
    precision = resolve_precision("auto", device)
    plan: dict[str, Any] = {
        "manyform": __version__, "created": datetime.now(UTC).isoformat("T", "seconds"),
        "command": _command(settings, names, folder), "machine": machine_facts(
            str(device)).to_dict(), "data": _describe(data), "settings": settings,
        "precision": precision, "threads": torch.get_num_threads(),
        "val_tokens": min(len(data.tokens("val")), VAL_TOKENS), "val_rows": VAL_ROWS}
    sizes = settings["sizes"] or _affordable(settings, names, data, device, precision, screen)
    made = rules.rungs(sizes, settings["length"], budgets=settings["budgets"] or (),
                       multiples=settings["tokens_per_param"] or rules.MULTIPLES)
    plan["ladder"] = [asdict(r) for r in made]
    plan["archs"] = _admit(names, made, data, screen)
    if all("error" in a for a in plan["archs"].values()):
        raise ManyformError("none of the architectures could be built: " + "; ".join(
            f"{n}: {a['error']}" for n, a in plan["archs"].items()))
    write_atomically(folder / "sweep.json", to_json(plan))
    for line in _describe_plan(plan, data):
        screen.say(line)
    screen.say(f"Run folder: {folder}")
    return plan


def _reopen(folder: Path, settings: dict[str, Any], names: list[str], screen: live.Silent,
            ) -> dict[str, Any]:
    """The plan of a sweep that is there, with the architectures and the seeds that are new."""
    from manyform.data import open_dataset
    plan = read_plan(folder)
    more = settings["seeds"] > plan["settings"]["seeds"]
    for key, value in settings.items():
        if plan["settings"][key] != value and not (key == "seeds" and more):
            raise ManyformError(f"{folder} holds a sweep with {key}={plan['settings'][key]!r}, and "
                                f"this asks for {value!r}; give the same settings to go on with "
                                "it, or another --out")
    new = [n for n in names if n not in plan["archs"]]
    if new:
        plan["archs"] |= _admit(new, [rung_from(r) for r in plan["ladder"]],
                                open_dataset(plan["data"]["path"]), screen)
    if new or more:
        plan["settings"] = settings
        plan["command"] = _command(settings, list(plan["archs"]), folder)
        write_atomically(folder / "sweep.json", to_json(plan))
    return plan


def _admit(names: Sequence[str], ladder: Sequence[Rung], data: Any, screen: live.Silent,
           ) -> dict[str, Any]:
    """Each architecture sized to every rung; one that cannot be is recorded with the reason."""
    out: dict[str, Any] = {}
    for name in names:
        try:
            sizes = [rules.size_of(name, r.params, data.vocab_size, r.length) for r in ladder]
            if len({s.params for s in sizes}) < len(sizes):
                raise ManyformError(f"{name} has no different sizes at "
                                    f"{', '.join(f'{r.params:,}' for r in ladder)} parameters")
            out[name] = {"entry": _entry(name), "sizes": [
                {**asdict(s), "options": dict(s.options)} for s in sizes]}
        except Exception as error:
            out[name] = {"error": sentence(error)}
            screen.say(f"  {name} is left out: {out[name]['error']}")
    return out


def _affordable(settings: dict[str, Any], names: Sequence[str], data: Any, device: torch.device,
                precision: str, screen: live.Silent) -> list[int]:
    """The largest ladder that the budget affords, by 6 N FLOPs a token; for a time budget by the
    speeds of every architecture at two sizes, interpolated."""
    budget = parse_budget(settings["budget"])
    if budget.kind == "tokens":
        raise ManyformError("the budget of a sweep is time or FLOPs, not tokens")
    begun = time.perf_counter()
    speeds: dict[str, list[float]] = {}
    if budget.kind == "time":
        for name in names:
            screen.say(f"  measuring {name} …")
            speeds[name] = [_speed(name, p, settings["length"], data, device, precision)
                            for p in _PROBED]
    available = budget.amount if budget.kind == "flops" else SAFETY * (
        budget.amount - (time.perf_counter() - begun))
    multiples = settings["tokens_per_param"] or rules.MULTIPLES

    def takes(smallest: float) -> float:
        made = rules.rungs(rules.geometric(smallest), settings["length"], multiples=multiples)
        total = 0.0
        for name in names:
            flops = [6.0 * r.params * r.tokens_per_step for r in made]
            if speeds:
                logs = np.interp(np.log([r.params for r in made]), np.log(_PROBED),
                                 np.log(speeds[name]))
                flops = [f / float(np.exp(s)) for f, s in zip(flops, logs, strict=True)]
            total += rules.cost(made, flops, settings["seeds"])
        return total

    fitting = [s for s in np.geomspace(1e4, 1e9, 251) if takes(float(s)) <= available]
    if not fitting:
        raise ManyformError(f"a budget of {budget.text} is too small for a ladder of "
                            f"{len(names)} architectures from 10,000 parameters up: that would "
                            f"take about {takes(1e4):.3g} "
                            f"{'seconds' if speeds else 'FLOPs'}; give more, fewer "
                            "architectures, or fewer tokens per parameter")
    return rules.geometric(float(max(fitting)))


def _speed(name: str, params: int, length: int, data: Any, device: torch.device, precision: str,
           ) -> float:
    """6 N FLOPs a second of training steps at this size."""
    from manyform.training import Trainer
    (rung,) = rules.rungs([params], length)
    model = seeded(rules.size_of(name, params, data.vocab_size, length), data.vocab_size, 0, device)
    config = rules.train_config(rung, rung.steps[-1], 1e-3, 0, precision)
    batches = data.batches(batch_size=rung.rows, length=length, seed=0)
    return 6.0 * params * rung.tokens_per_step / step_seconds(Trainer(model, batches, config),
                                                              most=0.3)


def _describe_plan(plan: dict[str, Any], data: Any) -> list[str]:
    out = []
    for r in map(rung_from, plan["ladder"]):
        tokens = ", ".join(f"{s * r.tokens_per_step:,}" for s in r.steps)
        out.append(f"  {r.params:>12,} parameters: {tokens} tokens in batches of "
                   f"{r.tokens_per_step:,}, warm-up {r.warmup} steps")
    fewest = min(r["steps"][0] for r in plan["ladder"])
    if fewest < rules.FEW_STEPS:
        out.append(f"  the smallest budget is {fewest} steps: below {rules.FEW_STEPS} the loss is "
                   "of the optimizer's start more than of the size; give more tokens per parameter")
    most = max(r.steps[-1] * r.tokens_per_step for r in map(rung_from, plan["ladder"]))
    if most > len(data.tokens("train")):
        out.append(f"  the largest budget reads the {len(data.tokens('train')):,} training tokens "
                   f"{most / len(data.tokens('train')):.1f} times: beyond four passes repeated "
                   "text is worth less (Muennighoff 2023), and the law is of this text")
    return out


# Running

def _run(folder: Path, plan: dict[str, Any], executor: str, options: dict[str, Any],
         checkpoint_seconds: float, bootstraps: int, screen: live.Silent) -> Sweep:
    """Every piece that is not done: the searches first, then the cells, small sizes first."""
    alive = [n for n, a in plan["archs"].items() if "error" not in a]
    ladder = [rung_from(r) for r in plan["ladder"]]
    failures = {n: a["error"] for n, a in plan["archs"].items() if "error" in a}
    searches = [Piece(n) for n in alive if any(
        read_result(trial_file(folder, n, i)) is None for i in range(TRIALS))]
    cells = [Piece(n, i, seed) for seed in range(plan["settings"]["seeds"])
             for i in range(len(ladder)) for n in alive
             if any(read_result(branch_file(folder, n, ladder[i], seed, s)) is None
                    for s in ladder[i].steps)]
    for stage in (searches, cells):
        kept = [p for p in stage if p.arch not in failures]
        if not kept:
            continue
        for piece, error in run_all(executor, work, folder, kept, threads=plan["threads"],
                                    checkpoint_seconds=checkpoint_seconds, options=options):
            if error is None:
                screen.say(f"  done: {piece.name}")
            else:
                failures[piece.arch if piece.rung is None else piece.name] = error
                screen.say(f"  failed: {piece.name}: {error}")
            _gather(folder, plan, ladder, alive)
    rows, lost = _gather(folder, plan, ladder, alive)
    failures |= lost
    expected = len(alive) * plan["settings"]["seeds"] * sum(len(r.steps) for r in ladder)
    runs, laws, why, page = None, None, "no run is finished", None
    edge = rates_at_edge(folder, alive)
    notes = (edge,) if edge else ()
    if rows:
        try:
            runs = load(folder)
            laws, why = fit_archs(runs, bootstraps=bootstraps), ""
            page = write_report(laws, folder / "report.html", command=plan["command"],
                                title=f"How do they scale on “{plan['data']['name']}”?",
                                jumps=find_jumps(laws, rows), notes=notes)
        except ManyformError as error:
            why = str(error)
    return Sweep(folder, runs, laws, why, page, failures, len(rows) == expected, notes)


def _gather(folder: Path, plan: dict[str, Any], ladder: Sequence[Rung], alive: Sequence[str],
            ) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write runs.csv from the finished branches, in an order that does not depend on theirs."""
    rows, lost = [], {}
    for name in alive:
        for rung in ladder:
            for seed in range(plan["settings"]["seeds"]):
                for steps in rung.steps:
                    found = read_result(branch_file(folder, name, rung, seed, steps))
                    if found and "error" in found:
                        lost[f"{name}, {rung.params:,} parameters, {steps} steps"] = found["error"]
                    elif found:
                        rows.append(found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row[c] for c in _COLUMNS] for row in rows)
    write_atomically(folder / "runs.csv", out.getvalue())
    return rows, lost


def find_jumps(laws: Families, rows: Sequence[Mapping[str, Any]]) -> dict[str, Jump]:
    """Exact match over scale, tested for each architecture that has a law.

    Runs of different sizes and tokens stand on one scale: the compute at which the law's best model
    has the loss that the law gives the run. Architectures whose law gives no such scale, or one far
    from the measured budgets, are left out.
    """
    out = {}
    for name, fitted in laws.free.items():
        mine = [r for r in rows if r["arch"] == name]
        try:
            scale = np.array([fitted.counted(fitted.law, loss=float(
                fitted.law.predict(r["params"], r["tokens"]))).flops for r in mine])
            near = fitted.runs.flops.min() / FAR <= scale
            if not (near & (scale <= fitted.largest * FAR)).all():
                continue
            out[name] = Jump(scale, np.array([r["exact"] for r in mine]),
                             np.array([r["span_nats"] for r in mine]), mine[0]["exact_tokens"],
                             emergence(scale, [r["exact"] for r in mine],
                                       [r["span_nats"] for r in mine], [r["spans"] for r in mine]))
        except ManyformError:  # no optimum, or too few scales
            continue
    return out


# Settings

def _sizes(sizes: Sequence[int] | str | None) -> list[int] | None:
    if sizes is None:
        return None
    return rules.parse_sizes(sizes if isinstance(sizes, str) else ",".join(map(str, sizes)))


def _floats(values: Sequence[float] | str | None, what: str) -> list[float] | None:
    if values is None:
        return None
    text = values if isinstance(values, str) else ",".join(f"{v:g}" for v in values)
    return sorted(set(rules.numbers(text, what)))


def _command(settings: dict[str, Any], names: Sequence[str], folder: Path) -> str:
    """The command line that repeats this sweep."""
    words = ["manyform", "sweep"] + ([settings["data"]] if settings["data"] else [])
    words += ["--archs", ",".join(names)]
    defaults = {"seeds": 1, "length": 128, "tokenizer": "bytes", "device": "auto"}
    for key, value in settings.items():
        if key != "data" and value not in (None, defaults.get(key)):
            text = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) \
                if isinstance(value, list) else str(value)
            words += [f"--{key.replace('_', '-')}", text]
    return shlex.join([*words, "--out", str(folder)])
