"""Files, identities and columns with names that something might stumble over."""

import os
from collections.abc import Iterator
from pathlib import Path

from conftest import make_images
from damage import EITHER, LINE, READ, TINY, Arguments, Input, Shelf
from PIL import Image

NAMES = {
    "no UTF-8": b"caf\xe9",
    "half a character of UTF-8": b"a\xe2\x82",
    "a line end": b"one\ntwo",
    "a carriage return": b"one\rtwo",
    "a tab": b"one\ttwo",
    "250 bytes": b"n" * 246,
    "240 bytes of Chinese": "漢".encode() * 80,
    "single quotes": b"it's",
    "double quotes": b'say "so"',
    "backslashes": b"a\\b",
    "markup": b"<script>alert(1)<!--",
    "an entity": b"&lt;&amp;",
    "text that runs to the left": "\u202eabc".encode(),
    "Hebrew": "שלום".encode(),
    "no width": "a\u200b\u2060".encode(),
    "a line end of Unicode": "a\u2028b".encode(),
    "an escape for terminals": b"\x1b[31mred\x1b]0;title\x07",
    "a family": "👨‍👩‍👧‍👦".encode(),
    "an accent apart": "e\u0301".encode(),
    "spaces around": b"  a  ",
    "a leading minus": b"--help",
    "a leading plus": b"+a",
    "a trailing dot": b"a.",
    "a colon and a number": b"a:3",
    "a star": b"*?[a]",
    "a format": b"%s%n{0}{x!r}",
    "a dollar": b"$HOME`id`",
    "a hash": b"#a",
    "DEL": b"a\x7f",
    "C1 controls": "a\u009b31m".encode(),
    "a word of rich": b"[bold]a[red]",
    "a private letter": "\ue000\U0010ffff".encode(),
}


def inputs() -> Iterator[Input]:
    for turn, (name, raw) in enumerate(NAMES.items()):

        def write_images(folder: Path, shelf: Shelf, raw=raw, turn=turn) -> Arguments:
            photos = named_photos(folder / "photos", raw)
            out = folder / "out"
            if turn % 2:
                return "train", photos, "--out", out / "run", *TINY, *["--report"] * (turn % 8 == 1)
            return "evaluate", shelf.image_run, photos, "--json"

        def write_file(folder: Path, shelf: Shelf, raw=raw) -> Arguments:
            image = Path(os.fsdecode(os.fsencode(folder) + b"/" + raw + b".png"))
            Image.fromarray(make_images(1, 1)[0]).save(image)
            return "verify", shelf.image_run, image, image, "--json"

        def write_out(folder: Path, shelf: Shelf, raw=raw) -> Arguments:
            out = Path(os.fsdecode(os.fsencode(folder) + b"/" + raw + b".npz"))
            return "embed", shelf.vector_run, shelf.vectors, "--out", out

        def write_data(folder: Path, shelf: Shelf, raw=raw) -> Arguments:
            data = Path(os.fsdecode(os.fsencode(folder) + b"/" + raw + b".npz"))
            data.write_bytes(shelf.vectors.read_bytes())
            return "train", data, "--out", folder / "out" / "run", *TINY

        yield Input("names", f"{name}, of an identity and an image", write_images, READ, "")
        others = (
            ("an image to verify", write_file, READ),
            ("--out", write_out, READ if len(raw) < 240 else EITHER),
            ("DATA", write_data, READ if raw.decode(errors="ignore").encode() == raw else LINE),
        )
        for what, write, answer in others if turn == 0 else [others[turn % 3]]:
            yield Input("names", f"{name}, of {what}", write, answer, "")


def named_photos(root: Path, raw: bytes) -> Path:
    """Identities, the first of which and its first image have this name."""
    for i, pixels in enumerate(make_images()):
        identity, item = divmod(i, 4)
        folder = os.fsencode(root) + b"/" + (raw if identity == 0 else b"id%d" % identity)
        name = raw if item == 0 else b"%d" % item
        path = Path(os.fsdecode(folder + b"/" + name + b".png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root
