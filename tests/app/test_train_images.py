"""What image files hold: their digits, which way up they are, and why some cannot be read."""

import json
import random
import struct
import sys
import types
from itertools import product

import numpy as np
import pytest
import torch
from conftest import SMALL
from image_files import chunk, exif, png16, tiff
from PIL import Image

from nearfar.app.data import images
from nearfar.app.data.content import as_input, fingerprints
from nearfar.app.data.fit import Fit
from nearfar.app.data.images import is_image, read_images
from nearfar.app.data.items import read_data
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.distance import between_rows
from nearfar.evaluate import verification

FEW = ("--steps", "8", "--identities", "6", *SMALL)
SIDE = 8
RANDOM = np.random.default_rng(0)


def deep(*shape) -> np.ndarray:
    return RANDOM.integers(0, 2**16, (SIDE, SIDE, *shape)).astype(np.uint16)


def read(path, content: bytes, channels=None) -> np.ndarray:
    """(c, h, w) of a file with this content, as an encoder gets it."""
    path.write_bytes(content)
    x, _ = read_images([path], Fit(SIDE, SIDE, channels))
    return as_input(x)[0].double().numpy()


GREY, GREY_ALPHA, COLOUR, COLOUR_ALPHA = deep(), deep(2), deep(3), deep(4)


def on_white(pixels) -> np.ndarray:
    colour, alpha = pixels[..., :-1] / 65535, pixels[..., -1:] / 65535
    return colour * alpha + 1 - alpha


def inks(pixels) -> np.ndarray:
    return (1 - pixels[..., :3] / 65535) * (1 - pixels[..., 3:] / 65535)


SIGNED = RANDOM.integers(-(2**15), 2**15, (SIDE, SIDE)).astype(np.int16)
WIDE = RANDOM.integers(0, 2**32, (SIDE, SIDE)).astype(np.uint32)
FLOATS = RANDOM.normal(-3, 5, (SIDE, SIDE)).astype(np.float32)
DEEP = {
    "png grey": (png16(GREY, 0), GREY / 65535),
    "png grey alpha": (png16(GREY_ALPHA, 4), on_white(GREY_ALPHA)),
    "png colour": (png16(COLOUR, 2), COLOUR / 65535),
    "png colour alpha": (png16(COLOUR_ALPHA, 6), on_white(COLOUR_ALPHA)),
    "tiff grey": (tiff(GREY), GREY / 65535),
    "tiff grey MM": (tiff(GREY, order=">"), GREY / 65535),
    "tiff colour": (tiff(COLOUR, 2), COLOUR / 65535),
    "tiff colour MM": (tiff(COLOUR, 2, order=">"), COLOUR / 65535),
    "tiff colour deflate": (tiff(COLOUR, 2, deflate=True), COLOUR / 65535),
    "tiff colour deflate MM": (tiff(COLOUR, 2, deflate=True, order=">"), COLOUR / 65535),
    "tiff planes": (tiff(COLOUR, 2, planar=True), COLOUR / 65535),
    "tiff planes MM": (tiff(COLOUR, 2, planar=True, order=">"), COLOUR / 65535),
    "tiff alpha": (tiff(COLOUR_ALPHA, 2, extra=2), on_white(COLOUR_ALPHA)),
    "tiff premultiplied": (
        tiff(COLOUR_ALPHA, 2, extra=1),
        COLOUR_ALPHA[..., :3] / 65535 + 1 - COLOUR_ALPHA[..., 3:] / 65535,
    ),
    "tiff inks": (tiff(COLOUR_ALPHA, 5), inks(COLOUR_ALPHA)),
    "tiff signed": (tiff(SIGNED), SIGNED / 65535),
    "tiff signed MM": (tiff(SIGNED, order=">"), SIGNED / 65535),
    "tiff 32": (tiff(WIDE), WIDE / (2**32 - 1)),
    "tiff signed 32": (tiff(WIDE.view(np.int32)), WIDE.view(np.int32) / (2**32 - 1)),
    "tiff grey deflate MM": (tiff(GREY, order=">", deflate=True), GREY / 65535),
    "tiff signed deflate MM": (tiff(SIGNED, order=">", deflate=True), SIGNED / 65535),
    "tiff signed 32 deflate MM": (
        tiff(WIDE.view(np.int32), order=">", deflate=True),
        WIDE.view(np.int32) / (2**32 - 1),
    ),
    "tiff float deflate": (tiff(FLOATS, deflate=True), FLOATS),
    "tiff float": (tiff(FLOATS), FLOATS),
    "tiff float MM": (tiff(FLOATS, order=">", deflate=True), FLOATS),
    "ppm": (b"P6 8 8 65535\n" + COLOUR.astype(">u2").tobytes(), COLOUR / 65535),
    "ppm of 10 bits": (
        b"P6 8 8 1023\n" + (COLOUR >> 6).astype(">u2").tobytes(),
        (COLOUR >> 6) / 1023,
    ),
    "pgm": (b"P5 8 8 65535\n" + GREY.astype(">u2").tobytes(), GREY / 65535),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_digit_of_a_deep_image_is_kept(tmp_path, name):
    content, expected = DEEP[name]
    found = read(tmp_path / "x", content)
    right = expected.transpose(2, 0, 1) if expected.ndim == 3 else expected[None]
    assert found.shape == right.shape
    np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["png colour", "tiff colour", "png grey"])
