"""Looking inside a loss while it runs.

A loss is a rule that turns distances into forces: the derivative of the loss with respect to how
close two rows are pulls them together or pushes them apart. Each loss passes the distances and
similarities it measures through `measured`; outside of `watch` that returns them untouched.
`nearfar.explain` watches, and differentiates the very function that trains, so what it shows
cannot differ from what is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nearfar.engine.relation import Block

Role = Literal["pair", "positive", "negative", "second negative"]
Quantity = Literal["distance", "similarity", "logit"]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a loss measured between the rows in one of its roles.

    Attributes:
        role: which relation of the tuple: the pair itself, anchor to positive, anchor to negative,
            negative to second negative.
        closeness: whether a small value ("distance") or a large one means close.
        values: (n,), or (n, m) where each anchor has m others; NaN-free for finite input,
            -inf where an other is left out.
        similar: (n,) labels where the role alone does not say, from `labels.pair_labels`.
    """

    role: Role
    closeness: Quantity
    values: Tensor
    similar: Tensor | None = None


_watchers: ContextVar[tuple[list[Measured], ...]] = ContextVar("watchers", default=())


def watched() -> bool:
    """Whether somebody wants to see what a loss measures: it may not hide it in the engine."""
    return not torch.compiler.is_compiling() and bool(_watchers.get())


def measured(
    role: Role, closeness: Quantity, values: Tensor, similar: Tensor | None = None
) -> Tensor:
    """`values`, after showing them to whoever watches."""
    if torch.compiler.is_compiling():  # a compiled graph has no watchers, and cannot ask for them
        return values
    for record in _watchers.get():
        # Data needs no gradient by itself, but its distances do, or no force could be read.
        values = values if values.requires_grad else values.detach().requires_grad_()
        record.append(Measured(role, closeness, values, similar))
    return values


@contextmanager
def watch() -> Iterator[list[Measured]]:
    """Collect what every loss called inside the block measures, with gradients enabled."""
    record: list[Measured] = []
    token = _watchers.set((*_watchers.get(), record))
    try:
        with torch.enable_grad():
            yield record
    finally:
        _watchers.reset(token)


class ForceVisitor(Protocol):
    """Who is shown the forces of a whole-batch loss."""

    def begin(self) -> None:
        """The forces of a comparison of rows and columns follow; a loss may be made of two."""
        ...

    def tile(
        self,
        n_anchors: int,
        rows: slice,
        columns: slice,
        block: "Block",
        closeness: Tensor,
        pull: Tensor,
    ) -> None:
        """A tile of directed forces, each that of an anchor (row) on another (column).

        Args:
            n_anchors: how many anchors there are in all.
            rows: which of them these are.
            columns: which others.
            block: who is similar to whom among them.
            closeness: (r, c) distances or similarities.
            pull: (r, c), above 0 it pulls together, below 0 it pushes apart.
        """
        ...

    def scale(self, by: Tensor | float) -> None:
        """All forces since `begin` are to be multiplied by this."""
        ...


_force_visitors: ContextVar[tuple[ForceVisitor, ...]] = ContextVar("force_visitors", default=())


def force_visitors() -> tuple[ForceVisitor, ...]:
    """Who wants to see each anchor's own forces, so that no two may be added up unseen."""
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
