"""Rows of a gallery: embeddings, and whom and what each shows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LENGTH = 0.02  # how far the length of an embedding, which may be saved as float16, is from 1


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows.

    Attributes:
        x: (n, d) float32 embeddings.
        identity: (n,) the name of the identity of each row, UTF-8.
        name: (n,) the name of the item, UTF-8.
    """

    x: Array
    identity: Array
    name: Array

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: "slice | Array") -> "Rows":
        return Rows(self.x[rows], self.identity[rows], self.name[rows])

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.x for part in parts]),
            np.concatenate([part.identity for part in parts]),
            np.concatenate([part.name for part in parts]),
        )

    def save(self, embeddings: BinaryIO, items: BinaryIO) -> None:
        """Write the embeddings to one file, and what they show to another."""
        kinds = [("identity", self.identity.dtype), ("name", self.name.dtype)]
        held = np.empty(len(self), kinds)
        held["identity"], held["name"] = self.identity, self.name
        np.save(embeddings, np.ascontiguousarray(self.x, np.float32), allow_pickle=False)
        np.save(items, held, allow_pickle=False)

    @classmethod
    def mapped(cls, embeddings: Path, items: Path) -> "Rows":
        """Read what was saved; only what is used of it comes into memory.

        Raises:
            OSError: a file is missing or may not be read.
            ValueError: a file holds something else.
        """
        # "c" lets torch take the array; nothing that is written to it reaches the file.
        x = np.load(embeddings, mmap_mode="c", allow_pickle=False)
        held = np.load(items, mmap_mode="c", allow_pickle=False)
        fits = x.ndim == 2 and x.dtype == np.float32 and held.shape == x.shape[:1]
        if not fits or held.dtype.names != ("identity", "name"):
            raise ValueError("the arrays do not fit")
        return cls(x, held["identity"], held["name"])


def misshapen(x: Array) -> Array:
    """(n,) bool: which of these rows have another length than the embeddings of a run."""
    found: Array = ~(np.abs(np.linalg.norm(x, axis=1) - 1) <= _LENGTH)  # NaN is one of them
    return found


def encoded(texts: Iterable[str]) -> Array:
    """(n,) names as UTF-8."""
    # Of no texts, the length would not be known.
    return np.array([text.encode("utf-8", "backslashreplace") for text in texts] or [], "S")


def repacked(parts: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows with `size` at a time, the last fewer."""
    held: list[Rows] = []
    n = 0
    for part in parts:
        while len(part):
            taken, part = part[: size - n], part[size - n :]
            held.append(taken)
            n += len(taken)
            if n == size:
                yield Rows.joined(held)
                held, n = [], 0
    if held:
        yield Rows.joined(held)
