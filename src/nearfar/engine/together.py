"""One comparison spread over the processes of a group.

Each process compares its own rows with the columns of all: losses, relation and executors are those
of a batch against a reference. What is of all rows is exchanged while the forward pass runs:

- before it: the prepared columns, and their labels;
- within it: sums of losses and counts, and what a rule needs of other anchors;
- after it: the gradient of the columns, added up at the processes that own them, and that of a
  scale, a bias, proxies or a reference, added up everywhere.

So the backward pass only multiplies what is finished, and a trainer may reorder, repeat or skip it.
The exception is `reduction="none"`, whose weights are known in the backward pass alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nearfar.engine.meeting import Group, Meeting, Over, facts_of, meeting_of
from nearfar.engine.precision import Precision
from nearfar.engine.processes import Processes, Split
from nearfar.engine.relation import Relation
from nearfar.reduction import sum_dtype


@dataclass(eq=False)
class Together:
    """What all processes know of one comparison.

    Attributes:
        over: how they work together.
        processes: who they are.
        rows: how the rows are split.
        columns: how the columns are; None: each has them all.
        shared_rows: whether each process has all rows, and computes a part of them.
        gradient: whether a gradient is wanted anywhere.
        weighted: whether there are weights anywhere.
        dealt: whether each process could have all rows as both sides, and take a part of the tiles;
            once it is known how the loss is computed, whether it does.
    """

    over: Over
    processes: Processes
    rows: Split
    columns: Split | None
    shared_rows: bool
    gradient: bool
    weighted: bool
    dealt: bool

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.processes.total(x)

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all processes."""
        return self.processes.largest(x)

    def totals(self, loss: Tensor, weight: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """The sum of the losses over all processes, and that of their weights, if there is one."""
        if weight is None:
            return self.total(loss), None
        if not isinstance(weight, Tensor):
            weight = loss.new_full((), weight)
        loss, weight = self.total(torch.stack([loss, weight.to(loss.dtype)])).unbind()
        return loss, weight

    def relation(self, relation: Relation) -> Relation:
        """That of this process's rows to the columns of all, from that to its own columns."""
        if self.columns is None:
            return relation
        m, first, device = self.columns.n, self.columns.own.start, relation.device
        labels = relation.column_labels
        labels = None if labels is None else self.columns.gather(labels)
        if self.shared_rows:
            own = self.rows.own
            of_rows = None if relation.row_labels is None else relation.row_labels[own]
            n = own.stop - own.start
            return Relation(n, m, device, of_rows, labels)
        place = torch.arange(first, first + relation.n, device=device)
        items = relation.items
        if items is not None:
            items = replace(items, columns=self.columns.gather(items.columns))
        found = replace(
            relation, m=m, column_labels=labels, items=items, first=first, symmetric=False
        )
        if labels is None:
            return replace(found, match=place, one_positive=True)
        return replace(found, declared=place)

    def weight_of_rows(self, weight: Tensor | None, like: Tensor) -> Tensor | None:
        """The weights of the rows that this process compares; None: nobody has weights."""
        if not self.weighted:
            return None
        if weight is None:
            weight = torch.ones(len(like), dtype=sum_dtype(like), device=like.device)
        if self.dealt:
            return self.of_rows(weight)
        return weight[self.rows.own] if self.shared_rows else weight

    def of_rows(self, x: Tensor) -> Tensor:
        """What is known of this process's rows, of the rows of all; numbers in float64."""
        return self.rows.gather(_wide(x))

    def sum_of_rows(self, x: Tensor) -> Tensor:
        """What all processes add to this one's rows, from what each has of all; in float64."""
        return self.rows.sum_to_owners(_wide(x))

    def scale_of_gradients(self, *, each: bool) -> tuple[float, float]:
        """What the gradients of split rows, and of what is shared, are multiplied with.

        A trainer that averages gradients over processes takes the mean of what each process's rows
        contribute, which must therefore be as many times as large. What is shared has its whole
        gradient on all of them.

        Args:
            each: whether each process has losses of its own, whose mean the trainer derives.
        """
        size = self.processes.size
        if each or self.over.replicas == "summed":
            return 1.0, 1 / size
        return float(size), 1.0


def _wide(x: Tensor) -> Tensor:
    """Numbers of one dtype: a process with few rows may have kept them in another."""
    return x.to(sum_dtype(x)) if x.is_floating_point() else x


def meet(
    meeting: Meeting,
    x: Tensor,
    y: Tensor | None,
    relation: Relation,
    *,
    gradient: bool,
    weighted: bool,
    tiles: int,
    way: tuple[Precision, bool],
    learned: Sequence[bool],
) -> tuple[Together, Relation]:
    """Agree with the other processes on what is compared, and which of it is similar.

    Args:
        meeting: where they meet.
        x: (n, d) the rows of this process.
        y: (m, d) its columns; None: the rows themselves.
        relation: of these.
        gradient: whether this process wants one.
        weighted: whether it has weights.
        tiles: see `Facts`.
        way: likewise.
        learned: whether the scale, the bias and what else the loss learns get a gradient.

    Raises:
        ValueError: processes differ in what must be the same.
    """
    told = meeting.agree(
        facts_of(
            x,
            y,
            relation.row_labels,
            ids=0 if relation.items is None else relation.items.rows.shape[1],
            listed=relation.listed is not None,
            gradient=gradient,
            weighted=weighted,
            tiles=tiles,
            way=way,
            learned=learned,
        )
    )
    processes = meeting.processes
    rows, columns = ([getattr(f, side) for f in told] for side in ("rows", "columns"))
    shared = relation.shared
    if shared is not None:
        name, sizes = "the proxies", rows
        if shared == "columns":
            name, sizes = "the reference or the proxies", columns
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{name} must be the same on all processes; got {sizes} rows, in the order of the "
                "processes."
            )
    if shared == "rows":
        rows = _shares(len(x), processes.size)
    found = Together(
        meeting.over,
        processes,
        Split(processes, rows),
        None if shared == "columns" else Split(processes, columns),
        shared == "rows",
        any(f.gradient for f in told),
        any(f.weighted for f in told),
        tiles > 0 and all(f.tiles == tiles for f in told),
    )
    return found, _of_all(relation, found, meeting)


