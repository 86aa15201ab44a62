"""`manyform sweep`: parse, call `manyform.lab.sweep`, print the laws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyform.errors import ManyformError


def sweep(
    data: Annotated[str | None, typer.Argument(
        help="A text file, folder, pattern, .jsonl, .parquet, .csv or hf:NAME; left out, the text "
             "of Python's own standard library.")] = None,
    archs: Annotated[str | None, typer.Option(
        help="Catalog names, patterns like '3 mamba2 : 1 attention', or your own module:Mixer, "
             "with commas between.")] = None,
    sizes: Annotated[str | None, typer.Option(
        help="Parameters of the rungs, as 50k,200k,1M; left out, four from the budget.")] = None,
    tokens_per_param: Annotated[str | None, typer.Option(
        help="Token budgets of every rung, as 5,10,20,40.")] = None,
    budgets: Annotated[str | None, typer.Option(
        help="Training FLOPs of an isoFLOP grid, as 1e12,3e12,1e13, instead.")] = None,
    budget: Annotated[str | None, typer.Option(
        help="Of the whole sweep, as 30m, 2h or 1e15 (FLOPs); chooses the sizes.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every cell.")] = 1,
    length: Annotated[int, typer.Option(help="Training length in tokens.")] = 128,
    tokenizer: Annotated[str, typer.Option(
        help="bytes, bpe:N (trained on the data), or a tokenizer.json.")] = "bytes",
    column: Annotated[str | None, typer.Option(help="The text column of tabular data.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    executor: Annotated[str, typer.Option(
        help="local, ray, slurm, or slurm-local (submitit's own stand-in).")] = "local",
    slurm: Annotated[list[str] | None, typer.Option(
        help="A parameter of submitit, as slurm_partition=gpu or timeout_min=600; repeat it."),
    ] = None,
    out: Annotated[Path | None, typer.Option(
        help="The run folder; an existing one goes on, with new --archs and more --seeds.",
    )] = None,
    checkpoint_seconds: Annotated[float, typer.Option(
        help="How often an unfinished run is saved.")] = 20.0,
    bootstraps: Annotated[int, typer.Option(help="Resampled fits behind the intervals.")] = 1000,
) -> None:
    """Train a ladder of sizes of each architecture and fit a scaling law to each."""
    from manyform import lab
    try:
        done = lab.sweep(
            data, archs=archs, sizes=sizes, tokens_per_param=tokens_per_param, budgets=budgets,
            budget=budget, seeds=seeds, length=length, tokenizer=tokenizer, column=column,
            device=device, executor=executor, executor_options=_options(slurm), out=out,
            checkpoint_seconds=checkpoint_seconds, bootstraps=bootstraps)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # what was said on the way out tells how to go on
    print_sweep(done)


def print_sweep(done: Any) -> None:
    """The laws of a sweep, or why there are none."""
    from manyform.scaling.summary import families_table
    if done.laws is not None:
        for name, fitted in done.laws.free.items():
            typer.echo(f"\n{name}\n{fitted.summary()}")
        typer.echo("\n" + families_table(done.laws))
    else:
        typer.echo(f"no law: {done.why}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    for what, why in done.failures.items():
        typer.echo(f"failed: {what}: {why}")
    typer.echo(f"\nruns: {done.path / 'runs.csv'}")
    if done.report is not None:
        typer.echo(f"report: {done.report}")


def _options(given: list[str] | None) -> dict[str, Any]:
    """ "timeout_min=600" -> {"timeout_min": 600}."""
    out: dict[str, Any] = {}
    for text in given or []:
        key, mark, value = text.partition("=")
        if not mark:
            raise ManyformError(f"--slurm reads like slurm_partition=gpu, not {text!r}")
        out[key] = int(value) if value.isdigit() else value
    return out
