"""Commands of galleries: `enroll`, `search` and `gallery`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar.app.commands.declare import (
    DATA,
    AsJson,
    Overwrite,
    RunFolder,
    argument,
    command,
    option,
)
from nearfar.app.errors import InputError
from nearfar.app.show import console, note, show

Gallery = Annotated[Path, argument("GALLERY", "A gallery written by enroll.")]


@command(
    "enroll runs/photos staff/ --out staff.gallery",
    "enroll runs/photos newcomers/ --out staff.gallery --add",
    "enroll runs/photos embeddings.npz --embeddings --out staff.gallery",
    takes=("identity_depth",),
)
def enroll(
    run: RunFolder,
    data: Annotated[str, DATA],
    out: Annotated[Path, option("The gallery to write.", "--out", metavar="GALLERY")],
    add: Annotated[bool, option("Add to the gallery, which exists.", "--add")] = False,
    embeddings: Annotated[
        bool,
        option("DATA is an .npz of embeddings x, identities y and names already.", "--embeddings"),
    ] = False,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Put the items of DATA, whose identities are known, into a gallery to search.

    If it is stopped, even killed, the gallery is whole: as before, or with all of DATA.
    """
    from nearfar.app.gallery.enroll import enroll as enroll_data

    done = enroll_data(
        run,
        data,
        out,
        embeddings=embeddings,
        to_existing=add,
        overwrite=overwrite,
        identity_depth=given.get("identity_depth"),
        progress=console(as_json).print,
    )
    note(done.notes)
    show(done, as_json)


@command(
    "search runs/photos staff.gallery door.jpg",
    "search runs/photos staff.gallery door.jpg --k 3 --prior 0.9",
    "search runs/demo letters.gallery glyphs:0 glyphs:1 --far 0.001",
)
def search(
    run: RunFolder,
    gallery: Gallery,
    queries: Annotated[
        list[str], argument("QUERY...", "An image, a vector as text or .npy, or DATA:row.")
    ],
    k: Annotated[int, option("How many identities to name.", "--k", min=1)] = 5,
    prior: Annotated[
        float | None,
        option(
            "Share of queries that show somebody in the gallery; gives probabilities.", "--prior"
        ),
    ] = None,
    rate: Annotated[  # not `far`, whose range is that of train
        float | None,
        option(
            "About what share of strangers may be taken for somebody, above 0 and at most 0.5 "
            "(that of the run); rather fewer are in large galleries.",
            "--far",
        ),
    ] = None,
    exact: Annotated[bool, option("Compare with every item, without graphs.", "--exact")] = False,
    as_json: AsJson = False,
) -> None:
    """Say who in GALLERY each QUERY shows, or that it is nobody known.

    Exit status 0 if somebody is found for each, 1 if for one it is nobody, 2 on an error.
    """
    if prior is not None and not 1e-12 <= prior <= 1 - 1e-12:  # also refuses NaN
        raise InputError(f"--prior must be a share between 1e-12 and 1 - 1e-12, got {prior}.")
    if rate is not None and not 0 < rate <= 0.5:
        raise InputError(f"--far must be a rate above 0 and at most 0.5, got {rate:g}.")

    from nearfar.app.gallery.answers import search as search_gallery

    found = search_gallery(run, gallery, queries, k=k, prior=prior, far=rate, exact=exact)
    note(found.notes)
    show(found, as_json)
    raise typer.Exit(0 if found.all_found else 1)


@command("gallery staff.gallery", "gallery staff.gallery --remove ada --remove bob")
def gallery(
    place: Gallery,
    remove: Annotated[
        list[str] | None,
        option("Remove this identity and all its items; may be repeated.", metavar="IDENTITY"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in GALLERY, or remove identities from it."""
    from nearfar.app.gallery.enroll import forget, look_into

    show(forget(place, remove) if remove else look_into(place), as_json)
