"""pytorch-metric-learning by nearfar: its losses and miners, and nearfar's losses for its wrappers.

One import line is all that changes in a program:

>>> from nearfar.adapters.pml import distances, losses, miners, reducers
>>> loss = losses.TripletMarginLoss(margin=0.2, distance=distances.CosineSimilarity())
>>> miner = miners.MultiSimilarityMiner(epsilon=0.1)

Their regularizers, samplers, testers, trainers and utils can be imported from here too, and are
theirs. docs/from-pytorch-metric-learning.md sets every loss, miner, distance and reducer of the two
libraries side by side.
"""

from importlib import import_module
from types import ModuleType

from nearfar.adapters.pml import distances, losses, miners, reducers
from nearfar.adapters.pml.wrap import as_pml

__all__ = ["as_pml", "distances", "losses", "miners", "reducers"]

_THEIRS = ("regularizers", "samplers", "testers", "trainers", "utils")


def __getattr__(name: str) -> ModuleType:
    """A part of their library that nearfar leaves alone."""
    if name in _THEIRS:
        return import_module(f"pytorch_metric_learning.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
