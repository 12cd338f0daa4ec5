"""Files and rows that cannot be used: all of them, where reading stops at the first."""

from pathlib import Path

import numpy as np

from nearfar.app.audit.findings import Finding
from nearfar.app.data.items import read_arrays
from nearfar.app.errors import InputError
from nearfar.app.names import GLYPHS
from nearfar.app.text import printable


def broken(source: str, identity_depth: int | None) -> list[Finding]:
    """The images of a folder, or the rows of an .npz, that cannot be used."""
    path = Path(source)
    if source != GLYPHS and path.is_dir():
        return _files(path, identity_depth)
    if source != GLYPHS and path.suffix.lower() == ".npz":
        return _rows(path)
    return []


def _files(folder: Path, identity_depth: int | None) -> list[Finding]:
    """Images that cannot be read, or that are of one colour."""
    from nearfar.app.data.fit import Fit
    from nearfar.app.data.folder import find_images
    from nearfar.app.data.pixels import read_picture

    images = find_images(folder, identity_depth=identity_depth)
    found = []
    for file, name, number in zip(images.files, images.names, images.identity, strict=True):
        why = ""
        try:
            pixels = read_picture(file, Fit.square(None)).pixels
            if bool((pixels == pixels[:, :1, :1]).all()):
                why = "it is of one colour."
        except InputError as error:
            why = str(error).removeprefix(f"{file} cannot be read: ").removeprefix(f"{file} ")
        if why:
            identity = printable(images.identities[number])
            found.append(
                Finding("broken", printable(name), identity, detail=printable(why), drop=True)
            )
    return found


def _rows(path: Path) -> list[Finding]:
    """Rows that hold NaN or infinity, or the same number throughout."""
    arrays = read_arrays(path)
    x, y = arrays.get("x"), arrays.get("y")
    if x is None or y is None or x.ndim < 2 or not len(x) or x.dtype.kind not in "fiu":
        return []  # reading says what is wrong
    names = arrays.get("names", np.array([f"{path.name}:{row}" for row in range(len(x))]))
    if y.shape != x.shape[:1] or names.shape != x.shape[:1]:
        return []
    flat = x.reshape(len(x), -1)
    with np.errstate(over="ignore"):
        bad = (~np.isfinite(flat.astype(np.float32))).sum(1) > 0
    even = np.zeros(len(x), bool)
    if flat.shape[1] > 1:
        even |= flat.min(1) == flat.max(1)  # NaN equals nothing
    return [
        Finding(
            "broken",
            printable(str(names[row])),
            printable(str(y[row])),
            detail="it holds NaN or infinity." if bad[row] else "all of its numbers are equal.",
            drop=True,
        )
        for row in np.flatnonzero(bad | even).tolist()
    ]
