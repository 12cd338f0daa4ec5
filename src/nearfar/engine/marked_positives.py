"""The positives of anchors in a loss of log-sum-exps, marked by masks where no list can be made.

A list is as long as there are positives, which the host would have to read. So here every pair of a
tile is computed, and those that are not positive are left out.
"""

from math import inf

from torch import Tensor

from nearfar.engine.closeness import Tile
from nearfar.engine.log_sum_rule import BothWays, Exponent, LogSum, LogSumRule, Settled
from nearfar.engine.pair_sets import PairSet
from nearfar.engine.positives import Side
from nearfar.engine.running import Running, Terms
from nearfar.engine.slices import part
from nearfar.engine.walk import Walk
from nearfar.reduction import sum_dtype


class NearPositives:
    """The log-sum-exp of each anchor's positives; methods are those of `SummedPositives`.

    Args:
        exponent: what it is over.
        walk: over the tiles.
        n: how many anchors there are.
    """

    of, other = 1.0, None

    def __init__(self, exponent: Exponent, walk: Walk, n: int) -> None:
        self._exponent = exponent
        self._logs = Running(n, walk.a, safe=False)

    @property
    def near(self) -> Tensor:
        """(n,) the log-sum-exps, -inf without positives."""
        return self._logs.value().value

    values = near

    def add(self, tile: Tile, sides: list[Side]) -> None:
        positives = tile.block.positives
        if positives is not None:
            terms = self._terms(tile, positives, sides)
            for side in sides:
                self._logs.add(terms, side)

    def set_forces(self, force: Tensor) -> None:
        self._logs.finish(force)

    def add_forces(self, force: Tensor, tile: Tile, sides: list[Side]) -> None:
        positives, slope = tile.block.positives, self._exponent.slope
        if positives is not None:
            pull = self._logs.force(self._terms(tile, positives, sides))
            force.add_(pull.mul_(slope(tile.closeness) if callable(slope) else slope))

    def _terms(self, tile: Tile, positives: PairSet, sides: list[Side]) -> Terms:
        """The exponents, -inf for other pairs; no bound of them is known."""
        exponents = self._exponent.of(tile.closeness)
        return Terms(exponents.masked_fill_(~positives.mask(), -inf), None, sides)


class PositiveTerms:
    """A sum over the positives of each anchor, of terms that take its log-sum-exp.

    So the tiles are added once the log-sum-exps are known; their forces follow in one more step.

    Args:
        rule: the loss, `per_positive`.
        walk: over the tiles.
        n: how many anchors there are.
        both: they are rows and columns; None: they are rows.
    """

    def __init__(self, rule: LogSumRule, walk: Walk, n: int, both: BothWays | None) -> None:
        self._both = both
        self._rule, self._kept, self._together = rule, walk.request.kept, walk.request.together
        self._dtype = walk.a.dtype
        zeros = walk.a.new_zeros(3, n, dtype=sum_dtype(walk.a))
        self._loss, self._by_logs, self._number = zeros
        self._by_others = self._by_logs
        if rule.both_ends and self._together is not None:
            self._by_others = zeros.new_zeros(self._together.rows.n)

    def know(self, logs: LogSum, counts: Tensor | None, weight: Tensor | None) -> None:
        """Keep the log-sum-exps of the anchors, how much each counts, and its weight."""
        top = logs.top.to(self._dtype) if isinstance(logs.top, Tensor) else logs.top
        self._logs = self._others = LogSum(logs.rest.to(self._dtype), top)
        if self._rule.both_ends and self._together is not None:
            self._others = LogSum(self._together.of_rows(logs.value).to(self._dtype))
        if self._both is not None:
            weight = logs.rest.new_full(logs.rest.shape, 0.5) if weight is None else weight / 2
        self._counts, self._weight = counts, None if weight is None else weight.to(self._dtype)

    def add(self, tile: Tile, sides: list[Side]) -> None:
        """Add the terms of a tile to the losses of its anchors, and their derivatives."""
        positives = tile.block.positives
        if positives is None:
            return
        for side in sides:
            loss, by_logs, _, outside = self._terms(tile, positives, side)
            _add_sum(self._loss, loss.masked_fill(outside, 0), side)
            _add_sum(self._number, ~outside, side)
            of_ends = by_logs if self._rule.both_ends else [by_logs]
            to = self._by_logs, self._by_others
            for end, by, sums in zip(self._ends(tile, side), of_ends, to, strict=False):
                _add_sum(sums, self._weighted(by.masked_fill(outside, 0), side), end)

    def settled(self) -> Settled:
        """What is known of the anchors once all tiles are added."""
        loss, counts = self._loss, self._counts
        if self._kept is not None:
            counts = self._number if counts is None else self._number * (counts > 0)
        if self._by_others is not self._by_logs:
            assert self._together is not None
            self._by_logs += self._together.sum_of_rows(self._by_others)
        if self._both is not None:
            loss = self._both.mean(loss)
            counts = None if counts is None else self._both.mean(counts.to(loss.dtype))
        return Settled(loss, self._by_logs, loss, [], counts)

    def add_forces(self, force: Tensor, tile: Tile, sides: list[Side]) -> None:
        positives = tile.block.positives
        if positives is not None:
            for side in sides:
                *_, by_closeness, outside = self._terms(tile, positives, side)
                force.add_(self._weighted(by_closeness.masked_fill(outside, 0), side))

    def _terms(
        self, tile: Tile, positives: PairSet, side: Side
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `finish` returns for all pairs of a tile, and (r, c) bool, which do not count."""
        z = tile.closeness
        of_ends = self._logs, self._others
        logs = [
            _along(some, end, z) for some, end in zip(of_ends, self._ends(tile, side), strict=False)
        ]
        given = tuple(logs) if self._rule.both_ends else logs[0]
        loss, by_logs, by_closeness, *_ = self._rule.finish(given, z, None)
        outside = ~positives.mask()
        if self._kept is not None:
            outside |= self._kept.outside(loss)
        return loss, by_logs, by_closeness, outside

    def _ends(self, tile: Tile, side: Side) -> list[Side]:
        """The anchors of a side, and where a rule wants both ends, the positives as anchors."""
        other = Side((tile.rows, tile.columns)[side.dim], 1 - side.dim)
        return [side, other] if self._rule.both_ends else [side]

    def _weighted(self, by: Tensor, side: Side) -> Tensor:
        if self._weight is None:
            return by
        return by * part(self._weight, side.at).unsqueeze(side.dim)


def _along(logs: LogSum, end: Side, tile: Tensor) -> LogSum:
    """(r, c) the log-sum-exps of the anchors of each pair."""

    def spread(values: Tensor) -> Tensor:
        return part(values, end.at).unsqueeze(end.dim).expand_as(tile)

    rest, top = logs.rest, logs.top
    return LogSum(spread(rest), spread(top) if isinstance(top, Tensor) else top)


def _add_sum(to: Tensor, values: Tensor, side: Side) -> None:
    part(to, side.at).add_(values.sum(side.dim, dtype=to.dtype))
