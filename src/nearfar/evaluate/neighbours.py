"""The hardest pairs of labelled embeddings, and likely label errors."""

from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.relation import Relation, within
from nearfar.engine.together import Together
from nearfar.evaluate.nearest import check_k, nearest_in, rows_and_columns, space
from nearfar.inputs import ArrayLike
from nearfar.labels import batch_labels
from nearfar.mine import Found, hard_negatives, hard_positives
from nearfar.plain import plain
from nearfar.tabulate import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Two rows, i < j, and their distance."""

    i: int
    j: int
    distance: float


@dataclass(frozen=True)
class Suspect:
    """A row whose label its neighbours contradict.

    Attributes:
        index: the row.
        label: its class id.
        suggested: the most frequent other class among its k nearest neighbours.
        other_share: share of the k nearest that belong to that class.
        own_share: share that belong to its own class, relative to how many could.
    """

    index: int
    label: int
    suggested: int
    other_share: float
    own_share: float


@dataclass(frozen=True)
class Neighbours:
    """The hardest pairs, and likely label errors.

    Attributes:
        hardest_positives: similar pairs, farthest first.
        hardest_negatives: dissimilar pairs, nearest first.
        suspects: likely label errors, likeliest first.
        k: how many neighbours were used to judge a label.
        distance: the name of the distance.
    """

    hardest_positives: tuple[Pair, ...]
    hardest_negatives: tuple[Pair, ...]
    suspects: tuple[Suspect, ...]
    k: int
    distance: Distance

    def table(self) -> Table:
        """The likely label errors."""
        rows = [
            (
                str(s.index),
                str(s.label),
                str(s.suggested),
                f"{s.other_share:.0%}",
                f"{s.own_share:.0%}",
            )
            for s in self.suspects
        ]
        return Table(("row", "label", "suggested", "of the nearest", "of its own"), rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        held = {
            name: [vars(each) for each in getattr(self, name)]
            for name in ("hardest_positives", "hardest_negatives", "suspects")
        }
        found: dict[str, Any] = plain({**held, "k": self.k, "distance": self.distance})
        return found

    def __str__(self) -> str:
        parts = [
            f"Farthest similar pairs ({self.distance} distance):",
            _pairs_table(self.hardest_positives).plain(),
            "Nearest dissimilar pairs:",
            _pairs_table(self.hardest_negatives).plain(),
            f"Likely label errors, by the {self.k} nearest of each row: {len(self.suspects)}",
        ]
        return "\n".join([*parts, self.table().plain()] if self.suspects else parts)


@over_processes
def neighbours(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    k: int = 10,
    top: int = 20,
    distance: Distance = "cosine",
    group: Group | None = None,
) -> Neighbours:
    """The farthest similar and the nearest dissimilar pairs, and likely label errors.

    Takes the farthest positive and the nearest negative of each row, and returns the hardest of
    these pairs, each once. A label is likely wrong if, among the k nearest neighbours, the share of
    the most frequent other class exceeds the share of the row's own class by more than one half.
    The share of the own class is relative to how many neighbours could belong to it: in a class of
    3, two. Rows that are alone in their class are not judged.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            With multi-labels, no label is judged.
        k: how many neighbours to judge a label by.
        top: how many pairs and rows to return at most.
        distance: "cosine", "euclidean", "sqeuclidean", "snr", "manhattan" or the p of a p-norm.
        group: the processes that the rows are spread over, as in a loss. Each compares its own with
            those of all, which it gathers; what is returned is of all rows, counted in the order of
            the processes. None: this one has all.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length or number out of range, a row that is not finite.

    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [5.4]])
    >>> print(neighbours(x, [0, 0, 0, 1, 1, 1, 0], k=3, top=2, distance="euclidean"))
    Farthest similar pairs (euclidean distance):
    i  j  distance
    -  -  --------
    0  6       5.4
    1  6       5.3
    Nearest dissimilar pairs:
    i  j  distance
    -  -  --------
    5  6       0.2
    4  6       0.3
    Likely label errors, by the 3 nearest of each row: 1
    row  label  suggested  of the nearest  of its own
    ---  -----  ---------  --------------  ----------
      6      0          1            100%          0%

    Source: judging labels by neighbours goes back to Wilson, "Asymptotic properties of nearest
    neighbor rules using edited data", 1972.
    """
    check_k("k", k)
    check_k("top", top)
    rows, _ = rows_and_columns(x, None)  # refuses rows that are not finite
    known = batch_labels(labels, like=rows)
    where, relation = space(rows, rows, within(known, rows), None, distance, group)
    near = nearest_in(where, k)
    positives = hard_positives(x, known, distance=distance, group=group)
    negatives = hard_negatives(x, known, distance=distance, group=group)
    return Neighbours(
        _hardest(positives, top, where.together, farthest=True),
        _hardest(negatives, top, where.together, farthest=False),
        _suspects(near.indices, relation, top, where.together) if known.ndim == 1 else (),
        k,
        distance,
    )


def _first_row(together: Together | None) -> int:
    """The place of this process's first row among those of all."""
    return 0 if together is None else together.rows.own.start


