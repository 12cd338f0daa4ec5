"""The losses as modules, which keep their hyperparameters.

Written by tools/write_losses.py; do not edit.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.meeting import Group
from nearfar.engine.precision import Precision
from nearfar.inputs import ArrayLike
from nearfar.labels import SimilarLabel
from nearfar.listed import Pairs
from nearfar.losses.base import LossModule, ProxyLossModule, by_name
from nearfar.losses.batch_pair import (
    Selection,
    batch_contrastive_loss,
    batch_cosine_loss,
    siglip_loss,
)
from nearfar.losses.batch_tuples import (
    Quadruplets,
    Triplets,
    batch_quadruplet_loss,
    batch_triplet_loss,
)
from nearfar.losses.contrast import clip_loss, nca_loss, nt_xent_loss, sup_con_loss
from nearfar.losses.info_nce import info_nce_loss, n_pair_loss
from nearfar.losses.pair import contrastive_loss, contrastive_loss_from_distance, cosine_loss
from nearfar.losses.proxy import proxy_anchor_loss, proxy_nca_loss, proxy_softmax_loss
from nearfar.losses.similarity import Similarity
from nearfar.losses.softmax import softmax_loss
from nearfar.losses.tuples import quadruplet_loss, triplet_loss
from nearfar.losses.weighted import (
    circle_loss,
    lifted_pair_loss,
    lifted_structure_loss,
    multi_similarity_loss,
)
from nearfar.reduction import Reduction
from nearfar.reference import ReferenceLike


class ContrastiveLoss(LossModule):
    """Pull similar pairs together, push dissimilar ones apart until they are `margin` away.

    The module of :func:`nearfar.contrastive_loss`, which describes the data and the math.

    Args:
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        pos_margin: the distance, 0 or more, up to which similar pairs are not pulled.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        squared: whether the two terms are squared; if not, they push and pull with the same force
            at every distance.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        reduction: "mean" over the losses of all pairs, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per pair.
    """

    loss = staticmethod(contrastive_loss)
    margin: float
    pos_margin: float
    distance: Distance
    normalize: bool
    squared: bool
    similar_label: SimilarLabel
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        pos_margin: float = 0.0,
        distance: Distance = "euclidean",
        normalize: bool = False,
        squared: bool = True,
        similar_label: SimilarLabel = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            pos_margin=pos_margin,
            distance=distance,
            normalize=normalize,
            squared=squared,
            similar_label=similar_label,
            reduction=reduction,
        )

    def forward(
        self, x1: ArrayLike, x2: ArrayLike, y: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.contrastive_loss`."""
        return contrastive_loss(
            x1,
            x2,
            y,
            weight=weight,
            margin=self.margin,
            pos_margin=self.pos_margin,
            distance=self.distance,
            normalize=self.normalize,
            squared=self.squared,
            similar_label=self.similar_label,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, x1: ArrayLike, x2: ArrayLike, y: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...


class ContrastiveLossFromDistance(LossModule):
    """The contrastive loss of given distances.

    The module of :func:`nearfar.contrastive_loss_from_distance`, which describes the data and the
    math.

    Args:
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        pos_margin: the distance, 0 or more, up to which similar pairs are not pulled.
        squared: whether the two terms are squared.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        reduction: "mean" over the losses of all pairs, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per pair.
    """

    loss = staticmethod(contrastive_loss_from_distance)
    margin: float
    pos_margin: float
    squared: bool
    similar_label: SimilarLabel
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        pos_margin: float = 0.0,
        squared: bool = True,
        similar_label: SimilarLabel = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            pos_margin=pos_margin,
            squared=squared,
            similar_label=similar_label,
            reduction=reduction,
        )

    def forward(self, d: ArrayLike, y: ArrayLike, *, weight: ArrayLike | None = None) -> Tensor:
        """The loss of a batch; see :func:`nearfar.contrastive_loss_from_distance`."""
        return contrastive_loss_from_distance(
            d,
            y,
            weight=weight,
            margin=self.margin,
            pos_margin=self.pos_margin,
            squared=self.squared,
            similar_label=self.similar_label,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, d: ArrayLike, y: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...


class CosineLoss(LossModule):
    """Turn similar pairs to one direction, dissimilar ones apart until their cosine is `margin`.

    The module of :func:`nearfar.cosine_loss`, which describes the data and the math.

    Args:
        margin: the cosine, from -1 to 1, below which dissimilar pairs are not pushed.
        similar_label: for numeric `y`, which of 0 and 1 means similar.
        reduction: "mean" over the losses of all pairs, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per pair.
    """

    loss = staticmethod(cosine_loss)
    margin: float
    similar_label: SimilarLabel
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 0.0,
        similar_label: SimilarLabel = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(margin=margin, similar_label=similar_label, reduction=reduction)

    def forward(
        self,
        x1: ArrayLike,
        x2: ArrayLike,
        y: ArrayLike | None = None,
        *,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.cosine_loss`."""
        return cosine_loss(
            x1,
            x2,
            y,
            weight=weight,
            margin=self.margin,
            similar_label=self.similar_label,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x1: ArrayLike,
            x2: ArrayLike,
            y: ArrayLike | None = None,
            *,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class TripletLoss(LossModule):
    """Keep each anchor nearer to its positive than to its negative, by at least `margin`.

    The module of :func:`nearfar.triplet_loss`, which describes the data and the math.

    Args:
        margin: how much nearer, 0 or more, in units of the distance.
        distance: "euclidean", "sqeuclidean" (the paper's), "cosine", "snr", "manhattan" or the p of
            a p-norm.
        normalize: scale all rows to length 1 first, as the paper does; "cosine" does in any case.
        swap: measure the negative from the anchor or the positive, whichever is nearer to it.
        smooth: softplus in place of the hinge.
        reduction: "mean" over the losses of all triplets, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per triplet.
    """

    loss = staticmethod(triplet_loss)
    margin: float
    distance: Distance
    normalize: bool
    swap: bool
    smooth: bool
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        distance: Distance = "euclidean",
        normalize: bool = False,
        swap: bool = False,
        smooth: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            distance=distance,
            normalize=normalize,
            swap=swap,
            smooth=smooth,
            reduction=reduction,
        )

    def forward(
        self,
        anchor: ArrayLike,
        positive: ArrayLike,
        negative: ArrayLike,
        *,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.triplet_loss`."""
        return triplet_loss(
            anchor,
            positive,
            negative,
            weight=weight,
            margin=self.margin,
            distance=self.distance,
            normalize=self.normalize,
            swap=self.swap,
            smooth=self.smooth,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            anchor: ArrayLike,
            positive: ArrayLike,
            negative: ArrayLike,
            *,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class QuadrupletLoss(LossModule):
    """The triplet loss, plus a term that keeps positive pairs closer than pairs of two negatives.

    The module of :func:`nearfar.quadruplet_loss`, which describes the data and the math.

    Args:
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        reduction: "mean" over the losses of all quadruplets, "active" over those that are not 0,
            (low, high) over those between; "sum", or "none" for one loss per quadruplet.
    """

    loss = staticmethod(quadruplet_loss)
    margin: float
    margin2: float
    distance: Distance
    normalize: bool
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        margin2: float = 0.5,
        distance: Distance = "euclidean",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            margin2=margin2,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )

    def forward(
        self,
        anchor: ArrayLike,
        positive: ArrayLike,
        negative: ArrayLike,
        negative2: ArrayLike,
        *,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.quadruplet_loss`."""
        return quadruplet_loss(
            anchor,
            positive,
            negative,
            negative2,
            weight=weight,
            margin=self.margin,
            margin2=self.margin2,
            distance=self.distance,
            normalize=self.normalize,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            anchor: ArrayLike,
            positive: ArrayLike,
            negative: ArrayLike,
            negative2: ArrayLike,
            *,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class InfoNCELoss(LossModule):
    """Pick the positive out of the negatives: softmax cross-entropy over similarities.

    The module of :func:`nearfar.info_nce_loss`, which describes the data and the math.

    Args:
        temperature: tau, above 0; a smaller one weighs the nearest negatives more. A tensor with
            one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        symmetric: without `negatives`, the mean of both directions: each positive also picks its
            query out of all queries.
        decoupled: leave the positive out of the denominator (Yeh et al. 2022).
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the queries, "active" over those whose loss is not 0, (low, high)
            over those between; "sum", or "none" for one loss per query. With `symmetric` and
            `hard_negatives`, the mean of the two directions.
    """

    loss = staticmethod(info_nce_loss)
    temperature: float | Tensor
    similarity: Similarity
    normalize: bool
    symmetric: bool
    decoupled: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.07,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        symmetric: bool = False,
        decoupled: bool = False,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature,
            similarity=similarity,
            normalize=normalize,
            symmetric=symmetric,
            decoupled=decoupled,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        query: ArrayLike,
        positive: ArrayLike,
        negatives: ArrayLike | None = None,
        *,
        hard_negatives: ArrayLike | None = None,
        ids: ArrayLike | None = None,
        hard_ids: ArrayLike | None = None,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.info_nce_loss`."""
        return info_nce_loss(
            query,
            positive,
            negatives,
            hard_negatives=hard_negatives,
            ids=ids,
            hard_ids=hard_ids,
            weight=weight,
            temperature=self.temperature,
            similarity=self.similarity,
            normalize=self.normalize,
            symmetric=self.symmetric,
            decoupled=self.decoupled,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            query: ArrayLike,
            positive: ArrayLike,
            negatives: ArrayLike | None = None,
            *,
            hard_negatives: ArrayLike | None = None,
            ids: ArrayLike | None = None,
            hard_ids: ArrayLike | None = None,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class SoftmaxLoss(LossModule):
    """Softmax cross-entropy: pick the target class out of all classes.

    The module of :func:`nearfar.softmax_loss`, which describes the data and the math.

    Args:
        label_smoothing: epsilon, from 0 to 1.
        reduction: "mean" over the losses of all rows, "active" over those that are not 0, (low,
            high) over those between; "sum", or "none" for one loss per row.
    """

    loss = staticmethod(softmax_loss)
    label_smoothing: float
    reduction: Reduction

    @by_name
    def __init__(self, *, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(label_smoothing=label_smoothing, reduction=reduction)

    def forward(
        self, logits: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.softmax_loss`."""
        return softmax_loss(
            logits,
            target,
            weight=weight,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, logits: ArrayLike, target: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...


class CLIPLoss(LossModule):
    """Match two towers in both directions: softmax over the rows and over the columns.

    The module of :func:`nearfar.clip_loss`, which describes the data and the math.

    Args:
        scale: t = 1 / temperature, above 0; the paper learns log t, from log(1 / 0.07) up to log
            100: pass `log_t.exp()` in each step, to the function, not to the module.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        decoupled: leave the match out of both denominators (Yeh et al. 2022).
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the n matches, "active" over those whose loss is not 0, (low, high)
            over those between; "sum", or "none" for one loss per match. The loss of a single match
            is 0.
    """

    loss = staticmethod(clip_loss)
    scale: float | Tensor
    similarity: Similarity
    normalize: bool
    decoupled: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        scale: float | Tensor,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        decoupled: bool = False,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            scale=scale,
            similarity=similarity,
            normalize=normalize,
            decoupled=decoupled,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        y: ArrayLike,
        *,
        ids: ArrayLike | None = None,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.clip_loss`."""
        return clip_loss(
            x,
            y,
            ids=ids,
            weight=weight,
            scale=self.scale,
            similarity=self.similarity,
            normalize=self.normalize,
            decoupled=self.decoupled,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            y: ArrayLike,
            *,
            ids: ArrayLike | None = None,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class SigLIPLoss(LossModule):
    """The sigmoid loss of two towers: each pair is classified by itself as a match or not.

    The module of :func:`nearfar.siglip_loss`, which describes the data and the math.

    Args:
        scale: t, above 0; the paper learns log t from log 10: pass `log_t.exp()` in each step, to
            the function, not to the module.
        bias: b; the paper learns it from -10.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the n rows (each a sum over n pairs, as in the paper), "active" over
            those whose loss is not 0, (low, high) over those between; "sum", or "none" for one loss
            per row.
    """

    loss = staticmethod(siglip_loss)
    scale: float | Tensor
    bias: float | Tensor
    similarity: Similarity
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        scale: float | Tensor,
        bias: float | Tensor,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            scale=scale,
            bias=bias,
            similarity=similarity,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        y: ArrayLike,
        *,
        ids: ArrayLike | None = None,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.siglip_loss`."""
        return siglip_loss(
            x,
            y,
            ids=ids,
            weight=weight,
            scale=self.scale,
            bias=self.bias,
            similarity=self.similarity,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            y: ArrayLike,
            *,
            ids: ArrayLike | None = None,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class BatchContrastiveLoss(LossModule):
    """The contrastive loss over all pairs, with equal weight on similar and on dissimilar ones.

    The module of :func:`nearfar.batch_contrastive_loss`, which describes the data and the math.

    Args:
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        pos_margin: the distance, 0 or more, at which similar pairs are no longer pulled.
        squared: whether the two hinges are squared, as in the paper.
        distance: "euclidean", "sqeuclidean", "cosine", "snr" (anchor first), "manhattan", or a
            number p of at least 1 for the p-norm.
        normalize: scale all rows to length 1 first; "cosine" does so in any case.
        select: "all" pairs, or "hard", those in the overlap; with `pairs`, the overlap among them.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over similar plus mean over dissimilar pairs, "active" over those of each
            kind that are not 0, (low, high) over those between; "sum" over all ordered pairs, or
            "none" for (n,) sums, one per row over its pairs, without those means.
    """

    loss = staticmethod(batch_contrastive_loss)
    margin: float
    pos_margin: float
    squared: bool
    distance: Distance
    normalize: bool
    select: Selection
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        pos_margin: float = 0.0,
        squared: bool = True,
        distance: Distance = "euclidean",
        normalize: bool = False,
        select: Selection = "all",
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            pos_margin=pos_margin,
            squared=squared,
            distance=distance,
            normalize=normalize,
            select=select,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.batch_contrastive_loss`."""
        return batch_contrastive_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            margin=self.margin,
            pos_margin=self.pos_margin,
            squared=self.squared,
            distance=self.distance,
            normalize=self.normalize,
            select=self.select,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class BatchCosineLoss(LossModule):
    """The cosine loss over all pairs, with equal weight on similar and on dissimilar ones.

    The module of :func:`nearfar.batch_cosine_loss`, which describes the data and the math.

    Args:
        margin: the cosine, from -1 to 1, below which dissimilar pairs are not pushed.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over similar plus mean over dissimilar pairs, "active" over those of each
            kind that are not 0, (low, high) over those between; "sum" over all ordered pairs, or
            "none" for (n,) sums, one per row over its pairs, without those means.
    """

    loss = staticmethod(batch_cosine_loss)
    margin: float
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 0.0,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(margin=margin, group=group, precision=precision, reduction=reduction)

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.batch_cosine_loss`."""
        return batch_cosine_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            margin=self.margin,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class BatchTripletLoss(LossModule):
    """The triplet loss over every triplet of the batch, or over those that `select` picks.

    The module of :func:`nearfar.batch_triplet_loss`, which describes the data and the math.

    Args:
        margin: how much farther a negative must be than a positive, 0 or more.
        distance: "euclidean", "sqeuclidean" (Schroff et al.), "cosine", "snr", "manhattan" or the p
            of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" always does.
        select: "all" triplets, or how to pick some: "hard", "easy_positive", "semihard" or
            "distance_weighted".
        smooth: softplus in place of the hinge; with margin 0, the soft margin of Hermans et al.
            With "all", time then grows with :math:`n^2` times the number of positives per row.
        swap: measure the negative from anchor or positive, whichever is nearer to it. With "all",
            time then grows with :math:`n^2` times the number of positives per row.
        n_per_anchor: how many triplets of each anchor count: a positive and a negative each, drawn
            evenly and with replacement; None: all that `select` picks.
        cutoff: of "distance_weighted", from 0 to 2: smaller distances have the weight of this one.
        nonzero_loss_cutoff: of "distance_weighted", from `cutoff` to 2: no negative is drawn from
            here on unless there are no others.
        generator: draws for "distance_weighted" and `n_per_anchor`; None: torch's own. Each call
            draws once; with `group`, the generator of the first process counts.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the triplets: all, or those selected (one per anchor for "hard" and
            "easy_positive", one per anchor and positive for "semihard" and "distance_weighted");
            "active" over those that are not 0, (low, high) over those between; "sum", or "none" for
            (n,) sums, one per anchor over its triplets.
    """

    loss = staticmethod(batch_triplet_loss)
    margin: float
    distance: Distance
    normalize: bool
    select: Triplets
    smooth: bool
    swap: bool
    n_per_anchor: int | None
    cutoff: float
    nonzero_loss_cutoff: float
    generator: torch.Generator | None
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        distance: Distance = "euclidean",
        normalize: bool = False,
        select: Triplets = "all",
        smooth: bool = False,
        swap: bool = False,
        n_per_anchor: int | None = None,
        cutoff: float = 0.5,
        nonzero_loss_cutoff: float = 1.4,
        generator: torch.Generator | None = None,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            distance=distance,
            normalize=normalize,
            select=select,
            smooth=smooth,
            swap=swap,
            n_per_anchor=n_per_anchor,
            cutoff=cutoff,
            nonzero_loss_cutoff=nonzero_loss_cutoff,
            generator=generator,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        triplets: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.batch_triplet_loss`."""
        return batch_triplet_loss(
            x,
            labels,
            triplets=triplets,
            weight=weight,
            reference=reference,
            margin=self.margin,
            distance=self.distance,
            normalize=self.normalize,
            select=self.select,
            smooth=self.smooth,
            swap=self.swap,
            n_per_anchor=self.n_per_anchor,
            cutoff=self.cutoff,
            nonzero_loss_cutoff=self.nonzero_loss_cutoff,
            generator=self.generator,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            triplets: ArrayLike | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class BatchQuadrupletLoss(LossModule):
    """The quadruplet loss over every quadruplet of the batch, or over the hardest of each anchor.

    The module of :func:`nearfar.batch_quadruplet_loss`, which describes the data and the math.

    Args:
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" always does.
        select: "all" or "hard".
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the quadruplets ("hard": over the anchors that have one); "active"
            for the mean over the first terms that are not 0, plus that over such second terms,
            (low, high) likewise over those between; "sum", or "none" for (n,) sums, one per anchor
            over its quadruplets.
    """

    loss = staticmethod(batch_quadruplet_loss)
    margin: float
    margin2: float
    distance: Distance
    normalize: bool
    select: Quadruplets
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        margin2: float = 0.5,
        distance: Distance = "euclidean",
        normalize: bool = False,
        select: Quadruplets = "all",
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            margin2=margin2,
            distance=distance,
            normalize=normalize,
            select=select,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike,
        *,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.batch_quadruplet_loss`."""
        return batch_quadruplet_loss(
            x,
            labels,
            weight=weight,
            reference=reference,
            margin=self.margin,
            margin2=self.margin2,
            distance=self.distance,
            normalize=self.normalize,
            select=self.select,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike,
            *,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class SupConLoss(LossModule):
    """Supervised contrast: each anchor against all other rows, with its whole class as positives.

    The module of :func:`nearfar.sup_con_loss`, which describes the data and the math.

    Args:
        temperature: tau, above 0. A tensor with one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        decoupled: leave the positives out of the denominator (Yeh et al. 2022).
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive (decoupled: and a negative),
            "active" over those whose loss is not 0, (low, high) over those between; "sum", or
            "none", where the others are 0.
    """

    loss = staticmethod(sup_con_loss)
    temperature: float | Tensor
    similarity: Similarity
    normalize: bool
    decoupled: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        decoupled: bool = False,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature,
            similarity=similarity,
            normalize=normalize,
            decoupled=decoupled,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.sup_con_loss`."""
        return sup_con_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            temperature=self.temperature,
            similarity=self.similarity,
            normalize=self.normalize,
            decoupled=self.decoupled,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class NTXentLoss(LossModule):
    """One softmax per positive pair: the positive against the anchor's negatives.

    The module of :func:`nearfar.nt_xent_loss`, which describes the data and the math.

    Args:
        temperature: tau, above 0. A tensor with one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        decoupled: leave the positive out of its denominator (Yeh et al. 2022).
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the positive pairs, "active" over those whose loss is not 0, (low,
            high) over those between; "sum", or "none" for (n,) sums, one per anchor. As in the
            paper, a positive pair whose anchor has no negatives has loss 0 and counts in the mean
            (decoupled: it is undefined and left out).
    """

    loss = staticmethod(nt_xent_loss)
    temperature: float | Tensor
    similarity: Similarity
    normalize: bool
    decoupled: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.5,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        decoupled: bool = False,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature,
            similarity=similarity,
            normalize=normalize,
            decoupled=decoupled,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.nt_xent_loss`."""
        return nt_xent_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            temperature=self.temperature,
            similarity=self.similarity,
            normalize=self.normalize,
            decoupled=self.decoupled,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class NCALoss(LossModule):
    """Neighbourhood components: the chance that an anchor picks one of its positives.

    The module of :func:`nearfar.nca_loss`, which describes the data and the math.

    Args:
        scale: t, above 0; 1 in the paper. A tensor with one number may be learned.
        similarity: "sqeuclidean", minus the squared Euclidean distance; "inner_product", which is
            the cosine of normalized rows; or "cosine", whatever `normalize` says.
        normalize: scale all rows to length 1 first. The paper does not.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive, "active" over those whose loss is
            not 0, (low, high) over those between; "sum", or "none", where the others are 0.
    """

    loss = staticmethod(nca_loss)
    scale: float | Tensor
    similarity: Similarity
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        scale: float | Tensor = 1.0,
        similarity: Similarity = "sqeuclidean",
        normalize: bool = True,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            scale=scale,
            similarity=similarity,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.nca_loss`."""
        return nca_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            scale=self.scale,
            similarity=self.similarity,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class MultiSimilarityLoss(LossModule):
    """Weigh each pair by its own similarity and by those of its anchor's other pairs.

    The module of :func:`nearfar.multi_similarity_loss`, which describes the data and the math.

    Args:
        alpha: how sharply positives below `base` are pulled, above 0.
        beta: how sharply negatives above `base` are pushed, above 0.
        base: lambda, the similarity that separates the two.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance. These are at
            most 0, so that `base` should be below 0: minus the squared distance that separates the
            two.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over all anchors with at least one positive or negative, as in the paper,
            "active" over those whose loss is not 0, (low, high) over those between; "sum", or
            "none" for one loss per anchor.
    """

    loss = staticmethod(multi_similarity_loss)
    alpha: float
    beta: float
    base: float
    similarity: Similarity
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            base=base,
            similarity=similarity,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.multi_similarity_loss`."""
        return multi_similarity_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            similarity=self.similarity,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class CircleLoss(LossModule):
    """Pull and push each similarity harder the farther it is from its target.

    The module of :func:`nearfar.circle_loss`, which describes the data and the math.

    Args:
        margin: m, from 0 to 1: similarities should reach 1 - m and m.
        scale: gamma, above 0.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance. These are at
            most 0: dissimilar rows are pushed up to a squared distance of m, and similar rows reach
            their target only with m = 1.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive and a negative, "active" over those
            whose loss is not 0, (low, high) over those between; "sum", or "none", where the others
            are 0.
    """

    loss = staticmethod(circle_loss)
    margin: float
    scale: float
    similarity: Similarity
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 0.25,
        scale: float = 256.0,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            scale=scale,
            similarity=similarity,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.circle_loss`."""
        return circle_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            margin=self.margin,
            scale=self.scale,
            similarity=self.similarity,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class LiftedStructureLoss(LossModule):
    """Pull the farthest positives and push the nearest negatives of each anchor, smoothly.

    The module of :func:`nearfar.lifted_structure_loss`, which describes the data and the math.

    Args:
        margin: m, 0 or more, in units of the distance.
        distance: "euclidean", "sqeuclidean", "cosine", "snr" (anchor first), "manhattan", or a
            number p of at least 1 for the p-norm.
        normalize: scale all rows to length 1 first; "cosine" does so in any case.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors that have a positive and a negative, "active" over those
            whose loss is not 0, (low, high) over those between; "sum", or "none", where the others
            are 0.
    """

    loss = staticmethod(lifted_structure_loss)
    margin: float
    distance: Distance
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        distance: Distance = "euclidean",
        normalize: bool = False,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            distance=distance,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
        reference: ReferenceLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.lifted_structure_loss`."""
        return lifted_structure_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            reference=reference,
            margin=self.margin,
            distance=self.distance,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
            reference: ReferenceLike | None = None,
        ) -> Tensor: ...


class LiftedPairLoss(LossModule):
    """One hinge per similar pair, which compares it with all negatives of both its ends.

    The module of :func:`nearfar.lifted_pair_loss`, which describes the data and the math.

    Args:
        margin: m, 0 or more, in units of the distance.
        distance: "euclidean", "sqeuclidean", "cosine", "snr" (anchor first), "manhattan", or a
            number p of at least 1 for the p-norm.
        normalize: scale all rows to length 1 first; "cosine" does so in any case.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the similar pairs, each in both orders; "active" over those that are
            not 0, (low, high) over those between; "sum", or "none" for (n,) sums, one per anchor.
    """

    loss = staticmethod(lifted_pair_loss)
    margin: float
    distance: Distance
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        margin: float = 1.0,
        distance: Distance = "euclidean",
        normalize: bool = False,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            margin=margin,
            distance=distance,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self,
        x: ArrayLike,
        labels: ArrayLike | None,
        *,
        pairs: Pairs | None = None,
        weight: ArrayLike | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.lifted_pair_loss`."""
        return lifted_pair_loss(
            x,
            labels,
            pairs=pairs,
            weight=weight,
            margin=self.margin,
            distance=self.distance,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: ArrayLike,
            labels: ArrayLike | None,
            *,
            pairs: Pairs | None = None,
            weight: ArrayLike | None = None,
        ) -> Tensor: ...


class NPairLoss(LossModule):
    """One anchor and one positive of each class: pick the positive out of those of all classes.

    The module of :func:`nearfar.n_pair_loss`, which describes the data and the math.

    Args:
        temperature: tau, above 0; 1 in the paper. A tensor with one number may be learned.
        similarity: "inner_product", which is the cosine of normalized rows; "cosine", whatever
            `normalize` says; or "sqeuclidean", minus the squared Euclidean distance.
        normalize: scale all rows to length 1 first, so that inner products are cosines. The paper
            does not.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the classes with two rows, "active" over those whose loss is not 0,
            (low, high) over those between; "sum", or "none" for (n,) losses, 0 for rows that are
            not anchors.
    """

    loss = staticmethod(n_pair_loss)
    temperature: float | Tensor
    similarity: Similarity
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        similarity: Similarity = "inner_product",
        normalize: bool = True,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            temperature=temperature,
            similarity=similarity,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
        )

    def forward(
        self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.n_pair_loss`."""
        return n_pair_loss(
            x,
            labels,
            weight=weight,
            temperature=self.temperature,
            similarity=self.similarity,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...


class ProxySoftmaxLoss(ProxyLossModule):
    """Softmax over cosines to learned proxies of classes, with a margin on the right one if asked.

    The module of :func:`nearfar.proxy_softmax_loss`, which describes the data and the math. It
    holds the proxies: see :class:`~nearfar.losses.base.ProxyLossModule`.

    Args:
        n_classes: the number of classes; their ids are 0 to n_classes - 1.
        dim: the length of an embedding.
        sub_centers: how many proxies each class has.
        scale: t, above 0. A tensor with one number may be learned.
        angle_margin: radians, from 0 to pi / 2.
        cosine_margin: from 0 to 1.
        normalize: scale rows and proxies to length 1 first, so that the products are cosines;
            without it there is no margin.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the rows, "active" over those whose loss is not 0, (low, high) over
            those between; "sum", or "none" for one loss per row.
        generator: draws the first proxies. None: torch's default.
        device: where the proxies are. None: torch's default.
        dtype: of the proxies. None: torch's default.
    """

    loss = staticmethod(proxy_softmax_loss)
    scale: float | Tensor
    angle_margin: float
    cosine_margin: float
    normalize: bool
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        sub_centers: int = 1,
        scale: float | Tensor = 64.0,
        angle_margin: float = 0.0,
        cosine_margin: float = 0.0,
        normalize: bool = True,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            n_classes,
            dim,
            sub_centers=sub_centers,
            scale=scale,
            angle_margin=angle_margin,
            cosine_margin=cosine_margin,
            normalize=normalize,
            group=group,
            precision=precision,
            reduction=reduction,
            generator=generator,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.proxy_softmax_loss`."""
        return proxy_softmax_loss(
            x,
            self.proxies,
            labels,
            weight=weight,
            scale=self.scale,
            angle_margin=self.angle_margin,
            cosine_margin=self.cosine_margin,
            normalize=self.normalize,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...


class ProxyNCALoss(ProxyLossModule):
    """Neighbourhood components with proxies: each row nearer to its own than to all others.

    The module of :func:`nearfar.proxy_nca_loss`, which describes the data and the math. It holds
    the proxies: see :class:`~nearfar.losses.base.ProxyLossModule`.

    Args:
        n_classes: the number of classes; their ids are 0 to n_classes - 1.
        dim: the length of an embedding.
        sub_centers: how many proxies each class has.
        scale: t, above 0; 1 in the paper. A tensor with one number may be learned.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the rows, "active" over those whose loss is above 0, (low, high) over
            those between; "sum", or "none" for one loss per row.
        generator: draws the first proxies. None: torch's default.
        device: where the proxies are. None: torch's default.
        dtype: of the proxies. None: torch's default.
    """

    loss = staticmethod(proxy_nca_loss)
    scale: float | Tensor
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        sub_centers: int = 1,
        scale: float | Tensor = 1.0,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            n_classes,
            dim,
            sub_centers=sub_centers,
            scale=scale,
            group=group,
            precision=precision,
            reduction=reduction,
            generator=generator,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.proxy_nca_loss`."""
        return proxy_nca_loss(
            x,
            self.proxies,
            labels,
            weight=weight,
            scale=self.scale,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...


class ProxyAnchorLoss(ProxyLossModule):
    """Proxies as anchors: each pulls the rows of its class and pushes all others.

    The module of :func:`nearfar.proxy_anchor_loss`, which describes the data and the math. It holds
    the proxies: see :class:`~nearfar.losses.base.ProxyLossModule`.

    Args:
        n_classes: the number of classes; their ids are 0 to n_classes - 1.
        dim: the length of an embedding.
        margin: m, from 0 to 1.
        scale: t (the paper's alpha), above 0.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean", the formula; "active", with means over the proxies whose logarithm is not
            0, or (low, high), over those whose logarithm is between; "sum" of all logarithms, or
            "none" for (c,) sums, one per proxy, without the two means.
        generator: draws the first proxies. None: torch's default.
        device: where the proxies are. None: torch's default.
        dtype: of the proxies. None: torch's default.
    """

    loss = staticmethod(proxy_anchor_loss)
    margin: float
    scale: float
    group: Group | None
    precision: Precision | None
    reduction: Reduction

    @by_name
    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        margin: float = 0.1,
        scale: float = 32.0,
        group: Group | None = None,
        precision: Precision | None = None,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            n_classes,
            dim,
            margin=margin,
            scale=scale,
            group=group,
            precision=precision,
            reduction=reduction,
            generator=generator,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`nearfar.proxy_anchor_loss`."""
        return proxy_anchor_loss(
            x,
            self.proxies,
            labels,
            weight=weight,
            margin=self.margin,
            scale=self.scale,
            group=self.group,
            precision=self.precision,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:

        def __call__(
            self, x: ArrayLike, labels: ArrayLike, *, weight: ArrayLike | None = None
        ) -> Tensor: ...
