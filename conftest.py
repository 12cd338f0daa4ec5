"""Doctests of an adapter are collected only where its library is installed."""

from importlib.util import find_spec

ADAPTERS = {
    "src/nearfar/adapters/pml": "pytorch_metric_learning",
    "src/nearfar/adapters/sentence_transformers": "sentence_transformers",
    "src/nearfar/adapters/open_clip.py": "open_clip",
    "src/nearfar/adapters/sklearn": "sklearn",
    "src/nearfar/keras": "keras",
}

collect_ignore = [path for path, library in ADAPTERS.items() if find_spec(library) is None]
