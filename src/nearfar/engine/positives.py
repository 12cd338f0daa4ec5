"""The positives of anchors in a loss of log-sum-exps: their sum, or each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Protocol

import torch
from torch import Tensor

from nearfar.engine.budget import budget_of
from nearfar.engine.closeness import Tile
from nearfar.engine.slices import part
from nearfar.engine.walk import Walk
from nearfar.reduction import sum_dtype


@dataclass(eq=False)
class Side:
    """The anchors along one dimension of a tile: which, and the dimension of their terms."""

    at: slice
    dim: int


class Positives(Protocol):
    """The positives of some anchors, once they are collected: their sums, or each of them.

    Attributes:
        values: (n,) the sum of each anchor's positives, or (k,) the closeness of each positive.
        of: (n,) or a number, how many positives each anchor has, or (k,) the anchor of each.
        other: (k,) the positive itself, for losses that want to know it.
        near: (n,) the log-sum-exp of each anchor's positives, where that was collected.
    """

    @property
    def values(self) -> Tensor: ...

    @property
    def of(self) -> Tensor | float: ...

    @property
    def other(self) -> Tensor | None: ...

    @property
    def near(self) -> Tensor | None: ...


# Strips of fewer rows are slower than computing all products twice.
_FEWEST_ROWS = 64


class SummedPositives:
    """The sum of each anchor's positives, and how many there are (1.0: one each).

    Args:
        walk: over the tiles.
        rows: which rows are anchors.
        n: how many anchors there are: the rows, or these and as many columns.

    Attributes:
        values: (n,) the sums.
        of: how many positives each anchor has, at least 1.
    """

    other = near = None

    def __init__(self, walk: Walk, rows: slice, n: int) -> None:
        self.values = walk.a.new_zeros(n, dtype=sum_dtype(walk.a))
        self.of: Tensor | float = 1.0
        if not walk.relation.one_positive:
            count = part(walk.relation.n_positives(), rows).clamp(min=1)
            self.of = count.to(self.values.dtype)
        if n > rows.stop - rows.start and isinstance(self.of, Tensor):
            self.of = self.of.repeat(2)

    @staticmethod
    def wants_all_tiles(walk: Walk, strip_height: int) -> bool:
        """Whether sums are better collected from all tiles at once than strip by strip."""
        return walk.mirrored or strip_height < min(max(walk.a.shape[0], 1), _FEWEST_ROWS)

    @staticmethod
    def floats_per_pair(walk: Walk) -> int:
        """How many numbers the positives take in a strip, per pair."""
        return 0

    def add(self, tile: Tile, sides: Sequence[Side]) -> None:
        """Add those of a tile to the sums of the anchors on its sides."""
        positives = tile.block.positives
        if positives is not None:
            taken = positives.take(tile.closeness)
            for side in sides:
                positives.add_sums(taken, part(self.values, side.at), side.dim)

    def set_forces(self, force: Tensor) -> None:
        """Keep the derivatives by `values`."""
        self._force = force

    def add_forces(self, force: Tensor, tile: Tile, sides: Sequence[Side]) -> None:
        """Add them to the forces on a tile."""
        if tile.block.positives is not None:
            by_row, *by_column = (part(self._force, side.at) for side in sides)
            tile.block.positives.add(force, by_row, by_column[0] if by_column else None)


# Numbers a listed positive takes: its place in 64 bits, its share and its pull.
_PER_POSITIVE = 12
# Relations of fewer pairs are not asked how many are positive.
_LARGE = 2**20
# Bytes a positive takes where all are listed at once, for which half of the budget is available;
# and the height of tiles below which two steps over all of them take longer than strips.
_LISTED, _FEWEST_LISTED_ROWS = 128, 256


class EachPositive:
    """The closeness of every positive (k,) and its anchor (k,), in the order of the tiles.

    All memory is taken at once: small arrays that stay behind each tile would fragment the memory
    that the next tile could use again. Arguments and methods are those of `SummedPositives`.

    Attributes:
        values: (k,) the closeness.
        of: (k,) the anchors.
        other: (k,) the positives, from `keep_ends` on.
    """

    near = None

    def __init__(self, walk: Walk, rows: slice, n: int) -> None:
        self._walk, self._rows = walk, rows
        self.other: Tensor | None = None
        self._sizes: list[int] = []
        self._taken = 0

    @cached_property
    def values(self) -> Tensor:
        return self._walk.a.new_empty(self._number)

    @cached_property
    def of(self) -> Tensor:
        return self._walk.a.new_empty(self._number, dtype=torch.int64)

    def complete(self) -> None:
        """Leave out the room for what others have, where tiles are dealt to several processes."""
        self.values, self.of = self.values[: self._taken], self.of[: self._taken]
        self.other = None if self.other is None else self.other[: self._taken]

    def keep_ends(self) -> None:
        """Keep the other end of each positive too."""
        self.other = torch.empty_like(self.of)

    @cached_property
    def _number(self) -> int:
        return int(part(self._walk.relation.n_positives(), self._rows).sum())

    @staticmethod
    def wants_all_tiles(walk: Walk, strip_height: int) -> bool:
        limits, device, *_ = walk.room
        height = walk.shape[0]
        if not walk.mirrored or walk.a.shape[0] <= height:
            return False
        if height < _FEWEST_LISTED_ROWS and limits.tile is None:
            return False
        positives = int(walk.relation.n_positives().sum())
        return positives * _LISTED <= budget_of(limits, device) // 2

    @staticmethod
    def floats_per_pair(walk: Walk) -> int:
        pairs = walk.relation.n * walk.relation.m
        if pairs < _LARGE:
            return 0
        return round(_PER_POSITIVE * walk.relation.n_positives().sum().item() / pairs)

    def add(self, tile: Tile, sides: Sequence[Side]) -> None:
        if tile.block.positives is None:
            self._sizes += [0] * len(sides)
            return
        ends = tile.block.positives.indices()
        values = tile.closeness[ends]
        if tile.rows == self._rows and tile.columns == slice(0, self._walk.m):
            self.values, self.of = values, ends[0]  # one tile has them all
            self.other = None if self.other is None else ends[1]
            self._sizes.append(len(values))
            self._taken = len(values)
            return
        for side, anchors in zip(sides, ends, strict=False):
            here = slice(self._taken, self._taken + anchors.shape[0])
            self.values[here] = values
            torch.add(anchors, side.at.start, out=self.of[here])
            if self.other is not None:
                at = (tile.rows, tile.columns)[side.dim]
                torch.add(ends[side.dim], at.start, out=self.other[here])
            self._sizes.append(anchors.shape[0])
            self._taken = here.stop

    def set_forces(self, force: Tensor) -> None:
        self._forces = iter(force.split_with_sizes(self._sizes))

    def add_forces(self, force: Tensor, tile: Tile, sides: Sequence[Side]) -> None:
        pulls = [next(self._forces) for _ in sides]
        if tile.block.positives is not None:  # whose terms are 0
            force[tile.block.positives.indices()] = reduce(torch.add, pulls)
