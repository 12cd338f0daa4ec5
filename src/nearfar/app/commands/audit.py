"""The command `audit`, which looks at data before training."""

import shlex
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
        n, n_drop = len(found.findings), sum(finding.drop for finding in found.findings)
        wrote = f"\nwrote {out}: {n:,} finding{'s' * (n != 1)}"
        if n:
            then = shlex.join(["nearfar", "train", data, "--drop", str(out), "--out", "RUN"])
            wrote += f", {n_drop:,} to drop; look at them, then: {then}"
        typer.echo(wrote, err=as_json)
