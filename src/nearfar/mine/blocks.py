"""A corpus of embeddings, read block by block."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nearfar.engine.budget import block, current_limits
from nearfar.engine.slices import spans
from nearfar.inputs import ArrayLike, batch, lift, tensor

# An array, or arrays one after the other for a corpus that no array holds.
Corpus: TypeAlias = ArrayLike | Iterable[ArrayLike]

# Copies of a block held at the same time.
_BUFFERS = 6


@dataclass(frozen=True, eq=False)
class Blocks:
    """The rows of a corpus, a block at a time; each iteration reads them anew.

    Attributes:
        parts: arrays, one after the other.
        m: how many rows there are; None: not known before all are read.
        like: (n, d) what they are compared with.
        height: how many rows are read at a time.
    """

    parts: Iterable[Any]
    m: int | None
    like: Tensor
    height: int

    @classmethod
    def of(cls, corpus: Corpus, like: Tensor) -> "Blocks":
        """Nothing is read yet.

        Raises:
            TypeError: a corpus that is no array and cannot be read twice.
        """
        height = block(current_limits(), like.device, like.element_size(), _BUFFERS, like.shape[1])
        if hasattr(corpus, "shape"):  # what is sliced like an array need not be one
            return cls((corpus,), int(corpus.shape[0]), like, height)
        if isinstance(corpus, list | tuple) and not all(map(_is_matrix, corpus)):
            array = tensor("corpus", corpus)
            return cls((array,), len(array), like, height)
        if not isinstance(corpus, Iterable):
            raise TypeError(
                "corpus must be an array of shape (m, d), or blocks of shape (b, d) that can be "
                f"read twice, such as a list of arrays; got {type(corpus).__name__}."
            )
        if isinstance(corpus, Iterator):
            raise TypeError(
                f"corpus is read twice, and a {type(corpus).__name__} only once: pass a list of "
                "blocks, an array of numpy.load(file, mmap_mode='r'), or an object whose __iter__ "
                "begins anew."
            )
        return cls(corpus, None, like, height)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of each block, and its rows: (b, d) in float32 or wider, on the device."""
        start = 0
        for given in self.parts:
            part = given if hasattr(given, "shape") else tensor("corpus", given)
            for at in spans(len(part), self.height):
                rows = tensor("corpus", part[at]).to(self.like.device)
                rows = lift("corpus", batch("corpus", rows, like=self.like).detach())
                _refuse_non_finite(rows, start + at.start)
                yield start + at.start, rows
            start += len(part)


def _is_matrix(part: object) -> bool:
    return len(getattr(part, "shape", ())) == 2


def _refuse_non_finite(rows: Tensor, start: int) -> None:
    bad = ~torch.isfinite(rows).all(1)
    if bad.any():
        raise ValueError(
            f"corpus[{start + int(bad.nonzero()[0])}] is not finite, so it is neither near nor "
            "far. Leave such rows out."
        )
