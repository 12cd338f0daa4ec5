"""Checks and conversions that whole-batch losses share, before the engine takes over."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor

from nearfar.engine.meeting import Group
from nearfar.engine.relation import Relation
from nearfar.inputs import ArrayLike, batch, lift, same_device, tensor
from nearfar.labels import refuse
from nearfar.listed import Pairs
from nearfar.losses.listed import as_listed
from nearfar.losses.related import related, rows_and_columns
from nearfar.reduction import Reduction, split
from nearfar.reference import ReferenceLike

Labels = TypeVar("Labels", bound=ArrayLike | None)


def as_batch(
    x: ArrayLike,
    labels: ArrayLike | None,
    reference: ReferenceLike | None,
    reduction: Reduction,
    pairs: Pairs | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Tensor | None, Relation]:
    """Rows, columns (None: the rows themselves), and which pairs are similar.

    Args:
        x: the rows.
        labels: of the rows.
        reference: see `Reference`.
        reduction: of the loss.
        pairs: the only ones that count; None: all.
        group: the processes that have the rows of the batch; None: this one has all.
    """
    if pairs is not None:
        return as_listed(x, labels, reference, pairs, group)
    if labels is None:
        raise TypeError(
            "labels must say which rows are similar, unless pairs or triplets are listed; got None."
        )
    labels = snapshot(labels, reduction)
    rows, columns = rows_and_columns(x, reference)
    others = own = None
    if reference is not None:
        others, own = (snapshot(part, reduction) for part in (reference.labels, reference.own))
    return rows, columns, related(rows, columns, labels, others, own)


def snapshot(labels: Labels, reduction: Reduction) -> Labels:
    """The labels, copied if the backward pass reads them again: the caller may overwrite them."""
    return deepcopy(labels) if split(reduction)[0] == "none" else labels


def as_towers(**given: ArrayLike) -> tuple[Tensor, Tensor]:
    """Two towers whose rows match one to one; the keywords are the caller's names for them."""
    (first, x), (second, y) = given.items()
    rows = batch(first, x, other=y)
    columns = batch(second, y, other=x)
    if rows.shape != columns.shape:
        raise ValueError(
            f"{second} must have the shape of {first}, {tuple(rows.shape)}, since row i of one "
            f"belongs to row i of the other; got {tuple(columns.shape)}."
        )
    same_device(second, columns, first, rows)
    return rows, columns


def row_weight(weight: ArrayLike | None, x: Tensor, each: str = "row") -> Tensor | None:
    """(n,) weights of the rows, 0 or more, in float32 or wider; errors call a row `each`."""
    if weight is None:
        return None
    given = tensor("weight", weight, device=x.device, beside=(x,))
    weight = lift("weight", given).detach()
    if weight.shape != x.shape[:1] or weight.device != x.device:
        of_classes = " For one weight per class pass class_weight[labels]."
        raise ValueError(
            f"weight must have shape ({len(x)},), one weight per {each}, on {x.device}; "
            f"got {tuple(weight.shape)} on {weight.device}.{of_classes if each == 'row' else ''}"
        )
    refuse("weight", weight, weight < 0, "be 0 or more")
    # A copy: the backward pass reads it again, and the caller may overwrite the original.
    return weight.to(torch.promote_types(x.dtype, torch.float32), copy=True)
