"""`manyform compare`: parse, call `manyform.lab.compare`, say where the report is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyform.errors import ManyformError


def compare(
    data: Annotated[str | None, typer.Argument(
        help="A text file, folder, pattern, .jsonl, .parquet, .csv, - for standard input, or "
             "hf:NAME; left out, the text of Python's own standard library.")] = None,
    archs: Annotated[str | None, typer.Option(
        help="Catalog names, patterns like '3 mamba2 : 1 attention', or your own module:Mixer, "
             "with commas between. The first sets the size.")] = None,
    budget: Annotated[str, typer.Option(
        help="Time of everything (90s, 5m, 2h), or tokens (20Mtok) or FLOPs (1e15) of one "
             "training run.")] = "5m",
    match: Annotated[str, typer.Option(
        help="What is equal beside the size: params (tokens too), flops or time.")] = "params",
    seeds: Annotated[int | None, typer.Option(
        help="Runs of each architecture; left out, what the budget allows.")] = None,
    tokenizer: Annotated[str, typer.Option(
        help="bytes, bpe:N (trained on the data), or a tokenizer.json.")] = "bytes",
    column: Annotated[str | None, typer.Option(help="The text column of tabular data.")] = None,
    d_model: Annotated[int | None, typer.Option(
        help="Width of the first architecture; left out, from the budget.")] = None,
    layers: Annotated[int | None, typer.Option(help="Its depth.")] = None,
    length: Annotated[int | None, typer.Option(help="Training length in tokens [256].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a training step.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    contexts: Annotated[str, typer.Option(
        help="Where decoding is measured.")] = "256,1024,4096,16384",
    probe_steps: Annotated[int | None, typer.Option(
        help="Training steps of each probe (0: no probes); left out, from the budget.")] = None,
    out: Annotated[Path | None, typer.Option(
        help="The run folder; an existing one goes on, with new --archs and more --seeds added.",
    )] = None,
    resume: Annotated[Path | None, typer.Option(
        help="A run folder to go on with, its settings taken from it.")] = None,
    checkpoint_seconds: Annotated[float, typer.Option(
        help="How often an unfinished training run is saved.")] = 20.0,
    scale: Annotated[bool, typer.Option(
        "--scale", help="A ladder of sizes of each in place of one: the scaling law of each, and "
                        "where they cross (see manyform sweep).")] = False,
) -> None:
    """Which architecture suits your data and budget, and what does it cost?"""
    from manyform import lab
    if scale:
        from manyform.cli.sweep import print_sweep
        _refuse_with_scale(match=match != "params", d_model=d_model, layers=layers,
                           batch_size=batch_size, contexts=contexts != "256,1024,4096,16384",
                           probe_steps=probe_steps, resume=resume)
        return print_sweep(lab.sweep(
            data, archs=archs, budget=budget, seeds=seeds or 1, tokenizer=tokenizer,
            column=column, length=length or 128, device=device, out=out,
            checkpoint_seconds=checkpoint_seconds))
    from manyform.lab.live import summary
    try:
        results = lab.compare(
            data, archs=archs, budget=budget, match=match, seeds=seeds, tokenizer=tokenizer,
            column=column, d_model=d_model, n_layers=layers, length=length, batch_size=batch_size,
            device=device, contexts=_numbers(contexts), probe_steps=probe_steps, out=out,
            resume=resume, checkpoint_seconds=checkpoint_seconds)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # what was said on the way out tells how to go on
    for line in summary(results):
        typer.echo(line)
    return None


def _refuse_with_scale(**given: object) -> None:
    """Options of a comparison at one size that a ladder of sizes has no use for."""
    for name, value in given.items():
        if value:
            raise ManyformError(f"--{name.replace('_', '-')} has no meaning with --scale, where "
                                "sizes, batches and budgets follow from the ladder; leave it out")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ManyformError(f"contexts are whole numbers with commas between, not {text!r}"
                            ) from None
