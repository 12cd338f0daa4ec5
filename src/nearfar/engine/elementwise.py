"""The executor of losses that are a sum over pairs: one visit to each tile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfar.engine.budget import tile, triangle_tile
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.observe import force_visitors
from nearfar.engine.pair_sets import Masked
from nearfar.engine.products import Gradient, whole
from nearfar.engine.relation import Block, Relation
from nearfar.engine.slices import part, spans
from nearfar.engine.step import Answer, Executor, Request, show

# (closeness, weight of the rule) -> weight x (the loss of each pair, its derivative); overwrites
# nothing.
Term = Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class PairRule:
    """A loss that adds up over pairs: one term for positives, one for negatives.

    Attributes:
        positive: the term of positive pairs.
        negative: the term of negative pairs.
        positive_weight: by which the former counts.
        negative_weight: by which the latter counts.
    """

    positive: Term
    negative: Term
    positive_weight: float | Tensor = 1.0
    negative_weight: float | Tensor = 1.0

    def rows(self, closeness: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a `rows` rule, for the dense and the streaming executor."""
        near = self.positive(closeness, self.positive_weight)[0].where(positive, 0).sum(1)
        far = self.negative(closeness, self.negative_weight)[0].where(negative, 0).sum(1)
        return near + far, torch.ones_like(near, dtype=torch.bool)

    def tile(self, closeness: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Losses and forces of a tile. Where positives are few, theirs are put in one by one."""
        loss, force = self.negative(closeness, self.negative_weight)
        if isinstance(block.positives, Masked):
            near, pull = self.positive(closeness, self.positive_weight)
            similar = block.positives.mask()
            loss, force = torch.where(similar, near, loss), torch.where(similar, pull, force)
        elif block.positives is not None:
            i, j = block.positives.indices()
            loss[i, j], force[i, j] = self.positive(closeness[i, j], self.positive_weight)
        if block.selves is not None:
            block.selves.fill(loss, 0)
            block.selves.fill(force, 0)
        return loss, force


_BUFFERS = 10


def elementwise(rule: PairRule, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each tile once; where the rows are the columns, the upper triangle only."""

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        columns = a if b is None else b
        per_row, forces = a.new_zeros(a.shape[0]), None if request.bias is None else a.new_zeros(())
        gradient = Gradient(a, columns, request.finish) if request.gradient else None
        for visit in visits(closeness, relation, a, columns, request):
            rows, cols, twice = visit.rows, visit.columns, visit.twice
            c, block = visit.tile, visit.block
            if request.bias is not None:
                c.values.add_(request.bias)
            loss, force = rule.tile(c.values, block)
            part(per_row, rows).add_(loss.sum(1))
            if twice:
                part(per_row, cols).add_(loss.sum(0))
            if gradient is None:
                continue
            if request.weight is not None:
                ends = request.weight[rows, None]
                force *= ends + request.weight[cols] if twice else ends
            elif twice:
                force *= 2
            show(request, rows, cols, block, c.values, force, closeness.toward)
            if forces is not None:
                forces += force.sum()
            even = block.positives is None
            closeness.pull_back(force, c, gradient, rows, cols, even=even)
        return Answer(per_row, None, *whole(gradient), forces)

    return execute


@dataclass(eq=False)
class Visit:
    """A tile that stands before us, and whether it also stands for its mirror image."""

    rows: slice
    columns: slice
    twice: bool
    tile: Tile
    block: Block


def visits(
    closeness: Closeness, relation: Relation, a: Tensor, columns: Tensor, request: Request
) -> Iterator[Visit]:
    """Every tile of prepared rows and columns, one after the other."""
    mirrored = relation.symmetric and not force_visitors()
    room = request.limits, a.device, a.element_size(), _BUFFERS
    shape = triangle_tile(*room, a.shape[1]) if mirrored else tile(*room)
    for rows, cols, twice in tiles(a.shape[0], columns.shape[0], shape, mirrored):
        between = closeness.tile(part(a, rows), part(columns, cols), request.bound)
        yield Visit(rows, cols, twice, between, relation.block(rows, cols))


def tiles(
    n: int, m: int, shape: tuple[int, int], mirrored: bool
) -> list[tuple[slice, slice, bool]]:
    """The tiles to visit, and whether each also stands for its mirror image.

    Mirrored, n = m: the square tiles on the diagonal, which hold both halves, and the upper ones.
    """
    if not mirrored:
        return [(i, j, False) for i in spans(n, shape[0]) for j in spans(m, shape[1])]
    found = []
    for i in spans(n, shape[0]):
        right = [slice(i.stop + j.start, i.stop + j.stop) for j in spans(n - i.stop, shape[1])]
        found += [(i, i, False), *((i, j, True) for j in right)]
    return found
