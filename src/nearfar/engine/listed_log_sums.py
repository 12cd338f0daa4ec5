"""Losses of log-sum-exps over listed pairs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.listed_pairs import answer_for_list, measure_list
from nearfar.engine.log_sum_rule import LogSum, LogSumRule, settle
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
    exponents = summed if rule.far is None else rule.far.of(summed)
    top, total, powers = top_and_sum(exponents.to(sum_dtype(near)), row, n)
    positives = _positives(rule, near, pairs.positive, n)
    counts = rule.counts(relation)
    logs, weight = LogSum(total.log(), top), request.weight
    known = counts, weight, request.kept
    done = settle(rule, logs, positives, *known, each=each, together=request.together)
    by_terms = (done.by_logs / total.clamp(min=torch.finfo(total.dtype).tiny))[row] * powers
    by_terms = by_terms.to(near.dtype)
    if rule.far is not None:
        slope = rule.far.slope
        by_terms *= slope(summed) if callable(slope) else slope
    by_near = done.by_positives[near_row] if rule.sums_positives else done.by_positives
    by_near = by_near.to(near.dtype)
    if rule.with_positives:
        more, by_terms = by_terms.split_with_sizes([len(near), len(far)])
        by_near = by_near + more
    if request.kept is not None:
        counts = done.counts
    forces = by_near, by_terms
    answer = answer_for_list(closeness, relation, request, measured, forces, done.loss, counts)
    return replace(answer, each_pair=each)


@dataclass(eq=False)
class _Positives:
    """The listed positives: their sums, or each of them; see `Positives`."""

    values: Tensor
    of: Tensor
    other: Tensor | None = None
    near: None = None


def _positives(rule: LogSumRule, near: Tensor, ends: tuple[Tensor, Tensor], n: int) -> _Positives:
    row, column = ends
    if not rule.sums_positives:
        return _Positives(near, row, column)
    count = torch.bincount(row, minlength=n).clamp(min=1)
    total = sum_of(near.to(sum_dtype(near)), row, n)
    return _Positives(total, count.to(total.dtype))
