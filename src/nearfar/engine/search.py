"""Rows and columns, measured so that the nearest columns of each row can be found."""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from nearfar.distance import Distance, EuclideanDistance, unit
from nearfar.engine.closeness import Closeness, Euclidean, by_distance, sharpen


@dataclass(frozen=True, eq=False)
class Ready:
    """Rows and columns, prepared so that `closeness` orders them like a distance.

    Attributes:
        rows: (n, d), at unit length for cosine distance.
        columns: (m, d), the same.
        closeness: |a - b|^2 where that orders like it, else the distance itself.
        as_given: the rows and columns before they were scaled to unit length; None if they were
            not scaled.
    """

    rows: Tensor
    columns: Tensor
    closeness: Closeness
    as_given: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, rows: Tensor, columns: Tensor, distance: Distance, ends: Tensor | None = None
    ) -> "Ready":
        """Prepare them.

        Args:
            rows: (n, d).
            columns: (m, d); they may be the rows themselves.
            distance: by which they are compared.
            ends: (2, d) the largest and the smallest value of each coordinate, if there are more
                columns than these.
        """
        as_given = (rows, columns) if distance == "cosine" else None
        if distance == "cosine":
            rows, columns = _at_unit_length(rows, columns)
        by_squares = distance in get_args(EuclideanDistance)
        closeness = Euclidean(squared=True) if by_squares else by_distance(distance)
        if ends is not None:
            more = rows.shape[1] - ends.shape[1]
            columns = torch.cat([columns, torch.nn.functional.pad(ends, (0, more))])
        a, b = closeness.prepare(rows, None if columns is rows else columns)
        columns = a if b is None else b
        return cls(a, columns if ends is None else columns[:-2], closeness, as_given)

    def measure(self, rows: slice, columns: slice) -> Tensor:
        """(r, c) the closeness of some rows to some columns."""
        values, repaired = self.closeness.measure(self.rows[rows], self.columns[columns])
        if self.as_given is not None:
            x, y = self.as_given
            sharpen(values, repaired, x[rows], y[columns], 2.0)
        return values


def _at_unit_length(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, scaled such that half of |a - b|^2 is 1 - cos."""
    a = unit(rows)
    b = a if columns is rows else unit(columns)
    no_row, no_column = (~t.any(1, keepdim=True) for t in (a, b))
    if not (no_row.any() or no_column.any()):
        return a, b
    # A zero row is at distance 1 from every other: rows and columns get a coordinate of their own.
    return (
        torch.cat([a, no_row.to(a.dtype), torch.zeros_like(a[:, :1])], 1),
        torch.cat([b, torch.zeros_like(b[:, :1]), no_column.to(b.dtype)], 1),
    )


def as_distance(measured: Tensor, distance: Distance) -> Tensor:
    """The chosen distance, from what was measured; for unit rows, 1 - cos is |a - b|^2 / 2."""
    if distance == "euclidean":
        return measured.sqrt()
    return measured / 2 if distance == "cosine" else measured


def as_measured(distances: Tensor, distance: Distance) -> Tensor:
    """The reverse of `as_distance`, for bounds: a distance below 0 is nearer than any row."""
    if distance == "euclidean":
        return distances.clamp(min=0).square()
    return 2 * distances if distance == "cosine" else distances


def k_least(d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row and their columns; among ties, the lowest columns."""
    if k >= d.shape[1]:
        least = d.sort(dim=1, stable=True)
        return least.values, least.indices
    found = d.topk(k + 1, largest=False)  # its choice among ties is undefined
    index = found.indices[:, :k].sort(1).values
    tied = (found.values[:, k - 1] == found.values[:, k]).nonzero()[:, 0]
    if len(tied):
        index[tied] = d[tied].sort(dim=1, stable=True).indices[:, :k].sort(1).values
    values, order = d.gather(1, index).sort(dim=1, stable=True)
    return values, index.gather(1, order)


def refuse_non_finite(name: str, x: Tensor) -> None:
    """Refuse rows that have no neighbours."""
    bad = ~x.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{name}[{int(bad.nonzero()[0])}] is not finite "
            f"({int(bad.sum())} of {len(x)} rows are not), so its neighbours are not defined."
        )
