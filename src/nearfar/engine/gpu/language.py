"""Triton, and whether its interpreter runs the kernels."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nearfar.engine.gpu.shapes import Shape

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Triton 3.6 fails to pipeline a loop that branches between two products, as those of other kernels
# than these do.
_STRAIGHT = {"collect_tiles", "forces", "multiply"}
_PIPELINES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    shape: Shape,
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
) -> None:
    """Run a kernel on tiles of a shape. The one place that does."""
    kernel[grid](*arguments, **settings, **of_shape(shape, kernel))


def of_shape(shape: Shape, kernel: Any) -> dict[str, Any]:
    """What a kernel and Triton's compiler are told of a shape."""
    pipelined = _PIPELINES or kernel.__name__ in _STRAIGHT
    settings: dict[str, Any] = {
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "num_warps": shape.warps,
        "num_stages": shape.stages if pipelined else 1,
    }
    return settings if INTERPRETED else {**settings, "enable_fp_fusion": True}


@cache
def kernel(function: Callable[..., Any] | str | None) -> Any:
    """A function of operators alone, or one of `kernels/terms.py` by name, as kernels call it."""
    if function is None:
        return None
    if isinstance(function, str):
        return getattr(import_module("nearfar.engine.gpu.kernels.terms"), function)
    return function if INTERPRETED else triton.jit(function)


def described(rows: Tensor, *block: int) -> Any:
    """Rows as kernels fetch or write them in blocks of a shape."""
    return TensorDescriptor.from_tensor(rows, list(block))
