"""nearfar in scikit-learn: an embedding as a transformer, and a verifier of pairs."""

from nearfar.extras import needs

with needs("sklearn"):
    from nearfar.adapters.sklearn.embedding import SiameseEmbedding
    from nearfar.adapters.sklearn.verifier import PairVerifier

__all__ = ["PairVerifier", "SiameseEmbedding"]
