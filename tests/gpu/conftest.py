"""Kernels run in Triton's interpreter here; `make test-kernels` sets it up."""

import os
import sys
from collections.abc import Iterator

import pytest

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # is read when kernels are defined

collect_ignore = ["ahead.py"]


@pytest.fixture
def kernels() -> Iterator[None]:
    """Losses run by the kernels, on CPU tensors, with tiles so small that there are several."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    from nearfar.engine.budget import tile_shape
    from nearfar.engine.gpu.language import INTERPRETED
    from nearfar.engine.where import running_kernels

    if not INTERPRETED:
        pytest.skip("Triton was loaded without its interpreter: run `make test-kernels`")
    with running_kernels(everywhere=True), tile_shape(16, 16):
        yield
