"""Means over some terms: over those that are not 0, and over those between two numbers."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import batch_cases
import cases
import pytest
import torch
from batch_cases import Case, gradients, near
from torch import Tensor

import nearfar as nf
from nearfar.engine.budget import tile_shape
from nearfar.reduction import reduce

# A term of these is a pair (tests/losses/test_pairs.py).
OF_PAIRS = {
    nf.batch_contrastive_loss,
    nf.batch_cosine_loss,
    nf.nt_xent_loss,
    nf.lifted_pair_loss,
}
# The mean of two comparisons: each has its own terms.
TWO = {"info_nce-hard-symmetric"}
OF_ROWS = [
    case
    for case in batch_cases.CASES
    if case.function not in OF_PAIRS | {nf.proxy_anchor_loss} and case.name not in TWO
]


def between(terms: Tensor, low: float, high: float, weight: Tensor | None = None) -> Tensor:
    """The mean by definition."""
    w = torch.ones_like(terms) if weight is None else weight
    inside = (terms > low) & (terms < high)
    whole = w[inside].sum()
    return (terms * w)[inside].sum() / (whole if whole > 0 else 1)


def ranges(terms: Tensor) -> list[Any]:
    low, high = terms.detach().quantile(torch.tensor([0.3, 0.8], dtype=terms.dtype)).tolist()
    return ["active", (0, inf), (low + 1e-6, inf), (low + 1e-6, high - 1e-6), (high + 1e9, inf)]


@pytest.mark.parametrize("case", OF_ROWS, ids=lambda case: case.name)
def test_the_mean_is_over_the_rows_inside(case: Case) -> None:
    data = case.draw(14, seed=2)
    weight = data.others.get("weight")
    plain = batch_cases.Data(data.rows, {k: v for k, v in data.others.items() if k != "weight"})
    for chosen in ranges(case.run(plain)):
        low, high = (0, inf) if chosen == "active" else chosen

        def true(at: batch_cases.Data, low: float = low, high: float = high) -> Tensor:
            of_rows = batch_cases.Data(at.rows, plain.others)
            return between(case.run(of_rows), low, high, weight)

        found = gradients(lambda at, chosen=chosen: case.run(at, chosen), data)
        near(found, gradients(true, data), rtol=1e-9, floor=1e-12)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_of_aligned_rows(case: cases.Case) -> None:
    if "reduction" not in case.takes:
        pytest.skip("no loss")
    x, labels = case.draw(12, 4)
    x = tuple(a.requires_grad_() for a in x)
    terms = case.run(x, labels)
    for chosen in ranges(terms):
        low, high = (0, inf) if chosen == "active" else chosen
        true, found = between(terms, low, high), case.run(x, labels, chosen)
        torch.testing.assert_close(found, true)
        ours = torch.autograd.grad(found, x, retain_graph=True)
        theirs = torch.autograd.grad(true, x, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def hinge(d: Tensor, limit: Any = 0.6) -> Tensor:
    return (limit - d).relu()


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("chosen", ["active", (0.1, 0.5)], ids=str)
def test_of_a_pair_rule(balanced: bool, learned: bool, chosen: Any) -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=chance, dtype=torch.float64).mul(0.3).requires_grad_()
    labels = torch.arange(12) % 4
    limit = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    rule = nf.PairRule(lambda d, *_: d**2, hinge, balanced=balanced)
    weight = torch.linspace(0, 2, 12, dtype=torch.float64)
    with tile_shape(5, 4):
        found = nf.batch_loss(
            rule,
            x,
            labels,
            distance="euclidean",
            learned=(limit,) if learned else (),
            weight=weight,
            reduction=chosen,
        )
    low, high = (0, inf) if chosen == "active" else chosen
    same, other = labels[:, None] == labels, ~torch.eye(12, dtype=torch.bool)
    i, j = (same & other).nonzero().T
    k, m = (~same).nonzero().T
    pull, push = (x[i] - x[j]).square().sum(1), hinge((x[k] - x[m]).norm(dim=1), limit)
    if balanced:
        true = between(pull, low, high, weight[i]) + between(push, low, high, weight[k])
    else:
        true = between(torch.cat([pull, push]), low, high, weight[torch.cat([i, k])])
    torch.testing.assert_close(found, true)
    leaves = (x, limit) if learned else (x,)
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (found, true))
    torch.testing.assert_close(ours, theirs)


def test_of_a_rule_of_anchors() -> None:
    x = torch.randn(12, 4, dtype=torch.float64).requires_grad_()
    labels = torch.arange(12) % 4

    def nearest(tile: nf.Tile) -> tuple[Tensor, Tensor]:
        d = (tile.closeness * tile.positive).sum(1)
        return d, tile.positive.sum(1) * 2

    terms = nf.batch_loss(nearest, x, labels, distance="cosine", reduction="none")
    low, high = sorted(terms.detach().tolist())[3:9:5]
    found = nf.batch_loss(nearest, x, labels, distance="cosine", reduction=(low, high))
    inside = (terms > low) & (terms < high)
    true = terms[inside].sum() / (4 * inside.sum())
    torch.testing.assert_close(found, true)
    ours, theirs = (torch.autograd.grad(loss, x)[0] for loss in (found, true))
    torch.testing.assert_close(ours, theirs)


def test_modules_keep_it() -> None:
    x, labels = torch.randn(8, 4), torch.arange(8) % 2
    for chosen in ("active", (0.5, 2.0)):
        module = nf.SupConLoss(reduction=chosen)
        assert torch.equal(module(x, labels), nf.sup_con_loss(x, labels, reduction=chosen))


def test_nan_is_not_left_out() -> None:
    terms = torch.tensor([nan, 0.0, 1.0])
    for chosen in ("active", (0.5, 2.0)):
        assert reduce(terms, chosen).isnan()


@pytest.mark.parametrize(
    "bad",
    ["avg", "each pair", None, (1.0,), (2.0, 1.0), (1.0, 1.0), (nan, 1.0), ("0", "1"), [0, 1]],
)
def test_what_is_no_reduction_is_refused(bad: Any) -> None:
    losses: list[Callable[..., Tensor]] = [
        lambda reduction: nf.sup_con_loss(torch.ones(3, 2), [0, 0, 1], reduction=reduction),
        lambda reduction: nf.contrastive_loss([[1.0]], [[2.0]], [True], reduction=reduction),
    ]
    for loss in losses:
        with pytest.raises(ValueError, match=r'^reduction must be "mean", "active", .*; got '):
            loss(reduction=bad)
