"""How the push of each anchor is shared among its negatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.closeness import Tile
from nearfar.engine.observe import watch_forces

FEWEST = 8  # negatives of an anchor; among fewer, one may well receive most of the push


class Pushes:
    """Observes forces, and keeps for each anchor its total push and the strongest single push."""

    def __init__(self) -> None:
        self._open: Tensor | None = None  # (n, 3) push, strongest push, negatives
        self._done: list[Tensor] = []

    def begin(self) -> None:
        """Nothing to do: `close` separates one loss from the next."""

    def tile(self, n_anchors: int, tile: Tile, pull: Tensor) -> None:
        if self._open is None:
            self._open = pull.new_zeros(n_anchors, 3)
        negative = tile.negative  # a positive that is near enough is also pushed a little
        push = -pull.clamp(max=0).where(negative, 0)
        total, strongest, negatives = self._open[tile.rows].unbind(1)
        total += push.sum(1)
        strongest.copy_(torch.maximum(strongest, push.amax(1)))
        negatives += negative.sum(1)

    def scale(self, by: Tensor | float) -> None:
        """Nothing to do: the losses are summed, so their forces are not scaled."""

    def close(self) -> None:
        """Called between losses: the next tiles belong to another one."""
        if self._open is not None:
            self._done.append(self._open)
        self._open = None

    def held(self, temperature: float) -> Tensor | None:
        """(a,) the largest share that one negative receives, for anchors whose negatives matter.

        The force of a softmax loss on a negative is its probability divided by the temperature.
        Anchors whose negatives have less than 5 % probability in all are left out. None: no anchor
        has enough negatives.
        """
        if not self._done:
            return None
        push, strongest, negatives = torch.cat(self._done).unbind(1)
        if not (negatives >= FEWEST).any():
            return None
        matters = (push * temperature > 0.05) & (negatives >= FEWEST)
        return (strongest[matters] / push[matters]).cpu()


def watch_pushes(
    form: Callable[[Callable[..., Tensor]], object], loss: Callable[..., Tensor]
) -> Pushes:
    """Call `form` with the loss, and observe every push.

    A loss shows its forces only if it is reduced to one number, so every call computes the sum.
    """
    pushes = Pushes()

    def summed(*data: Any, reduction: str = "mean", **keywords: Any) -> Tensor:
        value = loss(*data, reduction="sum", **keywords)
        pushes.close()
        return value[None] if reduction == "none" else value

    with watch_forces(pushes):
        form(summed)
    return pushes
