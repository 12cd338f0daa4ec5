"""What the rows of a batch are compared with, and which pairs are similar by their labels."""

from torch import Tensor

from nearfar.engine.relation import Relation, across, within
from nearfar.inputs import ArrayLike, batch
from nearfar.reference import ReferenceLike, check_reference


def rows_and_columns(x: ArrayLike, reference: ReferenceLike | None) -> tuple[Tensor, Tensor | None]:
    """The rows, and those of the reference; without one None, for the rows themselves."""
    if reference is None:
        return batch("x", x), None
    check_reference(reference)
    rows = batch("x", x, other=reference.x)
    return rows, batch("reference.x", reference.x, like=rows)


def related(
    rows: Tensor,
    columns: Tensor | None,
    labels: ArrayLike,
    others: ArrayLike | None,
    own: ArrayLike | None,
) -> Relation:
    """Which pairs are similar by their labels, and which are an item with itself.

    Args:
        rows: from `rows_and_columns`.
        columns: likewise.
        labels: of the rows.
        others: the labels of the reference; not read without one.
        own: which row of the reference is each row itself; likewise.
    """
    if columns is None:
        return within(labels, rows)
    return across(labels, rows, columns, others, own)
