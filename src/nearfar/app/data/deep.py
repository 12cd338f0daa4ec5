"""Read images of more than 8 bits per channel without losing precision."""

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from nearfar.app.data.upload import Upload
from nearfar.app.errors import InputError

Array = npt.NDArray[Any]
Opened = ImageFile.ImageFile

EIGHT, SIXTEEN, THIRTY_TWO, FLOAT = "8-bit", "16-bit", "32-bit", "float"
LARGEST = {EIGHT: 2**8 - 1, SIXTEEN: 2**16 - 1, THIRTY_TWO: 2**32 - 1, FLOAT: 1}
_BIG_ENDIAN = re.compile("(?<=;(?:16|32))B(?=[FS]$)")  # in raw modes of floats and signed integers
_BITS_PER_SAMPLE, _PLANAR, _SAMPLE_FORMAT = 258, 284, 339  # TIFF tags


def depth(file: Path | Upload, image: Opened) -> str:
    """The bit depth of each channel, a key of `LARGEST`; Pillow's mode tells it only for grey.

    Raises:
        InputError: colours of more than 8 bits in a format of which Pillow reads only 8.
    """
    if image.mode == "F":
        return FLOAT
    bits = max(_tag(image, _BITS_PER_SAMPLE))
    if image.mode.startswith("I"):
        sixteen = image.mode != "I" or bits == 16 or image.format in ("PNG", "PPM")
        return SIXTEEN if sixteen else THIRTY_TWO
    if not image.tile:
        return EIGHT
    codec, (raw, *more) = image.tile[0].codec_name, _arguments(image)
    plain = codec == "ppm_plain" and image.mode == "RGB" and more[0] > 255
    planes = codec == "libtiff" and bits == 16 and _tag(image, _PLANAR) == (2,)
    if plain or planes or codec == "SGI16" or (codec == "sgi_rle" and more[-1] == 2):
        raise InputError(
            f"{file} cannot be read: Pillow would keep 8 of its 16 bits per channel. "
            + ("Save it without separate planes." if planes else "Save it as PNG or TIFF.")
        )
    if bits == 16 or str(raw)[:-1].endswith(";16") or (codec == "ppm" and more[0] > 255):
        return SIXTEEN
    return EIGHT


def read_deep(
    image: Opened, found: str, reopen: Callable[[], AbstractContextManager[Opened]]
) -> Array:
    """(h, w) of a grey image, (h, w, 3) of any other, float32; see `pixels.Picture` for the unit.

    Args:
        image: an opened image whose pixels are not loaded yet.
        found: its depth, other than `EIGHT`.
        reopen: opens the same file again.
    """
    if found != SIXTEEN or image.mode.startswith("I"):
        return _read_grey(image, LARGEST[found])
    raw, *more = _arguments(image)
    largest = more[0] if image.format == "PPM" else LARGEST[SIXTEEN]
    clear, mode = image.info.get("transparency"), image.mode
    numbers = _read_16_bit(image, reopen)
    bands: Array = np.divide(numbers, largest, dtype=np.float32)
    if clear is not None:
        bands[(numbers == clear).all(2)] = 1
    if mode == "CMYK":
        inks, black = bands[..., :3], bands[..., 3:]
        bands = (1 - inks) * (1 - black)
    elif bands.shape[2] in (2, 4):  # on white
        colour, alpha = bands[..., :-1], bands[..., -1:]
        if not str(raw).startswith("RGBa"):  # RGBa is already multiplied by alpha
            colour *= alpha
        colour += 1 - alpha
        bands = colour
    return bands[..., 0] if bands.shape[2] == 1 else bands


def _read_grey(image: Opened, largest: int) -> Array:
    """(h, w) float32."""
    if image.tile and image.tile[0].codec_name == "libtiff":
        # libtiff returns native byte order, which Pillow handles for unsigned integers only.
        array = _unpacked(image, lambda raw: _BIG_ENDIAN.sub("N", raw))
    else:
        array = np.asarray(image)
    if image.format == "TIFF" and array.dtype == np.int32 and _tag(image, _SAMPLE_FORMAT)[0] == 1:
        array = array.view(np.uint32)  # unsigned integers that Pillow takes for signed ones
    scaled = np.divide(array, largest, dtype=np.float32)
    clear = image.info.get("transparency")
    return scaled if clear is None else np.where(array == clear, np.float32(1), scaled)


def _read_16_bit(image: Opened, reopen: Callable[[], AbstractContextManager[Opened]]) -> Array:
    """(h, w, bands) uint16 pixels of a 16-bit colour image.

    Pillow returns only the high byte of each number; with the opposite byte order, the low byte.
    """
    if _arguments(image)[0] == "LA;16B":  # two numbers, which fill four bytes
        both = _unpacked(image, lambda _: "RGBA")
        high, low = both[..., ::2], both[..., 1::2]
    else:
        order = "L" if getattr(getattr(image, "tag_v2", None), "prefix", b"MM") == b"II" else "B"
        high = _unpacked(image, lambda raw: _raw_mode(raw, order))
        with reopen() as other:
            low = _unpacked(other, lambda raw: _other_order(_raw_mode(raw, order)))
    numbers = high.astype(np.uint16)
    numbers <<= 8
    numbers |= low
    return numbers


def _unpacked(image: Opened, raw_mode: Callable[[str], str]) -> Array:
    """The pixels of an image, unpacked in another raw mode than the one Pillow chose."""
    tiles = []
    for tile in image.tile:
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        changed = (raw_mode(str(arguments[0])), *arguments[1:])
        if tile.codec_name == "ppm":  # this codec would scale the numbers to 8 bits
            tile = tile._replace(codec_name="raw")
            changed = (changed[0], 0, 1)
        tiles.append(tile._replace(args=changed if isinstance(tile.args, tuple) else changed[0]))
    image.tile = tiles
    return np.asarray(image)


def _raw_mode(raw: str, order: str) -> str:
    """The raw mode that returns the high byte of each number, given the one that Pillow chose."""
    # A raw mode without a bit depth belongs to a single channel or to PPM.
    raw = raw if ";16" in raw else f"{raw};16{order}"
    return raw.replace("RGBa", "RGBA")  # with RGBa, Pillow would divide the colour by alpha


def _other_order(raw: str) -> str:
    native = {"little": "L", "big": "B"}[sys.byteorder]
    order = raw[-1].replace("N", native)
    return raw[:-1] + {"L": "B", "B": "L"}[order]


def _arguments(image: Opened) -> tuple[Any, ...]:
    """The arguments that Pillow passes to the decoder of the first tile."""
    arguments = image.tile[0].args
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _tag(image: Image.Image, tag: int) -> tuple[int, ...]:
    """The values of a TIFF tag; (1,), its default, if it is missing."""
    tags = getattr(image, "tag_v2", None)
    found = 1 if tags is None else tags.get(tag, 1)
    return found if isinstance(found, tuple) else (found,)
