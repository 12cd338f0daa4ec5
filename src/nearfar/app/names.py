"""Names of the command line, kept apart from the modules they refer to, which load slowly."""

from collections.abc import Mapping

from nearfar.registry import LOSSES, Data, find

GLYPHS = "glyphs"  # the built-in data set
AUTO = "auto"  # the built-in network that suits the data
# Libraries of pretrained encoders, as in --encoder timm:resnet18, and the modules that use them.
SENTENCE_TRANSFORMERS = "sentence-transformers"
PRETRAINED = {
    SENTENCE_TRANSFORMERS: "nearfar.app.train.encoders.texts",
    "timm": "nearfar.app.train.encoders.images",
    "torchvision": "nearfar.app.train.encoders.images",
}


FROM_LIBRARY, RANDOM = "pretrained", "random"  # weights, besides a file of them


def is_pretrained(encoder: str) -> bool:
    """Whether --encoder names a network of such a library."""
    return encoder.partition(":")[0] in PRETRAINED


def saves_itself(encoder: str) -> bool:
    """Whether a run holds the network as a folder that its own library opens."""
    return encoder.partition(":")[0] == SENTENCE_TRANSFORMERS


def takes_weights(encoder: str) -> bool:
    """Whether --weights is for this network."""
    return encoder.partition(":")[0] in ("timm", "torchvision")


# The losses that can be trained, named like their functions without "_loss", with the defaults of
# their hyperparameters, chosen for embeddings of length 1.
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
    "batch_triplet": {"margin": 0.3, "distance": "euclidean", "smooth": False},
    "batch_quadruplet": {"margin": 0.3, "margin2": 0.15, "distance": "euclidean"},
    "batch_cosine": {"margin": 0.3},
    "clip": {"scale": 10.0},
    "siglip": {"scale": 10.0, "bias": -5.0},
    "proxy_softmax": {"scale": 16.0, "angle_margin": 0.0, "cosine_margin": 0.0},
    "proxy_nca": {"scale": 8.0},
    "proxy_anchor": {"margin": 0.1, "scale": 32.0},
}
TRAINED = tuple(DEFAULTS)


def _first(data: Data) -> str:
    known = ((name, find(name)) for name in DEFAULTS)
    return next(name for name, loss in known if loss is not None and loss.data == data)


# The default losses: the first in the list that takes a batch, and the first that takes rows.
FOR_ITEMS, FOR_PAIRS = _first("batch"), _first("rows")

# The losses that `nearfar explain` shows; with this suffix, one takes distances in place of rows.
FROM_DISTANCE = "_from_distance"
ROW_LOSSES = tuple(
    loss.name for loss in LOSSES if loss.takes("rows") and not loss.function.endswith(FROM_DISTANCE)
)

KEEP, LEAVE_OUT, REFUSE = "keep", "leave-out", "refuse"  # what to do with single items
SINGLE = (KEEP, LEAVE_OUT, REFUSE)

LOGS = ("tensorboard", "wandb", "mlflow")  # where the course of a run may be written

# Options that may take several values in a sweep, and loss options of `nearfar explain`.
SWEPT = ("loss", "margin", "margin2", "temperature", "scale", "distance")
EXPLAINED = ("margin", "margin2", "temperature", "distance", "swap", "smooth", "label_smoothing")
