"""`manyform check NAME`: hold an architecture, or a mixer of your own, to the laws."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="catalog names, mixers, "
                                               "patterns, or module:Class")],
    law: Annotated[list[str] | None, typer.Option(help="only this law; may be repeated")] = None,
    precision: Annotated[list[str] | None, typer.Option(
        help="float64, float32 or bfloat16; may be repeated; all by default")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in the trials")] = None,
    seed: Annotated[int, typer.Option(help="of weights and inputs")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Try every law of the contract; the exit code is 1 if one is broken."""
    import os
    import sys

    from manyform.laws import check as run
    from manyform.laws.laws import ALL
    from manyform.training import find_device
    find_device(device)
    sys.path.insert(0, os.getcwd())
    broken = False
    for name in names:
        report = run(name, laws=law, precisions=precision or ALL, length=length, seed=seed,
                     device=device, raise_on_failure=False)
        print(report, flush=True)
        broken = broken or not report.passed
    if broken:
        raise typer.Exit(1)
