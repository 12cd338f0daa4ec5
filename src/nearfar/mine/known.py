"""Rows of a corpus that are known to be no negatives: positives, and others of the same item."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor
from nearfar.labels import refuse

Positives = ArrayLike | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Items:
    """Which rows are of one item.

    Attributes:
        of_queries: (n, p) the items of each query's positives, each once, -1 for none.
        of_rows: (m,) the item of each row, -1 for none.
    """

    of_queries: Tensor
    of_rows: Tensor

    def n_pairs(self) -> int:
        """How many pairs of a query and a row there are of one item."""
        items, counts = torch.unique(self.of_rows, return_counts=True)
        wanted = self.of_queries[self.of_queries >= 0]
        return int(counts[torch.searchsorted(items, wanted)].sum())


@dataclass(frozen=True, eq=False)
class Known:
    """What is known to be no negative.

    Attributes:
        rows: (n, p) the positives of each query, each once, -1 for none.
        items: None: each row is an item of its own.
    """

    rows: Tensor
    items: Items | None

    def mask(self, queries: Tensor, columns: slice) -> Tensor:
        """(b, c) bool, true where a row is known to be no negative.

        Args:
            queries: (b,) which queries.
            columns: which rows of the corpus.
        """
        width = columns.stop - columns.start
        place = self.rows[queries] - columns.start
        place = torch.where((place >= 0) & (place < width), place, width)
        marks = torch.zeros(len(queries), width + 1, dtype=torch.bool, device=place.device)
        marks = marks.scatter_(1, place, True)[:, :-1]
        if self.items is not None:
            of_rows = self.items.of_rows[columns]
            for item in self.items.of_queries[queries][:, :, None].unbind(1):
                marks |= (item == of_rows) & (item >= 0)
        return marks

    def counts(self) -> tuple[int, int]:
        """How many pairs are positives, and how many more of the same item."""
        listed = self.rows >= 0
        if self.items is None:
            return int(listed.sum()), 0
        with_item = self.items.of_rows[self.rows[listed]] >= 0
        return int(listed.sum()), self.items.n_pairs() - int(with_item.sum())


def listed_positives(positives: Positives, queries: Tensor) -> Tensor:
    """(n, p) the positives of each query, each once, -1 for none.

    Raises:
        TypeError: indices that are not integers.
        ValueError: a wrong shape.
    """
    n = len(queries)
    if isinstance(positives, list | tuple) and any(hasattr(each, "__len__") for each in positives):
        known = _padded(positives)
    else:
        known = tensor("positives", positives)  # type: ignore[arg-type]
    known = _whole("positives", known)
    if known.ndim not in (1, 2) or len(known) != n:
        raise ValueError(
            f"positives must have shape ({n},), the positive row of each query, or ({n}, p) with "
            f"several, -1 for none; got {tuple(known.shape)}."
        )
    known = known[:, None] if known.ndim == 1 else known
    return _each_once(known.to(queries.device))


def _padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """(n, p) the lists, filled with -1 at the end."""
    lengths = np.array([len(each) for each in lists])
    flat = [np.asarray(each) for each in lists if len(each)]
    if not flat:
        return torch.full((len(lists), 1), -1)
    listed = _whole("positives", tensor("positives", np.concatenate(flat)))
    known = torch.full((len(lists), int(lengths.max())), -1)
    known[torch.from_numpy(np.arange(known.shape[1]) < lengths[:, None])] = listed.cpu()
    return known


def _each_once(listed: Tensor) -> Tensor:
    """(n, p) sorted, with -1 in place of what comes again."""
    listed = listed.sort(1).values
    again = torch.zeros_like(listed, dtype=torch.bool)
    again[:, 1:] = listed[:, 1:] == listed[:, :-1]
    return listed.masked_fill(again, -1)


def refuse_rows_beyond(known: Tensor, m: int | None) -> None:
    """Refuse positives that the corpus does not have; None: how many it has is not known yet."""
    outside = (known < -1) if m is None else (known < -1) | (known >= m)
    rows = "rows of the corpus" if m is None else f"rows of the corpus, 0 to {m - 1}"
    refuse("positives", known, outside.any(1), f"be {rows}, or -1 for none")


def items_of(ids: ArrayLike | None, known: Tensor, m: int) -> Items | None:
    """The items of rows and queries; None: none are known."""
    if ids is None:
        return None
    of_rows = _whole("ids", tensor("ids", ids)).to(known.device)
    if of_rows.shape != (m,):
        raise ValueError(
            f"ids must have shape ({m},), the item of each row of the corpus; got "
            f"{tuple(of_rows.shape)}."
        )
    refuse("ids", of_rows, of_rows < -1, "be 0 or more, or -1 for none")
    of_queries = torch.full_like(known, -1)
    listed = known >= 0
    of_queries[listed] = of_rows[known[listed]]
    return Items(_each_once(of_queries), of_rows)


def _whole(name: str, given: Tensor) -> Tensor:
    """int64; an empty list, of which torch makes floats, too."""
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype is torch.bool)
    if not whole and given.numel():
        raise TypeError(f"{name} must be integers, -1 for none; got {given.dtype}.")
    return given.to(torch.int64)
