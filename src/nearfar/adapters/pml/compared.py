"""What a loss or a miner compares: rows, a reference, and mined pairs or triplets of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nearfar.adapters.pml.measures import Measure
from nearfar.extras import needs
from nearfar.reference import Reference

with needs("pml"):
    from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

Indices = Sequence[Tensor] | None  # what a miner found
# (k, 2) similar and (k, 2) dissimilar pairs of a row and a column.
Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Compared:
    """A batch, and the rows that it is compared with.

    Attributes:
        x: (n, d) rows.
        labels: (n,) their class ids; None: a list alone says what is similar.
        others: (m, d) columns; None: the rows themselves.
        other_labels: (m,) their class ids.
        own: whether row i is column i.
    """

    x: Tensor
    labels: Tensor | None
    others: Tensor | None
    other_labels: Tensor | None
    own: bool

    @classmethod
    def of(
        cls,
        embeddings: Tensor,
        labels: Tensor | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
        measure: Measure,
    ) -> "Compared":
        """As they pass it: without a reference, `ref_emb` and `ref_labels` are those of the batch.

        The same labels object says that row i of the reference is row i of the batch.
        """
        x, own = measure.rows(embeddings), ref_labels is labels
        if ref_emb is embeddings and own:
            return cls(x, labels, None, labels, True)
        return cls(x, labels, measure.rows(ref_emb), ref_labels, own and labels is not None)

    @property
    def reference(self) -> Reference | None:
        """What nearfar compares the rows with."""
        if self.others is None:
            return None
        own = torch.arange(len(self.x), device=self.x.device) if self.own else None
        return Reference(self.others, self.other_labels, own)

    def by_list_alone(self) -> "Compared":
        """The same without labels, which need not agree with a list."""
        return replace(self, labels=None, other_labels=None, own=self.others is None)

    def pairs(self, mined: Indices, *, once: bool = False) -> Pairs | None:
        """The pairs that a miner found, or those of its triplets; None: all pairs.

        Args:
            mined: (anchor, positive, anchor, negative), or (anchor, positive, negative).
            once: keep one of equal pairs, as losses that mark them in a mask do.
        """
        if mined is None:
            return None
        a1, p, *rest = mined
        a2, n = rest if len(rest) == 2 else (a1, *rest)
        near, far = (torch.stack(ends, 1).to(self.x.device) for ends in ([a1, p], [a2, n]))
        return (torch.unique(near, dim=0), torch.unique(far, dim=0)) if once else (near, far)

    def positives(self) -> Tensor:
        """(n,) how many similar rows each row is compared with."""
        return self._sharing_a_label()[0]

    def negatives(self) -> Tensor:
        """(n,) how many dissimilar ones."""
        return self._sharing_a_label()[1]

    def _sharing_a_label(self) -> tuple[Tensor, Tensor]:
        """(n,) how many columns share the label of each row, and (n,) how many do not."""
        assert self.labels is not None
        assert self.other_labels is not None
        n, m = len(self.labels), len(self.other_labels)
        both = torch.cat([self.labels, self.other_labels])
        _, ids = torch.unique(both, return_inverse=True)
        shared = torch.bincount(ids[n:], minlength=n + m)[ids[:n]]
        itself = (ids[:n] == ids[n:]).long() if self.own else torch.zeros_like(shared)
        return shared - itself, m - shared - (int(self.own) - itself)

    def every_pair(self) -> Pairs:
        """All pairs, for a reducer that asks for the loss of each."""
        assert self.labels is not None
        a1, p, a2, n = lmu.get_all_pairs_indices(
            self.labels, self.labels if self.own else self.other_labels
        )
        return torch.stack([a1, p], 1), torch.stack([a2, n], 1)


def triplets_of(indices_tuple: Sequence[Tensor], device: torch.device) -> Tensor:
    """(t, 3) the triplets that a miner found, or all that its pairs make.

    They come in the order of theirs: by the positive pair, then by the negative one. Memory is
    linear in their number.
    """
    if len(indices_tuple) == 3:
        return torch.stack(list(indices_tuple), 1).to(device)
    a1, p, a2, n = (index.to(device) for index in indices_tuple)
    order = a2.argsort(stable=True)
    anchors = a2[order].contiguous()
    first = torch.searchsorted(anchors, a1.contiguous())
    count = torch.searchsorted(anchors, a1.contiguous(), right=True) - first
    of_pair = torch.arange(len(a1), device=device).repeat_interleave(count)
    start = (count.cumsum(0) - count)[of_pair]
    at = first[of_pair] + torch.arange(len(of_pair), device=device) - start
    return torch.stack([a1[of_pair], p[of_pair], n[order[at]]], 1)


def first_two(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(c,) the first and (c,) the second row of each class that has two, sorted by class."""
    ordered, order = labels.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = (new[:-1] & ~new[1:]).nonzero()[:, 0]
    return order[first], order[first + 1]
