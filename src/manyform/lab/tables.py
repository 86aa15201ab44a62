"""The tables of a comparison, once, for the terminal, the README, the report and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyform.lab import curves, findings
from manyform.lab.findings import leaders, ranked, title
from manyform.lab.statistics import Comparison, compare_all
from manyform.lab.words import (
    bits,
    bpb,
    clock,
    context,
    count,
    millis,
    power,
    share,
    size,
    words,
)


@dataclass(frozen=True)
class Cell:
    """value goes into CSV, text is read by people; mark: "best" sets it in bold."""

    value: Any
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """key: name of its CSV file. columns: headings; rows of Cells, the first naming an
    architecture where `by_arch`. source: where in results.json the figures stand. missing: a
    sentence on what could not be shown."""

    key: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    source: str
    note: str = ""
    by_arch: bool = True
    csv_only: bool = False
    missing: str = ""

    def csv(self) -> str:
        """Raw values, full precision."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow(["" if c.value is None else c.value for c in row])
        return out.getvalue()

    def markdown(self) -> str:
        """A GitHub table, numbers to the right, the best in bold."""
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
        aligned = ["---"] + ["---:"] * (len(self.columns) - 1)
        return "\n".join([line(self.columns), line(aligned)] + [
            line([f"**{c.text}**" if c.mark and c.text else c.text for c in row])
            for row in self.rows]) + "\n"


def summary_table(results: Mapping[str, Any]) -> str:
    """The main table in Markdown, best loss first, with its footnote."""
    table = main_table(results)
    return f"{table.markdown()}\n{table.note}\n"


def order(results: Mapping[str, Any]) -> list[str]:
    """Lowest loss first, then those without a result, as they were given."""
    values = findings.finals(results)
    done = ranked(compare_all(values)) if values else []
    return done + [n for n in results.get("archs") or {} if n not in done]


def _name(name: str) -> Cell:
    return Cell(name, name)


def main_table(results: Mapping[str, Any]) -> Table:
    """One line an architecture: what it is, how good, how fast, how large."""
    archs = results.get("archs") or {}
    values = findings.finals(results)
    comparison = compare_all(values)
    best = leaders(comparison) if len(values) > 1 else []
    told = any(comparison.difference(best[0], n).low is not None for n in values if n != best[0]) \
        if best else False
    shown = _contexts(results)
    probes = sorted({p for a in archs.values() for p in a.get("probes") or {}})
    far = shown[-1] if shown else None
    columns = ["architecture", "bits per byte", "training tokens/s",
               *(f"decode ms at {context(c)}" for c in shown),
               *([f"state at {context(far)}"] if far else []), "peak training memory",
               *(title(p) for p in probes), "params", "family", "year"]
    rows = []
    for name in order(results):
        a = archs[name]
        entry = a.get("entry") or {}
        params = a.get("params")
        rate = a.get("tokens_per_second")
        row = [_name(name),
               _loss(comparison, name, told and name in best, a.get("error")),
               Cell(rate, count(rate))]
        ms = findings.decode(results, name)
        state = findings.decode(results, name, "state_bytes")
        row += [Cell(ms.get(c), millis(ms.get(c))) for c in shown]
        if far:
            row.append(Cell(state.get(far), size(state.get(far))))
        row.append(Cell(a.get("peak_memory_bytes"), size(a.get("peak_memory_bytes"))))
        for probe in probes:
            r = (a.get("probes") or {}).get(probe)
            row.append(Cell(r["accuracy"], share(r["accuracy"])) if r else Cell(None, ""))
        row += [Cell(params, count(params)), Cell(entry.get("family"), entry.get("family") or ""),
                Cell(entry.get("year"), str(entry.get("year") or ""))]
        rows.append(row)
    return Table("results", "Results", columns, rows, "results.json: archs",
                 _footnote(results, told))


def _loss(comparison: Comparison, name: str, best: bool, error: str | None) -> Cell:
    if name not in comparison.names:
        return Cell(None, "failed" if error else "")
    found = comparison.interval(name)
    half = "" if found.half is None else f" ± {found.half:.3f}"
    return Cell(found.mean, bpb(found.mean) + half, "best" if best else "")


