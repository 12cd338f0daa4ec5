"""`nearfar enroll`: from data, or embeddings that exist already, to a gallery."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar.app.errors import InputError
from nearfar.app.gallery.change import add, remove
from nearfar.app.gallery.embeddings import read_embeddings
from nearfar.app.gallery.rows import Rows, encoded
from nearfar.app.gallery.store import MANIFEST, Gallery, Recall, read_gallery, steadily, writing
from nearfar.app.train.calibration import read_calibration
from nearfar.app.train.run import Run, model_file, read_run, refuse_inside, refuse_inside_run
from nearfar.app.train.use import embedded


@dataclass(frozen=True, eq=False)
class Enrolled:
    """A gallery after a change.

    Attributes:
        gallery: what it is now.
        added: how many rows were added.
        known: how many were not, since they were there.
        removed: how many were removed.
        notes: notes for the user about how the data were read.
    """

    gallery: Gallery
    added: int = 0
    known: int = 0
    removed: int = 0
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **about(self.gallery),
            "added": self.added,
            "known": self.known,
            "removed": self.removed,
            "notes": list(self.notes),
        }

    def render(self) -> list[str]:
        """For a terminal."""
        words = []
        if self.added:
            words.append(f"added {_count(self.added, 'item')}")
        if self.known:
            words.append(f"left out {_count(self.known, 'item')}, there already")
        if self.removed:
            words.append(f"removed {_count(self.removed, 'item')}")
        return [*words, *in_words(self.gallery)]


def about(gallery: Gallery) -> dict[str, Any]:
    """What is in a gallery, for JSON."""
    held = gallery.as_dict()
    indexed = sum(block.n for block in gallery.blocks if block.indexed)
    names = ("distance", "dimensions", "identities", "rows", "recall")
    return {
        "gallery": str(gallery.path),
        **{name: held[name] for name in names},
        "indexed": indexed,
    }


def in_words(gallery: Gallery) -> list[str]:
    """What is in a gallery, for a terminal."""
    lines = [
        f"{gallery.path} holds {_count(gallery.n_identities, 'identity')} with "
        f"{_count(gallery.n, 'item')}: embeddings of {gallery.d} numbers, compared by "
        f"{gallery.distance} distance"
    ]
    indexed = sum(block.n for block in gallery.blocks if block.indexed)
    if indexed and gallery.recall:
        lines.append(f"{indexed:,} items are searched by graphs, which {recalled(gallery.recall)}")
    return lines


def recalled(recall: Recall) -> str:
    """How much graphs find, phrased to follow "which"."""
    return (
        f"find {recall.recall:.4f} of the {recall.k} nearest (measured for {recall.queries} of the "
        f"{recall.rows:,} items)"
    )


def _count(n: int, what: str) -> str:
    plural = what.removesuffix("y") + "ies" if what.endswith("y") else f"{what}s"
    return f"{n:,} {what if n == 1 else plural}"


def fingerprint(run: Run) -> str:
    """By which a gallery knows the run whose embeddings it holds."""
    digest = hashlib.sha256((run.path / model_file(run.config)).read_bytes())
    digest.update(str(run.distance).encode())
    return digest.hexdigest()


def enroll(
    path: Path,
    source: str,
    out: Path,
    *,
    embeddings: bool,
    to_existing: bool,
    overwrite: bool,
    identity_depth: int | None,
    progress: Callable[[str], None],
) -> Enrolled:
    """Embed all items of some data and put them into a gallery.

    Args:
        path: the run folder.
        source: the data, whose identities must be known.
        out: the gallery.
        embeddings: whether `source` is an .npz of embeddings already, as `nearfar embed` writes it.
        to_existing: whether `out` exists, and the items are added to it.
        overwrite: whether an existing gallery is replaced.
        identity_depth: for a folder, the depth of the subfolders that are identities.
        progress: called with a line of text now and then.

    Raises:
        InputError: the run, the data or the gallery cannot be used; the gallery stays as it was.
    """
    refuse_inside(out, source)
    refuse_inside_run(out)
    run = read_run(path)
    read_calibration(path)  # or no search would have a threshold
    _before(run, out, to_existing=to_existing, overwrite=overwrite)  # refused before the long part
    notes: Sequence[str] = ()
    parts: Iterable[Rows]
    if embeddings:
        if identity_depth is not None:
            raise InputError("--identity-depth is for a folder, and --embeddings for an .npz.")
        parts = read_embeddings(Path(source), run.embedder.embedding_dim)
    else:
        items, x = embedded(run, source, labelled=True, identity_depth=identity_depth)
        notes = items.notes
        identities = encoded(items.identities)
        rows = Rows(x.numpy(), identities[items.identity.numpy()], encoded(items.names))
        parts = [rows]
    with writing(out):
        # Another process may have written it while the items were embedded.
        before = _before(run, out, to_existing=to_existing, overwrite=overwrite)
        kept = before.n
        after, known = add(before, parts, progress)
    return Enrolled(after, added=after.n - kept, known=known, notes=notes)


def forget(out: Path, identities: Sequence[str]) -> Enrolled:
    """Remove identities from a gallery.

    Raises:
        InputError: there is no such gallery, or one of them is not in it; nothing is removed.
    """
    read_gallery(out)
    with writing(out):
        after, removed = remove(read_gallery(out), identities)
    return Enrolled(after, removed=removed)


def look_into(place: Path) -> Enrolled:
    """What is in a gallery.

    Raises:
        InputError: there is no such gallery, or a file of it is missing or damaged.
    """
    found, _ = steadily(
        read_gallery(place),
        lambda: read_gallery(place),
        lambda held: [block.read() for block in held.blocks],
    )
    return Enrolled(found)


def _before(run: Run, out: Path, *, to_existing: bool, overwrite: bool) -> Gallery:
    """The gallery that is added to."""
    if to_existing and overwrite:
        raise InputError("--add keeps what is in the gallery, --overwrite does not. Choose one.")
    if to_existing:
        return gallery_of(run, out)
    if (out / MANIFEST).exists() and not overwrite:
        raise InputError(
            f"{out} exists. Add --add to add to it or --overwrite to replace it, or choose another "
            "--out."
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Choose another --out.")
    return Gallery(out, fingerprint(run), run.distance, run.embedder.embedding_dim)


def gallery_of(run: Run, path: Path) -> Gallery:
    """A gallery of embeddings of this run.

    Raises:
        InputError: it cannot be read, or is of another run.
    """
    found = read_gallery(path)
    if found.run != fingerprint(run):
        raise InputError(
            f"{path} holds embeddings of another network than that of {run.path}, which cannot be "
            "compared. Name the run that it was made with, or enroll the items again."
        )
    return found
