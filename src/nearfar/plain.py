"""Results as plain values for JSON, and numbers as text for tables."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """The value as dicts, lists, numbers and None. NaN and infinity, which JSON lacks, become None.

    >>> plain({0.1: (1, float("nan")), "found": np.array([2.5])})
    {'0.1': [1, None], 'found': [2.5]}
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {_key(key): plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _key(key: Any) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)


def number(value: float | None, missing: str = "-") -> str:
    """A number with four decimals, or what stands for None.

    >>> number(0.25), number(None)
    ('0.2500', '-')
    """
    return missing if value is None else f"{value:.4f}"
