"""Checks and conversions that whole-batch losses share, before the engine takes over."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor

from nearfar.engine.meeting import Group
from nearfar.engine.relation import Items, Relation
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


def as_items(
    ids: ArrayLike | None,
    x: Tensor,
    reduction: Reduction,
    *,
    hard: Tensor | None = None,
    hard_ids: ArrayLike | None = None,
) -> Items | None:
    """Which items two towers are; None: each row is an item of its own.

    Args:
        ids: (n,) or (n, k), of the rows of both towers.
        x: (n, d) the first tower.
        reduction: of the loss.
        hard: (m, d) or (n, m, d) more rows of the second; None: none.
        hard_ids: (m,) or (n, m), their ids; None: they have none.
    """
    if ids is None:
        if hard_ids is not None:
            raise ValueError("hard_ids are compared with ids, which are not given: pass ids too.")
        return None
    of_rows = item_ids("ids", snapshot(ids, reduction), x)
    if hard is None:
        if hard_ids is not None:
            raise ValueError("hard_ids are those of hard_negatives, which are not given.")
        return Items(of_rows, of_rows)
    of_hard = torch.full(hard.shape[:-1], -1, device=x.device)
    if hard_ids is not None:
        given = _integers("hard_ids", snapshot(hard_ids, reduction), x)
        if given.shape != hard.shape[:-1]:
            raise ValueError(
                f"hard_ids must have shape {tuple(hard.shape[:-1])}, one per row of "
                f"hard_negatives; got {tuple(given.shape)}."
            )
        of_hard = _ids("hard_ids", given)
    of_hard = of_hard.flatten()[:, None].expand(-1, of_rows.shape[1])
    return Items(of_rows, torch.cat([of_rows, of_hard]))


def item_ids(name: str, ids: ArrayLike, like: Tensor) -> Tensor:
    """(n, k) int64, the items of rows: 0 or more, or -1 for none.

    Args:
        name: the caller's name for `ids`.
        ids: (n,) or (n, k) integers.
        like: (n, ...) the rows.
    """
    given, n = _integers(name, ids, like), len(like)
    if given.ndim not in (1, 2) or len(given) != n or 0 in given.shape[1:]:
        raise ValueError(
            f"{name} must have shape ({n},), one per row, or ({n}, k) with several; got "
            f"{tuple(given.shape)}."
        )
    known = _ids(name, given)
    return known[:, None] if known.ndim == 1 else known


def _integers(name: str, ids: ArrayLike, like: Tensor) -> Tensor:
    known = tensor(name, ids, device=like.device)
    if known.is_floating_point() or known.is_complex() or known.dtype is torch.bool:
        raise TypeError(f"{name} must be integers, 0 or more, or -1 for none; got {known.dtype}.")
    same_device(name, known, "the embeddings", like)
    return known


def _ids(name: str, given: Tensor) -> Tensor:
    """int64, of (n,) or (n, k) integers."""
    ids = given.to(torch.int64)
    # Unsigned ids from 2**63 on have become negative, and the last of them -1.
    unsigned = given.dtype is torch.uint64
    bad = ids < (0 if unsigned else -1)
    expected = "be below 2**63" if unsigned else "be 0 or more, or -1 for none"
    refuse(name, given, bad.any(1) if bad.ndim == 2 else bad, expected)
    return ids


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
