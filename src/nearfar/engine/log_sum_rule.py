"""What a loss of log-sum-exps is, and what is known once its sums are complete."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.positives import Positives
from nearfar.engine.relation import Relation
from nearfar.engine.segments import log_sum, sum_of
from nearfar.engine.together import Together
from nearfar.inputs import readable
from nearfar.reduction import Between, sum_dtype


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


# What a loss makes of the sums: its values, its derivatives by the log-sum-exps, by the positives,
# and by the number that the rule holds, if that is learned.
Finished = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(eq=False)
class Exponent:
    """What a log-sum-exp is over, as a function of the closeness.

    Attributes:
        of: closeness -> the exponents, in new memory.
        slope: the derivative of the exponent by the closeness, a number or a function of it.
        kernel: both in one function of a closeness and of `numbers`, written with operators alone,
            which runs in torch and is compiled for a GPU as it stands.
        numbers: the numbers that it takes.
    """

    of: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | float
    kernel: Callable[..., Any]
    numbers: tuple[float, ...]


def affine(k: float, c: float) -> Exponent:
    """The exponent k z + c."""
    return Exponent(lambda z: (z * k).add_(c), k, affine_kernel, (k, c))


# Types as text, since Triton would look them up in a function that it compiles.
def affine_kernel(z: "Any", numbers: "Any") -> "Any":
    k = numbers[0]
    return k * z + numbers[1], k


@dataclass(eq=False)
class LogSumRule:
    """A loss of the log-sum-exp of an anchor's negatives (or of all its columns) and its positives.

    What `finish` takes and returns depends on how the loss reads the positives:

    - their sum: `finish(logs, sums, numbers)`, with (n,) sums and how many there are, returns (n,)
      losses and derivatives by the log-sum-exps and by the sums.
    - their log-sum-exp, if `near` is given: `finish(logs, near, None)`, with (n,) log-sum-exps,
      -inf without positives; derivatives by both.
    - each by itself, if `per_positive`: `finish(logs, z, None)`, with the closeness of positives,
      of any shape, and the log-sum-exp of the anchor of each, returns the terms whose sums are the
      losses of the anchors, and derivatives by both.

    Attributes:
        finish: see above.
        counts: the relation -> (n,) how much each anchor counts in the mean, 0 if it has nothing to
            compare; None: each counts 1.
        near: the exponents of the positives.
        per_positive: whether the loss of an anchor is a sum over its positives.
        both_ends: whether such a term also depends on the log-sum-exp of the positive as an anchor.
            `finish` then takes a pair of log-sum-exps, of the anchor and of the positive, and
            returns the derivatives by both stacked. Rows and columns must be the same.
        with_positives: whether the log-sum-exp is over positives too, or over negatives alone.
        far: the exponents of the log-sum-exp; None: the closeness itself, which must be an inner
            product.
        steepness, offset: these are at most steepness * |closeness| + offset in size.
        single: what `finish` is for anchors with one positive if it is given the log-sum-exp of the
            negatives alone, which is more exact; for rules `with_positives`.
        term: the kernel's form of `finish`, if `per_positive`: a name in `gpu/kernels/terms.py`.
        learned: whether the rule holds a number that is learned, whose derivatives (n,) `finish`
            returns last.
    """

    finish: Callable[..., Finished]
    counts: Callable[[Relation], Tensor | None]
    near: Exponent | None = None
    per_positive: bool = False
    both_ends: bool = False
    with_positives: bool = False
    far: Exponent | None = None
    steepness: float = 1.0
    offset: float = 0.0
    single: Callable[..., Finished] | None = None
    term: str | None = None
    learned: bool = False

    @cached_property
    def of_all(self) -> "LogSumRule":
        """The rule for anchors of which some have several positives."""
        return replace(self, single=None)

    @cached_property
    def of_one(self) -> "LogSumRule":
        """The rule for anchors with at most one positive."""
        assert self.single is not None
        return replace(self, finish=self.single, with_positives=False, single=None)

    @property
    def sums_positives(self) -> bool:
        """Whether the loss takes the sum of an anchor's positives."""
        return self.near is None and not self.per_positive


