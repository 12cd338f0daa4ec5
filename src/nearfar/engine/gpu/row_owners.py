"""Losses of log-sum-exps by programs that own rows, for short rows and for distances.

A program walks over all columns of its rows, and keeps no tile. A first pass collects the sums of
each anchor; a second one measures every pair again and pulls the rows. Where the columns are other
rows, the same kernels run with the sides exchanged.
"""

import torch
from torch import Tensor

from nearfar.engine.gpu.comparison import Comparison
from nearfar.engine.gpu.kernels import log_sums as kernels
from nearfar.engine.gpu.kernels.log_sums import Pulls, Sums
from nearfar.engine.gpu.kernels.tile import Side, Strip
from nearfar.engine.gpu.language import kernel
from nearfar.engine.gpu.settled import (
    Anchors,
    Found,
    function,
    joined,
    known,
    limits,
    of_sides,
    pull_settings,
    spread,
)
from nearfar.engine.log_sum_rule import LogSumRule, Settled


def collect(rule: LogSumRule, compared: Comparison, *, both: bool) -> Found:
    """What the rows are found to have and, with `both`, after them the columns."""
    rows, columns = compared.rows, compared.columns
    found = collect_for(rule, compared, rows, columns)
    if both:
        of_columns = collect_for(rule, compared, columns, rows, flipped=True)
        found = {name: torch.cat([t, of_columns[name]]) for name, t in found.items()}
    return found


def collect_for(
    rule: LogSumRule,
    compared: Comparison,
    own: Side,
    other: Side,
    products: Strip | None = None,
    *,
    flipped: bool = False,
) -> Found:
    """What the rows of a side are found to have, from their products with the others if given."""
    together, apart = rule.with_positives, rule.near is not None
    grid = compared.grid("collect" if products is None else "strip", own, other)
    planes = own.operand.new_empty(5, grid.parts, own.count, dtype=torch.float32)
    out = Sums(
        planes[0],
        planes[1],
        planes[2] if apart else None,
        planes[3] if apart or together else None,
        planes[4] if rule.sums_positives else None,
    )
    far, near = function(rule.far), function(rule.near)
    compared.launch(
        kernels.collect,
        grid,
        *(own, other, products, out, compared.d, compared.words, grid.split, far[1], near[1]),
        far_fn=far[0],
        near_fn=near[0],
        TOGETHER=together,
        STORED=products is not None,
        FLIPPED=flipped,
    )
    return found_in(out)


def found_in(sums: Sums) -> Found:
    """What anchors are found to have, from the sums over parts."""
    found = dict(zip(("top", "far"), joined(sums.top, sums.far), strict=True))
    if sums.near_top is not None:
        near_top, near_rest = joined(sums.near_top, sums.near)
        found["near"] = near_top + near_rest
    elif sums.near is not None:
        found["near"] = joined(sums.top, sums.near)[1]
    if sums.total is not None:
        found["total"] = sums.total.sum(0, dtype=torch.float64)
    return found


def terms(
    rule: LogSumRule,
    compared: Comparison,
    own: Side,
    found: Found,
    anchors: Anchors,
    products: Strip | None = None,
) -> Settled:
    """The losses of a rule that is a sum over positives, by one more pass over the pairs."""
    kept, counts = compared.request.kept, anchors.counts
    met = compared.mirrored or compared.spread is not None  # rows are columns too
    grid = compared.grid("collect" if products is None else "strip", own, compared.columns)
    planes = own.operand.new_empty(3, grid.parts, own.count, dtype=torch.float32)
    of = others = known(found, anchors.weight)
    if compared.spread is not None:
        others = spread(of, compared.spread)
    compared.launch(
        kernels.collect_terms,
        grid,
        *(own, compared.columns, products, of, others if met else None, *planes),
        *(compared.d, compared.words, grid.split, *limits(kept)),
        term=kernel(rule.term),
        BOTH_ENDS=rule.both_ends,
        KEPT=kept is not None,
        STORED=products is not None,
    )
    loss, by_logs, inside = planes.sum(1)
    if kept is not None:
        counts = inside if counts is None else inside * (counts > 0)
    return Settled(loss, by_logs, loss, [], counts)


def gradient(
    rule: LogSumRule, compared: Comparison, pulls: Pulls, *, both: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of rows and columns, see `Answer.da`, and `Answer.by_scale`."""
    rows, columns = compared.rows, compared.columns
    by_scale = compared.scale_sums()
    if compared.mirrored:
        da = _pulled(rule, compared, rows, rows, (pulls, pulls), by_scale, flipped=False)
        # The forces on a pair came from both ends, once for each.
        return da, None, None if by_scale is None else by_scale.sum() / 2
    if compared.spread is not None:
        both_ends = pulls, spread(pulls, compared.spread)
        da = _pulled(rule, compared, rows, columns, both_ends, by_scale, flipped=False)
        return da, None, None if by_scale is None else by_scale.sum() / 2
    of_rows, of_columns = of_sides(pulls, rows.count) if both else (pulls, None)
    da = _pulled(rule, compared, rows, columns, (of_rows, of_columns), by_scale, flipped=False)
    db = _pulled(rule, compared, columns, rows, (of_columns, of_rows), None, flipped=True)
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
    kept = compared.request.kept if rule.per_positive else None
    compared.launch(
        kernels.pull,
        grid,
        *(own, other, *pulls, parts, by_scale, compared.d, compared.words, grid.split),
        *(function(rule.far)[1], function(rule.near)[1], *limits(kept)),
        BOTH_ENDS=rule.both_ends,
        FLIPPED=flipped,
        **pull_settings(rule, kept, *pulls),
    )
    return parts[0] if grid.parts == 1 else parts.sum(0)
