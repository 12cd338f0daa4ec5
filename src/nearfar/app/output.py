"""Files and folders that are written completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nearfar.app.errors import InputError


@contextmanager
def whole_file(out: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `out` when the block ends, unless it ends with an error.

    Raises:
        InputError: no file can be made there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(name).chmod(0o644)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def files_in(folder: Path) -> list[str]:
    """The paths of all files in a folder, seen from there; none if there is no such folder."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _none(folder: Path) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that the tool writes, and may replace if it is asked to.

    Attributes:
        name: what one is called, with an article.
        option: the option that names it.
        marks: files that every such folder holds, by which it is known.
        files: all files that one may hold; with another in it, it is not replaced.
        inside: gives the files in subfolders of one, as paths that begin there.
    """

    name: str
    option: str
    marks: tuple[str, ...]
    files: tuple[str, ...]
    inside: Callable[[Path], Sequence[str]] = _none

    def found_at(self, path: Path) -> bool:
        return path.is_dir() and all((path / mark).is_file() for mark in self.marks)

    def refuse_existing(self, out: Path, *, overwrite: bool) -> None:
        """Refuse to write over anything but an empty folder, or one of this kind if asked to."""
        option = self.option
        if not out.exists() and not out.is_symlink():
            return
        if out.is_dir() and out.resolve() == Path.cwd():
            raise InputError(f"{option} {out} is the folder you are in. Name a new one inside it.")
        if out.is_dir() and not any(out.iterdir()):
            return
        if not overwrite:
            raise InputError(
                f"{out} exists. Choose another {option}, or add --overwrite to replace it."
            )
        if not self.found_at(out):
            raise InputError(
                f"{out} is not {self.name} folder and is not overwritten. Choose another {option}."
            )
        if foreign := self._foreign(out):
            raise InputError(
                f"{out} holds {foreign[0]!r}, which is not part of {self.name}, and is not "
                f"overwritten. Move it elsewhere, or choose another {option}."
            )

    def _foreign(self, folder: Path) -> list[str]:
        """What does not belong in a folder of this kind."""
        inside = {*self.inside(folder)}
        subfolders = {path.partition("/")[0] for path in inside}
        names = {entry.name for entry in folder.iterdir()} - subfolders
        within = {f"{name}/{path}" for name in subfolders for path in files_in(folder / name)}
        return sorted((names | within) - {*self.files} - inside)


@contextmanager
def whole_folder(
    out: Path,
    kind: FolderKind,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """A temporary folder next to `out`, which becomes `out` if the block ends without an error.

    Args:
        out: the final path.
        kind: what is written.
        overwrite: whether an existing folder of this kind may be replaced.
        finish: called with the complete folder, to write a report, for example, before it becomes
            `out`. Until then an existing folder stays untouched, even if the process is killed.

    Raises:
        InputError: the folder cannot be created, or something else now exists at `out`.
    """
    out = out.resolve()  # if `out` is a link, its target is replaced
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(
            tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent)
        )
    except OSError as error:
        raise InputError(f"{kind.option} {out} cannot be written: {error.strerror}.") from None
    try:
        folder.chmod(0o755)  # mkdtemp makes it private to the owner
        yield folder
        if finish:
            finish(folder)
        _replace(folder, out, kind, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _replace(folder: Path, out: Path, kind: FolderKind, *, overwrite: bool) -> None:
    """Move `folder` to `out`; an old one is deleted only once the new one is in place."""
    try:
        kind.refuse_existing(
            out, overwrite=overwrite
        )  # hours may have passed since the first check
    except InputError as error:
        kept = folder.with_name(f"{out.name}-{folder.suffixes[-2].lstrip('.')}")
        folder.rename(kept)
        raise InputError(f"{error} The new one is in {kept}.") from None
    if not out.exists():
        folder.rename(out)
        return
    if not any(out.iterdir()):
        out.rmdir()
        folder.rename(out)
        return
    old = folder.with_suffix(".replaced")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)
