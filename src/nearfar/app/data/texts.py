"""Texts as the content of items."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.app.data.content import Batch
from nearfar.app.errors import InputError
from nearfar.app.tables import is_blank
from nearfar.app.text import printable

CHARACTERS = 300  # the most shown of a text
N_GRAMS, COLUMNS = (2, 4), 1024  # of the raw input


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts.

    Attributes:
        texts: n texts.
    """

    texts: Sequence[str]
    at_once = 64
    ahead = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def __len__(self) -> int:
        return len(self.texts)

    def _at(self, rows: Tensor) -> list[str]:
        return [self.texts[row] for row in rows.tolist()]

    def read(self, rows: Tensor) -> Callable[[], Batch]:
        return lambda: self._at(rows)

    def alike(self, rows: Tensor) -> Tensor:
        """By length, so that a batch needs little padding."""
        return torch.tensor([len(text) for text in self._at(rows)]).argsort(stable=True)

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to standardise."""
        return torch.zeros(1), torch.ones(1)

    def raw(self, rows: Tensor) -> Tensor:
        """(n, 1024): how often each sequence of 2 to 4 characters occurs, hashed into columns."""
        from sklearn.feature_extraction.text import HashingVectorizer

        counts = HashingVectorizer(
            analyzer="char_wb",
            ngram_range=N_GRAMS,
            n_features=COLUMNS,
            alternate_sign=False,
            norm=None,
            dtype=np.float32,
        )
        return torch.from_numpy(counts.transform(self._at(rows)).toarray())

    def shown(self, rows: Tensor) -> npt.NDArray[Any]:
        """The beginning of each text."""
        return np.array([_beginning(text) for text in self._at(rows)], dtype=str)

    def fingerprints(self) -> list[bytes]:
        return [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in self.texts]

    def hash(self) -> "hashlib._Hash":
        return hashlib.sha256(b"".join(self.fingerprints()))

    def in_words(self) -> str:
        return "texts"


def checked_text(cell: Any, place: str) -> str:
    """A cell that must hold text, or text from the command line.

    Raises:
        InputError: it is empty, is something else, or cannot be encoded.
    """
    if is_blank(cell):
        raise InputError(f"{place} is empty; it must be a text.")
    if not isinstance(cell, str):
        raise InputError(
            f"{place} is {cell!r:.60}, of type {type(cell).__name__}; it must be a text. "
            "Save the column as text."
        )
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place} is not valid text: {printable(cell)[:60]!r}.") from None
    return cell


def _beginning(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= CHARACTERS else f"{shown[: CHARACTERS - 1]}…"
