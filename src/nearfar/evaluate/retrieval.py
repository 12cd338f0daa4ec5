"""Retrieval: how often the nearest references share the label of the query."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.closeness import Euclidean
from nearfar.engine.meeting import Group, confirmed, over_processes
from nearfar.engine.relation import Relation, across, within
from nearfar.engine.together import Together, meet_without_gradient
from nearfar.evaluate.nearest import (
    Space,
    check_k,
    hidden_columns,
    k_nearest,
    measured,
    row_spans,
    rows_and_columns,
    space,
)
from nearfar.inputs import ArrayLike, tensor
from nearfar.listed import Found
from nearfar.plain import number, plain
from nearfar.reference import ReferenceLike, check_reference
from nearfar.tabulate import Table


@dataclass(frozen=True)
class Figures:
    """Means over queries.

    Attributes:
        n: how many queries the means are over.
        hit_rate: k -> share of the queries with a relevant reference among the k nearest. Papers on
            metric learning call this Recall@k.
        recall: k -> share of a query's relevant references that are among the k nearest.
        precision: k -> share of the k nearest that are relevant.
        ndcg: k -> normalised discounted cumulative gain of the k nearest.
        r_precision: precision at R, the number of the query's relevant references; None if fewer
            than R references were searched.
        map_at_r: mean average precision at R, MAP@R; None in the same case.
        mrr: mean reciprocal rank of the first relevant reference.
    """

    n: int
    hit_rate: Mapping[int, float]
    recall: Mapping[int, float]
    precision: Mapping[int, float]
    ndcg: Mapping[int, float]
    r_precision: float | None
    map_at_r: float | None
    mrr: float


@dataclass(frozen=True)
class Retrieval:
    """How often the nearest references share the label of the query.

    Attributes:
        n_queries: queries with a relevant reference; the figures are means over these.
        n_left_out: queries without one.
        n_references: how many references there are.
        overall: the figures over all queries.
        per_class: class id -> the figures over the queries of that class; empty for multi-labels.
    """

    n_queries: int
    n_left_out: int
    n_references: int
    overall: Figures
    per_class: Mapping[int, Figures] = field(repr=False)

    def table(self) -> Table:
        """The figures over all queries, one row per k."""
        found = self.overall
        at_k = [
            (str(k), *(number(each[k]) for each in _by_k(found).values())) for k in found.hit_rate
        ]
        return Table(("k", *_by_k(found)), at_k)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        per_class = {label: vars(found) for label, found in self.per_class.items()}
        held = {**vars(self), "overall": vars(self.overall), "per_class": per_class}
        found: dict[str, Any] = plain(held)
        return found

    def worst_classes(self, n: int = 10) -> Table:
        """The classes with the lowest MAP@R, or the lowest MRR if MAP@R is None."""

        def worth(found: Figures) -> float:
            return found.mrr if found.map_at_r is None else found.map_at_r

        lowest = sorted(self.per_class.items(), key=lambda item: (worth(item[1]), item[0]))[:n]
        rows = [
            (str(label), str(f.n), number(f.r_precision), number(f.map_at_r), number(f.mrr))
            for label, f in lowest
        ]
        return Table(("class", "queries", "R-precision", "MAP@R", "MRR"), rows)

    def __str__(self) -> str:
        found = self.overall
        title = f"{self.n_queries} queries against {self.n_references} references"
        if self.n_left_out:
            title += f", {self.n_left_out} more left out: no reference shares their label"
        whole = (
            f"R-precision {number(found.r_precision)}, MAP@R {number(found.map_at_r)}, "
            f"MRR {number(found.mrr)}"
        )
        return f"{title}\n{self.table().plain()}\n{whole}"


@over_processes
def retrieval(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    reference: ReferenceLike | None = None,
    exclude: ArrayLike | None = None,
    k: Sequence[int] = (1, 5, 10),
    distance: Distance = "cosine",
    group: Group | None = None,
) -> Retrieval:
    r"""Search the references for each row, exactly, and score how many found share its label.

    With :math:`rel(i) \in \{0, 1\}` whether the i-th nearest reference is relevant, R the number of
    relevant references, and :math:`h(k) = \sum_{i \le k} rel(i)`,

    .. math::
        P@k = \frac{h(k)}{k}, \quad recall@k = \frac{h(k)}{R}, \quad
        MAP@R = \frac{1}{R} \sum_{i=1}^{R} rel(i)\, P@i, \quad
        NDCG@k = \frac{\sum_{i \le k} rel(i) / \log_2(i + 1)}
                      {\sum_{i \le \min(k, R)} 1 / \log_2(i + 1)}

    and the reciprocal rank :math:`1 / \min\{i : rel(i) = 1\}` is taken over the whole ranking, not
    over the first k. Queries without a relevant reference (R = 0) have no such figures; they are
    left out and counted. Among equally far references, the lower index comes first. With many ties,
    shuffle the references: if they are sorted by class, the figures depend on that order.

    Args:
        x: (n, d) embeddings, the queries.
        labels: (n,) class ids, or (n, c) bool multi-labels; a reference that shares a label is
            relevant.
        reference: rows to search, with their labels. None: the other rows of x. A row that
            `Reference.own` names is neither found nor relevant. Rows of equal values are not
            assumed to be the same item, but a warning is given if every query has a reference at
            distance 0 and `own` is None.
        exclude: (n, e) integers, rows of the reference (or of x) that row i is not compared with,
            -1 for none; they are neither found nor relevant. In re-identification, these are images
            of the same person by the same camera.
        k: the numbers of nearest references to evaluate.
        distance: "cosine", "euclidean", "sqeuclidean" (the same figures), "snr", "manhattan" or the
            p of a p-norm.
        group: the processes that the queries are spread over, as in a loss. Each searches for its
            own; without a reference, the rows of the others come from them block by block. The
            figures are those of all queries, and `exclude` counts the rows of all, in the order of
            the processes. `reference` is the same on all. None: this one has all.

    Returns:
        `Retrieval`. Every pair is measured, tile by tile; memory grows with n and m, never with
        their product.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels, references without labels.
        ValueError: a shape, length, device or number out of range, a row that is not finite, no
            query with a relevant reference.

    >>> x = torch.tensor([[0.0], [1.0], [1.5], [3.0], [3.2]])
    >>> print(retrieval(x, [0, 0, 1, 1, 2], k=(1, 2), distance="euclidean"))
    4 queries against 4 references, 1 more left out: no reference shares their label
    k  hit rate  recall  precision    NDCG
    -  --------  ------  ---------  ------
    1    0.2500  0.2500     0.2500  0.2500
    2    0.7500  0.7500     0.3750  0.5655
    R-precision 0.2500, MAP@R 0.2500, MRR 0.5833

    Sources: MAP@R: Musgrave, Belongie & Lim, "A metric learning reality check", ECCV 2020; NDCG:
    Järvelin & Kekäläinen, 2002; Recall@k as a hit rate: Jégou, Douze & Schmid, 2011.
    """
    sizes = _sizes(k)
    where, relation = _space(x, labels, reference, exclude, distance, group)
    relevant = _n_relevant(relation, where.hidden)
    most = _largest(where.together, int(relevant.max()) if len(relevant) else 0)
    depth = max(min(max(*sizes, most), relation.m), 1)
    unknown = reference is not None and reference.own is None
    scored, meet_themselves = [], unknown
    for rows in row_spans(where, depth):
        hits, first, nearest = _search(where, relation, rows, depth)
        scored.append(_Scored.of(hits, first, relevant[rows], sizes))
        meet_themselves = meet_themselves and _at_no_distance(where, rows, nearest)
    if unknown and not _largest(where.together, int(not meet_themselves)):
        _warn_of_selves("reference=nearfar.Reference(x, labels, own)", where.together)
    n_references = relation.m if reference is not None else relation.m - 1
    return _gather(scored, relevant, relation, sizes, n_references, where.together)


@over_processes
def retrieval_of(
    found: Found,
    labels: ArrayLike,
    *,
    reference_labels: ArrayLike | None = None,
    reference_self: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    k: Sequence[int] = (1, 5, 10),
    group: Group | None = None,
) -> Retrieval:
    """The figures of `retrieval` for neighbours found elsewhere, such as by `approximate_nearest`.

    A relevant reference that was not found counts as missed; a query that found none has reciprocal
    rank 0. R-precision and MAP@R are None if any query has more relevant references than were
    searched for.

    Args:
        found: the nearest references of each row, nearest first, -1 if there are fewer.
        labels: (n,) class ids, or (n, c) bool multi-labels; a reference that shares a label is
            relevant.
        reference_labels: (m,) or (m, c), labels of the references. None: those were the other rows.
        reference_self: (n,) which reference is row i itself, -1 for none.
        exclude: (n, e) references that row i was not compared with, -1 for none.
        k: the numbers of nearest references to evaluate, no more than were searched for.
        group: the processes that the queries are spread over, as in `retrieval`. None: this one has
            all.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: a shape, length or number out of range, no query with a relevant reference.

    >>> from nearfar.evaluate import nearest
    >>> x = torch.tensor([[0.0], [1.0], [1.5], [3.0]])
    >>> found = nearest(x, k=2, distance="euclidean")
    >>> retrieval_of(found, [0, 0, 1, 1], k=(1,)).overall.hit_rate
    {1: 0.5}
    """
    sizes = _sizes(k)
    if max(sizes) > found.indices.shape[1]:
        raise ValueError(
            f"k must not exceed the {found.indices.shape[1]} neighbours found, got {max(sizes)}."
        )
    rows, together = found.indices, None
    if reference_labels is None:
        relation = within(labels, rows)
    else:
        columns = tensor("reference_labels", reference_labels, device=rows.device)
        names = ("reference_labels", "reference_self")
        relation = across(labels, rows, columns, reference_labels, reference_self, names)
    if group is not None:
        others = None if relation.symmetric else found.distances.new_empty(relation.m, 0)
        together, relation = meet_without_gradient(group, found.distances, others, relation)
    n, m, own = relation.n, relation.m, relation.own
    hidden = confirmed(group, lambda: hidden_columns(own, exclude, n, m, rows.device))
    relevant = _n_relevant(relation, hidden)
    if own is None and not _largest(together, int(bool((found.distances[:, 0] != 0).any()))):
        _warn_of_selves("reference_self=", together)
    hits = _hits(relation, slice(0, len(rows)), rows)
    for column in hidden.unbind(1):
        hits &= rows != column[:, None]
    first = torch.where(hits.any(1), hits.int().argmax(1) + 1.0, inf)
    scored = [_Scored.of(hits, first, relevant, sizes)]
    n_references = m if reference_labels is not None else m - 1
    return _gather(scored, relevant, relation, sizes, n_references, together)


def _space(
    x: ArrayLike,
    labels: ArrayLike,
    reference: ReferenceLike | None,
    exclude: ArrayLike | None,
    distance: Distance,
    group: Group | None,
) -> tuple[Space, Relation]:
    """What is searched, and which references are relevant."""
    if reference is not None:
        check_reference(reference)
    rows, columns = rows_and_columns(x, None if reference is None else reference.x)
    if reference is None:
        relation = within(labels, rows)
    else:
        relation = across(labels, rows, columns, reference.labels, reference.own)
    return space(rows, columns, relation, exclude, distance, group)


def _largest(together: Together | None, number: int) -> int:
    """The largest of the numbers of all processes."""
    told = [[number]] if together is None else together.processes.tell([number])
    return max(of_one for (of_one,) in told)


def _search(
    where: Space, relation: Relation, rows: slice, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Search for the nearest references of these rows.

    Returns:
        (b, depth) whether each found is relevant; (b,) the rank of the first relevant one;
        (b, depth) their closeness.
    """
    closest = where.rows.new_full((rows.stop - rows.start,), inf)
    place = torch.full_like(closest, relation.m, dtype=torch.int64)

    def closest_positive(columns: slice, d: Tensor) -> None:
        positive = relation.block(rows, columns).similar
        if positive is None or not d.shape[1]:
            return
        least = d.masked_fill(~positive, inf).min(1)  # min takes the first of equal ones
        nearer = least.values < closest
        closest[nearer] = least.values[nearer]
        place[nearer] = least.indices[nearer] + columns.start

    nearest, index = k_nearest(where, rows, depth, closest_positive)
    hits = _hits(relation, rows, index)
    first = torch.where(hits.any(1), hits.int().argmax(1) + 1.0, inf)
    missed = int((closest.isfinite() & first.isinf()).any())
    if not (missed if where.split is None else _largest(where.together, missed)):
        return hits, first, nearest
    ahead = torch.zeros_like(place)
    for columns, d in measured(where, rows, at_least=depth):
        numbers = torch.arange(columns.start, columns.stop, device=d.device)
        before = (d == closest[:, None]) & (numbers < place[:, None])
        ahead += ((d < closest[:, None]) | before).sum(1)
    return hits, torch.where(closest.isfinite(), ahead + 1.0, inf), nearest