def most_exact(rule: LogSumRule, relation: Relation) -> LogSumRule:
    """The most exact form of a rule, given how many positives anchors have.

    If that cannot be read, the result still has a `single` form, and the executor is to leave the
    positive of an anchor that has one out of its log-sum-exp.
    """
    if rule.single is None:
        return rule
    if not relation.one_positive:
        number = relation.n_positives()
        if relation.listed is None and not readable(number):
            return one_or_all(rule)
        if (number > 1).any():
            return rule.of_all
    return rule.of_one


def one_or_all(rule: LogSumRule) -> LogSumRule:
    """A rule that takes the negatives alone where an anchor has one positive, else all terms."""
    single = rule.single
    assert single is not None

    def finish(logs: LogSum, total: Tensor, number: Tensor | float) -> Finished:
        of_one = single(logs, total, number)
        if not isinstance(number, Tensor):
            return of_one
        of_all = rule.finish(logs, total, number)
        loss, by_logs, by_total = (
            torch.where(number == 1, one, many) for one, many in zip(of_one, of_all, strict=True)
        )
        return loss, by_logs, by_total

    return replace(rule, finish=finish)


@dataclass(eq=False)
class BothWays:
    """Anchors that are n rows and then the columns, each of which belongs to one row.

    Attributes:
        n: how many rows there are.
        together: the processes that have the other rows; None: there are no others.
    """

    n: int
    together: Together | None = None

    def spread(self, of_rows: Tensor) -> Tensor:
        """What is known of the rows (n,), of all anchors."""
        together = self.together
        return torch.cat([of_rows, of_rows if together is None else together.of_rows(of_rows)])

    def mean(self, of_anchors: Tensor) -> Tensor:
        """(n,) the mean of what each row has as a row and as a column."""
        rows, columns = of_anchors[: self.n], of_anchors[self.n :]
        if self.together is not None:
            columns = columns[self.together.rows.own]
        return (rows + columns) / 2


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
    both: BothWays | None = None,
    each: bool = False,
    together: Together | None = None,
    dealt: Together | None = None,
) -> Settled:
    """The losses of anchors and their derivatives.

    Args:
        rule: the loss.
        logs: the log-sum-exps of the anchors.
        positives: their positives.
        counts: (n,) see `LogSumRule`.
        weight: (n,) how much each anchor counts; None: all 1.
        kept: which terms count in the mean.
        both: the anchors are rows and columns; a row's loss is the mean of its loss as either, and
            all that is returned by row is so. None: they are rows.
        each: whether the loss of each positive is wanted, and `weight` holds one for each of them.
        together: the processes that have other anchors, for rules that take both ends of a pair.
        dealt: the processes that have other positives of the same anchors.
    """
    given, share = _given(rule, logs, positives, together, dealt)
    loss, by_logs, by_positives, *by_own = rule.finish(*given)
    if counts is not None and not rule.per_positive:
        empty = counts == 0
        loss = loss.masked_fill(empty, 0)
        if rule.sums_positives:  # a mean has derivatives for anchors without positives too
            by_logs = by_logs.masked_fill(empty, 0)
            by_positives = by_positives.masked_fill(empty, 0)
            by_own = [by.masked_fill(empty, 0) for by in by_own]
    if both is not None:
        loss, by_logs, by_positives = both.mean(loss), by_logs / 2, by_positives / 2
        by_own = [by / 2 for by in by_own]
    if kept is not None:
        outside = kept.outside(loss)
        loss = loss.masked_fill(outside, 0)
        of_logs = outside if both is None else both.spread(outside)
        by_logs = by_logs.masked_fill(of_logs, 0)
        by_positives = by_positives.masked_fill(of_logs, 0)
        by_own = [by.masked_fill(of_logs, 0) for by in by_own]
        counts = _number_inside(rule, ~outside, positives, counts)
    if rule.per_positive:
        derived = loss, by_logs, by_positives
        done = _summed(rule, derived, positives, counts, weight, len(logs.rest), each, together)
        return done if dealt is None else _over_all(done, dealt, counted=kept is not None)
    if weight is not None:
        by_logs, by_positives = by_logs * weight, by_positives * weight
        by_own = [by * weight for by in by_own]
    if share is not None:
        assert isinstance(positives.of, Tensor)
        by_positives = by_positives.index_select(0, positives.of) * share
    return Settled(loss, by_logs, by_positives, by_own, counts)


