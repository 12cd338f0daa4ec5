"""Losses over every triplet or quadruplet of a batch, or over the hardest of them."""

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nearfar.distance import Distance, check_distance
from nearfar.engine import gpu
from nearfar.engine.closeness import by_distance
from nearfar.engine.listed_tuples import Picker, Tally, TupleRule, given, listed
from nearfar.engine.meeting import Group, group_totals, of_first, over_processes
from nearfar.engine.observe import force_visitors
from nearfar.engine.pick import (
    at_random,
    by_distance_weight,
    check_cutoffs,
    check_generator,
    every,
    hardest,
    seed,
    semihard,
)
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Executor, Maker, Request, run
from nearfar.inputs import ArrayLike, between, lift, one_of, positive_integer, switch, tensor
from nearfar.labels import refuse
from nearfar.listed import listed_triplets
from nearfar.losses.batch import as_batch, row_weight
from nearfar.losses.every_quadruplet import (
    Classes,
    Terms,
    every_quadruplet,
    hardest_quadruplets,
)
from nearfar.losses.every_swapped import every_swapped
from nearfar.losses.every_triplet import every_triplet
from nearfar.losses.listed import as_listed_triplets
from nearfar.reduction import Reduction, split
from nearfar.reference import ReferenceLike

Triplets = Literal["all", "hard", "semihard", "easy_positive", "distance_weighted"]
Quadruplets = Literal["all", "hard"]


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


