"""Doctests of what needs a library are collected only where it is installed."""

from importlib.util import find_spec

NEEDS = {
    "src/nearfar/adapters/pml": "pytorch_metric_learning",
    "src/nearfar/adapters/sentence_transformers": "sentence_transformers",
    "src/nearfar/adapters/open_clip.py": "open_clip",
    "src/nearfar/adapters/sklearn": "sklearn",
    "src/nearfar/keras": "keras",
    "src/nearfar/app/export": "onnxruntime",
    "src/nearfar/app/train/encoders/from_timm.py": "timm",
    "src/nearfar/app/train/encoders/from_torchvision.py": "torchvision",
}

collect_ignore = [path for path, library in NEEDS.items() if find_spec(library) is None]
