"""The report: one HTML file that opens anywhere, without a network, and holds its own data.

The words and tables are written here, into the frame that `lab.frame` fills; the charts are drawn
by report_assets/report.js from the figures embedded in the page.
"""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from manyform.errors import ManyformError
from manyform.lab import findings, tables, words
from manyform.lab.findings import finals, title
from manyform.lab.frame import chart, chip, escape, fill, looks, scrolling, swatch
from manyform.lab.probes import wilson
from manyform.lab.statistics import compare_all
from manyform.lab.tables import Table, summary_table
from manyform.lab.tasks import write_atomically
from manyform.lab.verdict import TOPICS, Verdict, verdict

__all__ = ["page", "summary_table", "write_report"]

def write_report(folder: str | Path) -> Path:
    """Write report.html beside the results.json of a run folder, finished or not.

    Raises ManyformError where there is no results.json or it is damaged.
    """
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManyformError(f"{path} is missing: {folder} holds no results yet; "
                            "`manyform compare --out DIR` writes them") from error
    except ValueError as error:
        raise ManyformError(f"{path} is damaged: {error}") from error
    target = Path(folder) / "report.html"
    write_atomically(target, page(results))
    return target


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    found = verdict(results)
    styles = looks(results.get("archs") or {})
    name = (results.get("data") or {}).get("name")
    main = _table(tables.main_table(results), results, styles, lead=True)
    more = "".join(_table(t, results, styles) for t in (
        tables.differences_table(results), tables.equal_table(results)) if t and t.rows)
    return fill(
        kind="compare", title=f"{name or 'Comparison'} - manyform compare",
        question=f"Which architecture for “{name}”?" if name else "Which architecture?",
        summary=_named(found.summary, results), facts=_facts(results), notice=_partial(results),
        sections={"results": "Results", "verdict": "Verdict", "charts": "Charts",
                  "budget": "Budget", "setup": "Setup"},
        before=f'<section id="results"><h2>Results</h2>{main}</section>\n'
               '<section id="verdict"><h2>Verdict</h2>'
               f'<div class="topics">{_verdict(found, results)}</div>{more}</section>\n'
               f"{_failures(results)}",
        legend=_legend(results, styles), charts=_charts(results, styles),
        after=f"{_budget(results, styles)}\n"
              f'<section id="setup"><h2>Setup</h2>{_setup(results, styles)}</section>',
        footer=_footer(results), figures=_figures(results, styles), scripts=["report.js"])


# Words

def _named(text: str, results: Mapping[str, Any]) -> str:
    """Escaped text with the names of architectures set apart."""
    names = sorted(results.get("archs") or {}, key=len, reverse=True)
    if not names:
        return escape(text)
    pattern = r"(?<![\w/.-])(" + "|".join(re.escape(n) for n in names) + r")(?![\w-])"
    return "".join(f'<b class="arch">{escape(part)}</b>' if i % 2 else escape(part)
                   for i, part in enumerate(re.split(pattern, text)))


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan, machine = results.get("plan") or {}, results.get("machine") or {}
    archs = results.get("archs") or {}
    params = next((a["target_params"] for a in archs.values() if a.get("target_params")), None)
    return [("architectures", str(len(archs))),
            ("parameters each", words.count(params)),
            ("tokens each", words.count(plan.get("tokens"))
             if plan.get("match", "params") == "params" else f"equal {plan.get('match')}"),
            ("seeds", str(plan.get("seeds") or "")), ("budget", str(plan.get("budget") or "")),
            ("machine", str(machine.get("name") or "")),
            ("date", str(results.get("created") or "")[:10])]


def _partial(results: Mapping[str, Any]) -> str:
    if results.get("complete", False):
        return ""
    done = sum(len(r) for r in findings.runs(results).values())
    archs, seeds = len(results.get("archs") or {}), (results.get("plan") or {}).get("seeds") or 1
    return ('<p class="notice" role="status"><strong>Partial.</strong> This comparison has not '
            f"finished: {done} of {archs * seeds} training runs are done. Everything below is "
            "what is known so far.</p>")


_STANDINGS = {"shown": ("shown", "an interval excludes the opposite"),
              "tie": ("tie", "an interval contains zero, or chance"),
              "measured": ("measured", "a cost, read beyond the noise of timings"),
              "single": ("no interval", "measured once, or read part-way: not a claim")}


