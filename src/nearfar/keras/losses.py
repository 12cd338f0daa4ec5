"""Losses for `model.compile(loss=...)`, one class for each function.

Keras casts labels to floating point before a loss sees them, and takes the mean over the rows of
the batch. Both are right for pairs, triplets and quadruplets. The losses of a whole batch therefore
replace `__call__`: class ids stay integers, and the mean is over what the loss says.
"""

from collections.abc import Callable
from math import inf
from typing import Any, get_args

import keras

from nearfar.keras.batch import (
    BatchDistance,
    Select,
    batch_triplet_loss,
    nt_xent_loss,
    sup_con_loss,
)
from nearfar.keras.checks import above_zero, between, chunk_rows, one_of
from nearfar.keras.labels import check_similar_label
from nearfar.keras.pairs import contrastive_loss, cosine_loss, quadruplet_loss, triplet_loss
from nearfar.keras.rows import Distance, unstacked
from nearfar.keras.saving import serializable
from nearfar.keras.towers import clip_loss, info_nce_loss, siglip_loss

_MEAN = "sum_over_batch_size"
Settings = dict[str, Any]
LossFunction = Callable[..., Any]


class _PerRow(keras.losses.Loss):
    """A loss of each row by itself, whose settings a saved model keeps."""

    def __init__(
        self, function: LossFunction, settings: Settings, name: str | None, reduction: str | None
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self._function, self._settings = function, settings

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if "similar_label" in self._settings:  # Keras is about to cast bool labels to numbers
            check_similar_label(y_true, self._settings["similar_label"])
        else:  # its place says what a row is; Keras would try to convert None
            y_true = y_pred
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred, **self._settings)

    def get_config(self) -> Settings:
        return {**super().get_config(), **self._settings}


class _WholeBatch(keras.losses.Loss):
    """A loss that compares all rows of a batch, and so is one number for the batch.

    The model ends in (n, d) embeddings, to which `y_true` gives labels; or in (n, k, d), one
    embedding for each of the names in `towers`. `sample_weight` is the weight of each anchor, in
    the sum and in the divisor of the mean.
    """

    def __init__(
        self,
        function: LossFunction,
        settings: Settings,
        name: str | None,
        towers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name=name)
        self._function, self._settings, self._towers = function, settings, towers

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        with keras.name_scope(self.name):
            given = unstacked(y_pred, *self._towers) if self._towers else (y_pred, y_true)
            return self._function(*given, weight=sample_weight, **self._settings)

    def get_config(self) -> Settings:
        return {"name": self.name, **self._settings}


@serializable
class ContrastiveLoss(_PerRow):
    """The contrastive loss of predicted distances, as a Siamese network gives them.

    The model ends in `Distance`, or in any other (n,) or (n, 1) distances; `y_true` says which
    pairs are similar. See `contrastive_loss`.

    Args:
        margin: the distance, 0 or more, at which dissimilar pairs are no longer pushed.
        similar_label: which of 0 and 1 in `y_true` means similar. The paper and the example of
            keras.io say 0; for bool labels, where True means similar, pass 1.
        reduction: Keras' own, by default the mean over the pairs.
        name: the name of the loss.

    Raises:
        TypeError: no `similar_label`.
        ValueError: a shape, label or margin out of range.

    >>> loss = ContrastiveLoss(margin=1.0, similar_label=1)
    >>> print(f"{float(loss([1, 0, 0], [0.5, 0.3, 1.5])):.4f}")
    0.2467
    """

    def __init__(
        self,
        margin: float = 1.0,
        *,
        similar_label: int,
        reduction: str | None = _MEAN,
        name: str | None = None,
    ) -> None:
        _asked(similar_label)
        settings = {"margin": between("margin", margin, 0, inf), "similar_label": similar_label}
        super().__init__(contrastive_loss, settings, name, reduction)


@serializable
class CosineLoss(_PerRow):
    """The cosine loss of pairs; see `cosine_loss`.

    The model ends in `keras.ops.stack([x1, x2], axis=1)`, (n, 2, d); `y_true` says which pairs are
    similar.

    Args:
        margin: the cosine, from -1 to 1, below which dissimilar pairs are not pushed.
        similar_label: which of 0 and 1 in `y_true` means similar; for bool labels, pass 1.
        reduction: Keras' own, by default the mean over the pairs.
        name: the name of the loss.

    Raises:
        TypeError: no `similar_label`.
        ValueError: a shape, label or margin out of range.

    >>> pairs = [[[1.0, 0], [2, 0]], [[0, 1], [1, 0]]]
    >>> print(float(CosineLoss(similar_label=1)([1, 1], pairs)))
    0.5
    """

    def __init__(
        self,
        margin: float = 0.0,
        *,
        similar_label: int,
        reduction: str | None = _MEAN,
        name: str | None = None,
    ) -> None:
        _asked(similar_label)
        settings = {"margin": between("margin", margin, -1, 1), "similar_label": similar_label}
        super().__init__(cosine_loss, settings, name, reduction)


