"""Losses of each anchor's log-sum-exp and of its positives: softmax and its relatives.

An anchor's log-sum-exp must be known before its first force. So tiles are taken in groups: a first
step collects sums from all tiles of the group, then the losses of its anchors are known, and a
second step applies the forces. There are two schedules:

- A group is a strip of rows, whose tiles are all kept between the steps (6 N^2 d of work).
- The group is everything, where columns are anchors too or a strip would not fit: the second step
  computes the products again (8 N^2 d, and 4 N^2 d on the upper triangle of a batch with itself),
  except for tiles that fit the memory budget, each of which saves a quarter of its work.

Where values may not be read, positives are not listed but marked by masks. If a loss is a sum over
them, of terms that take the log-sum-exp, one more step between the two adds these up.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf

import torch
from torch import Tensor

from nearfar.engine import gpu
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.listed_log_sums import over_list
from nearfar.engine.log_sum_rule import BothWays, LogSumRule, most_exact, settle
from nearfar.engine.marked_positives import NearPositives, PositiveTerms
from nearfar.engine.observe import force_visitors
from nearfar.engine.pair_sets import Masked, PairSet
from nearfar.engine.positives import EachPositive, Side, SummedPositives
from nearfar.engine.relation import Relation
from nearfar.engine.running import SAFE, Base, Running, Terms, finite
from nearfar.engine.slices import joined, part
from nearfar.engine.step import Answer, ByTiles, Executor, Request
from nearfar.engine.together import Together
from nearfar.engine.walk import Place, Walk
from nearfar.inputs import readable
from nearfar.reduction import sum_dtype


def log_sum_loss(
    rule: LogSumRule, closeness: Closeness, relation: Relation, *, both: bool = False
) -> Executor:
    """The executor of a rule for every row, or with `both` for every row and every column.

    With `both`, the loss of row i is the mean of its loss as a row and as a column.
    """

    def execute(request: Request) -> Answer:
        if gpu.takes(request, closeness, relation):
            from nearfar.engine.gpu import log_sums as on_gpu  # loads Triton

            return on_gpu.run(rule, closeness, relation, request, both=both)
        chosen = most_exact(rule, relation)
        if relation.listed is not None:
            return over_list(chosen, closeness, relation, request)
        return _over_tiles(chosen, closeness, relation, request, both=both)

    return execute if relation.listed is not None else ByTiles(execute)


def _over_tiles(
    rule: LogSumRule, closeness: Closeness, relation: Relation, request: Request, *, both: bool
) -> Answer:
    marked = not rule.sums_positives and not readable(request.a)  # to list them is to count them
    walk = Walk(request, closeness, relation, buffers=_MARKED if marked else _BUFFERS)
    if rule.single is not None and not relation.by_class:
        # A positive pair may be the only one of one of its ends, and is part of the other's sum.
        walk.mirrored = False
    if rule.learned:
        walk.own = walk.a.new_zeros((), dtype=sum_dtype(walk.a))
    counts, in_place = rule.counts(relation), rule.far is None and not marked
    kind = SummedPositives if rule.sums_positives or marked else EachPositive
    shape = walk.strip_shape((_IN_PLACE if in_place else _BESIDE) + kind.floats_per_pair(walk))
    at_once = request.ring is not None or request.dealt is not None
    if both or at_once or rule.both_ends or kind.wants_all_tiles(walk, shape[0]):
        rows, two_sided = slice(0, walk.a.shape[0]), both or walk.mirrored
        sums = _Sums(rule, walk, rows, counts, marked=marked, both=both, two_sided=two_sided)
        most = walk.kept_elements(1 if in_place else 2)
        found = [_in_steps(walk, sums, walk.places, most)]
    else:
        # One buffer for all strips; a batch that is one strip is done sooner in place.
        room = None
        if walk.a.shape[0] > shape[0] and in_place:
            room = walk.a.new_empty(shape[0] * walk.m)
        found = []
        for rows, places in walk.strips(shape):
            sums = _Sums(rule, walk, rows, counts, marked=marked, room=room)
            found.append(_in_steps(walk, sums, partial(_same, places), inf))
    if request.kept is not None:
        counts = joined([inside for _, inside in found if inside is not None], walk.a)
    return walk.answer(joined([loss for loss, _ in found], walk.a), counts)


def _same(places: Sequence[Place], *, pulling: bool = False) -> Sequence[Place]:
    """Places that are the same in every step."""
    return places


def _in_steps(
    walk: Walk, sums: "_Sums", places: Callable[..., Iterable[Place]], most: float
) -> tuple[Tensor, Tensor | None]:
    """The losses of the anchors of some tiles, and their counts; adds up their gradient.

    Args:
        walk: over the tiles.
        sums: of the anchors.
        places: of the tiles, for each step; see `Walk.places`.
        most: how many elements of the tiles of the first step are kept for the next.
    """
    gradient = walk.request.gradient
    again = gradient or sums.terms is not None
    bases: list[Base] = []
    kept: deque[tuple[Tile, Terms] | None] = deque()
    for place in places():
        tile, terms = sums.take(place, collect=True)
        most -= terms.values.numel()
        kept.append((tile, terms) if most >= 0 and again else None)
        bases.append(terms.base)
    if sums.terms is not None:
        sums.add_terms(
            walk.tile(place, sums.bound) if found is None else found[0]
            for place, found in zip(places(), kept, strict=True)
        )
    losses, counts = sums.finish()
    if gradient:
        for place, base in zip(places(pulling=True), bases, strict=True):
            tile, terms = kept.popleft() or sums.take(place, (base,))
            walk.pull(tile, sums.force(tile, terms))
    return losses, counts


# Copies of a tile that live at once, and where positives are marked: their terms take more room.
_BUFFERS, _MARKED = 8, 16
# Numbers kept per pair of a strip: its term, and where exponents are not the closeness itself, that
# and room to work in.
_IN_PLACE, _BESIDE = 1, 4


class _Sums:
    """The sums of some anchors, and once these are finished, the forces of each anchor's pairs.

    Args:
        rule: the loss.
        walk: over the tiles.
        rows: which rows are anchors.
        counts: see `LogSumRule`.
        marked: whether each positive is taken by masks, since none can be listed.
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
        marked: bool,
        both: bool = False,
        two_sided: bool = False,
        room: Tensor | None = None,
    ) -> None:
        self.rule, self.walk, self.rows, self.counts = rule, walk, rows, counts
        self.n = rows.stop - rows.start
        self.both = BothWays(self.n, walk.request.together) if both else None
        self.bound = rule.steepness * walk.request.bound
        n = self.n + walk.m if both else self.n
        safe = self.bound + rule.offset <= SAFE.get(walk.a.dtype, 0)
        self.logs = Running(n, walk.a, safe)
        self.terms: PositiveTerms | None = None
        self.positives: SummedPositives | EachPositive | NearPositives | PositiveTerms
        if rule.sums_positives:
            self.positives = SummedPositives(walk, rows, n)
        elif marked and rule.near is not None:
            self.positives = NearPositives(rule.near, walk, n)
        elif marked:
            self.positives = self.terms = PositiveTerms(rule, walk, n, self.both)
        else:
            self.positives = EachPositive(walk, rows, n)
            if rule.both_ends:
                self.positives.keep_ends()
        self.two_sided, self.room, self.marked = two_sided, room, marked
        self.slope = 1.0 if rule.far is None else rule.far.slope

    def take(
        self, place: Place, known: tuple[Base] | None = None, *, collect: bool = False
    ) -> tuple[Tile, Terms]:
        """A tile and its terms, with a known base if there is one; adds to the sums if asked."""
        out = None
        if self.room is not None:
            columns = place[1]
            out = self.room[self.n * columns.start : self.n * columns.stop].view(self.n, -1)
        # Observers and masks see the closeness too: then it must not be overwritten.
        seen = self.marked or bool(force_visitors())
        tile = self.walk.tile(place, self.bound, None if seen else out)
        sides = self._sides(tile)
        if collect and self.terms is None:  # before the terms overwrite the closeness
            self.positives.add(tile, sides)
        if self.rule.far is not None:
            exponents, out = self.rule.far.of(tile.closeness), None
        else:
            exponents = tile.closeness.clone() if seen else tile.closeness
        terms = self._terms(tile, sides, exponents, exponents if out is None else out, known)
        if self.rule.far is None and not seen:
            tile.closeness = terms.values  # which is not needed any more
        if collect:
            for side in sides:
                self.logs.add(terms, side)
        return tile, terms

    def add_terms(self, tiles: Iterable[Tile]) -> None:
        """Add the terms that take the log-sum-exps, once these are complete."""
        assert self.terms is not None
        self.terms.know(self.logs.value(), *self._known())
        for tile in tiles:
            self.terms.add(tile, self._sides(tile))

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """The losses and counts; from here on it is known how hard each anchor acts."""
        request = self.walk.request
        if isinstance(self.positives, PositiveTerms):
            done = self.positives.settled()
        else:
            if self.both is not None and request.together is not None:
                self._add_others(slice(self.n, self.logs.n), request.together)
            elif request.dealt is not None:
                self._add_others(slice(0, self.logs.n), request.dealt)
            known, logs = self._known(), self.logs.value()
            done = settle(
                *(self.rule, logs, self.positives, *known, request.kept),
                both=self.both,
                together=request.together,
                dealt=request.dealt,
            )
            self.positives.set_forces(done.by_positives.to(self.walk.a.dtype))
        for by in done.by_own:
            assert self.walk.own is not None
            self.walk.own += by.sum()
        by_logs = done.by_logs
        if not callable(self.slope) and self.slope != 1:
            by_logs = by_logs * self.slope
        self.logs.finish(by_logs)
        return done.loss, done.counts

    def force(self, tile: Tile, terms: Terms) -> Tensor:
        """(r, c) the forces of the anchors on the sides of a tile; overwrites the terms."""
        force = self.logs.force(terms)
        if callable(self.slope):
            force.mul_(self.slope(tile.closeness))
        self.positives.add_forces(force, tile, terms.sides)
        return force

    def _add_others(self, anchors: slice, together: Together) -> None:
        """Add what other processes have summed of some anchors."""
        self.logs.add_others(anchors, together)
        if isinstance(self.positives, SummedPositives):
            positives = part(self.positives.values, anchors)
            positives.copy_(together.total(positives))
        elif isinstance(self.positives, EachPositive):
            self.positives.complete()

    def _sides(self, tile: Tile) -> list[Side]:
        start = self.rows.start
        sides = [Side(slice(tile.rows.start - start, tile.rows.stop - start), 1)]
        if tile.mirrored or self.both is not None:
            first = 0 if self.both is None else self.n
            columns = slice(first + tile.columns.start, first + tile.columns.stop)
            sides.append(Side(columns, 0))
        return sides

    def _known(self) -> tuple[Tensor | None, Tensor | None]:
        """(n,) how much each anchor counts in the mean, and its weight."""
        counts, weight = (
            None if of_rows is None else part(of_rows, self.rows)
            for of_rows in (self.counts, self.walk.request.weight)
        )
        if self.both is None:
            return counts, weight
        spread = (None if of is None else self.both.spread(of) for of in (counts, weight))
        counts, weight = spread
        return counts, weight

    def _terms(
        self,
        tile: Tile,
        sides: list[Side],
        exponents: Tensor,
        out: Tensor,
        known: tuple[Base] | None,
    ) -> Terms:
        """The terms of a tile, in `out`, which may be the exponents."""
        hidden = tile.block.selves, self._left_out(tile)
        if self.logs.safe:
            torch.exp(exponents, out=out)
            _fill(out, hidden, 0)
            return Terms(out, 0.0, sides)
        terms = out if out is exponents else out.copy_(exponents)
        # Asking would stall an accelerator, and is pointless after one tile without a base.
        ask = known is None and self.two_sided and readable(terms) and not self.logs.spread_out
        low = terms.amin().item() if ask and terms.numel() else 0.0
        _fill(terms, hidden, -inf)
        if known is not None:
            (base,) = known
        elif not terms.numel():
            base = 0.0
        elif not self.two_sided:
            base = finite(terms.amax(1))
        else:
            base = self.logs.common_base(low, terms.amax().item()) if ask else None
        if isinstance(base, Tensor):
            terms.sub_(base[:, None])
        elif base:
            terms.sub_(base)
        return Terms(terms if base is None else terms.exp_(), base, sides)

    def _left_out(self, tile: Tile) -> PairSet | None:
        """The positives that are no part of the log-sum-exps."""
        positives = tile.block.positives
        if positives is None or not self.rule.with_positives:
            return positives
        if self.rule.single is None:
            return None
        alone = part(self.walk.relation.n_positives(), tile.rows) == 1
        return Masked(positives.mask() & alone[:, None])


def _fill(terms: Tensor, hidden: Sequence[PairSet | None], value: float) -> None:
    for pairs in hidden:
        if pairs is not None:
            pairs.fill(terms, value)
