"""The rules of the engine in plain torch, by definition: what its executors must equal."""

from math import inf

import torch
from torch import Tensor

from nearfar.engine.log_sum_rule import LogSum, LogSumRule
from nearfar.engine.pair_sums import PairSum
from nearfar.engine.relation import Relation

Rule = LogSumRule | PairSum


def losses(
    rule: Rule, closeness: Tensor, positive: Tensor, negative: Tensor, *, mean: bool = True
) -> tuple[Tensor, Tensor]:
    """(n,) losses of a rule, and how much each counts, from the full (n, m) closeness.

    Of a sum over pairs, both depend on whether a mean is wanted.
    """
    if isinstance(rule, LogSumRule):
        return of_log_sums(rule, closeness, positive, negative)
    return of_pairs(rule, closeness, positive, negative, mean)


def of_pairs(
    rule: PairSum, closeness: Tensor, positive: Tensor, negative: Tensor, mean: bool
) -> tuple[Tensor, Tensor]:
    near, far = rule.positive(closeness)[0], rule.negative(closeness)[0]
    weight, counts = 1.0, 1.0
    if mean and rule.mean_over == "kinds":
        weight, counts = negative.sum() / positive.sum().clamp(min=1), negative.sum()
    elif mean and rule.mean_over == "pairs":
        counts = negative.sum() + positive.sum()
    loss = (near * weight).where(positive, 0).sum(1) + far.where(negative, 0).sum(1)
    return loss, torch.ones_like(loss) if rule.mean_over == "rows" else counts


def of_log_sums(
    rule: LogSumRule, closeness: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    n, m = closeness.shape
    own = ~(positive | negative)
    counts = rule.counts(Masks(n, m, closeness.device, positive, negative))
    counts = torch.ones(n, dtype=torch.bool) if counts is None else counts
    taken = ~own if rule.with_positives else negative
    exponents = closeness if rule.far is None else rule.far.of(closeness)
    # 0 stands in where nothing is summed, which no gradient turns into NaN.
    some = taken.any(1)
    terms = exponents.masked_fill(~taken, -inf).masked_fill(~some[:, None], 0)
    logs = LogSum(terms.logsumexp(1).where(some, -inf))
    if rule.near is not None:
        near = rule.near.of(closeness).masked_fill(~positive, -inf)
        near = near.masked_fill(~positive.any(1, keepdim=True), 0).logsumexp(1)
        return rule.finish(logs, near.where(positive.any(1), -inf), None)[0], counts
    if rule.per_positive:
        ends = positive.nonzero(as_tuple=True)
        of = tuple(map(logs.of, ends)) if rule.both_ends else logs.of(ends[0])
        terms = rule.finish(of, closeness[ends], None)[0]
        return terms.new_zeros(n).index_add(0, ends[0], terms), counts
    total = torch.where(positive, closeness, 0).sum(1)
    loss = rule.finish(logs, total, positive.sum(1).clamp(min=1))[0]
    return loss, counts


class Masks(Relation):
    """A relation of which nothing is known but its masks."""

    def __init__(
        self, n: int, m: int, device: torch.device, positive: Tensor, negative: Tensor
    ) -> None:
        super().__init__(n, m, device)
        self._masks = positive, negative

    def n_positives(self) -> Tensor:
        return self._masks[0].sum(1)

    def n_negatives(self) -> Tensor:
        return self._masks[1].sum(1)
