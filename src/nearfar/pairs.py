"""Listed pairs and triplets: what miners find, and what a loss takes as `pairs` or `triplets`."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor
from nearfar.labels import refuse


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


def listed_pairs(
    pairs: Pairs, n: int, m: int, device: torch.device, name: str = "pairs"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rows and columns of the similar pairs, and those of the dissimilar ones.

    Args:
        pairs: of a row and a column.
        n: the number of rows.
        m: the number of columns.
        device: of the result.
        name: the caller's name for `pairs`.

    Raises:
        TypeError: no pairs, or indices that are not integers.
        ValueError: a wrong shape, or an index out of range.
    """
    if isinstance(pairs, FoundPairs):
        pairs = pairs.positive, pairs.negative
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise TypeError(
            "pairs must be what a miner found (nearfar.mine.FoundPairs), or (similar, dissimilar), "
            f"each of shape (k, 2); got {type(pairs).__name__}."
        )
    near, far = (
        _ends(f"the {kind} pairs of {name}", part, n, m, device)
        for kind, part in zip(("similar", "dissimilar"), pairs, strict=True)
    )
    return near, far


def listed_triplets(triplets: ArrayLike, device: torch.device) -> Tensor:
    """(t, 3) int64, a copy; which of the rows there are is not checked.

    Raises:
        TypeError: indices that are not integers.
        ValueError: a wrong shape.
    """
    listed = tensor("triplets", triplets).to(device, copy=True)
    if not listed.numel():
        listed = listed.new_zeros(0, 3, dtype=torch.int64)
    if listed.is_floating_point() or listed.is_complex() or listed.dtype is torch.bool:
        raise TypeError(f"triplets must be row indices of an integer dtype; got {listed.dtype}.")
    if listed.ndim != 2 or listed.shape[1] != 3:
        turned = listed.ndim == 2 and listed.shape[0] == 3
        raise ValueError(
            "triplets must have shape (t, 3), an anchor of the batch, a positive and a negative of "
            f"each; got {tuple(listed.shape)}." + (" Pass triplets.T." if turned else "")
        )
    listed = listed.to(torch.int64)
    same = listed[:, 1] == listed[:, 2]
    refuse("triplets", listed, same, "have a positive and a negative that differ")
    return listed


def _ends(
    name: str, part: ArrayLike | Found, n: int, m: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(k,) the row and (k,) the column of each pair."""
    if isinstance(part, Found):
        indices = part.indices.to(device)
        if indices.shape[0] != n:
            raise ValueError(f"{name} were found for {len(indices)} rows, and the batch has {n}.")
        row, slot = (indices >= 0).nonzero(as_tuple=True)
        return row, _in_range(name, indices[row, slot], m)
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
    return _in_range(name, row, n), _in_range(name, column, m)


def _in_range(name: str, index: Tensor, size: int) -> Tensor:
    """The indices, copied: the backward pass reads them again."""
    outside = (index < 0) | (index >= size)
    refuse(name, index, outside, f"hold rows from 0 to {size - 1}")
    return index.clone()
