"""A batch of which only listed pairs, or those of listed triplets, are compared."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nearfar.engine.meeting import Group
from nearfar.engine.relation import PairList, Relation
from nearfar.engine.slices import spans
from nearfar.inputs import ArrayLike
from nearfar.listed import Ends, Pairs, listed_pairs, pairs_of_triplets
from nearfar.losses.related import related, rows_and_columns
from nearfar.reference import ReferenceLike

Listed = tuple[Tensor, Tensor | None, Relation]


def as_listed(
    x: ArrayLike,
    labels: ArrayLike | None,
    reference: ReferenceLike | None,
    pairs: Pairs,
    group: Group | None,
) -> Listed:
    """Rows, columns (None: the rows themselves), and the only pairs of them that count.

    Args:
        x: the rows.
        labels: of the rows, which must agree with the pairs; None: there are none.
        reference: see `Reference`.
        pairs: as the caller lists them.
        group: the processes that have the rows of the batch, so that the pairs can only be checked
            when these are known; None: this one has all.
    """
    rows, columns, relation = _all_pairs(x, labels, reference)
    ends = listed_pairs(pairs, len(rows), rows.device)
    late = group is not None and columns is None
    return rows, columns, _only(ends, relation, labelled=labels is not None, late=late)


def as_listed_triplets(
    x: ArrayLike,
    labels: ArrayLike | None,
    reference: ReferenceLike | None,
    triplets: Tensor,
    group: Group | None,
) -> Listed:
    """The same with the pairs of (t, 3) triplets from `listed_triplets`."""
    rows, columns, relation = _all_pairs(x, labels, reference)
    ends = pairs_of_triplets(triplets)
    late = group is not None and columns is None
    return rows, columns, _only(ends, relation, labelled=labels is not None, late=late)


def _all_pairs(x: ArrayLike, labels: ArrayLike | None, reference: ReferenceLike | None) -> Listed:
    """The same with all pairs; without labels no two rows are similar."""
    rows, columns = rows_and_columns(x, reference)
    others = own = None
    if reference is not None:
        others, own = reference.labels, reference.own
    if labels is None:
        labels = torch.arange(len(rows), device=rows.device)
        others = labels if columns is None else torch.arange(len(columns), device=rows.device)
    elif columns is not None and others is None:
        raise TypeError(
            "reference.labels must be given if labels are; or pass labels=None, and the list alone "
            "says which rows are similar."
        )
    return rows, columns, related(rows, columns, labels, others, own)


def _only(ends: tuple[Ends, Ends], relation: Relation, *, labelled: bool, late: bool) -> Relation:
    """The relation without the pairs that are not listed; refuses those that contradict it."""
    near, far = ((kind.row, kind.column) for kind in ends)
    check = partial(_check, ends, labelled=labelled)
    if late:
        return replace(relation, listed=PairList(near, far, check))
    check(relation)
    listed = PairList(near, far)
    return Relation(relation.n, relation.m, relation.device, listed=listed, shared=relation.shared)


def _check(kinds: tuple[Ends, Ends], relation: Relation, *, labelled: bool) -> None:
    """Refuse pairs of rows that there are not, of an item with itself, or against the labels."""
    own = relation.own
    columns = "batch" if own is not None and relation.shared is None else "reference"
    for ends in kinds:
        ends.check_rows(relation.n, relation.m, columns)
        if own is not None:
            ends.check_not_itself(own)
        if labelled:
            _check_agreement(relation, ends)


def _check_agreement(relation: Relation, ends: Ends) -> None:
    """Refuse labels that contradict the listed pairs, which may be those of another batch."""
    of_rows, of_columns = relation.row_labels, relation.column_labels
    assert of_rows is not None
    assert of_columns is not None
    width = max(1, of_rows.numel() // max(1, len(of_rows)))
    same = torch.zeros(len(ends.row), dtype=torch.bool, device=ends.row.device)
    for at in spans(len(ends.row), max(1, 2**22 // width)):
        one, other = of_rows[ends.row[at]], of_columns[ends.column[at]]
        same[at] = one == other if one.ndim == 1 else (one & other).any(1)
    ends.check_labels(same)