def _footnote(results: Mapping[str, Any], told: bool) -> str:
    n = max((len(v) for v in findings.finals(results).values()), default=0)
    text = "Bits per byte on validation text, lower is better"
    if n > 1:
        text += (f"; ± is half the 95% t-interval of the mean over {n} seeds. Architectures are "
                 "told apart by their differences within seeds, not by these intervals")
    elif n == 1:
        text += "; one seed each, so there is no interval"
    return text + (". In bold: the lowest and all that are tied with it." if told else ".")


def _contexts(results: Mapping[str, Any]) -> list[int]:
    """The shortest and the longest context measured, and 4k between where there is one."""
    found = sorted({int(r["context"]) for a in (results.get("archs") or {}).values()
                    for r in a.get("decode") or []})
    middle = [c for c in found[1:-1] if c == 4096] or found[1:-1][-1:]
    return sorted({*found[:1], *middle, *found[-1:]})


def differences_table(results: Mapping[str, Any]) -> Table | None:
    """Every architecture against the lowest, within seeds."""
    values = findings.finals(results)
    if len(values) < 2:
        return None
    comparison = compare_all(values)
    names = ranked(comparison)
    rows = [[_name(names[0]), Cell(comparison.mean(names[0]), bpb(comparison.mean(names[0]))),
             Cell(0.0, "0"), Cell(None, ""), Cell(None, ""), Cell("lowest", "lowest mean"),
             Cell(len(values[names[0]]), str(len(values[names[0]])))]]
    for name in names[1:]:
        d = comparison.difference(name, names[0])
        word = "no interval" if d.low is None else "higher" if d.decided else "tied"
        rows.append([_name(name), Cell(comparison.mean(name), bpb(comparison.mean(name))),
                     Cell(d.mean, f"{d.mean:+.4f}"), Cell(d.low, _signed(d.low)),
                     Cell(d.high, _signed(d.high)), Cell(word, word), Cell(d.n, str(d.n))])
    note = ("Within seeds, since all architectures see the same data in the same order under the "
            "same seed. The intervals hold for all pairs together with 95% (Tukey's studentized "
            "range over the pooled spread, or the pair's own where that is larger).")
    return Table("differences", "Differences from the lowest loss", (
        "architecture", "bits per byte", "difference", "low", "high", "reading", "seeds"), rows,
        "results.json: archs.*.runs[].final_bpb", note)


def _signed(x: float | None) -> str:
    return "" if x is None else f"{x:+.4f}"


def equal_table(results: Mapping[str, Any]) -> Table | None:
    """The three readings of equal, side by side."""
    readings = {axis: found for axis in curves.AXES
                if (found := curves.reading(findings.runs(results), axis))}
    if not readings:
        return None
    form = {"tokens": count, "flops": power, "seconds": clock}
    columns = ["architecture"] + [f"at {form[a](r.amount)} {curves.AXES[a]}"
                                  for a, r in readings.items()]
    rows = []
    for name in order(results):
        if name not in findings.runs(results):
            continue
        row = [_name(name)]
        for found in readings.values():
            seeds = found.values.get(name)
            mean = statistics.fmean(seeds.values()) if seeds else None
            part = found.share.get(name, 1.0)
            row.append(Cell(mean, bpb(mean) + (f" (at {share(part)} of its run)"
                                               if mean is not None and part < 0.95 else "")))
        rows.append(row)
    return Table("equal", "Three readings of equal", columns, rows,
                 "results.json: archs.*.runs[].curve", "Means over seeds of the validation curve "
                 "at the most that every architecture reached. A run that is read part-way has "
                 "not had its learning-rate decay, so it reads higher than a run planned to end "
                 "there. The curve is measured on less text than the final loss.")


def curves_table(results: Mapping[str, Any]) -> Table:
    """Every point of every run."""
    keys = ("step", "tokens", "flops", "seconds", "train_loss", "val_bpb")
    rows = [[_name(n), Cell(run.get("seed"), str(run.get("seed")))]
            + [Cell(p.get(k), "") for k in keys]
            for n, a in (results.get("archs") or {}).items() for run in a.get("runs") or []
            for p in run.get("curve") or []]
    return Table("curves", "Loss curves", ("architecture", "seed", *keys), rows,
                 "results.json: archs.*.runs[].curve", csv_only=True)


