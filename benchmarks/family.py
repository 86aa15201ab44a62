"""Every catalog entry at growing context: training speed, decoding latency, bytes of state.

One page: results/family-<device>.json and .md hold the table, .svg the chart. Every entry is
measured in a process of its own, whose memory ends with it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import torch

import manyform
from benchmarks.harness import RESULTS, figure, peers
from benchmarks.training_speed import DEPTH, VOCAB, WIDTH, ours
from manyform.catalog import entry as find
from manyform.lab.decode import decode_costs
from manyform.training.machine import machine_facts

LENGTHS = (512, 2048, 8192, 32768)
TOKENS = 8192
"""Tokens of a batch, one sequence at least."""

PATIENCE = 20
"""Seconds of a step, foreseen from the last length, beyond which a length is left out."""


def family(device: str, seconds: float, names: list[str] | None = None) -> str:
    """Measure, keep after every entry, and return the table as Markdown."""
    path = RESULTS / f"family-{device}.json"
    record = json.loads(path.read_text()) if names and path.exists() else {"entries": {}}
    record.update(machine=machine_facts(device).to_dict(), versions=peers(), lengths=LENGTHS,
                  shape={"d_model": WIDTH, "layers": DEPTH, "vocabulary": VOCAB,
                         "tokens_a_batch": TOKENS})
    for entry in manyform.catalog():
        if names and entry.name not in names:
            continue
        record["entries"][entry.name] = row = _apart(entry, device, seconds)
        print(f"{entry.name:24}", *(_cell(x) for x in row["training"]), flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(record)
    path.with_suffix(".md").write_text(table)
    chart(record, str(path.with_suffix(".svg")))
    return table


def _empty(entry: Any) -> dict[str, Any]:
    return {"family": entry.family, "year": entry.year, "causal": entry.causal, "training": [],
            "why": "", "decode_ms": [], "state_bytes": []}


def _apart(entry: Any, device: str, seconds: float) -> dict[str, Any]:
    """`_measure` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.family", entry.name, device,
                           str(seconds)], stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    nothing = [None] * len(LENGTHS)
    return {**_empty(entry), "training": nothing, "decode_ms": nothing, "state_bytes": nothing,
            "why": f"its process ended with {done.returncode}"}


def _limit_memory() -> None:
    """Ask for nine tenths of the machine's memory at most: what is more fails with a sentence."""
    if sys.platform.startswith("linux"):
        import resource
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_DATA, (memory * 9 // 10, memory * 9 // 10))


def _measure(entry: Any, device: str, seconds: float) -> dict[str, Any]:
    """One row: tokens/s in training (None where it cannot run, with the sentence why)."""
    row = _empty(entry)
    options: dict[str, Any] = {}
    if "n_layers" in entry.defaults:
        options["n_layers"] = entry.defaults["n_layers"]
    for length in LENGTHS:
        done = row["training"]
        if done and (done[-1] is None or max(length, TOKENS) / done[-1] > PATIENCE):
            done.append(None)
            row["why"] = row["why"] or f"a step of {length} tokens takes over {PATIENCE} s"
            continue
        try:
            done.append(_rate(entry.name, length, device, seconds, options))
        except (manyform.ManyformError, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            row["training"].append(None)
            row["why"] = str(error).splitlines()[0]
    costs: list[dict[str, Any]] = []
    if entry.causal:
        torch.manual_seed(0)
        model = manyform.create(entry.name, **{
            "vocab_size": VOCAB, "d_model": WIDTH, "n_layers": DEPTH,
            "max_length": max(LENGTHS) + 64, **options}).to(device).eval()
        reached = [n for n, rate in zip(LENGTHS, row["training"], strict=True) if rate]
        costs = decode_costs(model, reached)
    for key, field in (("decode_ms", "ms_per_token"), ("state_bytes", "state_bytes")):
        row[key] = [c[field] for c in costs] + [None] * (len(LENGTHS) - len(costs))
    return row


def _rate(name: str, length: int, device: str, seconds: float, options: dict[str, Any]) -> float:
    """The best tokens/s of a training step in `seconds`, after one step that compiles; of three
    steps where they do not take five times as long."""
    work, _ = ours(name, max(1, TOKENS // length), length, device, max_length=length, **options)
    tokens, times = 0, []
    while sum(times) < seconds or (len(times) < 3 and sum(times) < 5 * seconds):
        begin = time.perf_counter()
        tokens = work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return tokens / min(times)


def markdown(record: dict[str, Any]) -> str:
    """One table: a row an entry."""
    lengths = [_length(n) for n in record["lengths"]]
    head = (["name", "family"] + [f"train {n}" for n in lengths] +
            [f"decode {n}" for n in lengths] + [f"state {n}" for n in lengths])
    rows = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for name, row in record["entries"].items():
        cells = ([_cell(x) for x in row["training"]] +
                 ["" if x is None else f"{x:.2f}" for x in row["decode_ms"]] +
                 ["" if x is None else _bytes(x) for x in row["state_bytes"]])
        rows.append(f"| `{name}` | {row['family']} | {' | '.join(cells)} |")
    m, s = record["machine"], record["shape"]
    why = [f"- `{n}`: {r['why']}" for n, r in record["entries"].items() if r["why"]]
    picture = "![Training speed against context](../benchmarks/results/family-cpu.svg)"
    return "\n".join([
        picture, "", *rows, "",
        f"Training in tokens/s (best step; {s['tokens_a_batch']} tokens a batch, at least "
        "one sequence), decoding in milliseconds a token at batch 1, state at batch 1. "
        f"Width {s['d_model']}, {s['layers']} layers (stacked recurrent networks: 2), vocabulary "
        f"{s['vocabulary']}. {m['name']}, {m['threads']} threads.", "", *why, ""])


def chart(record: dict[str, Any], path: str) -> None:
    """Training speed and decoding latency against context, a panel a family."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    families = sorted({row["family"] for row in record["entries"].values()})
    columns = 3
    lines = math.ceil(len(families) / columns)
    figure_, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.2 * lines), sharex=True,
                                 sharey=True, squeeze=False)
    reference = record["entries"].get("llama")
    for axis, name in zip(axes.flat, families, strict=False):
        if reference:
            axis.plot(record["lengths"], reference["training"], color="0.7", lw=3, label="llama")
        for entry, row in record["entries"].items():
            if row["family"] == name and entry != "llama":
                points = [(n, x) for n, x in zip(record["lengths"], row["training"], strict=True)
                          if x is not None]
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=entry)
        axis.set(title=name, xscale="log", yscale="log")
        axis.set_xticks(record["lengths"], [_length(n) for n in record["lengths"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    for axis in axes.flat[len(families):]:
        axis.set_visible(False)
    figure_.supylabel("training tokens/s")
    figure_.supxlabel("context")
    figure_.tight_layout()
    figure_.savefig(path)


def _length(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _cell(rate: float | None) -> str:
    return "" if rate is None else figure(rate)


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.3g} GiB"


if __name__ == "__main__":
    name, device, seconds = sys.argv[1:]
    if device == "cpu":
        _limit_memory()
    print(json.dumps(_measure(find(name), device, float(seconds))))
