"""Every whole-batch, two-tower and proxy loss as float64 loops, written from the papers.

Nothing here knows the library. A row is a float64 vector, a closeness a float64 number, and every
pair is visited by a Python loop; autograd through the loops gives the reference gradient. The
arguments are those of the public functions, so that one call serves both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Number = Any  # a zero-dimensional float64 tensor, or a float
Pairs = list[tuple[list[int], list[int]]]  # positives and negatives of each row


def batch_contrastive(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    distance: str | float = "euclidean",
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Hadsell, Chopra & LeCun 2006 without the factor 1/2, over all ordered pairs."""
    rows, columns, pairs = _compare(x, labels, distance == "cosine", **reference)

    def near(i: int, j: int) -> Number:
        return _distance(rows[i], columns[j], distance) ** 2

    def far(i: int, j: int) -> Number:
        return _hinge(margin - _distance(rows[i], columns[j], distance)) ** 2

    return _two_kinds(x, pairs, near, far, reduction)


def batch_cosine(
    x: Tensor, labels: Tensor, *, margin: float = 0.0, reduction: str = "mean", **reference: Any
) -> Tensor:
    """1 - cos for similar pairs, max(0, cos - margin) for the others."""
    rows, columns, pairs = _compare(x, labels, True, **reference)
    return _two_kinds(
        x,
        pairs,
        lambda i, j: 1 - _dot(rows[i], columns[j]),
        lambda i, j: _hinge(_dot(rows[i], columns[j]) - margin),
        reduction,
    )