def decode_table(results: Mapping[str, Any]) -> Table:
    """Latency with its quartiles and state, by context."""
    rows = [[_name(n), Cell(r["context"], context(r["context"])),
             *(Cell(r.get(k), millis(r.get(k))) for k in ("ms_per_token", "ms_low", "ms_high")),
             Cell(r.get("state_bytes"), size(r.get("state_bytes"))),
             Cell(r.get("note"), r.get("note") or "")]
            for n in order(results) for r in results["archs"][n].get("decode") or []]
    return Table("decode", "Decoding", ("architecture", "context", "ms per token", "lower quartile",
                                        "upper quartile", "state", "note"), rows,
                 "results.json: archs.*.decode")


def length_table(results: Mapping[str, Any]) -> Table:
    """Loss with more and more context."""
    rows = [[_name(n), Cell(r["factor"], f"{r['factor']}x"), Cell(r["length"], str(r["length"])),
             Cell(r.get("bpb"), bpb(r.get("bpb"))), Cell(r.get("note"), r.get("note") or "")]
            for n in order(results) for r in results["archs"][n].get("length") or []]
    return Table("length", "Beyond the training length", (
        "architecture", "factor", "context in tokens", "bits per byte", "note"), rows,
        "results.json: archs.*.length")


def probes_table(results: Mapping[str, Any]) -> Table:
    """Accuracy with its interval against chance, and its continuous twins."""
    rows = [[_name(n), Cell(p, title(p)), *(Cell(r.get(k), share(r.get(k))) for k in (
        "accuracy", "low", "high", "at_train_length", "chance")),
        *(Cell(r.get(k), bits(r.get(k))) for k in ("bits", "brier")),
        Cell(r.get("setting"), r.get("setting") or "")]
        for n, p, r in _probed(results)]
    return Table("probes", "Probes", ("architecture", "probe", "accuracy", "low", "high",
                                      "at training length", "chance", "bits an answer",
                                      "Brier score", "setting"), rows,
                 "results.json: archs.*.probes", missing=_without_probes(results))


def twins_table(results: Mapping[str, Any]) -> Table:
    """The share of sequences that are right throughout, against what their bits predict."""
    rows = [[_name(n), Cell(p, title(p)), Cell(r["answers"], f"{r['answers']:g}"),
             Cell(r["exact_bits"], bits(r["exact_bits"])),
             Cell(r.get("exact_brier"), bits(r.get("exact_brier"))),
             Cell(r["exact"], share(r["exact"])), Cell(p_l := predicted(r), share(p_l))]
            for n, p, r in _probed(results) if predicted(r) is not None]
    return Table("twins", "Probes and their continuous twins", (
        "architecture", "probe", "answers a sequence", "bits an answer", "Brier score", "all right",
        "predicted, p^L"), rows, "results.json: archs.*.probes",
        missing=_without_probes(results) or _without_twins(results))


def _without_probes(results: Mapping[str, Any]) -> str:
    """A sentence where the plan has none."""
    planned = (results.get("plan") or {}).get("probe_steps")
    return "The plan has no probes: give more time, or --probe-steps." if planned == 0 else ""


def predicted(probe: Mapping[str, Any]) -> float | None:
    """p^L: the share of sequences whose every answer is right, if each of the L answers were right
    by itself with the chance p that their mean bits give; None where these were not measured."""
    if probe.get("exact_bits") is None or probe.get("answers") is None:
        return None
    return 2.0 ** (-probe["answers"] * probe["exact_bits"])


