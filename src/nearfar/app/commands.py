"""The commands of `nearfar`, their options, and the function that each one calls.

`train.config` declares the settings of a run and of its loss; a command lists the ones it takes.
Heavy modules are imported inside the commands, so that --help and usage errors appear at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

import nearfar
from nearfar.app.errors import InputError
from nearfar.app.show import console, note, show
from nearfar.app.train.config import Hyperparameters, TrainConfig, options_of
from nearfar.app.train.names import EXPLAINED, GLYPHS, ROW_LOSSES, SWEPT

OPTIONS = {**options_of(TrainConfig), **options_of(Hyperparameters)}
FLAGS = {name: "--" + name.replace("_", "-") for name in OPTIONS}
Command = Callable[..., None]
Decorator = Callable[[Command], Command]

app = typer.Typer(
    help="Teach a network to tell same from different, and use what it learned.",
    epilog="Begin with: nearfar train glyphs --out runs/demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text)


def option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


DATA = argument(
    "DATA",
    f"'{GLYPHS}' (built in), a folder with one subfolder of images per identity, an .npz with "
    "arrays x and y, or a .csv or .parquet of pairs with columns a, b and label.",
)
RunFolder = Annotated[Path, argument("RUN", "A run folder written by train.")]
AsJson = Annotated[bool, option("Print JSON.", "--json")]
Prior = Annotated[
    float | None,
    option("Share of same pairs among all that you compare; gives a probability.", "--prior"),
]
Overwrite = Annotated[bool, option("Replace --out if it exists.", "--overwrite")]


def name_or_p(distance: str) -> str | float:
    """The p of a p-norm as a number."""
    try:
        return float(distance)
    except ValueError:
        return distance


def command(*examples: str, takes: Iterable[str] = (), several: Iterable[str] = ()) -> Decorator:
    """Register a command; the settings it `takes` reach it as **given if used, range-checked."""
    epilog = "\n\n".join(["Examples:", *(f"  nearfar {example}" for example in examples)])
    options = [_parameter(name, name in several) for name in takes]

    def decorate(run: Command) -> Command:
        @wraps(run)
        def checked(**arguments: Any) -> None:
            used = {name: value for name, value in arguments.items() if value not in (None, [])}
            for name in filter(OPTIONS.get, used):
                OPTIONS[name][1].check(FLAGS[name], used[name])
            run(**used)

        declared = signature(run)  # what typer reads: there, the options replace **given
        own = [p for p in declared.parameters.values() if p.kind is not p.VAR_KEYWORD]
        checked.__signature__ = declared.replace(parameters=own + options)  # type: ignore[attr-defined]
        return app.command(epilog=epilog if examples else None)(checked)

    return decorate


def _parameter(name: str, several: bool) -> Parameter:
    """The parameter that typer turns into an option; its value is None if the option is unused."""
    kind, declared = OPTIONS[name]
    default = getattr(TrainConfig, name, None)
    text, metavar = declared.help, "|".join(map(str, declared.choices)) or None
    if type(default) in (int, float):
        text = f"{text.removesuffix('.')} ({default})."
    if several:
        text, metavar = f"Values to try. {text}", "NAME..." if kind is str else "X..."
    switch = [FLAGS[name]] if kind is bool and not default else []  # a name drops the --no- form
    shown = option(text, *switch, metavar=metavar, rich_help_panel=declared.panel)
    annotation = Annotated[(list[kind] if several else kind) | None, shown]  # type: ignore[valid-type]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nearfar {nearfar.__version__}")
        raise typer.Exit


Version = Annotated[bool, option("Show version.", "--version", callback=_version, is_eager=True)]


@app.callback()
def root(version: Version = False) -> None: ...


@command(
    "train glyphs --out runs/demo",
    "train photos/ --out runs/photos --loss triplet --margin 0.3",
    "train pairs.csv --out runs/pairs --similar-label 1",
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
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Train a verifier, fit its threshold, and measure it on identities it has never seen."""
    if data is None and config is None:
        raise InputError("train needs DATA, for instance: nearfar train glyphs --out runs/demo")

    from nearfar.app.train import loop
    from nearfar.app.train.config_file import configured
    from nearfar.app.train.run import REPORT

    write, verdict = None, None
    if report:
        from nearfar.app.report import reporting  # a missing library must show before training

        write, verdict = reporting()
    chosen = configured(config, data, given)
    show(loop.train(chosen, out, overwrite=overwrite, console=console(), finish=write))
    wrote = f"wrote {out}"
    if verdict:
        if verdict.exception():
            typer.echo(f"\n{wrote} without its report; to try again: nearfar report {out}")
        typer.echo(f"\n{verdict.result()}")
        wrote += f" and its report, {out / REPORT}"
    typer.echo(f"\n{wrote}; next: nearfar verify {out} A B")


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
)
def verify(
    run: RunFolder,
    a: Annotated[str, argument("A", "An image, a vector as text or .npy, or DATA:row.")],
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
    "mine queries.npz corpus.npz --k 5 --margin 0.05 --out negatives.parquet",
    "mine items.npz items.npz --relative-margin 0.05 --pairs --out pairs.parquet",
)
def mine(
    queries: Annotated[
        Path,
        argument(
            "QUERIES",
            "An .npz with embeddings x, and the rows of CORPUS that are positive, or identities y.",
        ),
    ],
    corpus: Annotated[
        Path,
        argument("CORPUS", "An .npz with x, and y if that of QUERIES is used; or a large .npy."),
    ],
    out: Annotated[Path, option("The .parquet file to write.", "--out", metavar="FILE")],
    k: Annotated[int, option("Negatives of each query.", min=1)] = 5,
    margin: Annotated[
        float | None, option("How much farther than the farthest positive negatives must be.")
    ] = None,
    relative_margin: Annotated[
        float | None, option("The same, as a share of the positive's cosine.", min=0)
    ] = None,
    skip: Annotated[int, option("Leave out this many of the nearest.", min=0)] = 0,
    distance: Annotated[
        str, option("cosine, euclidean, sqeuclidean, snr, manhattan or the p of a p-norm.")
    ] = "cosine",
    pairs: Annotated[bool, option("Write pairs a, b, label, as train reads them.", "--pairs")] = (
        False
    ),
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Write hard negatives of QUERIES in CORPUS: rows of anchor, positive, negative_1, ...

    If it is stopped, the same command goes on from there.
    """
    from nearfar.app.mine import mine_file

    how = {
        "margin": margin,
        "relative_margin": relative_margin,
        "skip": skip,
        "distance": name_or_p(distance),
    }
    progress = console(as_json).print
    show(
        mine_file(
            queries, corpus, out, k=k, how=how, pairs=pairs, overwrite=overwrite, progress=progress
        ),
        as_json,
    )


@command("doctor runs/photos", "doctor embeddings.npz --json")
def doctor(
    path: Annotated[Path, argument("RUN|EMBEDDINGS", "A run, or an .npz with x and, if known, y.")],
    as_json: AsJson = False,
) -> None:
    """Say what is wrong and what to try. Exit status 0 if healthy, 1 if not, 2 on an error."""
    from nearfar.app.train.examine import examine_path

    show(found := examine_path(path), as_json)
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


@command(
    "sweep glyphs --loss contrastive triplet info_nce --margin 0.5 1 --out runs/sweep",
    "sweep photos/ --loss sup_con --temperature 0.05 0.1 0.2 --minutes 30 --out runs/t",
    takes=(*SWEPT, "steps", "embedding_dim", "similar_label", "identity_depth", "single", "seed"),
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


@command(
    "explain pairs.csv --loss contrastive --margin 1 --similar-label 1",
    "explain triplets.npz --loss triplet --json",
    takes=(*EXPLAINED, "similar_label"),
)
def explain(
    path: Annotated[
        Path,
        argument("TABLE", "A .csv, .parquet or .npz with columns named after the loss's data."),
    ],
    loss: Annotated[str, option(f"One of {', '.join(ROW_LOSSES)}.")],
    limit: Annotated[int | None, option("Show at most this many rows.", min=1)] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Show what a loss does to every row of a table: distance, loss, force, and what it means."""
    from nearfar.app.explain_table import explain_table

    found = explain_table(path, loss, given)
    found = found if limit is None else replace(found, limit=limit)
    show(found, as_json, **({"rows": found.as_dict()["rows"][:limit]} if as_json else {}))
