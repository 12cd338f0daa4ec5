"""Looking inside a loss while it runs.

A loss turns distances into forces: its derivative with respect to the closeness of two rows pulls
them together or pushes them apart. Each loss passes the distances and similarities it computes
through `measured`, which returns them unchanged outside of `watch`. `nearfar.explain` records them
with `watch` and differentiates the loss function itself, so what it shows is what the training
does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nearfar.engine.closeness import Tile

Role = Literal["pair", "positive", "negative", "second negative"]
Quantity = Literal["distance", "similarity", "logit"]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a loss measured between the rows in one of its roles.

    Attributes:
        role: which relation of the tuple: the pair itself, anchor to positive, anchor to negative,
            negative to second negative.
        closeness: whether a small value ("distance") or a large one means close.
        values: (n,), or (n, m) if each anchor has m others; free of NaN for finite input, -inf for
            others that are left out.
        similar: (n,) labels from `labels.pair_labels`, if the role does not imply them.
    """

    role: Role
    closeness: Quantity
    values: Tensor
    similar: Tensor | None = None


_records: ContextVar[tuple[list[Measured], ...]] = ContextVar("records", default=())


def watched() -> bool:
    """Whether a `watch` is active, so that a loss must pass all it computes through `measured`."""
    return not torch.compiler.is_compiling() and bool(_records.get())


def measured(
    role: Role, closeness: Quantity, values: Tensor, similar: Tensor | None = None
) -> Tensor:
    """`values`, after recording them for each active `watch`."""
    if torch.compiler.is_compiling():  # a compiled graph is never watched, and cannot check
        return values
    for record in _records.get():
        # Data may require no gradient, but forces are derivatives with respect to its distances.
        values = values if values.requires_grad else values.detach().requires_grad_()
        record.append(Measured(role, closeness, values, similar))
    return values


@contextmanager
def watch() -> Iterator[list[Measured]]:
    """Record what every loss called inside the block measures, with gradients enabled."""
    record: list[Measured] = []
    token = _records.set((*_records.get(), record))
    try:
        with torch.enable_grad():
            yield record
    finally:
        _records.reset(token)


class ForceVisitor(Protocol):
    """An observer of the forces of a whole-batch loss."""

    def begin(self) -> None:
        """Called before the forces of each comparison of rows and columns; a loss may have two."""
        ...

    def tile(self, n_anchors: int, tile: "Tile", pull: Tensor) -> None:
        """Called with a tile of forces, each of an anchor (row) on another row (column).

        Args:
            n_anchors: the total number of anchors.
            tile: which rows and columns, and their distances or similarities.
            pull: (r, c) forces, > 0 pulls together, < 0 pushes apart.
        """
        ...

    def scale(self, by: Tensor | float) -> None:
        """Called with a factor that applies to all forces since `begin`."""
        ...


_force_visitors: ContextVar[tuple[ForceVisitor, ...]] = ContextVar("force_visitors", default=())


def force_visitors() -> tuple[ForceVisitor, ...]:
    """The active observers. While there are any, the forces of two anchors may not be merged."""
    return _force_visitors.get()


@contextmanager
def watch_forces(visitor: ForceVisitor) -> Iterator[None]:
    """Show `visitor` the forces of every whole-batch loss called inside the block."""
    token = _force_visitors.set((*_force_visitors.get(), visitor))
    try:
        with torch.enable_grad():
            yield
    finally:
        _force_visitors.reset(token)