def _n_relevant(relation: Relation, hidden: Tensor) -> Tensor:
    """(n,) how many relevant references there are to find, not counting hidden ones."""
    among_hidden = _hits(relation, slice(0, relation.n), hidden).sum(1)
    return relation.n_positives() - among_hidden


def _at_no_distance(where: Space, rows: slice, nearest: Tensor) -> bool:
    """Whether all of these rows have a reference at distance 0, for |a - b|^2 up to rounding.

    Args:
        where: rows and columns.
        rows: which rows.
        nearest: (b, k) the closeness of their nearest references.
    """
    near: Tensor | float = 0.0
    if isinstance(where.ready.closeness, Euclidean):
        near = (16 * torch.finfo(torch.float32).eps) ** 2 * where.ready.rows[rows].square().sum(1)
    return bool((nearest[:, 0] <= near).all())


def _warn_of_selves(how: str, together: Together | None) -> None:
    warnings.warn(
        "Every query has a reference at distance 0. If queries find themselves, the figures mean "
        f"nothing. Name each query's own row in the reference with {how}, "
        "torch.arange(len(x)) if the reference is x, or leave reference out.",
        stacklevel=4 if together is None else 5,  # who called what over_processes wraps
    )


def _hits(relation: Relation, rows: slice, index: Tensor) -> Tensor:
    """(b, k) bool, whether the references of these indices are relevant; -1 never is."""
    assert relation.row_labels is not None
    assert relation.column_labels is not None
    queries = relation.row_labels[rows, None]
    if not relation.m:
        return torch.zeros_like(index, dtype=torch.bool)
    hits = torch.zeros_like(index, dtype=torch.bool)
    for column in range(index.shape[1]):  # multi-labels are wide: one reference per row at a time
        found = relation.column_labels[index[:, column].clamp(min=0)]
        same = found == queries[:, 0]
        hits[:, column] = same if found.ndim == 1 else (found & queries[:, 0]).any(1)
    own = None if relation.own is None else relation.own[rows, None]
    return hits & (index >= 0) if own is None else hits & (index >= 0) & (index != own)


