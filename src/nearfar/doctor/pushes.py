"""Who holds the push of each anchor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfar.observe import watch_forces
from nearfar.relation import Block

FEWEST = 8  # negatives of an anchor; of fewer, one may well hold most of the push


class Pushes:
    """A visitor of forces that keeps, for each anchor, its push and the strongest part of it."""

    def __init__(self) -> None:
        self._open: Tensor | None = None  # (n, 3) push, strongest push, negatives
        self._done: list[Tensor] = []

    def begin(self) -> None:
        """`close` tells losses apart."""

    def tile(
        self,
        n_anchors: int,
        rows: slice,
        columns: slice,
        block: Block,
        closeness: Tensor,
        pull: Tensor,
    ) -> None:
        if self._open is None:
            self._open = pull.new_zeros(n_anchors, 3)
        negative = block.masks()[1]  # a positive that is near enough is pushed too, a little
        push = -pull.clamp(max=0).where(negative, 0)
        total, strongest, negatives = self._open[rows].unbind(1)
        total += push.sum(1)
        strongest.copy_(torch.maximum(strongest, push.amax(1)))
        negatives += negative.sum(1)

    def scale(self, by: Tensor | float) -> None:
        """Sums are asked for, which nothing scales."""

    def close(self) -> None:
        """What comes next are the anchors of another loss."""
        if self._open is not None:
            self._done.append(self._open)
        self._open = None

    def held(self, temperature: float) -> Tensor | None:
        """(a,) the share that one negative holds, of the anchors whose negatives matter.

        The force of a softmax loss is the probability of a negative by the temperature. Where all
        of them together have less than 5 %, there is nothing to share. None: no anchor has as many
        negatives as it takes to tell.
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
    """Call `form` with the loss in such a way that every push is seen.

    Only a loss that is one number shows its forces, so its sum stands in for whatever is asked.
    """
    pushes = Pushes()

    def summed(*data: Any, reduction: str = "mean", **keywords: Any) -> Tensor:
        value = loss(*data, reduction="sum", **keywords)
        pushes.close()
        return value[None] if reduction == "none" else value

    with watch_forces(pushes):
        form(summed)
    return pushes
