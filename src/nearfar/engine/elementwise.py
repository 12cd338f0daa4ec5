"""The executor of losses that are a sum over pairs: one visit to each tile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfar.engine.budget import spans, tile
from nearfar.engine.closeness import Closeness
from nearfar.engine.step import Answer, Executor, Request, show
from nearfar.observe import force_visitors
from nearfar.relation import Block, Relation

# The loss of each pair of a tile and its derivative; either may overwrite nothing.
Term = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class PairRule:
    """A loss that adds up over pairs: one term for positives, one for negatives.

    Attributes:
        positive, negative: closeness -> (loss, derivative), elementwise.
        positive_weight, negative_weight: by which the terms count.
    """

    positive: Term
    negative: Term
    positive_weight: float | Tensor = 1.0
    negative_weight: float | Tensor = 1.0

    def rows(self, closeness: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a `rows` rule, for the dense and the streaming executor."""
        near = torch.where(positive, self.positive(closeness)[0], 0).sum(1) * self.positive_weight
        far = torch.where(negative, self.negative(closeness)[0], 0).sum(1) * self.negative_weight
        return near + far, torch.ones_like(near, dtype=torch.bool)

    def tile(self, closeness: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Losses and forces of a tile."""
        loss, force = _weigh(self.negative(closeness), self.negative_weight)
        if block.similar is not None:
            near, pull = _weigh(self.positive(closeness), self.positive_weight)
            loss = near.where(block.similar, loss)
            force = pull.where(block.similar, force)
        if block.itself is not None:
            loss, force = loss.masked_fill_(block.itself, 0), force.masked_fill_(block.itself, 0)
        return loss, force


def _weigh(terms: tuple[Tensor, Tensor], by: float | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(by, float) and by == 1:
        return terms
    return terms[0] * by, terms[1] * by


_BUFFERS = 8


def elementwise(rule: PairRule, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each tile once; where the rows are the columns, the upper triangle only."""

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        columns = a if b is None else b
        n, m = len(a), len(columns)
        per_row, forces = a.new_zeros(n), None if request.bias is None else a.new_zeros(())
        da = torch.zeros_like(a) if request.gradient else None
        db = torch.zeros_like(columns) if request.gradient else None
        mirrored = relation.symmetric and not force_visitors()
        shape = tile(request.limits, a.device, a.element_size(), _BUFFERS)
        for rows, cols, twice in tiles(n, m, shape, mirrored):
            c, block = closeness.tile(a[rows], columns[cols]), relation.block(rows, cols)
            if request.bias is not None:
                c.values.add_(request.bias)
            loss, force = rule.tile(c.values, block)
            per_row[rows] += loss.sum(1)
            if twice:
                per_row[cols] += loss.sum(0)
            if da is None or db is None:
                continue
            if request.weight is not None:
                ends = request.weight[rows, None]
                force *= ends + request.weight[cols] if twice else ends
            elif twice:
                force *= 2
            show(request, rows, cols, block, c.values, force, closeness.toward)
            if forces is not None:
                forces += force.sum()
            closeness.pull_back(force, c, a[rows], columns[cols], da[rows], db[cols])
        return Answer(per_row, None, da, db, forces)

    return execute


def tiles(
    n: int, m: int, shape: tuple[int, int], mirrored: bool
) -> list[tuple[slice, slice, bool]]:
    """The tiles to visit, and whether each also stands for its mirror image.

    Mirrored, n = m: the square tiles on the diagonal, which hold both halves, and the upper ones.
    """
    if not mirrored:
        return [(i, j, False) for i in spans(n, shape[0]) for j in spans(m, shape[1])]
    visits = []
    for i in spans(n, shape[0]):
        right = [slice(i.stop + j.start, i.stop + j.stop) for j in spans(n - i.stop, shape[1])]
        visits += [(i, i, False), *((i, j, True) for j in right)]
    return visits
