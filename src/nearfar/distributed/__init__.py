"""Training on several processes: losses of all their rows, and which items each of them gets.

A loss with `group="world"` is that of the rows of all processes, with the gradients of one process
that holds them all; `over` says the rest, and `check` finds out whether a training step as a whole
keeps that promise. `samplers` deals batches of P classes x K items to the processes, from a data
set or a stream.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from nearfar.distributed.check import Check, Compared, check
from nearfar.distributed.group import over

if TYPE_CHECKING:
    from nearfar.distributed import samplers

__all__ = ["Check", "Compared", "check", "over", "samplers"]


def __getattr__(name: str) -> ModuleType:
    """A submodule, when it is first used."""
    if name == "samplers":
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
