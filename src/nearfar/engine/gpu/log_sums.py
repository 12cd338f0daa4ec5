"""Losses of log-sum-exps on a GPU, by kernels that keep no tile.

A program owns some rows and walks over all columns. A first pass collects the sums of each anchor;
a second one measures every pair again and pulls the rows. Where the columns are other rows, the
same kernels run with the sides exchanged. No sum is taken in an order that could change, so the
bits of a result do not either.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.gpu.comparison import Comparison
from nearfar.engine.gpu.kernels import log_sums as kernels
from nearfar.engine.gpu.kernels.log_sums import Pulls, Sums
from nearfar.engine.gpu.kernels.tile import Side
from nearfar.engine.gpu.language import kernel
from nearfar.engine.log_sum_rule import (
    Exponent,
    Finished,
    LogSum,
    LogSumRule,
    Settled,
    settle,
)
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Request
from nearfar.reduction import Between


def run(
    rule: LogSumRule, closeness: Closeness, relation: Relation, request: Request, *, both: bool
) -> Answer:
    """The losses of a rule for every row, or with `both` for every row and every column."""
    compared = Comparison(request, closeness, relation)
    found = _collect(rule, compared, compared.rows, compared.columns, flipped=False)
    counts, weight = rule.counts(relation), request.weight
    if both:
        of_columns = _collect(rule, compared, compared.columns, compared.rows, flipped=True)
        found = {name: torch.cat([t, of_columns[name]]) for name, t in found.items()}
        counts, weight = (None if t is None else torch.cat([t, t]) for t in (counts, weight))
    if rule.per_positive:
        done = _terms(rule, compared, found, counts, weight)
    else:
        done = _settled(rule, found, relation, counts, weight, request, both=both)
    counts = done.counts if request.kept is not None else rule.counts(relation)
    learned = tuple(by.sum() for by in done.by_own) if rule.learned else ()
    if not request.gradient:
        return Answer(done.loss, counts)
    da, db, by_scale = _gradient(rule, compared, _pulls(rule, found, done, weight), both=both)
    return Answer(done.loss, counts, da, db, learned=learned, by_scale=by_scale)


# (n,) of each anchor: "top" and "far" are the log-sum-exp of its negatives in two parts, "near" is
# that of its positives, relative to "top" where a rule sums both together, "total" their sum.
_Found = dict[str, Tensor]


def _collect(
    rule: LogSumRule, compared: Comparison, own: Side, other: Side, *, flipped: bool
) -> _Found:
    together, apart = rule.with_positives, rule.near is not None
    grid = compared.grid("collect", own, other)
    planes = compared.rows.operand.new_empty(5, grid.parts, own.count, dtype=torch.float32)
    out = Sums(
        planes[0],
        planes[1],
        planes[2] if apart else None,
        planes[3] if apart or together else None,
        planes[4] if rule.sums_positives else None,
    )
    far, near = _function(rule.far), _function(rule.near)
    compared.launch(
        kernels.collect,
        grid,
        *(own, other, out, compared.d, compared.words, grid.split, far[1], near[1]),
        far_fn=far[0],
        near_fn=near[0],
        TOGETHER=together,
        FLIPPED=flipped,
    )
    found = dict(zip(("top", "far"), _joined(out.top, out.far), strict=True))
    if apart:
        near_top, near_rest = _joined(out.near_top, out.near)
        found["near"] = near_top + near_rest
    elif together:
        found["near"] = _joined(out.top, out.near)[1]
    if rule.sums_positives:
        found["total"] = out.total.sum(0, dtype=torch.float64)
    return found


def _joined(top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) the log-sum-exp of all parts: what is finite of its top, and the rest."""
    highest = top.amax(0)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    return highest.double(), (total * (top - highest).exp()).sum(0, dtype=torch.float64).log()


def _function(exponent: Exponent | None) -> tuple[Any, tuple[float, ...]]:
    """An exponent as kernels take it: the function, and its numbers."""
    if exponent is None:
        return None, (0.0,)
    return kernel(exponent.kernel), tuple(map(float, exponent.numbers))


@dataclass(eq=False)
class _Positives:
    """The positives of each anchor; see `Positives`."""

    values: Tensor
    of: Tensor | float
    near: Tensor | None
    other: None = None


def _settled(
    rule: LogSumRule,
    found: _Found,
    relation: Relation,
    counts: Tensor | None,
    weight: Tensor | None,
    request: Request,
    *,
    both: bool,
) -> Settled:
    """The losses, from what was collected."""
    number: Tensor | float = 1.0
    if not relation.one_positive:
        number = relation.n_positives().clamp(min=1).to(found["far"].dtype)
        number = torch.cat([number, number]) if both else number
    positives = _Positives(found.get("total", found["far"]), number, found.get("near"))
    logs = LogSum(found["far"], found["top"])
    if rule.with_positives:
        rule, logs = _one_or_all(rule, logs, found, number)
    return settle(rule, logs, positives, counts, weight, request.kept, both=both)


