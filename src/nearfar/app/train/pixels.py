"""One image file as an array: of any mode, upright, with as many digits as the file holds."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from nearfar.app.errors import InputError
from nearfar.app.train.deep import EIGHT, depth, read_deep
from nearfar.app.train.unreadable import reason
from nearfar.app.train.upright import keep_orientation_only, upright

Array = npt.NDArray[Any]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R 601, as Pillow's


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of the size that was asked for.

    Attributes:
        pixels: (c, h, w), uint8 of an 8-bit file. Of another one float32: integers divided by the
            largest that their depth can hold, floats as they are.
        depth: a key of `deep.LARGEST`.
    """

    pixels: Array
    depth: str


def read_picture(file: Path, size: tuple[int, int], channels: int | None) -> Picture:
    """The image in a file.

    Args:
        file: of any format and mode that Pillow reads.
        size: width and height to resize it to.
        channels: 1 for grey, 3 for RGB; None for 1 where the image is grey, else 3.

    Raises:
        InputError: it cannot be read, or holds numbers that are not finite; the message says why.
    """
    with _opened(file) as image:
        image.draft(None, size)  # lets JPEG decode at a fraction of its size
        found = depth(file, image)
        if found == EIGHT:
            plain = _plain(image)
            if channels is not None:
                plain = plain.convert("L" if channels == 1 else "RGB")
            planes = [plain]
        else:
            planes = _planes(file, read_deep(image, found, lambda: _opened(file)), channels)
        planes = [upright(plane, image) for plane in planes]
    resized = [plane.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0) for plane in planes]
    arrays = [np.asarray(plane) for plane in resized]
    if found != EIGHT:
        return Picture(np.stack(arrays), found)
    return Picture(arrays[0][None] if arrays[0].ndim == 2 else arrays[0].transpose(2, 0, 1), found)


@contextmanager
def _opened(file: Path) -> Iterator[ImageFile.ImageFile]:
    """An image, and one line about whatever goes wrong while it is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which do not matter here
            with Image.open(file) as image:
                if image.format == "TIFF":
                    keep_orientation_only(image)
                yield image
    except FileNotFoundError:
        raise InputError(f"no such image: {file}") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of a damaged file Pillow's readers raise nearly every kind
        raise InputError(f"{file} cannot be read: {reason(file, error)}") from None


def _plain(image: Image.Image) -> Image.Image:
    """Any mode of 8 bits as L or RGB; what is transparent is put on white."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if grey else "RGB")


def _planes(file: Path, pixels: Array, channels: int | None) -> list[Image.Image]:
    """(h, w) or (h, w, 3) float32 as images of one channel, which Pillow resizes as floats."""
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels @ LUMA
    pixels = np.atleast_3d(pixels)
    bad = ~np.isfinite(pixels)
    if bad.any():
        raise InputError(
            f"{file} holds {pixels[bad][0]} ({bad.sum():,} of {bad.size:,} numbers are not "
            "finite). Replace them, or remove the image."
        )
    return [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(pixels.shape[2])]
