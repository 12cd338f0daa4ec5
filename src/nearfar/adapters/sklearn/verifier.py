# ruff: noqa: N803
"""Whether two items are the same, by a threshold at a false-accept rate."""

from dataclasses import replace
from numbers import Real
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from nearfar.adapters.sklearn.pairs import (
    Bools,
    Floats,
    Integers,
    as_pairs,
    held_out,
    items_of,
    joined,
    labels_of,
)
from nearfar.distance import Distance, between_rows, check_distance
from nearfar.evaluate.probability import PlattProbability, platt_probability
from nearfar.evaluate.threshold import check_far, fit_threshold, warn_of_rate
from nearfar.evaluate.verification import verification
from nearfar.inputs import embeddings


class PairVerifier(ClassifierMixin, BaseEstimator):
    """Says of each pair of items whether they are the same, with few false accepts.

    `fit` trains the embedding on some identities and fits the threshold on others, since a
    threshold fitted on pairs that were trained on accepts too many of new ones. Where `identities`
    are not given, equal rows are one item, and items that similar pairs join are one identity. A
    dissimilar pair between the two sides is left out; there is none where each item is in one pair
    only.

    With a fitted embedding, `PairVerifier(FrozenEstimator(embedding))`, nothing is trained and the
    threshold is fitted on all pairs. They must be of items that the embedding was not trained on.

    Args:
        embedding: a `SiameseEmbedding`; or any transformer or pipeline, which is then fitted on
            the items of the training pairs with their identities as classes.
        far: the false-accept rate at which the threshold is fitted, 0 or more and below 1: the
            share of dissimilar pairs that are taken for similar ones. For a rate of 0.01, several
            hundred dissimilar pairs are needed, besides those of the training.
        distance: between two embeddings: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan",
            or the p of a p-norm.
        calibration_share: the share that is kept out of the training, for the threshold: of the
            pairs, or, where chains of pairs join most identities, of the identities.
        prior: the share of similar pairs among those that the verifier will see. With it there is
            `predict_proba`.
        similar_label: 1 for `y` of numbers, of which 1 means similar. Where 0 does, pass `y == 0`:
            scorers of scikit-learn take 1 for what `predict` calls True.
        random_state: of the split; the embedding has its own.

    Attributes:
        embedding_: the fitted embedding.
        threshold_: the distance up to which two items are taken for the same.
        calibration_pairs_: the pairs, counted from 0, on which the threshold was fitted.
        classes_: False and True.
        n_features_in_: the number of features of an item.

    >>> from nearfar.adapters.sklearn import SiameseEmbedding
    >>> random = np.random.default_rng(0)
    >>> identities = random.integers(40, size=(2000, 2))
    >>> identities[:1000, 1] = identities[:1000, 0]
    >>> centres = random.normal(size=(40, 8))
    >>> X = centres[identities] + 0.3 * random.normal(size=(2000, 2, 8))
    >>> same = identities[:, 0] == identities[:, 1]
    >>> verifier = PairVerifier(SiameseEmbedding(random_state=0), far=0.05, random_state=0)
    >>> verifier = verifier.fit(X, same, identities=identities)
    >>> verifier.predict(X[[0, -1]])
    array([ True, False])
    """

    def __init__(
        self,
        embedding: Any,
        *,
        far: float = 0.01,
        distance: Distance = "euclidean",
        calibration_share: float = 0.3,
        prior: float | None = None,
        similar_label: Literal[1] | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.embedding = embedding
        self.far = far
        self.distance = distance
        self.calibration_share = calibration_share
        self.prior = prior
        self.similar_label = similar_label
        self.random_state = random_state

    def fit(self, X: Any, y: Any, *, identities: Any = None) -> Self:
        """Train the embedding, and fit the threshold on other identities.

        Args:
            X: (n, 2, n_features), the two items of each pair.
            y: (n,) bool, True = similar; or numbers, 1 = similar, with `similar_label=1`.
            identities: (n, 2) the identities of the two items of each pair, equal where they are
                similar. None: only pairs are known, and `embedding` must have `fit_pairs`.

        Raises:
            TypeError: `y` holds numbers without `similar_label`, or identities are partly numbers
                and partly text; or there are no identities, and the embedding learns from classes
                only.
            ValueError: wrong shapes, labels that contradict the identities, an argument out of
                range, `similar_label=0`, or too few pairs.
        """
        check_far(self.far)
        check_distance(self.distance)
        if self.similar_label not in (1, None):
            raise ValueError(
                f"similar_label must be 1 or None, got {self.similar_label!r}. If 0 means similar, "
                "pass y == 0 instead: predict is True where a pair is similar, and the scorers of "
                "scikit-learn take 1 for True, so they would read every label the other way round."
            )
        pairs = as_pairs(X)
        similar = labels_of(y, pairs, self.similar_label)
        known = None if identities is None else _numbered(identities, similar)
        self.n_features_in_ = pairs.shape[2]
        self.classes_ = np.array([False, True])
        if isinstance(self.embedding, FrozenEstimator):
            self.embedding_ = self.embedding
            self.calibration_pairs_ = np.arange(len(pairs))
        else:
            self._train(pairs, similar, known)
        self._calibrate(pairs[self.calibration_pairs_], similar[self.calibration_pairs_])
        return self

    def _train(self, pairs: Floats, similar: Bools, known: Integers | None) -> None:
        """Fit the embedding, and leave pairs of other identities for calibration."""
        share = self.calibration_share
        if not (isinstance(share, Real) and 0 < share < 1):
            raise ValueError(
                f"calibration_share must be a number above 0 and below 1, got {share!r}."
            )
        random = check_random_state(self.random_state)
        if known is None:
            _, index = items_of(pairs)
            identity = joined(int(index.max()) + 1, index[similar])[index]
        else:
            identity = known
        out = held_out(identity, similar, share, random)[identity]
        self.calibration_pairs_ = np.flatnonzero(out.all(1))
        embedding = clone(self.embedding)
        if known is not None:
            self.embedding_ = embedding.fit(*_with_classes(pairs[~out], known[~out]))
        elif hasattr(embedding, "fit_pairs"):
            inside = ~out.any(1)
            self.embedding_ = embedding.fit_pairs(pairs[inside], similar[inside])
        else:
            raise TypeError(
                f"{type(embedding).__name__} learns from classes only: pass identities, of shape "
                "(n, 2), or a fitted embedding, FrozenEstimator(embedding)."
            )

    def _calibrate(self, pairs: Floats, similar: Bools) -> None:
        """Fit the threshold, and the probability if there is a prior for it."""
        distance = self._distance(pairs)
        self.threshold_ = fit_threshold(distance, similar, higher_is_closer=False, far=self.far)
        warn_of_rate(self.far, int((~similar).sum()), stacklevel=3)
        self._calibration = distance, similar
        self._curve: PlattProbability | None = None
        if self.prior is not None:
            self._probability()

    def _probability(self) -> PlattProbability:
        """The curve over the distance, for the prior as it is now.

        It is fitted when it is first needed, since a threshold can be fitted where no curve can.
        """
        assert self.prior is not None
        if self._curve is None:
            self._curve = platt_probability(*self._calibration, higher_is_closer=False)
        return replace(self._curve, prior=self.prior)

    def pair_distance(self, X: Any) -> npt.NDArray[np.float64]:
        """(n,) the distance between the two embeddings of each pair.

        Args:
            X: (n, 2, n_features).
        """
        check_is_fitted(self)
        return self._distance(as_pairs(X))

    def _distance(self, pairs: Floats) -> npt.NDArray[np.float64]:
        x = np.asarray(self.embedding_.transform(pairs.reshape(-1, pairs.shape[2])))
        first, second = embeddings(first=x[::2], second=x[1::2])
        distance: npt.NDArray[np.float64] = (
            between_rows(first, second, self.distance).double().numpy()
        )
        return distance

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """(n,) how much nearer than the threshold each pair is: 0 at the threshold, more is nearer.

        Args:
            X: (n, 2, n_features).
        """
        distance = self.pair_distance(X)
        decision: npt.NDArray[np.float64] = self.threshold_ - distance
        return decision

    def predict(self, X: Any) -> Bools:
        """(n,) bool, True where a pair is taken for similar.

        Args:
            X: (n, 2, n_features).
        """
        accepted: Bools = self.decision_function(X) >= 0
        return accepted

    @available_if(lambda self: self.prior is not None)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """(n, 2) the probabilities of dissimilar and of similar, if a share `prior` is similar.

        A logistic curve over the distance, fitted on the calibration pairs; see
        :func:`nearfar.evaluate.platt_probability`. `predict` goes by the threshold, not by it. The
        prior may be set or changed after the fit, by `set_params`.

        Args:
            X: (n, 2, n_features).
        """
        distance = self.pair_distance(X)
        similar = self._probability()(distance).numpy()
        return np.stack([1 - similar, similar], axis=1)

    def score(self, X: Any, y: Any) -> float:
        """The area under the ROC curve: how often a similar pair is nearer than a dissimilar one.

        It depends on the embedding alone, not on the threshold.

        Args:
            X: (n, 2, n_features).
            y: (n,) as in `fit`.
        """
        similar = labels_of(y, as_pairs(X), self.similar_label)
        return verification(self.pair_distance(X), similar, higher_is_closer=False).auc

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.classifier_tags.multi_class = False
        return tags


def _numbered(identities: Any, similar: Bools) -> Integers:
    """(n, 2) identities from 0 to c - 1.

    Raises:
        TypeError: numbers beside text, or None.
        ValueError: a wrong shape, or labels that contradict them.
    """
    given = np.asarray(identities)
    if given.shape != (len(similar), 2):
        raise ValueError(
            f"identities must have shape ({len(similar)}, 2), the two identities of each pair; got "
            f"{given.shape}."
        )
    wrong = np.flatnonzero((given[:, 0] == given[:, 1]) != similar)
    if len(wrong):
        first = wrong[0]
        kind = "similar" if similar[first] else "dissimilar"
        raise ValueError(
            f"identities must be equal where pairs are similar, and differ where not; pair {first} "
            f"is {kind} and of {given[first].tolist()} ({len(wrong)} of {len(given)} are wrong)."
        )
    try:
        numbered: Integers = np.unique(given, return_inverse=True)[1].reshape(-1, 2)
    except TypeError as error:
        kinds = ", ".join(sorted({type(one).__name__ for one in given.ravel()}))
        raise TypeError(
            f"identities must be all numbers or all text, got {kinds}: make them of one kind."
        ) from error
    return numbered


def _with_classes(rows: Floats, identity: Integers) -> tuple[Floats, Integers]:
    """Items and their classes, each item once however many pairs it is in."""
    labelled = np.column_stack([rows, identity])
    _, first = np.unique(labelled, axis=0, return_index=True)
    return rows[first], identity[first]
