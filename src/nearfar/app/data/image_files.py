"""Image files that are decoded when they are needed, if all of them are too large for memory."""

import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nearfar.app.data.content import (
    SIDE,
    Arrays,
    Content,
    as_input,
    at_once,
    fingerprints,
    read_ahead,
    thumbnails,
)
from nearfar.app.data.deep import EIGHT
from nearfar.app.data.fit import Fit
from nearfar.app.data.images import as_array, depths_notes, read_images
from nearfar.app.data.pixels import Picture, read_picture
from nearfar.app.train.progress import reading
from nearfar.engine.slices import spans

IN_MEMORY = 2**28  # bytes of decoded images
NUMBERS = 2**21  # of pixels that are looked at together
RAW_SIDE = 32  # of the images by which the raw input is compared
MOST_THREADS = 8
Array = npt.NDArray[Any]
Given = TypeVar("Given")
Made = TypeVar("Made")


def read_files(files: Sequence[Path], fit: Fit) -> tuple[Content, list[str]]:
    """The content of image files, in memory if they fit; and notes for the user.

    Raises:
        InputError: a file is missing or cannot be read; the message says which and why.
    """
    if len(files) * (fit.channels or 3) * fit.height * fit.width > IN_MEMORY:
        return examined(files, fit)
    x, notes = read_images(files, fit)
    return Arrays(x), notes


@dataclass
class Pace:
    """How long decoding has taken.

    Attributes:
        decoded: the number of images.
        seconds: the time that took, summed over threads.
        waited: the time for which what uses them has waited.
    """

    decoded: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are decoded by threads whenever they are read.

    Attributes:
        files: their paths.
        fit: their size and channels.
        deep: whether some have more than 8 bits per channel, so that all are read as float32.
        prints: their fingerprints, when all were decoded once.
        hashed: the hash of all pixels then.
        pace: how long decoding has taken since.
    """

    files: Sequence[Path]
    fit: Fit
    deep: bool
    prints: list[bytes]
    hashed: "hashlib._Hash"
    pace: Pace = field(default_factory=Pace)
    ahead = 2

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.fit.channels is not None
        return self.fit.channels, self.fit.height, self.fit.width

    @property
    def at_once(self) -> int:
        return at_once(self.shape)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Tensor) -> Callable[[], Tensor]:
        _silence()
        files = [self.files[row] for row in rows.tolist()]
        return _Reading([_threads().submit(self._decode, file) for file in files], self.pace)

    def alike(self, rows: Tensor) -> Tensor:
        return torch.arange(len(rows))

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        n, mean, squares = 0, torch.zeros(()), torch.zeros(())  # squared deviations, summed
        for x in self._parts(rows):
            x = as_input(x).double().transpose(0, 1).flatten(1)
            more, (variance, there) = x.shape[1], torch.var_mean(x, 1, correction=0)
            apart = there - mean
            squares = squares + more * variance + apart**2 * n * more / (n + more)
            mean = mean + apart * more / (n + more)
            n += more
        return mean.float(), (squares / n).sqrt().float()

    def raw(self, rows: Tensor) -> Tensor:
        """The images, shrunk to a longest side of 32: pixels of large ones do not fit."""
        return self._shrunk(rows, RAW_SIDE)

    def shown(self, rows: Tensor) -> Array:
        x = self._shrunk(rows, SIDE)
        found: Array = thumbnails(x if self.deep else (255 * x).round().to(torch.uint8)).numpy()
        return found

    def fingerprints(self) -> list[bytes]:
        return self.prints

    def hash(self) -> "hashlib._Hash":
        return self.hashed.copy()

    def in_words(self) -> str:
        return f"images of {' x '.join(map(str, self.shape))}, decoded when they are needed"

    def _parts(self, rows: Tensor) -> Iterator[Tensor]:
        """The images in these rows, some at a time."""
        parts = (rows[part] for part in spans(len(rows), max(NUMBERS // prod(self.shape), 1)))
        return (x for _, x in read_ahead(self, parts))

    def _shrunk(self, rows: Tensor, side: int) -> Tensor:
        """(n, c, h, w) float32 images, with a longest side of at most `side`."""
        channels, *sides = self.shape
        scale = min(side / max(sides), 1)
        size = [max(round(length * scale), 1) for length in sides]
        # Pieces made between the large parts would keep memory from being used again.
        found, done = torch.empty(len(rows), channels, *size), 0
        for x in self._parts(rows):
            x = as_input(x)
            found[done : done + len(x)] = interpolate(x, size, mode="area") if scale < 1 else x
            done += len(x)
        return found

    def _decode(self, file: Path) -> tuple[Array, float]:
        """One image, and how long that took."""
        began = perf_counter()
        array = as_array(read_picture(file, self.fit), self.shape[0], deep=self.deep)
        return array, perf_counter() - began


class _Reading:
    """Images that are being decoded; a call waits for them."""

    def __init__(self, images: list["Future[tuple[Array, float]]"], pace: Pace) -> None:
        self._images, self._pace = images, pace

    def __call__(self) -> Tensor:
        began = perf_counter()
        found = [image.result() for image in self._images]
        self._pace.waited += perf_counter() - began
        self._pace.decoded += len(found)
        self._pace.seconds += sum(seconds for _, seconds in found)
        return torch.from_numpy(np.stack([array for array, _ in found]))

    def __del__(self) -> None:
        # After Ctrl-C nobody waits for them, but the threads would finish them before the end.
        for image in self._images:
            image.cancel()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What decoding a file has shown: its fingerprint by the number of channels it may be given."""

    picture: Picture
    prints: dict[int, bytes]


