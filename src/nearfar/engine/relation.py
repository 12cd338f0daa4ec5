"""Which pairs are positive and which negative, answered for one block of pairs at a time.

No mask of the whole batch is ever stored: the masks of a block are made from the labels when it is
visited, and freed with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nearfar.engine.pair_sets import Diagonal, Listed, Masked, OneEach, PairSet
from nearfar.engine.slices import joined, part, spans
from nearfar.inputs import ArrayLike, readable
from nearfar.labels import batch_labels, class_ids, refuse, share_label


@dataclass(eq=False)
class Block:
    """The similar pairs of one block; all others are dissimilar.

    Attributes:
        shape: of the block, (r, c).
        positives: the similar pairs; None if there are none.
        selves: the pairs of an item with itself, neither similar nor dissimilar; None: none.
        device: where masks are made.
    """

    shape: tuple[int, int]
    positives: PairSet | None
    selves: PairSet | None
    device: torch.device

    @cached_property
    def similar(self) -> Tensor | None:
        """(r, c) bool, the positive pairs; None if there are none."""
        return None if self.positives is None else self.positives.mask()

    @cached_property
    def hidden(self) -> Tensor | None:
        """(r, c) bool, the pairs that are not negative; None if all are negative."""
        if self.selves is None or self.similar is None:
            return self.similar if self.selves is None else self.selves.mask()
        return self.similar | self.selves.mask()

    def masks(self) -> tuple[Tensor, Tensor]:
        """(r, c) bool: the positive pairs, and the negative pairs."""
        none = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        positive = none if self.similar is None else self.similar
        return positive, ~none if self.hidden is None else ~self.hidden


@dataclass(eq=False)
class ByRow:
    """Listed pairs, ordered by row.

    Attributes:
        order: the place of each in the list; None: the list is in this order, as miners give it.
        row: (k,) ascending.
        column: (k,).
    """

    order: Tensor | None
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, row: Tensor, column: Tensor) -> "ByRow":
        if readable(row) and bool((row.diff() >= 0).all()):
            return cls(None, row.contiguous(), column.contiguous())
        order = row.argsort(stable=True)
        return cls(order, row[order], column[order])

    def sorted(self, values: Tensor) -> Tensor:
        """What is in the order of the list, in this order."""
        return values if self.order is None else values[self.order]

    def listed(self, values: Tensor) -> Tensor:
        """What is in this order, in that of the list."""
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.order, values)


@dataclass(eq=False)
class PairList:
    """The only pairs that count, where these are listed.

    Attributes:
        positive: (p,) and (p,) int64, the rows and columns of similar pairs, in any order.
        negative: (q,) and (q,), those of dissimilar pairs.
        check: refuses pairs that a relation of all its pairs does not allow, where the rows of
            other processes must be known first; None: they are checked.
    """

    positive: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]
    check: Callable[["Relation"], None] | None = None

    def block(
        self, rows: slice, columns: slice, shape: tuple[int, int], device: torch.device
    ) -> Block:
        """The pairs of a block; all others are neither similar nor dissimilar."""
        near, far = (self._within(kind, rows, columns) for kind in self.by_row)
        neither = torch.ones(shape, dtype=torch.bool, device=device)
        for row, column in (near, far):
            neither[row, column] = False
        return Block(shape, Listed(shape, *near) if len(near[0]) else None, Masked(neither), device)

    @cached_property
    def by_row(self) -> tuple[ByRow, ByRow]:
        """The similar pairs and the dissimilar ones, ordered by row."""
        return ByRow.of(*self.positive), ByRow.of(*self.negative)

    @staticmethod
    def _within(pairs: ByRow, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([rows.start, rows.stop], device=pairs.row.device)
        start, stop = torch.searchsorted(pairs.row, ends).tolist()
        row, column = pairs.row[start:stop], pairs.column[start:stop]
        here = (column >= columns.start) & (column < columns.stop)
        return row[here] - rows.start, column[here] - columns.start


@dataclass(eq=False)
class Items:
    """Which items rows and columns are, where each row has one match.

    A row and a column that have an id in common are no negative pair, whatever else they are.

    Attributes:
        rows: (n, k) int64, the ids of each row, 0 or more, -1 for none.
        columns: (m, k) int64, those of each column.
    """

    rows: Tensor
    columns: Tensor

    @cached_property
    def repeat(self) -> bool:
        """Whether an id occurs in two columns, as far as may be read."""
        return not readable(self.columns) or bool(repeat_in(self.columns))

    def shared(self, rows: slice, columns: slice) -> Tensor:
        """(r, c) bool, which rows and columns of a block have an id in common."""
        a, b = self.rows[rows], self.columns[columns]
        found = torch.zeros(len(a), len(b), dtype=torch.bool, device=a.device)
        for of_rows in a.unbind(1):
            for of_columns in b.unbind(1):
                found |= (of_rows[:, None] == of_columns) & (of_columns != -1)
        return found


def repeat_in(ids: Tensor) -> Tensor:
    """(), bool: whether an id is in two rows of (m, k); -1 is none."""
    ordered, order = ids.flatten().sort(stable=True)
    row = order // ids.shape[1]
    return ((ordered.diff() == 0) & (row.diff() != 0) & (ordered[1:] != -1)).any()


# Which side of a comparison is the same on all processes that it is spread over, as proxies and the
# rows of a reference are; None: neither.
Shared = Literal["rows", "columns"] | None

# If at most one pair in _FEW is positive, a list is cheaper than a mask, except in blocks of up to
# _SMALL pairs.
_FEW = 32
_SMALL = 2**14
# A relation of so few pairs has one mask, from which all its blocks are cut.
_WHOLE = 2**16


@dataclass(eq=False)
class Relation:
    """Which pairs of rows and columns are positive or negative; answers one block at a time.

    Attributes:
        n, m: the number of rows and columns.
        row_labels: (n,) class ids or (n, c) bool multi-labels, from `batch_labels`; None: each
            row is similar to exactly one column, which is `match` or, without it, column i for
            row i.
        column_labels: the same for the columns.
        declared: (n,) int64, the column that is the row itself, -1 for none; None: the
            caller named none. Never guessed from equal values.
        symmetric: the columns are the rows themselves.
        one_positive: every row has exactly one positive.
        match: (n,) int64, the column of this positive; given instead of labels.
        items: what keeps a row and a column that is not its match from being negative; only for
            rows without labels.
        first: the column that is row 0, or its match, where those of the other rows follow it; then
            `declared` or `match` say the same. None: there is no such order.
        shared: which side is the same on all processes.
        listed: the only pairs that count; given instead of labels.
        device: where the data is.
    """

    n: int
    m: int
    device: torch.device
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None
    declared: Tensor | None = None
    symmetric: bool = False
    one_positive: bool = False
    match: Tensor | None = None
    items: Items | None = None
    listed: PairList | None = None
    first: int | None = None
    shared: Shared = None

    @cached_property
    def own(self) -> Tensor | None:
        """(n,) the column that is the row itself, -1 for none; None: the columns hold no row."""
        return torch.arange(self.n, device=self.device) if self.symmetric else self.declared

    def block(self, rows: slice, columns: slice) -> Block:
        """The relation of a slice of rows to a slice of columns."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        if self.listed is not None:
            return self.listed.block(rows, columns, shape, self.device)
        selves = self._selves(rows, columns, shape)
        positives = self._positives(rows, columns, shape, selves)
        return Block(shape, positives, selves, self.device)

    @property
    def by_class(self) -> bool:
        """Whether rows meet each other by class: both ends of a pair have as many positives."""
        return self.symmetric and self.row_labels is not None and self.row_labels.ndim == 1

    def n_positives(self) -> Tensor:
        """(n,) how many columns are similar to each row, not counting itself."""
        return self._n_positives

    @cached_property
    def _n_positives(self) -> Tensor:
        if self.listed is not None:
            return torch.bincount(self.listed.positive[0], minlength=self.n)
        if self.match is not None:
            return torch.ones_like(self.match)
        if self.row_labels is None or self.column_labels is None:
            return (torch.arange(self.n, device=self.device) < self.m).long()
        if self.n * self.m <= _WHOLE:
            return self._whole.sum(1)
        if self.row_labels.ndim == 2:
            return self._count(lambda rows, columns: self.block(rows, columns).masks()[0])
        ordered = self.column_labels.sort().values
        end = torch.searchsorted(ordered, self.row_labels, right=True)
        count = end - torch.searchsorted(ordered, self.row_labels)
        if self.symmetric:
            return count - 1
        own = self.declared
        if own is None:
            return count
        own_label = self.column_labels[own.clamp(min=0)] if self.m else own
        return count - ((own >= 0) & (own_label == self.row_labels)).long()

    def n_negatives(self) -> Tensor:
        """(n,) how many columns are dissimilar to each row."""
        if self.listed is not None:
            return torch.bincount(self.listed.negative[0], minlength=self.n)
        return self.m - self._n_own() - self.n_positives()

    def n_pairs(self) -> tuple[int, int]:
        """How many pairs are similar and how many dissimilar. Stalls an accelerator."""
        if self.listed is not None:
            return len(self.listed.positive[0]), len(self.listed.negative[0])
        similar, own = int(self.n_positives().sum()), self._n_own()
        n_own = own * self.n if isinstance(own, int) else int(own.sum())
        return similar, self.n * self.m - n_own - similar

    def _n_own(self) -> Tensor | int:
        if self.items is not None and self.items.repeat:
            return self._n_shared
        if self.declared is None:
            return int(self.symmetric)
        return (self.declared >= 0).long()

    @cached_property
    def _n_shared(self) -> Tensor:
        """(n,) how many columns have an id of each row and are not its match."""
        return self._count(lambda rows, columns: self._shared(rows, columns).mask())

    def _count(self, mask: Callable[[slice, slice], Tensor]) -> Tensor:
        """(n,) how many pairs of each row are marked, from the mask of a slice of each side."""
        # Small enough for the cache of a CPU; elsewhere each block costs a few launches.
        step = max(1, (2**17 if self.device.type == "cpu" else 2**26) // max(self.m, 1))
        counts = [mask(rows, slice(0, self.m)).sum(1) for rows in spans(self.n, step)]
        return joined(counts, torch.zeros(0, dtype=torch.int64, device=self.device))

    def _shared(self, rows: slice, columns: slice) -> Masked:
        """The pairs that have an id in common, without those of a row and its match."""
        assert self.items is not None
        shared = self.items.shared(rows, columns)
        match = self._positives(rows, columns, (shared.shape[0], shared.shape[1]), None)
        if match is not None:
            match.fill(shared, False)
        return Masked(shared)

    def _positives(
        self, rows: slice, columns: slice, shape: tuple[int, int], selves: PairSet | None
    ) -> PairSet | None:
        if self.match is not None and self.first is None:
            if shape[1] == self.m:
                return OneEach(shape, part(self.match, rows))
            return _one_each(self.match[rows], columns, shape)
        if self.row_labels is None or self.column_labels is None:
            return self._diagonal(rows, columns, shape)
        if shape[0] * shape[1] > _SMALL and self._few:
            return self._listed(rows, columns, shape)
        if self.n * self.m <= _WHOLE:
            return Masked(self._whole[rows, columns])
        similar = share_label(self.row_labels[rows], self.column_labels[columns])
        if selves is not None:
            selves.fill(similar, False)
        if readable(similar) and not similar.any():
            return None
        return Masked(similar)

    @cached_property
    def _whole(self) -> Tensor:
        """(n, m) bool, the similar pairs of a relation that is small enough for one mask."""
        assert self.row_labels is not None
        assert self.column_labels is not None
        similar = share_label(self.row_labels, self.column_labels)
        selves = self._selves(slice(0, self.n), slice(0, self.m), (self.n, self.m))
        if selves is not None:
            selves.fill(similar, False)
        return similar

    def _selves(self, rows: slice, columns: slice, shape: tuple[int, int]) -> PairSet | None:
        if self.items is not None and self.items.repeat:
            return self._shared(rows, columns)
        if self.symmetric or (self.first is not None and self.declared is not None):
            return self._diagonal(rows, columns, shape)
        if self.declared is None:
            return None
        return _one_each(self.declared[rows], columns, shape)

    def _diagonal(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Diagonal | None:
        """The part of the diagonal that lies in the block."""
        start, stop = rows.start + (self.first or 0), rows.stop + (self.first or 0)
        if stop <= columns.start or columns.stop <= start:
            return None
        return Diagonal(shape, start - columns.start, self.device)

    @cached_property
    def _few(self) -> bool:
        """Whether there are so few similar pairs that a list is cheaper than a mask."""
        labels = self.row_labels
        if labels is None or labels.ndim == 2 or not readable(labels):
            return False
        return int(self.n_positives().sum()) * _FEW <= self.n * self.m

    def _listed(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Listed | None:
        """The similar pairs, found by binary search in the sorted labels."""
        keys, order, rank = self._order
        first = rank[rows] * self.m
        low, high = (torch.searchsorted(keys, first + c) for c in (columns.start, columns.stop))
        count = high - low
        row = torch.repeat_interleave(count)
        column = order[torch.arange(len(row)) + (low - count.cumsum(0) + count)[row]]
        if self.own is not None:
            other = column != self.own[rows][row]
            row, column = row[other], column[other]
        return Listed(shape, row, column - columns.start) if len(row) else None

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns sorted by class, and by index within a class.

        Returns:
            (m,) keys, ascending: the rank of the class times m, plus the column.
            (m,) the columns.
            (n,) the rank of each row's class, -1 if it has no column.
        """
        assert self.row_labels is not None
        assert self.column_labels is not None
        labels, order = self.column_labels.sort(stable=True)
        rank = torch.zeros_like(labels)
        rank[1:] = (labels[1:] != labels[:-1]).cumsum(0)
        place = torch.searchsorted(labels, self.row_labels).clamp(max=self.m - 1)
        known = labels[place] == self.row_labels
        return rank * self.m + order, order, rank[place].where(known, -1)


def _one_each(column: Tensor, columns: slice, shape: tuple[int, int]) -> PairSet | None:
    """Each row paired with one column, (r,), where that lies in the block."""
    if not readable(column):  # as making a list would take
        here = torch.arange(columns.start, columns.stop, device=column.device)
        return Masked(column[:, None] == here)
    (row,) = ((column >= columns.start) & (column < columns.stop)).nonzero(as_tuple=True)
    return Listed(shape, row, column[row] - columns.start) if len(row) else None


def matched(n: int, m: int, device: torch.device, items: Items | None = None) -> Relation:
    """Row i is similar to column i, and dissimilar to every other column, or to other items."""
    return Relation(n, m, device, one_positive=n <= m, items=items)


def within(labels: ArrayLike, x: Tensor) -> Relation:
    """Every row against every other row of the same batch."""
    known = batch_labels(labels, like=x)
    return Relation(x.shape[0], x.shape[0], x.device, known, known, symmetric=True)


def across(
    labels: ArrayLike,
    x: Tensor,
    reference: Tensor,
    reference_labels: ArrayLike | None,
    own: ArrayLike | None,
    names: tuple[str, str] = ("reference.labels", "reference.own"),
) -> Relation:
    """Every row against every row of a reference set.

    Args:
        labels: of the rows.
        x: (n, d) the rows.
        reference: (m, d) the columns.
        reference_labels: of the columns, of the same kind as `labels`.
        own: (n,) integers, which row of the reference is row i itself, -1 for none. None: the
            reference holds no row of the batch.
        names: the caller's names for `reference_labels` and `own`.
    """
    name, name_of_own = names
    if reference_labels is None:
        raise TypeError(f"{name} must have a label for each row of the reference; got None.")
    rows = batch_labels(labels, like=x)
    columns = batch_labels(reference_labels, like=reference, name=name)
    if rows.shape[1:] != columns.shape[1:]:
        raise ValueError(
            f"labels and {name} must be of the same kind, class ids (n,) or multi-labels "
            f"(n, c) with the same c; got {tuple(rows.shape)} and {tuple(columns.shape)}."
        )
    declared = None
    if own is not None:
        declared = class_ids(own, like=x, name=name_of_own)
        outside = (declared < -1) | (declared >= len(reference))
        expected = f"be a row of the reference, 0 to {len(reference) - 1}, or -1 for none"
        refuse(name_of_own, declared, outside, expected)
    n, m = x.shape[0], reference.shape[0]
    return Relation(n, m, x.device, rows, columns, declared, shared="columns")
