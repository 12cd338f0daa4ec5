"""Losses over every triplet and quadruplet, or the picked ones, listed one by one in float64.

Nothing here knows the library. Tuples are listed by Python loops over the rows; autograd through
the listed distances gives the reference gradient.
"""

from itertools import product
from math import inf

import torch
from torch import Tensor

Triplet = tuple[int, int, int]
Reduction = str | tuple[float, float]


def similar(labels: Tensor, others: Tensor) -> list[list[bool]]:
    """Who shares a class id, or a label of multi-labels, with whom."""
    if labels.ndim == 1:
        return [[a == b for b in others.tolist()] for a in labels.tolist()]
    return [
        [any(p and q for p, q in zip(a, b, strict=True)) for b in others.tolist()]
        for a in labels.tolist()
    ]


def between(x: Tensor, y: Tensor, distance: str | float) -> Tensor:
    """(n, m) distances, from differences; the derivative at 0 is 0. A number p is the p-norm."""
    if distance == "cosine":
        x, y = _unit(x), _unit(y)
        return 1 - x @ y.T
    apart = x[:, None] - y
    if distance == "snr":
        return apart.var(-1) / x.var(-1)[:, None]
    if distance == "manhattan":
        return apart.abs().sum(-1)
    if distance == inf:
        return apart.abs().amax(-1)
    p = 2.0 if isinstance(distance, str) else distance
    powers = (apart.square() if p == 2 else apart.abs() ** p).sum(-1)
    if distance == "sqeuclidean":
        return powers
    return torch.where(powers > 0, torch.where(powers > 0, powers, 1) ** (1 / p), 0)


def relations(
    labels: Tensor, others: Tensor | None, own: Tensor | None
) -> tuple[list[list[int]], list[list[int]]]:
    """The positives and the negatives of each row."""
    n = len(labels)
    itself = list(range(n)) if others is None else [-1] * n if own is None else own.tolist()
    same = similar(labels, labels if others is None else others)
    m = n if others is None else len(others)
    everyone = [[j for j in range(m) if j != itself[i]] for i in range(n)]
    return (
        [[j for j in everyone[i] if same[i][j]] for i in range(n)],
        [[j for j in everyone[i] if not same[i][j]] for i in range(n)],
    )


def select_triplets(
    d: Tensor, positives: list[list[int]], negatives: list[list[int]], select: str
) -> list[Triplet]:
    """The triplets that a selection picks; of equals the first."""
    rows = d.tolist()
    found: list[Triplet] = []
    for i, (near, far) in enumerate(zip(positives, negatives, strict=True)):
        if not near or not far:
            continue
        of = rows[i]
        nearest = min(far, key=lambda j: of[j])
        if select == "all":
            found += [(i, p, n) for p, n in product(near, far)]
        elif select == "hard":
            found.append((i, max(near, key=lambda j: of[j]), nearest))
        elif select == "easy_positive":
            found.append((i, min(near, key=lambda j: of[j]), nearest))
        elif select == "semihard":
            for p in near:
                beyond = [n for n in far if of[n] > of[p]]
                best = min(beyond, key=lambda j: of[j]) if beyond else max(far, key=lambda j: of[j])
                found.append((i, p, best))
        else:
            raise ValueError(select)
    return found


def batch_triplet(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    distance: str | float = "euclidean",
    select: str = "all",
    smooth: bool = False,
    swap: bool = False,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    reference_own: Tensor | None = None,
    normalize: bool = False,
    triplets: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, int, int]:
    """The loss, and the numbers of all and of active triplets."""
    columns = x if reference is None else reference
    if normalize:
        x, columns = _unit(x), _unit(columns)
    d = between(x, columns, distance)
    if triplets is None:
        positives, negatives = relations(labels, reference_labels, reference_own)
        found = select_triplets(d, positives, negatives, select)
        triplets = torch.tensor(found, dtype=torch.long)
    zero = 0 * (x.sum() + columns.sum())
    if not len(triplets):
        return (zero.expand(len(x)) if reduction == "none" else zero), 0, 0
    i, p, n = triplets.T
    far = d[i, n]
    if swap:
        far = torch.minimum(far, between(columns, columns, distance)[p, n])
    cost = _activate(d[i, p] - far + margin, smooth)
    loss = _reduce(cost, i, len(x), reduction, weight) + zero
    return loss, len(triplets), int((cost > 0).sum())


def quadruplets(labels: Tensor, others: Tensor, own: list[int]) -> Tensor:
    """(q, 4) all quadruplets: i and j of one class, k and l of two others; all but i columns."""
    rows, c = labels.tolist(), others.tolist()
    m = range(len(c))
    found = [
        (i, j, k, q)
        for i, j in product(range(len(rows)), m)
        if j != own[i] and rows[i] == c[j]
        for k in m
        if c[k] != rows[i]
        for q in m
        if c[q] != rows[i] and c[q] != c[k]
    ]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 4)


