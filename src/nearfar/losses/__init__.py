"""The losses, one family per file; a function is its docstring (the paper), its checks and a rule.

Written by tools/write_losses.py; do not edit.
"""

from nearfar.losses.batch_pair import batch_contrastive_loss, batch_cosine_loss, siglip_loss
from nearfar.losses.batch_tuples import batch_quadruplet_loss, batch_triplet_loss
from nearfar.losses.contrast import clip_loss, nca_loss, nt_xent_loss, sup_con_loss
from nearfar.losses.info_nce import info_nce_loss, n_pair_loss
from nearfar.losses.modules import (
    BatchContrastiveLoss,
    BatchCosineLoss,
    BatchQuadrupletLoss,
    BatchTripletLoss,
    CircleLoss,
    CLIPLoss,
    ContrastiveLoss,
    ContrastiveLossFromDistance,
    CosineLoss,
    InfoNCELoss,
    LiftedPairLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
    NCALoss,
    NPairLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    ProxySoftmaxLoss,
    QuadrupletLoss,
    SigLIPLoss,
    SoftmaxLoss,
    SupConLoss,
    TripletLoss,
)
from nearfar.losses.pair import contrastive_loss, contrastive_loss_from_distance, cosine_loss
from nearfar.losses.proxy import proxy_anchor_loss, proxy_nca_loss, proxy_softmax_loss
from nearfar.losses.softmax import softmax_loss
from nearfar.losses.tuples import quadruplet_loss, triplet_loss
from nearfar.losses.weighted import (
    circle_loss,
    lifted_pair_loss,
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
    "LiftedPairLoss",
    "LiftedStructureLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "NPairLoss",
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
    "lifted_pair_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "nca_loss",
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
