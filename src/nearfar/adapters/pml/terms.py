"""The terms of a loss, reduced as a reducer of pytorch-metric-learning asks.

Where nearfar has the reduction, it is taken inside the loss, in memory linear in the batch. Where
it has not, the reducer is given the losses of anchors, or of listed pairs and triplets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from nearfar.extras import needs
from nearfar.reduction import Reduction

with needs("pml"):
    from pytorch_metric_learning import reducers
    from pytorch_metric_learning.reducers.per_anchor_reducer import aggregation_func

LossInfo = dict[str, Any]  # what their reducers take of each part of a loss
Each = tuple[Tensor, Any, str]  # losses, the rows that they belong to, and their kind of reduction


@dataclass(frozen=True, eq=False)
class AnchorTerms:
    """A loss with one term for each anchor.

    Attributes:
        loss: takes `reduction=`.
        count: how many terms there are, those of 0 included.
        each: the terms themselves, (count,), and their anchors.
    """

    loss: Callable[..., Tensor]
    count: Callable[[], Tensor | int]
    each: Callable[[], tuple[Tensor, Tensor]]

    def info(self, reducer: Any) -> LossInfo:
        """What the reducer takes."""
        reduction = as_reduction(reducer)
        if reduction == "mean":
            return already_reduced(self.loss(reduction="sum") / _at_least_1(self.count()))
        # Anchors that have nothing to compare count there, with a loss of 0.
        with_zeros = isinstance(reduction, tuple) and reduction[0] < 0 < reduction[1]
        if reduction is None or with_zeros:
            return loss_info(*self.each(), "element")
        return already_reduced(self.loss(reduction=reduction))


@dataclass(frozen=True, eq=False)
class TupleTerms:
    """A loss with several terms for an anchor: one for each of its pairs or triplets.

    Attributes:
        loss: takes `reduction=` and `weight=`.
        counts: (n,) how many terms each anchor has.
        each: lists the terms.
        listed: whether they were listed by a miner.
    """

    loss: Callable[..., Tensor]
    counts: Callable[[], Tensor]
    each: Callable[[], Each]
    listed: bool

    def info(self, reducer: Any, labels: Tensor | None) -> LossInfo:
        """What the reducer takes."""
        reduction = as_reduction(reducer)
        if reduction is not None:
            return already_reduced(self.loss(reduction=reduction))
        if type(reducer) is reducers.ClassWeightedReducer and labels is not None:
            weight = reducer.weights.to(labels.device)[labels]
            total = self.loss(reduction="sum", weight=weight)
            return already_reduced(total / _at_least_1(self.counts().sum()))
        if type(reducer) is reducers.PerAnchorReducer and reducer.aggregation_func is _MEAN:
            return loss_info(*self._of_each_anchor(), "element")
        return loss_info(*self.each())

    def _of_each_anchor(self) -> tuple[Tensor, Tensor]:
        """(n,) the mean over the distinct terms of each anchor, and (n,) the anchors."""
        if self.listed:
            losses, (anchor, other), _ = self.each()
            n = len(self.counts())
            kept = _first_of_equal(anchor, other)
            anchor = anchor[kept]
            sums = losses.new_zeros(n).index_add(0, anchor, losses[kept])
            counts = torch.bincount(anchor, minlength=n)
        else:
            sums, counts = self.loss(reduction="none"), self.counts()
        return sums / counts.clamp(min=1), torch.arange(len(sums), device=sums.device)


_MEAN = aggregation_func


def as_reduction(reducer: object) -> Reduction | None:
    """The reduction of nearfar that a reducer is; None: it has none."""
    if type(reducer) is reducers.MeanReducer:
        return "mean"
    if type(reducer) is reducers.SumReducer:
        return "sum"
    if isinstance(reducer, reducers.ThresholdReducer) and type(reducer) in _THRESHOLDS:
        low, high = reducer.low, reducer.high
        return (-inf if low is None else low, inf if high is None else high)
    return None


_THRESHOLDS = (reducers.ThresholdReducer, reducers.AvgNonZeroReducer)


def reducer_of(reducer: Any, part: str) -> Any:
    """The reducer of one part of a loss."""
    if not isinstance(reducer, reducers.MultipleReducers):
        return reducer
    return dict(reducer.reducers.items()).get(part, reducer.default_reducer)


def loss_info(losses: Tensor, indices: Any, kind: str) -> LossInfo:
    return {"losses": losses, "indices": indices, "reduction_type": kind}


def already_reduced(loss: Tensor) -> LossInfo:
    return loss_info(loss, None, "already_reduced")


def _at_least_1(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _first_of_equal(anchor: Tensor, other: Tensor) -> Tensor:
    """The first of each of some equal pairs; (k,) each."""
    _, which = torch.unique(torch.stack([anchor, other], 1), dim=0, return_inverse=True)
    order: Tensor = which.argsort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = which[order].diff() != 0
    return order[new]
