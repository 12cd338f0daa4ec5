"""The command `audit`, which looks at data before training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.app.commands.declare import DATA, AsJson, Overwrite, command, option
from nearfar.app.errors import InputError
from nearfar.app.show import console, show


@command(
    "audit photos/ --out audit.csv",
    "train photos/ --drop audit.csv --out runs/photos",
    "audit photos/ --run runs/photos",
    takes=("identity_depth",),
)
def audit(
    data: Annotated[str, DATA],
    out: Annotated[
        Path | None,
        option("Write all findings, as .csv or .parquet.", "--out", metavar="FILE"),
    ] = None,
    run: Annotated[
        Path | None, option("Compare items by the network of a run.", "--run", metavar="RUN")
    ] = None,
    top: Annotated[int, option("How many findings of each kind to print.", min=1)] = 10,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """List labels that are likely wrong, copies, mixed-up identities and broken files."""
    from dataclasses import replace

    from nearfar.app.audit import audit as look
    from nearfar.app.train.run import refuse_inside, refuse_inside_run

    if out is not None:
        if out.suffix.lower() not in (".csv", ".parquet"):
            raise InputError(f"--out {out} must end in .csv or .parquet.")
        refuse_inside(out, data)
        refuse_inside_run(out)
        if out.is_dir() or (out.exists() and not overwrite):
            raise InputError(
                f"{out} exists. Choose another --out, or add --overwrite to replace it."
            )
    terminal = console(as_json)

    def say(text: str) -> None:
        terminal.print(text, soft_wrap=True, highlight=False, markup=False)

    found = replace(look(data, run=run, say=say, **given), top=top)
    if out is not None:
        found.write(out)
    show(found, as_json)
    if out is not None:
        n = sum(finding.drop for finding in found.findings)
        typer.echo(
            f"\nwrote {out}: {len(found.findings):,} findings, {n:,} to drop; look at them, then: "
            f"nearfar train {data} --drop {out} --out RUN",
            err=as_json,
        )
