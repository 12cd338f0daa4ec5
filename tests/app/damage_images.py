"""Image files: damaged ones, and sound ones that are rare."""

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_images
from damage import LINE, SAME, TINY, Arguments, Input, Shelf, damages
from image_files import chunk, exif, png16, tiff
from PIL import Image, PngImagePlugin

FORMATS = {  # of Pillow, with how often bits of such a file are flipped
    "PNG": ("png", {}, 26),
    "JPEG": ("jpg", {}, 26),
    "TIFF": ("tif", {}, 10),
    "TIFF, packed": ("tif", {"compression": "tiff_lzw"}, 6),
    "GIF": ("gif", {}, 5),
    "WebP": ("webp", {}, 5),
    "BMP": ("bmp", {}, 5),
    "JPEG 2000": ("jp2", {}, 5),
    "PPM": ("ppm", {}, 5),
}


def inputs() -> Iterator[Input]:
    for format_, (ending, options, flips) in FORMATS.items():
        kind = f"{format_.partition(',')[0]}, damaged"
        kind = kind if flips > 5 else "other image formats, damaged"
        listed = [*damages(f"image.{ending}", flips)]
        for i, damage in enumerate(listed if flips > 5 else listed[3:-5]):
            whole = saved(pixels(), format_.partition(",")[0].replace(" ", ""), **options)

            def write(
                folder: Path, shelf: Shelf, i=i, damage=damage, whole=whole, ending=ending
            ) -> Arguments:
                return given(damage.done(whole), f"image.{ending}", folder, shelf, i)

            # A WebP and a BMP may say how long they are, and a GIF ends where it likes.
            yield Input(kind, f"{format_}: {damage.name}", write, damage.answer, "image.")
    for name, make in ODD.items():

        def write_odd(folder: Path, shelf: Shelf, name=name, make=make) -> Arguments:
            return twins(*make(), folder, shelf)

        yield Input("images, odd", name, write_odd, SAME, "odd.")
    for name, make_bad in REFUSED.items():

        def write_bad(folder: Path, shelf: Shelf, make=make_bad) -> Arguments:
            content, ending = make()
            return given(content, f"image.{ending}", folder, shelf, 0)

        yield Input("images, odd", name, write_bad, LINE, "image.")


