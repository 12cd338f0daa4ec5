"""The files of a gallery, which is whole at any moment, whenever its process is killed.

A gallery is a folder:

    gallery.json         the manifest: nothing else counts unless it is named there
    block-000001.x.npy   (n, d) float32 embeddings
    block-000001.items.npy  (n,) the identity and the name of each row
    block-000001.usearch    a graph of neighbours, of large galleries where usearch is installed
    lock                 held by the process that writes

A file is written once, under a new name, and reaches the disk before the manifest that names it
takes the place of the old one. What no manifest names was left by a process that was killed, or is
of no use any more, and is deleted by the next that writes.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from nearfar.app.errors import InputError
from nearfar.app.gallery.rows import Array, Rows, misshapen, repacked
from nearfar.app.output import whole_file
from nearfar.app.train.summary import RATE, TEXT, WHOLE, misfit
from nearfar.distance import Distance, check_distance

T = TypeVar("T")

FORMAT = 1
MANIFEST, LOCK = "gallery.json", "lock"
X, ITEMS, GRAPH = ".x.npy", ".items.npy", ".usearch"
_OURS = re.compile(r"block-(\d{6,})(\.x\.npy|\.items\.npy|\.usearch)", re.ASCII)
_TRIES = 5  # while another process replaces blocks
_BLOCK_BYTES = 2**25  # of embeddings: what a search holds in memory at a time

_FORM: Mapping[str, Any] = {
    "format": WHOLE,
    "run": TEXT,
    "dimensions": WHOLE,
    "identities": WHOLE,
    "rows": WHOLE,
    "blocks": [{"name": TEXT, "rows": WHOLE, "bytes": {"*": WHOLE}}],
    "recall?": {"k": WHOLE, "queries": WHOLE, "recall": RATE, "rows": WHOLE},
}


class MissingError(InputError):
    """A file that a manifest names is not there."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a gallery, in files of their own.

    Attributes:
        folder: the gallery.
        name: the beginning of the names of its files.
        n: how many rows.
        sizes: the bytes of each file, by the end of its name.
    """

    folder: Path
    name: str
    n: int
    sizes: Mapping[str, int]

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"

    @property
    def indexed(self) -> bool:
        return GRAPH in self.sizes

    def read(self) -> Rows:
        """Its rows, mapped from the files: they take memory only where, and while, they are used.

        Raises:
            MissingError: there is no such file; another process may have replaced the block.
            InputError: a file is damaged.
        """
        try:
            for suffix in (X, ITEMS):
                if self.path(suffix).stat().st_size != self.sizes[suffix]:
                    raise self.damaged(suffix)
            found = Rows.mapped(self.path(X), self.path(ITEMS))
        except FileNotFoundError as error:
            raise MissingError(
                f"{error.filename} is missing. Enroll again, with --overwrite."
            ) from None
        except InputError:
            raise
        except ValueError:
            raise self.damaged(X) from None
        if len(found) != self.n:
            raise self.damaged(X)
        return found

    def whole(self) -> Rows:
        """Its rows, of which each is looked at.

        Raises:
            MissingError: as `read`.
            InputError: as `read`, or bytes inside a file have changed.
        """
        found = self.read()
        self.refuse_damaged(found.x)
        return found

    def refuse_damaged(self, x: Array) -> None:
        """Refuse rows of this block that are no embeddings.

        Raises:
            InputError: one is neither of length 1 nor 0, which a network rarely returns.
        """
        bad = misshapen(x)
        if bad.any() and x[bad].any():
            raise self.damaged(X)

    def damaged(self, suffix: str) -> InputError:
        return InputError(f"{self.path(suffix)} is damaged. Enroll again, with --overwrite.")

    def named(self) -> set[str]:
        return {f"{self.name}{suffix}" for suffix in self.sizes}


@dataclass(frozen=True)
class Recall:
    """How many of the nearest rows the graphs find.

    Attributes:
        k: of so many nearest.
        queries: for so many rows of the gallery itself.
        recall: the share that was found.
        rows: how many rows the gallery had.
    """

    k: int
    queries: int
    recall: float
    rows: int


@dataclass(frozen=True, eq=False)
class Gallery:
    """What a manifest says.

    Attributes:
        path: the folder.
        run: the fingerprint of the run whose embeddings these are.
        distance: the distance by which they are compared.
        d: the dimensions of an embedding.
        n_identities: how many identities.
        blocks: all rows.
        recall: that of the graphs; None: there are none.
    """

    path: Path
    run: str
    distance: Distance
    d: int
    n_identities: int = 0
    blocks: tuple[Block, ...] = ()
    recall: Recall | None = None

    @property
    def n(self) -> int:
        """How many rows."""
        return sum(block.n for block in self.blocks)

    @property
    def block_rows(self) -> int:
        """How many rows a full block has."""
        return max(1, _BLOCK_BYTES // (4 * self.d))

    def as_dict(self) -> dict[str, Any]:
        """The manifest."""
        return {
            "format": FORMAT,
            "run": self.run,
            "distance": self.distance,
            "dimensions": self.d,
            "identities": self.n_identities,
            "rows": self.n,
            "blocks": [
                {"name": block.name, "rows": block.n, "bytes": dict(block.sizes)}
                for block in self.blocks
            ],
            "recall": None if self.recall is None else vars(self.recall),
        }


def read_gallery(path: Path) -> Gallery:
    """What is in a gallery.

    Raises:
        InputError: there is none, or its manifest is damaged or of a newer nearfar.
    """
    if not path.is_dir():
        raise InputError(f"no such gallery: {path}. Make one: nearfar enroll RUN DATA --out {path}")
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{path} is not a gallery: it has no {MANIFEST}. Name the folder given to "
            "`nearfar enroll --out`."
        )
    try:
        held = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        held = None
    if isinstance(held, dict) and isinstance(held.get("format"), int) and held["format"] > FORMAT:
        raise InputError(f"{file} was written by a newer nearfar. Upgrade: pip install -U nearfar")
    wrong = misfit(held, _FORM)
    if not wrong and held["rows"] != sum(block["rows"] for block in held["blocks"]):
        wrong = "rows is not the sum of those of its blocks"
    try:
        blocks = () if wrong else tuple(_block(path, one) for one in held["blocks"])
        distance = check_distance(held["distance"])
    except (KeyError, TypeError, ValueError) as error:
        wrong = wrong or str(error)
    if wrong:
        raise InputError(f"{file} is damaged: {wrong}. Enroll again, with --overwrite.")
    recall = None if held.get("recall") is None else Recall(**held["recall"])
    return Gallery(
        path, held["run"], distance, held["dimensions"], held["identities"], blocks, recall
    )


def steadily(
    gallery: Gallery, again: Callable[[], Gallery], use: Callable[[Gallery], T]
) -> tuple[Gallery, T]:
    """Use a gallery, whose blocks another process may replace at this moment.

    Args:
        gallery: what was read.
        again: reads it again.
        use: is called until all its files are there.

    Returns:
        The gallery as it was used, and what `use` returned.

    Raises:
        MissingError: a file is gone, and not replaced.
    """
    for _ in range(_TRIES - 1):
        with suppress(MissingError):
            return gallery, use(gallery)
        gallery = again()
    return gallery, use(gallery)


def _block(folder: Path, held: Mapping[str, Any]) -> Block:
    name, sizes = held["name"], held["bytes"]
    if not _OURS.fullmatch(f"{name}{X}") or not {X, ITEMS} <= sizes.keys() <= {X, ITEMS, GRAPH}:
        raise ValueError(f"{name!r} is no block")  # nor a path that leads elsewhere
    return Block(folder, name, held["rows"], sizes)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Alone in writing a gallery, which may be new; afterwards, nothing unfinished is left.

    Raises:
        InputError: another process is writing it, or the folder cannot be made or is no gallery.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}.") from None
    _refuse_other_folders(path)
    with (path / LOCK).open("a+b") as lock:
        if not _locked(lock, path / LOCK):
            raise InputError(f"{path} is being written by another process. Wait until it is done.")
        sweep(path)
        try:
            yield
        finally:
            sweep(path)
            if not (path / MANIFEST).exists():
                with suppress(OSError):  # where an open file cannot be deleted
                    (path / LOCK).unlink()
                with suppress(OSError):
                    path.rmdir()


def _refuse_other_folders(path: Path) -> None:
    if (path / MANIFEST).exists():
        return
    ours = {*_leftovers(path), path / LOCK}
    if foreign := sorted({*path.iterdir()} - ours):
        raise InputError(
            f"{path} is not a gallery, and holds {foreign[0].name!r}. Choose another --out."
        )


def _locked(file: BinaryIO, path: Path) -> bool:
    """Whether the lock is ours until the file is closed, as it is when the process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())  # or it was just deleted
    except OSError:
        return False


