"""Image files of any size and mode as arrays of one size."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nearfar.app.errors import InputError
from nearfar.app.train.deep import EIGHT, FLOAT, LARGEST
from nearfar.app.train.pixels import read_picture
from nearfar.app.train.unreadable import FORMATS

SIDE = 32
# Pillow knows them by name alone, or asks another program.
_NAMED_ONLY = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


@dataclass(frozen=True)
class Fit:
    """What images are made into.

    Attributes:
        width: in pixels.
        height: in pixels.
        channels: 1 for grey, 3 for RGB; None for grey if all images are grey, else RGB.
    """

    width: int
    height: int
    channels: int | None = None

    @staticmethod
    def square(side: int | None) -> "Fit":
        return Fit(side or SIDE, side or SIDE)

    @staticmethod
    def to(shape: tuple[int, ...]) -> "Fit":
        """What a network that takes images of this shape, (c, h, w), expects."""
        channels, height, width = shape
        if channels not in (1, 3):
            raise InputError(
                f"the run was trained on {channels} channels; image files have 1 or 3."
            )
        return Fit(width, height, channels)


def read_images(files: Sequence[Path], fit: Fit) -> tuple[Tensor, list[str]]:
    """Images, and what a reader should know about them.

    Returns:
        (n, c, h, w): uint8 where all files have 8 bits a channel, else float32 of the unit that
        `pixels.Picture` names; and notes.

    Raises:
        InputError: a file that is missing or cannot be read; the message says which and why.
    """
    pictures = [read_picture(file, (fit.width, fit.height), fit.channels) for file in files]
    depths = Counter(picture.depth for picture in pictures)
    arrays = [picture.pixels for picture in pictures]
    if depths.keys() != {EIGHT}:
        arrays = [
            array.astype(np.float32) / LARGEST[EIGHT] if array.dtype == np.uint8 else array
            for array in arrays
        ]
    channels = fit.channels or max(array.shape[0] for array in arrays)
    shape = (channels, fit.height, fit.width)
    x = torch.from_numpy(np.stack([np.broadcast_to(array, shape) for array in arrays]))
    return x, [_of_depths(depths)] if len(depths) > 1 else []


def _of_depths(depths: Counter[str]) -> str:
    """How files of several depths are brought together."""
    scaled = ", ".join(
        f"{n:,} {depth} (as it is)" if depth == FLOAT else f"{n:,} {depth} (/ {LARGEST[depth]:,})"
        for depth, n in sorted(depths.items())
    )
    return f"the images are of several depths, each scaled by its own: {scaled}"


def is_image(path: Path | str) -> bool:
    """By its name, so that one that cannot be read is an error, and not overlooked."""
    path = Path(path)
    return not path.name.startswith(".") and (is_readable(path) or path.suffix.lower() in FORMATS)


def is_readable(path: Path | str) -> bool:
    """Whether its name is that of an image of a format that is read here."""
    return Path(path).suffix.lower() in _readable()


@cache
def _readable() -> frozenset[str]:
    """The endings of the formats that Pillow reads."""
    with suppress(ImportError):  # not required: it brings a decoder of its own
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    read = Image.OPEN.keys() - _NAMED_ONLY | {"MPO"}  # which is opened as JPEG
    return frozenset(ending for ending, form in Image.EXTENSION.items() if form in read)
