"""pytorch-metric-learning by nearfar: its losses and miners, and nearfar's losses for its wrappers.

One import line is all that changes in a program:

>>> from nearfar.adapters.pml import distances, losses, miners, reducers
>>> loss = losses.TripletMarginLoss(margin=0.2, distance=distances.CosineSimilarity())
>>> miner = miners.MultiSimilarityMiner(epsilon=0.1)

docs/from-pytorch-metric-learning.md sets every loss, miner, distance and reducer of the two
libraries side by side.
"""

from nearfar.adapters.pml import distances, losses, miners, reducers
from nearfar.adapters.pml.wrap import as_pml

__all__ = ["as_pml", "distances", "losses", "miners", "reducers"]
