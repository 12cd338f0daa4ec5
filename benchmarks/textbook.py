"""Every loss as a textbook or the first search result has it: dense torch, autograd, the mean.

Arguments and hyperparameters have the same names as in nearfar, so that benchmarks can call both
alike.
"""

from math import cos, inf, pi, sin

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """The mean over the rows."""
    return F.cross_entropy(z, target)


def excess(z: Tensor, others: Tensor) -> Tensor:
    """How much larger log(exp(z) + exp(others)) is than z."""
    return torch.logaddexp(z, others) - z


def contrastive_loss(x1: Tensor, x2: Tensor, y: Tensor, *, margin: float) -> Tensor:
    return contrastive_loss_from_distance((x1 - x2).norm(dim=1), y, margin=margin)


def contrastive_loss_from_distance(d: Tensor, y: Tensor, *, margin: float) -> Tensor:
    return torch.where(y, d**2, F.relu(margin - d) ** 2).mean()


def cosine_loss(x1: Tensor, x2: Tensor, y: Tensor, *, margin: float) -> Tensor:
    c = F.cosine_similarity(x1, x2)
    return torch.where(y, 1 - c, F.relu(c - margin)).mean()


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float) -> Tensor:
    near, far = (anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1)
    return F.relu(near - far + margin).mean()


def quadruplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    negative2: Tensor,
    *,
    margin: float,
    margin2: float,
) -> Tensor:
    near, far = (anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1)
    apart = (negative - negative2).norm(dim=1)
    return (F.relu(near - far + margin) + F.relu(near - apart + margin2)).mean()


def softmax_loss(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target)


def info_nce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
) -> Tensor:
    query, positive = F.normalize(query), F.normalize(positive)
    if negatives is None:
        return cross_entropy(query @ positive.T / temperature, _range(query))
    negatives = F.normalize(negatives, dim=-1)
    near = (query * positive).sum(1, keepdim=True)
    far = query @ negatives.T if negatives.ndim == 2 else (negatives @ query[..., None])[..., 0]
    logits = torch.cat([near, far], dim=1) / temperature
    return cross_entropy(logits, torch.zeros_like(_range(query)))


def clip_loss(x: Tensor, y: Tensor, *, scale: float | Tensor) -> Tensor:
    logits = scale * F.normalize(x) @ F.normalize(y).T
    target = _range(x)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def clip_loss_two_products(x: Tensor, y: Tensor, *, scale: float | Tensor) -> Tensor:
    """One matrix product for each direction, as in open_clip."""
    x, y = F.normalize(x), F.normalize(y)
    target = _range(x)
    to_y, to_x = scale * x @ y.T, scale * y @ x.T
    return (cross_entropy(to_y, target) + cross_entropy(to_x, target)) / 2


def siglip_loss(x: Tensor, y: Tensor, *, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    logits = scale * F.normalize(x) @ F.normalize(y).T + bias
    sign = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


def sup_con_loss(x: Tensor, labels: Tensor, *, temperature: float | Tensor) -> Tensor:
    z = _cosines(x) / temperature
    positive, _ = _kinds(labels)
    log_share = z - _without_self(z).logsumexp(1, keepdim=True)
    return -((positive * log_share).sum(1) / positive.sum(1)).mean()


def nt_xent_loss(x: Tensor, labels: Tensor, *, temperature: float | Tensor) -> Tensor:
    z = _cosines(x) / temperature
    positive, negative = _kinds(labels)
    of_negatives = z.masked_fill(~negative, -inf).logsumexp(1, keepdim=True)
    return (positive * excess(z, of_negatives)).sum() / positive.sum()


def batch_contrastive_loss(x: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    d = torch.cdist(x, x)
    positive, negative = _kinds(labels)
    near = (positive * d**2).sum() / positive.sum()
    return near + (negative * F.relu(margin - d) ** 2).sum() / negative.sum()


def batch_cosine_loss(x: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    c = _cosines(x)
    positive, negative = _kinds(labels)
    near = (positive * (1 - c)).sum() / positive.sum()
    return near + (negative * F.relu(c - margin)).sum() / negative.sum()


def multi_similarity_loss(
    x: Tensor, labels: Tensor, *, alpha: float, beta: float, base: float
) -> Tensor:
    s = _cosines(x)
    positive, negative = _kinds(labels)
    near = torch.log1p((positive * torch.exp(-alpha * (s - base))).sum(1)) / alpha
    far = torch.log1p((negative * torch.exp(beta * (s - base))).sum(1)) / beta
    return (near + far).mean()


def circle_loss(x: Tensor, labels: Tensor, *, margin: float, scale: float) -> Tensor:
    s = _cosines(x)
    positive, negative = _kinds(labels)
    near = -scale * F.relu(1 + margin - s.detach()) * (s - (1 - margin))
    far = scale * F.relu(s.detach() + margin) * (s - margin)
    near = near.masked_fill(~positive, -inf).logsumexp(1)
    return F.softplus(near + far.masked_fill(~negative, -inf).logsumexp(1)).mean()


def lifted_structure_loss(x: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    d = torch.cdist(x, x)
    positive, negative = _kinds(labels)
    near = d.masked_fill(~positive, -inf).logsumexp(1)
    return F.relu(near + (margin - d).masked_fill(~negative, -inf).logsumexp(1)).mean()


def proxy_softmax_loss(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
) -> Tensor:
    c = F.normalize(x) @ F.normalize(proxies).T
    if angle_margin or cosine_margin:
        own = c.gather(1, labels[:, None])
        turned = torch.cos(torch.acos(own) + angle_margin)
        past = own <= cos(pi - angle_margin)
        turned = torch.where(past, own - angle_margin * sin(angle_margin), turned)
        c = c.scatter(1, labels[:, None], turned - cosine_margin)
    return cross_entropy(scale * c, labels)


def proxy_nca_loss(x: Tensor, proxies: Tensor, labels: Tensor, *, scale: float | Tensor) -> Tensor:
    closeness = -scale * torch.cdist(F.normalize(x), F.normalize(proxies)) ** 2
    own = F.one_hot(labels, len(proxies)).bool()
    return (closeness.masked_fill(own, -inf).logsumexp(1) - closeness[own]).mean()


def proxy_anchor_loss(
    x: Tensor, proxies: Tensor, labels: Tensor, *, margin: float, scale: float
) -> Tensor:
    s = F.normalize(x) @ F.normalize(proxies).T
    positive = F.one_hot(labels, len(proxies))
    near = torch.log1p((positive * torch.exp(-scale * (s - margin))).sum(0))
    far = torch.log1p(((1 - positive) * torch.exp(scale * (s + margin))).sum(0))
    return near.sum() / positive.any(0).sum() + far.mean()


def _cosines(x: Tensor) -> Tensor:
    x = F.normalize(x)
    return x @ x.T


def _kinds(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, n) masks of the positive and of the negative pairs."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


def _without_self(z: Tensor) -> Tensor:
    return z.masked_fill(torch.eye(len(z), dtype=torch.bool), -inf)


def _range(x: Tensor) -> Tensor:
    return torch.arange(len(x))
