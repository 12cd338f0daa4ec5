"""The commands of `nearfar`: their arguments, and printing what they found."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nearfar
from nearfar.errors import InputError
from nearfar.train.names import FOR_ITEMS, FOR_PAIRS, GLYPHS, LOSSES, SINGLE

# Help and a mistyped option answer at once: what is heavy is imported by the command that needs it.
if TYPE_CHECKING:
    from nearfar.tabulate import Table
    from nearfar.train.compare import Comparison
    from nearfar.train.config import Setting, TrainConfig

DATA_HELP = (
    f"'{GLYPHS}' (built in), a folder with a subfolder of images per identity, an .npz with x and "
    "y, or a .csv or .parquet of pairs with columns a, b and label."
)
LOSS_HELP = f"One of {', '.join(LOSSES)}. Default: {FOR_ITEMS}; for pairs {FOR_PAIRS}."
TRAIN_EXAMPLES = """Examples:

  nearfar train glyphs --out runs/demo

  nearfar train photos/ --out runs/photos --loss triplet --margin 0.3

  nearfar train pairs.csv --out runs/pairs --similar-label 1

  nearfar train --config runs/demo/config.toml --out runs/again
"""
VERIFY_EXAMPLES = """Examples:

  nearfar verify runs/photos a.jpg b.jpg

  nearfar verify runs/demo glyphs:0 glyphs:1

  nearfar verify runs/vectors "0.1 0.2 0.3" "0.3 0.2 0.1" && echo same
"""
DOCTOR_EXAMPLES = """Examples:

  nearfar doctor runs/photos

  nearfar doctor embeddings.npz --json
"""
REPORT_EXAMPLES = """Examples:

  nearfar report runs/photos

  nearfar report runs/photos --out photos.html
