"""Losses over every triplet or quadruplet of a batch, or over the hardest of them."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.distance import Distance, check_distance
from nearfar.engine.closeness import by_distance
from nearfar.engine.listed import Picker, Tally, TupleRule, listed
from nearfar.engine.pick import by_distance_weight, hardest, semihard
from nearfar.engine.step import run
from nearfar.inputs import ArrayLike, between
from nearfar.losses.batch import as_batch, one_of
from nearfar.losses.every_quadruplet import every_quadruplet, hardest_quadruplets
from nearfar.losses.every_triplet import every_triplet
from nearfar.reduction import Reduction
from nearfar.reference import Reference

Triplets = Literal["all", "hard", "semihard", "easy_positive", "distance_weighted"]
Quadruplets = Literal["all", "hard"]
TripletReduction = Literal["mean", "active", "sum", "none"]

# Wu et al. 2017: below the first, weights no longer grow; from the second on, losses are 0.
CUTOFF, NONZERO_LOSS_CUTOFF = 0.5, 1.4


@dataclass(frozen=True)
class TripletStats:
    """The number of triplets of a loss.

    Attributes:
        valid: how many there are, or were selected.
        active: how many of them have a non-zero loss.
    """

    valid: int
    active: int


@dataclass(frozen=True)
class QuadrupletStats:
    """The number of quadruplets of a loss.

    Attributes:
        valid: how many there are, or were selected.
        active: how many have a non-zero first term.
        active2: how many have a non-zero second term.
    """

    valid: int
    active: int
    active2: int


def batch_triplet_loss(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    select: Triplets = "all",
    smooth: bool = False,
    swap: bool = False,
    generator: torch.Generator | None = None,
    reference: Reference | None = None,
    reduction: TripletReduction = "mean",
) -> Tensor:
    r"""The triplet loss over every triplet of the batch, or over those that `select` picks.

    With :math:`P(i)` the positives and :math:`N(i)` the negatives of anchor i, and
    :math:`\ell_{ipn} = \max(0,\, d_{ip} - d_{in} + m)` (see `triplet_loss`), "all" is

    .. math:: L = \frac{1}{\sum_i |P(i)|\,|N(i)|}
                \sum_i \sum_{p \in P(i)} \sum_{n \in N(i)} \ell_{ipn}

    exactly, without listing any triplet: time grows with :math:`n^2`, memory with n. The other
    choices are

    - "hard": for each anchor its farthest positive and its nearest negative (Hermans et al. 2017,
      batch hard);
    - "easy_positive": for each anchor its nearest positive and its nearest negative (Xuan et al.
      2020);
    - "semihard": for each anchor and positive the nearest negative that is farther than the
      positive, :math:`\arg\min_n \{d_{in} : d_{in} > d_{ip}\}`; if there is none, the farthest
      negative of the anchor (Schroff et al. 2015, with the fallback of TensorFlow's
      implementation);
    - "distance_weighted": for each anchor and positive a negative drawn with weight
      :math:`1 / q(d)`, where q is the density of the distances between random unit vectors; d is
      the Euclidean distance of the rows scaled to length 1, raised to 0.5 where it is smaller, and
      negatives at 1.4 or more are not drawn unless there are no others (Wu et al. 2017).

    The gradient treats the selection as constant.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        margin: how much farther a negative must be than a positive, 0 or more.
        distance: "euclidean", "sqeuclidean" (Schroff et al.) or "cosine".
        select: "all" triplets, or how to pick some: "hard", "easy_positive", "semihard" or
            "distance_weighted".
        smooth: softplus in place of the hinge; with margin 0, the soft margin of Hermans et al.
            With "all", time then grows with :math:`n^2` times the number of positives per row.
        swap: measure the negative from anchor or positive, whichever is nearer to it; not for
            "all".
        generator: draws for "distance_weighted"; None: torch's own. Each call draws once.
        reference: rows to take positives and negatives from instead of the batch.
        reduction: "mean" over the triplets: all, or those selected (one per anchor for "hard" and
            "easy_positive", one per anchor and positive for "semihard" and "distance_weighted");
            "active" for the mean over those with a non-zero loss; "sum", or "none" for (n,) sums,
            one per anchor over its triplets.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider; 0 if there is no triplet.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [1.5, 0], [0, 4]])
    >>> labels = [0, 0, 1, 1]
    >>> batch_triplet_loss(x, labels)
    tensor(1.4353)
    >>> batch_triplet_loss(x, labels, reduction="active")
    tensor(1.9137)
    >>> batch_triplet_loss(x, labels, select="hard", reduction="none")
    tensor([0.5000, 0.1972, 3.7720, 2.2720])
    >>> batch_triplet_loss(x, labels, select="semihard", reduction="none")
    tensor([0.5000, 0.1972, 3.4692, 1.2720])

    Source: Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    2017; Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015; Xuan, Stylianou & Pless, "Improved
    Embeddings with Easy Positive Triplet Mining", WACV 2020; Wu, Manmatha, Smola & Krähenbühl,
    "Sampling Matters in Deep Embedding Learning", ICCV 2017.
    """
    return _over_triplets(
        x, labels, margin, distance, select, smooth, swap, generator, reference, reduction, Tally()
    )


def _over_triplets(
    x: ArrayLike,
    labels: ArrayLike,
    margin: float,
    distance: Distance,
    select: Triplets,
    smooth: bool,
    swap: bool,
    generator: torch.Generator | None,
    reference: Reference | None,
    reduction: TripletReduction,
    tally: Tally,
) -> Tensor:
    """See `batch_triplet_loss`; `tally` counts the triplets."""
    if isinstance(margin, str) and margin == "soft":
        raise ValueError("margin must be a number: the soft margin is smooth=True, margin=0.0.")
    between("margin", margin, 0, inf, ", a difference of distances")
    distance = check_distance(distance)
    one_of("select", select, Triplets)
    one_of("reduction", reduction, TripletReduction)
    rows, columns, relation = as_batch(x, labels, reference, reduction)
    of_active = reduction == "active"
    if select == "all":
        if swap:
            others = ", ".join(repr(s) for s in get_args(Triplets) if s != "all")
            raise ValueError(
                "swap=True needs the distances between an anchor's positives and negatives, which "
                f'select="all" never computes; use one of {others}.'
            )
        closeness = by_distance(distance)
        executor = every_triplet(closeness, relation, margin, smooth, of_active, tally)
    else:
        pickers: dict[str, Callable[[], Picker]] = {
            "hard": lambda: hardest(distance, relation),
            "easy_positive": lambda: hardest(distance, relation, easy_positive=True),
            "semihard": lambda: semihard(distance, relation),
            "distance_weighted": lambda: by_distance_weight(
                relation, seed(generator), CUTOFF, NONZERO_LOSS_CUTOFF
            ),
        }
        rule = _triplet_rule(margin, smooth, swap)
        pick = pickers[select]()
        executor = listed(rule, pick, distance, relation, tally, mean_of_active=of_active)
    over: Reduction = "mean" if reduction == "active" else reduction
    return run(executor, rows, columns, normalize=distance == "cosine", reduction=over)


def triplet_stats(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    select: Triplets = "all",
    swap: bool = False,
    generator: torch.Generator | None = None,
    reference: Reference | None = None,
) -> TripletStats:
    r"""How many triplets `batch_triplet_loss` has, and how many of them have a non-zero loss.

    A triplet of anchor i, positive p and negative n is active where

    .. math:: d_{ip} - d_{in} + m > 0

    The network learns only from active triplets. Their share falls as it learns; once it is nearly
    0, there is nothing left to learn from such batches at this margin. No gradient is computed. The
    arguments are those of the loss, except `smooth`, with which every triplet is active.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
        margin: how much farther a negative must be than a positive, 0 or more.
        distance: "euclidean", "sqeuclidean" or "cosine".
        select: "all" triplets, or those selected by "hard", "easy_positive", "semihard" or
            "distance_weighted"; see `batch_triplet_loss`.
        swap: measure the negative from anchor or positive, whichever is nearer to it; not for
            "all".
        generator: draws for "distance_weighted"; None: torch's own. Each call draws once.
        reference: rows to take positives and negatives from instead of the batch.

    Returns:
        `TripletStats`.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [1.5, 0], [0, 4]])
    >>> triplet_stats(x, [0, 0, 1, 1])
    TripletStats(valid=8, active=6)
    >>> triplet_stats(x, [0, 0, 1, 1], select="hard", margin=0.2)
    TripletStats(valid=4, active=2)
    """
    tally = Tally()
    with torch.no_grad():
        _over_triplets(
            x, labels, margin, distance, select, False, swap, generator, reference, "sum", tally
        )
    return TripletStats(int(tally.valid), int(tally.active))


def batch_quadruplet_loss(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: Distance = "euclidean",
    select: Quadruplets = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The quadruplet loss over every quadruplet of the batch, or over the hardest of each anchor.

    A quadruplet (i, j, k, l) is an anchor i, another row j of its class, a row k of a second class
    and a row l of a third (:math:`l` of neither the class of i nor that of k). "all" is the mean
    over all of them of

    .. math:: \ell_{ijkl} = \max(0,\, d_{ij} - d_{ik} + m_1) + \max(0,\, d_{ij} - d_{kl} + m_2)

    exactly, without listing any. The roughly :math:`n^3 p` quadruplets, with p positives per row,
    take :math:`O(n^2 \log n)` time, and memory that grows with n and the number of positive pairs.

    "hard" takes one per anchor: its farthest positive j, its nearest negative k, and in the second
    term the closest pair (k', l') of two different classes that are not the anchor's.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids. Multi-labels have no "different classes".
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean" or "cosine".
        select: "all" or "hard".
        reduction: "mean" over the quadruplets ("hard": over the anchors that have one), "sum", or
            "none" for (n,) sums, one per anchor over its quadruplets.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider; 0 if there is no quadruplet.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [1.5, 0], [0, 2.5]])
    >>> batch_quadruplet_loss(x, [0, 0, 1, 2])
    tensor(0.2993)
    >>> batch_quadruplet_loss(x, [0, 0, 1, 2], select="hard", reduction="none")
    tensor([0.5000, 0.5000, 0.0000, 0.0000])

    Source: Chen, Chen, Zhang & Huang, "Beyond triplet loss: a deep quadruplet network for person
    re-identification", CVPR 2017, over all quadruplets of the batch.
    """
    return _over_quadruplets(
        x, labels, margin, margin2, distance, select, reduction, Tally(), Tally()
    )


