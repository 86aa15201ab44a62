"""`manyform scaling fit RUNS` and `manyform scaling plan`: laws from tables, plans from laws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyform.errors import ManyformError

scaling = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True,
                      help="Fit scaling laws to runs, and plan with them.")

_Runs = Annotated[list[str], typer.Argument(
    help="Tables of runs (.csv, .jsonl, .parquet) or run folders of sweep or compare.")]
_Law = Annotated[str, typer.Option(
    help="chinchilla, overtraining, repetition, kaplan, kaplan-n, kaplan-d or kaplan-c.")]
_Arch = Annotated[str | None, typer.Option(help="The architecture, where a table has several.")]
_Columns = Annotated[list[str] | None, typer.Option(
    help="QUANTITY=HEADER where a header is not recognised, such as params='My size'; repeat it.")]
_Convention = Annotated[str | None, typer.Option(
    help="How parameters are counted: total or non-embedding.")]
_Bad = Annotated[str, typer.Option(help="Rows with impossible values: refuse or drop.")]
_Bootstraps = Annotated[int, typer.Option(help="Resampled fits behind the intervals.")]
_Seed = Annotated[int, typer.Option(help="Of the resampling.")]


@scaling.command("fit")
def fit_command(
    runs: _Runs, law: _Law = "chinchilla", arch: _Arch = None, columns: _Columns = None,
    convention: _Convention = None, bad: _Bad = "refuse", bootstraps: _Bootstraps = 1000,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    resample: Annotated[str, typer.Option(
        help="pairs (draw runs), noise (draw errors; for few runs) or auto.")] = "auto",
    seed: _Seed = 0,
    drop_outliers: Annotated[bool, typer.Option(
        "--drop-outliers", help="Fit without the runs that are named as outliers.")] = False,
    share: Annotated[str, typer.Option(
        help="Coefficients that several architectures share.")] = "E,alpha,beta",
    report: Annotated[Path | None, typer.Option(help="Write a page with the charts here.")] = None,
) -> None:
    """Fit a law, with intervals, held-out error, outliers and what the table cannot say."""
    from manyform.scaling import compare, countings, fit, fit_archs
    from manyform.scaling.summary import approaches_table, countings_table, families_table
    table = _load(runs, columns, convention, bad)
    shared_options: dict[str, Any] = {"bootstraps": bootstraps, "level": level,
                                      "resample": resample, "seed": seed}
    several = arch is None and len(table.archs) > 1
    if several and law != "chinchilla":
        raise ManyformError(f"the table holds {len(table.archs)} architectures "
                            f"({', '.join(table.archs)}), and only the law chinchilla is fitted to "
                            "several at once; name one with --arch")
    if several:
        families = fit_archs(table, share=_names(share), **shared_options)
        for name, fitted in families.free.items():
            typer.echo(f"{name}\n{fitted.summary()}\n")
        typer.echo(families_table(families))
    else:
        fitted = fit(table, law, arch=arch, drop_outliers=drop_outliers, **shared_options)
        typer.echo(fitted.summary())
        if law in ("chinchilla", "overtraining"):
            typer.echo("\n" + approaches_table(compare(fitted, level=level, seed=seed)))
            counted = countings(_paths(runs), law, arch=arch, columns=_named(columns), bad=bad)
            if len(counted) > 1:
                typer.echo("\n" + countings_table(counted))
    notes = [note for path in runs if (note := _notes(Path(path)))]
    for note in notes:
        typer.echo(f"\nnote: {note}")
    if report is not None:
        from manyform.lab.scaling_report import write_report
        found = families if several else fitted
        typer.echo(f"\nreport: {write_report(found, report, notes=notes)}")


@scaling.command("plan")
def plan_command(
    runs: Annotated[list[str] | None, typer.Argument(
        help="Tables to fit and plan with; left out, a published law.")] = None,
    law: Annotated[str, typer.Option(
        help="A published law: kaplan, chinchilla-1, chinchilla-2, chinchilla (approach 3), "
             "chinchilla-epoch; with RUNS, the law to fit.")] = "",
    flops: Annotated[float | None, typer.Option(help="Training FLOPs.")] = None,
    loss: Annotated[float | None, typer.Option(help="A loss to reach.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Hours of one device, summed.")] = None,
    device: Annotated[str, typer.Option(help="v100, a100, h100, h200, b200, l4, ...")] = "h100",
    utilisation: Annotated[float, typer.Option(help="Share of the device's peak.")] = 0.4,
    inference_tokens: Annotated[float | None, typer.Option(
        help="Tokens that the model will serve, counted into its cost.")] = None,
    history: Annotated[bool, typer.Option(
        "--history", help="What each rule would have chosen for GPT-3, Gopher and Chinchilla."),
    ] = False,
    arch: _Arch = None, columns: _Columns = None, convention: _Convention = None,
    bad: _Bad = "refuse", bootstraps: _Bootstraps = 1000, seed: _Seed = 0,
) -> None:
    """The best size and tokens for a budget, a loss or GPU-hours, with how sure that is."""
    from manyform.scaling import fit, fit_archs, plan
    from manyform.scaling.summary import history_table, winners
    if history:
        typer.echo(history_table())
        return
    options: dict[str, Any] = {"flops": flops, "loss": loss, "gpu_hours": gpu_hours,
                               "device": device, "utilisation": utilisation,
                               "inference_tokens": inference_tokens}
    if not runs:
        typer.echo("\n".join(plan(law or "chinchilla-epoch", **options).lines()))
        return
    table = _load(runs, columns, convention, bad)
    if arch is None and len(table.archs) > 1:
        families = fit_archs(table, bootstraps=bootstraps, seed=seed)
        plans: dict[str, Any] = {}
        for name, f in families.free.items():
            try:
                plans[name] = plan(f, **options)
                typer.echo("\n".join([name, *plans[name].lines(), ""]))
            except ManyformError as error:
                if len(families.free) == 1:
                    raise
                typer.echo(f"{name}\nno plan: {error}\n")
        if not plans:
            raise ManyformError("no architecture of the table has a plan for this")
        typer.echo(winners(families, {n: p.optimum for n, p in plans.items()}, loss))
        return
    fitted = fit(table, law or "chinchilla", arch=arch, bootstraps=bootstraps, seed=seed)
    typer.echo("\n".join(plan(fitted, **options).lines()))


def _notes(path: Path) -> str:
    """What a sweep's folder says of its runs beside their table."""
    from manyform.lab.cells import rates_at_edge, read_plan
    if not (path / "sweep.json").exists():
        return ""
    return rates_at_edge(path, read_plan(path)["archs"])


def _load(runs: list[str], columns: list[str] | None, convention: str | None, bad: str) -> Any:
    from manyform.scaling import load
    return load(_paths(runs), columns=_named(columns), convention=convention, bad=bad)


def _paths(runs: list[str]) -> Any:
    return [Path(r) for r in runs] if len(runs) > 1 else Path(runs[0])


def _named(columns: list[str] | None) -> dict[str, str]:
    """ "params=Model Size" -> {"params": "Model Size"}."""
    named = {}
    for text in columns or []:
        quantity, mark, header = text.partition("=")
        if not mark:
            raise ManyformError(f"--columns reads like params='Model Size', not {text!r}")
        named[quantity] = header
    return named


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
