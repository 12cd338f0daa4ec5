"""Rows that miners compare, block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from nearfar.distance import Distance, check_distance, unit
from nearfar.engine.budget import current_limits
from nearfar.engine.closeness import by_distance, sharpen
from nearfar.engine.meeting import Group
from nearfar.engine.pick import seed
from nearfar.engine.processes import Processes, Split
from nearfar.engine.relation import Block, Relation
from nearfar.engine.together import meet_without_gradient
from nearfar.engine.walk import blocks
from nearfar.inputs import ArrayLike, lift, switch, tensor
from nearfar.listed import Found
from nearfar.losses.batch import as_batch
from nearfar.reference import Reference, ReferenceLike, check_reference

# Rows (a slice), their distances to all columns, their relation -> what is found for each of them:
# (b, k) distances and indices.
InBlock = Callable[[slice, Tensor, Block], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Comparison:
    """Rows and columns without gradient.

    Attributes:
        rows: (n, d), at length 1 if asked.
        columns: (m, d), likewise; None: the rows themselves.
        relation: which pairs are similar.
        distance: by which they are compared.
        processes: those that the rows are spread over: `rows` are those of this process, `columns`
            those of all; None: this one has all.
    """

    rows: Tensor
    columns: Tensor | None
    relation: Relation
    distance: Distance
    processes: Processes | None = None

    @classmethod
    def of(
        cls,
        x: ArrayLike,
        labels: ArrayLike | None,
        reference: ReferenceLike | None,
        distance: Distance,
        *,
        normalize: bool,
        group: Group | None = None,
    ) -> "Comparison":
        """Without labels, no two rows are similar."""
        distance = check_distance(distance)
        switch("normalize", normalize)
        labelled = labels is not None
        if labels is None:
            labels, reference = _all_different(x, reference)
        rows, columns, relation = as_batch(x, labels, reference, "mean")  # no backward pass follows
        rows = lift("x", rows.detach())
        columns = None if columns is None else lift("reference.x", columns.detach())
        if columns is not None and columns.dtype != rows.dtype:
            common = torch.promote_types(rows.dtype, columns.dtype)
            rows, columns = rows.to(common), columns.to(common)
        found = cls(rows, columns, relation, distance)
        if group is not None:
            found = found._with_the_columns_of_all(group, labelled=labelled)
        # The cosine of near-duplicates is measured from the rows as they are.
        return found.at_length_1() if normalize and distance != "cosine" else found

    @property
    def others(self) -> Tensor:
        """(m, d) the columns."""
        return self.rows if self.columns is None else self.columns

    def at_length_1(self) -> "Comparison":
        """The same with rows and columns scaled to length 1."""
        columns = None if self.columns is None else unit(self.columns)
        return replace(self, rows=unit(self.rows), columns=columns)

    def _with_the_columns_of_all(self, group: Group, *, labelled: bool) -> "Comparison":
        """The rows of this process against those of all, or against a reference that all have."""
        given = self.relation
        if not labelled:  # what stands for labels here is the same on other processes
            given = replace(given, row_labels=None, column_labels=None)
        together, relation = meet_without_gradient(group, self.rows, self.columns, given)
        if together.columns is None:
            return replace(self, processes=together.processes)
        if not labelled:
            place, every = relation.match, torch.arange(relation.m, device=relation.device)
            relation = Relation(relation.n, relation.m, relation.device, place, every, place)
        columns = together.columns.gather(self.rows)
        return replace(self, columns=columns, relation=relation, processes=together.processes)

    def chance(self, generator: torch.Generator | None) -> torch.Generator:
        """A generator for this process's rows; those of others draw other numbers."""
        rank = 0 if self.processes is None else self.processes.rank
        return torch.Generator().manual_seed(seed(generator) + rank)

    def largest_of_all(self, values: Tensor, k: int) -> Tensor:
        """Which of some values are among the k largest of all processes; of equal ones, the first.

        Args:
            values: (v,) those of this process, which may have any number of them.
            k: how many are chosen.
        """
        if self.processes is None:
            every, own = values, slice(0, len(values))
        else:
            split = Split(self.processes, [n for (n,) in self.processes.tell([len(values)])])
            every, own = split.gather(values), split.own
        chosen = torch.zeros_like(every, dtype=torch.bool)
        chosen[every.argsort(descending=True, stable=True)[:k]] = True
        return chosen[own]

    def scaled(self) -> tuple[Tensor, Tensor | None]:
        """Rows and columns as the distance takes them: at length 1 for cosines."""
        compared = self.at_length_1() if self.distance == "cosine" else self
        return compared.rows, compared.columns

    def blocks(self) -> Iterator[tuple[slice, Tensor, Block]]:
        """Blocks of rows: the rows, their distances to all columns, and which pairs are similar."""
        closeness = by_distance(self.distance)
        a, b = closeness.prepare(*self.scaled())
        others = a if b is None else b
        for tile in blocks(closeness, self.relation, a, others, current_limits()):
            if self.distance == "cosine":
                sharpen(tile.closeness, tile.aside, self.rows[tile.rows], self.others)
            yield tile.rows, tile.closeness, tile.block

    def for_each_row(self, in_block: InBlock, k: int) -> Found:
        """Collect the k distances and indices found for each row."""
        distances = self.rows.new_full((len(self.rows), k), inf)
        indices = torch.full((len(self.rows), k), -1, device=self.rows.device)
        for where, d, block in self.blocks():
            distances[where], indices[where] = in_block(where, d, block)
        return Found(indices, distances)


def _all_different(
    x: ArrayLike, reference: ReferenceLike | None
) -> tuple[Tensor, ReferenceLike | None]:
    """Distinct labels, for rows without labels."""
    items = tensor("x", x)
    n, device = len(items), items.device
    labels = torch.arange(n, device=device)
    if reference is None:
        return labels, None
    check_reference(reference)
    if reference.labels is not None:
        raise TypeError(
            "labels must be given if the reference has labels: pass both, or neither as in "
            "reference=nearfar.Reference(x, None)."
        )
    others = len(tensor("reference.x", reference.x))
    different = torch.arange(n, n + others, device=device)
    return labels, Reference(reference.x, different, reference.own)


def nearest(d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(b, k) the smallest distances and their columns; inf and -1 if there are fewer."""
    least = d.topk(min(k, d.shape[1]), largest=False)
    distances, indices = d.new_full((len(d), k), inf), least.indices.new_full((len(d), k), -1)
    distances[:, : d.shape[1]] = least.values
    indices[:, : d.shape[1]] = least.indices.masked_fill(least.values == inf, -1)
    return distances, indices


def bounds(name: str, given: tuple[float, float] | None) -> tuple[float, float]:
    """The two ends of a range; None: there are none."""
    if given is None:
        return -inf, inf
    try:
        low, high = map(float, given)
    except (TypeError, ValueError):
        low, high = inf, -inf
    if not low <= high:
        raise ValueError(f"{name} must be two numbers (low, high), low <= high, got {given!r}.")
    return low, high
