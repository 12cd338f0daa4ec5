"""Read an image file of any mode as an array, upright and in full precision."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from nearfar.app.data.deep import EIGHT, depth, read_deep
from nearfar.app.data.fit import Fit
from nearfar.app.data.unreadable import reason
from nearfar.app.data.upload import Upload
from nearfar.app.data.upright import keep_orientation_only, upright
from nearfar.app.errors import InputError

Array = npt.NDArray[Any]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as in Pillow

# Formats in which an image may come from outside. Pillow reads many more, which are seldom used and
# seldom looked at, and one (EPS) by running a program on the file.
UPLOADED = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of the requested size.

    Attributes:
        pixels: (c, h, w), uint8 for an 8-bit file, else float32: integers are divided by the
            largest of their bit depth, floats are kept.
        depth: a key of `deep.LARGEST`.
    """

    pixels: Array
    depth: str

    @property
    def channels(self) -> int:
        return len(self.pixels)


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings about metadata, which do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_picture(file: Path | Upload, fit: Fit) -> Picture:
    """Read an image; not in several threads, unless `quietly` is around all of them.

    Args:
        file: an image of any format and mode that Pillow reads; of an upload, see `UPLOADED`.
        fit: its size and channels; None for 1 if the image is grey, else 3.

    Raises:
        InputError: the file cannot be read or holds non-finite numbers; the message says why.
    """
    with _opened(file) as image:
        if fit.resized is None:
            image.draft(None, fit.size)  # lets JPEG decode at a fraction of its size
        found = depth(file, image)
        if found == EIGHT:
            plain = _plain(image)
            if fit.channels is not None:
                plain = plain.convert("L" if fit.channels == 1 else "RGB")
            planes = [plain]
        else:
            planes = _planes(file, read_deep(image, found, lambda: _opened(file)), fit.channels)
        planes = [upright(plane, image) for plane in planes]
    arrays = [np.asarray(fit.of(plane)) for plane in planes]
    if found != EIGHT:
        return Picture(np.stack(arrays), found)
    return Picture(arrays[0][None] if arrays[0].ndim == 2 else arrays[0].transpose(2, 0, 1), found)


def register_formats() -> None:
    """Let Pillow know all formats that it can read here."""
    with suppress(ImportError):  # optional, since it ships a decoder of its own
        import_module("pillow_heif").register_heif_opener()
    Image.init()


@contextmanager
def _opened(file: Path | Upload) -> Iterator[ImageFile.ImageFile]:
    """Open an image; any error while it is read becomes one line."""
    try:
        with _image(file) as image:
            if image.format == "TIFF":
                keep_orientation_only(image)
            yield image
    except FileNotFoundError:
        raise InputError(f"no such image: {file}") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow raises almost any kind for a damaged file
        raise InputError(f"{file} cannot be read: {reason(file, error)}") from None


def _image(file: Path | Upload) -> ImageFile.ImageFile:
    if isinstance(file, Path):
        return Image.open(file)
    register_formats()
    return Image.open(file.open(), formats=[form for form in UPLOADED if form in Image.OPEN])


def _plain(image: Image.Image) -> Image.Image:
    """Convert any 8-bit mode to L or RGB; transparent pixels are put on white."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if grey else "RGB")


def _planes(file: Path | Upload, pixels: Array, channels: int | None) -> list[Image.Image]:
    """Split (h, w) or (h, w, 3) float32 into images of one channel, which Pillow can resize."""
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
