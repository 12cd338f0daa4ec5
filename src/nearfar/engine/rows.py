"""Rows prepared for the tiles, and the way back for their gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from nearfar.distance import scaled_to_square, too_short
from nearfar.engine.slices import part, spans
from nearfar.inputs import readable
from nearfar.reduction import sum_dtype

_TRANSPOSED = 1024  # rows at a time of a gradient that may be laid out column by column


class Rows:
    """Rows prepared for the tiles, at unit length if asked, and the way back for their gradient.

    Args:
        x: (n, d) the rows.
        normalize: whether they are scaled to length 1.
        wants_dots: whether `dots` is wanted.

    Attributes:
        ready: (n, d) the rows; their gradient overwrites them as they are finished.
        dots: the sum of the inner products of finished rows, before they are scaled, with their
            gradient; None unless asked for.
        finite: whether all rows are known to be finite.
    """

    def __init__(self, x: Tensor, normalize: bool, wants_dots: bool) -> None:
        self.scale: Tensor | float | None = None
        self.size: Tensor | None = None
        self.dots: Tensor | None = None
        self.finite = False
        self.wants_dots = wants_dots
        x = x.contiguous()  # or every tile of it would be copied
        if not normalize:
            self.ready = torch.add(x, x, alpha=0)  # NaN where x is infinite; see inputs.lift
            return
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        short = too_short(x.dtype)
        if x.shape[0] and readable(size):
            low, high = size.aminmax()
            if short <= low.item() and high.item() < torch.inf:
                self.ready, self.size, self.finite = x / size, size, True
                return
        x, down = scaled_to_square(x, size)
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        # Too short to have a direction, as in distance.unit: the row and its gradient become 0.
        size = size.masked_fill_(size < short, torch.inf)
        self.ready, self.size = x / size, size / down

    def times(self, scale: Tensor | float) -> Tensor:
        """The rows times a scale, which is undone when they are finished."""
        self.scale = scale
        return self.ready.mul_(scale)

    def back(self, gradient: Tensor) -> Tensor:
        """From the gradient of `ready` to that of the rows; overwrites both."""
        n = gradient.shape[0]
        step = _TRANSPOSED if gradient.is_cpu else n  # elsewhere each part costs a few launches
        for at in spans(n, step) if n else (slice(0, 0),):
            self.finish(at, part(gradient, at).contiguous())
        return self.ready

    def finish(self, at: slice, gradient: Tensor) -> None:
        """Replace some rows by their gradient, made from that of `ready` (r, d), which changes."""
        ready = part(self.ready, at)
        if self.scale is not None:
            ready.div_(self.scale)
        if self.wants_dots or self.size is not None:
            dots = row_dots(gradient, ready)
            if self.wants_dots:
                more = dots.sum(dtype=sum_dtype(ready))
                self.dots = more if self.dots is None else self.dots + more
            if self.size is not None:
                gradient.addcmul_(ready, dots[:, None], value=-1).div_(part(self.size, at))
        if self.scale is not None:
            gradient.mul_(self.scale)
        if ready is self.ready:
            self.ready = gradient
        else:
            ready.copy_(gradient)


row_dots: Callable[[Tensor, Tensor], Tensor] = torch.linalg.vecdot  # (n,) inner products of rows
