"""The losses for Keras 3, on JAX, TensorFlow and torch; it imports no torch of its own.

Written in `keras.ops`, with the formulas, means and edges of the torch functions of the same name.
"""

from nearfar.extras import needs

with needs("keras"):
    import keras as _  # noqa: F401

from nearfar.keras.batch import batch_triplet_loss, nt_xent_loss, sup_con_loss
from nearfar.keras.layers import Distance, LossLayer
from nearfar.keras.losses import (
    BatchTripletLoss,
    CLIPLoss,
    ContrastiveLoss,
    CosineLoss,
    InfoNCELoss,
    NTXentLoss,
    QuadrupletLoss,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
)
from nearfar.keras.pairs import contrastive_loss, cosine_loss, quadruplet_loss, triplet_loss
from nearfar.keras.towers import clip_loss, info_nce_loss, siglip_loss

__all__ = [
    "BatchTripletLoss",
    "CLIPLoss",
    "ContrastiveLoss",
    "CosineLoss",
    "Distance",
    "InfoNCELoss",
    "LossLayer",
    "NTXentLoss",
    "QuadrupletLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "batch_triplet_loss",
    "clip_loss",
    "contrastive_loss",
    "cosine_loss",
    "info_nce_loss",
    "nt_xent_loss",
    "quadruplet_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_loss",
]