def _probed(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(architecture, probe, figures) of every probe that was run."""
    return [(n, p, r) for n in order(results)
            for p, r in (results["archs"][n].get("probes") or {}).items()]


def _without_twins(results: Mapping[str, Any]) -> str:
    """A sentence where probes were run by a version that kept accuracies alone."""
    bare = list(dict.fromkeys(n for n, _, r in _probed(results) if r.get("bits") is None))
    return "" if not bare else (
        f"The probes of {words(bare)} hold accuracies alone: they are older than the continuous "
        "twins, or their loss is not finite. Delete probe-*.json in their folders under tasks/ and "
        "resume to measure them again.")


def tuning_table(results: Mapping[str, Any]) -> Table:
    """Every learning-rate trial and its cost."""
    rows = [[_name(n), Cell(t["lr"], f"{t['lr']:g}", "best" if t["lr"] == a.get("lr") else ""),
             Cell(t.get("bpb"), bpb(t.get("bpb")) or "diverged"),
             Cell(t.get("tokens"), count(t.get("tokens"))),
             Cell(t.get("seconds"), clock(t.get("seconds"))),
             Cell(t.get("note"), t.get("note") or "")]
            for n in order(results) for a in [results["archs"][n]] for t in a.get("tuning") or []]
    return Table("tuning", "Learning-rate search", (
        "architecture", "learning rate", "bits per byte", "tokens", "seconds", "note"), rows,
        "results.json: archs.*.tuning", "In bold: the rate that was chosen.")


KINDS = {"memory": "memory and paths", "tune": "learning-rate search", "train": "training",
         "length": "longer contexts", "decode": "decoding", "probe": "probes"}


def budget_table(results: Mapping[str, Any]) -> Table:
    """Wall-clock seconds of everything, by architecture and kind."""
    rows = []
    totals = dict.fromkeys(KINDS, 0.0)
    for name in order(results):
        spent = results["archs"][name].get("seconds") or {}
        for kind in KINDS:
            totals[kind] += spent.get(kind, 0.0)
        whole = sum(spent.values())
        rows.append([_name(name), *(Cell(spent.get(k), clock(spent.get(k))) for k in KINDS),
                     Cell(whole, clock(whole))])
    rows.append([Cell("all", "all"), *(Cell(t, clock(t)) for t in totals.values()),
                 Cell(sum(totals.values()), clock(sum(totals.values())))])
    return Table("budget", "What the time went to", ("architecture", *KINDS.values(), "all"), rows,
                 "results.json: archs.*.seconds", "Wall-clock, validation included; the search "
                 "for a learning rate is charged to the architecture that needed it.")


def sizes_table(results: Mapping[str, Any]) -> Table:
    """What was trained: shape, size, rate and cost of each."""
    rows = []
    for name in order(results):
        a = results["archs"][name]
        planned, entry = a.get("planned") or {}, a.get("entry") or {}
        off = a["params"] / a["target_params"] - 1 if a.get("params") and a.get("target_params") \
            else None
        rows.append([
            _name(name), Cell(a.get("d_model"), str(a.get("d_model") or "")),
            Cell(a.get("n_layers"), str(a.get("n_layers") or "")),
            Cell(a.get("params"), f"{a['params']:,}" if a.get("params") else ""),
            Cell(off, "" if off is None else f"{100 * off:+.1f}%"),
            Cell(a.get("lr"), f"{a['lr']:g}" if a.get("lr") else ""),
            Cell(planned.get("steps"), f"{planned.get('steps') or 0:,}" if planned else ""),
            Cell(planned.get("tokens"), count(planned.get("tokens"))),
            Cell(a.get("flops_per_token"), count(a.get("flops_per_token"))),
            Cell(entry.get("state_growth"), entry.get("state_growth") or ""),
            Cell(entry.get("cost_growth"), entry.get("cost_growth") or ""),
            Cell(entry.get("paper"), entry.get("paper") or "")])
    return Table("sizes", "What was trained", (
        "architecture", "width", "layers", "parameters", "off target", "learning rate", "steps",
        "tokens", "training FLOPs per token", "state grows", "cost grows", "paper"), rows,
        "results.json: archs")


def paths_table(results: Mapping[str, Any]) -> Table:
    """The form that served each operation in a training step."""
    taken = {n: results["archs"][n].get("paths") or {} for n in order(results)}
    ops = sorted({op for paths in taken.values() for op in paths})
    rows = [[_name(n), *(Cell(paths.get(op), paths.get(op) or "") for op in ops)]
            for n, paths in taken.items() if paths]
    return Table("paths", "Paths taken by each operation", ("architecture", *ops), rows,
                 "results.json: archs.*.paths", "The form that served each operation in a training "
                 "step; its reference is the plain loop that all forms are tested against.")