def examined(files: Sequence[Path], fit: Fit) -> tuple[ImageFiles, list[str]]:
    """The content of image files, each of which is decoded once to learn about it.

    Raises:
        InputError: a file is missing or cannot be read; the message says which and why.
    """
    depths: Counter[str] = Counter()
    prints: list[dict[int, bytes]] = []
    guess, channels = _Hash(len(files), fit), fit.channels or 1
    for seen in _in_turn(lambda file: _see(file, fit), files, "reading"):
        depths[seen.picture.depth] += 1
        prints.append(seen.prints)
        channels = max(channels, seen.picture.channels)
        guess.add(seen.picture)
    deep = depths.keys() != {EIGHT}
    if not guess.fits(channels, deep=deep):  # the first image is not like all others
        guess = _Hash(len(files), fit, channels, deep)
        for picture in _in_turn(lambda file: read_picture(file, fit), files, "comparing"):
            guess.add(picture)
    chosen = [found[channels] for found in prints]
    found = ImageFiles(files, replace(fit, channels=channels), deep, chosen, guess.of)
    return found, depths_notes(depths)


class _Hash:
    """The hash of images in memory, as `Arrays.hash` has it, one after the other.

    Args:
        n: the number of images.
        fit: their size.
        channels: those of all images together; None: those of the first.
        deep: whether they are float32; None: as the first.
    """

    def __init__(
        self, n: int, fit: Fit, channels: int | None = None, deep: bool | None = None
    ) -> None:
        self.of = hashlib.sha256()
        self._n, self._fit, self._channels, self._deep = n, fit, channels, deep
        self._begun = False

    def add(self, picture: Picture) -> None:
        if not self._begun:
            self._begin(picture)
        assert self._channels is not None
        if picture.channels <= self._channels:
            array = as_array(picture, self._channels, deep=bool(self._deep))
            self.of.update(array.tobytes())

    def fits(self, channels: int, *, deep: bool) -> bool:
        return (self._channels, self._deep) == (channels, deep)

    def _begin(self, picture: Picture) -> None:
        self._begun = True
        self._channels = self._channels or self._fit.channels or picture.channels
        self._deep = picture.depth != EIGHT if self._deep is None else self._deep
        shape = (self._n, self._channels, self._fit.height, self._fit.width)
        self.of.update(str((shape, torch.float32 if self._deep else torch.uint8)).encode())


def _see(file: Path, fit: Fit) -> _Seen:
    picture = read_picture(file, fit)
    possible = {fit.channels} if fit.channels else {picture.channels, 3}
    prints = {}
    for channels in possible:
        array = np.array(as_array(picture, channels, deep=False))
        prints[channels] = fingerprints(torch.from_numpy(array)[None])[0]
    return _Seen(picture, prints)


def _in_turn(
    make: Callable[[Given], Made], of: Sequence[Given], what: str, ahead: int = 4 * MOST_THREADS
) -> Iterator[Made]:
    """What threads make of each, in order, a few ahead; shows how far it is."""
    _silence()
    waiting: deque[Future[Made]] = deque()
    try:
        with reading(what, len(of)) as advance:
            for one in of:
                waiting.append(_threads().submit(make, one))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
                    advance()
            while waiting:
                yield waiting.popleft().result()
                advance()
    finally:
        for future in waiting:
            future.cancel()


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads that decode: Pillow lets others run meanwhile."""
    return ThreadPoolExecutor(n_threads(), thread_name_prefix="nearfar-decoding")


@cache
def n_threads() -> int:
    mine = getattr(os, "sched_getaffinity", None)
    return min(len(mine(0)) if mine else os.cpu_count() or 1, MOST_THREADS)


def _silence() -> None:
    """Ignore warnings about metadata; only the main thread may change what is ignored."""
    warnings.filterwarnings("ignore", module=r"PIL\b|nearfar\.app\.train\.(deep|pixels|upright)")
