"""Losses of each anchor against all columns, one block of rows at a time.

A rule sees some anchors with their closeness to all columns, so it may be any function of these. If
it does not return forces, autograd derives them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nearfar.engine.budget import Workspace
from nearfar.engine.closeness import Closeness, Tile
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Executor, Request
from nearfar.engine.walk import Walk
from nearfar.reduction import Between, sum_dtype

# A tile of all columns, (b,) weights of the losses in the gradient (None: all 1), whether to return
# forces, memory that is reused for the next tile -> (b,) losses, (b,) how much each counts in the
# mean, and (b, m) forces or None. Leaves the closeness unchanged.
BlockRule = Callable[[Tile, Tensor | None, bool, Workspace], tuple[Tensor, Tensor, Tensor | None]]

# A tile of all columns, and tensors of the rule -> (b,) losses, and how much each counts in the
# mean, 0 for anchors with nothing to compare.
Loss = Callable[..., tuple[Tensor, Tensor]]
# The same -> (b, m) the derivative of each anchor's loss with respect to its closeness.
Force = Callable[..., Tensor]

# Copies of a block held at the same time: closeness, masks, and what autograd keeps for a rule.
_BUFFERS = 12


def block_loss(rule: BlockRule, closeness: Closeness, relation: Relation) -> Executor:
    """Visit each block of rows once: compute closeness, losses, forces and their gradient."""

    def execute(request: Request) -> Answer:
        walk = Walk(request, closeness, relation, buffers=_BUFFERS)
        n, workspace = walk.a.shape[0], Workspace()
        per_row, counts = walk.a.new_zeros(n), walk.a.new_zeros(n, dtype=sum_dtype(walk.a))
        for tile in walk.blocks():
            workspace.clear()
            weight = None if request.weight is None else request.weight[tile.rows]
            loss, count, force = rule(tile, weight, request.gradient, workspace)
            per_row[tile.rows], counts[tile.rows] = loss.to(walk.a.dtype), count.to(counts.dtype)
            if force is not None:
                walk.pull(tile, force)
        return walk.answer(per_row, counts)

    return execute


def anchor_loss(
    loss: Loss,
    force: Force | None,
    learned: Sequence[Tensor],
    closeness: Closeness,
    relation: Relation,
) -> Executor:
    """A loss in plain torch; autograd derives whatever `force` does not return.

    Args:
        loss: of a block of anchors.
        force: its derivative with respect to the closeness; None: left to autograd.
        learned: tensors that the loss gets after the tile, and that get gradients.
        closeness: how close rows are to columns.
        relation: which pairs are similar.
    """

    def execute(request: Request) -> Answer:
        tensors = [t.detach().requires_grad_(t.requires_grad) for t in learned]
        wanted = [t for t in tensors if t.requires_grad]
        sums = [torch.zeros_like(t) for t in wanted]

        def with_forces(
            tile: Tile, weight: Tensor | None, gradient: bool, _: Workspace
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            if not gradient:
                return *_counted(loss(tile, *tensors), request.kept)[:2], None
            leaf = tile.closeness.detach().requires_grad_(force is None)
            inputs = [leaf, *wanted] if force is None else wanted
            with torch.enable_grad():
                found = loss(replace(tile, closeness=leaf), *tensors)
                per_row, count, acts = _counted(found, request.kept)
                total = (per_row if weight is None else per_row * weight).sum()
                derived = gradients_of(total, inputs)
            per_row = per_row.detach()
            if force is None:
                pull, *derived = derived
            else:
                pull = force(tile, *tensors)
                pull = pull if weight is None else pull * weight[:, None]
            for total, more in zip(sums, derived, strict=True):
                total += more
            # No anchor pulls that does not count; and the walk overwrites what it is given.
            return per_row, count, pull.where(acts[:, None], 0).to(leaf.dtype)

        answer = block_loss(with_forces, closeness, relation)(request)
        by_tensor = iter(sums)
        each = [next(by_tensor) if t.requires_grad else None for t in tensors]
        return replace(answer, learned=tuple(each))

    return execute


def _counted(found: tuple[Tensor, Tensor], kept: Between | None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and counts, both 0 for anchors that do not count, and bool, which anchors do."""
    loss, count = found
    acts = count > 0
    if kept is not None:
        acts = acts & ~kept.outside(loss.detach())
        count = count.where(acts, 0)
    return loss.where(acts, 0), count, acts


def gradients_of(total: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each input, 0 where the total does not depend on it."""
    if not inputs or not total.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    return list(torch.autograd.grad(total, inputs, materialize_grads=True))
