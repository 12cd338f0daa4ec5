"""nearfar in scikit-learn: an embedding as a transformer."""

from nearfar.extras import needs

with needs("sklearn"):
    from nearfar.adapters.sklearn.embedding import SiameseEmbedding

__all__ = ["SiameseEmbedding"]
