"""What the terminal shows while a comparison runs: a live table, or plain lines where the output
is not a terminal."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from manyform.lab.plan import Plan
from manyform.lab.tasks import Task

STAGES = {"memory": "measuring memory", "tune": "learning-rate search", "train": "training",
          "length": "longer contexts", "decode": "decoding", "probe": "probes"}


@dataclass
class Row:
    """What is known of one architecture."""

    params: int | None = None
    doing: str = "waiting"
    share: float = 0.0
    loss: float | None = None
    bpb: list[float] = field(default_factory=list)
    partial: float | None = None
    rate: float | None = None
    decode: str = ""
    error: str = ""


class Silent:
    """Shows nothing; the others derive from it."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def say(self, text: str) -> None:
        """One line of news."""

    def begin(self, plan: Plan, params: dict[str, int]) -> None:
        """The plan is made; `params` by architecture."""
        for name in params:
            self.rows[name] = Row(params[name])

    def start(self, task: Task) -> None:
        """A task begins."""
        row = self.rows[task.arch]
        row.doing, row.share, row.loss = _doing(task), 0.0, None

    def update(self, task: Task, share: float, *, loss: float | None = None,
               bpb: float | None = None, rate: float | None = None) -> None:
        """A task is `share` done; loss in nats per token, rate in tokens a second."""
        row = self.rows[task.arch]
        row.share = share
        row.loss = loss if loss is not None else row.loss
        row.rate = rate or row.rate
        if task.kind == "train":
            row.partial = bpb if bpb is not None else row.partial

    def finish(self, task: Task, result: dict[str, Any]) -> None:
        """A task ended now, or in an earlier start of the same comparison."""
        row = self.rows[task.arch]
        row.doing, row.share, row.loss = "waiting", 0.0, None
        if result.get("error"):
            row.error = result["error"] if task.essential else row.error
        elif task.kind == "train":
            row.partial = None
            row.rate = result["tokens_per_second"]
            if result["final_bpb"] is not None:
                row.bpb.append(result["final_bpb"])
        elif task.kind == "decode":
            last = [r for r in result["rows"] if r["ms_per_token"] is not None][-1:]
            row.decode = "".join(f"{r['ms_per_token']:.2f} ms, {_bytes(r['state_bytes'])} "
                                 f"@ {_count(r['context'])}" for r in last)

    def close(self) -> None:
        """Nothing more comes."""


class Lines(Silent):
    """A line for each finished task, without control characters."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def finish(self, task: Task, result: dict[str, Any]) -> None:
        super().finish(task, result)
        self.say(f"{task.arch:<18} {_doing(task):<28} {_summary(task, result)}")


class Live(Silent):
    """A table that is redrawn in place, with rich."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live as RichLive
        self.console = Console()
        self._live = RichLive(console=self.console, get_renderable=self._table,
                              refresh_per_second=4, transient=False)
        self._begun = time.monotonic()
        self._total = 0.0
        self._started = False

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def begin(self, plan: Plan, params: dict[str, int]) -> None:
        super().begin(plan, params)
        self._total = plan.estimated_seconds.get("total", 0.0)
        self._live.start()
        self._started = True

    def close(self) -> None:
        if self._started:
            self._live.stop()
            self._started = False

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text
        passed = time.monotonic() - self._begun
        table = Table(caption=f"{_clock(passed)} of about {_clock(self._total)}; Ctrl-C stops, the "
                      "same command goes on", caption_justify="left", expand=False)
        for title, style in (("architecture", "bold"), ("params", ""), ("now", ""), ("", ""),
                             ("loss", ""), ("bits/byte", "green"), ("tokens/s", ""),
                             ("decoding", "")):
            right = title in ("params", "loss", "bits/byte", "tokens/s")
            table.add_column(title, style=style, justify="right" if right else "left",
                             no_wrap=title != "now")
        for name, row in self.rows.items():
            busy = row.doing != "waiting"
            now = Text(row.error, style="red") if row.error else Text(
                row.doing, style="cyan" if busy else "dim")
            mean = sum(row.bpb) / len(row.bpb) if row.bpb else row.partial
            table.add_row(
                Text(name), _count(row.params), now,
                ProgressBar(total=1.0, completed=row.share, width=12) if busy else "",
                f"{row.loss:.3f}" if row.loss is not None else "",
                "" if mean is None else f"{mean:.3f}" + (f" ({len(row.bpb)})" if row.bpb else "…"),
                f"{row.rate:,.0f}" if row.rate else "", row.decode)
        return table


def display(enabled: bool = True) -> Silent:
    """The live table in a terminal, lines elsewhere, silence if not enabled."""
    if not enabled:
        return Silent()
    with suppress(ImportError):
        if sys.stdout.isatty():
            return Live()
    return Lines()