@serializable
class TripletLoss(_PerRow):
    """The triplet loss of aligned rows; see `triplet_loss`.

    The model ends in `keras.ops.stack([anchor, positive, negative], axis=1)`, (n, 3, d). There is
    nothing for `y_true` to say: `model.fit(x)` needs no labels.

    Args:
        margin: how much farther the negative must be than the positive, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine" or "manhattan".
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        swap: measure the negative from the anchor or the positive, whichever is nearer to it.
        smooth: softplus in place of the hinge.
        reduction: Keras' own, by default the mean over the triplets.
        name: the name of the loss.

    Raises:
        ValueError: a shape or setting out of range.

    >>> triplets = [[[0.0, 0], [0, 1], [0, 1.5]], [[0, 0], [0, 1], [4, 0]]]
    >>> print(float(TripletLoss(margin=1.0)(None, triplets)))
    0.25
    """

    def __init__(
        self,
        margin: float = 1.0,
        *,
        distance: Distance = "euclidean",
        normalize: bool = False,
        swap: bool = False,
        smooth: bool = False,
        reduction: str | None = _MEAN,
        name: str | None = None,
    ) -> None:
        settings = {
            "margin": between("margin", margin, 0, inf),
            "distance": one_of("distance", distance, get_args(Distance)),
            "normalize": normalize,
            "swap": swap,
            "smooth": smooth,
        }
        super().__init__(triplet_loss, settings, name, reduction)


@serializable
class QuadrupletLoss(_PerRow):
    """The quadruplet loss of aligned rows; see `quadruplet_loss`.

    The model ends in `keras.ops.stack([anchor, positive, negative, negative2], axis=1)`,
    (n, 4, d); `model.fit(x)` needs no labels.

    Args:
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine" or "manhattan".
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        reduction: Keras' own, by default the mean over the quadruplets.
        name: the name of the loss.

    Raises:
        ValueError: a shape or setting out of range.

    >>> quadruplet = [[[0.0, 0], [0, 1], [0, 1.5], [0, 2.75]]]
    >>> print(float(QuadrupletLoss()(None, quadruplet)))
    0.75
    """

    def __init__(
        self,
        margin: float = 1.0,
        margin2: float = 0.5,
        *,
        distance: Distance = "euclidean",
        normalize: bool = False,
        reduction: str | None = _MEAN,
        name: str | None = None,
    ) -> None:
        settings = {
            "margin": between("margin", margin, 0, inf),
            "margin2": between("margin2", margin2, 0, inf),
            "distance": one_of("distance", distance, get_args(Distance)),
            "normalize": normalize,
        }
        super().__init__(quadruplet_loss, settings, name, reduction)