def meet_without_gradient(
    group: Group, x: Tensor, y: Tensor | None, relation: Relation
) -> tuple[Together, Relation]:
    """`meet` of what has no gradient, in a function that takes `group`."""
    where = meeting_of(group), x, y, relation
    return meet(*where, gradient=False, weighted=False, tiles=0, way=("float32", False), learned=())


def _of_all(relation: Relation, together: Together, meeting: Meeting) -> Relation:
    """The relation of this process's rows to the columns of all."""
    listed = relation.listed
    if listed is None or together.columns is None:
        return together.relation(relation)
    every, error = together.relation(replace(relation, listed=None)), None
    try:
        if listed.check is not None:
            listed.check(every)
    except ValueError as wrong:
        error = wrong
    meeting.confirm(error)
    return Relation(every.n, every.m, every.device, listed=replace(listed, check=None))


def whole(relation: Relation) -> Relation:
    """That of all rows with each other, from that of this process's rows with those of all."""
    m, labels = relation.m, relation.column_labels
    return Relation(m, m, relation.device, labels, labels, symmetric=True)


def _shares(n: int, size: int) -> list[int]:
    """n rows divided evenly."""
    return [n // size + (rank < n % size) for rank in range(size)]


def of_shared(gradient: Tensor | None, together: Together) -> Tensor | None:
    """The whole gradient of what is the same on all processes, from this one's part."""
    if gradient is None:
        return None
    return together.total(gradient.to(sum_dtype(gradient))).to(gradient.dtype)
