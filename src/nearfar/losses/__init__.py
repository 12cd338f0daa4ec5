"""The losses, one family a file; a function is its docstring (the paper), a check and the rule."""

from nearfar.losses.pair import (
    ContrastiveLoss,
    ContrastiveLossFromDistance,
    CosineLoss,
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
)
from nearfar.losses.softmax import InfoNCELoss, SoftmaxLoss, info_nce_loss, softmax_loss
from nearfar.losses.tuples import QuadrupletLoss, TripletLoss, quadruplet_loss, triplet_loss

__all__ = [
    "ContrastiveLoss",
    "ContrastiveLossFromDistance",
    "CosineLoss",
    "InfoNCELoss",
    "QuadrupletLoss",
    "SoftmaxLoss",
    "TripletLoss",
    "contrastive_loss",
    "contrastive_loss_from_distance",
    "cosine_loss",
    "info_nce_loss",
    "quadruplet_loss",
    "softmax_loss",
    "triplet_loss",
]
