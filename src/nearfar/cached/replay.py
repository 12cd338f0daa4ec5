"""What makes a chunk encoded again equal the first time: random numbers, autocast, statistics."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn


def random_state() -> Callable[[], None]:
    """A function that brings back the present state of all random numbers.

    Those of torch on the CPU and on every accelerator in use, of NumPy and of Python: encoders draw
    from each of them.
    """
    states: list[Callable[[], object]] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(np.random.set_state, np.random.get_state()),
        partial(random.setstate, random.getstate()),
        *_accelerator_state(),
    ]

    def restore() -> None:
        for state in states:
            state()

    return restore


def _accelerator_state() -> list[Callable[[], object]]:
    if not torch.accelerator.is_available():
        return []
    module: Any = torch.get_device_module(torch.accelerator.current_accelerator())
    if hasattr(module, "is_initialized") and not module.is_initialized():
        return []
    if hasattr(module, "get_rng_state_all"):
        return [partial(module.set_rng_state_all, module.get_rng_state_all())]
    return [partial(module.set_rng_state, module.get_rng_state())]  # MPS: there is one device


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Leave the random numbers as they were."""
    restore = random_state()
    try:
        yield
    finally:
        restore()


@contextmanager
def without_autocast() -> Iterator[None]:
    """A backward inside the caller's autocast would round products that the forward did not."""
    with ExitStack() as stack:
        for kind in _kinds():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast_now() -> Callable[[], ExitStack]:
    """A function whose context is the present autocast, elsewhere and in another thread."""
    cache = torch.is_autocast_cache_enabled()
    found = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in _kinds()
    ]

    def again() -> ExitStack:
        with ExitStack() as stack:
            for kind, dtype, enabled in found:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            return stack.pop_all()

    return again


def _kinds() -> list[str]:
    """The kinds of devices that autocast knows here."""
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        kinds.append(str(torch.accelerator.current_accelerator()).partition(":")[0])
    return [kind for kind in kinds if torch.amp.is_autocast_available(kind)]


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a forward changes running statistics, as that of a batch norm in training does."""
    return module.training and bool(getattr(module, "track_running_stats", False))


@contextmanager
def kept_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave running statistics as they were: the first pass has counted each chunk."""
    kept = dict.fromkeys(module for module in modules if keeps_statistics(module))
    buffers = [buffer for module in kept for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
