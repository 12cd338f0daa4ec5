"""The rows of a block as anchors: who their positives are, listed, since positives are few."""

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
    """Some rows and their positives, row by row, each row's in order of their columns.

    Attributes:
        shape: how many rows and columns there are.
        row, column: (k,) which of these rows has a positive, and in which column.
        itself: (s,), (s,) rows that meet themselves, and in which column.
    """

    shape: tuple[int, int]
    row: Tensor
    column: Tensor
    itself: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, who: Block) -> "Anchors":
        """The rows of a block that spans all columns."""
        nobody = torch.zeros(0, dtype=torch.int64, device=who.device)
        row, column = (nobody, nobody) if who.positives is None else who.positives.indices()
        itself = (nobody, nobody) if who.selves is None else who.selves.indices()
        return cls(who.shape, row, column, itself)

    def some(self, rows: Tensor) -> "Anchors":
        """Those of some of the rows, (s,) in ascending order."""
        place = torch.full_like(self.count, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)

        def kept(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
            here = place[row] >= 0
            return place[row][here], column[here]

        return Anchors((len(rows), self.shape[1]), *kept(self.row, self.column), kept(*self.itself))

    @cached_property
    def count(self) -> Tensor:
        """(b,) how many positives a row has."""
        return torch.bincount(self.row, minlength=self.shape[0])

    @cached_property
    def most(self) -> int:
        """How many the row with the most has."""
        return int(self.count.max()) if self.shape[0] else 0

    @cached_property
    def slot(self) -> Tensor:
        """(k,) the how-manieth of its row each positive is."""
        before = self.count.cumsum(0) - self.count
        return torch.arange(len(self.row), device=self.row.device) - before[self.row]

    @cached_property
    def n_negatives(self) -> Tensor:
        """(b,) how many negatives a row has."""
        own = torch.bincount(self.itself[0], minlength=self.shape[0])
        return self.shape[1] - self.count - own

    @contextmanager
    def hidden(self, d: Tensor) -> Iterator[None]:
        """Everyone who is no negative stands as far away as can be inside the block."""
        positives, itself = d[self.row, self.column], d[self.itself]
        self.hide(d)
        yield
        d[self.row, self.column], d[self.itself] = positives, itself

    def hide(self, d: Tensor) -> Tensor:
        """`d` with everyone who is no negative as far away as can be; overwrites it."""
        d[self.row, self.column] = inf
        d[self.itself] = inf
        return d

    def table(self, d: Tensor, fill: float) -> Tensor:
        """(b, most) the distances to the positives, filled up."""
        table = d.new_full((len(d), self.most), fill)
        table[self.row, self.slot] = d[self.row, self.column]
        return table

    def extreme(self, d: Tensor, *, farthest: bool) -> Tensor:
        """(b,) the column of the farthest or the nearest positive; 0 where there is none."""
        if not self.most:
            return torch.zeros_like(self.count)
        table = self.table(d, -inf if farthest else inf)
        columns = torch.zeros_like(table, dtype=torch.int64)
        columns[self.row, self.slot] = self.column
        slot = table.argmax(1, keepdim=True) if farthest else table.argmin(1, keepdim=True)
        return columns.gather(1, slot)[:, 0]
