"""Every aligned loss as a textbook or a first search result has it: the formula in plain torch.

The yardstick of the fourth point of the numbers contract: an error of ours, measured against
float64, may not exceed twice the error of these.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def contrastive(
    x1: Tensor, x2: Tensor, similar: Tensor, *, margin: float = 1.0, distance: str = "euclidean"
) -> Tensor:
    return contrastive_from_distance(_distance(x1, x2, distance), similar, margin=margin)


def contrastive_from_distance(d: Tensor, similar: Tensor, *, margin: float = 1.0) -> Tensor:
    return similar * d**2 + (1 - similar) * F.relu(margin - d) ** 2


def cosine_similarity(x1: Tensor, x2: Tensor) -> Tensor:
    return F.cosine_similarity(x1, x2)


def cosine(x1: Tensor, x2: Tensor, similar: Tensor | None = None, *, margin: float = 0.0) -> Tensor:
    cos = F.cosine_similarity(x1, x2)
    if similar is None:
        return 1 - cos
    return similar * (1 - cos) + (1 - similar) * F.relu(cos - margin)


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 1.0,
    distance: str = "euclidean",
    swap: bool = False,
    smooth: bool = False,
) -> Tensor:
    near, far = _distance(anchor, positive, distance), _distance(anchor, negative, distance)
    if swap:
        far = torch.minimum(far, _distance(positive, negative, distance))
    return F.softplus(near - far + margin) if smooth else F.relu(near - far + margin)


def quadruplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    negative2: Tensor,
    *,
    margin: float = 1.0,
    margin2: float = 0.5,
    distance: str = "euclidean",
) -> Tensor:
    near, far = _distance(anchor, positive, distance), _distance(anchor, negative, distance)
    apart = _distance(negative, negative2, distance)
    return F.relu(near - far + margin) + F.relu(near - apart + margin2)


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.07,
    normalize: bool = True,
) -> Tensor:
    if normalize:
        query, positive = F.normalize(query), F.normalize(positive)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    if negatives is None:
        target = torch.arange(len(query))
        return F.cross_entropy(query @ positive.T / temperature, target, reduction="none")
    to_positive = (query * positive).sum(1, keepdim=True)
    if negatives.ndim == 2:
        to_negatives = query @ negatives.T
    else:
        to_negatives = torch.einsum("nd,nmd->nm", query, negatives)
    logits = torch.cat([to_positive, to_negatives], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long), reduction="none")


def softmax(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, target.long(), label_smoothing=label_smoothing, reduction="none")


def _distance(a: Tensor, b: Tensor, name: str) -> Tensor:
    if name == "cosine":
        return 1 - F.cosine_similarity(a, b)
    return (a - b).norm(dim=1) if name == "euclidean" else (a - b).pow(2).sum(1)