@dataclass(frozen=True, eq=False)
class _Scored:
    """The figures of each query of a block, as in `Figures`.

    Attributes:
        at_k: (b, 4, len(sizes)) hit rate, recall, precision and NDCG.
        whole: (b, 3) R-precision, MAP@R and the reciprocal rank; NaN where too few were found.
    """

    at_k: Tensor
    whole: Tensor

    @staticmethod
    def of(hits: Tensor, first: Tensor, relevant: Tensor, sizes: Sequence[int]) -> "_Scored":
        """From the hits, the rank of the first one, and the number of relevant references."""
        width = max(*sizes, hits.shape[1])
        hits = torch.nn.functional.pad(hits, (0, width - hits.shape[1])).double()
        rank = torch.arange(1, width + 1, device=hits.device, dtype=torch.float64)
        so_far, gain = hits.cumsum(1), (hits / (rank + 1).log2()).cumsum(1)
        ideal = (1 / (rank + 1).log2()).cumsum(0)
        some = relevant.clamp(min=1)
        at_k = [
            (
                (so_far[:, size - 1] > 0).double(),
                so_far[:, size - 1] / some,
                so_far[:, size - 1] / size,
                gain[:, size - 1] / ideal[some.clamp(max=size) - 1],
            )
            for size in sizes
        ]
        at_r = some.clamp(max=width)[:, None] - 1
        within_r = rank <= some[:, None]
        whole = [
            so_far.gather(1, at_r)[:, 0] / some,
            (hits * so_far / rank * within_r).sum(1) / some,
        ]
        whole = [value.masked_fill(relevant > width, torch.nan) for value in whole]
        return _Scored(
            torch.stack([torch.stack(figures, 1) for figures in at_k], 2),
            torch.stack([*whole, 1 / first.double()], 1),
        )


