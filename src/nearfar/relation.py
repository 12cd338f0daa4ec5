"""Who is positive and who is negative for whom, answered for one block of pairs at a time.

No mask of the whole batch is ever stored: a block's masks are made from the labels when the block
is visited, and dropped with it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nearfar.inputs import ArrayLike
from nearfar.labels import batch_labels, class_ids, refuse, share_label


@dataclass(eq=False)
class Block:
    """Who is similar to whom in one block; everyone else is dissimilar.

    Attributes:
        shape: of the block.
        similar: (r, c) bool, None where no pair of the block is.
        itself: (r, c) bool, pairs of an item with itself, neither similar nor dissimilar; None
            where the block has none.
        device: where masks are made.
    """

    shape: tuple[int, int]
    similar: Tensor | None
    itself: Tensor | None
    device: torch.device

    def masks(self) -> tuple[Tensor, Tensor]:
        """(r, c) bool: who is positive, who is negative."""
        nobody = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        positive = nobody if self.similar is None else self.similar
        return positive, ~nobody if self.hidden is None else ~self.hidden

    @cached_property
    def hidden(self) -> Tensor | None:
        """(r, c) bool, who is no negative; None where everyone is."""
        if self.similar is None or self.itself is None:
            return self.itself if self.similar is None else self.similar
        return self.similar | self.itself


@dataclass(frozen=True, eq=False)
class Relation:
    """Who is positive and who is negative for whom; answers one block at a time.

    Attributes:
        n, m: the number of rows and columns.
        row_labels: (n,) class ids or (n, c) bool multi-labels, from `batch_labels`; None: row i
            is similar to column i and to no other.
        column_labels: likewise for the columns.
        own: (n,) int64, the column that is the row itself, -1 where there is none; None: no row
            meets itself. Declared by the caller, never guessed from equal values.
        symmetric: the columns are the rows; `own` is then 0 .. n - 1.
        one_positive: every row has exactly one positive.
        device: where the data is.
    """

    n: int
    m: int
    device: torch.device
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None
    own: Tensor | None = None
    symmetric: bool = False
    one_positive: bool = False

    def block(self, rows: slice, columns: slice) -> Block:
        """The relation of a slice of rows to a slice of columns."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        itself = self._itself(rows, columns, shape)
        if self.row_labels is None or self.column_labels is None:
            return Block(shape, self._matches(rows, columns, shape), itself, self.device)
        similar = share_label(self.row_labels[rows], self.column_labels[columns])
        if itself is not None:
            similar.masked_fill_(itself, False)
        if self.device.type == "cpu" and not similar.any():  # asking would stall an accelerator
            return Block(shape, None, itself, self.device)
        return Block(shape, similar, itself, self.device)

    def n_positives(self) -> Tensor:
        """(n,) how many columns are similar to each row, itself left out."""
        if self.row_labels is None or self.column_labels is None:
            return (torch.arange(self.n, device=self.device) < self.m).long()
        if self.row_labels.ndim == 2:
            everyone = slice(0, self.m)
            step = max(1, 2**17 // max(self.m, 1))
            starts = range(0, self.n, step)
            blocks = (slice(i, min(i + step, self.n)) for i in starts)
            counts = [self.block(rows, everyone).masks()[0].sum(1) for rows in blocks]
            return torch.cat(counts) if counts else self.row_labels.new_zeros(0, dtype=torch.long)
        ordered = self.column_labels.sort().values
        end = torch.searchsorted(ordered, self.row_labels, right=True)
        count = end - torch.searchsorted(ordered, self.row_labels)
        if self.own is None:
            return count
        if self.symmetric:
            return count - 1
        own_label = self.column_labels[self.own.clamp(min=0)] if self.m else self.own
        return count - ((self.own >= 0) & (own_label == self.row_labels)).long()

    def n_negatives(self) -> Tensor:
        """(n,) how many columns are dissimilar to each row."""
        return self.m - self.n_positives() - self._n_own()

    def _n_own(self) -> Tensor | int:
        return 0 if self.own is None else (self.own >= 0).long()

    def _matches(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Tensor | None:
        """The part of the diagonal that crosses the block."""
        if rows.stop <= columns.start or columns.stop <= rows.start:
            return None
        matches = torch.zeros(shape, dtype=torch.bool, device=self.device)
        matches.diagonal(rows.start - columns.start).fill_(True)
        return matches

    def _itself(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Tensor | None:
        if self.own is None:
            return None
        if self.symmetric:
            return self._matches(rows, columns, shape)
        places = torch.arange(columns.start, columns.stop, device=self.device)
        return self.own[rows, None] == places


def matched(n: int, m: int, device: torch.device) -> Relation:
    """Row i is similar to column i, and dissimilar to every other column."""
    return Relation(n, m, device, one_positive=n <= m)


def within(labels: ArrayLike, x: Tensor) -> Relation:
    """Every row against every other row of the same batch."""
    known = batch_labels(labels, like=x)
    own = torch.arange(len(x), device=x.device)
    return Relation(len(x), len(x), x.device, known, known, own, symmetric=True)


def across(
    labels: ArrayLike,
    x: Tensor,
    reference: Tensor,
    reference_labels: ArrayLike | None,
    reference_self: ArrayLike | None,
) -> Relation:
    """Every row against every row of a reference set.

    Args:
        labels: of the rows.
        x: (n, d) the rows.
        reference: (m, d) the columns.
        reference_labels: of the columns, of the same kind as `labels`.
        reference_self: (n,) integers: which row of the reference is row i itself, -1 for none.
            None: the reference holds no row of the batch.
    """
    if reference_labels is None:
        raise TypeError("reference_labels must be given with reference: one label a row of it.")
    rows = batch_labels(labels, like=x)
    columns = batch_labels(reference_labels, like=reference, name="reference_labels")
    if rows.shape[1:] != columns.shape[1:]:
        raise ValueError(
            f"labels and reference_labels must be of one kind, class ids (n,) or multi-labels "
            f"(n, c) with the same c; got {tuple(rows.shape)} and {tuple(columns.shape)}."
        )
    own = None
    if reference_self is not None:
        own = class_ids(reference_self, like=x, name="reference_self")
        outside = (own < -1) | (own >= len(reference))
        expected = f"be a row of reference, 0 to {len(reference) - 1}, or -1 for none"
        refuse("reference_self", own, outside, expected)
    return Relation(len(x), len(reference), x.device, rows, columns, own)
