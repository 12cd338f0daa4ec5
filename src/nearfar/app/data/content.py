"""What the items of some data hold, as an encoder reads it."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nearfar.doctor.examine import fingerprints as of_bits

SIDE = 96  # the longest side of a thumbnail
NUMBERS = 2**23  # of items that are embedded at a time
COLUMNS = 64  # the most numbers shown of a vector

Batch = Any  # what `Embedder.prepare` takes: a tensor, or a list of texts


class Content(Protocol):
    """What n items hold."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an item: (d,) for a vector, (c, h, w) for an image, () for a text."""

    @property
    def at_once(self) -> int:
        """How many items are embedded at a time."""

    @property
    def ahead(self) -> int:
        """How many batches are read while an earlier one is used."""

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Callable[[], Batch]:
        """Begin to read the items in these rows, (b,); the function that is returned waits."""

    def alike(self, rows: Tensor) -> Tensor:
        """The order of these rows, (n,), in which neighbours take about as long to embed."""

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of these items, one number per channel or column."""

    def raw(self, rows: Tensor) -> Tensor:
        """(n, ...) float32: what the learned distance is compared with."""

    def shown(self, rows: Tensor) -> npt.NDArray[Any]:
        """What a report shows of these items; see `record.Outcome`."""

    def fingerprints(self) -> list[bytes]:
        """16 bytes for each item: equal for equal items, else almost surely not."""

    def hash(self) -> "hashlib._Hash":
        """A new hash of the items, by which a change is noticed."""

    def in_words(self) -> str:
        """For instance "images of 1 x 32 x 32"."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """Vectors or images in memory.

    Attributes:
        x: (n, d) float32 vectors, or (n, c, h, w) images, uint8 from 0 to 255 or float32.
    """

    x: Tensor
    ahead = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def at_once(self) -> int:
        return at_once(self.shape)

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: Tensor) -> Callable[[], Batch]:
        return lambda: self.x[rows]

    def alike(self, rows: Tensor) -> Tensor:
        return torch.arange(len(rows))

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = as_input(self.x[rows])
        deviation, mean = torch.std_mean(x, [0, *range(2, x.ndim)], correction=0)
        return mean, deviation

    def raw(self, rows: Tensor) -> Tensor:
        return as_input(self.x[rows])

    def shown(self, rows: Tensor) -> npt.NDArray[Any]:
        """The first numbers of vectors, or images as small uint8 thumbnails."""
        x = self.x[rows]
        found: npt.NDArray[Any] = (x[:, :COLUMNS] if x.ndim == 2 else thumbnails(x)).numpy()
        return found

    def fingerprints(self) -> list[bytes]:
        return fingerprints(self.x)

    def hash(self) -> "hashlib._Hash":
        digest = hashlib.sha256(str((tuple(self.x.shape), self.x.dtype)).encode())
        digest.update(self.x.contiguous().numpy().tobytes())
        return digest

    def in_words(self) -> str:
        return (
            f"{'vectors' if self.x.ndim == 2 else 'images'} of {' x '.join(map(str, self.shape))}"
        )


@dataclass(frozen=True, eq=False)
class Features:
    """Items of which an encoder that stays as it is has made features, once.

    Attributes:
        content: the items.
        x: (n, features) float32.
    """

    content: Content
    x: Tensor
    at_once = Arrays.at_once
    ahead = Arrays.ahead

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: Tensor) -> Callable[[], Batch]:
        return lambda: self.x[rows]

    def alike(self, rows: Tensor) -> Tensor:
        return torch.arange(len(rows))

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return Arrays(self.x).moments(rows)

    def raw(self, rows: Tensor) -> Tensor:
        return self.content.raw(rows)

    def shown(self, rows: Tensor) -> npt.NDArray[Any]:
        return self.content.shown(rows)

    def fingerprints(self) -> list[bytes]:
        return self.content.fingerprints()

    def hash(self) -> "hashlib._Hash":
        return self.content.hash()

    def in_words(self) -> str:
        return self.content.in_words()


def at_once(shape: tuple[int, ...]) -> int:
    """How many items of a shape are embedded at a time, since a network's activations take memory.

    >>> at_once((1, 32, 32)), at_once((3, 224, 224))
    (512, 55)
    """
    return max(min(NUMBERS // prod(shape), 512), 1)


def as_input(x: Tensor) -> Tensor:
    """The input of an encoder: float32, with uint8 images scaled from 0..255 to 0..1."""
    return x.float() / 255 if x.dtype is torch.uint8 else x


def dtype_of(content: Content) -> str:
    """How items are read, by the first: "uint8" for images of 8 bits, "float32" or "text"."""
    first = content.read(torch.tensor([0]))()
    return str(first.dtype).removeprefix("torch.") if isinstance(first, Tensor) else "text"


def fingerprints(x: Tensor) -> list[bytes]:
    """16 bytes for each item (n, ...): equal for equal bits, else almost surely not.

    An 8-bit image read as float32, since others are deeper, has the fingerprint of its bytes.
    """
    found = of_bits(x)
    if x.ndim == 4 and x.is_floating_point():
        bytes_ = (255 * x).round().clamp(0, 255).to(torch.uint8)
        eight_bit = (as_input(bytes_) == x).flatten(1).all(1).nonzero()[:, 0]
        of_bytes = of_bits(bytes_[eight_bit])
        for row, fingerprint in zip(eight_bit.tolist(), of_bytes, strict=True):
            found[row] = fingerprint
    return found


def thumbnails(x: Tensor) -> Tensor:
    """Images, (n, c, h, w), as small uint8 ones."""
    if x.shape[1] not in (1, 3):
        x = x.float().mean(1, keepdim=True)
    if x.dtype is not torch.uint8:
        low, high = x.min(), x.max()
        x = (x - low) / (high - low).clamp(min=1e-30) * 255
    scale = SIDE / max(x.shape[2:])
    if scale < 1:
        size = [max(round(side * scale), 1) for side in x.shape[2:]]
        x = interpolate(x.float(), size, mode="area")
    return x.round().to(torch.uint8) if x.is_floating_point() else x


def read_ahead(
    content: Content,
    drawn: Iterable[Tensor],
    items_in: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Iterator[tuple[Tensor, Batch]]:
    """What is drawn, with the items in it, of which some are read while earlier ones are used.

    Args:
        content: the content of all items.
        drawn: the rows of each batch, in turn.
        items_in: the items that the rows of a batch stand for.
    """
    waiting: deque[tuple[Tensor, Callable[[], Batch]]] = deque()
    for rows in drawn:
        waiting.append((rows, content.read(items_in(rows))))
        if len(waiting) > content.ahead:
            first, read = waiting.popleft()
            yield first, read()
    for rows, read in waiting:
        yield rows, read()