"""
COMPARE_EXAMPLES = """Examples:

  nearfar compare runs/contrastive runs/triplet

  nearfar compare runs/* --out comparison.html
"""
SWEEP_EXAMPLES = """Examples:

  nearfar sweep glyphs --loss contrastive triplet info_nce --margin 0.5 1 --out runs/sweep

  nearfar sweep photos/ --loss sup_con --temperature 0.05 0.1 0.2 --minutes 30 --out runs/t
"""
EXPLAIN_EXAMPLES = """Examples:

  nearfar explain pairs.csv --loss contrastive --margin 1 --similar-label 1

  nearfar explain triplets.npz --loss triplet --json
"""

app = typer.Typer(
    name="nearfar",
    help="Teach a network to tell same from different, and use what it learned.",
    epilog="Begin with: nearfar train glyphs --out runs/demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

BY_LOSS = "Default: by loss; those of train are in the table of docs/data.md."
LOSS, TRAINING, DATA = "The loss", "The training", "The data"  # panels of the help

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that train wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
SimilarLabel = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=1,
        help="Which number marks similar pairs, if labels are numbers.",
        rich_help_panel=DATA,
    ),
]
IdentityDepth = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=9,
        help="In a folder: 1 if its subfolders are the identities, 2 if theirs are.",
        rich_help_panel=DATA,
    ),
]
Single = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(SINGLE),
        help="Identities with a single item: use as dissimilar examples, leave out, or refuse "
        "(refuse).",
        rich_help_panel=DATA,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out names.")]
Margin = Annotated[
    float | None,
    typer.Option(help=f"Of the losses that have one. {BY_LOSS}", rich_help_panel=LOSS),
]
Margin2 = Annotated[
    float | None, typer.Option(help="Second margin (quadruplet).", rich_help_panel=LOSS)
]
Temperature = Annotated[
    float | None, typer.Option(help=f"Of the softmax losses. {BY_LOSS}", rich_help_panel=LOSS)
]
Scale = Annotated[
    float | None,
    typer.Option(
        help=f"1 / temperature (circle, clip, siglip, proxies). {BY_LOSS}", rich_help_panel=LOSS
    ),
]
Bias = Annotated[float | None, typer.Option(help="Of siglip.", rich_help_panel=LOSS)]
Alpha = Annotated[
    float | None, typer.Option(help="Of multi_similarity, pulling.", rich_help_panel=LOSS)
]
Beta = Annotated[
    float | None, typer.Option(help="Of multi_similarity, pushing.", rich_help_panel=LOSS)
]
Base = Annotated[
    float | None, typer.Option(help="Of multi_similarity, a cosine.", rich_help_panel=LOSS)
]
AngleMargin = Annotated[
    float | None, typer.Option(help="ArcFace's (proxy_softmax), radians.", rich_help_panel=LOSS)
]
CosineMargin = Annotated[
    float | None, typer.Option(help="CosFace's (proxy_softmax).", rich_help_panel=LOSS)
]
Distance = Annotated[
    str | None, typer.Option(help="euclidean, sqeuclidean or cosine.", rich_help_panel=LOSS)
]
Swap = Annotated[
    bool | None,
    typer.Option("--swap", help="Harder negative of the two (triplet).", rich_help_panel=LOSS),
]
Smooth = Annotated[
    bool | None,
    typer.Option("--smooth", help="Softplus for hinge (triplet).", rich_help_panel=LOSS),
]
LabelSmoothing = Annotated[
    float | None, typer.Option(help="From 0 to 1 (softmax).", rich_help_panel=LOSS)
]
Values = Annotated[
    list[float] | None,
    typer.Option(metavar="X...", help=f"Values to try. {BY_LOSS}", rich_help_panel=LOSS),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nearfar {nearfar.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run folder to write.")],
    data: Annotated[str | None, typer.Argument(metavar="DATA", help=DATA_HELP)] = None,
    config: Annotated[
        Path | None, typer.Option(help="Repeat the run of this config.toml; other options win.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help=LOSS_HELP, rich_help_panel=LOSS)] = None,
    margin: Margin = None,
    margin2: Margin2 = None,
    temperature: Temperature = None,
    distance: Distance = None,
    swap: Swap = None,
    smooth: Smooth = None,
    label_smoothing: LabelSmoothing = None,
    scale: Scale = None,
    bias: Bias = None,
    alpha: Alpha = None,
    beta: Beta = None,
    base: Base = None,
    angle_margin: AngleMargin = None,
    cosine_margin: CosineMargin = None,
    similar_label: SimilarLabel = None,
    single: Single = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side that image files are resized to (32).", rich_help_panel=DATA),
    ] = None,
    identity_depth: IdentityDepth = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="auto, or your own as package.module:factory.", rich_help_panel=TRAINING),
    ] = None,
    embedding_dim: Annotated[
        int | None, typer.Option(help="Numbers in an embedding (128).", rich_help_panel=TRAINING)
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            help="Shift, scale and rotate training images a little.", rich_help_panel=DATA
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps (450).", rich_help_panel=TRAINING)
    ] = None,
    identities: Annotated[
        int | None, typer.Option(help="Identities in a batch (64).", rich_help_panel=TRAINING)
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(help="Items of each identity in a batch (4).", rich_help_panel=TRAINING),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest of the schedule (0.003).", rich_help_panel=TRAINING),
    ] = None,
    far: Annotated[
        float | None,
        typer.Option(
            help="False-accept rate the threshold is fitted at (0.01).", rich_help_panel=TRAINING
        ),
    ] = None,
    calibration_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the identities that the threshold is fitted on (0.2).",
            rich_help_panel=DATA,
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the identities that the figures are measured on (0.2).",
            rich_help_panel=DATA,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything random (0).", rich_help_panel=TRAINING)
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, mps.", rich_help_panel=TRAINING)
    ] = None,
    with_report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write RUN/report.html too.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Train a verifier, fit its threshold, and measure it on identities it has never seen."""
    given = _given(
        data=data,
        loss=loss,
        similar_label=similar_label,
        single=single,
        image_size=image_size,
        identity_depth=identity_depth,
        encoder=encoder,
        embedding_dim=embedding_dim,
        augment=augment,
        steps=steps,
        identities=identities,
        items=items,
        learning_rate=learning_rate,
        far=far,
        calibration_share=calibration_share,
        test_share=test_share,
        seed=seed,
        accelerator=accelerator,
    )
    hyperparameters = _given(
        margin=margin,
        margin2=margin2,
        temperature=temperature,
        distance=distance,
        swap=swap,
        smooth=smooth,
        label_smoothing=label_smoothing,
        scale=scale,
        bias=bias,
        alpha=alpha,
        beta=beta,
        base=base,
        angle_margin=angle_margin,
        cosine_margin=cosine_margin,
    )
    from rich.console import Console

    from nearfar.train import loop
    from nearfar.train.run import REPORT

    write_report, verdict = _reporting() if with_report else (None, None)
    found = loop.train(
        _config(config, given, hyperparameters),
        out,
        overwrite=overwrite,
        console=Console(),
        finish=write_report,
    )
    _show(found)
    wrote = f"wrote {out}"
    if verdict:
        if verdict.exception():
            typer.echo(f"\n{wrote} without its report; to try again: nearfar report {out}")
        typer.echo(f"\n{verdict.result()}")
        wrote += f" and its report, {out / REPORT}"
    typer.echo(f"\n{wrote}; next: nearfar verify {out} A B")


@app.command()
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="All of it; without, the run's test identities."),
    ] = None,
    similar_label: SimilarLabel = None,
    identity_depth: IdentityDepth = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run, on its test identities or on other data, beside the raw input's distance."""
    from nearfar.train.use import evaluate_run

    found, notes = evaluate_run(
        run, data, similar_label=similar_label, identity_depth=identity_depth
    )
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "notes": notes}, indent=2))
    else:
        _show(found)


@app.command(epilog=VERIFY_EXAMPLES)
def verify(
    run: RunFolder,
    a: Annotated[
        str, typer.Argument(metavar="A", help="An image, a vector as text or .npy, or DATA:row.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    as_json: AsJson = False,
) -> None:
    """Are A and B the same? Exit status 0 if they are, 1 if not, 2 if something is wrong."""
    from nearfar.train.use import verify_items

    found = verify_items(run, a, b)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        relation = "<=" if found.same else ">"
        typer.echo(
            f"{'same' if found.same else 'different'}: {found.measure} distance "
            f"{found.distance:.4f} {relation} threshold {found.threshold:.4f}, fitted to accept "
            f"{found.far:.3g} of different pairs"
        )
    raise typer.Exit(0 if found.same else 1)


@app.command()
def embed(
    run: RunFolder,
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="An .npz: x, y if known, names.")
    ],
    identity_depth: IdentityDepth = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the embedding of every item of DATA."""
    from nearfar.train.use import embed_data

    wrote = embed_data(run, data, out, overwrite=overwrite, identity_depth=identity_depth)
    for note in wrote.notes:
        typer.echo(f"note: {note}", err=True)
    identities = "y (identities), " if wrote.labelled else ""
    typer.echo(f"wrote {out}: x ({wrote.n} x {wrote.d} embeddings), {identities}names")


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|EMBEDDINGS", help="A run, or an .npz: x, maybe y.")
    ],
    as_json: AsJson = False,
) -> None:
    """What is wrong with it, and what to try? Exit status 0 if nothing is, 1 if something is."""
    from rich.console import Console

    from nearfar.train.examine import examine_path

    found = examine_path(path)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    elif (console := Console()).is_terminal:
        console.print(found)
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.healthy else 1)


@app.command(epilog=REPORT_EXAMPLES)
def report(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="An .html. Default: RUN/report.html."),
    ] = None,
    umap: Annotated[
        bool,
        typer.Option(
            "--umap", help="Map the embeddings by UMAP, of pip install 'nearfar\\[umap]'."
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write what a run learned, and how that is known, as one HTML file that opens offline."""
    from nearfar.report import space, write_report
    from nearfar.train.run import REPORT

    page = _page(out, overwrite) if out else run / REPORT
    verdict = write_report(run, page, space.umap if umap else space.principal)
    typer.echo(f"{verdict}\n\nwrote {page}")


@app.command(epilog=COMPARE_EXAMPLES)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of train.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write a page, an .html, too.")
    ] = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Set the figures of runs side by side, and say where they must not be compared."""
    from nearfar.report import contest_of, write_comparison

    contest = contest_of(runs)
    if contest.warning:
        typer.echo(f"note: {contest.warning}", err=True)
    if as_json:
        typer.echo(json.dumps(contest.as_dict(), indent=2))
    else:
        _print_table(contest.table())
    if out:
        write_comparison(contest, _page(out, overwrite))
        typer.echo(f"wrote {out}", err=as_json)


@app.command(epilog=SWEEP_EXAMPLES)
def sweep(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="For a run a trial.")],
    loss: Annotated[
        list[str] | None, typer.Option(metavar="NAME...", help=LOSS_HELP, rich_help_panel=LOSS)
    ] = None,
    margin: Values = None,
    margin2: Values = None,
    temperature: Values = None,
    scale: Values = None,
    distance: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Of the losses that have one.", rich_help_panel=LOSS),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Begin no trial that would end later than this.")
    ] = 60,
    steps: Annotated[
        int | None, typer.Option(help="Training steps a trial.", rich_help_panel=TRAINING)
    ] = None,
    embedding_dim: Annotated[
        int | None, typer.Option(help="Numbers in an embedding.", rich_help_panel=TRAINING)
    ] = None,
    similar_label: SimilarLabel = None,
    identity_depth: IdentityDepth = None,
    single: Single = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything random.", rich_help_panel=TRAINING)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train every combination on the same splits, and say which to keep.

    Ranked on the calibration identities, so that the test figures of the best stay honest.
    """
    from rich.console import Console

    from nearfar.evaluate.intervals import FEWEST_IDENTITIES
    from nearfar.train import sweep as sweeping
    from nearfar.train.config import TrainConfig
    from nearfar.train.data import holds_pairs

    usual = FOR_PAIRS if holds_pairs(data) else FOR_ITEMS
    given = _given(
        steps=steps,
        embedding_dim=embedding_dim,
        similar_label=similar_label,
        identity_depth=identity_depth,
        single=single,
        seed=seed,
    )
    settings = _given(
        margin=margin, margin2=margin2, temperature=temperature, scale=scale, distance=distance
    )
    losses = loss or [usual]
    trials = sweeping.trials_of(TrainConfig(data=data, loss=losses[0], **given), losses, settings)
    console = Console(stderr=as_json)
    found = sweeping.sweep(trials, out, minutes=minutes, console=console)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    _print_table(found.table())
    if not found.decided:
        few = "too few identities to tell them apart"
        typer.echo(f"\n{few}: intervals take {FEWEST_IDENTITIES} test identities")
    else:
        typer.echo(f"\nkeep {found.best.run}, the best on the calibration identities")
    if found.decided and found.tied:
        typer.echo(f"chance may set it apart from: {', '.join(found.tied)}")
    for trial, why in found.failed:
        typer.echo(f"{trial.name} failed: {why}")
    if found.skipped:
        left = ", ".join(trial.name for trial in found.skipped)
        typer.echo(f"no time was left for: {left}; the same command with more --minutes goes on")
    if len(found.finished) > 1:
        typer.echo(f"side by side: nearfar compare {' '.join(str(f.run) for f in found.finished)}")


@app.command(epilog=EXPLAIN_EXAMPLES)
def explain(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            help="A .csv, .parquet or .npz; its columns are named as the data of the loss.",
        ),
    ],
    loss: Annotated[
        str, typer.Option(help="contrastive, cosine, triplet, quadruplet, info_nce or softmax.")
    ],
    margin: Margin = None,
    margin2: Margin2 = None,
    temperature: Temperature = None,
    distance: Distance = None,
    swap: Swap = None,
    smooth: Smooth = None,
    label_smoothing: LabelSmoothing = None,
    similar_label: SimilarLabel = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Show this many rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a loss does to every row of a table: distance, loss, force, and what it means."""
    from rich.console import Console

    from nearfar.explain_table import explain_table

    hyperparameters = _given(
        margin=margin,
        margin2=margin2,
        temperature=temperature,
        distance=distance,
        swap=swap,
        smooth=smooth,
        label_smoothing=label_smoothing,
        similar_label=similar_label,
    )
    explanation = explain_table(path, loss, hyperparameters)
    if limit is not None:
        explanation = replace(explanation, limit=limit)
    if as_json:
        found = explanation.as_dict()
        found["rows"] = found["rows"][:limit]
        typer.echo(json.dumps(found, indent=2))
    elif (console := Console()).is_terminal:
        console.print(explanation)
    else:
        typer.echo(str(explanation))


def _reporting() -> tuple[Callable[[Path], None], Future[str]]:
    """What writes the report into the folder of a run, and the verdict that comes of it.

    A report that fails does not cost the run: asking for the verdict raises what went wrong.
    """
    from nearfar.report import write_report  # a library that is missing is told before training
    from nearfar.train.run import REPORT

    verdict: Future[str] = Future()

    def write(folder: Path) -> None:
        try:
            verdict.set_result(write_report(folder, folder / REPORT))
        except Exception as error:
            verdict.set_exception(error)

    return write, verdict


def _page(out: Path, overwrite: bool) -> Path:
    """Where a page may be written."""
    from nearfar.train.run import REPORT, refuse_inside_run

    if out.suffix.lower() != ".html":
        raise InputError(f"--out {out} must end in .html.")
    if out.name != REPORT:
        refuse_inside_run(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists. Choose another --out, or add --overwrite to replace it.")
    return out


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _config(
    path: Path | None, given: Mapping[str, Any], hyperparameters: "Mapping[str, Setting]"
) -> "TrainConfig":
    """The config of the command line, over that of a file where one is named."""
    if path is None and "data" not in given:
        raise InputError("train needs DATA, for instance: nearfar train glyphs --out runs/demo")

    from nearfar.train.config import TrainConfig, read_config
    from nearfar.train.data import holds_pairs
    from nearfar.train.objectives import resolve

    if path is None:
        loss = FOR_PAIRS if holds_pairs(given["data"]) else FOR_ITEMS
        config = TrainConfig(data=given["data"], loss=loss)
    else:
        config = read_config(path)
    kept = config.hyperparameters if given.get("loss", config.loss) == config.loss else {}
    config = replace(config, **given)
    return replace(config, hyperparameters=resolve(config.loss, {**kept, **hyperparameters}))


def _show(found: "Comparison") -> None:
    """The verification table, richly in a terminal."""
    from nearfar.train.compare import dashes, table

    typer.echo(
        f"\n{found.learned.n_similar:,} similar and {found.learned.n_dissimilar:,} dissimilar "
        f"pairs of {found.n_identities:,} identities; threshold {found.learned_at.threshold:.4f}, "
        f"fitted at FAR {found.fitted_far:.3g}"
    )
    _print_table(table(found))
    if dashes(found):
        typer.echo(dashes(found))


def _print_table(shown: "Table") -> None:
    from rich.console import Console

    if (console := Console()).is_terminal:
        console.print(shown.rich())
    else:
        typer.echo("\n" + shown.plain())
