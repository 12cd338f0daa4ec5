"""Image files written byte by byte, from what their formats say: what Pillow is asked to read."""

import struct
import zlib
from itertools import accumulate

import numpy as np


def png16(pixels, colour_type: int, more: bytes = b"") -> bytes:
    """A PNG of (h, w, bands) uint16: colour type 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = pixels.shape[:2]
    header = struct.pack(">LLBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = pixels.astype(">u2").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [chunk(b"IHDR", header), more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name: bytes, data: bytes) -> bytes:
    """One part of a PNG."""
    checksum = struct.pack(">L", zlib.crc32(name + data))
    return struct.pack(">L", len(data)) + name + data + checksum


def tiff(
    pixels,
    photometric: int = 1,
    *,
    order: str = "<",
    planar: bool = False,
    deflate: bool = False,
    extra: int | None = None,
    tags: dict[int, int] | None = None,
) -> bytes:
    """A TIFF of (h, w) or (h, w, bands) numbers of any kind, one strip a plane."""
    height, width, bands = np.atleast_3d(pixels).shape
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    planes = np.atleast_3d(pixels).astype(pixels.dtype.newbyteorder(order))
    planes = planes.transpose(2, 0, 1) if planar else planes[None]
    strips = [plane.tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = [8, *accumulate((len(strip) for strip in strips), initial=8)][1:]
    shorts = {
        258: [8 * pixels.dtype.itemsize] * bands,
        259: [8 if deflate else 1],
        262: [photometric],
        277: [bands],
        284: [2 if planar else 1],
        339: [kind] * bands,
        **({} if extra is None else {338: [extra]}),
        **{tag: [value] for tag, value in (tags or {}).items()},
    }
    longs = {
        256: [width],
        257: [height],
        278: [height],
        273: starts[:-1],
        279: [len(strip) for strip in strips],
    }
    return _tiff_of(strips, starts[-1], shorts, longs, order)


def _tiff_of(strips, directory: int, shorts, longs, order: str) -> bytes:
    directory += directory % 2
    values = {
        **{tag: ("H", 3, v) for tag, v in shorts.items()},
        **{tag: ("L", 4, v) for tag, v in longs.items()},
    }
    beyond = directory + 2 + 12 * len(values) + 4
    entries, tail = b"", b""
    for tag in sorted(values):
        letter, kind, numbers = values[tag]
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            packed, tail = struct.pack(order + "L", beyond + len(tail)), tail + packed
        entries += struct.pack(order + "HHL", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    body = (mark + struct.pack(order + "L", directory) + b"".join(strips)).ljust(directory, b"\0")
    return body + struct.pack(order + "H", len(values)) + entries + bytes(4) + tail


def exif(entries, order: str = "<", tail: bytes = b"") -> bytes:
    """The first directory of EXIF: (tag, type, count, four bytes) each."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    packed = b"".join(struct.pack(order + "HHL", *entry[:3]) + entry[3] for entry in entries)
    start = struct.pack(order + "L", 8) + struct.pack(order + "H", len(entries))
    return b"Exif\0\0" + mark + start + packed + bytes(4) + tail
