"""Read an item given on the command line: an image, a vector, a row of some data, or a text."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nearfar.app.data.arrays import Unreadable, load
from nearfar.app.data.content import Arrays, Content
from nearfar.app.data.images import is_image, read_images
from nearfar.app.data.items import read_glyphs, read_npz
from nearfar.app.data.reads import Reads
from nearfar.app.data.texts import Texts, checked_text
from nearfar.app.errors import InputError
from nearfar.app.names import GLYPHS
from nearfar.app.tables import looks_like_vector, vector


def read_item(address: str, reads: Reads) -> Content:
    """The item at an address, as the only one.

    Args:
        address: an image file, a .npy file with one vector, a vector as text ("0.1 0.2 0.3"), or
            DATA:row, a row of the built-in letters or of an .npz (glyphs:120, vectors.npz:7). For
            an encoder that reads texts, the text itself.
        reads: what the encoder reads.

    Raises:
        InputError: the item cannot be read, or has another shape.
    """
    if reads.texts:
        return Texts([checked_text(address, "an item to compare")])
    shape = reads.shape or ()
    x = _read(address, reads)
    if tuple(x.shape[1:]) != shape:
        raise InputError(
            f"{_shown(address)} has shape {tuple(x.shape[1:])}, but the run was trained on items "
            f"of shape {shape}."
        )
    if x.is_floating_point() and not x.isfinite().all():
        raise InputError(
            f"{_shown(address)} holds NaN, infinity or a number beyond float32. Repair it."
        )
    return Arrays(x)


def _read(address: str, reads: Reads) -> Tensor:
    shape = reads.shape or ()
    source, _, row = address.rpartition(":")
    path = Path(address)
    if source and row.isdecimal() and not _exists(path):
        return _row(source, int(row))
    if path.suffix.lower() == ".npy":
        return _npy(path)
    if is_image(path) or _exists(path):
        if len(shape) != 3:
            raise InputError(f"{address} is an image file, but the run was trained on vectors.")
        return read_images([path], reads.fit)[0]
    if looks_like_vector(address):
        with np.errstate(over="ignore"):  # the caller refuses it
            n = shape[0] if len(shape) == 1 else None
            numbers = vector(address, repr(address), n).astype(np.float32)
        return torch.from_numpy(numbers)[None]
    raise InputError(
        f"no such item: {_shown(address)}. Give an image file, a .npy file, a vector as text "
        f'("0.1 0.2"), or DATA:row ({GLYPHS}:120, vectors.npz:7).'
    )


def _row(source: str, row: int) -> Tensor:
    if source != GLYPHS and Path(source).suffix.lower() != ".npz":
        raise InputError(f"{source}:{row}: DATA:row must name {GLYPHS} or an .npz; got {source}.")
    items = read_glyphs() if source == GLYPHS else read_npz(Path(source), labelled=False)
    n = len(items.names)
    if row >= n:
        raise InputError(f"{source}:{row}: the rows of {source} are 0 to {n - 1}.")
    x: Tensor = items.content.read(torch.tensor([row]))()
    return x


def _exists(path: Path) -> bool:
    """Whether there is a file; a long vector is no possible name of one."""
    try:
        return path.is_file()
    except OSError:
        return False


def _shown(address: str) -> str:
    """The address for messages; of a long one, the beginning and the end."""
    return repr(address) if len(address) <= 200 else f"{address[:40]!r} ... {address[-40:]!r}"


def _npy(path: Path) -> Tensor:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        array = load(path)
    except (Unreadable, MemoryError):
        raise InputError(
            f"{path} is not an .npy file of numbers. Save it with numpy.save."
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 1:
        raise InputError(f"{path} must hold one vector, (d,) numbers.")
    with np.errstate(over="ignore"):  # the caller refuses it
        return torch.from_numpy(array.astype(np.float32))[None]
