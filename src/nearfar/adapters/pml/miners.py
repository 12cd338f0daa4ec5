"""`pytorch_metric_learning.miners`, which find the same tuples in memory linear in what they find.

Each miner has the name, the arguments and the defaults of theirs, of which it is a subclass; the
tuples come in another order. The statistics that theirs collect if asked stay 0.

>>> import torch
>>> from nearfar.adapters.pml import miners
>>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]]), [0, 0, 1, 1]
>>> miners.MultiSimilarityMiner(epsilon=0.3)(x, torch.tensor(labels))
(tensor([1, 2]), tensor([0, 3]), tensor([1, 2]), tensor([2, 1]))
"""

from collections.abc import Iterator
from math import ceil, degrees
from typing import Any, cast

import torch
from torch import Tensor

from nearfar.adapters.pml.absent import no_counterpart
from nearfar.adapters.pml.compared import Compared
from nearfar.adapters.pml.inplace import InPlaceOfTheirs
from nearfar.distance import between_rows, scaled
from nearfar.engine.relation import Block
from nearfar.engine.slices import spans
from nearfar.extras import needs
from nearfar.inputs import lift
from nearfar.listed import FoundPairs
from nearfar.mine.comparison import Comparison, bounds
from nearfar.mine.pairs import hard_pairs, multi_similarity_pairs, uniform_pairs, violating_pairs
from nearfar.mine.rows import distance_weighted_negatives
from nearfar.mine.triplets import (
    Choice,
    Violating,
    angular_triplets,
    easy_hard_triplets,
    violating_triplets,
)

with needs("pml"):
    from pytorch_metric_learning import miners as theirs
    from pytorch_metric_learning.miners import BaseMiner, EmbeddingsAlreadyPackagedAsTriplets

__all__ = [
    "AngularMiner",
    "BaseMiner",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "EmbeddingsAlreadyPackagedAsTriplets",
    "HDCMiner",
    "MultiSimilarityMiner",
    "PairMarginMiner",
    "TripletMarginMiner",
    "UniformHistogramMiner",
]

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def __getattr__(name: str) -> Any:
    raise no_counterpart(__name__, name, {})