def sweep(path: Path) -> None:
    """Delete the files that the manifest does not name; none if the manifest is damaged."""
    named: set[str] = set()
    if (path / MANIFEST).exists():
        try:
            named = set().union(*(block.named() for block in read_gallery(path).blocks))
        except InputError:
            return
    for file in _leftovers(path):
        if file.name not in named:
            with suppress(OSError):  # where it is read at this moment: the next one does it
                file.unlink()


def _leftovers(path: Path) -> list[Path]:
    """The files of blocks, whether they are named or not, and manifests that were not finished."""
    blocks = [file for file in path.iterdir() if _OURS.fullmatch(file.name)]
    return [*blocks, *path.glob(f".{MANIFEST}.*")]


def commit(gallery: Gallery) -> None:
    """Make this the content of the gallery."""
    _sync_folder(gallery.path)
    with _unchanged(gallery.path), whole_file(gallery.path / MANIFEST) as file:
        file.write(json.dumps(gallery.as_dict(), indent=2).encode() + b"\n")
        _sync(file)
    _sync_folder(gallery.path)
    sweep(gallery.path)


def write_blocks(gallery: Gallery, parts: Iterable[Rows]) -> list[Block]:
    """Write rows as new blocks, which no manifest names yet; all but the last are full."""
    return [write_block(gallery.path, rows) for rows in repacked(parts, gallery.block_rows)]


