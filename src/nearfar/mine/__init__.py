"""Miners: select which rows of a batch or of a reference to compare, for use with any loss.

Rows and pairs that are found are what the losses take as `pairs`, and triplets what
`batch_triplet_loss` takes as `triplets`.

Most miners take the Euclidean distance of the rows as they are, unless `normalize=True` or
distance="cosine" is passed. Losses of similarities compare cosines: for them, pass one of the two.
(`multi_similarity_pairs` and `corpus_negatives` take cosines, and `distance_weighted_negatives`
rows of length 1.)

`corpus_negatives` searches a corpus of any size; the others compare the rows of a batch.

With `group=`, each process finds rows, pairs or triplets of its own anchors among the rows of all,
as a loss with the same `group` takes them: anchors count the rows of this process, other rows those
of all.

Miners work on blocks of rows, so no (n, m) matrix is ever held. They return int64 indices whatever
the dtype of the labels, and the same result for the same input and generator. Results have no
gradient.
"""

from nearfar.listed import Found, FoundPairs
from nearfar.mine.corpus import corpus_negatives
from nearfar.mine.mined import CorpusNegatives, LeftOut
from nearfar.mine.pairs import (
    hard_pairs,
    multi_similarity_pairs,
    uniform_pairs,
    violating_pairs,
)
from nearfar.mine.rows import distance_weighted_negatives, hard_negatives, hard_positives
from nearfar.mine.triplets import (
    angular_triplets,
    easy_hard_triplets,
    semihard_triplets,
    violating_triplets,
)

__all__ = [
    "CorpusNegatives",
    "Found",
    "FoundPairs",
    "LeftOut",
    "angular_triplets",
    "corpus_negatives",
    "distance_weighted_negatives",
    "easy_hard_triplets",
    "hard_negatives",
    "hard_pairs",
    "hard_positives",
    "multi_similarity_pairs",
    "semihard_triplets",
    "uniform_pairs",
    "violating_pairs",
    "violating_triplets",
]
