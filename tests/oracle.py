"""Every aligned loss as loops over Python numbers, written from the papers.

Nothing here knows the library or torch. A number is a float, or anything that adds, multiplies and
has `.sqrt()`, `.exp()`, `.log1p()`: run on zero-dimensional float64 tensors, the same loops give
autograd the reference gradient. Each function returns one loss a row.
"""

import math
from collections.abc import Sequence
from typing import Any

Number = Any
Row = Sequence[Number]
Rows = Sequence[Row]
Distance = str | float  # a number p is the p-norm of the difference


def contrastive(
    x1: Rows,
    x2: Rows,
    similar: Row,
    *,
    distance: Distance = "euclidean",
    normalize: bool = False,
    **margins: Any,
) -> list[Number]:
    """Hadsell, Chopra & LeCun 2006, without the factor 1/2; `similar` is 1, 0 or in between."""
    x1, x2 = _scaled(x1, normalize), _scaled(x2, normalize)
    far = [_distance(a, b, distance) for a, b in zip(x1, x2, strict=True)]
    return contrastive_from_distance(far, similar, **margins)


def contrastive_from_distance(
    d: Row, similar: Row, *, margin: float = 1.0, pos_margin: float = 0.0, squared: bool = True
) -> list[Number]:
    losses = []
    for di, s in zip(d, similar, strict=True):
        near, far = _hinge(di - pos_margin), _hinge(margin - di)
        losses.append(
            s * near * near + (1 - s) * far * far if squared else s * near + (1 - s) * far
        )
    return losses


def cosine_similarity(x1: Rows, x2: Rows) -> list[Number]:
    return [_cosine(a, b) for a, b in zip(x1, x2, strict=True)]


def cosine(x1: Rows, x2: Rows, similar: Row | None = None, *, margin: float = 0.0) -> list[Number]:
    """1 - cos for similar pairs, max(0, cos - margin) for dissimilar ones."""
    similar = [1] * len(x1) if similar is None else similar
    return [
        s * _one_minus_cosine(a, b) + (1 - s) * _hinge(_cosine(a, b) - margin)
        for a, b, s in zip(x1, x2, similar, strict=True)
    ]


def triplet(
    anchor: Rows,
    positive: Rows,
    negative: Rows,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
    normalize: bool = False,
    swap: bool = False,
    smooth: bool = False,
) -> list[Number]:
    """Schroff et al. 2015; swap of Balntas et al. 2016; soft margin of Hermans et al. 2017."""
    losses = []
    anchor, positive, negative = (_scaled(x, normalize) for x in (anchor, positive, negative))
    for a, p, n in zip(anchor, positive, negative, strict=True):
        near, far = _distance(a, p, distance), _distance(a, n, distance)
        if swap:
            far = min(far, _distance(p, n, distance))
        violation = near - far + margin
        losses.append(_softplus(violation) if smooth else _hinge(violation))
    return losses


def quadruplet(
    anchor: Rows,
    positive: Rows,
    negative: Rows,
    negative2: Rows,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: Distance = "euclidean",
    normalize: bool = False,
) -> list[Number]:
    """Chen et al. 2017: the triplet's term, and the one against a pair of two strangers."""
    losses = []
    rows = [_scaled(x, normalize) for x in (anchor, positive, negative, negative2)]
    for a, p, n, n2 in zip(*rows, strict=True):
        near = _distance(a, p, distance)
        first = _hinge(near - _distance(a, n, distance) + margin)
        second = _hinge(near - _distance(n, n2, distance) + margin2)
        losses.append(first + second)
    return losses


def info_nce(
    query: Rows,
    positive: Rows,
    negatives: Sequence[Any] | None = None,
    *,
    temperature: Number = 0.07,
    normalize: bool = True,
    per_query: bool = False,
) -> list[Number]:
    """van den Oord, Li & Vinyals 2018. `per_query`: negatives[i] are those of query i alone."""
    similarity = _cosine if normalize else _dot
    losses = []
    for i, (q, p) in enumerate(zip(query, positive, strict=True)):
        if negatives is None:
            others = [other for j, other in enumerate(positive) if j != i]
        else:
            others = negatives[i] if per_query else negatives
        chosen = similarity(q, p)
        losses.append(_pick([(similarity(q, other) - chosen) / temperature for other in others]))
    return losses