class _Miner(InPlaceOfTheirs):
    """A miner of theirs."""

    def settings(self) -> dict[str, Any]:
        return self.measure.as_distance()

    def compared(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> "_Given":
        return _Given(
            Compared.of(embeddings, labels, ref_emb, ref_labels, self.measure),
            self.settings(),
        )


class _Given:
    """What a miner of nearfar takes."""

    def __init__(self, compared: Compared, distance: dict[str, Any]) -> None:
        self.compared = compared
        self.data = compared.x, cast(Tensor, compared.labels)
        self.how = {**distance, "reference": compared.reference}


def _four(found: FoundPairs) -> Four:
    (a1, p), (a2, n) = found.positive.unbind(1), found.negative.unbind(1)
    return a1, p, a2, n


def _three(found: Tensor) -> Three:
    a, p, n = found.unbind(1)
    return a, p, n


class MultiSimilarityMiner(_Miner, theirs.MultiSimilarityMiner):
    """Theirs, by `nearfar.mine.multi_similarity_pairs`: cosines unless a distance is given.

    Args:
        epsilon: how much less similar than the least similar positive a negative may be, and how
            much more similar than the most similar negative a positive.
        kwargs: `distance`.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Four:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        return _four(multi_similarity_pairs(*given.data, epsilon=self.epsilon, **given.how))


class PairMarginMiner(_Miner, theirs.PairMarginMiner):
    """Theirs, by `nearfar.mine.violating_pairs`.

    Args:
        pos_margin: the distance beyond which similar pairs are found.
        neg_margin: the distance up to which dissimilar ones are.
        kwargs: `distance`.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Four:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        near, far = (self.measure.margin(m) for m in (self.pos_margin, self.neg_margin))
        return _four(violating_pairs(*given.data, pos_margin=near, neg_margin=far, **given.how))


class HDCMiner(_Miner, theirs.HDCMiner):
    """Theirs, by `nearfar.mine.hard_pairs`; after `set_idx_externally`, among those pairs.

    Args:
        filter_percentage: the share of the pairs of each kind.
        kwargs: `distance`.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Four:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        share = self.filter_percentage
        if not self.was_set_externally:
            return _four(hard_pairs(*given.data, share=share, **given.how))
        near = _hardest(given, self.a1, self.p, share, largest=True)
        return *near, *_hardest(given, self.a2, self.n, share, largest=False)


def _hardest(
    given: _Given, anchor: Tensor, other: Tensor, share: float, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """A share of some pairs: the farthest or the nearest."""
    x, others = given.compared.x, given.compared.others
    distance, normalize = given.how["distance"], given.how["normalize"]
    both = lift("embeddings", x), lift("ref_emb", x if others is None else others)
    x, others = scaled(distance, normalize, *both)
    d = x.new_zeros(len(anchor))
    for at in spans(len(anchor), len(x) + len(others)):
        d[at] = between_rows(x[anchor[at]], others[other[at]], distance)
    kept = d.topk(ceil(share * len(d)), largest=largest).indices
    return anchor[kept], other[kept]


class UniformHistogramMiner(_Miner, theirs.UniformHistogramMiner):
    """Theirs, by `nearfar.mine.uniform_pairs`; other random numbers draw.

    Args:
        num_bins: into how many bins the distances are sorted.
        pos_per_bin: how many similar pairs are drawn of each.
        neg_per_bin: how many dissimilar ones.
        kwargs: `distance`.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Four:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        near, far = (
            uniform_pairs(*given.data, bins=self.num_bins, per_bin=per_bin, **given.how)
            for per_bin in (self.pos_per_bin, self.neg_per_bin)
        )
        return _four(FoundPairs(near.positive, far.negative))


class TripletMarginMiner(_Miner, theirs.TripletMarginMiner):
    """Theirs, by `nearfar.mine.violating_triplets`.

    Args:
        margin: triplets whose negative is farther by it are not found, unless they are "easy".
        type_of_triplets: "all", "hard", "semihard" or "easy".
        kwargs: `distance`.
    """

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Three:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        kind: Violating = self.type_of_triplets
        return _three(violating_triplets(*given.data, margin=self.margin, kind=kind, **given.how))


class AngularMiner(_Miner, theirs.AngularMiner):
    """Theirs, by `nearfar.mine.angular_triplets`, of the rows as they are.

    Args:
        angle: the angle at the negative, in degrees, above which a triplet is found.
        kwargs: `distance`, which is `LpDistance()`.
    """

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Three:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        angle = degrees(self.angle)
        return _three(
            angular_triplets(*given.data, angle=angle, reference=given.compared.reference)
        )


class BatchEasyHardMiner(_Miner, theirs.BatchEasyHardMiner):
    """Theirs, by `nearfar.mine.easy_hard_triplets`.

    Where a strategy is "all", it returns all pairs of that kind, and of the other kind the one that
    each anchor chooses.

    Args:
        pos_strategy: "easy", "semihard", "hard" or "all".
        neg_strategy: "semihard", "hard", "easy" or "all".
        allowed_pos_range: (low, high) distances, or cosines, of the positives chosen from.
        allowed_neg_range: likewise of the negatives.
        kwargs: `distance`.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Four:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        near: Choice = self.pos_strategy
        far: Choice = self.neg_strategy
        ranges = [self._range(r) for r in (self.allowed_pos_range, self.allowed_neg_range)]
        if "all" in (near, far):
            positive = _one_kind(given, 0, ranges[0], all=near == "all", farthest=near == "hard")
            negative = _one_kind(given, 1, ranges[1], all=far == "all", farthest=far == "easy")
            return _four(FoundPairs(positive, negative))
        found = easy_hard_triplets(
            *given.data,
            positive=near,
            negative=far,
            positive_range=ranges[0],
            negative_range=ranges[1],
            **given.how,
        )
        a, p, n = found.unbind(1)
        return a, p, a, n

    def _range(self, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given is None:
            return None
        low, high = sorted(self.measure.margin(end) for end in given)
        return low, high


def _one_kind(
    given: _Given, kind: int, within: tuple[float, float] | None, *, all: bool, farthest: bool
) -> Tensor:
    """(k, 2) all pairs of a kind, 0 for similar or 1; or of each anchor the nearest or farthest."""
    x, labels = given.data
    how = given.how
    compared = Comparison.of(
        x, labels, how["reference"], how["distance"], normalize=how["normalize"]
    )
    low, high = bounds("the range", within)

    def found() -> Iterator[Tensor]:
        blocks: Iterator[tuple[slice, Tensor, Block]] = compared.blocks()
        for where, d, block in blocks:
            some = block.masks()[kind]
            if not all:
                some = some & (d >= low) & (d <= high)
                worst = -torch.inf if farthest else torch.inf
                at = d.masked_fill(~some, worst)
                best = (at.argmax(1) if farthest else at.argmin(1))[:, None]
                some = torch.zeros_like(some).scatter_(1, best, some.gather(1, best))
            yield some.nonzero() + torch.tensor([where.start, 0], device=some.device)

    return torch.cat([torch.zeros(0, 2, dtype=torch.int64, device=x.device), *found()])


class BatchHardMiner(BatchEasyHardMiner, theirs.BatchHardMiner):
    """Theirs, by `nearfar.mine.easy_hard_triplets`: each anchor's hardest triplet.

    Args:
        kwargs: `distance`.
    """

    def mine(  # type: ignore[override]
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Three:
        a, p, _, n = BatchEasyHardMiner.mine(self, embeddings, labels, ref_emb, ref_labels)
        return a, p, n


class DistanceWeightedMiner(_Miner, theirs.DistanceWeightedMiner):
    """Theirs, by `nearfar.mine.distance_weighted_negatives`; other random numbers draw.

    Args:
        cutoff: smaller distances are drawn as if they were this large.
        nonzero_loss_cutoff: anchors of which all negatives are this far have no triplets.
        kwargs: `distance`, which is `LpDistance()`.
    """

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Three:
        given = self.compared(embeddings, labels, ref_emb, ref_labels)
        # As many as there are rows of the class, among them the anchor itself.
        wanted = given.compared.positives()
        wanted = (wanted + int(given.compared.own)) * (wanted > 0)
        if not wanted.any():
            return _three(torch.zeros(0, 3, dtype=torch.int64, device=embeddings.device))
        found = distance_weighted_negatives(
            *given.data,
            k=int(wanted.max()),
            cutoff=self.cutoff,
            nonzero_loss_cutoff=self.nonzero_loss_cutoff,
            reference=given.compared.reference,
        )
        slots = torch.arange(found.indices.shape[1], device=wanted.device)
        drawn = (slots < wanted[:, None]) & (found.distances < self.nonzero_loss_cutoff)
        anchor, slot = drawn.nonzero(as_tuple=True)
        return anchor, _a_positive(given.compared, anchor), found.indices[anchor, slot]


def _a_positive(compared: Compared, anchor: Tensor) -> Tensor:
    """(t,) a similar row of each anchor, drawn evenly."""
    labels, others = cast(Tensor, compared.labels), cast(Tensor, compared.other_labels)
    order = others.argsort(stable=True)
    first = torch.searchsorted(others[order], labels[anchor])
    count = compared.positives()[anchor]
    at = (torch.rand(len(anchor), dtype=torch.float64).to(count.device) * count).long()
    at = first + at.minimum(count - 1)
    if compared.own:  # which is passed over
        at += at >= order.argsort()[anchor]
    return order[at]
