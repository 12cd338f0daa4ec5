"""Looking inside a loss while it runs.

A loss is a rule that turns distances into forces: the derivative of the loss with respect to how
close two rows are pulls them together or pushes them apart. Each loss passes the distances and
similarities it measures through `measured`; outside of `watch` that returns them untouched.
`nearfar.explain` watches, and differentiates the very function that trains, so what it shows
cannot differ from what is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["pair", "positive", "negative", "second negative"]
Closeness = Literal["distance", "similarity", "logit"]


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
    closeness: Closeness
    values: Tensor
    similar: Tensor | None = None


_watchers: ContextVar[tuple[list[Measured], ...]] = ContextVar("watchers", default=())


def measured(
    role: Role, closeness: Closeness, values: Tensor, similar: Tensor | None = None
) -> Tensor:
    """`values`, after showing them to whoever watches."""
    if torch.compiler.is_compiling():  # a compiled graph has no watchers, and cannot ask for them
        return values
    for record in _watchers.get():
        # Data needs no gradient by itself, but its distances do, or no force could be read.
        values = values if values.requires_grad else values.detach().requires_grad_()
        record.append(Measured(role, closeness, values, similar))
    return values


def someone_watches() -> bool:
    """Whether a loss that could hide its distances in the engine should show them instead."""
    return not torch.compiler.is_compiling() and bool(_watchers.get())


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


# Rows, columns, their closeness and the forces on it, one tile at a time.
ForceVisitor = Callable[[slice, slice, Tensor, Tensor], None]

_force_visitors: ContextVar[tuple[ForceVisitor, ...]] = ContextVar("force_visitors", default=())


def someone_watches_forces() -> bool:
    """Whether each anchor's own forces are asked for, so that no two may be added up unseen."""
    return bool(_force_visitors.get())


def show_forces(rows: slice, columns: slice, closeness: Tensor, force: Tensor) -> None:
    """Show a tile of forces to whoever watches; they may keep nothing of it but copies."""
    for visit in _force_visitors.get():
        visit(rows, columns, closeness, force)


@contextmanager
def watch_forces(visit: ForceVisitor) -> Iterator[None]:
    """Call `visit` with every tile of forces that a whole-batch loss computes in the block."""
    token = _force_visitors.set((*_force_visitors.get(), visit))
    try:
        yield
    finally:
        _force_visitors.reset(token)