def softmax(logits: Rows, target: Sequence[int], *, label_smoothing: float = 0.0) -> list[Number]:
    """Cross-entropy against weights eps/c for every class and 1 - eps more for the target."""
    losses = []
    for z, t in zip(logits, target, strict=True):
        c, loss = len(z), 0.0
        for k in range(c):
            weight = label_smoothing / c + (1 - label_smoothing if k == t else 0)
            if weight:
                loss = loss + weight * _pick([z[j] - z[k] for j in range(c) if j != k])
        losses.append(loss)
    return losses


def _distance(a: Row, b: Row, name: Distance) -> Number:
    if name == "cosine":
        return _one_minus_cosine(a, b)
    if name == "snr":
        signal = _variance(a)
        noise = _variance([ai - bi for ai, bi in zip(a, b, strict=True)])
        return noise / signal if signal > 0 else noise * 0 + 1
    if name == "manhattan" or not isinstance(name, str):
        p = 1 if isinstance(name, str) else name
        sizes = [abs(ai - bi) for ai, bi in zip(a, b, strict=True)]
        if p == math.inf:
            return max(sizes)
        total = _sum([size**p for size in sizes])
        return total ** (1 / p) if total > 0 else total * 0
    squared = _sum([(ai - bi) * (ai - bi) for ai, bi in zip(a, b, strict=True)])
    return squared if name == "sqeuclidean" else _sqrt(squared)


def _variance(a: Row) -> Number:
    mean = _sum(a) / len(a)
    return _sum([(ai - mean) * (ai - mean) for ai in a]) / len(a)


def _scaled(rows: Rows, normalize: bool) -> Rows:
    """At length 1 if asked; a zero row stays 0."""
    if not normalize:
        return rows
    sizes = [_sqrt(_dot(row, row)) for row in rows]
    return [
        [v / size for v in row] if size > 0 else row for row, size in zip(rows, sizes, strict=True)
    ]


def _dot(a: Row, b: Row) -> Number:
    return _sum([ai * bi for ai, bi in zip(a, b, strict=True)])


def _cosine(a: Row, b: Row) -> Number:
    size = _sqrt(_dot(a, a)) * _sqrt(_dot(b, b))
    return _dot(a, b) / size if size > 0 else size * 0


def _one_minus_cosine(a: Row, b: Row) -> Number:
    """By Lagrange's identity, which keeps the digits that 1 - cos loses between close rows."""
    dot, size = _dot(a, b), _sqrt(_dot(a, a)) * _sqrt(_dot(b, b))
    if not size > 0 or dot <= 0:
        return 1 - _cosine(a, b)
    cross = [a[i] * b[j] - a[j] * b[i] for j in range(len(a)) for i in range(j)]
    return _sum([c * c for c in cross]) / (size * (size + dot))


def _pick(differences: Row) -> Number:
    """log(1 + sum_j e^differences_j), the largest taken out first where it is positive."""
    if not differences:
        return 0.0
    order = sorted(differences, reverse=True)
    largest, rest = order[0], order[1:]
    if largest <= 0:
        return _log1p(_sum([_exp(v) for v in order]))
    return largest + _log1p(_sum([_exp(-largest), *(_exp(v - largest) for v in rest)]))


def _softplus(v: Number) -> Number:
    return v + _log1p(_exp(-v)) if v > 0 else _log1p(_exp(v))


def _hinge(v: Number) -> Number:
    return v if v > 0 else v * 0


def _sqrt(v: Number) -> Number:
    """The root, with derivative 0 where it has none: at 0."""
    if not v > 0:
        return v * 0
    return v.sqrt() if hasattr(v, "sqrt") else math.sqrt(v)


def _exp(v: Number) -> Number:
    return v.exp() if hasattr(v, "exp") else math.exp(v)


def _log1p(v: Number) -> Number:
    return v.log1p() if hasattr(v, "log1p") else math.log1p(v)


def _sum(values: Sequence[Number]) -> Number:
    if all(isinstance(v, float) for v in values):
        return math.fsum(values)
    return sum(values[1:], start=values[0]) if values else 0.0
