"""Turn photos upright, even if other metadata are damaged."""

import struct

from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ENTRY = 12  # bytes: tag, type, count, value
_INTEGERS = {1: "B", 3: "H", 4: "L"}  # types of a value, and how they are packed


def upright(plain: Image.Image, read: Image.Image) -> Image.Image:
    """Turn an image as the metadata of the loaded image `read` say."""
    turn = _TURNS.get(orientation(read))
    return plain if turn is None else plain.transpose(turn)


def keep_orientation_only(tiff: Image.Image) -> None:
    """Drop other metadata, which Pillow reads when it turns a TIFF, failing if they are damaged."""
    if not isinstance(tiff.info.get("xmp"), bytes):
        tiff.info.pop("xmp", None)
    tags = tiff.getexif()
    for tag in [tag for tag in tags if tag != ExifTags.Base.Orientation]:
        del tags[tag]


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 (upright) to 8; 1 if there is none."""
    found = _in_exif(image.info.get("exif", b""))
    if found is None:  # elsewhere: TIFF tags, XMP, text of a PNG
        try:
            found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # almost any kind for damaged metadata; the image is fine
            found = 1
    return found


def _in_exif(exif: bytes) -> int | None:
    """Read only the orientation: Pillow's reader gives up at the first damaged tag.

    >>> _in_exif(bytes.fromhex("4d4d002a 00000008 0001 0112 0003 00000001 0006 0000"))
    6
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(order + "L", exif, 4)
    if start + 2 > len(exif):
        return None
    (n,) = struct.unpack_from(order + "H", exif, start)
    for place in range(start + 2, min(start + 2 + n * _ENTRY, len(exif) - _ENTRY + 1), _ENTRY):
        tag, kind = struct.unpack_from(order + "HH", exif, place)
        if tag == ExifTags.Base.Orientation and kind in _INTEGERS:
            return int(struct.unpack_from(order + _INTEGERS[kind], exif, place + 8)[0])
    return None
