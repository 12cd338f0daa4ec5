"""The log-sum-exp of some of a row, for rules that the engine differentiates block by block."""

from math import inf
from typing import Any

import torch
from torch import Tensor


def log_sum(terms: Tensor, who: Tensor) -> Tensor:
    """(b,) log-sum-exp of the terms (b, m) of those marked; -inf, with gradient 0, for nobody.

    One exponential a term serves value and gradient, where autograd would take two.
    """
    value: Tensor = _LogSum.apply(terms, who)  # type: ignore[no-untyped-call]
    return value


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, who: Tensor) -> Tensor:
        shown = terms.masked_fill(~who, -inf)
        top = shown.amax(1) if shown.shape[1] else shown.new_full(shown.shape[:1], -inf)
        top = top.masked_fill_(top == -inf, 0)
        powers = shown.sub_(top[:, None]).exp_()
        total = powers.sum(1)
        ctx.save_for_backward(powers, total)
        return total.log().add_(top)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        powers, total = ctx.saved_tensors
        return powers * (upstream / total.masked_fill(total == 0, 1))[:, None], None