def _of_all(own: list[T], together: Together | None) -> list[T]:
    """What each process lists, in their order."""
    return own if together is None else list(chain(*together.processes.tell_any(own)))


def _hardest(
    found: Found, top: int, together: Together | None, *, farthest: bool
) -> tuple[Pair, ...]:
    """Each pair once, hardest first."""
    there = found.indices[:, 0] >= 0
    rows = there.nonzero()[:, 0]
    place = rows + _first_row(together)
    pairs = torch.stack([place, found.indices[rows, 0]], 1).sort(1).values
    distances = found.distances[rows, 0]
    order = distances.sort(stable=True, descending=farthest).indices[
        : 2 * top
    ]  # each twice at most
    own = list(zip(map(tuple, pairs[order].tolist()), distances[order].tolist(), strict=True))
    every = sorted(_of_all(own, together), key=lambda one: one[1], reverse=farthest)
    hardest: dict[tuple[int, int], float] = {}
    for pair, d in every[: 2 * top]:
        hardest.setdefault(pair, d)
    return tuple(Pair(i, j, d) for (i, j), d in list(hardest.items())[:top])


def _suspects(
    near: Tensor, relation: Relation, top: int, together: Together | None
) -> tuple[Suspect, ...]:
    """Rows whose neighbours are mostly of one other class, clearest first."""
    labels = relation.column_labels
    assert labels is not None
    if not len(labels):
        return ()
    names, member, size = torch.unique(labels, return_inverse=True, return_counts=True)
    first = _first_row(together)
    mine = member[first : first + len(near)]
    there = near >= 0
    n_found = there.sum(1).clamp(min=1)
    found = torch.where(there, member[near.clamp(min=0)], -1)
    own = found == mine[:, None]
    possible = torch.minimum(size[mine] - 1, n_found)
    # (n, k) for each neighbour, how many of the neighbours share its class.
    votes = (found[:, :, None] == found[:, None, :]).sum(2).masked_fill(own | ~there, 0)
    most = votes.max(1)
    suggested = names[found.gather(1, most.indices[:, None])[:, 0].clamp(min=0)]
    other_share, own_share = most.values / n_found, own.sum(1) / possible.clamp(min=1)
    doubt = (other_share - own_share).masked_fill(possible == 0, 0)
    order = doubt.sort(stable=True, descending=True).indices[:top]
    suspects = [
        (
            float(doubt[i]),
            Suspect(
                first + i,
                int(labels[first + i]),
                int(suggested[i]),
                float(other_share[i]),
                float(own_share[i]),
            ),
        )
        for i in order.tolist()
        if doubt[i] > 0.5
    ]
    every = sorted(_of_all(suspects, together), key=lambda one: one[0], reverse=True)
    return tuple(suspect for _, suspect in every[:top])


def _pairs_table(pairs: tuple[Pair, ...]) -> Table:
    rows = [(str(pair.i), str(pair.j), f"{pair.distance:.4g}") for pair in pairs]
    return Table(("i", "j", "distance"), rows)
