"""Why an image file cannot be read, and what to do about it."""

import logging
import re
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from nearfar.app.data.upload import Upload

# Pillow's readers log what they are about to raise.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_HEIC = "HEIC, which needs pillow-heif: install it, or convert to JPEG"
_RAW = "a camera's raw format: export as JPEG or TIFF"
# Image formats that Pillow does not read, by file name ending.
FORMATS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIC),
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), _RAW),
    ".jxl": "JPEG XL: convert to JPEG or PNG",
    ".pdf": "a document: export its pages as images",
    ".svg": "a drawing: export as PNG",
}
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def reason(file: Path | Upload, error: Exception) -> str:
    """Why a file raised this error, and the fix; Pillow's own messages name neither."""
    said = str(error)
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(said)
    if "MAX_TEXT" in said:
        limit = PngImagePlugin.MAX_TEXT_CHUNK
        return (
            f"a text or colour profile in it unpacks to more than {limit:,} bytes (or all together "
            f"to more than {PngImagePlugin.MAX_TEXT_MEMORY:,}), which could fill the memory. Save "
            "it without its metadata."
        )
    if isinstance(error, UnidentifiedImageError):
        return _by_content(file)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    if "truncated" in said.lower():
        return "it is cut off. Repair or remove it."
    return "it is damaged. Repair or remove it."


def _too_large(said: str) -> str:
    """The reason for Pillow's limit on the number of pixels."""
    size = re.search(r"(\d+) pixels", said)
    has = f"{int(size[1]) / 1e6:,.0f} million pixels" if size else "too many pixels"
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return (
        f"it has {has}, over the limit of {limit / 1e6:,.0f} million, which guards against small "
        "files that fill the memory. Make it smaller, or crop it."
    )


def _by_content(file: Path | Upload) -> str:
    """Why Pillow cannot identify a file, judging by its first bytes."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        return "it is empty. Copy it again, or remove it."
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return f"it is {_HEIC}."
    if head.startswith(b"%PDF"):
        return f"it is {FORMATS['.pdf']}."
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer that stands for the file. Run: git lfs pull"
    if head[:4] in _TIFF:
        return (
            "it is damaged or an unsupported kind of TIFF. Supported are integers of 8 or 16 bits, "
            "and grey images of 32-bit integers or floats; pass other numbers as .npz."
        )
    if not head.strip(b"\0"):
        return "it holds only zeros, like an interrupted copy. Copy it again, or remove it."
    if head.lstrip().startswith(b"<"):
        return "it is text, such as a web page, not an image. Download it again, or remove it."
    return "it is damaged or not an image. Repair or remove it."
