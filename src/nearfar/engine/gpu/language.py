"""Triton, and whether its interpreter runs the kernels."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import triton

from nearfar.engine.gpu.shapes import Shape

INTERPRETED: bool = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    shape: Shape,
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
) -> None:
    """Run a kernel on tiles of a shape. The one place that does."""
    options = {} if INTERPRETED else {"enable_fp_fusion": True}
    kernel[grid](
        *arguments,
        **settings,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        num_warps=shape.warps,
        num_stages=shape.stages,
        **options,
    )


@cache
def kernel(function: Callable[..., Any] | str | None) -> Any:
    """A function of operators alone, or one of `kernels/terms.py` by name, as kernels call it."""
    if function is None:
        return None
    if isinstance(function, str):
        return getattr(import_module("nearfar.engine.gpu.kernels.terms"), function)
    return function if INTERPRETED else triton.jit(function)