def write_block(folder: Path, rows: Rows) -> Block:
    """Write rows as one new block."""
    numbers = [int(ours[1]) for file in folder.iterdir() if (ours := _OURS.fullmatch(file.name))]
    block = Block(folder, f"block-{max(numbers, default=0) + 1:06}", len(rows), {})
    with _unchanged(folder), block.path(X).open("xb") as x, block.path(ITEMS).open("xb") as items:
        rows.save(x, items)
        _sync(x)
        _sync(items)
    return _measured(block, X, ITEMS)


@contextmanager
def _unchanged(path: Path) -> Iterator[None]:
    """Says that a gallery which cannot be written is as it was."""
    try:
        yield
    except OSError as error:
        # NumPy counts bytes where the system would give a reason.
        reason = error.strerror or f"the disk may be full ({error})"
        raise InputError(f"{path} cannot be written: {reason}. The gallery is as it was.") from None


def with_graph(block: Block) -> Block:
    """The block with the graph that was written to its path."""
    with block.path(GRAPH).open("r+b") as file:
        _sync(file)
    return _measured(block, X, ITEMS, GRAPH)


def _measured(block: Block, *suffixes: str) -> Block:
    return replace(block, sizes={end: block.path(end).stat().st_size for end in suffixes})


def _sync(file: BinaryIO) -> None:
    """Wait until a file is on the disk: it must be there before the manifest that names it."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if sys.platform == "win32":  # which has no such call, and keeps the order itself
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
