"""`pytorch_metric_learning.distances`: their classes, which the losses and miners here read.

A loss takes those that nearfar has: `LpDistance` with `power=1`, or with p = 2 and `power=2`;
`SNRDistance`, `CosineSimilarity` and `DotProductSimilarity`. Any other, a subclass too, is a
TypeError when the loss or the miner is made.

>>> from nearfar.adapters.pml import distances, losses
>>> loss = losses.NTXentLoss(distance=distances.LpDistance(power=2))
>>> losses.NTXentLoss(distance=distances.LpDistance(p=3))  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
TypeError: LpDistance(p=3, power=1, normalize_embeddings=True) is no similarity of nearfar's ...
"""

from nearfar.extras import needs

with needs("pml"):
    from pytorch_metric_learning.distances import (
        BaseDistance,
        BatchedDistance,
        CosineSimilarity,
        DotProductSimilarity,
        LpDistance,
        SNRDistance,
    )

__all__ = [
    "BaseDistance",
    "BatchedDistance",
    "CosineSimilarity",
    "DotProductSimilarity",
    "LpDistance",
    "SNRDistance",
]
