"""How well a score tells same from different, and where to put the threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Verification:
    """Figures of a score over labelled pairs, without a threshold.

    Attributes:
        n_similar: similar pairs.
        n_dissimilar: dissimilar pairs.
        auc: area under the ROC curve: how often a similar pair is closer than a dissimilar one.
        eer: equal error rate, where the false-accept and the false-reject rate meet.
        tar_at_far: false-accept rate -> the true-accept rate it allows.
    """

    n_similar: int
    n_dissimilar: int
    auc: float
    eer: float
    tar_at_far: dict[float, float]


@dataclass(frozen=True)
class AtThreshold:
    """Figures of the decisions at one threshold.

    Attributes:
        threshold: a pair whose score is as close as this, or closer, is called the same.
        far: false-accept rate, the share of the dissimilar pairs that are called the same.
        tar: true-accept rate, the share of the similar pairs that are called the same.
        accuracy: the mean of `tar` and 1 - `far`: right decisions were both kinds equally many.
    """

    threshold: float
    far: float
    tar: float
    accuracy: float


def verification(
    scores: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool,
    far: Sequence[float] = (0.1, 0.01),
) -> Verification:
    """AUC, EER and TAR at each FAR.

    Args:
        scores: (n,) distances or similarities.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        far: the false-accept rates to give a true-accept rate for. The rate given is that of the
            loosest threshold on these pairs whose false-accept rate is not above it; nothing is
            interpolated, and pairs of equal score are accepted or rejected together.

    Raises:
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes.

    >>> verification([0.1, 0.4, 0.3, 0.9], [True, True, False, False], higher_is_closer=False)
    Verification(n_similar=2, n_dissimilar=2, auc=0.75, eer=0.5, tar_at_far={0.1: 0.5, 0.01: 0.5})
    """
    closeness, same = _checked(scores, similar, higher_is_closer)
    false_accept, true_accept, _ = roc_curve(same, closeness, drop_intermediate=False)
    return Verification(
        n_similar=int(same.sum()),
        n_dissimilar=int((~same).sum()),
        auc=float(roc_auc_score(same, closeness)),
        eer=_equal_error_rate(false_accept, true_accept),
        tar_at_far={f: float(true_accept[false_accept <= f + 1e-12].max()) for f in far},
    )


def fit_threshold(
    scores: ArrayLike, similar: ArrayLike, *, higher_is_closer: bool, far: float
) -> float:
    """The loosest threshold whose false-accept rate on these pairs is at most `far`.

    A pair is called the same where its score is at least as close as the threshold. Of n
    dissimilar pairs floor(far * n) may be accepted, so the threshold lies just short of the next
    one: the closest number to it that float64 has on the stricter side. Dissimilar pairs of equal
    score are accepted or rejected together, so that ties never push the rate above `far`.

    Args:
        scores: (n,) distances or similarities.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances.
        far: the false-accept rate, from 0 up to but not including 1.

    Raises:
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes.

    >>> d, same = [0.1, 0.2, 0.5, 0.6, 0.7], [True, True, False, False, False]
    >>> round(fit_threshold(d, same, higher_is_closer=False, far=0.0), 6)
    0.5
    >>> round(fit_threshold(d, same, higher_is_closer=False, far=0.34), 6)
    0.6
    """
    if not 0 <= far < 1:
        raise ValueError(f"far must be a rate from 0 to below 1, got {far!r}.")
    closeness, same = _checked(scores, similar, higher_is_closer)
    dissimilar = np.sort(closeness[~same])[::-1]
    allowed = int(far * len(dissimilar) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    threshold = float(np.nextafter(dissimilar[allowed], np.inf))
    return threshold if higher_is_closer else -threshold


def at_threshold(
    scores: ArrayLike, similar: ArrayLike, threshold: float, *, higher_is_closer: bool
) -> AtThreshold:
    """What a threshold does on these pairs.

    >>> at_threshold([0.1, 0.4, 0.3, 0.9], [True, True, False, False], 0.35, higher_is_closer=False)
    AtThreshold(threshold=0.35, far=0.5, tar=0.5, accuracy=0.5)
    """
    closeness, same = _checked(scores, similar, higher_is_closer)
    accepted = closeness >= (threshold if higher_is_closer else -threshold)
    far, tar = float(accepted[~same].mean()), float(accepted[same].mean())
    return AtThreshold(threshold, far, tar, (tar + 1 - far) / 2)


def sample_pairs(identity: ArrayLike, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n pairs of items by seed, half of them similar, all distinct.

    Where there are fewer than n / 2 similar (or dissimilar) pairs, all there are.

    Args:
        identity: (m,) int64, which identity each item shows.
        n: how many pairs.
        seed: of the choice.

    Returns:
        a, b: (p,) int64, the rows of each pair, a != b. similar: (p,) bool.

    >>> a, b, similar = sample_pairs([0, 0, 1, 1], 4, seed=0)
    >>> similar
    tensor([ True,  True, False, False])
    >>> a[:2], b[:2]
    (tensor([0, 2]), tensor([1, 3]))
    """
    labels = tensor("identity", identity).numpy()
    random = np.random.default_rng([seed, 2])
    near = _similar_pairs(labels, n // 2, random)
    far = _dissimilar_pairs(labels, n // 2, random)
    a, b = torch.from_numpy(np.concatenate([near, far])).unbind(1)
    return a, b, torch.arange(len(a)) < len(near)


def _similar_pairs(
    labels: npt.NDArray[Any], n: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(min(n, all), 2). The pairs of all identities are numbered, then numbers are drawn."""
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ends = np.cumsum(counts * (counts - 1) // 2)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.sort(random.choice(total, size=min(n, total), replace=False))
    which = np.searchsorted(ends, numbers, side="right")
    within = numbers - (ends - counts * (counts - 1) // 2)[which]
    # Pair number k of an identity is (i, j), i < j, with k = j (j - 1) / 2 + i.
    j = ((1 + np.sqrt(1 + 8 * within)) // 2).astype(np.int64)
    j -= j * (j - 1) // 2 > within  # the square root of a large number may round up
    i = within - j * (j - 1) // 2
    pairs: npt.NDArray[np.int64] = order[np.stack([first[which] + i, first[which] + j], 1)]
    return pairs


def _dissimilar_pairs(
    labels: npt.NDArray[Any], n: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(min(n, all), 2), by drawing pairs until enough distinct ones are dissimilar."""
    m = len(labels)
    _, counts = np.unique(labels, return_counts=True)
    total = int(m * (m - 1) // 2 - (counts * (counts - 1) // 2).sum())
    if total <= 4 * n:
        a, b = np.triu_indices(m, k=1)
        numbers = np.flatnonzero(labels[a] != labels[b])
        chosen = np.sort(random.choice(numbers, size=min(n, total), replace=False))
        return np.stack([a[chosen], b[chosen]], 1).astype(np.int64)
    found = np.zeros((0, 2), dtype=np.int64)
    while len(found) < n:
        drawn = np.sort(random.integers(0, m, size=(2 * n, 2)), axis=1)
        drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]
        found = np.concatenate([found, drawn])
        _, earliest = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(earliest)]
    return found[:n]


def _equal_error_rate(false_accept: Floats, true_accept: Floats) -> float:
    """Where the ROC curve, straight between its points, has as many false accepts as rejects."""
    gap = false_accept - (1 - true_accept)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = max(after - 1, 0)
    rise = gap[after] - gap[before]
    share = -gap[before] / rise if rise > 0 else 0.0
    return float(false_accept[before] + share * (false_accept[after] - false_accept[before]))


def _checked(scores: ArrayLike, similar: ArrayLike, higher_is_closer: bool) -> tuple[Floats, Bools]:
    """Closeness, higher = closer, and labels."""
    # A list goes to float64 directly: by way of float32, 0.3 would lie above a threshold of 0.3.
    given = scores if isinstance(scores, Tensor) else np.asarray(scores)
    values = tensor("scores", given).detach().double().cpu().numpy()
    same = tensor("similar", similar).numpy()
    if same.dtype != bool:
        raise TypeError(f"similar must be bool, True = similar; got {same.dtype}.")
    if values.ndim != 1 or same.shape != values.shape:
        raise ValueError(
            f"scores and similar must have one shape (n,), got {values.shape} and {same.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores[{int((~np.isfinite(values)).argmax())}] is not finite.")
    if same.all() or not same.any():
        raise ValueError("similar must hold both True and False; rates need pairs of both kinds.")
    return (values if higher_is_closer else -values), same
