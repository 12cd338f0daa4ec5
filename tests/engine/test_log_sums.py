"""A pair used for both its rows gives the same as strips, whatever the spread of exponents."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from allocations import Allocations
from batch_cases import near
from torch import Tensor

import nearfar as nf
from nearfar.engine import log_sums, running
from nearfar.engine.budget import tile_shape
from nearfar.engine.closeness import Product
from nearfar.engine.log_sum_rule import Finished, LogSum, LogSumRule
from nearfar.engine.positives import EachPositive
from nearfar.engine.relation import matched
from nearfar.engine.step import run
from nearfar.engine.walk import Walk
from nearfar.losses.contrast import have_positives, pick_one

N, D = 40, 6
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "nt_xent": partial(nf.nt_xent_loss, temperature=1.0, normalize=False),
    "nt_xent decoupled": partial(nf.nt_xent_loss, temperature=1.0, normalize=False, decoupled=True),
    "multi_similarity": partial(nf.multi_similarity_loss, beta=1.0, base=0.0, normalize=False),
    "circle": partial(nf.circle_loss, scale=1.0, normalize=False),
    "lifted_structure": partial(nf.lifted_structure_loss, distance="sqeuclidean"),
}
LABELS = {
    "few": torch.arange(N) // 4,
    "any order": torch.randint(0, 6, (N,), generator=torch.Generator().manual_seed(1)),
    "blocks of one class": (torch.arange(N) // 13),  # tiles without negatives
    "no positives": torch.arange(N),
    "one class": torch.zeros(N, dtype=torch.int64),
}


def batch(spread: float, dtype: torch.dtype) -> Tensor:
    """Rows in two groups, so that the tiles differ: of the second all products are large."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([0.3 * x[: N // 2], x[N // 2 :] * 0.2 + 1])
    return (x * (spread / D) ** 0.5).to(dtype)


