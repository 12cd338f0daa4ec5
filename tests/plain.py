"""The rules of the engine in plain torch, by definition: what its executors must equal."""

from math import inf

import torch
from torch import Tensor

from nearfar.engine.log_sums import LogSum, LogSumRule
from nearfar.engine.pair_sums import PairSum
from nearfar.engine.positives import EachPositive
from nearfar.engine.relation import Relation

Rule = LogSumRule | PairSum


def losses(
    rule: Rule, closeness: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,) losses of a rule, and how much each counts, from the full (n, m) closeness."""
    of = of_log_sums if isinstance(rule, LogSumRule) else of_pairs
    return of(rule, closeness, positive, negative)  # type: ignore[arg-type]


def of_pairs(
    rule: PairSum, closeness: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    near = rule.positive(closeness)[0] * rule.positive_weight
    far = rule.negative(closeness)[0]
    loss = near.where(positive, 0).sum(1) + far.where(negative, 0).sum(1)
    return loss, torch.ones_like(loss) if rule.counts is None else rule.counts


def of_log_sums(
    rule: LogSumRule, closeness: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    n, m = closeness.shape
    own = ~(positive | negative)
    counts = rule.counts(Masks(n, m, closeness.device, positive, negative))
    counts = torch.ones(n, dtype=torch.bool) if counts is None else counts
    taken = ~own if rule.with_positives else negative
    exponents = closeness if rule.exponent is None else rule.exponent(closeness)
    # 0 stands in where nothing is summed, which no gradient turns into NaN.
    some = taken.any(1)
    terms = exponents.masked_fill(~taken, -inf).masked_fill(~some[:, None], 0)
    logs = LogSum(terms.logsumexp(1).where(some, -inf))
    if rule.positives is EachPositive:
        anchor, other = positive.nonzero(as_tuple=True)
        return rule.finish(logs, closeness[anchor, other], anchor)[0], counts
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
