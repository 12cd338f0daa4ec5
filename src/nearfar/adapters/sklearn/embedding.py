# ruff: noqa: N803, N806
"""A network that learns an embedding from class labels or pairs, as a transformer of sklearn."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from math import inf
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from nearfar.adapters.sklearn.pairs import (
    DTYPES,
    Bools,
    Integers,
    as_pairs,
    items_of,
    labels_of,
)
from nearfar.adapters.sklearn.training import (
    OfClasses,
    OfPairs,
    Unit,
    loss_of,
    network_of,
    seeded,
    train,
)
from nearfar.inputs import between, positive_integer, positive_number, switch, tensor
from nearfar.labels import SimilarLabel
from nearfar.losses.base import LossModule, ProxyLossModule
from nearfar.registry import find

ROWS_AT_ONCE = 4096  # are encoded, so that the layers of a large table need not fit in memory


class SiameseEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A small network that puts items of one class near each other, and others far apart.

    It is trained on class labels with any of nearfar's losses, and then embeds any items, those of
    classes it has never seen too. Linear layers with a ReLU between each two are trained by AdamW,
    whose learning rate falls to 0 as a cosine, on batches of P classes x K items. Scale the
    features first, as by `StandardScaler`.

    The network is trained and used in the dtype of the `X` it is fitted on, float64 or float32.
    With an integer `random_state`, two fits on one machine are equal; torch's own random numbers
    are left as they were.

    Args:
        loss: the name of a loss of a whole batch or of proxies, such as "sup_con", "batch_triplet"
            or "proxy_softmax"; or a module that is called as `loss(embeddings, class_ids)`, of
            which a copy is trained.
        margin: of a loss by name; None: its default.
        temperature: of a loss by name; None: its default.
        scale: of a loss by name; None: its default.
        embedding_dim: the length of an embedding.
        hidden: the widths of the hidden layers.
        encoder: a module from (n, n_features) to (n, d), in place of the layers of `hidden` and
            `embedding_dim`; a copy of it is trained, from the weights that it has.
        normalize: scale embeddings to length 1, so that Euclidean distances and cosines rank pairs
            alike.
        epochs: how often each item is seen; those of small classes may be seen more often.
        learning_rate: the first one, of AdamW.
        weight_decay: of AdamW.
        classes_per_batch: P, at least 2; all classes if there are fewer.
        items_per_class: K, the items of a class in a batch; fewer where the class has fewer. At
            least 2, unless the loss has proxies.
        device: where it is trained and used. Between calls the network is on the CPU, so a pickle
            needs no accelerator.
        random_state: of the weights and the batches.

    Attributes:
        encoder_: the trained network, on the CPU.
        loss_curve_: the mean loss of each epoch.
        n_features_in_: the number of features.
        feature_names_in_: their names, if they have some.

    >>> from sklearn.datasets import load_wine
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_wine(return_X_y=True)
    >>> embedding = SiameseEmbedding(embedding_dim=2, epochs=50, random_state=0)
    >>> model = make_pipeline(StandardScaler(), embedding, KNeighborsClassifier())
    >>> round(model.fit(X[::2], y[::2]).score(X[1::2], y[1::2]), 2)
    0.98
    >>> model[:-1].transform(X).shape
    (178, 2)
    """

    def __init__(
        self,
        loss: str | nn.Module = "sup_con",
        *,
        margin: float | None = None,
        temperature: float | None = None,
        scale: float | None = None,
        embedding_dim: int = 32,
        hidden: Sequence[int] = (128,),
        encoder: nn.Module | None = None,
        normalize: bool = True,
        epochs: int = 20,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        classes_per_batch: int = 16,
        items_per_class: int = 4,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.loss = loss
        self.margin = margin
        self.temperature = temperature
        self.scale = scale
        self.embedding_dim = embedding_dim
        self.hidden = hidden
        self.encoder = encoder
        self.normalize = normalize
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.classes_per_batch = classes_per_batch
        self.items_per_class = items_per_class
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train on items and their classes.

        Args:
            X: (n, n_features).
            y: (n,) class labels of any kind.

        Raises:
            TypeError: `X` is sparse, or the loss has no such setting.
            ValueError: fewer than two classes, no class with two items in a batch where the loss
                has no proxies, an argument out of range, or a training that diverged.
        """
        X, y = validate_data(self, X, y, dtype=DTYPES, ensure_min_samples=2)
        # check_classification_targets would warn of many classes, which is what this is for.
        if (kind := type_of_target(y, input_name="y")) not in ("binary", "multiclass"):
            raise ValueError(
                f"Unknown label type: {kind}. y must hold a class label for each item."
            )
        _, ids, sizes = np.unique(y, return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError("y must hold at least 2 classes to tell apart; got one class.")
        classes = positive_integer("classes_per_batch", self.classes_per_batch)
        if classes < 2:
            raise ValueError("classes_per_batch must be at least 2, to tell apart; got 1.")

        items = positive_integer("items_per_class", self.items_per_class)

        def batches(loss: nn.Module, seed: int) -> OfClasses:
            if not isinstance(loss, ProxyLossModule):
                _refuse_single(int(sizes.max()), items)
            labels = torch.from_numpy(ids).to(self.device)
            return OfClasses(labels, classes, items, seed)

        return self._train(X, len(sizes), batches)

    def fit_pairs(self, X: Any, y: Any, *, similar_label: SimilarLabel = None) -> Self:
        """Train on pairs of which only is known whether they are similar.

        Nothing is assumed of pairs that are not listed. Equal rows are one item. Batches hold
        P * K / 2 pairs, those of one item together. `loss` must take listed pairs:
        "batch_contrastive" and "batch_cosine" learn from each pair by itself, the others from items
        that are in both similar and dissimilar pairs. A warning tells where most pairs have no such
        item.

        Args:
            X: (n, 2, n_features), the two items of each pair.
            y: (n,) bool, True = similar; or numbers 0 and 1.
            similar_label: which number means similar.

        Raises:
            TypeError: `y` holds numbers without `similar_label`.
            ValueError: wrong shapes, or a loss that cannot learn from these pairs.

        >>> items = np.array([[0.0, 0, 1], [0, 0, 2], [5, 0, 1], [5, 0, 2], [0, 5, 0]])
        >>> pairs = items[[[0, 1], [2, 3], [0, 2], [1, 4], [3, 4]]]
        >>> similar = [True, True, False, False, False]
        >>> embedding = SiameseEmbedding(
        ...     "batch_contrastive", embedding_dim=2, epochs=100, learning_rate=0.01, random_state=0
        ... )
        >>> x = embedding.fit_pairs(pairs, similar).transform(items)
        >>> np.linalg.norm(x[[0, 2, 0]] - x[[1, 3, 2]], axis=1).round(1)
        array([0., 0., 1.])
        """
        X = as_pairs(X)
        similar = labels_of(y, X, similar_label)
        items, index = items_of(X)
        items = validate_data(self, items, dtype=DTYPES, ensure_min_samples=2)
        # Two equal rows are embedded alike, whatever is learned.
        differ = index[:, 0] != index[:, 1]
        if not differ.any():
            raise ValueError("X must hold pairs of two different items; all are of equal rows.")
        index, similar = index[differ], similar[differ]
        items_in_batch = positive_integer(
            "classes_per_batch", self.classes_per_batch
        ) * positive_integer("items_per_class", self.items_per_class)
        size = max(items_in_batch // 2, 1)

        def batches(loss: nn.Module, seed: int) -> OfPairs:
            _refuse_unsuitable(loss, index, similar, size)
            return OfPairs(index, similar, size, seed)

        return self._train(items, None, batches)

    def transform(self, X: Any) -> npt.NDArray[np.floating[Any]]:
        """(n, embedding_dim) the embeddings of items.

        Args:
            X: (n, n_features).
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=DTYPES)
        device = torch.device(self.device)
        # A copy elsewhere, since another thread may be using the network.
        encoder = self.encoder_ if device.type == "cpu" else deepcopy(self.encoder_).to(device)
        dtype = next(encoder.parameters()).dtype
        with torch.inference_mode():
            parts = [
                encoder(tensor("X", X[rows]).to(dtype).to(device)).cpu()
                for rows in gen_batches(len(X), ROWS_AT_ONCE)
            ]
        found: npt.NDArray[np.floating[Any]] = torch.cat(parts).numpy()
        return found

    def _train(
        self,
        X: npt.NDArray[np.floating[Any]],
        n_classes: int | None,
        batches_for: Callable[[nn.Module, int], OfClasses | OfPairs],
    ) -> Self:
        """Train on items, by the batches for a loss and a seed."""
        device = torch.device(self.device)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
            x = tensor("X", X, device=device)
            encoder = self._new_encoder(x)
            dim = _width(encoder, x[:2])
            loss = loss_of(self.loss, self._settings(), n_classes, dim).to(device, x.dtype)
            self.loss_curve_ = train(
                encoder,
                loss,
                x,
                batches_for(loss, seed),
                epochs=positive_integer("epochs", self.epochs),
                learning_rate=positive_number("learning_rate", self.learning_rate),
                weight_decay=between("weight_decay", self.weight_decay, 0, inf),
            )
        self.encoder_ = encoder.cpu()
        self._n_features_out = dim
        return self

    def _new_encoder(self, x: Tensor) -> nn.Module:
        if self.encoder is None:
            encoder = network_of(x.shape[1], self.hidden, self.embedding_dim)
        else:
            encoder = deepcopy(self.encoder)
            if not any(each.requires_grad for each in encoder.parameters()):
                raise ValueError(
                    "encoder must have parameters to train, and "
                    f"{type(encoder).__name__} has none that require a gradient."
                )
        if switch("normalize", self.normalize):
            encoder = nn.Sequential(encoder, Unit())
        return encoder.to(x.device, x.dtype)

    def _settings(self) -> Mapping[str, float]:
        """What the caller has set of the loss."""
        given = {"margin": self.margin, "temperature": self.temperature, "scale": self.scale}
        return {name: value for name, value in given.items() if value is not None}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _width(encoder: nn.Module, x: Tensor) -> int:
    """The length of an embedding, found by embedding some rows."""
    with torch.no_grad():
        shape = tuple(encoder.eval()(x).shape)
    if len(shape) != 2 or shape[0] != len(x):
        raise ValueError(
            f"encoder must turn {tuple(x.shape)} into ({len(x)}, d), one embedding a row; got "
            f"{shape}."
        )
    return int(shape[1])