def _over_quadruplets(
    x: ArrayLike,
    labels: ArrayLike,
    margin: float,
    margin2: float,
    distance: Distance,
    select: Quadruplets,
    reduction: Reduction,
    first: Tally,
    second: Tally,
) -> Tensor:
    """See `batch_quadruplet_loss`; `first` and `second` count the quadruplets of each term."""
    between("margin", margin, 0, inf, ", a difference of distances")
    between("margin2", margin2, 0, inf, ", a difference of distances")
    distance = check_distance(distance)
    one_of("select", select, Quadruplets)
    rows, _, relation = as_batch(x, labels, None, reduction)
    classes = relation.row_labels
    assert classes is not None
    if classes.ndim == 2:
        raise ValueError(
            f"labels must be class ids of shape (n,), got multi-labels {tuple(classes.shape)}: a "
            "quadruplet needs rows of three different classes, and multi-labels do not divide rows "
            "into classes. batch_triplet_loss takes multi-labels."
        )
    if select == "all":
        executor = every_quadruplet(classes, relation, distance, margin, margin2, first, second)
    else:
        pick = hardest_quadruplets(classes, relation, distance)
        executor = listed(
            _quadruplet_rule(margin, margin2, first, second), pick, distance, relation, Tally()
        )
    return run(executor, rows, None, normalize=distance == "cosine", reduction=reduction)


