"""How good an embedding is: verification, thresholds, retrieval, and the shape of the space.

Everything runs on torch and NumPy. Only the two calibrated probabilities load scikit-learn, and
only `approximate_nearest` loads usearch.
"""

from nearfar.evaluate.difference import Difference, difference
from nearfar.evaluate.every_pair import EveryPair, FarPair, every_pair
from nearfar.evaluate.intervals import Interval
from nearfar.evaluate.nearest import approximate_nearest, nearest
from nearfar.evaluate.neighbours import Neighbours, Pair, Suspect, neighbours
from nearfar.evaluate.pairs import sample_pairs
from nearfar.evaluate.probability import (
    IsotonicProbability,
    PlattProbability,
    isotonic_probability,
    platt_probability,
    probability_from,
)
from nearfar.evaluate.reliability import Reliability, ReliabilityBin, reliability
from nearfar.evaluate.retrieval import Figures, Retrieval, retrieval, retrieval_of
from nearfar.evaluate.shape import Shape, shape
from nearfar.evaluate.threshold import AtThreshold, DecisionIntervals, at_threshold, fit_threshold
from nearfar.evaluate.verification import Best, Curve, Intervals, Verification, verification

__all__ = [
    "AtThreshold",
    "Best",
    "Curve",
    "DecisionIntervals",
    "Difference",
    "EveryPair",
    "FarPair",
    "Figures",
    "Interval",
    "Intervals",
    "IsotonicProbability",
    "Neighbours",
    "Pair",
    "PlattProbability",
    "Reliability",
    "ReliabilityBin",
    "Retrieval",
    "Shape",
    "Suspect",
    "Verification",
    "approximate_nearest",
    "at_threshold",
    "difference",
    "every_pair",
    "fit_threshold",
    "isotonic_probability",
    "nearest",
    "neighbours",
    "platt_probability",
    "probability_from",
    "reliability",
    "retrieval",
    "retrieval_of",
    "sample_pairs",
    "shape",
    "verification",
]
