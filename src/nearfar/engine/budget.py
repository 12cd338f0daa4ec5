"""How large a tile may be: from the shapes, the device and a memory budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import inf
from numbers import Real

import torch

# Measured: smaller, and the products are slower; larger, and all other steps are. Wider, and they
# lose digits, or time (see products.py).
_CPU_TILE = (1024, 1024)
_CPU_BLOCK = 2**20  # elements of a block that spans all columns
_BUDGET = {"cpu": 128 * 2**20}
_ACCELERATOR_BUDGET = 2**30


@dataclass(frozen=True)
class Limits:
    """What the caller set: a budget in bytes, and, for tests, the tile's shape itself."""

    budget: int | None = None
    tile: tuple[int, int] | None = None


_limits: ContextVar[Limits] = ContextVar("limits", default=Limits())  # noqa: B039, it is frozen


def current_limits() -> Limits:
    """The limits in force; a loss keeps them for its backward, which may run elsewhere."""
    return _limits.get()


@contextmanager
def memory_budget(budget: int) -> Iterator[None]:
    """Bound the working memory of every whole-batch loss called inside the block.

    The work buffers stay below `budget` bytes; what must be there whatever the tile comes on top:
    the gradients, the unit rows where rows are normalised, a few numbers for each column that a
    row is compared with, and a mebibyte where multi-labels are counted. The default is 128 MiB on
    a CPU and 1 GiB on an accelerator. The budget changes speed and memory, never the result beyond
    rounding.

    Args:
        budget: bytes, at least 64 KiB.

    Raises:
        ValueError: a smaller budget.

    >>> from nearfar import clip_loss
    >>> x = torch.eye(3)
    >>> with memory_budget(2**20):
    ...     clip_loss(x, x, scale=10.0)
    tensor(9.0796e-05)
    """
    if not isinstance(budget, Real) or not 2**16 <= budget < inf:
        raise ValueError(f"budget must be a number of bytes, at least {2**16}, got {budget!r}.")
    with _set(Limits(budget=int(budget))):
        yield


@contextmanager
def tile_shape(rows: int, columns: int) -> Iterator[None]:
    """Fix the tile, so that a test can show that it changes nothing."""
    with _set(Limits(tile=(rows, columns))):
        yield


@contextmanager
def _set(limits: Limits) -> Iterator[None]:
    token = _limits.set(limits)
    try:
        yield
    finally:
        _limits.reset(token)


def tile(limits: Limits, device: torch.device, itemsize: int, buffers: int) -> tuple[int, int]:
    """Rows and columns of a tile of which `buffers` copies fit the budget."""
    if limits.tile:
        return limits.tile
    elements = _elements(limits, device, itemsize, buffers)
    if device.type != "cpu":
        rows = max(32, int(elements**0.5) // 32 * 32)
        return rows, rows
    rows, columns = _CPU_TILE
    while rows * columns > elements and rows > 1:
        rows, columns = rows // 2, columns // 2
    return rows, max(columns, 1)


# Rows that are no shorter have faster products in large tiles, see products.py.
_SHORT_ROWS, _TRIANGLE = 256, 512


def triangle_tile(
    limits: Limits, device: torch.device, itemsize: int, buffers: int, d: int
) -> tuple[int, int]:
    """For a batch of rows of length `d` with itself, whose tiles on the diagonal hold pairs twice.

    Smaller, since less of the batch lies in these then.
    """
    rows, columns = tile(limits, device, itemsize, buffers)
    if limits.tile or device.type != "cpu" or d >= _SHORT_ROWS:
        return rows, columns
    return min(rows, _TRIANGLE), min(columns, _TRIANGLE)


def low_tile(limits: Limits, device: torch.device, itemsize: int, buffers: int) -> tuple[int, int]:
    """Half as high: for tiles of which a strip is kept."""
    rows, columns = tile(limits, device, itemsize, buffers)
    return (rows, columns) if limits.tile else (max(rows // 2, 1), columns)


def wide_tile(limits: Limits, device: torch.device, itemsize: int, buffers: int) -> tuple[int, int]:
    """Low and twice as wide: where there is more to do for each tile, or on the diagonal."""
    rows, columns = low_tile(limits, device, itemsize, buffers)
    return (rows, columns) if limits.tile else (rows, 2 * columns)


def block(limits: Limits, device: torch.device, itemsize: int, buffers: int, columns: int) -> int:
    """Rows of a block that spans all `columns`, of which `buffers` copies fit the budget."""
    if limits.tile:
        return limits.tile[0]
    elements = _elements(limits, device, itemsize, buffers)
    if device.type == "cpu":
        # Small enough for the cache, but 32 rows at least: below that the product itself slows.
        elements = min(elements, max(_CPU_BLOCK, 32 * columns))
    return max(1, min(elements // max(columns, 1), 4096))


def strip_shape(
    shape: tuple[int, int],
    limits: Limits,
    device: torch.device,
    itemsize: int,
    columns: int,
    kept: int = 1,
) -> tuple[int, int]:
    """The shape of a tile with so few rows that their tiles over all `columns` can be kept at once.

    Of what is kept there are `kept` copies.
    """
    if limits.tile:
        return shape
    half = _elements(limits, device, itemsize, 2 * kept)  # the other is for the tile at work
    return min(shape[0], half // max(columns, 1)), shape[1]


def kept_elements(
    limits: Limits, device: torch.device, itemsize: int, shape: tuple[int, int], copies: int = 1
) -> int:
    """How many elements of the tiles of a first pass, so many copies each, a second may find."""
    if limits.tile:
        return shape[0] * shape[1]  # one tile, so that a test sees both
    return _elements(limits, device, itemsize, 3 * copies)


def budget_of(limits: Limits, device: torch.device) -> int:
    """The bytes that work buffers may take."""
    return limits.budget or _BUDGET.get(device.type, _ACCELERATOR_BUDGET)


def _elements(limits: Limits, device: torch.device, itemsize: int, buffers: int) -> int:
    return max(1, budget_of(limits, device) // (itemsize * buffers))
