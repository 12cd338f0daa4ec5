"""What a loss of log-sum-exps is, and what is known once its sums are complete."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nearfar.engine.positives import EachPositive, Positives, SummedPositives
from nearfar.engine.relation import Relation
from nearfar.engine.segments import sum_of
from nearfar.reduction import Between


@dataclass(eq=False)
class LogSum:
    """(n,) log-sum-exps, in two parts so that the difference of two large numbers is exact.

    Attributes:
        rest: the log-sum-exp minus `top`; -inf where nothing was summed.
        top: numbers near the log-sum-exps, or one number.
    """

    rest: Tensor
    top: Tensor | float = 0.0

    @property
    def value(self) -> Tensor:
        """The log-sum-exps as one number each."""
        return self.top + self.rest

    def minus(self, other: Tensor) -> Tensor:
        """The log-sum-exps minus other numbers (n,)."""
        return self.top - other + self.rest

    def of(self, anchor: Tensor) -> "LogSum":
        """(k,) those of the anchors with these indices."""
        top = self.top.index_select(0, anchor) if isinstance(self.top, Tensor) else self.top
        return LogSum(self.rest.index_select(0, anchor), top)


# What a loss makes of the sums: its (n,) values, its derivatives by the log-sum-exps (n,), by the
# positives, and by the number that the rule holds (n,), if that is learned. A loss of each
# positive has (k,) values and derivatives by its log-sum-exp.
Finished = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(eq=False)
class LogSumRule:
    """A loss of an anchor's log-sum-exp and its positives.

    Attributes:
        finish: the loss of the log-sum-exps and the positives: their (n,) sums and numbers, or the
            closeness of each (k,) and its anchor (k,).
        counts: the relation -> (n,) how much each anchor counts in the mean, 0 if it has nothing to
            compare; None: each counts 1.
        positives: whether the loss takes the sum of an anchor's positives or each of them.
        per_positive: whether the loss of an anchor is a sum over its positives, of which `finish`
            returns the terms.
        both_ends: whether such a term also depends on the log-sum-exp of the positive as an anchor.
            `finish` then takes the indices (2, k) of both, and returns derivatives (2, k) by both
            log-sum-exps. Rows and columns must be the same.
        with_positives: whether the log-sum-exp is over positives too, or over negatives alone.
        exponent: closeness -> the exponents, in new memory; None: the closeness itself, which must
            be an inner product.
        slope: the derivative of the exponent by the closeness, a number or a function of it.
        steepness, offset: an exponent is at most steepness * |closeness| + offset in size.
        learned: whether the rule holds a number that is learned.
    """

    finish: Callable[[LogSum, Tensor, Any], Finished]
    counts: Callable[[Relation], Tensor | None]
    positives: type[SummedPositives] | type[EachPositive] = SummedPositives
    per_positive: bool = False
    both_ends: bool = False
    with_positives: bool = False
    exponent: Callable[[Tensor], Tensor] | None = None
    slope: Callable[[Tensor], Tensor] | float = 1.0
    steepness: float = 1.0
    offset: float = 0.0
    learned: bool = False


@dataclass(eq=False)
class Settled:
    """What is known of some anchors once their sums are complete.

    Attributes:
        loss: (n,).
        by_logs: its derivatives by the log-sum-exps, times the weights of the anchors.
        by_positives: by the positives, likewise.
        by_own: (n,) by a number that the rule holds and that is learned, likewise; [] if none is.
        counts: (n,) how much each anchor counts in the mean; None: each counts 1.
    """

    loss: Tensor
    by_logs: Tensor
    by_positives: Tensor
    by_own: list[Tensor]
    counts: Tensor | None


def settle(
    rule: LogSumRule,
    logs: LogSum,
    positives: Positives,
    counts: Tensor | None,
    weight: Tensor | None,
    kept: Between | None,
    *,
    both: bool = False,
    each: bool = False,
) -> Settled:
    """The losses of anchors and their derivatives.

    Args:
        rule: the loss.
        logs: the log-sum-exps of the anchors.
        positives: their positives.
        counts: (n,) see `LogSumRule`.
        weight: (n,) how much each anchor counts; None: all 1.
        kept: which terms count in the mean.
        both: whether the anchors are rows and then as many columns; a row's loss is the mean of its
            loss as either, and all that is returned by row is so.
        each: whether the loss of each positive is wanted, and `weight` holds one for each of them.
    """
    of = positives.ends() if rule.both_ends else positives.of
    loss, by_logs, by_positives, *by_own = rule.finish(logs, positives.values, of)
    if counts is not None and not rule.per_positive:
        empty = counts == 0
        loss = loss.masked_fill(empty, 0)
        if positives.NEED_MASK:
            by_logs = by_logs.masked_fill(empty, 0)
            by_positives = by_positives.masked_fill(empty, 0)
            by_own = [by.masked_fill(empty, 0) for by in by_own]
    if both:
        loss, by_logs, by_positives = loss.view(2, -1).mean(0), by_logs / 2, by_positives / 2
        by_own = [by / 2 for by in by_own]
    if kept is not None:
        outside = kept.outside(loss)
        loss = loss.masked_fill(outside, 0)
        of_logs = outside.repeat(2) if both else outside
        of_positives = of_logs if rule.per_positive else positives.per_value(of_logs)
        by_logs = by_logs.masked_fill(of_logs, 0)
        by_positives = by_positives.masked_fill(of_positives, 0)
        by_own = [by.masked_fill(of_logs, 0) for by in by_own]
        counts = _number_inside(rule, ~outside, positives, counts)
    if rule.per_positive:
        if weight is not None and (each or rule.both_ends):
            of_terms = weight if each else positives.per_value(weight)
            by_logs, by_positives, weight = by_logs * of_terms, by_positives * of_terms, None
        n, anchor = len(logs.rest), positives.of
        assert isinstance(anchor, Tensor)
        assert isinstance(of, Tensor)
        by_logs = sum_of(by_logs.flatten(), of.flatten(), n)
        loss = loss if each else sum_of(loss, anchor, n)
    if weight is not None:
        by_logs, by_positives = by_logs * weight, by_positives * positives.per_value(weight)
        by_own = [by * weight for by in by_own]
    return Settled(loss, by_logs, by_positives, by_own, counts)


def _number_inside(
    rule: LogSumRule, inside: Tensor, positives: Positives, counts: Tensor | None
) -> Tensor:
    """(n,) how many terms of each anchor count in a mean over some of them."""
    if counts is None:
        return inside
    if not rule.per_positive:
        return inside & (counts[: len(inside)] > 0)
    anchor = positives.of
    assert isinstance(anchor, Tensor)
    inside = inside & (counts > 0)[anchor]
    return sum_of(inside.to(positives.values.dtype), anchor, len(counts))
