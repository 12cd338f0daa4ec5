"""Commands that use a run, or say how good it is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.app.commands.declare import (
    DATA,
    AsJson,
    Overwrite,
    Prior,
    RunFolder,
    argument,
    command,
    option,
)
from nearfar.app.errors import InputError
from nearfar.app.show import note, show


@command(takes=("similar_label", "identity_depth"))
def evaluate(
    run: RunFolder,
    data: Annotated[str | None, argument("DATA", "Data (the run's test identities).")] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Measure a run on its test identities or on other data, with the raw input for comparison."""
    from nearfar.app.train.use import evaluate_run

    found, notes = evaluate_run(run, data, **given)
    note(notes)
    show(found, as_json, notes=notes)


@command(
    "verify runs/photos a.jpg b.jpg",
    "verify runs/demo glyphs:0 glyphs:1",
    "verify runs/photos a.jpg b.jpg --prior 0.01",
    'verify runs/vectors "0.1 0.2 0.3" "0.3 0.2 0.1" && echo same',
    'verify runs/texts "Deutschland" "Germany"',
)
def verify(
    run: RunFolder,
    a: Annotated[str, argument("A", "An image, a vector as text or .npy, DATA:row, or a text.")],
    b: Annotated[str, argument("B", "The second item, in the same forms.")],
    prior: Prior = None,
    as_json: AsJson = False,
) -> None:
    """Decide whether A and B are the same. Exit status 0 if they are, 1 if not, 2 on an error."""
    if prior is not None and not 1e-12 <= prior <= 1 - 1e-12:  # also refuses NaN
        raise InputError(
            f"--prior must be a share of same pairs between 1e-12 and 1 - 1e-12, got {prior}."
        )

    from nearfar.app.train.use import verify_items

    show(found := verify_items(run, a, b, prior), as_json)
    raise typer.Exit(0 if found.same else 1)


@command(takes=("identity_depth",))
def embed(
    run: RunFolder,
    data: Annotated[str, DATA],
    out: Annotated[Path, option("The .npz file to write.", "--out", metavar="FILE")],
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Write the embeddings x of all items in DATA, their names, and y if identities are known."""
    from nearfar.app.train.use import embed_data

    wrote = embed_data(run, data, out, overwrite=overwrite, **given)
    note(wrote.notes)
    identities = "y (identities), " if wrote.labelled else ""
    typer.echo(f"wrote {out}: x ({wrote.n} x {wrote.d} embeddings), {identities}names")


@command(
    "doctor runs/photos",
    "doctor embeddings.npz --json",
    "doctor texts.csv",
    takes=("similar_label",),
)
def doctor(
    path: Annotated[
        Path,
        argument("RUN|FILE", "A run, an .npz with x and, if known, y, or a table of texts."),
    ],
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Say what is wrong and what to try. Exit status 0 if healthy, 1 if not, 2 on an error."""
    from nearfar.app.train.examine import examine_path

    show(found := examine_path(path, **given), as_json)
    raise typer.Exit(0 if found.healthy else 1)


@command("report runs/photos", "report runs/photos --out photos.html")
def report(
    run: RunFolder,
    out: Annotated[Path | None, option("File (RUN/report.html).", "--out", metavar="FILE")] = None,
    umap: Annotated[bool, option("Map by UMAP (pip install 'nearfar\\[umap]').", "--umap")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write what a run learned, with the evidence, as one HTML file that opens offline."""
    from nearfar.app.report import page_at, space, write_report
    from nearfar.app.train.run import REPORT

    page = page_at(out, overwrite) if out else run / REPORT
    verdict = write_report(run, page, space.umap if umap else space.principal)
    typer.echo(f"{verdict}\n\nwrote {page}")


@command("compare runs/contrastive runs/triplet", "compare runs/* --out comparison.html")
def compare(
    runs: Annotated[list[Path], argument("RUN RUN...", "Run folders written by train.")],
    out: Annotated[Path | None, option("Write an .html page too.", "--out", metavar="FILE")] = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Show the figures of several runs side by side, and warn if they are not comparable."""
    from nearfar.app.report import compare_runs, page_at, write_comparison

    comparison = compare_runs(runs)
    note(filter(None, [comparison.warning]))
    show(comparison, as_json)
    if out:
        write_comparison(comparison, page_at(out, overwrite))
        typer.echo(f"wrote {out}", err=as_json)