def _gather(
    scored: Sequence[_Scored],
    relevant: Tensor,
    relation: Relation,
    sizes: Sequence[int],
    n_references: int,
    together: Together | None,
) -> Retrieval:
    """Means over all queries that have a relevant reference, and over those of each class."""
    at_k, whole = (torch.cat([getattr(b, name) for b in scored]) for name in ("at_k", "whole"))
    labels = relation.row_labels
    assert labels is not None
    if together is not None:
        at_k, whole, relevant, labels = map(together.rows.gather, (at_k, whole, relevant, labels))
    used = relevant > 0
    if not used.any():
        raise ValueError(
            f"None of the {len(used)} queries has a reference that shares its label, so there is "
            "nothing to find. Check the labels of both, and exclude."
        )
    at_k, whole, labels = at_k[used], whole[used], labels[used]
    overall = _figures(at_k.mean(0), whole.mean(0), len(at_k), sizes)
    per_class = {}
    if labels.ndim == 1:
        names, member, count = torch.unique(labels, return_inverse=True, return_counts=True)
        flat = torch.cat([at_k.flatten(1), whole], 1)
        means = flat.new_zeros(len(names), flat.shape[1]).index_add_(0, member, flat)
        means /= count[:, None]
        for name, n, row in zip(names.tolist(), count.tolist(), means, strict=True):
            of_class = row[: -whole.shape[1]].view(at_k.shape[1:]), row[-whole.shape[1] :]
            per_class[name] = _figures(*of_class, n, sizes)
    return Retrieval(len(at_k), len(used) - len(at_k), n_references, overall, per_class)


def _figures(at_k: Tensor, whole: Tensor, n: int, sizes: Sequence[int]) -> Figures:
    hit_rate, recall, precision, ndcg = (
        dict(zip(sizes, values, strict=True)) for values in at_k.tolist()
    )
    r_precision, map_at_r, mrr = (None if isnan(value) else value for value in whole.tolist())
    return Figures(n, hit_rate, recall, precision, ndcg, r_precision, map_at_r, mrr or 0.0)


def _by_k(found: Figures) -> dict[str, Mapping[int, float]]:
    names = ("hit rate", "recall", "precision", "NDCG")
    return dict(
        zip(names, (found.hit_rate, found.recall, found.precision, found.ndcg), strict=True)
    )


def _sizes(k: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(k, Sequence) or not k:
        raise ValueError(
            f"k must be a sequence of numbers of references, such as (1, 5, 10); got {k!r}."
        )
    for size in k:
        check_k("k", size)
    return tuple(sorted(set(k)))
