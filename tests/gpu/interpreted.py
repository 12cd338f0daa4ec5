"""Run the kernels here: on CPU tensors, in Triton's interpreter (tests/conftest.py asks for it)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nearfar.engine import gpu


@pytest.fixture
def kernels() -> Iterator[None]:
    """Losses run by the kernels, with tiles so small that there are several."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    from nearfar.engine.gpu.language import INTERPRETED

    if not INTERPRETED:
        pytest.skip("Triton compiles: unset TRITON_INTERPRET=0")
    with interpreted():
        yield


@contextmanager
def interpreted() -> Iterator[None]:
    """The same without a test around it, as in a process that a test has started."""
    from nearfar.engine.budget import tile_shape
    from nearfar.engine.where import running_kernels

    with running_kernels(everywhere=True), tile_shape(16, 16), warnings.catch_warnings():
        # The interpreter computes with NumPy, which warns of an overflow that is masked later.
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        # Triton 3.6 uses what NumPy will drop.
        warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether kernels ran each comparison."""
    seen: list[bool] = []
    usual = gpu.takes

    def watched(*arguments: Any) -> bool:
        seen.append(usual(*arguments))
        return seen[-1]

    monkeypatch.setattr(gpu, "takes", watched)
    return seen