def _verdict(found: Verdict, results: Mapping[str, Any]) -> str:
    blocks: dict[str, list[str]] = {}
    for claim in found.claims:
        word, why = _STANDINGS[claim.standing]
        blocks.setdefault(TOPICS[claim.topic], []).append(
            f'<li><span class="tag {claim.standing}" title="{why}">{word}</span>'
            f"<span>{_named(claim.text, results)}</span></li>")
    out = "".join(f'<section class="topic"><h3>{name}</h3><ul class="claims">{"".join(items)}</ul>'
                  "</section>" for name, items in blocks.items())
    if found.pareto and len(found.pareto) > 1:
        front = [p.arch for p in found.pareto if p.status == "front"]
        items = "".join(f"<li>{_named(p.text, results)}</li>" for p in found.pareto
                        if p.status != "front")
        sentence = ("On the front by their means, over loss, training and decoding speed, state "
                    f"and peak memory: {words.words(front)}. No other is as good on every axis.")
        out += (f'<section class="topic"><h3>Quality, speed and memory together</h3>'
                f'<ul class="plain"><li>{_named(sentence, results)}</li>{items}</ul></section>')
    if found.open_questions:
        items = "".join(
            f"<li>{_named(q.text, results)}" + (_command(q.command) if q.command else "") + "</li>"
            for q in found.open_questions)
        out += ('<section class="topic"><h3>Open, and what would decide it</h3>'
                f'<ul class="plain">{items}</ul></section>')
    return out or "<p>Nothing to say yet.</p>"


def _failures(results: Mapping[str, Any]) -> str:
    rows = [(n, a["error"]) for n, a in (results.get("archs") or {}).items() if a.get("error")]
    rows += [(n, note) for n, a in (results.get("archs") or {}).items()
             for note in a.get("notes") or [] if note != a.get("error")]
    rows += [(n, f"seed {r.get('seed')}, step {e.get('step')}: {e.get('event')}")
             for n, a in (results.get("archs") or {}).items() for r in a.get("runs") or []
             for e in r.get("events") or []]
    if not rows:
        return ""
    items = "".join(f'<li><b class="arch">{escape(n)}</b> {escape(text)}</li>' for n, text in rows)
    return ('<section id="failures"><h2>Failures and events</h2>'
            f'<ul class="plain">{items}</ul></section>')


def _footer(results: Mapping[str, Any]) -> str:
    return (f"manyform {escape(results.get('manyform') or '')}, "
            f"{escape(str(results.get('updated') or results.get('created') or ''))}. "
            "Figures: results.json, results.csv and curves.csv beside this file.")


# Tables

def _table(table: Table, results: Mapping[str, Any], styles: Mapping[str, Any], *,
           lead: bool = False) -> str:
    """A figure with the table, its note, its source and its CSV."""
    return (f'<figure class="table" id="table-{table.key}"><figcaption><h3>{escape(table.title)}'
            f"</h3></figcaption>{_plain_table(table, styles, lead=lead)}"
            + (f'<p class="note">{escape(table.note)}</p>' if table.note else "")
            + _source(table, results) + "</figure>")


def _plain_table(table: Table, styles: Mapping[str, Any], *, lead: bool = False) -> str:
    numeric = [all(isinstance(r[i].value, int | float | None) for r in table.rows)
               for i in range(len(table.columns))]
    head = "".join(
        f'<th scope="col" class="{"n" if numeric[i] else ""}">'
        + (f'<button type="button" data-sort="{i}">{escape(c)}</button>' if lead else escape(c))
        + "</th>" for i, c in enumerate(table.columns))
    body = ""
    for row in table.rows:
        name = row[0].text
        known = table.by_arch and name in styles
        cells = (f'<th scope="row">{swatch(styles[name]) if known else ""}'
                 f"<span>{escape(name)}</span></th>")
        for i, cell in enumerate(row[1:], 1):
            raw = "" if cell.value is None else escape(str(cell.value))
            text = escape(cell.text) or '<span class="none">–</span>'
            mark = f"<strong>{text}</strong>" if cell.mark else text
            cells += f'<td class="{"n" if numeric[i] else ""}" data-v="{raw}">{mark}</td>'
        mine = f' data-arch="{escape(name)}"' if known else ""
        body += f"<tr{mine}>{cells}</tr>"
    return scrolling(table.title, f"<tr>{head}</tr>", body)


