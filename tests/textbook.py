"""Every loss as a textbook or the first search result has it: the formula in dense, plain torch.

The yardstick of the fourth point of the numbers contract, whose errors ours may not exceed twice,
and what the benchmarks measure ours beside. Functions, arguments and hyperparameters are named as
in nearfar, so that both can be called alike. Labels of a batch are class ids.
"""

from collections.abc import Callable
from math import cos, inf, pi, sin
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def cosine_similarity(x1: Tensor, x2: Tensor) -> Tensor:
    return F.cosine_similarity(x1, x2)


# -- rows that belong together --------------------------------------------------------------------


def contrastive_loss(
    x1: Tensor,
    x2: Tensor,
    y: Tensor,
    *,
    distance: str | float = "euclidean",
    normalize: bool = False,
    **how: Any,
) -> Tensor:
    d = _distance(_scaled(x1, normalize), _scaled(x2, normalize), distance)
    return contrastive_loss_from_distance(d, y, **how)


def contrastive_loss_from_distance(
    d: Tensor,
    y: Tensor,
    *,
    margin: float = 1.0,
    pos_margin: float = 0.0,
    squared: bool = True,
    reduction: str = "mean",
) -> Tensor:
    near, far = F.relu(d - pos_margin), F.relu(margin - d)
    near, far = (near**2, far**2) if squared else (near, far)
    return _reduced(_by_label(y, near, far), reduction)


def cosine_loss(
    x1: Tensor,
    x2: Tensor,
    y: Tensor | None = None,
    *,
    margin: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    c = F.cosine_similarity(x1, x2)
    return _reduced(1 - c if y is None else _by_label(y, 1 - c, F.relu(c - margin)), reduction)


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 1.0,
    distance: str | float = "euclidean",
    normalize: bool = False,
    swap: bool = False,
    smooth: bool = False,
    reduction: str = "mean",
) -> Tensor:
    anchor, positive, negative = (_scaled(x, normalize) for x in (anchor, positive, negative))
    near, far = _distance(anchor, positive, distance), _distance(anchor, negative, distance)
    if swap:
        far = torch.minimum(far, _distance(positive, negative, distance))
    short = near - far + margin
    return _reduced(F.softplus(short) if smooth else F.relu(short), reduction)


def quadruplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    negative2: Tensor,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: str | float = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    anchor, positive = _scaled(anchor, normalize), _scaled(positive, normalize)
    negative, negative2 = _scaled(negative, normalize), _scaled(negative2, normalize)
    near, far = _distance(anchor, positive, distance), _distance(anchor, negative, distance)
    apart = _distance(negative, negative2, distance)
    return _reduced(F.relu(near - far + margin) + F.relu(near - apart + margin2), reduction)


def softmax_loss(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(
        logits, target.long(), label_smoothing=label_smoothing, reduction=reduction
    )


# -- two towers -----------------------------------------------------------------------------------


def info_nce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    decoupled: bool = False,
    hard_negatives: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    query, positive = _scaled(query, normalize), _scaled(positive, normalize)
    if negatives is not None:
        negatives = _scaled(negatives, normalize)
        near = (query * positive).sum(1, keepdim=True)
        far = query @ negatives.T if negatives.ndim == 2 else (negatives @ query[..., None])[..., 0]
        logits = torch.cat([near, far], dim=1) / temperature
        return cross_entropy(logits, torch.zeros_like(_range(query)), reduction)
    columns = positive
    if hard_negatives is not None:
        columns = torch.cat([positive, _scaled(hard_negatives.flatten(0, -2), normalize)])
    loss = _match(query @ columns.T / temperature, decoupled, reduction)
    if not symmetric:
        return loss
    return (loss + _match(positive @ query.T / temperature, decoupled, reduction)) / 2


def clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    normalize: bool = True,
    decoupled: bool = False,
) -> Tensor:
    logits = scale * _scaled(x, normalize) @ _scaled(y, normalize).T
    return (_match(logits, decoupled) + _match(logits.T, decoupled)) / 2


def clip_loss_two_products(x: Tensor, y: Tensor, *, scale: float | Tensor) -> Tensor:
    """One matrix product for each direction, as in open_clip."""
    x, y = F.normalize(x), F.normalize(y)
    return (_match(scale * x @ y.T) + _match(scale * y @ x.T)) / 2


def siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    normalize: bool = True,
) -> Tensor:
    logits = scale * _scaled(x, normalize) @ _scaled(y, normalize).T + bias
    sign = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


# -- a batch with labels --------------------------------------------------------------------------


def batch_contrastive_loss(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, distance: str = "euclidean"
) -> Tensor:
    d = _distances(x, distance)
    positive, negative = _kinds(labels)
    near = (positive * d**2).sum() / positive.sum()
    return near + (negative * F.relu(margin - d) ** 2).sum() / negative.sum()


def batch_cosine_loss(x: Tensor, labels: Tensor, *, margin: float = 0.0) -> Tensor:
    c = _products(x)
    positive, negative = _kinds(labels)
    near = (positive * (1 - c)).sum() / positive.sum()
    return near + (negative * F.relu(c - margin)).sum() / negative.sum()


def sup_con_loss(
    x: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    decoupled: bool = False,
) -> Tensor:
    z = _products(x, normalize) / temperature
    positive, negative = _kinds(labels)
    hidden = ~negative if decoupled else _itself(x)
    log_share = z - z.masked_fill(hidden, -inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    return -((positive * log_share).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()


def nt_xent_loss(
    x: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    decoupled: bool = False,
) -> Tensor:
    z = _products(x, normalize) / temperature
    positive, negative = _kinds(labels)
    of_negatives = z.masked_fill(~negative, -inf).logsumexp(1, keepdim=True)
    each = of_negatives - z if decoupled else excess(z, of_negatives)
    return (positive * each).sum() / positive.sum()


def multi_similarity_loss(
    x: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    normalize: bool = True,
) -> Tensor:
    s = _products(x, normalize)
    positive, negative = _kinds(labels)
    near = torch.log1p((positive * torch.exp(-alpha * (s - base))).sum(1)) / alpha
    far = torch.log1p((negative * torch.exp(beta * (s - base))).sum(1)) / beta
    return (near + far).mean()


def circle_loss(
    x: Tensor, labels: Tensor, *, margin: float = 0.25, scale: float = 256.0, normalize: bool = True
) -> Tensor:
    s = _products(x, normalize)
    near = -scale * F.relu(1 + margin - s.detach()) * (s - (1 - margin))
    far = scale * F.relu(s.detach() + margin) * (s - margin)
    return _mean_of_valid(F.softplus, near, far, labels)


def lifted_structure_loss(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, distance: str = "euclidean"
) -> Tensor:
    d = _distances(x, distance)
    return _mean_of_valid(F.relu, d, margin - d, labels)


def nca_loss(
    x: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 1.0,
    similarity: str = "sqeuclidean",
    normalize: bool = True,
) -> Tensor:
    if similarity == "sqeuclidean":
        z = -scale * _distances(F.normalize(x) if normalize else x, "sqeuclidean")
    else:
        z = scale * _products(x, normalize)
    positive, negative = _kinds(labels)
    near = z.masked_fill(~positive, -inf).logsumexp(1)
    every = z.masked_fill(~(positive | negative), -inf).logsumexp(1)
    return (every - near)[positive.any(1)].mean()


def lifted_pair_loss(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, distance: str = "euclidean"
) -> Tensor:
    d = _distances(x, distance)
    positive, negative = _kinds(labels)
    push = (margin - d).masked_fill(~negative, -inf).logsumexp(1)
    each = F.relu(d + torch.logaddexp(push[:, None], push)) ** 2 / 2
    return each[positive].sum() / positive.sum()


# -- proxies of classes ---------------------------------------------------------------------------


def proxy_softmax_loss(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 64.0,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    c = _to_classes(_scaled(x, normalize) @ _scaled(proxies.flatten(0, -2), normalize).T, proxies)
    if angle_margin or cosine_margin:
        own = c.gather(1, labels[:, None])
        turned = torch.cos(torch.acos(own) + angle_margin)
        # As in the authors' code: past pi - m the cosine would rise again, so go on linearly.
        past = own <= cos(pi - angle_margin)
        turned = torch.where(past, own - angle_margin * sin(angle_margin), turned)
        c = c.scatter(1, labels[:, None], turned - cosine_margin)
    return cross_entropy(scale * c, labels)


def proxy_nca_loss(
    x: Tensor, proxies: Tensor, labels: Tensor, *, scale: float | Tensor = 1.0
) -> Tensor:
    d = torch.cdist(F.normalize(x), F.normalize(proxies.flatten(0, -2))) ** 2
    closeness = -scale * -_to_classes(-d, proxies)
    own = F.one_hot(labels, len(proxies)).bool()
    return (closeness.masked_fill(own, -inf).logsumexp(1) - closeness[own]).mean()


def proxy_anchor_loss(
    x: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 0.1, scale: float = 32.0
) -> Tensor:
    s = F.normalize(x) @ F.normalize(proxies).T
    positive = F.one_hot(labels, len(proxies))
    near = torch.log1p((positive * torch.exp(-scale * (s - margin))).sum(0))
    far = torch.log1p(((1 - positive) * torch.exp(scale * (s + margin))).sum(0))
    return near.sum() / positive.any(0).sum() + far.mean()


def _to_classes(similarity: Tensor, proxies: Tensor) -> Tensor:
    """Of several proxies per class, the largest similarity."""
    if proxies.ndim == 2:
        return similarity
    return similarity.unflatten(1, proxies.shape[:2]).amax(2)


# -- what they are made of; benchmarks/accuracy.py has a more exact form of the first two ----------


def cross_entropy(z: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(z, target, reduction=reduction)


def excess(z: Tensor, others: Tensor) -> Tensor:
    """How much larger log(exp(z) + exp(others)) is than z."""
    return torch.logaddexp(z, others) - z


def _match(z: Tensor, decoupled: bool = False, reduction: str = "mean") -> Tensor:
    """The cross-entropy of the diagonal, which a decoupled loss leaves out of the sum."""
    if not decoupled:
        return cross_entropy(z, _range(z), reduction)
    itself = torch.eye(*z.shape, dtype=torch.bool, device=z.device)
    return _reduced(z.masked_fill(itself, -inf).logsumexp(1) - z.diagonal(), reduction)


def _mean_of_valid(
    hinge: Callable[[Tensor], Tensor], near: Tensor, far: Tensor, labels: Tensor
) -> Tensor:
    """The mean hinge of two log-sum-exps, over the anchors that have positives and negatives."""
    positive, negative = _kinds(labels)
    near = near.masked_fill(~positive, -inf).logsumexp(1)
    both = near + far.masked_fill(~negative, -inf).logsumexp(1)
    return hinge(both).sum() / (both > -inf).sum()


def _reduced(per_row: Tensor, reduction: str) -> Tensor:
    return per_row.mean() if reduction == "mean" else per_row


def _by_label(y: Tensor, similar: Tensor, dissimilar: Tensor) -> Tensor:
    """The loss of similar or dissimilar rows; a degree weighs both."""
    if y.dtype is torch.bool:
        return torch.where(y, similar, dissimilar)
    return y * similar + (1 - y) * dissimilar


def _scaled(x: Tensor, normalize: bool) -> Tensor:
    return F.normalize(x, dim=-1) if normalize else x


def _products(x: Tensor, normalize: bool = True) -> Tensor:
    x = _scaled(x, normalize)
    return x @ x.T


def _distance(a: Tensor, b: Tensor, name: str | float) -> Tensor:
    """(n,) of aligned rows; a number p is the p-norm."""
    if name == "cosine":
        return 1 - F.cosine_similarity(a, b)
    if name == "snr":
        return (a - b).var(1) / a.var(1)
    if name == "sqeuclidean":
        return (a - b).pow(2).sum(1)
    return (a - b).norm(p=_p(name), dim=1)


def _distances(x: Tensor, name: str | float) -> Tensor:
    """(n, n) of every two rows."""
    if name == "cosine":
        return 1 - _products(x)
    if name == "snr":
        return (x[:, None] - x).var(2) / x.var(1)[:, None]
    return torch.cdist(x, x) ** 2 if name == "sqeuclidean" else torch.cdist(x, x, p=_p(name))


def _p(name: str | float) -> float:
    return {"euclidean": 2.0, "manhattan": 1.0}[name] if isinstance(name, str) else name


def _kinds(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, n) masks of the positive and of the negative pairs."""
    same = labels[:, None] == labels
    return same & ~_itself(labels), ~same


def _itself(x: Tensor) -> Tensor:
    """(n, n) mask of the pairs of a row with itself."""
    return torch.eye(len(x), dtype=torch.bool, device=x.device)


def _range(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)
