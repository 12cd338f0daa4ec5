"""The executors of the loss over every triplet.

In general block by block, see `hinge`. In a batch against itself each pair of rows is looked at
once: put in the order of their classes, all positives lie in square tiles on the diagonal. These
tell how far each anchor's positives reach; every other tile holds nothing but negatives, and each
of them is a negative of both its ends. That takes 3 N^2 d of work for the products, not 6.
"""

from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from nearfar.engine import anchors as lookup
from nearfar.engine.anchor_sums import block_loss
from nearfar.engine.anchors import Anchors
from nearfar.engine.budget import Workspace, kept_elements
from nearfar.engine.budget import tile as tile_of
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.hinge import Tally, counted, hinges, of_negatives, of_positives
from nearfar.engine.observe import force_visitors
from nearfar.engine.products import Gradient
from nearfar.engine.relation import Block, Relation
from nearfar.engine.slices import part, spans
from nearfar.engine.step import Answer, Executor, Request
from nearfar.reduction import sum_dtype

# Copies of a tile that live at once: distances, forces of both ends, comparisons.
_BUFFERS = 6


def every_triplet(
    closeness: Closeness,
    relation: Relation,
    margin: float,
    smooth: bool,
    mean_of_active: bool,
    tally: Tally,
) -> Executor:
    """All triplets of each anchor; tells how many there are and how many cost something."""

    def rule(
        tile: Tile, weight: Tensor | None, gradient: bool, space: Workspace
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        anchors = Anchors.of(tile.block)
        sums = hinges(tile.closeness, anchors, margin, space, smooth=smooth, gradient=gradient)
        tally.add(sums.valid.sum(), sums.active.sum())
        force = sums.force
        if force is not None and weight is not None:
            force = force.mul_(weight[:, None])
        loss = torch.where(sums.valid > 0, sums.loss, 0)
        return loss, sums.active if mean_of_active else sums.valid, force

    by_blocks = block_loss(rule, closeness, relation)

    def execute(request: Request) -> Answer:
        a = request.a
        height, width = tile_of(request.limits, a.device, a.element_size(), _BUFFERS)
        shape = max(height // 2, 1), 2 * width
        if smooth or request.a.shape[0] <= shape[0] or force_visitors() or not _pays(relation):
            return by_blocks(request)
        work = _ByClass(closeness, relation, margin, request)
        answer, valid, active = work.answer(shape)
        tally.add(valid.sum(), active.sum())
        return replace(answer, counts=active if mean_of_active else valid)

    return execute


def _pays(relation: Relation) -> bool:
    """Whether the classes of a batch against itself are so small that comparing is fastest."""
    if not relation.symmetric or relation.row_labels is None or relation.row_labels.ndim == 2:
        return False
    return 0 < int(relation.n_positives().max()) <= lookup.FEW


class _ByClass:
    """A batch in the order of its classes."""

    def __init__(
        self, closeness: Closeness, relation: Relation, margin: float, request: Request
    ) -> None:
        assert relation.row_labels is not None
        self.closeness, self.original, self.margin = closeness, relation, margin
        labels, self.order = relation.row_labels.sort(stable=True)
        self.relation = replace(relation, row_labels=labels, column_labels=labels)
        self.a, _ = closeness.prepare(request.a[self.order], None)
        self.weight = None if request.weight is None else request.weight[self.order]
        self.gradient = Gradient(self.a, self.a) if request.gradient else None
        self.space, self.limits = Workspace(), request.limits
        n, most = self.a.shape[0], int(relation.n_positives().max())
        self.reach = self.a.new_full((n, most), -torch.inf)
        self.pull = self.a.new_zeros((n, most), dtype=sum_dtype(self.a))
        self.loss = self.a.new_zeros(n, dtype=sum_dtype(self.a))
        self.ends = [*(labels.diff() != 0).nonzero()[:, 0].add(1).tolist(), n]

    def answer(self, shape: tuple[int, int]) -> tuple[Answer, Tensor, Tensor]:
        """The answer in the order of the batch, how many triplets a row has, how many cost."""
        room = kept_elements(self.limits, self.a.device, self.a.element_size(), shape)
        kept: list[Tile | None] = []
        squares = self._squares(shape[0])
        everyones = [Anchors.of(self.relation.block(rows, rows)) for rows in squares]
        for rows, anchors in zip(squares, everyones, strict=True):
            square = self._tile(rows, rows)
            table = anchors.table(square.closeness, -torch.inf)
            self.reach[rows, : anchors.most] = table.add_(self.margin)
            room -= square.closeness.numel()
            kept.append(square if room >= 0 else None)
        for rows in squares:
            for at in spans(self.a.shape[0] - rows.stop, shape[1]):
                self._both_ends(rows, slice(rows.stop + at.start, rows.stop + at.stop))
        for rows, anchors in zip(squares, everyones, strict=True):
            self._own(rows, kept.pop(0) or self._tile(rows, rows), anchors)
        return self._in_order()

    def _squares(self, step: int) -> list[slice]:
        """Rows of about so many at a time, which share no class."""
        cuts = [0]
        while cuts[-1] < self.a.shape[0]:
            fits = bisect_right(self.ends, cuts[-1] + step) - 1
            cuts.append(self.ends[max(fits, bisect_right(self.ends, cuts[-1]))])
        return [slice(*cut) for cut in pairwise(cuts)]

    def _tile(self, rows: slice, columns: slice) -> Tile:
        a, b = part(self.a, rows), part(self.a, columns)
        block = Block((len(a), len(b)), None, None, a.device)  # across classes, all are negatives
        if rows == columns:
            block = self.relation.block(rows, columns)
        return Tile(rows, columns, block, *self.closeness.measure(a, b))

    def _both_ends(self, rows: slice, columns: slice) -> None:
        """A tile of negatives, seen from its rows and from its columns."""
        between = self._tile(rows, columns)
        self.space.clear()
        force = self._meet(rows, between.closeness)
        other = self._meet(columns, between.closeness.T)
        if self.gradient is not None:
            force.add_(other.T)
            self.closeness.backward(force, between, self.gradient)

    def _own(self, rows: slice, between: Tile, anchors: Anchors) -> None:
        """A tile on the diagonal, the last of its rows: from here on it is known how they pull."""
        self.space.clear()
        force = self._meet(rows, between.closeness, anchors)
        if self.gradient is not None:
            pull = self.pull[rows][anchors.row, anchors.slot].to(force.dtype)
            if self.weight is not None:
                pull *= self.weight[rows][anchors.row]
            force[anchors.row, anchors.column] = pull
            self.closeness.backward(force, between, self.gradient)

    def _meet(self, rows: slice, d: Tensor, anchors: Anchors | None = None) -> Tensor:
        """(r, c) how hard some anchors push their negatives; adds up what these cost.

        Args:
            rows: which anchors.
            d: (r, c) their distances.
            anchors: who is no negative of theirs; None: everyone is one.
        """
        reach = part(self.reach, rows)
        with nullcontext() if anchors is None else anchors.only_negatives(d):
            pull, force = counted(reach, d, None, self.space)
        part(self.pull, rows).add_(pull)
        part(self.loss, rows).add_(of_negatives(reach, d, force, self.space))
        return force if self.weight is None else force.mul_(self.weight[rows, None])

    def _in_order(self) -> tuple[Answer, Tensor, Tensor]:
        """The answer, how many triplets each row has and how many cost, as the rows came."""
        place = self.order.argsort()
        valid = self.original.n_positives() * self.original.n_negatives()
        active = self.pull.nan_to_num(0).sum(1).long()[place]
        loss = (self.loss + of_positives(self.reach, self.pull))[place].where(valid > 0, 0)
        if self.gradient is None:
            return Answer(loss, valid), valid, active
        da, _ = self.gradient.whole()
        assert da is not None  # of rows with themselves
        return Answer(loss, valid, da[place]), valid, active