def test_deep_colour_becomes_grey_as_shallow_colour_does(tmp_path, name):
    content, expected = DEEP[name]
    if expected.ndim == 3:
        expected = expected @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(tmp_path / "x", content, 1)[0], expected, rtol=1e-6)
    assert read(tmp_path / "x", content, 3).shape in ((3, SIDE, SIDE), (1, SIDE, SIDE))


def test_what_a_deep_png_calls_transparent_is_white(tmp_path):
    grey, colour = GREY // 2, COLOUR // 2
    clear = read(tmp_path / "g", png16(grey, 0, chunk(b"tRNS", struct.pack(">H", grey[2, 3]))))
    assert clear[0, 2, 3] == 1
    assert (clear == 1).sum() == (grey == grey[2, 3]).sum()
    name = chunk(b"tRNS", struct.pack(">3H", *colour[2, 3].tolist()))
    clear = read(tmp_path / "c", png16(colour, 2, name))
    assert (clear == 1).all(0).sum() == 1
    assert (clear[:, 2, 3] == 1).all()


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_ten_and_twelve_bits_in_sixteen_keep_every_grey_step(tmp_path, bits, ending):
    steps = np.arange(2**bits, dtype=np.uint16).reshape(32, -1)
    if ending == "pgm":
        head = b"P5 %d 32 %d\n" % (steps.shape[1], 2**bits - 1)
        (tmp_path / "x.pgm").write_bytes(head + steps.astype(">u2").tobytes())
    else:
        Image.fromarray(steps).save(tmp_path / f"x.{ending}")
    x, _ = read_images([tmp_path / f"x.{ending}"], Fit(steps.shape[1], 32))
    assert len(x.unique()) == 2**bits


def photos(root, arrays, ending):
    for i, array in enumerate(arrays):
        path = root / f"id{i // 2:02d}" / f"{i % 2}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return str(root)


def auc(items) -> float:
    a, b = torch.triu_indices(len(items.content.x), len(items.content.x), 1)
    x = as_input(items.content.x).flatten(1)
    distance = between_rows(x[a], x[b], "euclidean")
    similar = items.identity[a] == items.identity[b]
    return verification(distance, similar, higher_is_closer=False).auc


def test_a_deep_file_tells_identities_apart_as_well_as_a_shallow_one(tmp_path):
    """Identities of nearly one brightness, 10 bits in 16; floats that differ in brightness."""
    random = np.random.default_rng(1)
    faint = random.integers(0, 1024, (12, 1, 16, 16)) + random.integers(0, 16, (12, 2, 16, 16))
    faint = faint.reshape(24, 16, 16).clip(0, 1023).astype(np.uint16)
    shallow = (faint >> 2).astype(np.uint8)
    bright = np.linspace(-4, 4, 12).repeat(2)[:, None, None] * np.ones((1, 16, 16))
    bright = (bright + random.normal(0, 0.01, bright.shape)).astype(np.float32)
    assert auc(read_data(photos(tmp_path / "8", shallow, "png"))) == 1
    assert auc(read_data(photos(tmp_path / "16", faint, "png"))) == 1
    items = read_data(photos(tmp_path / "f", bright, "tiff"))
    assert auc(items) == 1
    assert items.content.x.min() < -3.9
    assert items.notes == []


def test_files_of_several_depths_are_each_scaled_by_its_own_and_a_line_says_so(tmp_path):
    shallow = (GREY >> 8).astype(np.uint8)
    path = photos(tmp_path / "p", [shallow, GREY] * 6, "png")
    items = read_data(path, Reads(image_size=SIDE))
    assert items.content.x.dtype is torch.float32
    assert torch.equal(items.content.x[0], torch.from_numpy(shallow)[None] / 255)
    np.testing.assert_allclose(items.content.x[1, 0].numpy(), GREY / 65535, rtol=1e-6)
    (note,) = items.notes
    assert "6 16-bit (/ 65,535), 6 8-bit (/ 255)" in note


