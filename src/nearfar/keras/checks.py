"""What this package refuses, and how it says so. Each check returns the value that it lets pass."""

from collections.abc import Sequence
from math import inf, isfinite
from numbers import Real
from typing import Any


def above_zero(name: str, value: Any) -> Any:
    """A number above 0, or a tensor, whose value is not looked at: it may be learned."""
    if isinstance(value, Real) and not (0 < float(value) < inf):
        raise ValueError(f"{name} must be a number above 0, got {value!r}.")
    return value


def between(name: str, value: float, low: float, high: float) -> float:
    """A number from `low` to `high`, both included unless they are infinite."""
    if isinstance(value, Real) and low <= float(value) <= high and isfinite(value):
        return value
    limits = f"{low:g} or more" if high == inf else f"from {low:g} to {high:g}"
    raise ValueError(f"{name} must be a number, {limits}, got {value!r}.")


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value in choices:
        return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def chunk_rows(value: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"chunk_size must be an integer above 0, got {value!r}.")
