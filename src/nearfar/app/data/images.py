"""Read image files of any size and mode into arrays of one size."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from nearfar.app.data.deep import EIGHT, FLOAT, LARGEST
from nearfar.app.data.fit import Fit
from nearfar.app.data.pixels import Picture, quietly, read_picture, register_formats
from nearfar.app.data.unreadable import FORMATS
from nearfar.app.data.upload import Upload

# Pillow recognises these but cannot decode them, or needs another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def read_images(files: Sequence[Path | Upload], fit: Fit) -> tuple[Tensor, list[str]]:
    """Read images, and collect notes about them.

    Returns:
        (n, c, h, w) images, uint8 if all files have 8 bits per channel, else float32 in the unit
        described in `pixels.Picture`; and notes for the user.

    Raises:
        InputError: a file is missing or cannot be read; the message says which and why.
    """
    with quietly():
        pictures = [read_picture(file, fit) for file in files]
    depths = Counter(picture.depth for picture in pictures)
    channels = fit.channels or max(picture.channels for picture in pictures)
    deep = depths.keys() != {EIGHT}
    arrays = [as_array(picture, channels, deep=deep) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)), depths_notes(depths)


def as_array(picture: Picture, channels: int, *, deep: bool) -> npt.NDArray[Any]:
    """(channels, h, w) uint8, or float32 if `deep`, in the unit described in `pixels.Picture`."""
    pixels = picture.pixels
    if deep and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / LARGEST[EIGHT]
    return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))


def depths_notes(depths: Counter[str]) -> list[str]:
    """A note on how images of several bit depths are scaled, if they are."""
    if len(depths) == 1:
        return []
    scaled = ", ".join(
        f"{n:,} {depth} (as it is)" if depth == FLOAT else f"{n:,} {depth} (/ {LARGEST[depth]:,})"
        for depth, n in sorted(depths.items())
    )
    return [f"the images have several bit depths, each scaled by its own maximum: {scaled}"]


def is_image(path: Path | str) -> bool:
    """Whether a path names an image, so that an unreadable one is an error, not overlooked."""
    path = Path(path)
    return not path.name.startswith(".") and (is_readable(path) or path.suffix.lower() in FORMATS)


def is_readable(path: Path | str) -> bool:
    """Whether the file name ends like one of an image format that is supported."""
    return Path(path).suffix.lower() in _readable()


@cache
def _readable() -> frozenset[str]:
    """The file name endings of the formats that Pillow reads."""
    register_formats()
    read = Image.OPEN.keys() - _NOT_DECODED | {"MPO"}  # opened by the JPEG reader
    return frozenset(ending for ending, form in Image.EXTENSION.items() if form in read)
