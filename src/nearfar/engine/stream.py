"""The executor of any `rows` rule: a block of rows against all columns, one block at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from nearfar.engine.budget import block, spans
from nearfar.engine.closeness import Closeness
from nearfar.engine.step import Answer, Executor, Request, show
from nearfar.relation import Relation

# A rule: (b, m) closeness, positive and negative -> (b,) losses, and how much each row counts in
# the mean: 0, whatever its loss, where it has nothing to compare.
RowsRule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Copies of a block that live at once: the closeness, masks, and what the rule's autograd keeps.
_BUFFERS = 12


def stream(rule: RowsRule, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each block of rows once: closeness, rule, its gradient, and two products."""

    def execute(request: Request) -> Answer:
        a, b = closeness.prepare(request.a, request.b)
        columns = a if b is None else b
        n, m = len(a), len(columns)
        per_row, counts = a.new_zeros(n), a.new_zeros(n)
        da = torch.zeros_like(a) if request.gradient else None
        db = torch.zeros_like(columns) if request.gradient else None
        size = block(request.limits, a.device, a.element_size(), _BUFFERS, m)
        for rows in spans(n, size):
            tile = closeness.tile(a[rows], columns)
            who = relation.block(rows, slice(0, m))
            positive, negative = who.masks()
            weight = None if request.weight is None else request.weight[rows]
            loss, count, force = _apply(
                rule, tile.values, positive, negative, weight, request.gradient
            )
            per_row[rows], counts[rows] = loss, count.to(loss.dtype)
            if force is not None and da is not None and db is not None:
                show(request, rows, slice(0, m), who, tile.values, force, closeness.toward)
                closeness.pull_back(force, tile, a[rows], columns, da[rows], db)
        return Answer(per_row, counts, da, db)

    return execute


def _apply(
    rule: RowsRule,
    tile: Tensor,
    positive: Tensor,
    negative: Tensor,
    weight: Tensor | None,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rule on one block, and the forces: its gradient with respect to the closeness."""
    if not gradient:
        loss, count = rule(tile, positive, negative)
        return torch.where(count > 0, loss, 0), count, None
    leaf = tile.detach().requires_grad_()
    with torch.enable_grad():
        loss, count = rule(leaf, positive, negative)
        loss = torch.where(count > 0, loss, 0)
        total = (loss if weight is None else loss * weight).sum()
        (force,) = torch.autograd.grad(total, leaf, materialize_grads=True)
    return loss.detach(), count, force
