"""Listed pairs and triplets: what miners find, and what a loss takes as `pairs` or `triplets`."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor
from nearfar.labels import first_marked


@dataclass(frozen=True, eq=False)
class Found:
    """Rows found for each anchor.

    Attributes:
        indices: (n, k) int64, rows of the reference or of the batch; -1 if there are fewer than k.
        distances: (n, k) their distances; inf if there are fewer.
    """

    indices: Tensor
    distances: Tensor


@dataclass(frozen=True, eq=False)
class FoundPairs:
    """Pairs of an anchor and another row.

    Attributes:
        positive: (p, 2) int64, similar pairs (anchor, other).
        negative: (q, 2) int64, dissimilar pairs (anchor, other).
    """

    positive: Tensor
    negative: Tensor


# The similar and the dissimilar pairs, each (k, 2) row indices or what a miner found.
Pairs: TypeAlias = FoundPairs | tuple[ArrayLike | Found, ArrayLike | Found]


@dataclass(frozen=True, eq=False)
class Ends:
    """Listed pairs of one kind, and how messages show them.

    Attributes:
        row: (k,) int64, the anchor of each pair.
        column: (k,) int64, its other row.
        similar: whether they are similar pairs.
        name: the caller's name for them.
        triplets: (k, 3) int64, if they are pairs of triplets; else None.
    """

    row: Tensor
    column: Tensor
    similar: bool
    name: str
    triplets: Tensor | None = None

    def check_rows(self, n: int, m: int, columns: str) -> None:
        """Refuse rows that there are not: of n in the batch, of m in what `columns` names."""
        for end, index, where, size in (
            ("anchor", self.row, "batch", n),
            (self._other, self.column, columns, m),
        ):
            has = f"which has rows 0 to {size - 1}" if size else "which is empty"
            outside = (index < 0) | (index >= size)
            self.refuse(outside, f"whose {end} is not in the {where}, {has}")

    def check_not_itself(self, own: Tensor) -> None:
        """Refuse an item with itself; `own` (n,) is the column that is each row, -1 for none."""
        self.refuse(self.column == own[self.row], f"whose {self._other} is the anchor itself")

    def check_labels(self, same: Tensor) -> None:
        """Refuse pairs that are not of their kind by their labels; (k,) bool, which share one."""
        ends = "rows" if self.triplets is None else f"anchor and {self._other}"
        wrong, shared = (~same, "no label") if self.similar else (same, "a label")
        self.refuse(
            wrong,
            f"whose {ends} share {shared}",
            " Pass labels=None if the list is right and the labels are not.",
        )

    @property
    def _other(self) -> str:
        if self.triplets is None:
            return "other row"
        return "positive" if self.similar else "negative"

    def refuse(self, bad: Tensor, which: str, fix: str = "") -> None:
        """Raise if any pair is marked `bad`; the message shows the first one."""
        if found := first_marked(bad):
            at, share = found
            if self.triplets is None:
                kind = "similar" if self.similar else "dissimilar"
                entry = [int(self.row[at]), int(self.column[at])]
                shown = f"{self.name}, the {kind} ones: entry {at} is {entry}"
            else:
                shown = f"{self.name}[{at}] is {self.triplets[at].tolist()}"
            raise ValueError(f"{shown}, {which} ({share}).{fix}")


def listed_pairs(pairs: Pairs, n: int, device: torch.device) -> tuple[Ends, Ends]:
    """The similar pairs and the dissimilar ones; which of the rows there are is not checked.

    Args:
        pairs: of a row and a column.
        n: the number of rows.
        device: of the result.

    Raises:
        TypeError: no pairs, or indices that are not integers.
        ValueError: a wrong shape.
    """
    names = ("pairs[0]", "pairs[1]")
    if isinstance(pairs, FoundPairs):
        pairs, names = (pairs.positive, pairs.negative), ("pairs.positive", "pairs.negative")
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        given, fix = type(pairs).__name__, ""
        if isinstance(pairs, tuple | list):
            given = f"{given} of {len(pairs)}"
            if len(pairs) == 4:
                fix = (
                    ". Of pytorch-metric-learning's (a1, p, a2, n) pass (torch.stack([a1, p], 1), "
                    "torch.stack([a2, n], 1))"
                )
        raise TypeError(
            "pairs must be what a miner found (nearfar.mine.FoundPairs), or (similar, dissimilar), "
            f"each of shape (k, 2); got {given}{fix}."
        )
    near, far = (
        Ends(*_ends(f"{name}, the {kind} ones,", part, n, device), kind == "similar", name)
        for kind, name, part in zip(("similar", "dissimilar"), names, pairs, strict=True)
    )
    return near, far


def listed_triplets(triplets: ArrayLike, device: torch.device) -> Tensor:
    """(t, 3) int64, a copy; which of the rows there are is not checked.

    Raises:
        TypeError: indices that are not integers, or not in one array.
        ValueError: a wrong shape.
    """
    _refuse_parts(triplets)
    listed = tensor("triplets", triplets).to(device, copy=True)
    if not listed.numel():
        listed = listed.new_zeros(0, 3, dtype=torch.int64)
    if listed.is_floating_point() or listed.is_complex() or listed.dtype is torch.bool:
        raise TypeError(f"triplets must be row indices of an integer dtype; got {listed.dtype}.")
    if listed.ndim != 2 or listed.shape[1] != 3:
        turned = listed.ndim == 2 and listed.shape[0] == 3
        whole = "triplets" if hasattr(triplets, "T") else "torch.tensor(triplets)"
        raise ValueError(
            "triplets must have shape (t, 3), an anchor of the batch, a positive and a negative of "
            f"each; got {tuple(listed.shape)}." + (f" Pass {whole}.T." if turned else "")
        )
    return listed.to(torch.int64)


def pairs_of_triplets(triplets: Tensor) -> tuple[Ends, Ends]:
    """Each anchor with its positive, and each with its negative, of (t, 3) triplets."""
    anchor, positive, negative = triplets.unbind(1)
    near = Ends(anchor, positive, True, "triplets", triplets)
    near.refuse(positive == negative, "whose positive and negative are the same row")
    return near, Ends(anchor, negative, False, "triplets", triplets)


def _refuse_parts(triplets: object) -> None:
    """Refuse triplets in several parts, which could be taken for rows if there are three."""
    parts = triplets if isinstance(triplets, tuple | list) else [triplets]
    if any(isinstance(part, Found | FoundPairs) for part in parts):
        raise TypeError(
            "triplets must be one (t, 3) array of indices, not rows or pairs that a miner found: "
            "nearfar.mine.easy_hard_triplets, semihard_triplets, violating_triplets and "
            "angular_triplets find triplets."
        )
    if len(parts) == 3 and all(
        isinstance(part, Tensor | np.ndarray) and part.ndim == 1 for part in parts
    ):
        library = "torch" if isinstance(parts[0], Tensor) else "np"
        raise TypeError(
            "triplets must be one (t, 3) array of indices; got three arrays. Of anchors, positives "
            f"and negatives pass {library}.stack([a, p, n], 1)."
        )


def _ends(
    name: str, part: ArrayLike | Found, n: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(k,) the row and (k,) the column of each pair, copied: the backward pass reads them again."""
    if isinstance(part, Found):
        indices = part.indices.to(device)
        if indices.shape[0] != n:
            raise ValueError(f"{name} were found for {len(indices)} rows, and the batch has {n}.")
        row, slot = (indices >= 0).nonzero(as_tuple=True)
        return row, indices[row, slot]
    ends = tensor(name, part).to(device)
    if not ends.numel():
        ends = ends.new_zeros(0, 2, dtype=torch.int64)
    if ends.is_floating_point() or ends.is_complex() or ends.dtype is torch.bool:
        raise TypeError(f"{name} must be row indices of an integer dtype; got {ends.dtype}.")
    if ends.ndim != 2 or ends.shape[1] != 2:
        raise ValueError(
            f"{name} must have shape (k, 2), an anchor of the batch and another row of each; got "
            f"{tuple(ends.shape)}."
        )
    row, column = ends.to(torch.int64).unbind(1)
    return row.clone(), column.clone()
