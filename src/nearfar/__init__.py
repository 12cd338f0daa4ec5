"""Contrastive losses you can trust, and a tool from labelled items to a verifier.

Losses are functions (`contrastive_loss`) with a module of the same name (`ContrastiveLoss`).
`explain` shows what any of them does to each row of your data.

A name is loaded when it is first used (PEP 562), so that `import nearfar` loads no torch.
`__init__.pyi` tells editors and type checkers what the names are.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.1"

_NAMES = {
    "nearfar.distance": ("cosine_similarity",),
    "nearfar.engine.budget": ("memory_budget",),
    "nearfar.explain": ("Explanation", "explain"),
    "nearfar.forces": ("Forces", "forces"),
    "nearfar.losses": (
        "BatchContrastiveLoss",
        "BatchCosineLoss",
        "BatchQuadrupletLoss",
        "BatchTripletLoss",
        "CircleLoss",
        "CLIPLoss",
        "ContrastiveLoss",
        "ContrastiveLossFromDistance",
        "CosineLoss",
        "InfoNCELoss",
        "LiftedStructureLoss",
        "MultiSimilarityLoss",
        "NTXentLoss",
        "ProxyAnchorLoss",
        "ProxyNCALoss",
        "ProxySoftmaxLoss",
        "QuadrupletLoss",
        "SigLIPLoss",
        "SoftmaxLoss",
        "SupConLoss",
        "TripletLoss",
        "batch_contrastive_loss",
        "batch_cosine_loss",
        "batch_quadruplet_loss",
        "batch_triplet_loss",
        "circle_loss",
        "clip_loss",
        "contrastive_loss",
        "contrastive_loss_from_distance",
        "cosine_loss",
        "info_nce_loss",
        "lifted_structure_loss",
        "multi_similarity_loss",
        "nt_xent_loss",
        "proxy_anchor_loss",
        "proxy_nca_loss",
        "proxy_softmax_loss",
        "quadruplet_loss",
        "siglip_loss",
        "softmax_loss",
        "sup_con_loss",
        "triplet_loss",
    ),
    "nearfar.losses.batch_tuples": ("QuadrupletStats", "TripletStats"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted((*_HOME, "doctor", "mine"))


def __getattr__(name: str) -> object:
    """A public name, or a submodule, when it is first used."""
    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
    else:
        value = _submodule(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _submodule(name: str) -> ModuleType:
    path = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(path)
    except ModuleNotFoundError as missing:
        if missing.name != path:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Whoever imports a submodule binds it to its name here; a function of that name stays."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
