"""Running log-sum-exps: of each anchor's terms, added up tile by tile."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf

import torch
from torch import Tensor

from nearfar.engine.log_sum_rule import LogSum
from nearfar.engine.positives import Side
from nearfar.engine.slices import part
from nearfar.engine.together import Together
from nearfar.reduction import sum_dtype

# Exponents within this of 0 have an exponential, and sums of millions of them, that are normal
# numbers of the dtype: such exponents are summed as they are.
SAFE = {torch.float32: 40.0, torch.float64: 300.0}
# By so much may exponents exceed a base.
_HIGHEST = 8


# What is subtracted from the exponents of a tile: a number, or one per row (r,); None: they lie too
# far apart for one number.
Base = Tensor | float | None


@dataclass(eq=False)
class Terms:
    """What the log-sum-exps of a tile are over.

    Attributes:
        values: (r, c) exponentials of the exponents minus `base`, 0 for pairs left out; where there
            is no base, the exponents themselves, -inf for pairs left out.
        base: what was subtracted.
        sides: whose terms they are.
    """

    values: Tensor
    base: Base
    sides: list[Side]


class Running:
    """A running log-sum-exp of each anchor: its total times e^top.

    While all tiles have one base, that is the top, and totals just add up.
    """

    def __init__(self, n: int, like: Tensor, safe: bool) -> None:
        self.safe, self.dtype, self.device = safe, like.dtype, like.device
        self.n, self.sum_dtype = n, sum_dtype(like)
        self.top: Tensor | float | None = 0.0 if safe else None  # None: nothing was added yet
        self.is_common = True  # whether top is the base of all tiles so far
        self.last = 0.0  # the base last chosen
        self.spread_out = False  # whether a tile had none

    @cached_property
    def total(self) -> Tensor:
        return torch.zeros(self.n, dtype=self.sum_dtype, device=self.device)

    def common_base(self, low: float, high: float) -> float | None:
        """What to subtract from exponents so that both ends can sum them; None: nothing does it.

        Terms may then be as small as normal numbers are, but not much larger than 1: a force is a
        term times a factor, which is the smaller, the larger the terms are, and would underflow.
        """
        lowest, last = 2 * SAFE.get(self.dtype, 0), self.last
        if high == -inf or (last - lowest <= low and high <= last + _HIGHEST):
            return last  # a base in use is preferred: its sums just add up
        # One less, for the rounding; and a large base would cost digits.
        self.spread_out = not high - low <= lowest - 1 or not abs(high) < 2**20
        if self.spread_out:
            return None
        self.last = float(ceil(high))
        return self.last

    def add(self, terms: Terms, side: Side) -> None:
        """Add the terms of a tile, summed along a dimension."""
        values, base = terms.values, terms.base
        if base is None:
            old, total = self._tops(side.at), part(self.total, side.at)
            new = torch.maximum(old, values.amax(side.dim))
            top = finite(new)
            sums = (values - finite(self._along(new, side))).exp_().sum(side.dim)
            total.mul_((old - top).exp_()).add_(sums)
            old.copy_(new)
            return
        sums = values.sum(side.dim)
        if side.at == slice(0, self.n) and "total" not in vars(self):
            # What comes first need not be added, and of one tile no digits are lost.
            self.top, self.total = base, sums.to(self.sum_dtype) if self.safe else sums
            return
        self.total = self.total.to(self.sum_dtype)
        total = part(self.total, side.at)
        if self.top is None and not isinstance(base, Tensor):
            self.top = base
        elif isinstance(base, Tensor) or isinstance(self.top, Tensor) or base != self.top:
            old = self._tops(side.at)
            # Where an anchor has no term in the tile, its base means nothing.
            base = torch.where(sums != 0, base, -inf)
            new = torch.maximum(old, base)
            top = finite(new)
            total.mul_((old - top).exp_())
            sums = sums * (base - top).exp_()
            old.copy_(new)
        total.add_(sums)

    def add_others(self, at: slice, together: Together) -> None:
        """Add what other processes have summed of some anchors."""
        self.total = self.total.to(self.sum_dtype)
        total = part(self.total, at)
        if not self.safe:
            old = self._tops(at)
            new = together.largest(old.to(self.sum_dtype))
            total.mul_((old - finite(new)).exp_())
            old.copy_(new)
        total.copy_(together.total(total))

    def _tops(self, at: slice) -> Tensor:
        """The top of each of some anchors, which may be changed."""
        if self.is_common or not isinstance(self.top, Tensor):
            top = -inf if self.top is None else self.top
            self.top = torch.where(self.total != 0, top, -inf).to(self.total.dtype)
            self.is_common = False
        return part(self.top, at)

    def value(self) -> LogSum:
        return LogSum(self.total.log(), 0.0 if self.top is None else self.top)

    def finish(self, by: Tensor) -> None:
        """Keep the derivatives by the log-sum-exps, which terms are to be multiplied with."""
        # Nothing was summed where the total is 0; by is 0 there.
        self.by, self.share = by, by / (self.total + torch.finfo(self.total.dtype).tiny)

    def force(self, terms: Terms) -> Tensor:
        """(r, c) the derivatives by the exponents; overwrites the terms."""
        sides = terms.sides
        if terms.base is not None:
            factors = [self._factor(terms.base, side) for side in sides]
            return terms.values.mul_(factors[0] if len(sides) == 1 else factors[0] + factors[1])
        force, *others = [
            (terms.values - finite(self._along(self._tops(side.at), side)))
            .exp_()
            .mul_(self._along(part(self.share, side.at), side))
            for side in sides
        ]
        for other in others:
            force.add_(other)
        return force

    def _factor(self, base: Tensor | float, side: Side) -> Tensor:
        """What terms relative to a base are multiplied with, (r, 1) or (1, c)."""
        if base is self.top or (isinstance(self.top, float) and base == self.top):
            return self._along(part(self.share, side.at), side)
        above = base - finite(self._tops(side.at)) - part(self.total, side.at).log()
        # No term of an anchor is above its sum; where it has none in the tile, the base may be.
        above = above.clamp_(max=2 * SAFE[self.dtype]).exp_().mul_(part(self.by, side.at))
        return self._along(above, side)

    def _along(self, values: Tensor, side: Side) -> Tensor:
        """A number for each anchor of a tile, as the tile can be multiplied with them."""
        return values.to(self.dtype).unsqueeze(side.dim)


def finite(logs: Tensor) -> Tensor:
    """The smallest number for -inf, where nothing was summed: -inf - -inf would be NaN."""
    return logs.clamp(min=torch.finfo(logs.dtype).min)
