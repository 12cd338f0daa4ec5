"""Where the GPU kernels run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

# The oldest Triton that is tested, the oldest torch that adds a product of 16 bits to float32, and
# the oldest cards that have bfloat16 and TF32 products.
_TRITON, _TORCH, _CAPABILITY = (3, 6), (2, 10), (8, 0)
_ON_B200 = (3, 7)  # for which Triton 3.6 cannot compile some of them

# None: where they can; else on every device, or on none.
_everywhere: ContextVar[bool | None] = ContextVar("everywhere", default=None)


def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels run on a device: on NVIDIA GPUs from Ampere on, if Triton works there."""
    everywhere = _everywhere.get()
    if everywhere is not None:
        return everywhere
    return device.type == "cuda" and _has_kernels(device)


@cache
def _has_kernels(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < _CAPABILITY:
        return False
    oldest = _ON_B200 if capability[0] == 10 else _TRITON
    try:
        new = _version(version("triton")) >= oldest and _version(torch.__version__) >= _TORCH
    except PackageNotFoundError:
        return False
    return new and _triton_works()


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


def _triton_works() -> bool:
    """Whether Triton finds what it needs, such as a C compiler; if not, a warning says so."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever it is, plain torch is there
        warnings.warn(
            f"nearfar runs without its GPU kernels, since Triton does not work here: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@contextmanager
def running_kernels(*, everywhere: bool) -> Iterator[None]:
    """Run kernels on a CPU too, for tests under Triton's interpreter; or nowhere, to compare."""
    token = _everywhere.set(everywhere)
    try:
        yield
    finally:
        _everywhere.reset(token)
