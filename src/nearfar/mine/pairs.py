"""Miners of pairs: an anchor of the batch and another row."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.pick import seed
from nearfar.inputs import ArrayLike, between, positive_integer
from nearfar.listed import FoundPairs
from nearfar.mine.comparison import Comparison
from nearfar.reference import ReferenceLike


@over_processes
def multi_similarity_pairs(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: float = 0.1,
    distance: Distance = "cosine",
    normalize: bool = False,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> FoundPairs:
    r"""The negatives nearer than an anchor's farthest positive, and the reverse, within epsilon.

    With :math:`s` the cosine, or the negated distance, the pairs with

    .. math:: s_{in} > \min_{p} s_{ip} - \epsilon, \qquad s_{ip} < \max_{n} s_{in} + \epsilon

    Anchors without a positive or without a negative have no pairs.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        epsilon: how far beyond the limit a pair may be and still be selected.
        distance: "cosine" (the paper's), "euclidean", "sqeuclidean", "snr", "manhattan" or the p of
            a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        `FoundPairs`, sorted by row. Their number depends on how much the classes overlap; it may
        be all pairs.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> found = multi_similarity_pairs(x, [0, 0, 1, 1], epsilon=0.3)
    >>> found.positive
    tensor([[1, 0],
            [2, 3]])
    >>> found.negative
    tensor([[1, 2],
            [2, 1]])

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
    Learning", CVPR 2019, equations 11 and 12.
    """
    between("epsilon", epsilon, -inf, inf)
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)
    found: list[tuple[Tensor, Tensor]] = []
    for where, d, block in compared.blocks():
        near, far = block.masks()
        if not d.shape[1]:
            continue
        farthest = d.masked_fill(~near, -inf).amax(1, keepdim=True)
        nearest = d.masked_fill(~far, inf).amin(1, keepdim=True)
        both = near.any(1, keepdim=True) & far.any(1, keepdim=True)
        near = near & both & (d > nearest - epsilon)
        far = far & both & (d < farthest + epsilon)
        found.append((_listed(where, near), _listed(where, far)))
    return _found(found, compared)


@over_processes
def violating_pairs(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    pos_margin: float = 0.2,
    neg_margin: float = 0.8,
    distance: Distance = "euclidean",
    normalize: bool = False,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> FoundPairs:
    r"""Similar pairs farther apart than one margin, and dissimilar pairs nearer than another.

    .. math:: d_{ip} > m_+, \qquad d_{in} < m_-

    These are the pairs with a loss in `batch_contrastive_loss` at the same margins.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        pos_margin: similar pairs are selected beyond it; 0 or more, in units of the distance.
        neg_margin: dissimilar pairs are selected below it; 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        `FoundPairs`, sorted by row. It may be all pairs.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 0.1], [0.5, 0], [1.5, 0]])
    >>> found = violating_pairs(x, [0, 0, 1, 1])
    >>> found.positive
    tensor([[2, 3],
            [3, 2]])
    >>> found.negative
    tensor([[0, 2],
            [1, 2],
            [2, 0],
            [2, 1]])

    Source: Hadsell, Chopra & LeCun, CVPR 2006; as pytorch-metric-learning's PairMarginMiner.
    """
    between("pos_margin", pos_margin, 0, inf, ", a distance")
    between("neg_margin", neg_margin, 0, inf, ", a distance")
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)
    found = []
    for where, d, block in compared.blocks():
        near, far = block.masks()
        found.append(
            (_listed(where, near & (d > pos_margin)), _listed(where, far & (d < neg_margin)))
        )
    return _found(found, compared)


@over_processes
def hard_pairs(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    share: float = 0.5,
    distance: Distance = "euclidean",
    normalize: bool = False,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> FoundPairs:
    """The farthest of all similar pairs, and the nearest of all dissimilar ones.

    A share of each kind is selected, rounded up. Memory is linear in the number of selected pairs.
    With `group`, these are the hardest pairs of all processes, of which each finds those of its
    anchors.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        share: of the pairs of each kind, from 0 to 1.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        `FoundPairs`, sorted by row.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 0.1], [0.5, 0], [1.5, 0]])
    >>> found = hard_pairs(x, [0, 0, 1, 1], share=0.25)
    >>> found.positive, found.negative
    (tensor([[2, 3]]), tensor([[0, 2],
            [2, 0]]))

    Source: Yuan, Yang & Zhang, "Hard-Aware Deeply Cascaded Embedding", ICCV 2017.
    """
    between("share", share, 0, 1)
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)
    similar, dissimilar = (_Hardest(_part(share, n)) for n in _n_pairs(compared))
    for where, d, block in compared.blocks():
        for hardest, mask, sign in zip((similar, dissimilar), block.masks(), (1, -1), strict=True):
            hardest.add(d[mask] * sign, _listed(where, mask))
    return _found([(similar.pairs(compared), dissimilar.pairs(compared))], compared)


@over_processes
def uniform_pairs(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    bins: int = 100,
    per_bin: int = 10,
    distance: Distance = "euclidean",
    normalize: bool = False,
    generator: torch.Generator | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> FoundPairs:
    """Similar and dissimilar pairs drawn so that all distances are equally likely.

    The distances of each kind, from the smallest to the largest, are divided into bins of equal
    width. From each bin that holds a pair, so many are drawn, with replacement. This measures every
    pair three times. With `group`, the bins are those of the pairs of all processes, and pairs are
    drawn from all by the generator of the first process: the same as one process would draw.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        bins: how many there are.
        per_bin: how many pairs of each kind are drawn from each bin.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first, as losses of similarities do by default;
            "cosine" always does. If false, other distances are between the rows as they are.
        generator: for the draw; None: torch's own.
        reference: rows to compare with instead of the other rows of the batch.
        group: the processes that the batch is spread over, as in a loss: anchors are then rows of
            this process, and what is found are rows of all, in the order of their processes;
            `reference` is the same on all. None: this one has all of the batch.

    Returns:
        `FoundPairs`, of at most bins x per_bin pairs of each kind, sorted by bin.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [0.5, 0], [8.0, 0]])
    >>> random = torch.Generator().manual_seed(0)
    >>> uniform_pairs(x, [0, 0, 0, 1], bins=2, per_bin=2, generator=random).positive
    tensor([[0, 2],
            [2, 0],
            [0, 1],
            [0, 1]])

    Source: pytorch-metric-learning's UniformHistogramMiner.
    """
    positive_integer("bins", bins)
    positive_integer("per_bin", per_bin)
    compared = Comparison.of(x, labels, reference, distance, normalize=normalize, group=group)

    def each() -> Iterator[tuple[int, Tensor, Tensor]]:
        """The pairs of each block: 0 for similar or 1 for dissimilar, distances, pairs."""
        for where, d, block in compared.blocks():
            for kind, mask in enumerate(block.masks()):
                if mask.any():
                    yield kind, d[mask], _listed(where, mask)

    reach = torch.full((2, 2), -inf, dtype=torch.float64, device=compared.rows.device)
    for kind, d, _ in each():
        low, high = d.aminmax()
        reach[kind] = torch.maximum(reach[kind], torch.stack([-low, high]))
    if compared.processes is not None:
        reach = compared.processes.largest(reach)
    binned = [_Bins(-low, high, bins) for low, high in reach.tolist()]
    counts = torch.zeros(2, bins, dtype=torch.int64)
    for kind, d, _ in each():
        counts[kind] += binned[kind].count(d)
    chance, earlier, counts = _one_draw(generator, counts, compared)
    drawn = [_Drawn(*of_kind, per_bin, chance) for of_kind in zip(earlier, counts, strict=True)]
    for kind, d, pairs in each():
        drawn[kind].take(binned[kind], d, pairs)
    return _found([(drawn[0].pairs(), drawn[1].pairs())], compared)


def _n_pairs(compared: Comparison) -> list[int]:
    """How many similar and how many dissimilar pairs there are, on all processes."""
    own = compared.relation.n_pairs()
    told = [own] if compared.processes is None else compared.processes.tell(own)
    return [sum(of_each) for of_each in zip(*told, strict=True)]


def _one_draw(
    generator: torch.Generator | None, counts: Tensor, compared: Comparison
) -> tuple[torch.Generator, Tensor, Tensor]:
    """A generator that is the same on all processes; counts of earlier processes, and of all."""
    own, processes = seed(generator), compared.processes
    if processes is None:
        return torch.Generator().manual_seed(own), torch.zeros_like(counts), counts
    first = processes.tell([own])[0][0]
    of_each = processes.each(counts.to(compared.rows.device)).cpu()
    return torch.Generator().manual_seed(first), of_each[: processes.rank].sum(0), of_each.sum(0)


def _part(share: float, n: int) -> int:
    """A share of n, rounded up, but not for a rounding error: 0.07 * 100 is 7.000000000000001."""
    return ceil(share * n * (1 - 1e-12))


class _Hardest:
    """The k pairs with the largest values; of equal ones, the first."""

    def __init__(self, k: int) -> None:
        self.k, self.least = k, -inf
        self.found: list[tuple[Tensor, Tensor]] = []

    def add(self, values: Tensor, pairs: Tensor) -> None:
        """Add pairs with these values, each k times as many before the rest is dropped."""
        some = values > self.least
        if some.any():
            self.found.append((values[some], pairs[some]))
        if sum(len(values) for values, _ in self.found) > 2 * self.k:
            self._drop()

    def _drop(self) -> None:
        values, pairs = (torch.cat(part) for part in zip(*self.found, strict=True))
        best = values.argsort(descending=True, stable=True)[: self.k].sort().values
        self.found = [(values[best], pairs[best])]
        self.least = float(values[best].min()) if len(best) else inf

    def pairs(self, compared: Comparison) -> Tensor:
        """(k, 2) the pairs, in the order in which they were added; of all processes, its share."""
        none = torch.zeros(0, 2, dtype=torch.int64, device=compared.rows.device)
        self.found.append((compared.rows.new_zeros(0), none))
        self._drop()
        values, pairs = self.found[0]
        return pairs[compared.largest_of_all(values, self.k)]


@dataclass(frozen=True)
class _Bins:
    """n bins of equal width, from the smallest to the largest distance."""

    low: float
    high: float
    n: int

    def of(self, d: Tensor) -> Tensor:
        """The bin of each distance."""
        edges = torch.linspace(self.low, self.high, self.n + 1, dtype=d.dtype, device=d.device)
        return torch.searchsorted(edges, d, right=True).sub_(1).clamp_(0, self.n - 1)

    def count(self, d: Tensor) -> Tensor:
        """(n,) how many of the distances are in each bin."""
        return torch.bincount(self.of(d), minlength=self.n).cpu()


class _Drawn:
    """Pairs drawn from each bin, by their place in it, before the pairs themselves are seen.

    Args:
        earlier: (n,) how many pairs each bin has on earlier processes, which take these.
        counts: (n,) how many it has on all.
        per_bin: how many are drawn from each.
        chance: draws them.
    """

    def __init__(
        self, earlier: Tensor, counts: Tensor, per_bin: int, chance: torch.Generator
    ) -> None:
        share = torch.rand(len(counts), per_bin, generator=chance, dtype=torch.float64)
        # How many pairs of its bin come before the one that is drawn; below 0 once it was taken.
        self._before = (share * counts[:, None]).long() - earlier[:, None]
        self._pairs = torch.full((*share.shape, 2), -1)

    def take(self, bins: _Bins, d: Tensor, pairs: Tensor) -> None:
        """Take those that were drawn from these pairs, which follow the ones given before."""
        by_bin = bins.of(d).argsort(stable=True).cpu()
        count = bins.count(d)
        here = (self._before >= 0) & (self._before < count[:, None])
        first = (count.cumsum(0) - count)[:, None]
        self._pairs[here] = pairs.cpu()[by_bin[(first + self._before)[here]]]
        self._before -= count[:, None]

    def pairs(self) -> Tensor:
        """(k, 2) the drawn pairs, once all were given."""
        return self._pairs[self._pairs[..., 0] >= 0]


def _listed(where: slice, mask: Tensor) -> Tensor:
    """(k, 2) the marked pairs of a block."""
    return mask.nonzero() + torch.tensor([where.start, 0], device=mask.device)


def _found(found: list[tuple[Tensor, Tensor]], compared: Comparison) -> FoundPairs:
    """The similar and the dissimilar pairs of all blocks."""
    none = torch.zeros(0, 2, dtype=torch.int64, device=compared.rows.device)
    positive, negative = (
        torch.cat([none, *(part[kind].to(none.device) for part in found)]) for kind in (0, 1)
    )
    return FoundPairs(positive, negative)
