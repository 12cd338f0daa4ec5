"""The whole-batch losses as a first search result has them: the full matrix in plain torch.

The yardstick of the fourth point of the numbers contract, and of nothing else. Arguments are those
of the public functions, class ids only; each returns the mean.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def batch_contrastive(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, distance: str = "euclidean"
) -> Tensor:
    positive, negative = _masks(labels)
    d = _distances(x, distance)
    return d[positive].square().mean() + F.relu(margin - d[negative]).square().mean()


def batch_cosine(x: Tensor, labels: Tensor, *, margin: float = 0.0) -> Tensor:
    positive, negative = _masks(labels)
    x = F.normalize(x)
    cos = x @ x.T
    return (1 - cos[positive]).mean() + F.relu(cos[negative] - margin).mean()


def siglip(x: Tensor, y: Tensor, *, scale: Tensor, bias: Tensor, normalize: bool = True) -> Tensor:
    z = scale * _products(x, y, normalize) + bias
    sign = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(sign * z).sum() / len(x)


def clip(
    x: Tensor, y: Tensor, *, scale: Tensor, normalize: bool = True, decoupled: bool = False
) -> Tensor:
    z = scale * _products(x, y, normalize)
    return (_match(z, decoupled) + _match(z.T, decoupled)) / 2


def info_nce(
    query: Tensor,
    positive: Tensor,
    *,
    temperature: Tensor | float = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    decoupled: bool = False,
    hard_negatives: Tensor | None = None,
) -> Tensor:
    columns = positive
    if hard_negatives is not None:
        columns = torch.cat([positive, hard_negatives.flatten(0, -2)])
    there = _match(_products(query, columns, normalize) / temperature, decoupled)
    if not symmetric:
        return there
    return (there + _match(_products(positive, query, normalize) / temperature, decoupled)) / 2


def nt_xent(
    x: Tensor,
    labels: Tensor,
    *,
    temperature: Tensor | float = 0.5,
    normalize: bool = True,
    decoupled: bool = False,
) -> Tensor:
    positive, negative = _masks(labels)
    z = _products(x, x, normalize) / temperature
    i, p = positive.nonzero(as_tuple=True)
    of_negatives = z.masked_fill(~negative, -torch.inf)[i]
    above = of_negatives if decoupled else torch.cat([z[i, p][:, None], of_negatives], 1)
    return (above.logsumexp(1) - z[i, p]).mean()


def sup_con(
    x: Tensor,
    labels: Tensor,
    *,
    temperature: Tensor | float = 0.1,
    normalize: bool = True,
    decoupled: bool = False,
) -> Tensor:
    """As in the authors' code, which subtracts the detached maximum of each row."""
    positive, negative = _masks(labels)
    z = _products(x, x, normalize) / temperature
    z = z - z.max(1, keepdim=True).values.detach()
    seen = negative if decoupled else positive | negative
    log_prob = z - (z.exp() * seen).sum(1, keepdim=True).log()
    per_row = -(positive * log_prob).sum(1) / positive.sum(1).clamp(min=1)
    return per_row[positive.any(1)].mean()


def multi_similarity(
    x: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    normalize: bool = True,
) -> Tensor:
    positive, negative = _masks(labels)
    s = _products(x, x, normalize)
    near = (1 + ((-alpha * (s - base)).exp() * positive).sum(1)).log() / alpha
    far = (1 + ((beta * (s - base)).exp() * negative).sum(1)).log() / beta
    return (near + far).mean()


def circle(
    x: Tensor, labels: Tensor, *, margin: float = 0.25, scale: float = 256.0, normalize: bool = True
) -> Tensor:
    positive, negative = _masks(labels)
    s = _products(x, x, normalize)
    near = -scale * F.relu(1 + margin - s.detach()) * (s - (1 - margin))
    far = scale * F.relu(s.detach() + margin) * (s - margin)
    per_row = F.softplus(_log_sum(near, positive) + _log_sum(far, negative))
    return per_row[positive.any(1) & negative.any(1)].mean()


def lifted_structure(
    x: Tensor, labels: Tensor, *, margin: float = 1.0, distance: str = "euclidean"
) -> Tensor:
    positive, negative = _masks(labels)
    d = _distances(x, distance)
    per_row = F.relu(_log_sum(d, positive) + _log_sum(margin - d, negative))
    return per_row[positive.any(1) & negative.any(1)].mean()


def proxy_softmax(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    scale: Tensor | float = 64.0,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
) -> Tensor:
    cos = F.normalize(x) @ F.normalize(proxies).T
    margin = torch.tensor(angle_margin)
    sine = (1 - cos.square()).clamp(0, 1).sqrt()
    turned = cos * margin.cos() - sine * margin.sin()
    # As in the authors' code: past pi - m the cosine would rise again, so go on linearly.
    turned = torch.where(cos > (torch.pi - margin).cos(), turned, cos - margin * margin.sin())
    target = F.one_hot(labels, len(proxies)).bool()
    logits = torch.where(target, (turned if angle_margin else cos) - cosine_margin, cos)
    return F.cross_entropy(scale * logits, labels)


def proxy_nca(x: Tensor, proxies: Tensor, labels: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
    d = torch.cdist(F.normalize(x), F.normalize(proxies)).square()
    target = F.one_hot(labels, len(proxies)).bool()
    return (scale * d[target] + _log_sum(-scale * d, ~target)).mean()


def proxy_anchor(
    x: Tensor, proxies: Tensor, labels: Tensor, *, margin: float = 0.1, scale: float = 32.0
) -> Tensor:
    cos = F.normalize(proxies) @ F.normalize(x).T
    positive = F.one_hot(labels, len(proxies)).bool().T
    near = (1 + ((-scale * (cos - margin)).exp() * positive).sum(1)).log()
    far = (1 + ((scale * (cos + margin)).exp() * ~positive).sum(1)).log()
    return near.sum() / positive.any(1).sum() + far.mean()


def _masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool)
    return same & ~itself, ~same


def _products(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    return F.normalize(x) @ F.normalize(y).T if normalize else x @ y.T


def _distances(x: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1 - _products(x, x, True)
    d = torch.cdist(x, x)
    return d if distance == "euclidean" else d.square()


def _match(z: Tensor, decoupled: bool) -> Tensor:
    if not decoupled:
        return F.cross_entropy(z, torch.arange(len(z)))
    match = z.diagonal()
    itself = torch.eye(*z.shape, dtype=torch.bool)
    return (z.masked_fill(itself, -torch.inf).logsumexp(1) - match).mean()


def _log_sum(terms: Tensor, who: Tensor) -> Tensor:
    return terms.masked_fill(~who, -torch.inf).logsumexp(1)
