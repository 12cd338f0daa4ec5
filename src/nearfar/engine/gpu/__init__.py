"""Executors for GPUs, by Triton kernels; imported only where one is used.

Which comparisons they take is written here and nowhere else: `takes`. All others run in plain torch
on the same device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from nearfar.engine.closeness import Closeness
from nearfar.engine.observe import force_visitors
from nearfar.engine.relation import Relation
from nearfar.engine.step import Request

# The oldest Triton that is tested, and the oldest cards that have its bfloat16 and TF32 products.
_TRITON, _CAPABILITY = (3, 6), (8, 0)

# Whether kernels run: where they can (None), on a CPU too, or nowhere.
_run: ContextVar[bool | None] = ContextVar("run", default=None)


def takes(request: Request, closeness: Closeness, relation: Relation) -> bool:
    """Whether kernels run a comparison.

    They take rows of float32 and less on NVIDIA GPUs from Ampere on, where Triton is installed;
    inner products, Euclidean and cosine distances; labels of every kind. They do not take float64,
    listed pairs, other distances, or a loss that somebody observes.
    """
    return (
        runs_on(request.a.device)
        and request.a.dtype is torch.float32
        and closeness.kernel is not None
        and relation.listed is None
        and not force_visitors()
    )


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    everywhere = _run.get()
    if everywhere is not None:
        return everywhere
    return device.type == "cuda" and _has_kernels(device)


@cache
def _has_kernels(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    try:
        known = version("triton")
    except PackageNotFoundError:
        return False
    return tuple(map(int, known.split(".")[:2])) >= _TRITON


@contextmanager
def running(everywhere: bool) -> Iterator[None]:
    """Run kernels on a CPU too, for tests under Triton's interpreter; or nowhere, to compare."""
    token = _run.set(everywhere)
    try:
        yield
    finally:
        _run.reset(token)
