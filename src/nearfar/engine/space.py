"""Memory that blocks of pairs use one after another."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Space:
    """Buffers of a block, taken anew for each block from the same memory.

    Memory fresh from the system costs a fault every 4 KiB, which is more than most steps take that
    fill it.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._taken = 0

    def clear(self) -> None:
        """Whatever was taken may be taken again."""
        self._taken = 0

    def like(self, tile: Tensor) -> Tensor:
        """A tile of any content, laid out as the other, of its dtype and on its device."""
        rows, columns = tile.shape
        if tile.stride(0) < tile.stride(1):
            return self._take(tile).view(columns, rows).T
        return self._take(tile).view(rows, columns)

    @contextmanager
    def lent(self, tile: Tensor) -> Iterator[Tensor]:
        """The same, to be taken again after the block; nothing is taken for longer inside it."""
        taken = self._taken
        yield self.like(tile)
        self._taken = taken

    def _take(self, like: Tensor) -> Tensor:
        size = like.numel()
        if self._taken == len(self._buffers):
            self._buffers.append(like.new_empty(size))
        elif self._buffers[self._taken].numel() < size:
            self._buffers[self._taken] = like.new_empty(size)
        buffer = self._buffers[self._taken]
        self._taken += 1
        return buffer[:size]
