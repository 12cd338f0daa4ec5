"""Triton, and whether its interpreter runs the kernels."""

from collections.abc import Callable
from functools import cache
from typing import Any

import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


@cache
def kernel(function: Callable[..., Any]) -> Any:
    """A function of operators alone, as kernels call it."""
    return function if INTERPRETED else triton.jit(function)