def test_a_deep_grey_image_fits_a_network_for_colour(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    (tmp_path / "grey.png").write_bytes(png16(grey[..., None], 0))
    x, _ = read_images([tmp_path / "grey.png"], Fit(8, 8, channels=3))
    assert x.shape == (1, 3, 8, 8)
    np.testing.assert_array_equal(x[0, 2].numpy(), (grey / 65535).astype(np.float32))


def test_shallow_images_stay_bytes(tmp_path):
    items = read_data(photos(tmp_path / "p", [(GREY >> 8).astype(np.uint8)] * 4, "png"))
    assert items.content.x.dtype is torch.uint8
    assert items.notes == []


def test_an_8_bit_image_is_known_again_among_deeper_ones():
    bytes_ = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    among = torch.cat([as_input(bytes_), torch.rand(3, 1, 4, 4)])
    known = set(fingerprints(bytes_))
    assert [one in known for one in fingerprints(among)] == [True] * 5 + [False] * 3


def test_a_run_on_deep_images_keeps_their_scale(nearfar, tmp_path):
    """Faint 10-bit images in 16 bits: learned, measured again alike, and told apart one by one."""
    random = np.random.default_rng(2)
    shapes = random.integers(0, 900, (12, 1, 4, 4)).repeat(4, 2).repeat(4, 3)
    pixels = (shapes + random.integers(0, 100, (12, 4, 16, 16))).astype(np.uint16)
    for i, array in enumerate(pixels.reshape(-1, 16, 16)):
        path = tmp_path / "p" / f"id{i // 4:02d}" / f"{i % 4}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    run = tmp_path / "run"
    assert nearfar("train", tmp_path / "p", "--out", run, "--image-size", 16, *FEW).status == 0
    measured = json.loads(nearfar("evaluate", run, "--json").out)
    assert measured["learned"] == json.loads((run / "summary.json").read_text())["test"]["learned"]
    assert measured["learned"]["auc"] > 0.9
    a, b = (tmp_path / "p" / "id03" / f"{i}.png" for i in range(2))
    assert nearfar("verify", run, a, b).status == 0
    assert nearfar("verify", run, a, tmp_path / "p" / "id04" / "0.png").status == 1


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    odd = FLOATS.copy()
    odd[1, 2] = np.nan
    with pytest.raises(InputError, match=r"holds nan \(1 of 64 numbers are not finite\)"):
        read(tmp_path / "x", tiff(odd))


TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x),
}
PLAIN = np.arange(256, dtype=np.uint8).reshape(16, 16)


def orientation(value, order="<"):
    return (0x112, 3, 1, struct.pack(order + "HH", value, 0))


@pytest.mark.parametrize("value", TURNED)
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_orientation_is_turned_upright(tmp_path, value, order):
    Image.fromarray(PLAIN).save(tmp_path / "p.png", exif=exif([orientation(value, order)], order))
    (tmp_path / "t.tiff").write_bytes(tiff(PLAIN, order=order, tags={0x112: value}))
    deep = PLAIN.astype(np.uint16) * 257
    (tmp_path / "d.tiff").write_bytes(tiff(deep, order=order, tags={0x112: value}))
    colour = np.stack([deep] * 3, 2)
    (tmp_path / "c.tiff").write_bytes(tiff(colour, 2, order=order, tags={0x112: value}))
    for name in ("p.png", "t.tiff", "d.tiff", "c.tiff"):
        x, _ = read_images([tmp_path / name], Fit(16, 16, 1))
        found = (255 * as_input(x)).round()[0, 0].numpy()
        np.testing.assert_array_equal(found, TURNED[value](PLAIN), err_msg=name)


def test_a_maker_stored_as_a_fraction_fails_no_photo(tmp_path):
    maker = (0x10F, 5, 1, struct.pack("<L", 40))
    whole = exif([maker, orientation(6)], tail=struct.pack("<LL", 1, 2))
    Image.fromarray(PLAIN).save(tmp_path / "x.jpg", exif=whole, quality=100)
    x, _ = read_images([tmp_path / "x.jpg"], Fit(16, 16))
    assert np.abs(x[0, 0].numpy().astype(int) - TURNED[6](PLAIN).astype(int)).max() < 8