def gradient(loss: Loss, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaf = x.clone().requires_grad_()
    value = loss(leaf, labels)
    return value.detach(), {"x": torch.autograd.grad(value.sum(), leaf)[0]}


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What is taken off the exponents of each tile."""
    seen: list[float | None] = []
    usual = running.Running.common_base

    def watched(self: running.Running, low: float, high: float) -> float | None:
        seen.append(usual(self, low, high))
        return seen[-1]

    monkeypatch.setattr(running.Running, "common_base", watched)
    return seen


def by_strips(loss: Loss, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EachPositive, "wants_all_tiles", lambda *_: False)
        return gradient(loss, x, labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spread", [1.0, 450.0, 5000.0])  # float64 holds exponents of 300
@pytest.mark.parametrize("layout", LABELS)
@pytest.mark.parametrize("name", LOSSES)
def test_as_strip_by_strip(
    name: str, layout: str, spread: float, reduction: str, bases: list[float | None]
) -> None:
    loss, labels = partial(LOSSES[name], reduction=reduction), LABELS[layout]
    x = batch(spread, torch.float64)
    expected = by_strips(loss, x, labels)
    for shape in ((7, 7), (16, 16), (5, 9)):
        bases.clear()
        with tile_shape(*shape):
            near(gradient(loss, x, labels), expected, 1e-11, 1e-300)
        assert bases


@pytest.mark.parametrize(("spread", "kinds"), [(1, "0"), (60, "0 some"), (2000, "none")])
def test_every_kind_of_tile_is_met(spread: float, kinds: str, bases: list[float | None]) -> None:
    """Exponents near 0, some that lie near another number, some that lie far apart."""
    x, labels = batch(spread, torch.float32), LABELS["few"]
    with tile_shape(7, 7):
        found = gradient(LOSSES["nt_xent"], x, labels)
    met = {"none" if base is None else "some" if base else "0" for base in bases}
    assert met == set(kinds.split())
    near(found, by_strips(LOSSES["nt_xent"], x.double(), labels), 3e-6)


def test_sums_of_exponentials_far_from_those_of_a_tile() -> None:
    """A row whose negatives all lie far below those of others is not rounded to nothing."""
    x = torch.tensor([[9.0, 0], [9.0, 1], [8.0, 0], [-8.0, 0], [-8.0, 1], [-9.0, 0]])
    labels = torch.tensor([0, 1, 2, 3, 4, 5]) // 2
    with tile_shape(3, 3):
        found = gradient(LOSSES["nt_xent"], x, labels)
    near(found, by_strips(LOSSES["nt_xent"], x.double(), labels), 3e-6)


def test_a_base_far_above_an_anchor_that_has_no_term_in_the_tile() -> None:
    """The middle tile is of one class, so its base is that of the tile before it.

    What its terms, which are 0, are multiplied with must not overflow.
    """
    far = torch.tensor([[10.0, 0.0]]) + 0.01 * torch.arange(3.0)[:, None]
    x = torch.cat([far, torch.tensor([[-2.0, 1], [-2, 2], [-2, 3]]), far])
    labels = torch.tensor([0, 1, 2, 3, 3, 3, 0, 1, 2])
    with tile_shape(3, 3):
        found = gradient(LOSSES["nt_xent"], x, labels)
    near(found, by_strips(LOSSES["nt_xent"], x.double(), labels), 1e-3)


def test_tiles_that_were_kept_are_as_good_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = batch(60.0, torch.float32), LABELS["any order"]
    found = []
    for room in (0, 500, 10**9):
        monkeypatch.setattr(Walk, "kept_elements", lambda *_, room=room: room)
        with tile_shape(7, 7):
            found.append([gradient(loss, x, labels) for loss in LOSSES.values()])
    for other in found[1:]:
        for (value, grads), (same, others) in zip(found[0], other, strict=True):
            assert torch.equal(value, same)
            assert torch.equal(grads["x"], others["x"])


def test_weights_count_at_both_ends() -> None:
    x, labels = batch(1.0, torch.float64), LABELS["few"]
    weight = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for loss in LOSSES.values():
        weighted = partial(loss, weight=weight, reduction="sum")
        with tile_shape(7, 7):
            found = gradient(weighted, x, labels)
        near(found, by_strips(weighted, x, labels), 1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x, labels = batch(1.0, torch.float32), LABELS["few"]
    x[3, 1] = bad
    for loss in LOSSES.values():
        with tile_shape(7, 7):
            assert loss(x, labels).isnan()


def test_where_most_are_positive_strips_need_less(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def needs(*arguments: Any) -> bool:
        chosen.append(usual(*arguments))
        return chosen[-1]

    usual = EachPositive.wants_all_tiles
    monkeypatch.setattr(EachPositive, "wants_all_tiles", needs)
    x = torch.randn(300, 4)
    for labels, by_pairs in ((torch.arange(300) // 2, True), (torch.zeros(300).long(), False)):
        chosen.clear()
        with nf.memory_budget(2**21):
            nf.nt_xent_loss(x, labels)
        assert chosen == [by_pairs]


@pytest.mark.parametrize("name", LOSSES)
def test_the_memory_of_pairs_is_linear_in_the_batch(name: str, bases: list[float | None]) -> None:
    """One matrix of all pairs would be twice the budget."""
    x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, budget = torch.arange(2048) // 8, 2**23
    with nf.memory_budget(budget), Allocations(x, labels) as allocations:
        LOSSES[name](x, labels).backward()
    assert bases
    assert allocations.peak <= budget + 8 * x.nbytes + 60 * 8 * len(x)


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_the_gradient_of_a_loss_near_0_keeps_its_digits(scale: float) -> None:
    """Factors of exponentials far above 1 would be smaller than normal numbers are."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=random)
    y = x + 0.1 * torch.randn(256, 128, generator=random)
    found, true = (
        gradient(lambda a, b: nf.clip_loss(a, b, scale=scale), x.to(dtype), y.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    near(found, true, 3e-5)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none", (0.5, 4.0)])
def test_a_number_that_a_rule_holds_gets_its_gradient(both: bool, reduction: Any) -> None:
    """Of a loss times that number; without `both`, two anchors have no positive."""
    chance = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, D, generator=chance).double() for n in (9 if both else 11, 9))
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0, 2, len(x), dtype=torch.float64)

    def finish(negatives: LogSum, positive: Tensor, count: Any) -> Finished:
        loss, by_negatives, by_positive, *_ = pick_one(negatives, positive, count)
        return factor * loss, factor * by_negatives, factor * by_positive, loss

    rule = LogSumRule(finish, have_positives, learned=True)
    relation = matched(len(x), len(y), x.device)

    def loss(t: Tensor) -> Tensor:
        nonlocal factor
        factor = t
        executor = partial(log_sums.log_sum_loss, rule, Product(), both=both)
        how: dict[str, Any] = {"normalize": True, "scale": 4.0, "learned": (t,)}
        how["closeness"] = Product()
        return run(executor, x, y, relation, reduction=reduction, weight=weight, **how)

    for tile in ((4, 3), (64, 64)):
        with tile_shape(*tile):
            assert torch.autograd.gradcheck(loss, factor)