@over_processes
def batch_triplet_loss(
    x: ArrayLike,
    labels: ArrayLike | None,
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
    triplets: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The triplet loss over every triplet of the batch, or over those that `select` picks.

    With :math:`P(i)` the positives and :math:`N(i)` the negatives of anchor i, and
    :math:`\ell_{ipn} = \max(0,\, d_{ip} - d_{in} + m)` (see `triplet_loss`), "all" is

    .. math:: L = \frac{1}{\sum_i |P(i)|\,|N(i)|}
                \sum_i \sum_{p \in P(i)} \sum_{n \in N(i)} \ell_{ipn}

    exactly, without listing any triplet: time grows with :math:`n^2`, memory with n. `n_per_anchor`
    draws that many of them for each anchor, and `triplets` lists those that count. The other
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
      the Euclidean distance of the rows scaled to length 1, raised to `cutoff` where it is smaller,
      and negatives at `nonzero_loss_cutoff` or more are not drawn unless there are no others (Wu
      et al. 2017).

    The gradient treats the selection as constant.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            With `triplets` they may be None; if given, they must agree with them.
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
        triplets: (t, 3) integers, the anchor in the batch, and a positive and a negative in the
            batch or the reference, as from `mine.semihard_triplets`: only these count, each as
            often as it is listed.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to take positives and negatives from instead of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the triplets: all, or those selected (one per anchor for "hard" and
            "easy_positive", one per anchor and positive for "semihard" and "distance_weighted");
            "active" over those that are not 0, (low, high) over those between; "sum", or "none"
            for (n,) sums, one per anchor over its triplets.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider; 0 if there is no triplet.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length, device or hyperparameter out of range; triplets that the labels
            contradict; two of `select`, `n_per_anchor` and `triplets`.

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
    >>> batch_triplet_loss(x, None, triplets=[[0, 1, 2], [3, 2, 0]])
    tensor(0.8860)

    Source: Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    2017; Schroff, Kalenichenko & Philbin, "FaceNet", CVPR 2015; Xuan, Stylianou & Pless, "Improved
    Embeddings with Easy Positive Triplet Mining", WACV 2020; Wu, Manmatha, Smola & Krähenbühl,
    "Sampling Matters in Deep Embedding Learning", ICCV 2017.
    """
    how = _How(
        margin=margin,
        distance=check_distance(distance),
        normalize=normalize,
        select=select,
        smooth=smooth,
        swap=swap,
        n_per_anchor=n_per_anchor,
        cutoff=cutoff,
        nonzero_loss_cutoff=nonzero_loss_cutoff,
        generator=generator,
    )
    return _over_triplets(
        x, labels, how, triplets, weight, reference, group, reduction, precision, Tally()
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _How:
    """What a loss over triplets is, besides its data; see `batch_triplet_loss`."""

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

    def check(self, *, listed: bool) -> None:
        """Refuse what is out of range, or has no meaning together."""
        if isinstance(self.margin, str) and self.margin == "soft":
            raise ValueError("margin must be a number: the soft margin is smooth=True, margin=0.0.")
        between("margin", self.margin, 0, inf, ", a difference of distances")
        one_of("select", self.select, Triplets)
        for name in ("normalize", "smooth", "swap"):
            switch(name, getattr(self, name))
        check_cutoffs(self.cutoff, self.nonzero_loss_cutoff)
        check_generator(self.generator)
        if self.n_per_anchor is not None:
            positive_integer("n_per_anchor", self.n_per_anchor)
        drawn = self.n_per_anchor is not None
        if (listed or drawn) and self.select != "all":
            name = "triplets" if listed else "n_per_anchor"
            raise ValueError(
                f"{name} says which triplets count, and so does select={self.select!r}: leave out "
                "one of the two."
            )
        if listed and drawn:
            raise ValueError(
                "n_per_anchor draws the triplets that triplets lists: leave out one of the two."
            )

    def rule(self) -> TupleRule:
        """The loss of one triplet; see `triplet_loss`."""

        def loss(near: Tensor, *negatives: Tensor) -> Tensor:
            far = torch.minimum(*negatives) if self.swap else negatives[0]
            violation = near - far + self.margin
            return -logsigmoid(-violation) if self.smooth else violation.relu()

        return TupleRule(((0, 1), (0, 2), (1, 2)) if self.swap else ((0, 1), (0, 2)), loss)

    def executor(self, relation: Relation, tally: Tally, group: Group | None) -> Executor:
        """What computes the loss over the triplets of a relation: all, or those picked."""
        pick = self._picker(relation, group)
        if pick is None:
            every_one = every_swapped if self.swap else every_triplet
            closeness = by_distance(self.distance)
            return every_one(closeness, relation, self.margin, self.smooth, tally)
        plain = listed(self.rule(), pick, self.distance, relation, tally)
        return (
            plain
            if self.select != "semihard" or self.swap
            else self._on_gpu(plain, relation, tally)
        )

    def _on_gpu(self, plain: Executor, relation: Relation, tally: Tally) -> Executor:
        """Semi-hard triplets by a kernel, where it takes them."""

        def execute(request: Request) -> Answer:
            closeness = by_distance(self.distance)
            if not gpu.takes_every_tuple(request, closeness, relation):
                return plain(request)
            from nearfar.engine.gpu import tuples  # loads Triton

            found = request, closeness, relation
            return tuples.semihard(*found, self.margin, self.smooth, tally)

        return execute

    def _picker(self, relation: Relation, group: Group | None) -> Picker | None:
        if self.n_per_anchor is not None:
            return at_random(relation, self.n_per_anchor, self._seed(group))
        match self.select:
            case "all":
                # With a swap, a pair has forces from several anchors: for observers, a list of all
                # triplets adds them up.
                return every(relation) if self.swap and force_visitors() else None
            case "hard":
                return hardest(self.distance, relation)
            case "easy_positive":
                return hardest(self.distance, relation, easy_positive=True)
            case "semihard":
                return semihard(self.distance, relation)
            case "distance_weighted":
                cutoffs = self.cutoff, self.nonzero_loss_cutoff
                return by_distance_weight(relation, self._seed(group), *cutoffs)

    def _seed(self, group: Group | None) -> int:
        """What triplets are drawn from: on all processes that of the first."""
        own = seed(self.generator)
        return own if group is None else of_first(group, own)


def _over_triplets(
    x: ArrayLike,
    labels: ArrayLike | None,
    how: _How,
    triplets: ArrayLike | None,
    weight: ArrayLike | None,
    reference: ReferenceLike | None,
    group: Group | None,
    reduction: Reduction,
    precision: Precision | None,
    tally: Tally,
) -> Tensor:
    """See `batch_triplet_loss`; `tally` counts the triplets."""
    how.check(listed=triplets is not None)
    if triplets is None:
        rows, columns, relation = as_batch(x, labels, reference, reduction)
        executor: Maker = partial(how.executor, tally=tally, group=group)
    else:
        found = listed_triplets(triplets, tensor("x", x).device)
        rows, columns, relation = as_listed_triplets(x, labels, reference, found, group)
        executor = partial(listed, how.rule(), given(found), how.distance, tally=tally)
    return run(
        executor,
        rows,
        columns,
        relation,
        closeness=by_distance(how.distance),
        normalize=how.normalize or how.distance == "cosine",
        reduction=reduction,
        precision=precision,
        group=group,
        weight=row_weight(weight, rows),
    )


@over_processes
def triplet_stats(
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    normalize: bool = False,
    select: Triplets = "all",
    swap: bool = False,
    n_per_anchor: int | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    generator: torch.Generator | None = None,
    triplets: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
) -> TripletStats:
    r"""How many triplets `batch_triplet_loss` has, and how many of them have a non-zero loss.

    A triplet of anchor i, positive p and negative n is active where

    .. math:: d_{ip} - d_{in} + m > 0

    The network learns only from active triplets. Their share falls as it learns; once it is nearly
    0, there is nothing left to learn from such batches at this margin. No gradient is computed. The
    arguments are those of the loss, without `smooth`, with which every triplet is active, and
    without `weight` and `precision`, whose context holds here too.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            With `triplets` they may be None; if given, they must agree with them.
        margin: how much farther a negative must be than a positive, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" always does.
        select: "all" triplets, or those selected by "hard", "easy_positive", "semihard" or
            "distance_weighted"; see `batch_triplet_loss`.
        swap: measure the negative from anchor or positive, whichever is nearer to it.
        n_per_anchor: how many triplets of each anchor are drawn; None: all that `select` picks.
        cutoff: of "distance_weighted", from 0 to 2: smaller distances have the weight of this one.
        nonzero_loss_cutoff: of "distance_weighted", from `cutoff` to 2: no negative is drawn from
            here on unless there are no others.
        generator: draws for "distance_weighted" and `n_per_anchor`; None: torch's own. Each call
            draws once; with `group`, the generator of the first process counts.
        triplets: (t, 3) integers, the anchor in the batch, and a positive and a negative in the
            batch or the reference: only these count, each as often as it is listed.
        reference: rows to take positives and negatives from instead of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.

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
    how = _How(
        margin=margin,
        distance=check_distance(distance),
        normalize=normalize,
        select=select,
        smooth=False,
        swap=swap,
        n_per_anchor=n_per_anchor,
        cutoff=cutoff,
        nonzero_loss_cutoff=nonzero_loss_cutoff,
        generator=generator,
    )
    with torch.no_grad():
        _over_triplets(x, labels, how, triplets, None, reference, group, "sum", None, tally)
    return TripletStats(*_of_all(group, tally.valid, tally.active))


@over_processes
def batch_quadruplet_loss(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: Distance = "euclidean",
    normalize: bool = False,
    select: Quadruplets = "all",
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The quadruplet loss over every quadruplet of the batch, or over the hardest of each anchor.

    A quadruplet (i, j, k, l) is an anchor i, another row j of its class, a row k of a second class
    and a row l of a third (:math:`l` of neither the class of i nor that of k). With a reference, j,
    k and l are its rows. "all" is the mean over all of them of

    .. math:: \ell_{ijkl} = \max(0,\, d_{ij} - d_{ik} + m_1) + \max(0,\, d_{ij} - d_{kl} + m_2)

    exactly, without listing any. The roughly :math:`n^3 p` quadruplets, with p positives per row,
    take :math:`O(n^2 \log n)` time, and memory that grows with n and the number of positive pairs.

    "hard" takes one per anchor: its farthest positive j, its nearest negative k, and in the second
    term the closest pair (k', l') of two different classes that are not the anchor's.

    `forces` shows what each anchor does; with "all" and a reference it leaves out the second terms'
    push on two rows of the reference, which is nobody's.

    Args:
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids. Multi-labels have no "different classes".
        margin: of the first term, 0 or more, in units of the distance.
        margin2: of the second term, 0 or more.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" always does.
        select: "all" or "hard".
        weight: (n,) how much each anchor counts, 0 or more.
        reference: rows to take j, k and l from instead of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the quadruplets ("hard": over the anchors that have one); "active"
            for the mean over the first terms that are not 0, plus that over such second terms,
            (low, high) likewise over those between; "sum", or "none" for (n,) sums, one per anchor
            over its quadruplets.

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
    margins, tallies = (margin, margin2), (Tally(), Tally())
    return _over_quadruplets(
        x,
        labels,
        margins,
        distance,
        normalize,
        select,
        weight,
        reference,
        group,
        reduction,
        precision,
        tallies,
    )


def _over_quadruplets(
    x: ArrayLike,
    labels: ArrayLike,
    margins: tuple[float, float],
    distance: Distance,
    normalize: bool,
    select: Quadruplets,
    weight: ArrayLike | None,
    reference: ReferenceLike | None,
    group: Group | None,
    reduction: Reduction,
    precision: Precision | None,
    tallies: tuple[Tally, Tally],
) -> Tensor:
    """See `batch_quadruplet_loss`; `tallies` count the quadruplets of each term."""
    for name, margin in zip(("margin", "margin2"), margins, strict=True):
        between(name, margin, 0, inf, ", a difference of distances")
    distance = check_distance(distance)
    one_of("select", select, Quadruplets)
    switch("normalize", normalize)
    rows, columns, relation = as_batch(x, labels, reference, reduction)
    _check_classes(relation)
    weights = row_weight(weight, rows)

    def executor(terms: Terms, relation: Relation) -> Executor:
        classes = Classes.of(relation)
        if select == "all":
            return every_quadruplet(classes, relation, distance, margins, terms, *tallies)
        rule, pick = _quadruplet_rule(*margins, terms, *tallies), hardest_quadruplets
        return listed(rule, pick(classes, relation, distance), distance, relation, Tally())

    def loss(terms: Terms, rows: Tensor, columns: Tensor | None) -> Tensor:
        return run(
            partial(executor, terms),
            rows,
            columns,
            relation,
            closeness=by_distance(distance),
            normalize=normalize or distance == "cosine",
            reduction=reduction,
            precision=precision,
            group=group,
            weight=weights,
        )

    if split(reduction)[1] is None:
        return loss("both", rows, columns)
    # Of both terms some count, so there are two means. Lifted, their gradients are added up before
    # they are rounded.
    rows, columns = lift("x", rows), None if columns is None else lift("reference.x", columns)
    return loss("first", rows, columns) + loss("second", rows, columns)


def _check_classes(relation: Relation) -> None:
    """Refuse multi-labels, which divide rows into no classes, and items of two classes."""
    labels, others, own = relation.row_labels, relation.column_labels, relation.declared
    assert labels is not None
    assert others is not None
    if labels.ndim == 2:
        raise ValueError(
            f"labels must be class ids of shape (n,), got multi-labels {tuple(labels.shape)}: a "
            "quadruplet needs rows of three different classes, and multi-labels do not divide rows "
            "into classes. batch_triplet_loss takes multi-labels."
        )
    if own is not None and relation.m:
        wrong = (own >= 0) & (others[own.clamp(min=0)] != labels)
        refuse("reference.own", own, wrong, "be a row of the reference with the same label")


@over_processes
def quadruplet_stats(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: Distance = "euclidean",
    normalize: bool = False,
    select: Quadruplets = "all",
    reference: ReferenceLike | None = None,
    group: Group | None = None,
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
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm.
        normalize: scale all rows to length 1 first; "cosine" always does.
        select: "all" quadruplets, or the "hard" one of each anchor.
        reference: rows to take j, k and l from instead of the batch.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.

    Returns:
        `QuadrupletStats`.

    Raises:
        TypeError: labels that are not class ids.
        ValueError: a shape, length, device or hyperparameter out of range.

    >>> x = torch.tensor([[0.0, 0], [0, 1], [1.5, 0], [0, 2.5]])
    >>> quadruplet_stats(x, [0, 0, 1, 2])
    QuadrupletStats(valid=4, active=3, active2=0)
    """
    margins, (first, second) = (margin, margin2), (tallies := (Tally(), Tally()))
    with torch.no_grad():
        _over_quadruplets(
            x,
            labels,
            margins,
            distance,
            normalize,
            select,
            None,
            reference,
            group,
            "sum",
            None,
            tallies,
        )
    return QuadrupletStats(*_of_all(group, first.valid, first.active, second.active))


def _of_all(group: Group | None, *numbers: Tensor | int) -> list[int]:
    """The sum of each number over all processes."""
    own = [int(number) for number in numbers]
    return own if group is None else group_totals(group, own)


def _quadruplet_rule(
    margin: float, margin2: float, terms: Terms, one: Tally, two: Tally
) -> TupleRule:
    """The aligned quadruplet loss on anchor, positive, negative, and a pair of other classes."""

    def first(near: Tensor, far: Tensor) -> Tensor:
        hinge = (near - far + margin).relu()
        one.add(len(near), (hinge > 0).sum())
        return hinge

    def second(near: Tensor, apart: Tensor) -> Tensor:
        hinge = (near - apart + margin2).relu()
        two.add(len(near), (hinge > 0).sum())
        return hinge

    def both(near: Tensor, far: Tensor, apart: Tensor) -> Tensor:
        return first(near, far) + second(near, apart)

    rules = {
        "first": TupleRule(((0, 1), (0, 2)), first),
        "second": TupleRule(((0, 1), (3, 4)), second),
        "both": TupleRule(((0, 1), (0, 2), (3, 4)), both),
    }
    return rules[terms]
