"""Losses of each anchor's log-sum-exp and of its positives: softmax and its relatives.

An anchor's log-sum-exp must be known before its first force. So tiles are taken in groups: a first
step collects sums from all tiles of the group, then the losses of its anchors are known, and a
second step applies the forces. There are two schedules:

- A group is a strip of rows, whose tiles are all kept between the steps (6 N^2 d of work).
- The group is everything, where columns are anchors too or a strip would not fit: the second step
  computes the products again (8 N^2 d, and 4 N^2 d on the upper triangle of a batch with itself),
  except for tiles that fit the memory budget, each of which saves a quarter of its work.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf

import torch
from torch import Tensor

from nearfar.engine import gpu
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.listed_log_sums import over_list
from nearfar.engine.log_sum_rule import LogSum, LogSumRule, settle
from nearfar.engine.observe import force_visitors
from nearfar.engine.pair_sets import PairSet
from nearfar.engine.positives import EachPositive, Side, SummedPositives
from nearfar.engine.relation import Relation
from nearfar.engine.slices import joined, part
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Place, Walk
from nearfar.reduction import sum_dtype


def log_sum_loss(
    rule: LogSumRule, closeness: Closeness, relation: Relation, *, both: bool = False
) -> Executor:
    """The executor of a rule for every row, or with `both` for every row and every column.

    With `both`, the loss of row i is the mean of its loss as a row and as a column.
    """

    def execute(request: Request) -> Answer:
        if relation.listed is not None:
            return over_list(rule, closeness, relation, request)
        if gpu.takes(request, closeness, relation):
            from nearfar.engine.gpu import log_sums as on_gpu  # loads Triton

            return on_gpu.run(rule, closeness, relation, request, both=both)
        walk = Walk(request, closeness, relation, buffers=_BUFFERS)
        if rule.learned:
            walk.own = walk.a.new_zeros((), dtype=sum_dtype(walk.a))
        counts = rule.counts(relation)
        plain = _IN_PLACE if rule.far is None else _BESIDE
        kind = SummedPositives if rule.sums_positives else EachPositive
        shape = walk.strip_shape(plain + kind.floats_per_pair(walk))
        if both or rule.both_ends or kind.wants_all_tiles(walk, shape[0]):
            rows, two_sided = slice(0, walk.a.shape[0]), both or walk.mirrored
            sums = _Sums(rule, walk, rows, counts, both=both, two_sided=two_sided)
            most = walk.kept_elements(1 if rule.far is None else 2)
            found = [_two_steps(walk, sums, walk.places(), most)]
        else:
            # One buffer for all strips; a batch that is one strip is done sooner in place.
            room = None
            if walk.a.shape[0] > shape[0] and rule.far is None:
                room = walk.a.new_empty(shape[0] * walk.columns.shape[0])
            found = [
                _two_steps(walk, _Sums(rule, walk, rows, counts, room=room), places, inf)
                for rows, places in walk.strips(shape)
            ]
        if request.kept is not None:
            counts = joined([inside for _, inside in found if inside is not None], walk.a)
        return walk.answer(joined([loss for loss, _ in found], walk.a), counts)

    return execute


def _two_steps(
    walk: Walk, sums: "_Sums", places: Sequence[Place], most: float
) -> tuple[Tensor, Tensor | None]:
    """The losses of the anchors of some tiles, and their counts; adds up their gradient.

    Args:
        walk: over the tiles.
        sums: of the anchors.
        places: of the tiles.
        most: how many elements of the tiles of the first step are kept for the second.
    """
    bases: list[_Base] = []
    kept: deque[tuple[Tile, _Terms] | None] = deque()
    for place in places:
        tile, terms = sums.take(place, collect=True)
        most -= terms.values.numel()
        kept.append((tile, terms) if most >= 0 and walk.gradient is not None else None)
        bases.append(terms.base)
    losses, counts = sums.finish()
    if walk.gradient is not None:
        for place, base in zip(places, bases, strict=True):
            tile, terms = kept.popleft() or sums.take(place, (base,))
            walk.pull(tile, sums.force(tile, terms))
    return losses, counts


_BUFFERS = 8
# Numbers kept per pair of a strip: its term, and where exponents are not the closeness itself, that
# and room to work in.
_IN_PLACE, _BESIDE = 1, 4

# Exponents within this of 0 have an exponential, and sums of millions of them, that are normal
# numbers of the dtype: such exponents are summed as they are.
SAFE = {torch.float32: 40.0, torch.float64: 300.0}
# By so much may exponents exceed a base.
_HIGHEST = 8


# What is subtracted from the exponents of a tile: a number, or one per row (r,); None: they lie too
# far apart for one number.
_Base = Tensor | float | None


@dataclass(eq=False)
class _Terms:
    """What the log-sum-exps of a tile are over.

    Attributes:
        values: (r, c) exponentials of the exponents minus `base`, 0 for pairs left out; where there
            is no base, the exponents themselves, -inf for pairs left out.
        base: what was subtracted.
        sides: whose terms they are.
    """

    values: Tensor
    base: _Base
    sides: list[Side]


class _Sums:
    """The sums of some anchors, and once these are finished, the forces of each anchor's pairs.

    Args:
        rule: the loss.
        walk: over the tiles.
        rows: which rows are anchors.
        counts: see `LogSumRule`.
        both: whether the columns are anchors too, which come after the rows.
        two_sided: whether tiles may have anchors on both sides.
        room: memory for the terms of these rows; None: they overwrite the closeness.
    """

    def __init__(
        self,
        rule: LogSumRule,
        walk: Walk,
        rows: slice,
        counts: Tensor | None,
        *,
        both: bool = False,
        two_sided: bool = False,
        room: Tensor | None = None,
    ) -> None:
        self.rule, self.walk, self.rows, self.counts, self.both = rule, walk, rows, counts, both
        self.n = rows.stop - rows.start
        self.bound = rule.steepness * walk.request.bound
        n = 2 * self.n if both else self.n
        safe = self.bound + rule.offset <= SAFE.get(walk.a.dtype, 0)
        self.logs = _Running(n, walk.a, safe)
        self.positives: SummedPositives | EachPositive
        if rule.sums_positives:
            self.positives = SummedPositives(walk, rows, n)
        else:
            self.positives = EachPositive(walk, rows, n)
            if rule.both_ends:
                self.positives.keep_ends()
        self.two_sided, self.room = two_sided, room
        self.slope = 1.0 if rule.far is None else rule.far.slope

    def take(
        self, place: Place, known: tuple[_Base] | None = None, *, collect: bool = False
    ) -> tuple[Tile, _Terms]:
        """A tile and its terms, with a known base if there is one; adds to the sums if asked."""
        out = None
        if self.room is not None:
            columns = place[1]
            out = self.room[self.n * columns.start : self.n * columns.stop].view(self.n, -1)
        observed = bool(force_visitors())  # they see the closeness too: it must not be overwritten
        tile = self.walk.tile(place, self.bound, None if observed else out)
        sides = self._sides(tile)
        if collect:  # before the terms overwrite the closeness
            self.positives.add(tile, sides)
        if self.rule.far is not None:
            exponents, out = self.rule.far.of(tile.closeness), None
        else:
            exponents = tile.closeness.clone() if observed else tile.closeness
        terms = self._terms(tile, sides, exponents, exponents if out is None else out, known)
        if self.rule.far is None and not observed:
            tile.closeness = terms.values  # which is not needed any more
        if collect:
            for side in sides:
                self.logs.add(terms, side)
        return tile, terms

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """The losses and counts; from here on it is known how hard each anchor acts."""
        request = self.walk.request
        counts, weight = (
            None if of_rows is None else self._of_anchors(of_rows)
            for of_rows in (self.counts, request.weight)
        )
        logs, kept = self.logs.value(), request.kept
        done = settle(self.rule, logs, self.positives, counts, weight, kept, both=self.both)
        for by in done.by_own:
            assert self.walk.own is not None
            self.walk.own += by.sum()
        by_logs = done.by_logs
        if not callable(self.slope) and self.slope != 1:
            by_logs = by_logs * self.slope
        self.logs.finish(by_logs)
        self.positives.set_forces(done.by_positives.to(self.walk.a.dtype))
        return done.loss, done.counts

    def force(self, tile: Tile, terms: _Terms) -> Tensor:
        """(r, c) the forces of the anchors on the sides of a tile; overwrites the terms."""
        force = self.logs.force(terms)
        if callable(self.slope):
            force.mul_(self.slope(tile.closeness))
        self.positives.add_forces(force, tile, terms.sides)
        return force

    def _sides(self, tile: Tile) -> list[Side]:
        start = self.rows.start
        sides = [Side(slice(tile.rows.start - start, tile.rows.stop - start), 1)]
        if tile.mirrored or self.both:
            first = self.n if self.both else 0
            columns = slice(first + tile.columns.start, first + tile.columns.stop)
            sides.append(Side(columns, 0))
        return sides

    def _of_anchors(self, of_rows: Tensor) -> Tensor:
        """(n,) what is known of each row, for the anchors."""
        of_rows = part(of_rows, self.rows)
        return torch.cat([of_rows, of_rows]) if self.both else of_rows

    def _terms(
        self,
        tile: Tile,
        sides: list[Side],
        exponents: Tensor,
        out: Tensor,
        known: tuple[_Base] | None,
    ) -> _Terms:
        """The terms of a tile, in `out`, which may be the exponents."""
        hidden = tile.block.selves, None if self.rule.with_positives else tile.block.positives
        if self.logs.safe:
            torch.exp(exponents, out=out)
            _fill(out, hidden, 0)
            return _Terms(out, 0.0, sides)
        terms = out if out is exponents else out.copy_(exponents)
        # Asking would stall an accelerator, and is pointless after one tile without a base.
        ask = known is None and self.two_sided and terms.is_cpu and not self.logs.spread_out
        low = terms.amin().item() if ask and terms.numel() else 0.0
        _fill(terms, hidden, -inf)
        if known is not None:
            (base,) = known
        elif not terms.numel():
            base = 0.0
        elif not self.two_sided:
            base = _finite(terms.amax(1))
        else:
            base = self.logs.common_base(low, terms.amax().item()) if ask else None
        if isinstance(base, Tensor):
            terms.sub_(base[:, None])
        elif base:
            terms.sub_(base)
        return _Terms(terms if base is None else terms.exp_(), base, sides)


def _fill(terms: Tensor, hidden: Sequence[PairSet | None], value: float) -> None:
    for pairs in hidden:
        if pairs is not None:
            pairs.fill(terms, value)


class _Running:
    """A running log-sum-exp of each anchor: its total times e^top.

    While all tiles have one base, that is the top, and totals just add up.
    """

    def __init__(self, n: int, like: Tensor, safe: bool) -> None:
        self.safe, self.dtype, self.device = safe, like.dtype, like.device
        self.n, self.sum_dtype = n, sum_dtype(like)
        self.top: Tensor | float | None = 0.0 if safe else None  # None: nothing was added yet
        self.is_common = True  # whether top is the base of all tiles so far
        self.last = 0.0  # the base last chosen
        self.spread_out = False  # whether a tile had none

    @cached_property
    def total(self) -> Tensor:
        return torch.zeros(self.n, dtype=self.sum_dtype, device=self.device)

    def common_base(self, low: float, high: float) -> float | None:
        """What to subtract from exponents so that both ends can sum them; None: nothing does it.

        Terms may then be as small as normal numbers are, but not much larger than 1: a force is a
        term times a factor, which is the smaller, the larger the terms are, and would underflow.
        """
        lowest, last = 2 * SAFE.get(self.dtype, 0), self.last
        if high == -inf or (last - lowest <= low and high <= last + _HIGHEST):
            return last  # a base in use is preferred: its sums just add up
        # One less, for the rounding; and a large base would cost digits.
        self.spread_out = not high - low <= lowest - 1 or not abs(high) < 2**20
        if self.spread_out:
            return None
        self.last = float(ceil(high))
        return self.last

    def add(self, terms: _Terms, side: Side) -> None:
        """Add the terms of a tile, summed along a dimension."""
        values, base = terms.values, terms.base
        if base is None:
            old, total = self._tops(side.at), part(self.total, side.at)
            new = torch.maximum(old, values.amax(side.dim))
            top = _finite(new)
            sums = (values - _finite(self._along(new, side))).exp_().sum(side.dim)
            total.mul_((old - top).exp_()).add_(sums)
            old.copy_(new)
            return
        sums = values.sum(side.dim)
        if side.at == slice(0, self.n) and "total" not in vars(self):
            # What comes first need not be added, and of one tile no digits are lost.
            self.top, self.total = base, sums.to(self.sum_dtype) if self.safe else sums
            return
        self.total = self.total.to(self.sum_dtype)
        total = part(self.total, side.at)
        if self.top is None and not isinstance(base, Tensor):
            self.top = base
        elif isinstance(base, Tensor) or isinstance(self.top, Tensor) or base != self.top:
            old = self._tops(side.at)
            # Where an anchor has no term in the tile, its base means nothing.
            base = torch.where(sums != 0, base, -inf)
            new = torch.maximum(old, base)
            top = _finite(new)
            total.mul_((old - top).exp_())
            sums = sums * (base - top).exp_()
            old.copy_(new)
        total.add_(sums)

    def _tops(self, at: slice) -> Tensor:
        """The top of each of some anchors, which may be changed."""
        if self.is_common or not isinstance(self.top, Tensor):
            top = -inf if self.top is None else self.top
            self.top = torch.where(self.total != 0, top, -inf).to(self.total.dtype)
            self.is_common = False
        return part(self.top, at)

    def value(self) -> LogSum:
        return LogSum(self.total.log(), 0.0 if self.top is None else self.top)

    def finish(self, by: Tensor) -> None:
        """Keep the derivatives by the log-sum-exps, which terms are to be multiplied with."""
        # Nothing was summed where the total is 0; by is 0 there.
        self.by, self.share = by, by / (self.total + torch.finfo(self.total.dtype).tiny)

    def force(self, terms: _Terms) -> Tensor:
        """(r, c) the derivatives by the exponents; overwrites the terms."""
        sides = terms.sides
        if terms.base is not None:
            factors = [self._factor(terms.base, side) for side in sides]
            return terms.values.mul_(factors[0] if len(sides) == 1 else factors[0] + factors[1])
        force, *others = [
            (terms.values - _finite(self._along(self._tops(side.at), side)))
            .exp_()
            .mul_(self._along(part(self.share, side.at), side))
            for side in sides
        ]
        for other in others:
            force.add_(other)
        return force

    def _factor(self, base: Tensor | float, side: Side) -> Tensor:
        """What terms relative to a base are multiplied with, (r, 1) or (1, c)."""
        if base is self.top or (isinstance(self.top, float) and base == self.top):
            return self._along(part(self.share, side.at), side)
        above = base - _finite(self._tops(side.at)) - part(self.total, side.at).log()
        # No term of an anchor is above its sum; where it has none in the tile, the base may be.
        above = above.clamp_(max=2 * SAFE[self.dtype]).exp_().mul_(part(self.by, side.at))
        return self._along(above, side)

    def _along(self, values: Tensor, side: Side) -> Tensor:
        """A number for each anchor of a tile, as the tile can be multiplied with them."""
        return values.to(self.dtype).unsqueeze(side.dim)


def _finite(logs: Tensor) -> Tensor:
    """The smallest number for -inf, where nothing was summed: -inf - -inf would be NaN."""
    return logs.clamp(min=torch.finfo(logs.dtype).min)