def _one_or_all(
    rule: LogSumRule, negatives: LogSum, found: _Found, number: Tensor | float
) -> tuple[LogSumRule, LogSum]:
    """A rule of all terms that takes the negatives alone where an anchor has one positive.

    Then `found` says what the shares of the anchors are of: "far", and "near", which is 0 where the
    positives are not summed.
    """
    every = torch.logaddexp(found["far"], found["near"])
    single = rule.single
    assert single is not None
    if not isinstance(number, Tensor):
        found["near"] = torch.zeros_like(found["far"])
        return replace(rule, finish=single), negatives
    alone = number == 1
    found["far"], found["near"] = torch.where(alone, found["far"], every), (~alone).to(every.dtype)

    def finish(logs: LogSum, total: Tensor, number: Tensor | float) -> Finished:
        of_all, of_one = rule.finish(logs, total, number), single(negatives, total, number)
        loss, by_logs, by_total = (
            torch.where(alone, one, many) for one, many in zip(of_one, of_all, strict=True)
        )
        return loss, by_logs, by_total

    return replace(rule, finish=finish), LogSum(every, negatives.top)


def _terms(
    rule: LogSumRule,
    compared: Comparison,
    found: _Found,
    counts: Tensor | None,
    weight: Tensor | None,
) -> Settled:
    """The losses of a rule that is a sum over positives, by one more pass over the pairs."""
    own, kept = compared.rows, compared.request.kept
    grid = compared.grid("collect", own, compared.columns)
    planes = own.operand.new_empty(3, grid.parts, own.count, dtype=torch.float32)
    known = _known(found, weight)
    compared.launch(
        kernels.collect_terms,
        grid,
        *(own, compared.columns, known, known if compared.mirrored else None, *planes),
        *(compared.d, compared.words, grid.split, *_range(kept)),
        term=kernel(rule.term),
        BOTH_ENDS=rule.both_ends,
        KEPT=kept is not None,
    )
    loss, by_logs, inside = planes.sum(1)
    if kept is not None:
        counts = inside if counts is None else inside * (counts > 0)
    return Settled(loss, by_logs, loss, [], counts)


def _range(kept: Between | None) -> tuple[float, float]:
    return (0.0, 0.0) if kept is None else (kept.low, kept.high)


def _known(found: _Found, weight: Tensor | None, **by: Tensor) -> Pulls:
    """The numbers of the anchors as kernels take them."""
    one = torch.ones_like(found["far"]) if weight is None else weight
    given = {"top": found["top"], "rest": found["far"], "weight": one, **by}
    single = {name: t.to(torch.float32).contiguous() for name, t in given.items()}
    return Pulls(**{name: single.get(name) for name in Pulls._fields})


def _pulls(rule: LogSumRule, found: _Found, done: Settled, weight: Tensor | None) -> Pulls:
    """How hard each anchor acts."""
    if rule.per_positive:
        return _known(found, weight, by_far=done.by_logs)
    by = {"by_far": done.by_logs}
    if rule.near is not None:
        near = found["near"].masked_fill(found["near"] == -torch.inf, torch.inf)
        return _known(found, None, **by, near=near, by_near=done.by_positives)
    if rule.with_positives:
        by["by_near"] = done.by_logs * found["near"]
    return _known(found, None, **by, by_total=done.by_positives)


def _gradient(
    rule: LogSumRule, compared: Comparison, pulls: Pulls, *, both: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of rows and columns, see `Answer.da`, and `Answer.by_scale`."""
    rows, columns, n = compared.rows, compared.columns, compared.rows.count
    by_scale = compared.scale_sums()
    if compared.mirrored:
        da = _pulled(rule, compared, rows, rows, (pulls, pulls), by_scale, flipped=False)
        # The forces on a pair came from both ends, once for each.
        return da, None, None if by_scale is None else by_scale.sum() / 2
    of_columns: Pulls | None = None
    if both:
        halves = [
            tuple(None if t is None else t[at] for t in pulls)
            for at in (slice(0, n), slice(n, None))
        ]
        pulls, of_columns = (Pulls(*half) for half in halves)
    da = _pulled(rule, compared, rows, columns, (pulls, of_columns), by_scale, flipped=False)
    db = _pulled(rule, compared, columns, rows, (of_columns, pulls), None, flipped=True)
    return da, db, None if by_scale is None else by_scale.sum()


def _pulled(
    rule: LogSumRule,
    compared: Comparison,
    own: Side,
    other: Side,
    pulls: tuple[Pulls | None, Pulls | None],
    by_scale: Tensor | None,
    *,
    flipped: bool,
) -> Tensor:
    """(n, d) the gradient of one side, by the anchors of either."""
    grid = compared.grid("pull", own, other, compared.width // compared.chunk)
    parts: Tensor = own.operand.new_empty(grid.parts, own.count, compared.d, dtype=torch.float32)
    far, near, kept = _function(rule.far), _function(rule.near), compared.request.kept
    kept = kept if rule.per_positive else None
    compared.launch(
        kernels.pull,
        grid,
        *(own, other, *pulls, parts, by_scale),
        *(compared.d, compared.words, grid.split, far[1], near[1], *_range(kept)),
        far_fn=far[0],
        near_fn=near[0],
        term=kernel(rule.term),
        BOTH_ENDS=rule.both_ends,
        KEPT=kept is not None,
        TOGETHER=rule.with_positives,
        BY_I=pulls[0] is not None,
        BY_J=pulls[1] is not None,
        FLIPPED=flipped,
    )
    return parts[0] if grid.parts == 1 else parts.sum(0)
