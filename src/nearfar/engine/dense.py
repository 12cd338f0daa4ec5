"""The dense executor: the whole matrix and plain autograd. The reference the others must equal."""

import torch
from torch import Tensor

from nearfar.engine.relation import Relation
from nearfar.engine.stream import RowsRule


def dense(rule: RowsRule, closeness: Tensor, relation: Relation) -> tuple[Tensor, Tensor]:
    """Per-row losses of a rule on the full (n, m) closeness, and how much each counts.

    Everything is stored and differentiable, twice if the rule is.
    """
    n, m = closeness.shape
    positive, negative = relation.block(slice(0, n), slice(0, m)).masks()
    loss, count = rule(closeness, positive, negative)
    return torch.where(count > 0, loss, 0), count
