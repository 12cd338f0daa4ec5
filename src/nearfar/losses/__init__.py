"""The losses, one family a file; a function is its docstring (the paper), its checks and a rule."""

from nearfar.losses.batch_pair import (
    BatchContrastiveLoss,
    BatchCosineLoss,
    SigLIPLoss,
    batch_contrastive_loss,
    batch_cosine_loss,
    siglip_loss,
)
from nearfar.losses.batch_tuples import (
    BatchQuadrupletLoss,
    BatchTripletLoss,
    batch_quadruplet_loss,
    batch_triplet_loss,
)
from nearfar.losses.contrast import (
    CLIPLoss,
    NTXentLoss,
    SupConLoss,
    clip_loss,
    nt_xent_loss,
    sup_con_loss,
)
from nearfar.losses.info_nce import InfoNCELoss, info_nce_loss
from nearfar.losses.pair import (
    ContrastiveLoss,
    ContrastiveLossFromDistance,
    CosineLoss,
    contrastive_loss,
    contrastive_loss_from_distance,
    cosine_loss,
)
from nearfar.losses.proxy import (
    ProxyAnchorLoss,
    ProxyNCALoss,
    ProxySoftmaxLoss,
    proxy_anchor_loss,
    proxy_nca_loss,
    proxy_softmax_loss,
)
from nearfar.losses.softmax import SoftmaxLoss, softmax_loss
from nearfar.losses.tuples import QuadrupletLoss, TripletLoss, quadruplet_loss, triplet_loss
from nearfar.losses.weighted import (
    CircleLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
    circle_loss,
    lifted_structure_loss,
    multi_similarity_loss,
)

__all__ = [
    "BatchContrastiveLoss",
    "BatchCosineLoss",
    "BatchQuadrupletLoss",
    "BatchTripletLoss",
    "CLIPLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "ContrastiveLossFromDistance",
    "CosineLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "ProxySoftmaxLoss",
    "QuadrupletLoss",
    "SigLIPLoss",
    "SoftmaxLoss",
    "SupConLoss",
    "TripletLoss",
    "batch_contrastive_loss",
    "batch_cosine_loss",
    "batch_quadruplet_loss",
    "batch_triplet_loss",
    "circle_loss",
    "clip_loss",
    "contrastive_loss",
    "contrastive_loss_from_distance",
    "cosine_loss",
    "info_nce_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "nt_xent_loss",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "proxy_softmax_loss",
    "quadruplet_loss",
    "siglip_loss",
    "softmax_loss",
    "sup_con_loss",
    "triplet_loss",
]
