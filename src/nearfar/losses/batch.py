"""What every whole-batch loss does with its arguments before the engine takes over."""

from torch import Tensor

from nearfar.inputs import ArrayLike, batch, lift, tensor
from nearfar.relation import Relation, across, within


def compare(
    x: ArrayLike,
    labels: ArrayLike,
    reference: ArrayLike | None,
    reference_labels: ArrayLike | None,
    reference_self: ArrayLike | None,
) -> tuple[Tensor, Tensor | None, Relation]:
    """Rows, columns (None: the rows themselves), and who is similar to whom."""
    rows = batch("x", x)
    if reference is None:
        if reference_labels is not None or reference_self is not None:
            raise TypeError("reference_labels and reference_self describe reference: pass it too.")
        return rows, None, within(labels, rows)
    columns = batch("reference", reference, like=rows)
    return rows, columns, across(labels, rows, columns, reference_labels, reference_self)


def towers(x: ArrayLike, y: ArrayLike) -> tuple[Tensor, Tensor]:
    """Two towers whose row i belongs to row i."""
    rows = batch("x", x)
    columns = batch("y", y, like=rows)
    if len(rows) != len(columns):
        raise ValueError(
            f"y must have as many rows as x, since row i of one matches row i of the other; "
            f"got {len(columns)} and {len(rows)}."
        )
    return rows, columns


def row_weight(weight: ArrayLike | None, x: Tensor) -> Tensor | None:
    """(n,) weights of the rows, 0 or more, in the precision of the loss."""
    if weight is None:
        return None
    weight = lift("weight", tensor("weight", weight)).detach()
    if weight.shape != x.shape[:1] or weight.device != x.device:
        raise ValueError(
            f"weight must have shape ({len(x)},), a weight a row, on {x.device}; "
            f"got {tuple(weight.shape)} on {weight.device}. For a weight a class pass "
            "class_weight[labels]."
        )
    if (weight < 0).any():
        raise ValueError(f"weight must be 0 or more; the smallest is {weight.min().item():g}.")
    return weight
