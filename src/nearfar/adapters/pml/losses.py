"""`pytorch_metric_learning.losses`, with the values and gradients computed by nearfar.

Each loss has the name, the arguments, the defaults, the attributes and the state dict of theirs,
of which it is a subclass. Memory is linear in the batch, or in what a miner found.
The guide sets the two side by side, and says where they differ.

A loss of theirs that nearfar does not have is an error that names what comes nearest:

>>> from nearfar.adapters.pml.losses import FastAPLoss  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
ImportError: nearfar has no losses.FastAPLoss. Nearest: nearfar.batch_loss with a rule of a few ...
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from nearfar.adapters.pml.absent import no_counterpart
from nearfar.adapters.pml.base import (
    AgainstProxies,
    ByNearfar,
    HoldsProxies,
    LossDict,
    OfAnchors,
    OfPositives,
    WithoutReference,
    WithReference,
    called,
    each_pair,
    every_row,
    mined_weight,
    of_anchors,
)
from nearfar.adapters.pml.compared import Compared, Indices, Pairs, first_two, triplets_of
from nearfar.adapters.pml.terms import (
    AnchorTerms,
    Each,
    TupleTerms,
    already_reduced,
    as_reduction,
    loss_info,
)
from nearfar.engine.closeness import Tile
from nearfar.extras import needs
from nearfar.losses.batch_pair import batch_contrastive_loss
from nearfar.losses.batch_tuples import batch_triplet_loss
from nearfar.losses.contrast import nca_loss, nt_xent_loss, sup_con_loss
from nearfar.losses.info_nce import info_nce_loss
from nearfar.losses.own import PairRule, batch_loss, with_rule
from nearfar.losses.per_pair import per_pair
from nearfar.losses.proxy import proxy_anchor_loss, proxy_softmax_loss
from nearfar.losses.terms import softplus
from nearfar.losses.weighted import (
    circle_loss,
    lifted_pair_loss,
    lifted_structure_loss,
    multi_similarity_loss,
)
from nearfar.reduction import Reduction
from nearfar.reference import Reference

with needs("pml"):
    from pytorch_metric_learning import losses as theirs
    from pytorch_metric_learning import reducers
    from pytorch_metric_learning.losses import (
        BaseLossWrapper,
        BaseMetricLossFunction,
        CrossBatchMemory,
        EmbeddingRegularizerMixin,
        GenericPairLoss,
        MultipleLosses,
        SelfSupervisedLoss,
        WeightRegularizerMixin,
    )
    from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

__all__ = [
    "ArcFaceLoss",
    "BaseLossWrapper",
    "BaseMetricLossFunction",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "EmbeddingRegularizerMixin",
    "GeneralizedLiftedStructureLoss",
    "GenericPairLoss",
    "LiftedStructureLoss",
    "MultiSimilarityLoss",
    "MultipleLosses",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SelfSupervisedLoss",
    "SignalToNoiseRatioContrastiveLoss",
    "SubCenterArcFaceLoss",
    "SupConLoss",
    "ThresholdConsistentMarginLoss",
    "TripletMarginLoss",
    "WeightRegularizerMixin",
]

_RULE = "nearfar.batch_loss with a rule of a few lines, docs/your-own-loss.md"
_INSTEAD = {
    "AngularLoss": "TripletMarginLoss with miners.AngularMiner",
    "DynamicSoftMarginLoss": "TripletMarginLoss",
    "FastAPLoss": _RULE,
    "HistogramLoss": "ContrastiveLoss",
    "InstanceLoss": "nearfar.softmax_loss of the similarities of all rows",
    "IntraPairVarianceLoss": _RULE,
    "LargeMarginSoftmaxLoss": "ArcFaceLoss, whose margin is added to the angle",
    "ManifoldLoss": "ProxyAnchorLoss",
    "MarginLoss": _RULE + ", which builds it",
    "P2SGradLoss": "NormalizedSoftmaxLoss",
    "PNPLoss": _RULE,
    "RankedListLoss": _RULE,
    "SmoothAPLoss": _RULE,
    "SoftTripleLoss": "SubCenterArcFaceLoss, which takes the largest cosine of a class",
    "SphereFaceLoss": "ArcFaceLoss, whose margin is added to the angle",
    "TupletMarginLoss": _RULE,
    "VICRegLoss": "SelfSupervisedLoss(NTXentLoss())",
}


def __getattr__(name: str) -> Any:
    raise no_counterpart(__name__, name, _INSTEAD)


class MultiSimilarityLoss(OfAnchors, theirs.MultiSimilarityLoss):
    """Theirs, by `nearfar.multi_similarity_loss`; its mean is over all anchors.

    Args:
        alpha: how sharply positives below `base` are pulled.
        beta: how sharply negatives above `base` are pushed.
        base: the similarity, or the distance, that separates the two.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> MultiSimilarityLoss()(x, labels)
    tensor(0.2126)
    """

    loss = staticmethod(multi_similarity_loss)

    def settings(self) -> dict[str, Any]:
        given = self.measure.as_similarity()
        base = -self.base if given["similarity"] == "sqeuclidean" else self.base
        return {"alpha": float(self.alpha), "beta": float(self.beta), "base": base, **given}


class SupConLoss(OfAnchors, theirs.SupConLoss):
    """Theirs, by `nearfar.sup_con_loss`; its mean is over the anchors whose loss is not 0.

    Args:
        temperature: what similarities are divided by, above 0.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> SupConLoss(temperature=0.5)(x, labels)
    tensor(0.3485)
    """

    loss = staticmethod(sup_con_loss)

    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **self.measure.as_similarity()}


class CircleLoss(OfAnchors, theirs.CircleLoss):
    """Theirs, by `nearfar.circle_loss`; its mean is over the anchors whose loss is not 0.

    Args:
        m: cosines should reach 1 - m for similar pairs and m for others.
        gamma: the scale, above 0.
        kwargs: `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> CircleLoss()(x, labels)
    tensor(3.2008)
    """

    loss = staticmethod(circle_loss)

    def settings(self) -> dict[str, Any]:
        return {"margin": self.m, "scale": float(self.gamma), **self.measure.as_similarity()}


class GeneralizedLiftedStructureLoss(OfAnchors, theirs.GeneralizedLiftedStructureLoss):
    """Theirs, by `nearfar.lifted_structure_loss`; its mean is over all anchors.

    An anchor without positives, or without negatives, has a loss of 0. There the logarithm of an
    empty sum is taken as 0, so that it has one.

    Args:
        neg_margin: a distance, or a similarity.
        pos_margin: likewise; only the difference of the two counts.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> GeneralizedLiftedStructureLoss()(x, labels)
    tensor(0.3188)
    """

    loss = staticmethod(lifted_structure_loss)

    def settings(self) -> dict[str, Any]:
        return _lifted(self)


class LiftedStructureLoss(OfPositives, theirs.LiftedStructureLoss):
    """Theirs, by `nearfar.lifted_pair_loss`, without a reference.

    A pair of which neither end has a negative has a loss of 0; see
    `GeneralizedLiftedStructureLoss`. There, with `ref_emb`, an index of the batch stands for a row
    of the reference; here it is refused.

    Args:
        neg_margin: a distance, or a similarity.
        pos_margin: likewise; only the difference of the two counts.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> LiftedStructureLoss()(x, labels)
    tensor(0.7256)
    """

    loss = staticmethod(lifted_pair_loss)

    def settings(self) -> dict[str, Any]:
        return _lifted(self)

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        if compared.others is not None:
            raise ValueError(
                "LiftedStructureLoss compares a pair with the negatives of both its ends, and a "
                "row of ref_emb has none: take GeneralizedLiftedStructureLoss."
            )
        return super().of_compared(compared, mined)


def _lifted(loss: Any) -> dict[str, Any]:
    margin = loss.measure.margin
    gap = float(margin(loss.neg_margin) - margin(loss.pos_margin))
    return {"margin": gap, **loss.measure.as_distance()}


class NTXentLoss(OfPositives, theirs.NTXentLoss):
    """Theirs, by `nearfar.nt_xent_loss`; its mean is over the positive pairs.

    Args:
        temperature: what similarities are divided by, above 0.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> NTXentLoss(temperature=0.5)(x, labels)
    tensor(0.3485)
    """

    loss = staticmethod(nt_xent_loss)

    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **self.measure.as_similarity()}


class OfBothKinds(WithReference, ByNearfar):
    """The mean over similar pairs plus that over dissimilar ones, each beyond a margin."""

    def settings(self) -> dict[str, Any]:
        measure = self.measure
        near, far = (float(measure.margin(margin)) for margin in self.margins())
        if measure.of == "inner_product":
            return {"rule": _hinges(near, far, -1), **measure.as_similarity()}
        if min(near, far) < 0:  # a cosine above 1, which nearfar's function refuses
            return {"rule": _hinges(near, far, 1), **measure.as_distance()}
        return {"pos_margin": near, "margin": far, "squared": False, **measure.as_distance()}

    def margins(self) -> tuple[float, float]:
        """Of similar and of dissimilar pairs."""
        raise NotImplementedError

    def both(self, compared: Compared, pairs: Pairs | None, reduction: Reduction) -> Tensor:
        """The sum of the two, each reduced in the same way."""
        settings = self.settings()
        loss = with_rule if "rule" in settings else batch_contrastive_loss
        return called(loss, compared, pairs, reduction=reduction, **settings)

    def one(self, kind: str, compared: Compared, pairs: Pairs | None) -> TupleTerms:
        """The terms of the similar pairs, "pos", or of the dissimilar ones, "neg"."""
        near, far = (float(self.measure.margin(margin)) for margin in self.margins())
        measured = self.settings()
        for name in ("pos_margin", "margin", "squared"):
            measured.pop(name, None)
        sign = -1 if self.measure.of == "inner_product" else 1
        settings = measured | {"rule": _hinges(near, far, sign, only=kind)}
        of_kind = None if pairs is None else pairs[kind == "neg"]
        unlisted = compared.positives if kind == "pos" else compared.negatives
        return TupleTerms(
            partial(called, with_rule, compared, pairs, **settings),
            unlisted if of_kind is None else partial(of_anchors, of_kind, compared.x),
            partial(each_pair, batch_loss, settings, compared, pairs, kind),
            pairs is not None,
        )


def _hinges(near: float, far: float, sign: int, *, only: str = "") -> PairRule:
    """The hinges of distances, or with sign -1 of similarities."""

    def pull(closeness: Tensor) -> Tensor:
        return (sign * (closeness - near)).relu()

    def push(closeness: Tensor) -> Tensor:
        return (sign * (far - closeness)).relu()

    return PairRule(
        torch.zeros_like if only == "neg" else pull, torch.zeros_like if only == "pos" else push
    )


class ContrastiveLoss(OfBothKinds, theirs.ContrastiveLoss):
    """Theirs, by `nearfar.batch_contrastive_loss`: of each kind the mean over what is not 0.

    Args:
        pos_margin: the distance up to which similar pairs are not pulled; with a similarity, the
            similarity from which they are not.
        neg_margin: the distance, or similarity, at which dissimilar pairs are no longer pushed.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> ContrastiveLoss()(x, labels)
    tensor(0.7380)
    """

    def margins(self) -> tuple[float, float]:
        return self.pos_margin, self.neg_margin

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        pairs = compared.pairs(mined)
        of_kinds = {kind: self.reducer_of(f"{kind}_loss") for kind in ("pos", "neg")}
        near, far = (as_reduction(reducer) for reducer in of_kinds.values())
        if near is not None and near == far and type(self.reducer) is reducers.MultipleReducers:
            both = already_reduced(self.both(compared, pairs, near))
            return {"pos_loss": both, "neg_loss": self.zero_loss()}
        return {
            f"{kind}_loss": self.one(kind, compared, pairs).info(reducer, compared.labels)
            for kind, reducer in of_kinds.items()
        }


class SignalToNoiseRatioContrastiveLoss(ContrastiveLoss, theirs.SignalToNoiseRatioContrastiveLoss):
    """Theirs: `ContrastiveLoss` of signal-to-noise distances.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> SignalToNoiseRatioContrastiveLoss()(x, labels)
    tensor(8.3200)
    """


class ThresholdConsistentMarginLoss(OfBothKinds, theirs.ThresholdConsistentMarginLoss):
    """Theirs, by `nearfar.batch_contrastive_loss` of cosines.

    Args:
        lambda_plus: what the similar pairs count.
        lambda_minus: what the dissimilar ones count.
        margin_plus: the cosine below which similar pairs are pulled.
        margin_minus: the cosine above which dissimilar ones are pushed.
        kwargs: `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> ThresholdConsistentMarginLoss()(x, labels)
    tensor(0.2000)
    """

    def margins(self) -> tuple[float, float]:
        return self.margin_plus, self.margin_minus

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        pairs = compared.pairs(mined)
        if self.lambda_plus == self.lambda_minus:
            total = self.lambda_plus * self.both(compared, pairs, "active")
        else:
            near, far = (
                self.one(kind, compared, pairs).loss(reduction="active") for kind in ("pos", "neg")
            )
            total = self.lambda_plus * near + self.lambda_minus * far
        return {"loss": already_reduced(total)}


class TripletMarginLoss(WithReference, ByNearfar, theirs.TripletMarginLoss):
    """Theirs, by `nearfar.batch_triplet_loss`: the mean over the triplets whose loss is not 0.

    All triplets take memory linear in the batch. The pairs that a miner found are made into
    triplets, which are listed. With `swap` and `ref_emb`, positive and negative are both rows of
    the reference; there the positive is looked up in the batch.

    Args:
        margin: how much farther the negative must be than the positive.
        swap: measure the negative from the anchor or the positive, whichever is nearer.
        smooth_loss: softplus in place of the hinge.
        triplets_per_anchor: "all", or how many are drawn, by other random numbers than theirs.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> TripletMarginLoss(margin=0.5)(x, labels)
    tensor(0.2380)
    """

    def settings(self) -> dict[str, Any]:
        return {
            "margin": self.margin,
            "swap": bool(self.swap),
            "smooth": bool(self.smooth_loss),
            **self.measure.as_distance(),
        }

    def check_reducer(self, reducer: Any) -> None:
        super().check_reducer(reducer)
        if isinstance(reducer, reducers.PerAnchorReducer):
            raise TypeError(
                "a PerAnchorReducer takes no triplets: take MeanReducer() or AvgNonZeroReducer()."
            )

    def of_compared(self, compared: Compared, mined: Indices) -> LossDict:
        if mined is None:
            terms = self._of_all(compared)
        else:
            terms = self._of_listed(compared, triplets_of(mined, compared.x.device))
        return {"loss": terms.info(self.reducer_of("loss"), compared.labels)}

    def _of_all(self, compared: Compared) -> TupleTerms:
        drawn = None if self.triplets_per_anchor == "all" else int(self.triplets_per_anchor)

        def counts() -> Tensor:
            near, far = compared.positives(), compared.negatives()
            return near * far if drawn is None else drawn * ((near > 0) & (far > 0))

        def each() -> Each:
            if drawn is None:
                ends = [end for ends in compared.every_pair() for end in ends.unbind(1)]
                triplets = triplets_of(ends, compared.x.device)
            else:
                others = compared.labels if compared.own else compared.other_labels
                found = lmu.get_random_triplet_indices(compared.labels, others, drawn)
                triplets = triplets_of(found, compared.x.device)
            return self._of_listed(compared, triplets).each()

        settings = self.settings() | {"n_per_anchor": drawn}
        loss = partial(called, batch_triplet_loss, compared, None, **settings)
        return TupleTerms(loss, counts, each, listed=False)

    def _of_listed(self, compared: Compared, triplets: Tensor) -> TupleTerms:
        alone = compared.by_list_alone()
        settings = self.settings() | {"triplets": triplets}

        def each() -> Each:
            loss = partial(per_pair, batch_triplet_loss)
            losses = called(loss, alone, None, **settings)  # type: ignore[arg-type]
            return losses, tuple(triplets.unbind(1)), "triplet"

        loss = partial(called, batch_triplet_loss, alone, None, **settings)
        return TupleTerms(loss, partial(of_anchors, triplets, compared.x), each, listed=True)


class NCALoss(ByNearfar, theirs.NCALoss):
    """Theirs, by `nearfar.nca_loss`; what was mined weighs the anchors.

    Args:
        softmax_scale: what distances, negated, are multiplied by.
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.tensor([0, 0, 1])
    >>> NCALoss()(x, labels)
    tensor(0.3485)
    """

    def settings(self) -> dict[str, Any]:
        return {"scale": float(self.softmax_scale), **self.measure.as_similarity()}

    def nca_computation(
        self,
        query: Tensor,
        reference: Tensor,
        query_labels: Tensor,
        reference_labels: Tensor,
        indices_tuple: Indices,
    ) -> LossDict:
        own = query is reference
        rows = self.measure.rows
        others = None if own and query_labels is reference_labels else rows(reference)
        compared = Compared(rows(query), query_labels, others, reference_labels, own)
        loss = partial(called, nca_loss, compared, None, **self.settings())
        weight = mined_weight(indices_tuple, query_labels, query, anchors_alone=not own)

        def each() -> tuple[Tensor, Tensor]:
            losses, row = every_row(loss, weight=weight)
            some = compared.positives() > 0
            return losses[some], row[some]

        terms = AnchorTerms(loss, lambda: (compared.positives() > 0).sum(), each)
        reducer = self.reducer_of("loss")
        if weight is None:
            return {"loss": terms.info(reducer)}
        return {"loss": loss_info(*each(), "element")}


class ProxyNCALoss(HoldsProxies, NCALoss, theirs.ProxyNCALoss):
    """Theirs, by `nearfar.nca_loss` against the proxies.

    The own proxy is in the denominator, so it is a softmax at twice the scale.

    Args:
        num_classes: the number of classes.
        embedding_size: the length of a row.
        kwargs: `softmax_scale` (1), `weight_init_func`, `weight_regularizer`, and those of
            `NCALoss`.

    >>> loss = ProxyNCALoss(3, 3)
    >>> loss.proxies.data = torch.eye(3)
    >>> loss(torch.eye(3), torch.tensor([0, 1, 2]))
    tensor(0.2395, grad_fn=<DivBackward0>)
    """


class _Classifier(AgainstProxies):
    """Softmax over the cosines of a row and the proxies `W`, (d, c)."""

    W: nn.Parameter

    def of_rows(self, x: Tensor, labels: Tensor, mined: Indices) -> LossDict:
        self.cast_types(x.dtype, x.device)
        found = {"loss": self.each_row(x, labels, mined)}
        self.add_weight_regularization_to_loss_dict(found, self.W.t())  # type: ignore[attr-defined]
        return found

    def proxies_of(self, W: Tensor) -> Tensor:  # noqa: N803 - their name
        return W.t()

    def against_proxies(self, x: Tensor, labels: Tensor, **how: Any) -> Tensor:
        measure = self.measure
        proxies = self.proxies_of(self.W)
        return proxy_softmax_loss(
            measure.rows(x), measure.rows(proxies), labels, **self.settings(), **how
        )


class ArcFaceLoss(_Classifier, theirs.ArcFaceLoss):
    """Theirs, by `nearfar.proxy_softmax_loss` with an angle margin.

    Args:
        num_classes: the number of classes.
        embedding_size: the length of a row.
        margin: what is added to the angle with the own class, in degrees.
        scale: what cosines are multiplied by, above 0.
        kwargs: `reducer`, `weight_init_func`, `weight_regularizer`, `embedding_regularizer` and
            their weights.

    >>> loss = ArcFaceLoss(3, 3, scale=10)
    >>> loss.W.data = torch.eye(3)
    >>> loss(torch.tensor([[1.0, 0.2, 0], [0, 1, 1]]), torch.tensor([0, 1]))
    tensor(2.1332, grad_fn=<DivBackward0>)
    """

    def settings(self) -> dict[str, Any]:
        self.measure.as_distance()
        return {"scale": float(self.scale), "angle_margin": float(self.margin)}


class CosFaceLoss(_Classifier, theirs.CosFaceLoss):
    """Theirs, by `nearfar.proxy_softmax_loss` with a cosine margin.

    Args:
        args: `num_classes` and `embedding_size`.
        margin: what is subtracted from the cosine with the own class.
        scale: what cosines are multiplied by, above 0.
        kwargs: as those of `ArcFaceLoss`.

    >>> loss = CosFaceLoss(3, 3, scale=10)
    >>> loss.W.data = torch.eye(3)
    >>> loss(torch.tensor([[1.0, 0.2, 0], [0, 1, 1]]), torch.tensor([0, 1]))
    tensor(1.7726, grad_fn=<DivBackward0>)
    """

    def settings(self) -> dict[str, Any]:
        self.measure.as_distance()
        return {"scale": float(self.scale), "cosine_margin": float(self.margin)}


class SubCenterArcFaceLoss(_Classifier, theirs.SubCenterArcFaceLoss):
    """Theirs, by `nearfar.proxy_softmax_loss` with several proxies of a class.

    Args:
        args: none: `num_classes` and `embedding_size` go by name, as there.
        margin: what is added to the angle with the own class, in degrees.
        scale: what cosines are multiplied by, above 0.
        sub_centers: the number of proxies of a class. `W` is (d, c * sub_centers).
        kwargs: as those of `ArcFaceLoss`.

    >>> loss = SubCenterArcFaceLoss(num_classes=2, embedding_size=2, sub_centers=1, scale=10)
    >>> loss.W.data = torch.eye(2)
    >>> loss(torch.tensor([[1.0, 0.2], [1, 1]]), torch.tensor([0, 1]))
    tensor(2.1326, grad_fn=<DivBackward0>)
    """

    def settings(self) -> dict[str, Any]:
        self.measure.as_distance()
        return {"scale": float(self.scale), "angle_margin": float(self.margin)}

    def proxies_of(self, W: Tensor) -> Tensor:  # noqa: N803 - their name
        return W.t().reshape(self.num_classes, self.sub_centers, -1)

    def get_outliers(self, embeddings: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().get_outliers(self.as_wide(embeddings), *args, **kwargs)


class NormalizedSoftmaxLoss(_Classifier, theirs.NormalizedSoftmaxLoss):
    """Theirs, by `nearfar.proxy_softmax_loss` at the scale 1 / temperature.

    Args:
        num_classes: the number of classes.
        embedding_size: the length of a row.
        temperature: what cosines are divided by, above 0.
        kwargs: `distance`, which is `DotProductSimilarity` or `CosineSimilarity`, and those of
            `ArcFaceLoss`.

    >>> loss = NormalizedSoftmaxLoss(3, 3, temperature=0.1)
    >>> loss.W.data = torch.eye(3)
    >>> loss(torch.tensor([[1.0, 0.2, 0], [0, 1, 1]]), torch.tensor([0, 1]))
    tensor(0.3470, grad_fn=<DivBackward0>)
    """

    def settings(self) -> dict[str, Any]:
        given = self.measure.as_similarity()
        if given["similarity"] == "sqeuclidean":
            raise TypeError(
                f"{self.measure.shown} is no similarity of NormalizedSoftmaxLoss: with rows of "
                "length 1, halve the temperature and take DotProductSimilarity()."
            )
        return {"scale": 1 / self.temperature, "normalize": given["normalize"]}

    def proxies_of(self, W: Tensor) -> Tensor:  # noqa: N803 - their name
        # They are scaled even where rows are not.
        return normalize(W, p=float(self.distance.p), dim=0).t()


class ProxyAnchorLoss(AgainstProxies, theirs.ProxyAnchorLoss):
    """Theirs, by `nearfar.proxy_anchor_loss`.

    A reducer other than the default, or what was mined, takes a rule, which is slower.

    Args:
        num_classes: the number of classes.
        embedding_size: the length of a row.
        margin: a cosine: rows of the class should be above it, others below minus it.
        alpha: the scale, above 0.
        kwargs: as those of `ArcFaceLoss`.

    >>> loss = ProxyAnchorLoss(3, 3)
    >>> loss.proxies.data = torch.eye(3)
    >>> loss(torch.eye(3), torch.tensor([0, 1, 2]))
    tensor(3.9133, grad_fn=<SumBackward0>)
    """

    divided = True

    def settings(self) -> dict[str, Any]:
        if not self.measure.cosine:
            raise TypeError(
                f"{self.measure.shown} is no similarity of ProxyAnchorLoss: take "
                "CosineSimilarity()."
            )
        return {"margin": float(self.margin), "scale": float(self.alpha)}

    def of_rows(self, x: Tensor, labels: Tensor, mined: Indices) -> LossDict:
        self.cast_types(x.dtype, x.device)
        weight = mined_weight(mined, labels, x)
        of_kinds = [self.reducer_of(name) for name in self._sub_loss_names()]
        plain = all(type(reducer) is reducers.DivisorReducer for reducer in of_kinds)
        if plain and weight is None and type(self.reducer) is reducers.MultipleReducers:
            both = proxy_anchor_loss(x, self.proxies, labels, **self.settings())
            found = {"pos_loss": already_reduced(both), "neg_loss": self.zero_loss()}
        else:
            found = self._of_each_proxy(x, labels, weight)
        self.add_weight_regularization_to_loss_dict(found, self.proxies)
        return found

    def _of_each_proxy(self, x: Tensor, labels: Tensor, weight: Tensor | None) -> LossDict:
        """The two logarithms of each proxy; a weight shifts the exponents of a row."""
        shift = torch.zeros_like(labels, dtype=x.dtype) if weight is None else weight - 1
        classes = torch.arange(self.num_classes, device=x.device)
        divisors = {"pos": len(torch.unique(labels)), "neg": self.num_classes}
        found = {}
        for kind, divisor in divisors.items():
            rule = partial(_log_sum_of_rows, kind, self.margin, self.alpha, shift)
            losses = batch_loss(
                rule,
                self.proxies,
                classes,
                similarity="cosine",
                reference=Reference(x, labels),
                reduction="none",
            )
            found[f"{kind}_loss"] = loss_info(losses, classes, "element") | {"divisor": divisor}
        return found


def _log_sum_of_rows(kind: str, margin: float, scale: float, shift: Tensor, tile: Tile) -> Tensor:
    """log(1 + the sum over the rows of a kind of e^exponent), one for each proxy."""
    near = kind == "pos"
    s = tile.closeness
    exponents = scale * (margin - s if near else s + margin) + shift[tile.columns]
    some = tile.positive if near else tile.negative
    return softplus(exponents.masked_fill(~some, torch.finfo(s.dtype).min).logsumexp(1))


class NPairsLoss(WithoutReference, ByNearfar, theirs.NPairsLoss):
    """Theirs, by `nearfar.info_nce_loss` of one anchor and one positive of each class.

    Args:
        kwargs: `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`.

    >>> x, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]]), [0, 0, 1, 1]
    >>> NPairsLoss()(x, torch.tensor(labels))
    tensor(0.4093)
    """

    def settings(self) -> dict[str, Any]:
        return {"temperature": 1.0, **self.measure.as_similarity()}

    def of_rows(self, x: Tensor, labels: Tensor, mined: Indices) -> LossDict:
        if mined is None:
            anchor, positive = first_two(labels)
        else:
            anchor, positive = lmu.convert_to_pos_pairs_with_unique_labels(mined, labels)
        self.num_pairs = len(anchor)
        x = self.measure.rows(x)
        loss = partial(info_nce_loss, x[anchor], x[positive], **self.settings())
        terms = AnchorTerms(loss, partial(len, anchor), lambda: (loss(reduction="none"), anchor))
        return {"loss": terms.info(self.reducer_of("loss"))}
