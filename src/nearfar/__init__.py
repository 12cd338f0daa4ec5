"""Contrastive losses you can trust, and a tool from labelled items to a verifier.

Losses are functions (`contrastive_loss`) with a module of the same name (`ContrastiveLoss`).
`explain` shows what any of them does to each row of your data.

A name is loaded when it is first used (PEP 562), so that `import nearfar` loads no torch.
`__init__.pyi`, written by `tools/write_losses.py`, tells editors and type checkers what they are.
"""

from importlib import import_module
from types import ModuleType

from nearfar.registry import LOSSES as _LOSSES

__version__ = "0.2.0"

_NAMES = {
    "nearfar.cached.backward": ("cached_backward",),
    "nearfar.distance": ("cosine_similarity",),
    "nearfar.engine.budget": ("memory_budget",),
    "nearfar.engine.precision": ("precision",),
    "nearfar.insight.explain": ("explain",),
    "nearfar.insight.explanation": ("Explanation",),
    "nearfar.insight.forces": ("Forces", "forces"),
    "nearfar.losses": tuple(name for loss in _LOSSES for name in (loss.function, loss.module)),
    "nearfar.engine.closeness": ("Tile",),
    "nearfar.losses.per_pair": ("PairLosses", "per_pair"),
    "nearfar.losses.own": ("AnchorRule", "PairRule", "batch_loss"),
    "nearfar.engine.pair_sums": ("PairKernel",),
    "nearfar.losses.batch_tuples": (
        "QuadrupletStats",
        "TripletStats",
        "quadruplet_stats",
        "triplet_stats",
    ),
    "nearfar.memory": ("Drift", "MemoryBank", "momentum_update"),
    "nearfar.reference": ("Reference",),
    "nearfar.trained": ("load",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted((*_HOME, "distributed", "doctor", "mine"))


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
