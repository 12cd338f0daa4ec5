"""Losses of log-sum-exps of inner products, a rule following on the product of a tile.

A first pass stores only the sums of rows and columns over each tile. A second pass multiplies again
and writes the forces, a strip of rows at a time.
"""

from typing import Any

import torch
from torch import Tensor

from nearfar.engine.gpu.comparison import Comparison, Grid, part_of
from nearfar.engine.gpu.kernels import tiles as kernels
from nearfar.engine.gpu.kernels.log_sums import Pulls, Sums
from nearfar.engine.gpu.kernels.tile import Side
from nearfar.engine.gpu.language import described
from nearfar.engine.gpu.row_owners import found_in
from nearfar.engine.gpu.settled import (
    Found,
    function,
    limits,
    of_sides,
    pull_settings,
    scale_for,
)
from nearfar.engine.gpu.shapes import shape_of
from nearfar.engine.gpu.strips import StripGradient, cut, spans_of, strip_for
from nearfar.engine.log_sum_rule import LogSumRule


def collect(rule: LogSumRule, compared: Comparison, *, both: bool) -> Found:
    """What the rows are found to have and, with `both`, after them the columns."""
    rows, columns = compared.rows, compared.columns
    spans = spans_of(compared, compared.dtype.itemsize)
    of_rows = _room(rule, rows, 1)
    of_columns = _none_yet(columns) if both else None
    far, near = function(rule.far), function(rule.near)
    for at in spans:
        own = part_of(rows, at)
        grid = compared.tiles("collect tiles", own)
        by_row = _room(rule, own, grid.parts)
        by_column = _with_room(of_columns, grid.blocks) if of_columns is not None else None
        compared.launch(
            kernels.collect_tiles,
            grid,
            *_described(compared, own, grid),
            *(own, columns, by_row, by_column, compared.words, far[1], near[1]),
            far_fn=far[0],
            near_fn=near[0],
            TOGETHER=rule.with_positives,
            BOTH=both,
        )
        _join(compared, by_row, of_rows, (slice(None), at))
        if of_columns is not None and by_column is not None:
            _join(compared, by_column, of_columns, (slice(None),))
    found = found_in(of_rows)
    if of_columns is not None:  # row i and column i are each other's only positive
        others = {**found_in(of_columns), "total": found["total"]}
        found = {name: torch.cat([t, others[name]]) for name, t in found.items()}
    return found


def _described(compared: Comparison, own: Side, grid: Grid) -> tuple[Any, Any]:
    """Some rows and all columns as tensor descriptors; None where there are no tiles."""
    if not grid.grid[0]:
        return None, None
    sizes = (own, grid.shape.rows), (compared.columns, grid.shape.columns)
    x, y = (described(side.operand, size, compared.chunk) for side, size in sizes)
    return x, y


def _room(rule: LogSumRule, side: Side, parts: int) -> Sums:
    """Room for the sums of the rows of a side over some parts of the other."""
    planes = side.operand.new_empty(4, parts, side.count, dtype=torch.float32)
    near = planes[2] if rule.with_positives else None
    return Sums(planes[0], planes[1], None, near, planes[3])


def _none_yet(side: Side) -> Sums:
    """The sums of the rows of a side over nothing."""
    top = side.operand.new_full((1, side.count), -torch.inf, dtype=torch.float32)
    return Sums(top, torch.zeros_like(top), None, None, None)


def _with_room(sums: Sums, parts: int) -> Sums:
    """Room for sums over more parts, before those over one that are known."""
    planes = sums.top.new_empty(2, parts + 1, sums.top.shape[1])
    planes[0, -1:], planes[1, -1:] = sums.top, sums.far
    return Sums(planes[0], planes[1], None, None, None)


def _join(compared: Comparison, sums: Sums, room: Sums, at: tuple[slice, ...]) -> None:
    """Join the sums over tiles (parts, n) to those of one part, which are put into `room[at]`."""
    out = Sums(*(None if plane is None else plane[at] for plane in room))
    parts, n = sums.top.shape
    given = compared.dtype, compared.chunk, sums.top.device, compared.request.limits
    shape = shape_of("join", *given)
    blocks = -(-n // shape.columns)
    for values, joined in ((sums.far, out.far), (sums.near, out.near)):
        if values is not None:
            compared.launch(
                kernels.join,
                Grid(shape, blocks, n, parts, (blocks, 1, 1)),
                *(sums.top, values, out.top, joined, parts, n),
            )
    if sums.total is not None:
        out.total.copy_(sums.total.sum(0, dtype=torch.float64))


def gradient(
    rule: LogSumRule, compared: Comparison, pulls: Pulls, *, both: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of rows and columns, see `StripGradient`, and `Answer.by_scale`."""
    of_rows, of_columns = of_sides(pulls, compared.rows.count) if both else (pulls, None)
    spans = spans_of(compared, compared.dtype.itemsize)
    forces = strip_for(compared, spans, compared.dtype)
    scale = scale_for(compared.dtype, of_rows, of_columns)
    found = StripGradient(compared)
    for at in spans:
        own, force = part_of(compared.rows, at), cut(compared, forces, at)
        grid = compared.tiles("force tiles", own)
        out = described(force, grid.shape.rows, grid.shape.columns // 4) if grid.grid[0] else None
        by_scale = compared.scale_sums(own, grid.parts)
        acting = Pulls(*(None if t is None else t[at] for t in of_rows))
        compared.launch(
            kernels.forces,
            grid,
            *(*_described(compared, own, grid), None, out, own, compared.columns),
            *(acting, of_columns, scale, by_scale, compared.words),
            *(function(rule.far)[1], function(rule.near)[1], *limits(None)),
            STORED=False,
            **pull_settings(rule, None, acting, of_columns),
        )
        found.add(force, at, scale, by_scale)
    return found.whole()