@pytest.mark.parametrize("tag", [0x8769, 0x8825, 0xA005, 0x014A, 0x02BC, 0x8773])
@pytest.mark.parametrize("value", [0, 3, 9, 60000])
def test_no_other_tag_of_a_tiff_matters(tmp_path, tag, value):
    """Such as a directory of further tags that lies where none can be."""
    sound = struct.pack("<HHLL", tag, 3, 1, value)
    negative = struct.pack("<HHLl", tag, 9, 1, -value - 1)
    for deflate, entry in product((False, True), (sound, negative)):
        made = tiff(PLAIN, deflate=deflate, tags={0x112: 6, tag: value})
        assert made.count(sound) == 1
        (tmp_path / "x.tiff").write_bytes(made.replace(sound, entry))
        x, _ = read_images([tmp_path / "x.tiff"], Fit(16, 16))
        np.testing.assert_array_equal(x[0, 0], TURNED[6](PLAIN))


def test_no_other_tag_matters(tmp_path):
    """Tags of every kind, size and place around a sound orientation."""
    draw = random.Random(0)
    kinds = [*range(14), 16, 129, 65535]
    known = [0x10E, 0x10F, 0x110, 0x11A, 0x132, 0x8769, 0x8825, 0x927C, 0xA005]
    for _ in range(300):
        order = draw.choice("<>")
        tags = {draw.choice([*known, draw.randrange(65536)]) for _ in range(draw.randrange(6))}
        entries = [
            (
                tag,
                draw.choice(kinds),
                draw.choice([0, 1, 2, 5, 100, 2**31, 2**32 - 1]),
                struct.pack(order + "L", draw.choice([draw.randrange(300), draw.randrange(2**32)])),
            )
            for tag in tags - {0x112}
        ]
        entries = sorted([*entries, orientation(6, order)])
        made = exif(entries, order, draw.randbytes(draw.randrange(60)))
        Image.fromarray(PLAIN).save(tmp_path / "x.png", exif=made)
        x, _ = read_images([tmp_path / "x.png"], Fit(16, 16))
        np.testing.assert_array_equal(x[0, 0], TURNED[6](PLAIN), err_msg=str(entries))


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
        exif([(0x112, 5, 1, b"\xff\xff\xff\xff")]),
        exif([(0x112, 2, 9, b"six\0")]),
        exif([orientation(77)]),
    ],
)
def test_metadata_that_say_nothing_turn_nothing(tmp_path, made):
    Image.fromarray(PLAIN).save(tmp_path / "x.png", exif=made)
    x, _ = read_images([tmp_path / "x.png"], Fit(16, 16))
    np.testing.assert_array_equal(x[0, 0], PLAIN)


def claims(width, height) -> bytes:
    header = struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def much_text() -> bytes:
    import zlib

    text = b"Comment\0\0" + zlib.compress(b"x" * 2**21)
    return png16(GREY, 0, chunk(b"zTXt", text))


CAUSES = {
    "too large": (claims(13500, 13500), ["182 million pixels", "over the limit of 179 million"]),
    "text": (much_text(), ["a text or colour profile", "1,048,576 bytes", "without its metadata"]),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ["HEIC", "pillow-heif", "JPEG"]),
    "empty": (b"", ["it is empty"]),
    "zeros": (bytes(3000), ["only zeros"]),
    "page": (b"\n<!doctype html><p>Not found", ["it is text", "not an image"]),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    "pdf": (b"%PDF-1.7\n", ["a document: export its pages"]),
    "doubles": (
        tiff(FLOATS.astype(np.float64)),
        ["unsupported kind of TIFF", "32-bit integers or floats"],
    ),
    "cut off": (png16(COLOUR, 2)[:200], ["it is cut off"]),
    "noise": (b"\x01\x02\x03" * 99, ["damaged or not an image"]),
    "planes": (tiff(COLOUR, 2, planar=True, deflate=True), ["16 bits per channel", "planes"]),
    "plain ppm": (b"P3 1 1 65535\n1 2 3\n", ["of its 16 bits per channel", "as PNG or TIFF"]),
}


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_is_named_with_its_way_out(tmp_path, name):
    content, words = CAUSES[name]
    with pytest.raises(InputError) as raised:
        read(tmp_path / "x.png", content)
    assert "x.png cannot be read: " in str(raised.value)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_image(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        read_images([tmp_path / "x.png"], Fit.square(None))


def test_only_formats_that_are_read_are_images():
    assert is_image("a.JPG")
    assert is_image("a.heic")  # named, it is read or refused with the reason
    assert not images.is_readable("a.heic")
    for name in ("a.h5", "a.mpg", "a.eps", "a.txt", "a", ".a.png"):
        assert not is_image(name), name


def test_heic_is_read_where_its_reader_is_installed(monkeypatch):
    registered = []

    def register_heif_opener():
        registered.append(True)
        monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")

    module = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    images._readable.cache_clear()
    try:
        assert images.is_readable("a.heic")
        assert registered
    finally:
        images._readable.cache_clear()
