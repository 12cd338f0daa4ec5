"""Losses that are a sum over pairs on a GPU: one pass over the pairs, and one for other columns.

Programs own rows, as in `log_sums.py`. If only some pairs count, one more pass counts them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nearfar.engine.closeness import Closeness
from nearfar.engine.gpu.comparison import SHORT, Comparison
from nearfar.engine.gpu.kernels import pair_sums as kernels
from nearfar.engine.gpu.kernels.tile import Side, Strip
from nearfar.engine.gpu.language import kernel
from nearfar.engine.gpu.strips import over_strips
from nearfar.engine.pair_sums import PairSum, shares, shares_of
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Request
from nearfar.reduction import Between


def run(
    rule: PairSum, closeness: Closeness, relation: Relation, request: Request, *, overlap: bool
) -> Answer:
    """The losses of a rule; see `pair_loss`."""
    # Of wide rows, strips of products are stored: 6 N^2 d, where programs that own rows would
    # multiply again for each part of the numbers that they hold.
    wide = closeness.kernel == "product" and request.a.shape[1] > SHORT and not overlap
    wide = wide and (request.kept is None or rule.mean_over == "rows")
    compared = Comparison(request, closeness, relation, wide=wide)
    pairs = _Pairs(rule, compared, request)
    if request.kept is not None and rule.mean_over == "rows":
        return _over_some_rows(pairs, request, request.kept)
    if overlap:
        pairs.limits = pairs.overlap()
    pairs.kept = request.kept
    if overlap or request.kept is not None:
        mean = request.reduction == "mean"
        share, counts = shares_of(rule, *pairs.number(), request) if mean else (1.0, 1.0)
    else:
        share, counts = shares(rule, relation, request)
    return replace(pairs.visit(share, request.weight, gradient=request.gradient), counts=counts)


def _over_some_rows(pairs: "_Pairs", request: Request, kept: Between) -> Answer:
    """Only rows whose loss is kept, which is known once all their pairs were visited."""
    outside = kept.outside(pairs.visit(1.0, request.weight, gradient=False).per_row)
    weight = (~outside).to(torch.float32)
    weight = weight if request.weight is None else weight * request.weight
    answer = pairs.visit(1.0, weight, gradient=request.gradient)
    return replace(answer, per_row=answer.per_row.masked_fill(outside, 0), counts=~outside)


class _Pairs:
    """The pairs of a comparison, as a rule sees them.

    Attributes:
        limits: (2,) the distance of the nearest negative and of the farthest positive, between
            which pairs count; None: all do.
        kept: which losses count; None: all.
    """

    def __init__(self, rule: PairSum, compared: Comparison, request: Request) -> None:
        assert rule.kernel is not None
        self.compared, self.bias = compared, request.bias
        self.functions: dict[str, Any] = {
            "positive_fn": kernel(rule.kernel.positive),
            "negative_fn": kernel(rule.kernel.negative),
        }
        self.numbers = tuple(map(float, rule.kernel.numbers)) or (0.0,)
        self.limits: Tensor | None = None
        self.kept: Between | None = None

    def visit(self, share: float | Tensor, weight: Tensor | None, *, gradient: bool) -> Answer:
        """The losses and their gradient.

        Args:
            share: how much a positive pair counts beside a negative one.
            weight: (n,) how much each row counts; None: all 1.
            gradient: whether it is wanted.
        """
        compared = self.compared
        rows, columns = compared.rows, compared.columns
        by, near = self._weights(share, weight)
        if compared.wide:
            return self._in_strips(by, near, gradient)
        by_scale = compared.scale_sums() if gradient else None
        together = compared.spread
        met = compared.mirrored or together is not None  # rows are columns too
        others = by if together is None else together.of_rows(by).to(by.dtype)
        weights = by, others if met else None
        loss, forces, da = self._visit(
            rows, columns, weights, near, gradient, by_scale, flipped=False
        )
        db, total = None, None if by_scale is None else by_scale.sum()
        if total is not None and met:
            total = total / 2  # the forces on a pair came from both ends, once for each
        if gradient and not met:
            db = self._visit(columns, rows, (None, by), near, gradient, None, flipped=True)[2]
        return Answer(loss, da=da, db=db, forces=forces, by_scale=total)

    def _weights(self, share: float | Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(n,) the weights of the rows, and what a positive pair counts, as kernels take them."""
        like = self.compared.rows.operand
        by = torch.ones_like(like[:, 0], dtype=torch.float32) if weight is None else weight
        by = by.to(torch.float32).contiguous()
        # Filled in where it is a number: a copy would wait for the device.
        return by, share.to(by) if isinstance(share, Tensor) else by.new_full((), share)

    def _visit(
        self,
        own: Side,
        other: Side,
        weights: tuple[Tensor | None, Tensor | None],
        share: Tensor,
        gradient: bool,
        by_scale: Tensor | None,
        *,
        flipped: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        compared = self.compared
        chunks = compared.width // compared.chunk if gradient else 1
        grid = compared.grid("pull" if gradient else "collect", own, other, chunks)
        new, shape = own.operand.new_empty, (grid.parts, own.count)
        loss = None if flipped else new(shape, dtype=torch.float32)
        biased = gradient and self.bias is not None and not flipped
        forces = new(shape, dtype=torch.float32) if biased else None
        out = new(*shape, compared.d, dtype=torch.float32) if gradient else None
        compared.launch(
            kernels.visit,
            grid,
            *(own, other, *weights, share, self.limits, self.bias),
            *(loss, forces, by_scale, out, *self._arguments(grid.split)),
            **self._settings(),
            FLIPPED=flipped,
        )
        total = None if loss is None else loss.sum(0, dtype=torch.float64)
        return (
            share if total is None else total,
            None if forces is None else forces.sum(dtype=torch.float64).to(torch.float32),
            None if out is None else out.sum(0),
        )

    def _in_strips(self, weight: Tensor, share: Tensor, gradient: bool) -> Answer:
        compared = self.compared
        like, n = compared.rows.operand, compared.rows.count
        loss, forces = like.new_empty(n, dtype=torch.float32), None
        if gradient and self.bias is not None:
            forces = torch.empty_like(loss)

        def visit(at: slice, own: Side, products: Strip, out: Strip) -> Tensor | None:
            by_scale = compared.scale_sums(own, 1) if gradient else None
            compared.launch(
                kernels.visit_strip,
                compared.whole_grid("strip", own),
                *(products, out if gradient else None, own, compared.columns),
                *(weight[at], share, self.bias, loss[at], None if forces is None else forces[at]),
                *(by_scale, compared.words, self.numbers),
                positive_fn=self.functions["positive_fn"],
                negative_fn=self.functions["negative_fn"],
            )
            return by_scale

        da, db, by_scale = over_strips(compared, visit, gradient=gradient)
        total = None if forces is None else forces.sum(dtype=torch.float64).to(torch.float32)
        return Answer(loss, da=da, db=db, forces=total, by_scale=by_scale)

    def overlap(self) -> Tensor:
        """(2,) the distance of the nearest negative, and that of the farthest positive."""
        nearest, farthest = self._look(torch.float32, extremes=True)
        inf = nearest.new_full((1,), torch.inf)
        low, high = torch.cat([nearest.flatten(), inf]), torch.cat([farthest.flatten(), -inf])
        return torch.stack([low.amin(), high.amax()])

    def number(self) -> tuple[Tensor, Tensor]:
        """(n,) and (n,), how many similar and how many dissimilar pairs of each row count."""
        positives, negatives = self._look(torch.int32, extremes=False)
        return positives.sum(0), negatives.sum(0)

    def _look(self, dtype: torch.dtype, *, extremes: bool) -> tuple[Tensor, Tensor]:
        compared = self.compared
        own, other = compared.rows, compared.columns
        grid = compared.grid("collect", own, other)
        planes = own.operand.new_empty(2, grid.parts, own.count, dtype=dtype)
        found = (*planes, None, None) if extremes else (None, None, *planes)
        compared.launch(
            kernels.look,
            grid,
            *(own, other, self.limits, self.bias, *found, *self._arguments(grid.split)),
            **self._settings(),
        )
        return planes[0], planes[1]

    def _arguments(self, split: int) -> tuple[Any, ...]:
        low, high = (0.0, 0.0) if self.kept is None else (self.kept.low, self.kept.high)
        return self.compared.d, self.compared.words, split, self.numbers, low, high

    def _settings(self) -> dict[str, Any]:
        return {**self.functions, "KEPT": self.kept is not None}