@serializable
class SupConLoss(_WholeBatch):
    """Supervised contrast of a batch of embeddings; see `sup_con_loss`.

    The model ends in the embeddings, (n, d); `y_true` holds class ids, (n,) integers of any size,
    or (n, c) bool multi-labels. `sample_weight` weighs the anchors.

    Args:
        temperature: tau, above 0.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        chunk_size: how many anchors are compared at a time; changes only memory and time.
        name: the name of the loss.

    Raises:
        TypeError: labels that are not integers: a floating point number may have merged ids.
        ValueError: a shape or setting out of range.

    >>> import numpy as np
    >>> x = np.array([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> print(f"{float(SupConLoss(temperature=0.5)(np.array([0, 0, 1, 1]), x)):.4f}")
    0.4302
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        chunk_size: int = 256,
        name: str | None = None,
    ) -> None:
        settings = {
            "temperature": above_zero("temperature", temperature),
            "normalize": normalize,
            "chunk_size": chunk_rows(chunk_size),
        }
        super().__init__(sup_con_loss, settings, name)


@serializable
class NTXentLoss(_WholeBatch):
    """One softmax per positive pair of a batch; see `nt_xent_loss`.

    The model ends in the embeddings, (n, d); `y_true` holds class ids, (n,) integers of any size,
    or (n, c) bool multi-labels. `sample_weight` weighs the anchors.

    Args:
        temperature: tau, above 0.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        chunk_size: how many anchors are compared at a time; changes only memory and time.
        name: the name of the loss.

    Raises:
        TypeError: labels that are not integers: a floating point number may have merged ids.
        ValueError: a shape or setting out of range.

    >>> import numpy as np
    >>> x = np.array([[1.0, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
    >>> print(f"{float(NTXentLoss()(np.array([0, 0, 1, 1]), x)):.4f}")
    0.4302
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        normalize: bool = True,
        chunk_size: int = 256,
        name: str | None = None,
    ) -> None:
        settings = {
            "temperature": above_zero("temperature", temperature),
            "normalize": normalize,
            "chunk_size": chunk_rows(chunk_size),
        }
        super().__init__(nt_xent_loss, settings, name)


@serializable
class BatchTripletLoss(_WholeBatch):
    """The triplet loss over one triplet of each anchor of a batch; see `batch_triplet_loss`.

    The model ends in the embeddings, (n, d); `y_true` holds class ids, (n,) integers of any size,
    or (n, c) bool multi-labels. `sample_weight` weighs the anchors.

    Args:
        select: "hard" (batch hard) or "easy_positive".
        margin: how much farther the negative must be than the positive, 0 or more.
        distance: "euclidean", "sqeuclidean" or "cosine".
        normalize: scale all rows to length 1 first; "cosine" always does.
        smooth: softplus in place of the hinge.
        chunk_size: how many anchors are compared at a time; changes only memory and time.
        name: the name of the loss.

    Raises:
        TypeError: labels that are not integers: a floating point number may have merged ids.
        ValueError: a shape or setting out of range.

    >>> import numpy as np
    >>> x = np.array([[0.0, 0], [0, 1], [1.5, 0], [0, 4]])
    >>> print(f"{float(BatchTripletLoss(select='hard')(np.array([0, 0, 1, 1]), x)):.4f}")
    1.6853
    """

    def __init__(
        self,
        *,
        select: Select,
        margin: float = 1.0,
        distance: BatchDistance = "euclidean",
        normalize: bool = False,
        smooth: bool = False,
        chunk_size: int = 256,
        name: str | None = None,
    ) -> None:
        settings = {
            "select": one_of("select", select, get_args(Select)),
            "margin": between("margin", margin, 0, inf),
            "distance": one_of("distance", distance, get_args(BatchDistance)),
            "normalize": normalize,
            "smooth": smooth,
            "chunk_size": chunk_rows(chunk_size),
        }
        super().__init__(batch_triplet_loss, settings, name)


@serializable
class InfoNCELoss(_WholeBatch):
    """Each query picks its positive out of all positives of the batch; see `info_nce_loss`.

    The model ends in `keras.ops.stack([query, positive], axis=1)`, (n, 2, d); `model.fit(x)` needs
    no labels. `sample_weight` weighs the queries.

    Args:
        temperature: tau, above 0. To learn it, use `LossLayer`.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        symmetric: the mean of both directions: each positive also picks its query out of all.
        chunk_size: how many queries are compared at a time; changes only memory and time.
        name: the name of the loss.

    Raises:
        ValueError: a shape or setting out of range.

    >>> pairs = [[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]]
    >>> print(f"{float(InfoNCELoss(temperature=0.5)(None, pairs)):.4f}")
    0.1269
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        normalize: bool = True,
        symmetric: bool = False,
        chunk_size: int = 256,
        name: str | None = None,
    ) -> None:
        settings = {
            "temperature": above_zero("temperature", temperature),
            "normalize": normalize,
            "symmetric": symmetric,
            "chunk_size": chunk_rows(chunk_size),
        }
        super().__init__(info_nce_loss, settings, name, ("query", "positive"))


@serializable
class CLIPLoss(_WholeBatch):
    """Match two towers in both directions; see `clip_loss`.

    The model ends in `keras.ops.stack([x, y], axis=1)`, (n, 2, d); `model.fit(x)` needs no labels.
    `sample_weight` weighs the matches.

    Args:
        scale: t = 1 / temperature, above 0. To learn it, use `LossLayer`.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        chunk_size: how many rows are compared at a time; changes only memory and time.
        name: the name of the loss.

    Raises:
        ValueError: a shape or setting out of range.

    >>> pairs = [[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]]
    >>> print(f"{float(CLIPLoss(scale=2.0)(None, pairs)):.4f}")
    0.1269
    """

    def __init__(
        self,
        scale: float,
        *,
        normalize: bool = True,
        chunk_size: int = 256,
        name: str | None = None,
    ) -> None:
        settings = {
            "scale": above_zero("scale", scale),
            "normalize": normalize,
            "chunk_size": chunk_rows(chunk_size),
        }
        super().__init__(clip_loss, settings, name, ("x", "y"))


@serializable
class SigLIPLoss(_WholeBatch):
    """Classify each pair of two towers as a match or not; see `siglip_loss`.

    The model ends in `keras.ops.stack([x, y], axis=1)`, (n, 2, d); `model.fit(x)` needs no labels.
    `sample_weight` weighs the rows of `x`.

    Args:
        scale: t, above 0. To learn it, use `LossLayer`.
        bias: b. To learn it, use `LossLayer`.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        chunk_size: how many rows are compared at a time; changes only memory and time.
        name: the name of the loss.

    Raises:
        ValueError: a shape or setting out of range.

    >>> pairs = [[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]]
    >>> print(f"{float(SigLIPLoss(scale=10.0, bias=-5.0)(None, pairs)):.4f}")
    0.0134
    """

    def __init__(
        self,
        scale: float,
        bias: float,
        *,
        normalize: bool = True,
        chunk_size: int = 256,
        name: str | None = None,
    ) -> None:
        settings = {
            "scale": above_zero("scale", scale),
            "bias": bias,
            "normalize": normalize,
            "chunk_size": chunk_rows(chunk_size),
        }
        super().__init__(siglip_loss, settings, name, ("x", "y"))


def _asked(similar_label: object) -> None:
    """Keras casts bool labels to numbers, so that a number must say what they mean."""
    if isinstance(similar_label, bool) or similar_label not in (0, 1):
        raise ValueError(
            f"similar_label must be 0 or 1, whichever marks similar pairs (1 for bool labels); got "
            f"{similar_label!r}."
        )
