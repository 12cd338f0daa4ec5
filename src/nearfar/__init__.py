"""Contrastive losses you can trust, and a tool from labelled items to a verifier.

Losses are functions (`contrastive_loss`) with a module of the same name (`ContrastiveLoss`).
`explain` shows what any of them does to each row of your data.
"""

from nearfar.distance import cosine_similarity
from nearfar.explain import Explanation, explain
from nearfar.losses import (
    ContrastiveLoss,
    ContrastiveLossFromDistance,
    CosineLoss,
    InfoNCELoss,
    QuadrupletLoss,
    SoftmaxLoss,
    TripletLoss,
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
    info_nce_loss,
    quadruplet_loss,
    softmax_loss,
    triplet_loss,
)

__version__ = "0.1.0"

__all__ = [
    "ContrastiveLoss",
    "ContrastiveLossFromDistance",
    "CosineLoss",
    "Explanation",
    "InfoNCELoss",
    "QuadrupletLoss",
    "SoftmaxLoss",
    "TripletLoss",
    "contrastive_loss",
    "contrastive_loss_from_distance",
    "cosine_loss",
    "cosine_similarity",
    "explain",
    "info_nce_loss",
    "quadruplet_loss",
    "softmax_loss",
    "triplet_loss",
]
