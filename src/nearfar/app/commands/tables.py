"""Commands for tables and embeddings, without a run: `explain` and `mine`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from nearfar.app.commands.declare import AsJson, Overwrite, argument, command, option
from nearfar.app.names import EXPLAINED, ROW_LOSSES
from nearfar.app.show import console, show


def name_or_p(distance: str) -> str | float:
    """The p of a p-norm as a number."""
    try:
        return float(distance)
    except ValueError:
        return distance


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