def batch_quadruplet(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: str | float = "euclidean",
    normalize: bool = False,
    select: str = "all",
    weight: Tensor | None = None,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    reference_own: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, int, int, int]:
    """The loss, and the numbers of all quadruplets and of the active terms of each kind."""
    columns, others = (x, labels) if reference is None else (reference, reference_labels)
    own = list(range(len(x))) if reference is None else [-1] * len(x)
    own = own if reference_own is None else reference_own.tolist()
    if normalize:
        x, columns = _unit(x), _unit(columns)
    d, among = between(x, columns, distance), between(columns, columns, distance)
    if select == "all":
        i, j, k, m = quadruplets(labels, others, own).T
        k2 = k
    else:
        found = _hardest(d, among, labels.tolist(), others.tolist(), own)
        i, j, k, k2, m = torch.tensor(found, dtype=torch.long).reshape(-1, 5).T
    near, far, apart = d[i, j], d[i, k], among[k2, m]
    first, second = (near - far + margin).relu(), (near - apart + margin2).relu()
    if reduction in ("mean", "sum", "none"):
        loss = _reduce(first + second, i, len(x), reduction, weight)
    else:
        loss = sum(_reduce(term, i, len(x), reduction, weight) for term in (first, second))
    zero = 0 * (x.sum() + columns.sum())
    return loss + zero, len(i), int((first > 0).sum()), int((second > 0).sum())


def _hardest(
    d: Tensor, among: Tensor, rows: list[int], c: list[int], own: list[int]
) -> list[tuple[int, ...]]:
    of_rows, between_columns, m, found = d.tolist(), among.tolist(), range(len(c)), []
    for i, of in enumerate(of_rows):
        near = [j for j in m if j != own[i] and c[j] == rows[i]]
        far = [k for k in m if c[k] != rows[i]]
        two = [(between_columns[k][q], k, q) for k in far for q in far if c[k] != c[q]]
        if near and two:
            best = min(two, key=lambda pair: pair[0])
            farthest = max(near, key=lambda j: of[j])
            found.append((i, farthest, min(far, key=lambda k: of[k]), *best[1:]))
    return found


def online_contrastive(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    distance: str | float = "euclidean",
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    reference_own: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Similar pairs farther than the nearest dissimilar one, and the reverse."""
    d = between(x, x if reference is None else reference, distance)
    positives, negatives = relations(labels, reference_labels, reference_own)
    near = [(i, j) for i, row in enumerate(positives) for j in row]
    far = [(i, j) for i, row in enumerate(negatives) for j in row]
    rows = d.tolist()
    farthest = max((rows[i][j] for i, j in near), default=-inf)
    nearest = min((rows[i][j] for i, j in far), default=inf)
    near = [(i, j) for i, j in near if rows[i][j] > nearest]
    far = [(i, j) for i, j in far if rows[i][j] < farthest]
    cost = 0 * d
    for pairs, term in ((near, d.square()), (far, (margin - d).relu().square())):
        share = 1 / max(len(pairs), 1) if reduction == "mean" else 1
        for i, j in pairs:
            cost = (
                cost
                + torch.nn.functional.one_hot(torch.tensor(i * d.shape[1] + j), d.numel()).view(
                    d.shape
                )
                * term
                * share
            )
    return cost.sum(1) if reduction == "none" else cost.sum()


def _activate(violation: Tensor, smooth: bool) -> Tensor:
    if not smooth:
        return violation.relu()
    return violation.relu() + torch.log1p((-violation.abs()).exp())


def _reduce(
    cost: Tensor, anchor: Tensor, n: int, reduction: Reduction, weight: Tensor | None
) -> Tensor:
    weights = torch.ones_like(cost) if weight is None else weight[anchor]
    if reduction == "none":
        return torch.zeros(n, dtype=cost.dtype).index_add(0, anchor, cost * weights)
    if reduction == "sum":
        return (cost * weights).sum()
    usual = {"mean": (-inf, inf), "active": (0.0, inf)}
    low, high = usual[reduction] if isinstance(reduction, str) else reduction
    inside = (cost > low) & (cost < high)
    total = float(weights[inside].sum())
    return (cost * weights)[inside].sum() / (total or 1)


def _unit(x: Tensor) -> Tensor:
    size = x.norm(dim=1, keepdim=True)
    return torch.where(size > 0, x / torch.where(size > 0, size, 1), 0)
