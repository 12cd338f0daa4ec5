"""Find files whose names other systems may write differently, or that have several names."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from unicodedata import normalize

from nearfar.app.errors import InputError


def find_file(folder: Path, name: str) -> Path:
    """The file of this name, relative to a folder or absolute.

    If there is none, backslashes are tried as slashes, and accented letters in both Unicode forms,
    composed and decomposed.

    Raises:
        InputError: no such file; the message says how much of the path exists.
    """
    for slashed in (name, name.replace("\\", "/")):
        for spelled in (slashed, normalize("NFC", slashed), normalize("NFD", slashed)):
            path = folder / spelled
            try:
                if path.is_file():
                    return path
            except OSError as error:  # an impossible name
                raise InputError(f"no such image: {name[:40]!r} ...: {error.strerror}") from None
    path = folder / name.replace("\\", "/")
    raise InputError(f"no such image: {path}{_closest_existing(path)}")


def file_key(path: Path) -> Hashable:
    """A key shared by all paths of one file, links included."""
    found = path.stat()
    return (found.st_dev, found.st_ino) if found.st_ino else path.resolve()


def unique_files(files: Sequence[Path], owners: Sequence[str]) -> list[int]:
    """Indices of the first path of each file, so that no file is read twice.

    Args:
        files: paths.
        owners: the name of the identity that each file shows.

    Raises:
        InputError: one file is listed under two identities.
    """
    first: dict[Hashable, int] = {}
    for i, file in enumerate(files):
        k = first.setdefault(file_key(file), i)
        if owners[k] != owners[i]:
            raise InputError(
                f"{files[k]} and {file} are the same file, which cannot show both "
                f"{owners[k]!r} and {owners[i]!r}. Remove one."
            )
    return list(first.values())


def _closest_existing(path: Path) -> str:
    """How much of a path exists, and a name there that differs only in spelling."""
    here = Path(path.anchor or ".")
    for part in path.relative_to(path.anchor).parts:
        if not (here / part).exists():
            break
        here = here / part
    else:
        return "; it is a folder"
    if not here.is_dir():
        return f"; {here} is a file"
    alike = [entry.name for entry in here.iterdir() if _plain(entry.name) == _plain(part)]
    return f"; {here} has {alike[0]!a}, not {part!a}" if alike else f"; {here} has no {part!r}"


def _plain(name: str) -> str:
    return normalize("NFKC", name).casefold()
