"""Losses of log-sum-exps over listed pairs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.listed_pairs import answer_for_list, measure_list
from nearfar.engine.log_sum_rule import LogSum, LogSumRule, settle
from nearfar.engine.positives import EachPositive
from nearfar.engine.relation import Relation
from nearfar.engine.segments import sum_of, top_and_sum
from nearfar.engine.step import Answer, Request
from nearfar.reduction import sum_dtype


def over_list(
    rule: LogSumRule, closeness: Closeness, relation: Relation, request: Request
) -> Answer:
    """The losses of the anchors of listed pairs, and their gradient."""
    pairs, n = relation.listed, relation.n
    assert pairs is not None
    each = request.each_pair and rule.per_positive
    near, far = measured = measure_list(closeness, pairs, request)
    (near_row, _), (far_row, _) = pairs.positive, pairs.negative
    summed, row = (
        (torch.cat(measured), torch.cat([near_row, far_row]))
        if rule.with_positives
        else (far, far_row)
    )
    exponents = summed if rule.exponent is None else rule.exponent(summed)
    top, total, powers = top_and_sum(exponents.to(sum_dtype(near)), row, n)
    positives = _positives(rule, near, pairs.positive, n)
    counts = rule.counts(relation)
    logs, weight = LogSum(total.log(), top), request.weight
    done = settle(rule, logs, positives, counts, weight, request.kept, each=each)
    by_terms = (done.by_logs / total.clamp(min=torch.finfo(total.dtype).tiny))[row] * powers
    by_terms = by_terms.to(near.dtype)
    by_terms *= rule.slope(summed) if callable(rule.slope) else rule.slope
    by_near = positives.spread(done.by_positives).to(near.dtype)
    if rule.with_positives:
        more, by_terms = by_terms.split_with_sizes([len(near), len(far)])
        by_near = by_near + more
    if request.kept is not None:
        counts = done.counts
    forces = by_near, by_terms
    answer = answer_for_list(closeness, relation, request, measured, forces, done.loss, counts)
    return replace(answer, each_pair=each)


@dataclass(eq=False)
class _Summed:
    """The sum of each anchor's listed positives; see `SummedPositives`."""

    values: Tensor
    of: Tensor
    row: Tensor
    NEED_MASK: ClassVar[bool] = True

    def per_value(self, of_anchors: Tensor) -> Tensor:
        return of_anchors

    def ends(self) -> Tensor:
        raise TypeError("sums do not know their positives")

    def spread(self, force: Tensor) -> Tensor:
        """(k,) the force on each positive."""
        return force[self.row]


@dataclass(eq=False)
class _Each:
    """Each listed positive; see `EachPositive`."""

    values: Tensor
    of: Tensor
    other: Tensor
    NEED_MASK: ClassVar[bool] = False

    def per_value(self, of_anchors: Tensor) -> Tensor:
        return of_anchors[self.of]

    def ends(self) -> Tensor:
        return torch.stack([self.of, self.other])

    def spread(self, force: Tensor) -> Tensor:
        return force


def _positives(
    rule: LogSumRule, near: Tensor, ends: tuple[Tensor, Tensor], n: int
) -> _Summed | _Each:
    row, column = ends
    if rule.positives is EachPositive:
        return _Each(near, row, column)
    count = torch.bincount(row, minlength=n).clamp(min=1)
    total = sum_of(near.to(sum_dtype(near)), row, n)
    return _Summed(total, count.to(total.dtype), row)
