"""Contrastive losses you can trust."""

from nearfar.distance import cosine_similarity
from nearfar.losses import *  # noqa: F403
from nearfar.losses import __all__ as _losses

__version__ = "0.1.0"
__all__ = ["cosine_similarity", *_losses]
