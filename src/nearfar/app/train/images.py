"""Read image files of any size and mode into arrays of one size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nearfar.app.errors import InputError
from nearfar.app.train.deep import EIGHT, FLOAT, LARGEST
from nearfar.app.train.pixels import read_picture, register_formats
from nearfar.app.train.unreadable import FORMATS
from nearfar.app.train.upload import Upload

SIDE = 32
# Pillow recognises these but cannot decode them, or needs another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


@dataclass(frozen=True)
class Fit:
    """The size and channels to which images are converted.

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
        """The fit for a network whose input shape is (c, h, w)."""
        channels, height, width = shape
        if channels not in (1, 3):
            raise InputError(
                f"the run was trained on {channels} channels, but image files have 1 or 3."
            )
        return Fit(width, height, channels)


def read_images(files: Sequence[Path | Upload], fit: Fit) -> tuple[Tensor, list[str]]:
    """Read images, and collect notes about them.

    Returns:
        (n, c, h, w) images, uint8 if all files have 8 bits per channel, else float32 in the unit
        described in `pixels.Picture`; and notes for the user.

    Raises:
        InputError: a file is missing or cannot be read; the message says which and why.
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
    return x, [_depths_note(depths)] if len(depths) > 1 else []


def _depths_note(depths: Counter[str]) -> str:
    """A note on how images of several bit depths are scaled."""
    scaled = ", ".join(
        f"{n:,} {depth} (as it is)" if depth == FLOAT else f"{n:,} {depth} (/ {LARGEST[depth]:,})"
        for depth, n in sorted(depths.items())
    )
    return f"the images have several bit depths, each scaled by its own maximum: {scaled}"


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
