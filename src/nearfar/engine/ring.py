"""Columns that travel from process to process, and their gradient with them.

A process starts with the columns of its own. While it compares them, those of the process before
it are on their way. In a pass that computes forces, the gradient of some columns travels one step
behind them: each process adds its part, and the last step brings it to the owner. So a process
holds two blocks of columns and three of gradients, however many processes there are.
"""

from collections.abc import Iterator

from torch import Tensor

from nearfar.engine.processes import Passing, Split


class Ring:
    """The columns of all processes, those of one process at a time.

    Args:
        split: how the columns are split.
        own: (n, d) the columns of this process.

    Attributes:
        n: how many columns there are.
        held: (c, d) those at hand.
        gradient: (n, d) the gradient of this process's columns; None until a pass has added to it.
    """

    def __init__(self, split: Split, own: Tensor) -> None:
        self.n = split.n
        self.gradient: Tensor | None = None
        # Another tensor: these are not rows that meet each other, whose gradient is taken at once.
        self._split, self._own = split, own.view_as(own)
        self.held = self._own
        self._step = 0
        self._coming: Passing | None = None

    def once(self) -> Iterator[slice]:
        """Once around: which columns are held."""
        processes = self._split.processes
        self.held = self._own
        for self._step in range(processes.size):
            last = self._step + 1 == processes.size
            coming = None if last else processes.pass_on(self.held, self._rows(self._step + 1))
            yield self._split.parts[processes.before(self._step)]
            self.held = self._own if coming is None else coming.received()
            del coming  # and what was sent

    def pass_gradient(self, more: Tensor) -> None:
        """Add to the gradient of the columns held, and send it on; once for each block."""
        if self._step:
            assert self._coming is not None
            more = self._coming.received().add_(more)
        # What comes is the gradient of the next columns; in the last step, of this process's own.
        self._coming = self._split.processes.pass_on(more, self._rows(self._step + 1), tag=1)
        if self._step + 1 == self._split.processes.size:
            self.gradient, self._coming = self._coming.received(), None

    def _rows(self, step: int) -> int:
        """How many columns are at hand in a step."""
        return self._split.sizes[self._split.processes.before(step)]
