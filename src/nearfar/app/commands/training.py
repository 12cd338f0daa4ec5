"""Commands that train: `train` and `sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.app.commands.declare import DATA, OPTIONS, AsJson, Overwrite, command, option
from nearfar.app.errors import InputError
from nearfar.app.names import LOGS, SWEPT
from nearfar.app.show import console, show

# Options of a sweep that all of its runs share.
HELD = (
    *("encoder", "freeze", "embedding_dim", "image_size", "similar_label", "identity_depth"),
    *("single", "steps", "identities", "items", "learning_rate", "seed"),
)


@command(
    "train glyphs --out runs/demo",
    "train photos/ --out runs/photos --loss triplet --margin 0.3",
    "train pairs.csv --out runs/pairs --similar-label 1",
    "train texts.csv --out runs/texts --encoder sentence-transformers:all-MiniLM-L6-v2",
    "train --config runs/demo/config.toml --out runs/again",
    takes=OPTIONS,
)
def train(
    out: Annotated[Path, option("The run folder to write.", "--out", metavar="RUN")],
    data: Annotated[str | None, DATA] = None,
    config: Annotated[
        Path | None, option("Repeat the run of this config.toml; other options override it.")
    ] = None,
    report: Annotated[bool, option("Also write RUN/report.html.")] = True,
    log: Annotated[
        list[str] | None,
        option(f"Also log to {', '.join(LOGS)}; may be repeated.", "--log", metavar="WHERE"),
    ] = None,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Train a verifier, fit its threshold, and measure it on identities it has never seen."""
    if data is None and config is None:
        raise InputError("train needs DATA, for instance: nearfar train glyphs --out runs/demo")

    from nearfar.app.train.config_file import configured
    from nearfar.app.train.job import train as train_run
    from nearfar.app.train.run import REPORT

    write, verdict = None, None
    if report:
        from nearfar.app.report import reporting  # a missing library must show before training

        write, verdict = reporting()
    chosen = configured(config, data, given)
    found = train_run(
        chosen, out, overwrite=overwrite, console=console(), finish=write, log=log or ()
    )
    show(found)
    wrote = f"wrote {out}"
    if verdict:
        if verdict.exception():
            typer.echo(f"\n{wrote} without its report; to try again: nearfar report {out}")
        typer.echo(f"\n{verdict.result()}")
        wrote += f" and its report, {out / REPORT}"
    typer.echo(f"\n{wrote}; next: nearfar verify {out} A B")


@command(
    "sweep glyphs --loss contrastive triplet info_nce --margin 0.5 1 --out runs/sweep",
    "sweep photos/ --loss sup_con --temperature 0.05 0.1 0.2 --minutes 30 --out runs/t",
    takes=(*SWEPT, *HELD),
    several=SWEPT,
)
def sweep(
    data: Annotated[str, DATA],
    out: Annotated[Path, option("The folder of all runs.", "--out", metavar="FOLDER")],
    minutes: Annotated[float, option("Start no trial expected to end later.", min=0)] = 60,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Train a run for every combination of values, and say which one to keep.

    Runs are ranked on the calibration identities, so that test figures of the best stay honest.
    """
    from nearfar.app.train import sweep

    trials = sweep.trials_from(data, given)
    show(sweep.sweep(trials, out, minutes=minutes, console=console(as_json)), as_json)