def _source(table: Table, results: Mapping[str, Any]) -> str:
    """Where the figures come from: the command, the place in results.json and the data."""
    packed = base64.b64encode(table.csv().encode()).decode()
    command = str(results.get("command") or "")
    return ('<div class="source">'
            f'<a class="button" download="{table.key}.csv" '
            f'href="data:text/csv;charset=utf-8;base64,{packed}">CSV</a>'
            f"<details><summary>Source</summary><p>{escape(table.source)}</p>"
            f"{_command(command) if command else ''}</details></div>")


def _command(text: str) -> str:
    return (f'<span class="command"><code>{escape(text)}</code>'
            '<button type="button" class="copy" aria-label="Copy the command">copy</button></span>')


# Charts

_CHARTS = (
    ("curves", "Loss while training", "Validation bits per byte, the mean over seeds with single "
     "seeds faint. The horizontal axis is what you hold equal.", tables.curves_table, "wide", (
         ("x", "tokens", "Tokens", True), ("x", "flops", "FLOPs", False),
         ("x", "seconds", "Seconds", False), ("y", "val", "Validation", True),
         ("y", "train", "Training", False), ("logx", "logx", "log x", True),
         ("logy", "logy", "log y", False))),
    ("pareto", "Quality against speed", "Lower and further right is better; the area of a circle "
     "is memory. The dotted line is the front of these two axes, vertical bars are 95% intervals.",
     tables.main_table, "wide", (
         ("x", "train", "Training speed", True), ("x", "decode", "Decoding speed", False),
         ("size", "state", "State", True), ("size", "peak", "Training memory", False),
         ("logx", "logx", "log x", True))),
    ("latency", "Decoding latency", "Milliseconds a token after each context, batch 1; bars are "
     "quartiles.", tables.decode_table, "", (("logx", "logx", "log x", True),
                                             ("logy", "logy", "log y", True))),
    ("state", "State size", "Bytes kept for one sequence after each context.",
     tables.decode_table, "", (("logx", "logx", "log x", True), ("logy", "logy", "log y", True))),
    ("length", "Beyond the training length", "Bits per byte of the same text with more and more "
     "of what came before it; no interval over seeds.", tables.length_table, "",
     (("logx", "logx", "log x", True), ("logy", "logy", "log y", False))),
    ("tuning", "Learning-rate search", "Bits per byte after each trial, the same allowance for "
     "all; a ring marks the rate that was chosen.", tables.tuning_table, "",
     (("logx", "logx", "log x", True), ("logy", "logy", "log y", False))),
    ("probes", "Probes", "Accuracy on fresh examples with 95% intervals; the dashed line is "
     "chance.", tables.probes_table, "wide own", ()),
    ("twins", "Probes and their continuous twins", "Bits that a right answer costs, less is "
     "better. Open: the share of last answers that are right, with the line p, the chance that "
     "these bits stand for. Filled: the share of sequences whose every answer is right, with the "
     "line p^L for L answers a sequence. Where filled markers follow p^L, a leap of the exact "
     "match is the metric's doing and not the model's.", tables.twins_table, "wide own", ()))


def _charts(results: Mapping[str, Any], styles: Mapping[str, Any]) -> str:
    out = ""
    for key, name, text, build, shape, switches in _CHARTS:
        table = build(results)
        has = table.rows and (key != "pareto" or finals(results))
        if not has:
            out += (f'<figure class="chart empty {shape}"><figcaption><h3>{name}</h3>'
                    f'<p class="note">{escape(table.missing or "Not measured yet.")}'
                    '</p></figcaption></figure>')
            continue
        under = "" if table.csv_only or key == "pareto" else (
            f"<details class='data'><summary>Data</summary>{_plain_table(table, styles)}</details>")
        out += chart(key, name, f"{text} {table.missing}".strip(), shape,
                     above=_switches(key, switches), under=under + _source(table, results),
                     more="The data is in the CSV below.")
    return out


