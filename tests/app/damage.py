"""Damaged and odd inputs, each with a name that says what was done: what they are made of.

`damage_images.py` and its neighbours list them; `test_damage.py` feeds each to the command that a
user would give it to. What is random is seeded by the name of the input, so that it is always the
same.
"""

import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SMALL

LINE = "line"  # one line that says what is wrong
READ = "read"  # read, and used
SAME = "same"  # read as the plain input beside it is
EITHER = "either"  # read, or a line: what a flipped bit hits decides

TINY = ("--steps", "2", "--identities", "8", "--far", "0.2", *SMALL)


@dataclass(frozen=True)
class Shelf:
    """Sound inputs that the others are made from; none of them is ever changed.

    Attributes:
        photos: a folder of images, a subfolder an identity.
        vectors: an .npz.
        pairs: a table of pairs of vectors.
        image_run: trained on `photos`.
        vector_run: trained on `vectors`.
    """

    photos: Path
    vectors: Path
    pairs: Path
    image_run: Path
    vector_run: Path


Arguments = Sequence[Any]  # of the command line
Write = Callable[[Path, Shelf], Arguments]


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        kind: the row of the table in docs/results.md that counts it.
        name: what was done.
        write: puts it into an empty folder and returns the command that is given it.
        answer: what that must come to.
        culprit: a word of the line that it may come to.
    """

    kind: str
    name: str
    write: Write
    answer: str
    culprit: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Damage:
    """Something that happens to the bytes of a file."""

    name: str
    answer: str
    done: Callable[[bytes], bytes]


def damages(file: str, flips: int, *, cut: str = EITHER) -> Iterator[Damage]:
    """What may happen to any file.

    Args:
        file: its name, which seeds what is random.
        flips: how often bits are flipped.
        cut: what a file that is cut off comes to.
    """
    yield Damage("empty", LINE, lambda whole: b"")
    yield Damage("its first byte", LINE, lambda whole: whole[:1])
    yield Damage("its first 8 bytes", LINE, lambda whole: whole[:8])
    for tenths in (1, 3, 5, 7, 9):
        yield Damage(
            f"its first {tenths}/10", cut, lambda whole, t=tenths: whole[: len(whole) * t // 10]
        )
    yield Damage("without its last byte", EITHER, lambda whole: whole[:-1])
    for i in range(flips):
        bits = (1, 1, 1, 8, 64)[i % 5]
        name = f"{bits} bits flipped, {i}"
        yield Damage(name, EITHER, lambda whole, b=bits, n=name: flipped(whole, b, f"{file} {n}"))
    yield Damage("zeros", LINE, lambda whole: bytes(len(whole)))
    yield Damage("noise", LINE, lambda whole: random(file).bytes(len(whole)))
    yield Damage("a web page", LINE, lambda whole: b"<!DOCTYPE html><title>404</title>")
    yield Damage("100,000 brackets", LINE, lambda whole: b"[" * 100_000)
    yield Damage("its middle zeroed", EITHER, _without_its_middle)
    yield Damage("followed by noise", EITHER, lambda whole: whole + random(file).bytes(100))


def flipped(whole: bytes, bits: int, seed: str) -> bytes:
    """Half of the flips hit the first 128 bytes, where most formats say what they hold."""
    draw, changed = random(seed), bytearray(whole)
    end = min(128, len(whole)) if draw.random() < 0.5 else len(whole)
    for place, bit in zip(draw.integers(0, end, bits), draw.integers(0, 8, bits), strict=True):
        changed[place] ^= 1 << int(bit)
    return bytes(changed)


def _without_its_middle(whole: bytes) -> bytes:
    third = len(whole) // 3
    return whole[:third] + bytes(third) + whole[2 * third :]


def copied(run: Path, folder: Path) -> Path:
    """A run that may be damaged."""
    return Path(shutil.copytree(run, folder / "run"))


def using(turn: int, shelf: Shelf, data: Path, commands: Sequence[str]) -> Arguments:
    """One of the commands that take data, each in its turn."""
    run = shelf.image_run if data.is_dir() else shelf.vector_run
    out = data.parent / "out"
    return {
        "train": ("train", data, "--out", out / "run", *TINY),
        "sweep": ("sweep", data, "--out", out / "sweep", "--steps", 1, "--embedding-dim", 4),
        "evaluate": ("evaluate", run, data, "--json"),
        "embed": ("embed", run, data, "--out", out / "e.npz"),
        "doctor": ("doctor", data, "--json"),
    }[commands[turn % len(commands)]]
