"""Where the GPU kernels run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

# The oldest Triton that is tested, and the oldest cards that have its bfloat16 and TF32 products.
_TRITON, _CAPABILITY = (3, 6), (8, 0)

# None: where they can; else on every device, or on none.
_everywhere: ContextVar[bool | None] = ContextVar("everywhere", default=None)


def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels run on a device: on NVIDIA GPUs from Ampere on, if Triton is installed."""
    everywhere = _everywhere.get()
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
def running_kernels(*, everywhere: bool) -> Iterator[None]:
    """Run kernels on a CPU too, for tests under Triton's interpreter; or nowhere, to compare."""
    token = _everywhere.set(everywhere)
    try:
        yield
    finally:
        _everywhere.reset(token)
