"""Files by their names, as other systems may have written them, and files that have several."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from unicodedata import normalize

from nearfar.app.errors import InputError


def find_file(folder: Path, name: str) -> Path:
    """The file of this name, relative to a folder or absolute.

    Where there is none, backslashes are tried as slashes, and accents in the other of the two forms
    that Unicode has for them (an e with an accent, or an e and an accent).

    Raises:
        InputError: no such file; the message says how far the path leads, and what is there.
    """
    for slashed in (name, name.replace("\\", "/")):
        for spelled in (slashed, normalize("NFC", slashed), normalize("NFD", slashed)):
            path = folder / spelled
            try:
                if path.is_file():
                    return path
            except OSError as error:  # a name that no file can have
                raise InputError(f"no such image: {name[:40]!r} ...: {error.strerror}") from None
    path = folder / name.replace("\\", "/")
    raise InputError(f"no such image: {path}{_what_is_there(path)}")


def file_key(path: Path) -> Hashable:
    """What all paths of one file share, through whatever links they lead."""
    found = path.stat()
    return (found.st_dev, found.st_ino) if found.st_ino else path.resolve()


def once_each(files: Sequence[Path], owners: Sequence[str]) -> list[int]:
    """Which of these files to take, so that none is taken twice: the first path of each.

    Args:
        files: paths.
        owners: the name of the identity that each shows.

    Raises:
        InputError: one file under two identities.
    """
    first: dict[Hashable, int] = {}
    for i, file in enumerate(files):
        k = first.setdefault(file_key(file), i)
        if owners[k] != owners[i]:
            raise InputError(
                f"{files[k]} and {file} are one file, and cannot show both {owners[k]!r} and "
                f"{owners[i]!r}. Remove one."
            )
    return list(first.values())


def _what_is_there(path: Path) -> str:
    """How far a path leads, and a name there that is its own but for how it is written."""
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
