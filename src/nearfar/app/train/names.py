"""Names that the command line offers, apart from what they name, which takes seconds to load."""

from collections.abc import Mapping

from nearfar.registry import Data, find

GLYPHS = "glyphs"  # the data set that nearfar brings

# The losses that can be trained, by the names of their functions without "_loss", and their
# hyperparameters where the user sets none: values for embeddings of length 1.
DEFAULTS: Mapping[str, Mapping[str, str | float | bool]] = {
    "contrastive": {"margin": 1.0, "distance": "euclidean"},
    "cosine": {"margin": 0.3},
    "triplet": {"margin": 0.5, "distance": "euclidean", "swap": False, "smooth": False},
    "quadruplet": {"margin": 0.5, "margin2": 0.25, "distance": "euclidean"},
    "info_nce": {"temperature": 0.1},
    "softmax": {"temperature": 0.0625, "label_smoothing": 0.0},
    "sup_con": {"temperature": 0.1},
    "nt_xent": {"temperature": 0.1},
    "multi_similarity": {"alpha": 2.0, "beta": 50.0, "base": 0.5},
    "circle": {"margin": 0.25, "scale": 64.0},
    "lifted_structure": {"margin": 1.0, "distance": "euclidean"},
    "batch_contrastive": {"margin": 1.0, "distance": "euclidean"},
    "batch_triplet": {"margin": 0.3, "distance": "euclidean"},
    "batch_quadruplet": {"margin": 0.3, "margin2": 0.15, "distance": "euclidean"},
    "batch_cosine": {"margin": 0.3},
    "clip": {"scale": 10.0},
    "siglip": {"scale": 10.0, "bias": -5.0},
    "proxy_softmax": {"scale": 16.0, "angle_margin": 0.0, "cosine_margin": 0.0},
    "proxy_nca": {"scale": 8.0},
    "proxy_anchor": {"margin": 0.1, "scale": 32.0},
}
LOSSES = tuple(DEFAULTS)


def _first(data: Data) -> str:
    found = ((name, find(name)) for name in DEFAULTS)
    return next(name for name, loss in found if loss is not None and loss.data == data)


# Where no loss is named, the first in this list that takes a batch, or rows such as pairs.
FOR_ITEMS, FOR_PAIRS = _first("batch"), _first("rows")

KEEP, LEAVE_OUT, REFUSE = "keep", "leave-out", "refuse"  # what becomes of a single item
SINGLE = (KEEP, LEAVE_OUT, REFUSE)

# Options that may have several values in a sweep, and those of the losses that explain a table.
SWEPT = ("loss", "margin", "margin2", "temperature", "scale", "distance")
EXPLAINED = ("margin", "margin2", "temperature", "distance", "swap", "smooth", "label_smoothing")
