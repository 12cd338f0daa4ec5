"""The second terms of all quadruplets on a GPU.

Each negative pair is looked up in the sorted thresholds of the positive pairs. What is found below
each threshold is added up as whole numbers, in which no order matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.gpu.comparison import Comparison
from nearfar.engine.gpu.kernels import quadruplets as kernels
from nearfar.engine.gpu.kernels.quadruplets import Table
from nearfar.engine.relation import Relation
from nearfar.engine.step import Request

# A sum of distances has so many bits; they are added in so many places at the same time.
_BITS, _COPIES = 62, 4


@dataclass(eq=False)
class Segments:
    """Thresholds of positive pairs in segments, ascending within each.

    Attributes:
        entries: (t,) the thresholds.
        until: (t + 1,) the total weight of the entries before each; None: each has weight 1.
        start, stop: (s,) the segments.
        longest: the length of the longest.
    """

    entries: Tensor
    until: Tensor | None
    start: Tensor
    stop: Tensor
    longest: int

    @property
    def buckets(self) -> int:
        """One for each place of a value: one more than thresholds in each segment."""
        return len(self.entries) + len(self.start)


@dataclass(eq=False)
class Below:
    """The negative pairs in each bucket.

    Attributes:
        count: how many, int64.
        sum: the sum of their distances, int64, in some unit.
        unit: of the sums.
    """

    count: Tensor
    sum: Tensor
    unit: Tensor


def push_pairs(
    request: Request,
    closeness: Closeness,
    relation: Relation,
    all_pairs: Segments,
    by_class: Segments,
) -> tuple[Below, Below, Tensor | None]:
    """Compare all negative pairs of a batch with the positive pairs of the classes of neither end.

    Args:
        request: the rows of the pairs.
        closeness: by which they are compared.
        relation: of the rows with themselves, by the numbers of their classes.
        all_pairs: the thresholds of all positive pairs, in one segment.
        by_class: those of each class.

    Returns:
        What is below each threshold, in all and in the class of one end; each pair counts once in
            either order.
        (n, d) the gradient of the rows; None: not wanted.
    """
    compared = Comparison(request, closeness, relation)
    rows, chunks = compared.rows, compared.width // compared.chunk
    scale = _scale(all_pairs.entries, rows.count)
    tables = [_table(segments) for segments in (all_pairs, by_class)]
    grid = compared.whole_grid("push", rows, chunks)
    out = None
    if request.gradient:
        out = rows.operand.new_zeros(rows.count, compared.d, dtype=torch.float32)
    common = scale, out, compared.d, compared.words
    compared.launch(kernels.push_pairs, grid, rows, rows, *tables, *common)
    found = [Below(table.count.sum(0), table.sum.sum(0), 1 / scale) for table in tables]
    return found[0], found[1], out


def _scale(entries: Tensor, n: int) -> Tensor:
    """A power of two, float64, by which the sum of n^2 distances below a threshold fits an int64.

    A distance keeps more digits by it than a float32 has, relative to the largest threshold.
    """
    largest = entries.amax().double().clamp(min=torch.finfo(torch.float32).tiny)
    exponent = _BITS - 2 * n.bit_length() - largest.log2().ceil()
    return torch.ldexp(torch.ones_like(largest), exponent)


def _table(segments: Segments) -> Table:
    shape = _COPIES, segments.buckets
    count, total = segments.start.new_zeros(2, *shape, dtype=torch.int64)
    start, stop = segments.start.to(torch.int32), segments.stop.to(torch.int32)
    steps = max(segments.longest, 1).bit_length()
    entries = segments.entries, segments.until
    return Table(*entries, start, stop, count, total, _COPIES, segments.buckets, steps)