def _given(
    rule: LogSumRule,
    logs: LogSum,
    positives: Positives,
    together: Together | None,
    dealt: Together | None,
) -> tuple[tuple[Any, ...], Tensor | None]:
    """The arguments of `finish`, and the derivative of `near` by each positive, where it is one."""
    of, z = positives.of, positives.values
    if rule.sums_positives:
        return (logs, z, of), None
    if positives.near is not None:
        return (logs, positives.near, None), None
    assert isinstance(of, Tensor)
    if rule.near is not None:
        near, share = log_sum(rule.near.of(z), of, len(logs.rest))
        if dealt is not None:
            every = _log_sum_of_all(near, dealt)
            share, near = share * (near - every).index_select(0, of).exp(), every
        slope = rule.near.slope
        return (logs, near, None), share * (slope(z) if callable(slope) else slope)
    if not rule.both_ends:
        return (logs.of(of), z, None), None
    assert positives.other is not None
    others = logs if together is None else LogSum(together.of_rows(logs.value))
    return ((logs.of(of), others.of(positives.other)), z, None), None


def _log_sum_of_all(logs: Tensor, dealt: Together) -> Tensor:
    """(n,) the log-sum-exps over what all processes have, from those over each one's."""
    logs = logs.to(sum_dtype(logs))
    top = dealt.largest(logs)
    top = top.where(top != -inf, 0)
    return top + dealt.total((logs - top).exp()).log()


def _over_all(done: Settled, dealt: Together, *, counted: bool) -> Settled:
    """The losses of anchors, from the terms of each process."""
    loss, by_logs = done.loss, done.by_logs
    dtype = sum_dtype(loss)
    loss, by_logs = dealt.total(torch.stack([loss.to(dtype), by_logs.to(dtype)])).unbind()
    counts = done.counts
    if counted and counts is not None:  # how many terms are inside of a range
        counts = dealt.total(counts.to(dtype))
    return replace(done, loss=loss, by_logs=by_logs, counts=counts)


def _summed(
    rule: LogSumRule,
    derived: Finished,
    positives: Positives,
    counts: Tensor | None,
    weight: Tensor | None,
    n: int,
    each: bool,
    together: Together | None,
) -> Settled:
    """The terms (k,) of positives as losses of the n anchors, unless the loss of each is wanted."""
    loss, by_logs, by_positives, *_ = derived
    anchor = positives.of
    assert isinstance(anchor, Tensor)
    if weight is not None:
        of_terms = weight if each else weight[anchor]
        by_logs, by_positives = by_logs * of_terms, by_positives * of_terms
    if not rule.both_ends:
        by_logs = sum_of(by_logs, anchor, n)
    else:
        assert positives.other is not None
        by_anchors, by_others = by_logs
        m = n if together is None else together.rows.n
        by_others = sum_of(by_others, positives.other, m)
        by_others = by_others if together is None else together.sum_of_rows(by_others)
        by_logs = sum_of(by_anchors, anchor, n) + by_others
    return Settled(loss if each else sum_of(loss, anchor, n), by_logs, by_positives, [], counts)


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