def pixels(bands: int = 3) -> np.ndarray:
    """(20, 24, bands) uint8."""
    image = Image.fromarray(make_images(1, 1, 16)[0]).resize((24, 20))
    grey = np.asarray(image, np.uint8)
    return np.stack([grey, 255 - grey, grey.T.reshape(20, 24), grey // 2 + 100], 2)[..., :bands]


def saved(array: Any, format_: str = "PNG", **options: Any) -> bytes:
    if isinstance(array, np.ndarray):
        array = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    held = io.BytesIO()
    array.save(held, format_, **options)
    return held.getvalue()


def given(content: bytes, name: str, folder: Path, shelf: Shelf, turn: int) -> Arguments:
    """An image to verify, or among those to embed; now and then among those to train on."""
    (folder / "sound.png").write_bytes(saved(pixels()))
    if turn % 4 == 1:
        (folder / "loose").mkdir()
        (folder / "sound.png").rename(folder / "loose" / "sound.png")
        (folder / "loose" / name).write_bytes(content)
        return "embed", shelf.image_run, folder / "loose", "--out", folder / "out" / "e.npz"
    if turn % 16 == 2:
        for number, source in enumerate(sorted(shelf.photos.glob("*/*.*"))):
            place = folder / "photos" / source.parent.name
            place.mkdir(parents=True, exist_ok=True)
            (place / source.name).write_bytes(source.read_bytes())
            if number == 5:
                (place / name).write_bytes(content)
        return "train", folder / "photos", "--out", folder / "out" / "run", *TINY
    (folder / name).write_bytes(content)
    return "verify", shelf.image_run, folder / name, folder / "sound.png", "--json"


def twins(content: bytes, ending: str, plain: np.ndarray, folder: Path, shelf: Shelf) -> Arguments:
    """An odd image, and the plain one that looks the same."""
    (folder / f"odd.{ending}").write_bytes(content)
    (folder / "plain.png").write_bytes(saved(plain))
    odd = folder / f"odd.{ending}"
    return "verify", shelf.image_run, odd, folder / "plain.png", "--json"


Odd = tuple[bytes, str, np.ndarray]  # a file, its ending, and the 8-bit pixels that it shows
ODD: dict[str, Callable[[], Odd]] = {}
REFUSED: dict[str, Callable[[], tuple[bytes, str]]] = {}


def odd(name: str, ending: str, plain: Callable[[], np.ndarray]) -> Callable[..., Any]:
    """Register what makes an odd file that shows what `plain` gives."""

    def keep(make: Callable[[], bytes]) -> Callable[[], bytes]:
        ODD[name] = lambda: (make(), ending, plain())
        return make

    return keep


def grey() -> np.ndarray:
    return pixels(1)[..., 0]


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return (colour * share + 255 * (1 - share)).round().astype(np.uint8)


def black_and_white() -> np.ndarray:
    return np.where(grey() > 120, 255, 0).astype(np.uint8)


def alpha() -> np.ndarray:
    return np.linspace(0, 255, 480).reshape(20, 24).round().astype(np.uint8)


def line(height: int, width: int) -> np.ndarray:
    return np.resize(np.linspace(0, 255, 64).astype(np.uint8), (height, width))


def few_colours() -> Image.Image:
    return Image.fromarray(pixels()).quantize(16)


def quantized() -> np.ndarray:
    return np.asarray(few_colours().convert("RGB"))


def with_transparent_index() -> bytes:
    return saved(few_colours(), transparency=0)


def without_index() -> np.ndarray:
    shown = quantized().copy()
    shown[np.asarray(few_colours()) == 0] = 255
    return shown


def frames() -> list[Image.Image]:
    return [Image.fromarray(255 - pixels()), Image.fromarray(pixels() // 2)]


def of_text(value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", value)
    info.add_itxt("XML:com.adobe.xmp", value)
    return info


def with_exif(entries: Any, order: str = "<", tail: bytes = b"", **more: Any) -> bytes:
    return saved(pixels(), "PNG", exif=exif(entries, order, tail)[6:], **more)


ORIENTATION = (0x112, 3, 1, struct.pack("<HH", 6, 0))

odd("1 bit a pixel", "png", black_and_white)(lambda: saved(Image.fromarray(grey() > 120)))
odd("mode LA", "png", lambda: on_white(pixels(1), alpha()))(
    lambda: saved(np.dstack([grey(), alpha()]))
)
odd("mode P with a transparent index", "png", without_index)(with_transparent_index)
odd("mode P", "png", quantized)(lambda: saved(few_colours()))
odd("mode P as GIF", "gif", quantized)(lambda: saved(few_colours(), "GIF"))
odd("RGBA", "png", lambda: on_white(pixels(), alpha()))(
    lambda: saved(np.dstack([pixels(), alpha()]))
)
odd("RGBA, all of it transparent", "png", lambda: np.full((20, 24), 255, np.uint8))(
    lambda: saved(np.dstack([pixels(), 0 * grey()]))
)
odd("RGBA as WebP", "webp", lambda: on_white(pixels(), alpha()))(
    lambda: saved(np.dstack([pixels(), alpha()]), "WEBP", lossless=True, exact=True)
)
odd("CMYK TIFF", "tif", pixels)(lambda: saved(Image.fromarray(pixels()).convert("CMYK"), "TIFF"))
odd("16-bit grey PNG", "png", grey)(lambda: png16(257 * grey()[..., None].astype(np.uint16), 0))
odd("16-bit colour PNG", "png", pixels)(lambda: png16(257 * pixels().astype(np.uint16), 2))
odd("16-bit RGBA PNG", "png", lambda: on_white(pixels(), alpha()))(
    lambda: png16(257 * np.dstack([pixels(), alpha()]).astype(np.uint16), 6)
)
for order, end in (("<", "little"), (">", "big")):
    odd(f"16-bit grey TIFF, {end} endian", "tif", grey)(
        lambda order=order: tiff(257 * grey().astype(np.uint16), order=order)
    )
    odd(f"16-bit colour TIFF, {end} endian, packed", "tif", pixels)(
        lambda order=order: tiff(257 * pixels().astype(np.uint16), 2, order=order, deflate=True)
    )
    odd(f"float TIFF, {end} endian", "tif", grey)(
        lambda order=order: tiff(np.float32(grey() / 255), order=order)
    )
odd("32-bit TIFF, packed", "tif", grey)(
    lambda: tiff(grey().astype(np.uint32) * 16843009, deflate=True)
)
odd("white is zero", "tif", lambda: 255 - grey())(lambda: tiff(grey(), 0))
for height, width in ((1, 1), (1, 5000), (5000, 1), (2, 3), (1, 2), (3000, 2)):
    odd(f"{height} x {width}, as BMP", "bmp", lambda h=height, w=width: line(h, w))(
        lambda h=height, w=width: saved(Image.fromarray(line(h, w)), "BMP")
    )
odd("animated GIF", "gif", quantized)(
    lambda: saved(few_colours(), "GIF", save_all=True, append_images=frames(), duration=40)
)
odd("animated WebP", "webp", pixels)(
    lambda: saved(pixels(), "WEBP", save_all=True, append_images=frames(), lossless=True)
)
odd("animated PNG", "png", pixels)(
    lambda: saved(pixels(), save_all=True, append_images=frames(), duration=40)
)
odd("animated PNG with a default image", "png", pixels)(
    lambda: saved(pixels(), save_all=True, append_images=frames(), default_image=True)
)
odd("TIFF of three pages", "tif", pixels)(
    lambda: saved(pixels(), "TIFF", save_all=True, append_images=frames())
)
odd("TIFF in tiles of LZW", "tif", pixels)(lambda: saved(pixels(), "TIFF", compression="tiff_lzw"))
odd("interlaced lines of GIF", "gif", quantized)(lambda: saved(few_colours(), "GIF", interlace=1))
odd("a PNG called .jpg", "jpg", pixels)(lambda: saved(pixels()))
odd("a TIFF called .PNG", "PNG", pixels)(lambda: saved(pixels(), "TIFF"))
odd("a GIF called .tif", "tif", quantized)(lambda: saved(few_colours(), "GIF"))
odd("something after the end", "png", pixels)(lambda: saved(pixels()) + b"more" * 100)
odd("an orientation", "png", lambda: np.rot90(pixels(), -1))(lambda: with_exif([ORIENTATION]))
odd("an orientation, other tags damaged", "png", lambda: np.rot90(pixels(), -1))(
    lambda: with_exif([(0x10F, 5, 1, b"\xff\xff\xff\x7f"), ORIENTATION])
)
odd("an orientation of 9", "png", pixels)(
    lambda: with_exif([(0x112, 3, 1, struct.pack("<HH", 9, 0))])
)
TYPES = "bytes text shorts longs rationals signed any signed-shorts signed-longs signed-rationals"
for kind, said in enumerate([*TYPES.split(), "floats", "doubles", "13", "14", "15", "16"], 1):
    odd(f"tags of {said}", "png", pixels)(
        lambda kind=kind: with_exif(
            [(tag, kind, 2**31, b"\xff\xfe\xfd\x7f") for tag in (0x10F, 0x11A, 0x132, 0x8769)]
        )
    )
odd("metadata that are no metadata", "png", pixels)(lambda: saved(pixels(), exif=b"Exif?" * 9))
odd("text with markup and controls", "png", pixels)(
    lambda: saved(pixels(), pnginfo=of_text("<script>\x1b[31m&\u202e\n" * 20))
)
odd("a resolution of 0", "png", pixels)(
    lambda: (
        saved(pixels()).replace(b"IDAT", b"IDAT", 1)[:33]
        + chunk(b"pHYs", struct.pack(">LLB", 0, 0, 1))
        + saved(pixels())[33:]
    )
)
odd("a gamma of 0", "png", pixels)(
    lambda: saved(pixels())[:33] + chunk(b"gAMA", bytes(4)) + saved(pixels())[33:]
)
odd("a colour profile that is none", "png", pixels)(
    lambda: saved(pixels(), icc_profile=b"no profile")
)
odd("unknown tags in a TIFF", "tif", grey)(
    lambda: tiff(grey(), tags={271: 5, 305: 7, 33432: 1, 34675: 9, 65000: 3})
)


def huge_png() -> bytes:
    header = struct.pack(">LLBBBBB", 2**20, 2**20, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def lying_tiff(width: int) -> bytes:
    whole = tiff(grey())
    return whole.replace(
        struct.pack("<HHLL", 256, 4, 1, 24), struct.pack("<HHLL", 256, 4, 1, width)
    )


REFUSED |= {
    "a PNG that claims 10^12 pixels": lambda: (huge_png(), "png"),
    "a TIFF that claims 80 million columns": lambda: (lying_tiff(80_000_000), "tif"),
    "a TIFF wider than its data": lambda: (lying_tiff(48), "tif"),
    "a TIFF of no columns": lambda: (lying_tiff(0), "tif"),
    "a float TIFF with NaN": lambda: (tiff(np.full((4, 4), np.nan, np.float32)), "tif"),
    "a float TIFF with infinity": lambda: (tiff(np.full((4, 4), np.inf, np.float32)), "tif"),
    "a TIFF of doubles": lambda: (tiff(np.ones((4, 4))), "tif"),
    "an SVG called .png": lambda: (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "png"),
    "a PDF called .jpg": lambda: (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "jpg"),
    "an EPS called .png": lambda: (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "png"),
    "a pointer of git-lfs": lambda: (b"version https://git-lfs.github.com/spec/v1\n", "png"),
    "an .npy called .png": lambda: (b"\x93NUMPY\x01\x00v\x00{'descr': '|u1'}", "png"),
    "a PNG with a 3 MB text in 3 KB": lambda: (saved(pixels(), pnginfo=zipped_text()), "png"),
    "HEIC": lambda: (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "heic"),
    "a raw photo": lambda: (b"II*\0\x10\0\0\0CR\x02\0" + bytes(64), "cr2"),
}


def zipped_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 3_000_000, zip=True)
    return info
