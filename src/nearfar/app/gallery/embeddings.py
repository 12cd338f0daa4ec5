"""Embeddings in an .npz, read piece by piece, so that there may be more than fit into memory."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from nearfar.app.errors import InputError
from nearfar.app.gallery.rows import Array, Rows, encoded, misshapen
from nearfar.app.text import printable

_NUMBERS = 2**22  # read at a time


def read_embeddings(path: Path, d: int) -> Iterator[Rows]:
    """The rows of an .npz with embeddings x, identities y and, if there are, names.

    What is wrong with the file is found at once, what is wrong with a row when it is read.

    Args:
        path: the file.
        d: the dimensions that an embedding must have.

    Raises:
        InputError: the file holds something else, or embeddings of another network.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            for name in ("x", "y"):
                if name not in held.files:
                    raise InputError(
                        f"{path} has no array {name!r}; it has: {', '.join(held.files) or 'none'}. "
                        "--embeddings needs embeddings x and identities y, as `nearfar embed` "
                        "writes them."
                    )
            y, names = held["y"], held["names"] if "names" in held.files else None
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as x:
            (shape, dtype), _ = _header(x)
    except InputError:
        raise
    except Exception:  # NumPy and zipfile raise almost any kind for a damaged file
        raise InputError(f"{path} cannot be read as .npz. Save it with numpy.savez.") from None
    if len(shape) != 2 or dtype.kind != "f" or shape[1] != d or not shape[0]:
        raise InputError(
            f"{path}: x has shape {shape} and dtype {dtype}; the embeddings of this run are rows "
            f"of {d} floats. Without --embeddings, x is what the run embeds."
        )
    for name, array, kinds in (("y", y, "iuU"), ("names", names, "U")):
        if array is not None and (array.shape != shape[:1] or array.dtype.kind not in kinds):
            raise InputError(
                f"{path}: {name} has shape {array.shape} and dtype {array.dtype}; it must be "
                f"({shape[0]},) {'texts' if name == 'names' else 'whole numbers or texts'}."
            )
    return _rows(path, d, y, names)


def _rows(path: Path, d: int, y: Array, names: Array | None) -> Iterator[Rows]:
    at_a_time = max(1, _NUMBERS // d)
    with zipfile.ZipFile(path) as archive, archive.open("x.npy") as file:
        (shape, dtype), fortran = _header(file)
        if fortran:
            raise InputError(f"{path}: x is stored by columns. Save numpy.ascontiguousarray(x).")
        for start in range(0, shape[0], at_a_time):
            rows = slice(start, min(start + at_a_time, shape[0]))
            wanted = (rows.stop - start) * d * dtype.itemsize
            content = file.read(wanted)
            if len(content) != wanted:
                raise InputError(f"{path} ends before its last row. Save it again.")
            x = np.frombuffer(content, dtype).reshape(-1, d).astype(np.float32)
            _refuse(path, x, start)
            of = [str(name) for name in range(start, rows.stop)] if names is None else names[rows]
            yield Rows(
                x,
                encoded(printable(str(one)) for one in y[rows].tolist()),
                encoded(f"{path.name}:{one}" if names is None else printable(one) for one in of),
            )


def _refuse(path: Path, x: Array, start: int) -> None:
    bad = misshapen(x)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{path}, row {start + row}: x has length {np.linalg.norm(x[row]):.4g}, and "
            "embeddings of a run have length 1. Without --embeddings, x is what the run embeds."
        )


def _header(file: IO[bytes]) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], bool]:
    """Shape and dtype of an .npy that begins here, and whether it is stored by columns."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, dtype = read(file)
    return (shape, dtype), fortran
