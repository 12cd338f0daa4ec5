"""Image files of any size and mode as arrays of one size."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nearfar.errors import InputError
from nearfar.train.data import Items

SIDE = 32
Pixels = npt.NDArray[np.uint8]


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


def read_folder(folder: Path, fit: Fit, *, labelled: bool = True) -> Items:
    """A folder with one subfolder of images per identity.

    Where it need not be `labelled`, loose images will do, whose identities are not known.

    Raises:
        InputError: no subfolders, a subfolder without images, an image that cannot be read.
    """
    identities = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not identities:
        loose = sorted(path for path in folder.iterdir() if is_image(path))
        if loose and not labelled:
            names = [path.name for path in loose]
            return Items(read_images(loose, fit), torch.full((len(loose),), -1), names, ["unknown"])
        raise InputError(
            f"{folder} "
            + ("has images but no subfolders." if loose else "is empty.")
            + " Make one subfolder per identity and put its images there."
        )
    files, identity = [], []
    for index, path in enumerate(identities):
        images = sorted(file for file in path.rglob("*") if is_image(file))
        if not images:
            raise InputError(f"{path} holds no images. Put some there, or remove the folder.")
        files += images
        identity += [index] * len(images)
    return Items(
        x=read_images(files, fit),
        identity=torch.tensor(identity),
        names=[str(file.relative_to(folder)) for file in files],
        identities=[path.name for path in identities],
    )


def read_images(files: Sequence[Path], fit: Fit) -> Tensor:
    """(n, c, h, w) uint8.

    Raises:
        InputError: a file that is missing or damaged; the message names it.
    """
    arrays = [_read(file, fit) for file in files]
    channels = max(array.shape[0] for array in arrays)
    return torch.from_numpy(
        np.stack([np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays])
    )


def is_image(path: Path | str) -> bool:
    """By its name, so that a damaged image is an error and not overlooked."""
    path = Path(path)
    Image.init()
    return path.suffix.lower() in Image.EXTENSION and not path.name.startswith(".")


# What Pillow's readers raise for a damaged file.
_BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, struct.error)


def _read(file: Path, fit: Fit) -> Pixels:
    """(1, h, w) for a grey image, (3, h, w) for any other, or as `fit.channels` says."""
    size = (fit.width, fit.height)
    try:
        with Image.open(file) as image:
            image.draft(None, size)  # lets JPEG decode at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            plain = _flatten(upright)
    except FileNotFoundError:
        raise InputError(f"no such image: {file}") from None
    except (*_BROKEN, Image.DecompressionBombError) as error:
        # Pillow's own text may name the file again, or print an object's address.
        reason = "it is cut off" if "truncated" in str(error) else "it is damaged or no image"
        raise InputError(f"{file} cannot be read: {reason}. Repair or remove it.") from None
    if fit.channels is not None:
        plain = plain.convert("L" if fit.channels == 1 else "RGB")
    resized = plain.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    array = np.asarray(resized, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode as L or RGB; what is transparent is put on white, 16 bits are scaled to 8."""
    if image.mode.startswith(("I", "F")):
        deep = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(float(deep.max(initial=0)), 1e-30)
        return Image.fromarray((deep / top * 255).clip(0, 255).round().astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if grey else "RGB")
