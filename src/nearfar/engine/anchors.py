"""The rows of a block as anchors, with their few positives in lists and sorted tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from nearfar.engine.relation import Block


@dataclass(eq=False)
class Anchors:
    """Some rows and their positives, sorted by row, and by column within a row.

    Attributes:
        shape: the numbers of rows and columns.
        row: (k,) the row of each positive pair.
        column: (k,) its column.
        itself: (s,) and (s,), the rows and columns of pairs of an item with itself.
    """

    shape: tuple[int, int]
    row: Tensor
    column: Tensor
    itself: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, block: Block) -> "Anchors":
        """The rows of a block that spans all columns."""
        none = torch.zeros(0, dtype=torch.int64, device=block.device)
        row, column = (none, none) if block.positives is None else block.positives.indices()
        itself = (none, none) if block.selves is None else block.selves.indices()
        return cls(block.shape, row, column, itself)

    def some(self, rows: Tensor) -> "Anchors":
        """These rows only, (s,) in ascending order."""
        place = torch.full_like(self.count, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)

        def kept(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
            here = place[row] >= 0
            return place[row][here], column[here]

        return Anchors((len(rows), self.shape[1]), *kept(self.row, self.column), kept(*self.itself))

    @cached_property
    def count(self) -> Tensor:
        """(b,) how many positives each row has."""
        return torch.bincount(self.row, minlength=self.shape[0])

    @cached_property
    def most(self) -> int:
        """The largest number of positives of a row."""
        return int(self.count.max()) if self.shape[0] else 0

    @cached_property
    def first(self) -> Tensor:
        """(b,) the place of each row's first positive in the list."""
        return self.count.cumsum(0) - self.count

    @cached_property
    def slot(self) -> Tensor:
        """(k,) the index of each positive among its row's positives."""
        return torch.arange(len(self.row), device=self.row.device) - self.first[self.row]

    @cached_property
    def n_negatives(self) -> Tensor:
        """(b,) how many negatives each row has."""
        own = torch.bincount(self.itself[0], minlength=self.shape[0])
        return self.shape[1] - self.count - own

    def nth_negative(self, row: Tensor, n: Tensor) -> Tensor:
        """The columns of some negatives, without a mask of all.

        Args:
            row: (k, 1) rows.
            n: (k, c) which negative of each row, from 0, in the order of their columns.
        """
        width = self.shape[1] + 1
        lists = (self.row, self.column), self.itself
        others = torch.cat([r * width + c for r, c in lists]).sort().values
        of = others // width
        first = torch.searchsorted(of, torch.arange(self.shape[0], device=of.device))
        # Up to each column that is no negative, there are so many negatives.
        before = others - torch.arange(len(of), device=of.device) + first[of]
        return n + torch.searchsorted(before, row * width + n, right=True) - first[row]

    @contextmanager
    def only_negatives(self, d: Tensor) -> Iterator[None]:
        """Inside the `with` block, all pairs but negatives are at distance inf."""
        positives, itself = d[self.row, self.column], d[self.itself]
        self.mask_non_negatives(d)
        yield
        d[self.row, self.column], d[self.itself] = positives, itself

    def mask_non_negatives(self, d: Tensor) -> Tensor:
        """`d`, overwritten by inf for all pairs but negatives."""
        d[self.row, self.column] = inf
        d[self.itself] = inf
        return d

    def table(self, d: Tensor, fill: float) -> Tensor:
        """(b, most) the distances to each row's positives, padded with `fill`."""
        table = d.new_full((len(d), self.most), fill)
        table[self.row, self.slot] = d[self.row, self.column]
        return table

    def extreme(self, d: Tensor, *, farthest: bool) -> Tensor:
        """(b,) the column of the farthest or the nearest positive; 0 without positives."""
        if not self.most:
            return torch.zeros_like(self.count)
        table = self.table(d, -inf if farthest else inf)
        columns = torch.zeros_like(table, dtype=torch.int64)
        columns[self.row, self.slot] = self.column
        slot = table.argmax(1, keepdim=True) if farthest else table.argmin(1, keepdim=True)
        return columns.gather(1, slot)[:, 0]


# Up to this many entries per row, comparing with each was measured to be faster than a search.
FEW = 32


def above(ordered: Tensor, d: Tensor) -> Tensor:
    """(b, m) how many entries of its row each value exceeds; NaN exceeds none.

    Args:
        ordered: (b, p) entries, ascending.
        d: (b, m) values.
    """
    most = ordered.shape[1]
    if most > FEW:
        return look_up_rows(ordered, d, strict=True)
    count, one = torch.zeros_like(d), torch.empty_like(d)
    for slot in range(most):  # in the dtype of the data: torch is far slower at comparing into bool
        count.add_(torch.gt(d, ordered[:, slot, None], out=one))
    return count


def look_up_rows(ordered: Tensor, d: Tensor, *, strict: bool = False) -> Tensor:
    """(b, m) where each value belongs among the (b, p) ascending entries of its row."""
    rows, most = ordered.shape
    start = torch.arange(0, rows * most, most, device=d.device)[:, None]
    return look_up(ordered.flatten(), d, start, start + most, most, strict=strict) - start


def look_up(
    table: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    longest: int,
    *,
    strict: bool = False,
) -> Tensor:
    """Where values belong in sorted segments of a table: after the entries that are no larger.

    Like `torch.searchsorted`, but several times faster on a CPU, since it has no branches.

    Args:
        table: (t,) entries, ascending within each segment.
        values: (r, c) what to look up; NaN belongs at the start.
        start: int64, broadcasts to (r, c), the first entry of the segment of each value.
        stop: the same, one past its last entry.
        longest: at least the length of the longest segment.
        strict: after only the entries that are smaller.

    Returns:
        (r, c) places from `start` to `stop`, int32 if they fit.
    """
    index = torch.int32 if len(table) + 2 * longest < 2**31 else torch.int64
    step = 1 << max(longest, 1).bit_length() >> 1
    padded = torch.cat([table, table.new_full((2 * step,), inf)])
    place = start.to(index).expand(values.shape).contiguous()
    last = stop.to(index)
    while step:
        probe = place + (step - 1)
        entry = padded.index_select(0, probe.flatten()).view(values.shape)
        advance = entry < values if strict else entry <= values
        advance &= probe < last
        place.add_(advance, alpha=step)
        step //= 2
    return place