def describe(plan: Plan, archs: dict[str, Any]) -> list[str]:
    """The plan in lines of plain text, as printed before anything is trained."""
    each = {"params": f"each architecture sees the same {_count(plan.tokens)} tokens",
            "flops": f"each architecture spends the same {plan.quantum:.3g} training FLOPs",
            "time": f"each architecture trains for the same {plan.quantum:.0f} s"}[plan.match]
    lines = [f"Plan for a budget of {plan.budget}: {each} in each of {plan.seeds} "
             f"seed{'s' if plan.seeds > 1 else ''}, in batches of {plan.batch_size} x "
             f"{plan.length}; about {_clock(plan.estimated_seconds['total'])} in all.",
             "Learning rate: trials at " + ", ".join(f"{r:g}" for r in plan.lr_candidates)
             + " and one more where the best of them points, on a tenth of the tokens; charged."]
    if plan.probe_steps == 0:
        lines.append("Probes: none; they take more time than is left, or were turned off.")
    if plan.tokens and archs:
        lines.append("Time: " + ", ".join(f"{name} {_clock(s)}" for name, s in
                                          plan.estimated_seconds.items() if name != "total"))
    for name, a in archs.items():
        if a.get("error"):
            lines.append(f"  {name:<18} left out: {a['error']}")
            continue
        p = plan.archs[name]
        off = a["params"] / a["target_params"] - 1
        lines.append(f"  {name:<18} {a['params']:>12,} parameters ({off:+.1%}), width "
                     f"{a['d_model']}, {a['n_layers']} layers, {p.steps:,} steps, "
                     f"{p.tokens / max(1e-9, p.steps * a['timing']['step']):,.0f} tokens/s, "
                     f"{_clock(p.estimated_seconds)}")
    return lines


def summary(results: Any) -> list[str]:
    """What was found, best first, in lines of plain text, and where the rest stands."""
    def mean(name: str) -> float:
        return statistics.fmean(r["final_bpb"] for r in results["archs"][name]["runs"])
    done = sorted((n for n, a in results["archs"].items() if a["runs"]), key=mean)
    lines = [f"{'':<18} {'bits/byte':>16} {'tokens/s':>10} {'memory':>9}  decoding at "
             f"{_count(max(results['plan']['contexts']))}"]
    for name in done:
        a = results["archs"][name]
        values = [r["final_bpb"] for r in a["runs"]]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        last = a["decode"][-1] if a["decode"] else None
        serving = f"{last['ms_per_token']:.2f} ms, {_bytes(last['state_bytes'])}" \
            if last and last["ms_per_token"] is not None else "does not reach it" if last else ""
        peak = a["peak_memory_bytes"]
        lines.append(f"{name:<18} {f'{mean(name):.4f}{spread}':>16} "
                     f"{a['tokens_per_second']:>10,.0f} {_bytes(peak) if peak else '':>9}  "
                     f"{serving}")
    lines += [f"{name:<18} failed: {a['error']}" for name, a in results["archs"].items()
              if a["error"]]
    lines.append(f"Results: {results.path / 'results.json'}")
    if results.report:
        lines.append(f"Report:  {results.report}")
    return lines


def _doing(task: Task) -> str:
    text = STAGES[task.kind]
    if task.kind == "tune":
        return f"{text} {task.key}"
    if task.kind == "train":
        return f"{text}, seed {task.key}"
    return f"probe {task.key}" if task.kind == "probe" else text


def _summary(task: Task, result: dict[str, Any]) -> str:
    if result.get("error"):
        return f"failed: {result['error']}"
    if task.kind == "tune":
        value = result["bpb"]
        return f"lr {result['lr']:g}: " + ("diverged" if value is None else
                                           f"{value:.3f} bits/byte")
    if task.kind == "train":
        return (f"{result['final_bpb']:.4f} bits/byte, "
                f"{result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.1f} s")
    if task.kind == "memory":
        peak = result["peak_memory_bytes"]
        return "not measured" if peak is None else f"peak {_bytes(peak)}"
    if task.kind == "decode":
        return "; ".join(f"{_count(r['context'])}: {r['ms_per_token']:.2f} ms "
                         f"{_bytes(r['state_bytes'])}" for r in result["rows"]
                         if r["ms_per_token"] is not None)
    if task.kind == "length":
        return "; ".join(f"{r['factor']}x: {r['bpb']:.3f}" for r in result["rows"]
                         if r["bpb"] is not None)
    r = result["result"]
    bits = "" if r.get("bits") is None else f", {r['bits']:.3f} bits an answer"
    return (f"accuracy {r['accuracy']:.2f} [{r['low']:.2f}, {r['high']:.2f}], "
            f"chance {r['chance']:.2f}{bits}")


def _count(n: float | None) -> str:
    """1234567 -> "1.23M"."""
    if n is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def _bytes(n: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


def _clock(seconds: float) -> str:
    """75 -> "1m15s"."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"
