"""Some pairs of a block, stored in the cheapest form.

A batch of thousands has few positive pairs among millions. If there are few, they are listed, and
operations on them do not touch the rest of the block.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from nearfar.engine.slices import add_rows, part


class PairSet(Protocol):
    """Some pairs of an (r, c) block."""

    def indices(self) -> tuple[Tensor, Tensor]:
        """(k,) the row and the column of each pair, sorted by row."""
        ...

    def mask(self) -> Tensor:
        """(r, c) bool, true at these pairs."""
        ...

    def take(self, tile: Tensor) -> Tensor:
        """A copy of the values of a tile (r, c) at these pairs, in the form `add_sums` takes."""
        ...

    def add_sums(self, taken: Tensor, to: Tensor, dim: int) -> None:
        """Add taken values, summed along a dimension, to (r,), or to (c,) for dim 0."""
        ...

    def fill(self, tile: Tensor, value: float) -> None:
        """Overwrite the values of a tile at these pairs."""
        ...

    def add(self, tile: Tensor, by_row: Tensor, by_column: Tensor | None) -> None:
        """Add by_row (r,), and by_column (c,) if given, to the values of a tile at these pairs."""
        ...


@dataclass(eq=False)
class Diagonal:
    """The pairs of row i and column i + offset."""

    shape: tuple[int, int]
    offset: int
    device: torch.device

    @cached_property
    def _spans(self) -> tuple[slice, slice]:
        """The rows and the columns of these pairs."""
        row, column = max(0, -self.offset), max(0, self.offset)
        size = min(self.shape[0] - row, self.shape[1] - column)
        return slice(row, row + size), slice(column, column + size)

    def indices(self) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(s.start, s.stop, device=self.device) for s in self._spans)
        return rows, columns

    def mask(self) -> Tensor:
        marked = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        marked.diagonal(self.offset).fill_(True)
        return marked

    def take(self, tile: Tensor) -> Tensor:
        return tile.diagonal(self.offset).clone()

    def add_sums(self, taken: Tensor, to: Tensor, dim: int) -> None:
        part(to, self._spans[1 - dim]).add_(taken)

    def fill(self, tile: Tensor, value: float) -> None:
        tile.diagonal(self.offset).fill_(value)

    def add(self, tile: Tensor, by_row: Tensor, by_column: Tensor | None) -> None:
        rows, columns = self._spans
        diagonal = tile.diagonal(self.offset).add_(part(by_row, rows))
        if by_column is not None:
            diagonal.add_(part(by_column, columns))


@dataclass(eq=False)
class OneEach:
    """One pair per row, by its column, (r,) int64."""

    shape: tuple[int, int]
    column: Tensor

    @cached_property
    def _index(self) -> Tensor:
        return self.column[:, None]

    def indices(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.shape[0], device=self.column.device), self.column

    def mask(self) -> Tensor:
        marked = torch.zeros(self.shape, dtype=torch.bool, device=self.column.device)
        return marked.scatter_(1, self._index, True)

    def take(self, tile: Tensor) -> Tensor:
        return tile.gather(1, self._index)[:, 0]

    def add_sums(self, taken: Tensor, to: Tensor, dim: int) -> None:
        if dim:
            to.add_(taken)
        else:
            add_rows(to, self.column, taken.to(to.dtype))

    def fill(self, tile: Tensor, value: float) -> None:
        tile.scatter_(1, self._index, value)

    def add(self, tile: Tensor, by_row: Tensor, by_column: Tensor | None) -> None:
        more = by_row if by_column is None else by_row + by_column[self.column]
        tile.scatter_add_(1, self._index, more[:, None])


@dataclass(eq=False)
class Listed:
    """Pairs listed by row and column, (k,) int64, sorted by row."""

    shape: tuple[int, int]
    row: Tensor
    column: Tensor

    def indices(self) -> tuple[Tensor, Tensor]:
        return self.row, self.column

    def mask(self) -> Tensor:
        marked = torch.zeros(self.shape, dtype=torch.bool, device=self.row.device)
        marked[self.row, self.column] = True
        return marked

    def take(self, tile: Tensor) -> Tensor:
        return tile[self.row, self.column]

    def add_sums(self, taken: Tensor, to: Tensor, dim: int) -> None:
        add_rows(to, self.row if dim else self.column, taken.to(to.dtype))

    def fill(self, tile: Tensor, value: float) -> None:
        tile[self.row, self.column] = value

    def add(self, tile: Tensor, by_row: Tensor, by_column: Tensor | None) -> None:
        more = by_row[self.row]
        if by_column is not None:
            more = more + by_column[self.column]
        tile.index_put_((self.row, self.column), more, accumulate=True)


@dataclass(eq=False)
class Masked:
    """Pairs given by an (r, c) bool mask."""

    marked: Tensor

    def indices(self) -> tuple[Tensor, Tensor]:
        return self._indices

    @cached_property
    def _indices(self) -> tuple[Tensor, Tensor]:
        row, column = self.marked.nonzero(as_tuple=True)
        return row, column

    def mask(self) -> Tensor:
        return self.marked

    def take(self, tile: Tensor) -> Tensor:
        return tile.where(self.marked, 0)

    def add_sums(self, taken: Tensor, to: Tensor, dim: int) -> None:
        to.add_(taken.sum(dim, dtype=to.dtype))

    def fill(self, tile: Tensor, value: float) -> None:
        tile.masked_fill_(self.marked, value)

    def add(self, tile: Tensor, by_row: Tensor, by_column: Tensor | None) -> None:
        more = by_row[:, None]
        if by_column is not None:
            more = more + by_column
        tile.add_(more.where(self.marked, 0))