def _switches(chart: str, switches: Iterable[tuple[str, str, str, bool]]) -> str:
    """Buttons of a chart: one of several (x, y, size) or on and off (logx, logy)."""
    groups: dict[str, str] = {}
    for group, value, label, on in switches:
        kind = "log" if group.startswith("log") else group
        groups[kind] = groups.get(kind, "") + (
            f'<button type="button" data-chart="{chart}" data-group="{group}" data-value="{value}" '
            f'aria-pressed="{str(on).lower()}">{label}</button>')
    return '<div class="switches">' + "".join(
        f'<div class="group" role="group">{b}</div>' for b in groups.values()) + "</div>" \
        if groups else ""


def _legend(results: Mapping[str, Any], styles: Mapping[str, Any]) -> str:
    """One legend for all charts: families, and in them architectures."""
    families: dict[str, list[str]] = {}
    for name in tables.order(results):
        entry = results["archs"][name].get("entry") or {}
        families.setdefault(entry.get("family") or "other", []).append(name)
    out = ""
    for family, names in families.items():
        chips = "".join(chip(n, styles[n]) for n in names)
        out += (f'<div class="family"><button type="button" class="name" '
                f'data-family="{escape(family)}" aria-pressed="true">{escape(family)}</button>'
                f"{chips}</div>")
    return out


def _figures(results: Mapping[str, Any], styles: Mapping[str, Any]) -> dict[str, Any]:
    """What the charts are drawn from."""
    archs = results.get("archs") or {}
    values = finals(results)
    comparison = compare_all(values)
    per_byte = (results.get("data") or {}).get("bytes_per_token") or 1.0
    out: dict[str, Any] = {}
    for name in tables.order(results):
        a = archs[name]
        found = comparison.interval(name) if name in values else None
        out[name] = {
            **styles[name], "family": (a.get("entry") or {}).get("family") or "other",
            "final": found and [found.mean, found.low, found.high],
            "rate": a.get("tokens_per_second"), "peak": a.get("peak_memory_bytes"),
            "runs": [_curve(r, per_byte) for r in a.get("runs") or []],
            "mean": _mean_curve([_curve(r, per_byte) for r in a.get("runs") or []]),
            "decode": [{k: r.get(k) for k in ("context", "ms_per_token", "ms_low", "ms_high",
                                              "state_bytes")} for r in a.get("decode") or []],
            "length": [{k: r.get(k) for k in ("factor", "length", "bpb")}
                       for r in a.get("length") or []],
            "tuning": [{k: t.get(k) for k in ("lr", "bpb", "seconds")}
                       for t in a.get("tuning") or []], "lr": a.get("lr"),
            "probes": {p: _probe(r) for p, r in (a.get("probes") or {}).items()},
            "seconds": a.get("seconds") or {}}
    probes = sorted({p for a in archs.values() for p in a.get("probes") or {}})
    return {"archs": out, "order": tables.order(results), "probes": {p: title(p) for p in probes},
            "kinds": tables.KINDS}


def _probe(r: Mapping[str, Any]) -> dict[str, Any]:
    """A probe's figures, with the interval of its exact match."""
    keys = ("accuracy", "low", "high", "chance", "at_train_length", "bits", "exact", "exact_bits",
            "answers")
    found = {k: r.get(k) for k in keys}
    if tables.predicted(r) is not None:
        found["exact_low"], found["exact_high"] = wilson(round(r["exact"] * r["n"]), r["n"])
    return found


def _curve(run: Mapping[str, Any], per_byte: float) -> dict[str, list[Any]]:
    """Columns of a curve; the training loss in bits per byte as well."""
    points = run.get("curve") or []
    bits = 1 / (math.log(2) * per_byte)
    return {**{k: [p.get(k) for p in points] for k in ("tokens", "flops", "seconds")},
            "val": [p.get("val_bpb") for p in points],
            "train": [None if p.get("train_loss") is None else p["train_loss"] * bits
                      for p in points]}