def siglip(
    x: Tensor,
    y: Tensor,
    *,
    scale: Number,
    bias: Number,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Zhai et al. 2023, algorithm 1: -log sigmoid(+-(t x.y + b)) over all pairs, over n."""
    rows = []
    for i, a in enumerate(_rows(x, normalize)):
        loss = 0.0
        for j, b in enumerate(_rows(y, normalize)):
            z = scale * _dot(a, b) + bias
            loss = loss + _softplus(-z if i == j else z)
        rows.append(loss)
    return _reduce(x, rows, [1] * len(rows), weight, reduction)


def clip(
    x: Tensor,
    y: Tensor,
    *,
    scale: Number,
    normalize: bool = True,
    decoupled: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Radford et al. 2021, figure 3; decoupled: Yeh et al. 2022."""
    there = _matching(x, y, None, scale, normalize, decoupled)
    back = _matching(y, x, None, scale, normalize, decoupled)
    rows = [(a + b) / 2 for (a, _), (b, _) in zip(there, back, strict=True)]
    return _reduce(x, rows, [count for _, count in there], weight, reduction)


def info_nce(
    query: Tensor,
    positive: Tensor,
    *,
    temperature: Number = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    decoupled: bool = False,
    hard_negatives: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """van den Oord et al. 2018 over the batch; hard negatives as in Karpukhin et al. 2020.

    All hard negatives are everyone's: in dense passage retrieval a query is compared with the
    passages of all queries of the batch.
    """
    scale = 1 / temperature
    there = _matching(query, positive, hard_negatives, scale, normalize, decoupled)
    loss = _reduce(query, *_columns(there), weight, reduction)
    if not symmetric:
        return loss
    back = _matching(positive, query, None, scale, normalize, decoupled)
    return (loss + _reduce(query, *_columns(back), weight, reduction)) / 2


def nt_xent(
    x: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 0.5,
    normalize: bool = True,
    decoupled: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Chen et al. 2020, equation 1, a term for every positive pair."""
    unit, columns, pairs = _compare(x, labels, normalize, **reference)
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        z = {j: _dot(unit[i], columns[j]) / temperature for j in positives + negatives}
        terms = []
        for p in positives:
            above = [z[n] - z[p] for n in negatives]
            if decoupled and not negatives:
                continue
            terms.append(_log_sum(above) if decoupled else _pick(above))
        rows.append(_total(terms))
        counts.append(len(terms))
    return _reduce(x, rows, counts, weight, reduction)


def sup_con(
    x: Tensor,
    labels: Tensor,
    *,
    temperature: Number = 0.1,
    normalize: bool = True,
    decoupled: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Khosla et al. 2020, equation 2: the mean over positives outside of the logarithm."""
    unit, columns, pairs = _compare(x, labels, normalize, **reference)
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        z = {j: _dot(unit[i], columns[j]) / temperature for j in positives + negatives}
        terms = []
        for p in positives:
            if decoupled and not negatives:
                continue
            if decoupled:
                terms.append(_log_sum([z[n] - z[p] for n in negatives]))
            else:  # p itself is in the denominator, and e^(z_p - z_p) the 1 of log(1 + ...)
                terms.append(_pick([z[a] - z[p] for a in z if a != p]))
        rows.append(_total(terms) / max(len(terms), 1))
        counts.append(int(bool(terms)))
    return _reduce(x, rows, counts, weight, reduction)


def multi_similarity(
    x: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Wang et al. 2019: (1/alpha) log(1 + sum e^-alpha(s - base)) + the same of negatives."""
    unit, columns, pairs = _compare(x, labels, normalize, **reference)
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        s = {j: _dot(unit[i], columns[j]) for j in positives + negatives}
        near = _pick([-alpha * (s[p] - base) for p in positives]) / alpha
        far = _pick([beta * (s[n] - base) for n in negatives]) / beta
        rows.append(near + far)
        counts.append(int(bool(s)))
    return _reduce(x, rows, counts, weight, reduction)


def circle(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.25,
    scale: float = 256.0,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Sun et al. 2020: O_p = 1 + m, O_n = -m, Delta_p = 1 - m, Delta_n = m; alpha detached."""
    unit, columns, pairs = _compare(x, labels, normalize, **reference)
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        s = {j: _dot(unit[i], columns[j]) for j in positives + negatives}
        exponents = []
        for n in negatives:
            push = scale * _hinge(s[n].detach() + margin) * (s[n] - margin)
            for p in positives:
                pull = scale * _hinge(1 + margin - s[p].detach()) * (s[p] - (1 - margin))
                exponents.append(push - pull)
        rows.append(_pick(exponents))
        counts.append(int(bool(exponents)))
    return _reduce(x, rows, counts, weight, reduction)


def lifted_structure(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    distance: str | float = "euclidean",
    weight: Tensor | None = None,
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Hermans et al. 2017, the generalised form of Oh Song et al. 2016."""
    unit, columns, pairs = _compare(x, labels, distance == "cosine", **reference)
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        if not positives or not negatives:
            rows.append(0.0)
            counts.append(0)
            continue
        near = _log_sum([_distance(unit[i], columns[p], distance) for p in positives])
        far = _log_sum([margin - _distance(unit[i], columns[n], distance) for n in negatives])
        rows.append(_hinge(near + far))
        counts.append(1)
    return _reduce(x, rows, counts, weight, reduction)


def nca(
    x: Tensor,
    labels: Tensor,
    *,
    scale: Number = 1.0,
    similarity: str = "sqeuclidean",
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    **reference: Any,
) -> Tensor:
    """Goldberger et al. 2004, the logarithm of the chance to pick a positive."""
    unit, columns, pairs = _compare(x, labels, normalize, **reference)
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        z = {
            j: scale * _dot(unit[i], columns[j])
            if similarity == "inner_product"
            else -scale * _distance(unit[i], columns[j], "sqeuclidean")
            for j in positives + negatives
        }
        some = _log_sum([z[p] for p in positives]) if positives else 0.0
        rows.append(_pick([z[n] - some for n in negatives]) if positives else 0.0)
        counts.append(1 if positives else 0)
    return _reduce(x, rows, counts, weight, reduction)


def lifted_pair(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    distance: str = "euclidean",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Oh Song et al. 2016, equation 4, over every similar pair in both orders."""
    unit, _, pairs = _compare(x, labels, distance == "cosine")
    rows, counts = [], []
    for i, (positives, negatives) in enumerate(pairs):
        terms = []
        for j in positives:
            push = [margin - _distance(unit[i], unit[k], distance) for k in negatives]
            push += [margin - _distance(unit[j], unit[k], distance) for k in pairs[j][1]]
            if push:
                d = _distance(unit[i], unit[j], distance)
                terms.append(_hinge(d + _log_sum(push)) ** 2 / 2)
        rows.append(_total(terms))
        counts.append(len(positives))
    return _reduce(x, rows, counts, weight, reduction)


def proxy_softmax(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    scale: Number = 64.0,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
    normalize: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """NormFace; ArcFace: cos(theta + m), linear beyond theta = pi - m; CosFace: cos - m.

    Sub-center ArcFace: of the proxies of a class, that of the largest cosine counts.
    """
    rows, unit, classes = [], _rows(x, normalize), _sub_centers(proxies, normalize)
    for i, own in enumerate(labels.tolist()):
        cos = [_largest([_dot(unit[i], center) for center in centers]) for centers in classes]
        target = cos[own]
        if angle_margin:
            m = torch.tensor(angle_margin, dtype=torch.float64)
            inside = target > torch.cos(torch.pi - m)
            # cos(arccos(c) + m), and the reference implementation's c - m sin(pi - m) beyond.
            turned = torch.cos(target.clamp(-1, 1).arccos() + m)
            target = turned if inside else target - m * torch.sin(torch.pi - m)
        target = scale * (target - cosine_margin)
        rows.append(_pick([scale * c - target for k, c in enumerate(cos) if k != own]))
    return _reduce(x, rows, [1] * len(rows), weight, reduction)


def proxy_nca(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    scale: Number = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Movshovitz-Attias et al. 2017: the own proxy is not in the denominator."""
    rows, counts, unit, classes = [], [], _rows(x), _sub_centers(proxies)
    for i, own in enumerate(labels.tolist()):
        d = [-_largest([-(unit[i] - center).square().sum() for center in each]) for each in classes]
        others = [-scale * d[k] for k in range(len(d)) if k != own]
        rows.append(scale * d[own] + _log_sum(others) if others else 0.0)
        counts.append(int(bool(others)))
    return _reduce(x, rows, counts, weight, reduction)


def proxy_anchor(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    scale: float = 32.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Kim et al. 2020, equation 4; each of its means may be one of proxies with weights."""
    near, far, ids, unit = [], [], labels.tolist(), _rows(x)
    for c, proxy in enumerate(_rows(proxies)):
        s = [_dot(proxy, row) for row in unit]
        pull = [-scale * (s[j] - margin) for j in range(len(s)) if ids[j] == c]
        push = [scale * (s[j] + margin) for j in range(len(s)) if ids[j] != c]
        near.append(_pick(pull))
        far.append(_pick(push))
    if reduction == "mean":
        with_rows = [int(c in ids) for c in range(len(proxies))]
        pull = _reduce(x, near, with_rows, weight, "mean")
        return pull + _reduce(x, far, [1] * len(proxies), weight, "mean")
    rows = [a + b for a, b in zip(near, far, strict=True)]
    return _reduce(x, rows, [1] * len(rows), weight, reduction)


def who(labels: Tensor, reference_labels: Tensor | None = None, own: Tensor | None = None) -> Pairs:
    """The positives and negatives of each row, by comparing every pair of labels.

    Without `reference_labels` the rows meet each other, and nobody meets itself.
    """
    columns = labels if reference_labels is None else reference_labels
    if reference_labels is None:
        own = torch.arange(len(labels))
    pairs: Pairs = []
    for i, mine in enumerate(labels.tolist()):
        positives: list[int] = []
        negatives: list[int] = []
        for j, theirs in enumerate(columns.tolist()):
            if own is not None and own[i] == j:
                continue
            (positives if _similar(mine, theirs) else negatives).append(j)
        pairs.append((positives, negatives))
    return pairs


def _similar(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, list):
        return any(a and b for a, b in zip(mine, theirs, strict=True))
    return bool(mine == theirs)


def _compare(
    x: Tensor,
    labels: Tensor,
    normalize: bool,
    reference: Tensor | None = None,
    reference_labels: Tensor | None = None,
    reference_own: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], Pairs]:
    rows = _rows(x, normalize)
    columns = rows if reference is None else _rows(reference, normalize)
    return rows, columns, who(labels, reference_labels, reference_own)


def _two_kinds(
    x: Tensor,
    pairs: Pairs,
    near: Callable[[int, int], Number],
    far: Callable[[int, int], Number],
    reduction: str,
) -> Tensor:
    """The mean over similar plus the mean over dissimilar pairs, or plain sums."""
    pulls = [[near(i, j) for j in positives] for i, (positives, _) in enumerate(pairs)]
    pushes = [[far(i, j) for j in negatives] for i, (_, negatives) in enumerate(pairs)]
    if reduction == "mean":
        kinds = [[term for row in kind for term in row] for kind in (pulls, pushes)]
        return _number(_total([_total(kind) / max(len(kind), 1) for kind in kinds]))
    rows = [_total(a) + _total(b) for a, b in zip(pulls, pushes, strict=True)]
    return _reduce(x, rows, [1] * len(rows), None, reduction)


def _matching(
    query: Tensor,
    positive: Tensor,
    more: Tensor | None,
    scale: Number,
    normalize: bool,
    decoupled: bool,
) -> list[tuple[Number, int]]:
    """Query i picks positive i out of all positives and `more`: the loss, and whether it counts."""
    hard = [] if more is None else _rows(more.reshape(-1, query.shape[1]), normalize)
    x, y, rows = _rows(query, normalize), _rows(positive, normalize), []
    for i in range(len(x)):
        match = scale * _dot(x[i], y[i])
        others = [y[j] for j in range(len(y)) if j != i] + hard
        above = [scale * _dot(x[i], other) - match for other in others]
        if decoupled:
            rows.append((_log_sum(above), 1) if above else (0.0, 0))
        else:
            rows.append((_pick(above), 1))
    return rows


def _columns(rows: list[tuple[Number, int]]) -> tuple[list[Number], list[int]]:
    return [loss for loss, _ in rows], [count for _, count in rows]


def _reduce(
    x: Tensor,
    rows: Sequence[Number],
    counts: Sequence[int],
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """`counts`: the number of terms in each row, by which the mean divides."""
    weights = [1.0] * len(rows) if weight is None else [float(w) for w in weight]
    weighted = [w * row for w, row in zip(weights, rows, strict=True)]
    if reduction == "none":
        return torch.stack([_number(row) for row in weighted]) if rows else x.new_zeros(0)
    divisor = sum(w * c for w, c in zip(weights, counts, strict=True)) if reduction == "mean" else 1
    return _number(_total(weighted) / (divisor or 1))


def _number(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _total(values: Sequence[Number]) -> Number:
    return sum(values[1:], start=values[0]) if values else 0.0


def _distance(a: Tensor, b: Tensor, name: str | float) -> Number:
    """Of two rows; for the cosine distance, of two unit rows. A number p is the p-norm."""
    if name == "cosine":
        return 1 - _dot(a, b)
    if name == "snr":
        signal, noise = (((v - v.mean()) ** 2).sum() for v in (a, a - b))
        return noise / signal if signal > 0 else noise * 0 + 1
    if name == "manhattan":
        return (a - b).abs().sum()
    if not isinstance(name, str):
        total = ((a - b).abs() ** name).sum()
        return total ** (1 / name) if total > 0 else total * 0
    squared = (a - b).square().sum()
    if name == "sqeuclidean":
        return squared
    # The root has no derivative at 0; the library's is 0 there.
    return squared.sqrt() if squared > 0 else squared * 0


def _rows(x: Tensor, normalize: bool = True) -> list[Tensor]:
    """The rows, at length 1 if asked; a zero row has no direction and stays 0."""
    rows = list(x.unbind())
    if not normalize:
        return rows
    sizes = [row.square().sum().sqrt() if row.any() else 1.0 for row in rows]
    return [row / size for row, size in zip(rows, sizes, strict=True)]


def _sub_centers(proxies: Tensor, normalize: bool = True) -> list[list[Tensor]]:
    """The proxies of each class: one each, or several."""
    several = proxies if proxies.ndim == 3 else proxies[:, None]
    return [_rows(centers, normalize) for centers in several.unbind()]


def _largest(values: Sequence[Number]) -> Number:
    """The first of the largest ones, which alone has a derivative."""
    return values[max(range(len(values)), key=lambda k: float(values[k].detach()))]


def _dot(a: Tensor, b: Tensor) -> Number:
    return (a * b).sum()


def _hinge(v: Number) -> Number:
    return v if v > 0 else v * 0


def _softplus(v: Number) -> Number:
    return v + (-v).exp().log1p() if v > 0 else v.exp().log1p()


def _log_sum(values: Sequence[Number]) -> Number:
    """log sum_j e^values_j, the largest taken out first."""
    top = max(float(v.detach()) for v in values)
    return top + _total([(v - top).exp() for v in values]).log()


def _pick(values: Sequence[Number]) -> Number:
    """log(1 + sum_j e^values_j), with the digits of a sum that is small beside 1."""
    return _softplus(_log_sum(values)) if values else 0.0