def _refuse_single(largest: int, items: int) -> None:
    """Refuse batches in which no two items are of one class."""
    why = "The items of a class are pulled together; only nearfar's losses of proxies need no two."
    if largest < 2:
        raise ValueError(f"y must hold a class with at least 2 items. {why}")
    if items < 2:
        raise ValueError(f"items_per_class must be at least 2, got {items}. {why}")


def _refuse_unsuitable(loss: nn.Module, index: Integers, similar: Bools, size: int) -> None:
    """Refuse a loss that would learn nothing from batches of these pairs; warn if it is little."""
    name = type(loss).__name__
    if "pairs" not in inspect.signature(loss.forward).parameters:
        raise ValueError(f"loss must take listed pairs, and {name} does not.")
    listed = find(loss.loss.__name__) if isinstance(loss, LossModule) else None
    if listed is None or listed.pair_margin is not None:
        return
    both = np.intersect1d(index[similar], index[~similar])
    used = int(np.isin(index, both).any(1).sum())
    what = f"{name} compares the similar pairs of an item with its dissimilar ones, and"
    fix = "Use loss='batch_contrastive' or 'batch_cosine', which learn from each pair by itself."
    if not used:
        raise ValueError(f"{what} no item has both. {fix}")
    if size < 2:
        raise ValueError(f"{what} a batch would have one pair. Raise items_per_class.")
    if 2 * used < len(index):
        warnings.warn(
            f"{what} only {used} of {len(index)} pairs have an item with both: it learns nothing "
            f"from the others. {fix}",
            UserWarning,
            stacklevel=5,  # who called fit_pairs
        )