def _mean_curve(runs: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Point by point over seeds, which look at the same steps."""
    out: dict[str, list[Any]] = {}
    for key in runs[0] if runs else ():
        out[key] = []
        for column in zip(*(r[key] for r in runs), strict=False):
            kept = [v for v in column if v is not None]
            out[key].append(statistics.fmean(kept) if len(kept) == len(column) else None)
    return out


# What it took

def _budget(results: Mapping[str, Any], styles: Mapping[str, Any]) -> str:
    table = tables.budget_table(results)
    plan = (results.get("plan") or {}).get("estimated_seconds") or {}
    spent = {k: sum((a.get("seconds") or {}).get(k, 0.0)
                    for a in (results.get("archs") or {}).values()) for k in tables.KINDS}
    whole = sum(spent.values())
    if not whole:
        return ""
    text = f"Measured: {words.clock(whole)}"
    if plan.get("total"):
        text += (f" after {words.clock(plan.get('calibration', 0.0))} of calibration; planned: "
                 f"{words.clock(plan['total'])} in all")
    text += f". The learning-rate search took {words.share(spent['tune'] / whole)} of it."
    parts = ", ".join(f"{k} {words.clock(v)}" for k, v in plan.items() if k != "total")
    return (f'<section id="budget"><h2>Plan and budget</h2><p>{escape(text)}</p>'
            + (f'<p class="note">Planned: {escape(parts)}.</p>' if parts else "")
            + chart("budget", table.title, "", "wide own",
                    under=f"{_plain_table(table, styles)}<p class='note'>{escape(table.note)}</p>"
                          + _source(table, results),
                    more="Seconds by architecture and kind of work.")
            + "</section>")


def _setup(results: Mapping[str, Any], styles: Mapping[str, Any]) -> str:
    machine, data = results.get("machine") or {}, results.get("data") or {}
    plan, settings = results.get("plan") or {}, results.get("settings") or {}
    train, val = data.get("train") or {}, data.get("val") or {}
    blocks = {
        "Machine": {
            "device": machine.get("device"), "processor": machine.get("name"),
            "cores": machine.get("cores"), "threads": machine.get("threads"),
            "memory": words.size(machine.get("memory_bytes")), "system": machine.get("system"),
            "python": machine.get("python"), "torch": machine.get("torch"),
            "matmul peak, bf16": _rate(machine.get("bf16_gflops")),
            "matmul peak, fp32": _rate(machine.get("fp32_gflops")),
            "memory measured by": next((a["memory_method"] for a in (results.get("archs") or
                                        {}).values() if a.get("memory_method")), None)},
        "Data": {
            "name": data.get("name"), "tokenizer": data.get("tokenizer"),
            "vocabulary": data.get("vocab_size"), "bytes per token": data.get("bytes_per_token"),
            "training tokens": _full(data.get("train_tokens")),
            "validation tokens": _full(data.get("val_tokens")),
            "documents": f"{_full(train.get('documents'))} for training, "
                         f"{_full(val.get('documents'))} for validation"
                         if train.get("documents") else None,
            "split": (data.get("split") or {}).get("by"),
            "content hash": data.get("content_hash")},
        "Plan": {
            "budget": plan.get("budget"), "matched": plan.get("match"), "seeds": plan.get("seeds"),
            "steps": _full(plan.get("steps")), "tokens a run": _full(plan.get("tokens")),
            "training length": plan.get("length"), "rows a step": plan.get("batch_size"),
            "learning rates": ", ".join(f"{x:g}" for x in plan.get("lr_candidates") or [])
                              + " and one more where these point" if plan.get("lr_candidates")
                              else None, "probe steps": plan.get("probe_steps")},
        "Settings": {k: ", ".join(map(str, v)) if isinstance(v, list) else v
                     for k, v in settings.items()}}
    out = ""
    for name, facts in blocks.items():
        rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>"
                       for k, v in facts.items() if v not in (None, ""))
        out += f'<section class="facts"><h3>{name}</h3><dl>{rows}</dl></section>' if rows else ""
    more = "".join(_table(t, results, styles) for t in (
        tables.sizes_table(results), tables.paths_table(results)) if t.rows)
    command = str(results.get("command") or "")
    return f'<div class="columns">{out}</div>{more}' + (
        f"<h3>The command that repeats this</h3><p>{_command(command)}</p>" if command else "")


def _rate(gflops: float | None) -> str | None:
    return None if gflops is None else f"{gflops:,.0f} GFLOP/s"


def _full(n: int | None) -> str | None:
    return None if n is None else f"{n:,}"
