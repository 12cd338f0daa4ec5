"""nearfar's losses and figures in sentence-transformers."""

from nearfar.extras import needs

with needs("st"):
    import sentence_transformers.base.losses.merged_forward as _  # noqa: F401

from nearfar.adapters.sentence_transformers.evaluator import LabelledPairs, VerificationEvaluator
from nearfar.adapters.sentence_transformers.loss import Loss

__all__ = ["LabelledPairs", "Loss", "VerificationEvaluator"]
