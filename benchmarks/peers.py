"""The losses of other libraries, with hyperparameters named as in nearfar.

    pip install pytorch-metric-learning sentence-transformers
    pip install memeff siglip-kernel inf-cl                     # on a GPU

Each function takes the data and hyperparameters of a case and returns the loss as a call without
arguments. Libraries are imported inside the functions, so that a process loads only what it
measures.
"""

from collections.abc import Callable
from math import degrees
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Loss = Callable[[], Tensor]


def ranking(query: Tensor, positive: Tensor, *, temperature: float) -> Loss:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    no_encoder: Any = None  # the loss is applied to embeddings
    loss = MultipleNegativesRankingLoss(no_encoder, scale=1 / temperature)
    unused = torch.zeros(len(query))
    return lambda: loss.compute_loss_from_embeddings([query, positive], unused)


def sup_con(x: Tensor, labels: Tensor, *, temperature: float) -> Loss:
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    return _on(SupConLoss(temperature=temperature, reducer=MeanReducer()), x, labels)


def nt_xent(x: Tensor, labels: Tensor, *, temperature: float) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    return _on(NTXentLoss(temperature=temperature), x, labels)


def contrastive(x: Tensor, labels: Tensor, *, margin: float) -> Loss:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import ContrastiveLoss
    from pytorch_metric_learning.reducers import MeanReducer

    distance = LpDistance(normalize_embeddings=False)
    return _on(
        ContrastiveLoss(neg_margin=margin, distance=distance, reducer=MeanReducer()), x, labels
    )


def multi_similarity(x: Tensor, labels: Tensor, *, alpha: float, beta: float, base: float) -> Loss:
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    return _on(MultiSimilarityLoss(alpha=alpha, beta=beta, base=base), x, labels)


def circle(x: Tensor, labels: Tensor, *, margin: float, scale: float) -> Loss:
    from pytorch_metric_learning.losses import CircleLoss
    from pytorch_metric_learning.reducers import MeanReducer

    return _on(CircleLoss(m=margin, gamma=scale, reducer=MeanReducer()), x, labels)


def lifted_structure(x: Tensor, labels: Tensor, *, margin: float) -> Loss:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import GeneralizedLiftedStructureLoss

    distance = LpDistance(normalize_embeddings=False)
    return _on(GeneralizedLiftedStructureLoss(neg_margin=margin, distance=distance), x, labels)


def normalized_softmax(x: Tensor, proxies: Tensor, labels: Tensor, *, scale: float) -> Loss:
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    loss = NormalizedSoftmaxLoss(*proxies.shape, temperature=1 / scale)
    return _on(_with_weight(loss, proxies), x, labels)


def arc_face(
    x: Tensor, proxies: Tensor, labels: Tensor, *, scale: float, angle_margin: float
) -> Loss:
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(*proxies.shape, margin=degrees(angle_margin), scale=scale)
    return _on(_with_weight(loss, proxies), x, labels)


def cos_face(
    x: Tensor, proxies: Tensor, labels: Tensor, *, scale: float, cosine_margin: float
) -> Loss:
    from pytorch_metric_learning.losses import CosFaceLoss

    loss = CosFaceLoss(*proxies.shape, margin=cosine_margin, scale=scale)
    return _on(_with_weight(loss, proxies), x, labels)


def proxy_anchor(
    x: Tensor, proxies: Tensor, labels: Tensor, *, margin: float, scale: float
) -> Loss:
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    loss = ProxyAnchorLoss(*proxies.shape, margin=margin, alpha=scale)
    loss.proxies = nn.Parameter(proxies.detach().clone())
    return _on(loss, x, labels)


def memeff(x: Tensor, y: Tensor, *, scale: float) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # `stable` would give another gradient, scaled by the size of the batch.
    loss = MemoryEfficientCLIPLoss(temperature=1 / scale, stable=False)
    return lambda: loss(x, y)


def siglip_kernel(x: Tensor, y: Tensor, *, scale: Tensor, bias: Tensor) -> Loss:
    from siglip_kernel import fused_siglip_loss

    def call() -> Tensor:
        return fused_siglip_loss(F.normalize(x), F.normalize(y), scale.float().log(), bias.float())

    return call


def inf_cl(x: Tensor, y: Tensor, *, scale: float) -> Loss:
    """Inf-CL on one device, which takes rows in heads and one direction at a time."""
    from inf_cl import cal_flash_loss

    head = min(256, x.shape[1])

    def call() -> Tensor:
        a, b = F.normalize(x), F.normalize(y)
        both = (cal_flash_loss(*sides, scale=scale, head_dim=head) for sides in ((a, b), (b, a)))
        return torch.cat(list(both)).mean()

    return call


def _with_weight(loss: Any, proxies: Tensor) -> Any:
    loss.W = nn.Parameter(proxies.detach().T.clone())  # a column per proxy
    return loss


def _on(loss: Any, x: Tensor, labels: Tensor) -> Loss:
    def call() -> Tensor:
        loss.zero_grad()  # of the proxies, which the module holds
        value: Tensor = loss(x, labels)
        return value

    return call
