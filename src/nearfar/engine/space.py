"""Memory that blocks of pairs use one after another."""

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

    def take(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """(rows, columns) of any content, in the dtype of `like` and on its device."""
        size = rows * columns
        if self._taken == len(self._buffers):
            self._buffers.append(like.new_empty(size))
        elif self._buffers[self._taken].numel() < size:
            self._buffers[self._taken] = like.new_empty(size)
        buffer = self._buffers[self._taken]
        self._taken += 1
        return buffer[:size].view(rows, columns)
