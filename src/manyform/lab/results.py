"""From the run folder's task files to results.json, results.csv and curves.csv."""

from __future__ import annotations

import csv
import io
import statistics
from datetime import UTC, datetime
from typing import Any

from manyform.lab.plan import TRIALS
from manyform.lab.probes import PROBES
from manyform.lab.tasks import RunFolder, Task, task_list, to_json, write_atomically


def gather(folder: RunFolder) -> dict[str, Any]:
    """Everything that is known so far, in the form of results.json."""
    comparison = folder.read()
    plan = comparison["plan"]
    archs = comparison["archs"]
    seeds = plan["seeds"]
    complete = all(folder.result(task) is not None or _error(folder, task.arch, archs[task.arch])
                   for task in task_list(list(archs), seeds, plan["probe_steps"] > 0))
    return {"manyform": comparison["manyform"], "command": comparison["command"],
            "created": comparison["created"],
            "updated": datetime.now(UTC).isoformat("T", "seconds"), "complete": complete,
            "machine": comparison["machine"], "data": comparison["data"],
            "settings": comparison["settings"], "plan": plan,
            "archs": {name: _arch(folder, name, archs[name], plan) for name in archs}}


def _error(folder: RunFolder, arch: str, facts: dict[str, Any]) -> str | None:
    """The sentence of the first failure that leaves this architecture without a result."""
    if facts.get("error"):
        return facts["error"]
    for file in sorted((folder.task_file(Task(arch, "x"))).parent.glob("t*.json")):
        kind, _, key = file.stem.partition("-")
        result = folder.result(Task(arch, kind, key))
        if result and result.get("error"):
            return result["error"]
    return None


def tuning(folder: RunFolder, arch: str) -> list[dict[str, Any]]:
    """The finished learning-rate trials, in the order of their rates."""
    rows = [folder.result(Task(arch, "tune", str(i + 1))) for i in range(TRIALS)]
    keep = ("lr", "bpb", "tokens", "flops", "seconds", "steps", "note")
    return sorted(({k: r.get(k) for k in keep} for r in rows if r and not r.get("error")),
                  key=lambda r: r["lr"])


def best_rate(trials: list[dict[str, Any]]) -> float | None:
    """The rate with the fewest bits per byte; None where no trial ended with a finite loss."""
    finite = [t for t in trials if t["bpb"] is not None]
    return min(finite, key=lambda t: t["bpb"])["lr"] if finite else None


def _arch(folder: RunFolder, name: str, facts: dict[str, Any], plan: dict[str, Any],
          ) -> dict[str, Any]:
    trials = tuning(folder, name)
    runs = []
    for seed in range(plan["seeds"]):
        run = folder.result(Task(name, "train", str(seed)))
        if run and not run.get("error"):
            runs.append({k: run[k] for k in ("seed", "curve", "final_bpb", "seconds",
                                             "tokens_per_second", "events")})
    notes, measured = [], {}
    for task in task_list([name], 1):
        if task.essential:
            continue
        result = folder.result(task)
        if result and result.get("error"):
            notes.append(f"{task.name}: {result['error']}")
        elif result:
            measured[task.name] = result
    memory = measured.get("memory", {})
    rates = [r["tokens_per_second"] for r in runs]
    lr = best_rate(trials) if len(trials) == TRIALS else None
    grid = [t["lr"] for t in trials]
    return {
        **{k: facts.get(k) for k in ("entry", "config", "params", "target_params", "d_model",
                                     "n_layers", "options", "flops_per_token", "timing")},
        "planned": plan["archs"].get(name),
        "lr": lr, "lr_at_edge": lr is not None and lr in (grid[0], grid[-1]),
        "tuning": trials, "runs": runs,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "peak_memory_bytes": memory.get("peak_memory_bytes"),
        "memory_method": memory.get("method"),
        "decode": measured.get("decode", {}).get("rows", []),
        "length": measured.get("length", {}).get("rows", []),
        "probes": {p: measured[f"probe-{p}"]["result"] for p in PROBES if f"probe-{p}" in measured},
        "paths": memory.get("paths", {}),
        "seconds": _charged(folder, name, plan["seeds"]),
        "notes": notes + list(facts.get("notes", [])), "error": _error(folder, name, facts)}


def _charged(folder: RunFolder, name: str, seeds: int) -> dict[str, float]:
    """Wall-clock seconds by kind of task: the search is charged like everything else."""
    spent: dict[str, float] = {}
    for task in task_list([name], seeds):
        result = folder.result(task)
        if result and "wall_seconds" in result:
            spent[task.kind] = spent.get(task.kind, 0.0) + result["wall_seconds"]
    return spent


def write(folder: RunFolder) -> dict[str, Any]:
    """Gather and write the three files; returns what results.json holds."""
    results = gather(folder)
    write_atomically(folder.path / "results.json", to_json(results))
    write_atomically(folder.path / "results.csv", table_csv(results))
    write_atomically(folder.path / "curves.csv", curves_csv(results))
    return results


PROBE_FIGURES = ("accuracy", "low", "high", "chance", "bits", "brier", "exact", "exact_bits")
"""Of every probe, in results.csv."""


def table_csv(results: dict[str, Any]) -> str:
    """One line an architecture."""
    contexts = results["plan"]["contexts"]
    factors = results["plan"]["length_factors"]
    header = ["arch", "family", "year", "params", "d_model", "n_layers", "lr", "seeds", "tokens",
              "val_bpb_mean", "val_bpb_std", "tokens_per_second", "train_seconds",
              "peak_memory_bytes", "flops_per_token"]
    header += [f"{what}_at_{c}" for what in ("ms_per_token", "state_bytes") for c in contexts]
    header += [f"bpb_at_{f}x" for f in factors]
    header += [f"{p}_{k}" for p in PROBES for k in PROBE_FIGURES]
    lines = []
    for name, a in results["archs"].items():
        bpb = [r["final_bpb"] for r in a["runs"] if r["final_bpb"] is not None]
        decode = {r["context"]: r for r in a["decode"]}
        length = {r["factor"]: r for r in a["length"]}
        lines.append([
            name, a["entry"]["family"] if a["entry"] else None,
            a["entry"]["year"] if a["entry"] else None, a["params"], a["d_model"], a["n_layers"],
            a["lr"], len(a["runs"]), a["planned"]["tokens"] if a["planned"] else None,
            statistics.fmean(bpb) if bpb else None,
            statistics.stdev(bpb) if len(bpb) > 1 else None, a["tokens_per_second"],
            sum(r["seconds"] for r in a["runs"]) or None, a["peak_memory_bytes"],
            a["flops_per_token"],
            *(decode.get(c, {}).get(k) for k in ("ms_per_token", "state_bytes") for c in contexts),
            *(length.get(f, {}).get("bpb") for f in factors),
            *(a["probes"].get(p, {}).get(k) for p in PROBES for k in PROBE_FIGURES), a["error"]])
    return _csv([*header, "error"], lines)


def curves_csv(results: dict[str, Any]) -> str:
    """One line a point of a training curve."""
    keys = ["step", "tokens", "flops", "seconds", "train_loss", "val_bpb"]
    return _csv(["arch", "seed", *keys],
                [[name, run["seed"], *(point[k] for k in keys)]
                 for name, a in results["archs"].items() for run in a["runs"]
                 for point in run["curve"]])


def _csv(header: list[str], lines: list[list[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        writer.writerow(["" if v is None else v for v in line])
    return out.getvalue()