def quadruplet_stats(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: Distance = "euclidean",
    select: Quadruplets = "all",
) -> QuadrupletStats:
    r"""How many quadruplets `batch_quadruplet_loss` has, and how many have a non-zero loss.

    The terms of a quadruplet (i, j, k, l) are active where

    .. math:: d_{ij} - d_{ik} + m_1 > 0, \qquad d_{ij} - d_{kl} + m_2 > 0

    No gradient is computed.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids. Multi-labels have no "different classes".
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean" or "cosine".
        select: "all" quadruplets, or the "hard" one of each anchor.

    Returns:
        `QuadrupletStats`.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [1.5, 0], [0, 2.5]])
    >>> quadruplet_stats(x, [0, 0, 1, 2])
    QuadrupletStats(valid=4, active=3, active2=0)
    """
    first, second = Tally(), Tally()
    with torch.no_grad():
        _over_quadruplets(x, labels, margin, margin2, distance, select, "sum", first, second)
    return QuadrupletStats(int(first.valid), int(first.active), int(second.active))


def seed(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator, for one whose draws can be repeated."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}. For a seed pass "
            "torch.Generator().manual_seed(seed)."
        )
    device = None if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _triplet_rule(margin: float, smooth: bool, swap: bool) -> TupleRule:
    """The aligned triplet loss; see `triplet_loss`."""

    def loss(near: Tensor, *negatives: Tensor) -> Tensor:
        far = torch.minimum(*negatives) if swap else negatives[0]
        violation = near - far + margin
        return -logsigmoid(-violation) if smooth else violation.relu()

    return TupleRule(((0, 1), (0, 2), (1, 2)) if swap else ((0, 1), (0, 2)), loss)


def _quadruplet_rule(margin: float, margin2: float, one: Tally, two: Tally) -> TupleRule:
    """The aligned quadruplet loss on anchor, positive, negative, and a pair of other classes."""

    def loss(near: Tensor, far: Tensor, apart: Tensor) -> Tensor:
        first, second = (near - far + margin).relu(), (near - apart + margin2).relu()
        one.add(len(near), (first > 0).sum())
        two.add(len(near), (second > 0).sum())
        return first + second

    return TupleRule(((0, 1), (0, 2), (3, 4)), loss)
