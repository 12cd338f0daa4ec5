"""A batch of which only listed pairs are compared."""

import torch
from torch import Tensor

from nearfar.engine.relation import PairList, Relation
from nearfar.engine.slices import spans
from nearfar.inputs import ArrayLike, batch
from nearfar.labels import batch_labels, class_ids, refuse
from nearfar.pairs import Pairs, listed_pairs
from nearfar.reference import Reference, check_reference

Ends = tuple[Tensor, Tensor]


def as_listed(
    x: ArrayLike,
    labels: ArrayLike | None,
    reference: Reference | None,
    pairs: Pairs,
    name: str = "pairs",
) -> tuple[Tensor, Tensor | None, Relation]:
    """Rows, columns (None: the rows themselves), and the only pairs of them that count.

    `name` is the caller's name for `pairs`.
    """
    rows, columns = batch("x", x), None
    own = torch.arange(len(rows), device=rows.device)
    if reference is not None:
        check_reference(reference)
        rows = batch("x", x, other=reference.x)
        columns = batch("reference.x", reference.x, like=rows)
        own = torch.full_like(own, -1)
        if reference.own is not None:
            own = class_ids(reference.own, like=rows, name="reference.own")
    n, m, device = len(rows), len(rows if columns is None else columns), rows.device
    near, far = listed_pairs(pairs, n, m, device, name)
    for kind, (row, column) in (("similar", near), ("dissimilar", far)):
        expected = "pair two items, not an item with itself"
        _refuse_pairs(f"{kind} pairs of {name}", row, column, column == own[row], expected)
    if labels is not None:
        of_rows = of_columns = batch_labels(labels, like=rows)
        if columns is not None and reference is not None:
            of_columns = _labels_of(reference, columns, of_rows)
        _check_agreement(of_rows, of_columns, near, far, name)
    return rows, columns, Relation(n, m, device, listed=PairList(near, far))


def _labels_of(reference: Reference, columns: Tensor, like: Tensor) -> Tensor:
    """The labels of a reference, of the kind that the labels of the batch are."""
    if reference.labels is None:
        raise TypeError(
            "reference.labels must be given if labels are; or pass labels=None, and the pairs "
            "alone say which rows are similar."
        )
    labels = batch_labels(reference.labels, like=columns, name="reference.labels")
    if labels.shape[1:] != like.shape[1:]:
        raise ValueError(
            "labels and reference.labels must be of the same kind; got "
            f"{tuple(like.shape)} and {tuple(labels.shape)}."
        )
    return labels


def _check_agreement(of_rows: Tensor, of_columns: Tensor, near: Ends, far: Ends, name: str) -> None:
    """Refuse labels that contradict the listed pairs, which may be those of another batch."""
    width = max(1, of_rows.numel() // max(1, len(of_rows)))
    for kind, (row, column) in (("similar", near), ("dissimilar", far)):
        for at in spans(len(row), max(1, 2**22 // width)):
            one, other = of_rows[row[at]], of_columns[column[at]]
            same = one == other if one.ndim == 1 else (one & other).any(1)
            bad = ~same if kind == "similar" else same
            expected = f"be {kind} by their labels too; labels=None goes by {name} alone"
            _refuse_pairs(f"{kind} pairs of {name}", row[at], column[at], bad, expected)


def _refuse_pairs(name: str, row: Tensor, column: Tensor, bad: Tensor, expected: str) -> None:
    refuse(f"the {name}", torch.stack([row, column], 1), bad, expected)
