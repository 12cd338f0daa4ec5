"""The executor of rules on a block of rows against all columns, one block at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nearfar.engine.budget import Limits, block
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.products import Gradient, whole
from nearfar.engine.relation import Block, Relation
from nearfar.engine.slices import spans
from nearfar.engine.space import Space
from nearfar.engine.step import Answer, Executor, Request, show

# A rule: (b, m) closeness, positive and negative -> (b,) losses, and how much each row counts in
# the mean: 0, whatever its loss, where it has nothing to compare.
RowsRule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# The same with its derivative: (b, m) closeness, who is similar to whom, which rows these are,
# (b,) weights of their losses in the gradient (None: all 1), whether a gradient is wanted, memory
# that lasts until the next block -> (b,) losses, how much each counts, and (b, m) forces where they
# are wanted. The rule leaves the closeness as it was.
BlockRule = Callable[
    [Tensor, Block, slice, Tensor | None, bool, Space], tuple[Tensor, Tensor, Tensor | None]
]

# Copies of a block that live at once: the closeness, masks, and what the rule's autograd keeps.
_BUFFERS = 12


def stream(rule: RowsRule, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each block of rows once: closeness, rule, its gradient by autograd, two products."""
    return blockwise(_by_autograd(rule), closeness, relation)


def blockwise(rule: BlockRule, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each block of rows once: closeness, rule with its forces, and two products."""

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        columns = a if b is None else b
        everyone = slice(0, len(columns))
        per_row, counts = a.new_zeros(len(a)), a.new_zeros(len(a), dtype=torch.int64)
        gradient = Gradient(a, columns, request.finish) if request.gradient else None
        space = Space()
        for rows, tile, who in row_blocks(closeness, relation, a, columns, request.limits):
            space.clear()
            weight = None if request.weight is None else request.weight[rows]
            loss, count, force = rule(tile.values, who, rows, weight, request.gradient, space)
            per_row[rows], counts[rows] = loss.to(a.dtype), count.long()
            if force is not None and gradient is not None:
                show(request, rows, everyone, who, tile.values, force, closeness.toward)
                closeness.pull_back(force, tile, gradient, rows, everyone)
        return Answer(per_row, counts, *whole(gradient))

    return execute


def row_blocks(
    closeness: Closeness,
    relation: Relation,
    a: Tensor,
    columns: Tensor,
    limits: Limits,
) -> Iterator[tuple[slice, Tile, Block]]:
    """Blocks of prepared rows against all prepared columns: which rows, how close, who is who."""
    everyone = slice(0, len(columns))
    for rows in spans(len(a), block(limits, a.device, a.element_size(), _BUFFERS, len(columns))):
        yield rows, closeness.tile(a[rows], columns), relation.block(rows, everyone)


def _by_autograd(rule: RowsRule) -> BlockRule:
    """The forces of a rule in plain torch: its gradient with respect to the closeness."""

    def with_forces(
        values: Tensor,
        who: Block,
        rows: slice,
        weight: Tensor | None,
        gradient: bool,
        space: Space,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        positive, negative = who.masks()
        if not gradient:
            loss, count = rule(values, positive, negative)
            return torch.where(count > 0, loss, 0), count, None
        leaf = values.detach().requires_grad_()
        with torch.enable_grad():
            loss, count = rule(leaf, positive, negative)
            loss = torch.where(count > 0, loss, 0)
            total = (loss if weight is None else loss * weight).sum()
            (force,) = torch.autograd.grad(total, leaf, materialize_grads=True)
        return loss.detach(), count, force

    return with_forces
