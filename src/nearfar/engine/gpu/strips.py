"""Inner products of wide rows, a strip of rows at a time: products, a rule, and products back.

A strip is some rows against all columns. Its products are stored in float32: rounded to 16 bits,
exponents would be wrong by percents. Forces overwrite them, or are written beside them in 16 bits.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nearfar.engine.budget import budget_of
from nearfar.engine.gpu import row_owners
from nearfar.engine.gpu.comparison import Comparison, part_of
from nearfar.engine.gpu.kernels import tiles as kernels
from nearfar.engine.gpu.kernels.tile import Side, Strip
from nearfar.engine.gpu.multiply import multiply
from nearfar.engine.gpu.settled import (
    Anchors,
    answer,
    function,
    limits,
    pull_settings,
    pulls,
    settled,
)
from nearfar.engine.gpu.shapes import shape_of
from nearfar.engine.log_sum_rule import LogSumRule, Settled
from nearfar.engine.precision import up_to_float16
from nearfar.engine.step import Answer

# The share of the budget that the numbers of a strip may take, and of what its rows are a multiple.
_SHARE, _ROWS = 4, 128
# Rows of a strip start at multiples of so many numbers.
_ALIGNED = 16

# Takes some rows, as a slice and as a side, their products with all columns, and where forces are
# to be put, which may be the same place. Returns the sums of forces times products, of any shape;
# None: they are not wanted.
Visit = Callable[[slice, Side, Strip, Strip], Tensor | None]


def over_strips(
    compared: Comparison, visit: Visit, *, gradient: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Visit all strips of a comparison, see `Visit`, and multiply the forces back.

    Returns what `StripGradient` found; without a gradient nothing, and then no forces need to be
    put anywhere.
    """
    dtype = compared.dtype
    beside = gradient and dtype is not torch.float32
    spans = spans_of(compared, 4 + (dtype.itemsize if beside else 0))
    products = strip_for(compared, spans, torch.float32)
    narrow = strip_for(compared, spans, dtype) if beside else products
    # Forces in float16 are scaled by the largest, so that one is known first.
    forces = products if dtype is torch.float16 else narrow
    found = StripGradient(compared) if gradient else None
    columns = compared.columns.operand.T
    for at in spans:
        own = part_of(compared.rows, at)
        multiply(compared, own.operand, columns, cut(compared, products, at))
        by_scale = visit(at, own, products, forces)
        if found is not None:
            force, scale = cut(compared, narrow, at), None
            if forces is not narrow:
                scale = _scaled(cut(compared, forces, at), force)
            found.add(force, at, scale, by_scale)
    return (None, None, None) if found is None else found.whole()


def _scaled(forces: Tensor, out: Tensor) -> Tensor | None:
    """Put forces into float16, and return the power of two by which they were scaled."""
    if not forces.numel():
        return None
    up = up_to_float16(torch.stack(forces.aminmax()))
    torch.mul(forces, up, out=out)
    return up


def spans_of(compared: Comparison, size: int) -> list[slice]:
    """The rows of each strip whose pairs take so many bytes each; without rows, an empty one."""
    limits, device, n = compared.request.limits, compared.rows.operand.device, compared.rows.count
    if limits.tile is not None:
        height = 2 * shape_of("strip", compared.dtype, compared.chunk, device, limits).rows
    else:
        most = budget_of(limits, device) // _SHARE // (size * max(_pitch(compared), 1))
        height = max(most // _ROWS, 1) * _ROWS
    return [slice(k, min(k + height, n)) for k in range(0, max(n, 1), height)]


def strip_for(compared: Comparison, spans: list[slice], dtype: torch.dtype) -> Strip:
    """Room for the numbers of any strip."""
    pitch, height = _pitch(compared), spans[0].stop - spans[0].start
    return Strip(compared.rows.operand.new_empty(height, pitch, dtype=dtype), pitch)


def cut(compared: Comparison, strip: Strip, at: slice) -> Tensor:
    """(r, m) the numbers of some rows in a strip."""
    numbers: Tensor = strip.numbers[: at.stop - at.start, : compared.columns.count]
    return numbers


def _pitch(compared: Comparison) -> int:
    columns: int = compared.columns.count
    return -(-columns // _ALIGNED) * _ALIGNED


class StripGradient:
    """The gradient of both sides of a comparison, from the forces on one strip after the other.

    The gradient of a strip's rows is complete at once, and finished if the request wants that.
    """

    def __init__(self, compared: Comparison) -> None:
        self.compared, self.finish = compared, compared.request.finish
        rows, columns, d = compared.rows, compared.columns, compared.d
        self.of_columns = columns.operand.new_zeros(columns.count, d, dtype=torch.float32)
        self.of_rows: Tensor | None = None
        self.by_scale: list[Tensor] = []
        if compared.mirrored:
            self.of_rows = self.of_columns
        elif self.finish is None:
            self.of_rows = rows.operand.new_empty(rows.count, d, dtype=torch.float32)

    def add(self, force: Tensor, at: slice, scale: Tensor | None, by_scale: Tensor | None) -> None:
        """Add the gradient of sum(force * products) / scale.

        Args:
            force: (r, m) of a strip, times the scale.
            at: the rows of the strip.
            scale: None: 1.
            by_scale: sums of forces times products, which were not scaled; None: not wanted.
        """
        if by_scale is not None:
            self.by_scale.append(by_scale.sum())
        compared, d = self.compared, self.compared.d
        rows, columns = compared.rows.operand[at, :d], compared.columns.operand[:, :d]
        multiply(compared, force.T, rows, self.of_columns, more=True, scale=scale)
        if self.of_rows is not None:
            out = self.of_rows[at]
            multiply(compared, force, columns, out, more=compared.mirrored, scale=scale)
            return
        assert self.finish is not None
        strip = self.of_columns.new_empty(len(rows), d)
        multiply(compared, force, columns, strip, scale=scale)
        self.finish(at, strip)

    def whole(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(n, d) of the rows, None where each was finished; (m, d) of the columns; see `by_scale`.

        Of rows with themselves the first is all, and the second None.
        """
        by_scale = torch.stack(self.by_scale).sum() if self.by_scale else None
        return self.of_rows, None if self.compared.mirrored else self.of_columns, by_scale


def run(rule: LogSumRule, compared: Comparison, anchors: Anchors) -> Answer:
    """The losses of a rule of log-sum-exps for every row."""
    done: list[Settled] = []
    request, columns = compared.request, compared.columns
    kept = request.kept if rule.per_positive else None

    def visit(at: slice, own: Side, products: Strip, forces: Strip) -> Tensor | None:
        some = anchors.part(at)
        found = row_owners.collect_for(rule, compared, own, columns, products)
        if rule.per_positive:
            done.append(row_owners.terms(rule, compared, own, found, some, products))
        else:
            done.append(settled(rule, found, some, request.kept))
        if not request.gradient:
            return None
        acting = pulls(rule, found, done[-1], some.weight)
        grid = compared.tiles("strip", own, at_once=True)
        by_scale = compared.scale_sums(own, grid.parts)
        compared.launch(
            kernels.forces,
            grid,
            *(None, None, products, forces, own, columns, acting, None, None, by_scale),
            *(compared.words, function(rule.far)[1], function(rule.near)[1], *limits(kept)),
            STORED=True,
            **pull_settings(rule, kept, acting, None),
        )
        return by_scale

    da, db, by_scale = over_strips(compared, visit, gradient=request.gradient)
    return replace(answer(rule, anchors, request, done), da=da, db=db, by_scale=by_scale)
