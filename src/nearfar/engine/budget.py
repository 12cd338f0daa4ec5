"""Memory: how large a tile may be within the budget, and buffers that are used again."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import inf
from numbers import Real

import torch
from torch import Tensor

# Measured: smaller tiles slow the products down, larger ones everything else. Wider ones lose
# digits, or time (see products.py).
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

    The work buffers stay below `budget` bytes. Allocations that do not depend on the tile size are
    not counted: the gradients, the unit rows where rows are normalised, a few numbers per column,
    and a mebibyte where multi-labels are counted. The default is 128 MiB on a CPU and 1 GiB on an
    accelerator. The budget changes speed and memory, and the result only by rounding.

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


# Rows at least this long have faster products in large tiles, see products.py.
_SHORT_ROWS, _TRIANGLE = 256, 512


def triangle_tile(
    limits: Limits, device: torch.device, itemsize: int, buffers: int, d: int
) -> tuple[int, int]:
    """The tile for a batch with itself, of rows of length `d`.

    Tiles on the diagonal hold each pair twice, so smaller tiles waste less.
    """
    rows, columns = tile(limits, device, itemsize, buffers)
    if limits.tile or device.type != "cpu" or d >= _SHORT_ROWS:
        return rows, columns
    return min(rows, _TRIANGLE), min(columns, _TRIANGLE)


def strip_tile(
    limits: Limits,
    device: torch.device,
    itemsize: int,
    buffers: int,
    columns: int,
    kept: int,
) -> tuple[int, int]:
    """Rows and columns of a tile so low that its strip, over all `columns`, can be kept.

    Args:
        limits: set by the caller.
        device: of the tile.
        itemsize: bytes of a number.
        buffers: how many copies of a tile live at once.
        columns: how many there are in all.
        kept: how many copies of the strip are kept.
    """
    height, width = tile(limits, device, itemsize, buffers)
    if limits.tile:
        return height, width
    half = _elements(limits, device, itemsize, 2 * kept)  # the other half is for the tile at work
    return min(max(height // 2, 1), half // max(columns, 1)), width


def block(limits: Limits, device: torch.device, itemsize: int, buffers: int, columns: int) -> int:
    """Rows of a block that spans all `columns`, of which `buffers` copies fit the budget."""
    if limits.tile:
        return limits.tile[0]
    elements = _elements(limits, device, itemsize, buffers)
    if device.type == "cpu":
        # Small enough for the cache, but 32 rows at least: below that the product itself slows.
        elements = min(elements, max(_CPU_BLOCK, 32 * columns))
    return max(1, min(elements // max(columns, 1), 4096))


def kept_elements(
    limits: Limits, device: torch.device, itemsize: int, shape: tuple[int, int], copies: int = 1
) -> int:
    """How many elements of a first pass's tiles, `copies` of each, are kept for the second."""
    if limits.tile:
        return shape[0] * shape[1]  # one tile, so that a test sees both
    return _elements(limits, device, itemsize, 3 * copies)


def budget_of(limits: Limits, device: torch.device) -> int:
    """The bytes that work buffers may take."""
    return limits.budget or _BUDGET.get(device.type, _ACCELERATOR_BUDGET)


def _elements(limits: Limits, device: torch.device, itemsize: int, buffers: int) -> int:
    return max(1, budget_of(limits, device) // (itemsize * buffers))


class Workspace:
    """Buffers that one tile after another uses.

    Memory fresh from the system costs a page fault every 4 KiB, which takes longer than most steps
    that fill it.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._taken = 0

    def clear(self) -> None:
        """Make everything that was taken free again."""
        self._taken = 0

    def empty(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """An uninitialised tile, with the dtype and device of `like`."""
        return self._take(shape[0] * shape[1], like).view(shape)

    def like(self, tile: Tensor) -> Tensor:
        """An uninitialised tile with the shape, layout, dtype and device of another."""
        if tile.stride(0) < tile.stride(1):
            return self.like(tile.T).T
        return self.empty((tile.shape[0], tile.shape[1]), tile)

    @contextmanager
    def lent(self, tile: Tensor) -> Iterator[Tensor]:
        """The same, free again after the block."""
        taken = self._taken
        yield self.like(tile)
        self._taken = taken

    def _take(self, size: int, like: Tensor) -> Tensor:
        if self._taken == len(self._buffers):
            self._buffers.append(like.new_empty(size))
        elif self._buffers[self._taken].numel() < size:
            self._buffers[self._taken] = like.new_empty(size)
        buffer = self._buffers[self._taken]
        self._taken += 1
        return buffer[:size]
