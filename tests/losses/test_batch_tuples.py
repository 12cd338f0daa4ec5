"""Losses over every triplet and quadruplet against the listed ones, and what they promise."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import tuple_oracle as oracle
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tuple_cases import (
    BY_CLASS,
    LAYOUTS,
    Settings,
    agree,
    draw,
    drawn,
    gradients,
    quadruplets,
    triplets,
)

import nearfar
from nearfar import (
    BatchQuadrupletLoss,
    BatchTripletLoss,
    QuadrupletStats,
    TripletStats,
    batch_contrastive_loss,
    batch_quadruplet_loss,
    batch_triplet_loss,
    forces,
    memory_budget,
    quadruplet_stats,
    triplet_stats,
)
from nearfar.engine import anchors as lookup
from nearfar.engine import step
from nearfar.engine.budget import tile_shape

few = settings(max_examples=12, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**20)

TRIPLETS: list[Settings] = [
    {},
    {"margin": 0.0},
    {"margin": 0.3, "distance": "cosine"},
    {"margin": 2.0, "distance": "sqeuclidean"},
    {"smooth": True, "margin": 0.2},
    {"smooth": True, "margin": 0.0},
]
PICKED = ("hard", "easy_positive", "semihard")
TRIPLET_CASES = [{**how, "select": select} for select in ("all", *PICKED) for how in TRIPLETS] + [
    {"select": select, "swap": True, **how}
    for select in ("all", *PICKED)
    for how in (
        {"distance": "euclidean"},
        {"distance": "cosine"},
        {"smooth": True, "distance": "sqeuclidean"},
    )
]
QUADRUPLET_CASES: list[Settings] = [
    {"select": select, **how}
    for select in ("all", "hard")
    for how in (
        {},
        {"margin": 0.1, "margin2": 0.9},
        {"margin": 0.3, "margin2": 0.2, "distance": "cosine"},
        {"margin": 3.0, "margin2": 1.0, "distance": "sqeuclidean"},
    )
]


def named(cases: list[Settings]) -> Any:
    return pytest.mark.parametrize("how", cases, ids=lambda how: "-".join(map(str, how.values())))


# Against the listed tuples.


@pytest.mark.parametrize("layout", LAYOUTS)
@named(TRIPLET_CASES)
def test_triplets_equal_the_listed_ones(how: Settings, layout: str) -> None:
    x, labels = draw(11, layout, seed=1)
    for reduction in ("mean", "none", "active"):
        more = {**how, "reduction": reduction}
        with tile_shape(4, 4):
            found = gradients(lambda x, m=more: triplets(x, labels, **m), x)
        agree(found, gradients(lambda x, m=more: oracle.batch_triplet(x, labels, **m), x))


@pytest.mark.parametrize("layout", BY_CLASS)
@named(QUADRUPLET_CASES)
def test_quadruplets_equal_the_listed_ones(how: Settings, layout: str) -> None:
    x, labels = draw(10, layout, seed=2)
    for reduction in ("mean", "none"):
        more = {**how, "reduction": reduction}
        with tile_shape(4, 4):
            found = gradients(lambda x, m=more: quadruplets(x, labels, **m), x)
        agree(found, gradients(lambda x, m=more: oracle.batch_quadruplet(x, labels, **m), x))


def test_24_rows_and_every_quadruplet() -> None:
    x, labels = draw(24, "random", seed=3)
    for how in QUADRUPLET_CASES[:4]:
        found = gradients(lambda x, m=how: quadruplets(x, labels, **m), x)
        agree(found, gradients(lambda x, m=how: oracle.batch_quadruplet(x, labels, **m), x))


@few
@given(seeds, st.integers(0, 14), st.sampled_from(BY_CLASS), st.integers(1, 6))
def test_any_shape_and_block(seed: int, n: int, layout: str, rows: int) -> None:
    x, labels = draw(n, layout, seed, d=2)
    with tile_shape(rows, rows):
        for select in ("all", *PICKED):
            how = {"select": select, "reduction": "none"}
            found = gradients(partial(triplets, labels=labels, **how), x)
            agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **how), x))
        for select in ("all", "hard"):
            how = {"select": select, "reduction": "none"}
            found = gradients(partial(quadruplets, labels=labels, **how), x)
            agree(found, gradients(partial(oracle.batch_quadruplet, labels=labels, **how), x))


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_many_positives_take_the_look_up(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of positives per row they are looked up, not swept; here always."""
    monkeypatch.setattr(lookup, "FEW", 0)
    x, labels = draw(13, layout, seed=4)
    for select in ("all", "semihard"):
        for reduction in ("mean", "none"):
            how = {"select": select, "reduction": reduction}
            found = gradients(partial(triplets, labels=labels, **how), x)
            agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **how), x))
    if layout != "multi":
        found = gradients(partial(quadruplets, labels=labels), x)
        agree(found, gradients(partial(oracle.batch_quadruplet, labels=labels), x))


def test_the_look_up_is_what_a_class_of_many_takes() -> None:
    x, labels = draw(90, "two", seed=5)
    assert int((labels == 0).sum()) > lookup.FEW + 1
    found = gradients(partial(triplets, labels=labels), x)
    agree(found, gradients(partial(oracle.batch_triplet, labels=labels), x))


@pytest.mark.parametrize("few_positives", [True, False])
@few
@given(seed=seeds)
def test_ties_and_duplicates(seed: int, few_positives: bool) -> None:
    """On a grid around 0 all arithmetic is exact, so that equal distances are equal."""
    chance = torch.Generator().manual_seed(seed)
    half = torch.randint(-2, 3, (6, 2), generator=chance, dtype=torch.float64)
    x, labels = torch.cat([half, -half]), torch.randint(0, 3, (12,), generator=chance)
    margin = float(seed % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "FEW", lookup.FEW if few_positives else 0)
        for select in ("all", *PICKED):
            how = {"select": select, "margin": margin, "distance": "sqeuclidean"}
            found = gradients(partial(triplets, labels=labels, **how), x)
            agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **how), x))
        how = {"margin": margin, "margin2": margin, "distance": "sqeuclidean"}
        found = gradients(partial(quadruplets, labels=labels, **how), x)
        agree(found, gradients(partial(oracle.batch_quadruplet, labels=labels, **how), x))


REFERENCES = [{"select": s, **how} for s in ("all", *PICKED) for how in ({}, {"swap": True})]


@pytest.mark.parametrize("layout", ["random", "multi"])
@pytest.mark.parametrize("own", [False, True])
@named(REFERENCES)
def test_a_reference_set(how: Settings, own: bool, layout: str) -> None:
    """Mistake 4: with swap, positives and negatives are rows of the reference."""
    x, labels = draw(7, layout, seed=6)
    reference, others = draw(12, layout, seed=7)
    more = {**how, "reference_labels": others, "reduction": "none"}
    if own:
        more["reference_own"] = torch.tensor([3, -1, 0, 11, -1, 5, 2])
    with tile_shape(3, 3):
        found = gradients(lambda x, r: triplets(x, labels, reference=r, **more), x, reference)
    agree(
        found,
        gradients(lambda x, r: oracle.batch_triplet(x, labels, reference=r, **more), x, reference),
    )


@named([*TRIPLET_CASES, {"select": "distance_weighted"}, {"select": "all", "n_per_anchor": 3}])
def test_reductions_agree(how: Settings) -> None:
    x, labels = draw(9, "random", seed=8)

    def chance() -> Settings:
        return {"generator": torch.Generator().manual_seed(3)} if drawn(how) else {}

    def run(x: Tensor, **more: Any) -> Tensor:
        return batch_triplet_loss(x, labels, **how, **chance(), **more)

    rows = gradients(lambda x: run(x, reduction="none").sum(), x)
    agree(rows, gradients(partial(run, reduction="sum"), x))
    total = run(x, reduction="sum")
    _, valid, active = triplets(x, labels, **how, **chance())
    torch.testing.assert_close(run(x), total / valid)
    torch.testing.assert_close(run(x, reduction="active"), total / active)


@pytest.mark.parametrize("smooth", [False, True])
def test_gradcheck(smooth: bool) -> None:
    x, labels = draw(7, "two", seed=9)
    for reduction in ("none", "mean"):
        run = partial(batch_triplet_loss, labels=labels, smooth=smooth, reduction=reduction)
        assert torch.autograd.gradcheck(run, x.requires_grad_())
        run = partial(batch_quadruplet_loss, labels=torch.arange(7) % 3, reduction=reduction)
        assert torch.autograd.gradcheck(run, x)


def test_second_derivatives_are_refused() -> None:
    x, labels = draw(6, "two")
    loss = batch_triplet_loss(x.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


# Numbers.

LOSSES: list[tuple[Callable[..., Tensor], Settings]] = [
    *((batch_triplet_loss, {"select": s}) for s in ("all", *PICKED, "distance_weighted")),
    (batch_triplet_loss, {"smooth": True, "margin": 0.0}),
    (batch_triplet_loss, {"swap": True}),
    (batch_triplet_loss, {"swap": True, "smooth": True, "distance": "sqeuclidean"}),
    (batch_triplet_loss, {"n_per_anchor": 4}),
    (batch_triplet_loss, {"select": "all", "distance": "cosine"}),
    (batch_triplet_loss, {"select": "semihard", "distance": "cosine", "swap": True}),
    (batch_quadruplet_loss, {}),
    (batch_quadruplet_loss, {"select": "hard", "distance": "cosine"}),
    (batch_contrastive_loss, {"select": "hard"}),
]
over_losses = pytest.mark.parametrize(
    ("loss", "how"),
    LOSSES,
    ids=lambda v: v.__name__ if callable(v) else "-".join(map(str, v.values())),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@over_losses
def test_finite_in_finite_out(
    loss: Callable[..., Tensor], how: Settings, dtype: torch.dtype
) -> None:
    x, labels = draw(12, "random", seed=10)
    identical, zero = x.clone(), x.clone()
    identical[:] = x[0]
    zero[::2] = 0
    for rows in (x, identical, zero, x * 1e4, x[:1], x[:0]):
        leaf = rows.to(dtype).requires_grad_()
        for reduction in ("mean", "sum", "none"):
            torch.manual_seed(0)
            value = loss(leaf, labels[: len(rows)], reduction=reduction, **how)
            assert value.isfinite().all()
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            wide = rows.to(dtype).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            torch.manual_seed(0)
            again = loss(wide, labels[: len(rows)], reduction=reduction, **how)
            (expected,) = torch.autograd.grad(again.sum(), wide)
            assert expected.isfinite().all()
            assert gradient.dtype == dtype
            assert torch.equal(gradient, expected.to(dtype))  # which may be infinite in float16


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e160), (torch.float32, 1e25)])
@pytest.mark.parametrize(
    ("loss", "how"),
    [
        *LOSSES,
        (batch_triplet_loss, {"distance": "sqeuclidean"}),
        (batch_triplet_loss, {"select": "semihard", "distance": "sqeuclidean"}),
    ],
)
def test_rows_too_long_to_be_squared(
    loss: Callable[..., Tensor], how: Settings, dtype: torch.dtype, size: float
) -> None:
    """A square of a distance, which batch_contrastive_loss is, does not fit, and is infinite."""
    x, labels = draw(12, "random", seed=10)
    leaf = (x * size).to(dtype).requires_grad_()
    for reduction in ("mean", "sum", "none"):
        value = loss(leaf, labels, reduction=reduction, **how)
        assert not value.isnan().any()
        assert value.isfinite().all() or loss is batch_contrastive_loss
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("few_positives", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@over_losses
def test_a_nan_row_is_not_hidden(
    loss: Callable[..., Tensor],
    how: Settings,
    bad: float,
    few_positives: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither as anchor and positive, nor as the negative of all others."""
    if not few_positives:
        monkeypatch.setattr(lookup, "FEW", 0)
    x, labels = draw(7, "random", seed=11)
    labels = torch.tensor([0, 0, 1, 1, 2, 0, 3])
    for row in (0, 4, 6):
        worse = x.clone()
        worse[row, 1] = bad
        assert loss(worse, labels, **how).isnan()
        leaf = worse.requires_grad_()
        assert loss(leaf, labels, **how).isnan()


@over_losses
def test_nothing_to_compare_is_0(loss: Callable[..., Tensor], how: Settings) -> None:
    x, _ = draw(5, "one")
    for labels in (torch.zeros(5, dtype=torch.long), torch.arange(5)):
        leaf = x.clone().requires_grad_()
        for reduction in ("mean", "none"):
            value = loss(leaf, labels, reduction=reduction, **how)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            if loss is batch_contrastive_loss and len(labels.unique()) == 5:
                continue
            assert not value.any()
            assert not gradient.any()


@over_losses
def test_a_row_without_a_part_is_not_hidden(loss: Callable[..., Tensor], how: Settings) -> None:
    """One class has no negatives: no row is compared with the NaN row."""
    if loss is not batch_contrastive_loss:
        x = torch.tensor([[1.0, 2], [torch.nan, 1], [0, 1]])
        assert loss(x, [0, 0, 0], **how).isnan()


def test_without_gradient_the_value_is_the_same() -> None:
    x, labels = draw(9, "random")
    for loss, how in LOSSES:
        if not drawn(how):
            torch.testing.assert_close(
                loss(x, labels, **how), loss(x.clone().requires_grad_(), labels, **how).detach()
            )


def test_a_row_without_direction_has_cosine_0_with_all_others() -> None:
    x = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 0], [0, 1]], requires_grad=True)
    how: Settings = {"select": "hard", "margin": 1.0, "distance": "cosine", "reduction": "none"}
    loss = batch_triplet_loss(x, [0, 0, 1, 1], **how)
    torch.testing.assert_close(loss, torch.tensor([0.4, 1.2, 1.0, 1.8]))
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[2] == 0).all()


@over_losses
def test_same_input_same_bits(loss: Callable[..., Tensor], how: Settings) -> None:
    x, labels = draw(40, "random", seed=12)

    def once() -> tuple[Tensor, Tensor]:
        more = dict(how)
        if drawn(how):
            more["generator"] = torch.Generator().manual_seed(5)
        leaf = x.float().requires_grad_()
        value = loss(leaf, labels, **more)
        return value, torch.autograd.grad(value, leaf)[0]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_float32_sums_of_very_many_terms() -> None:
    """1.1 x 10^11 quadruplets; their sums may not lose more than the distances did."""
    labels = torch.arange(2500) // 8
    x = draw(2500, "one", seed=13, d=8)[0]
    assert quadruplets(x, labels)[1] > 1e11
    for run in (triplets, quadruplets):
        exact = gradients(partial(run, labels=labels), x)
        low = gradients(partial(run, labels=labels), x.float())
        torch.testing.assert_close(low[0].double(), exact[0], rtol=1e-6, atol=0)
        assert (low[1][0] - exact[1][0]).norm() <= 1e-5 * exact[1][0].norm()
        assert low[2][0] == exact[2][0]
        assert abs(low[2][1] - exact[2][1]) <= 1e-5 * exact[2][0]


@pytest.mark.parametrize("select", ["hard", "easy_positive"])
def test_float32_picks_where_the_digits_cancel(select: str) -> None:
    """Rows far from 0 and close to each other: the order of their products is mostly rounding."""
    x, labels = draw(60, "random", seed=23)
    directions = torch.nn.functional.normalize(draw(60, "random", seed=24, d=3)[0])
    groups = torch.arange(60) % 6
    for close in (x * 1e-3 + directions[groups] * 20, x + directions[groups] * 1e-3):
        low = close.float()
        true = oracle.batch_triplet(low.double(), labels, select=select, reduction="none")
        found = batch_triplet_loss(low, labels, select=select, reduction="none")
        torch.testing.assert_close(found.double(), true[0], rtol=1e-5, atol=1e-5)
        with tile_shape(7, 7):
            again = batch_triplet_loss(low, labels, select=select, reduction="none")
        torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)


@over_losses
def test_autocast_and_the_compiler_change_nothing(
    loss: Callable[..., Tensor], how: Settings
) -> None:
    x, labels = draw(12, "random", seed=25)
    how = {**how, "reduction": "none"}

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(x, labels, **how)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    def compiled(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.compile(loss, backend="eager")(x, labels, **how)

    true = gradients(run, x.float())
    for other in (cast, compiled):
        found = gradients(other, x.float())
        assert torch.equal(found[0], true[0])
        assert torch.equal(found[1][0], true[1][0])


def test_counts_do_not_overflow() -> None:
    """2.4 x 10^9 quadruplets with one anchor, more than 32 bits count."""
    n = 1500
    labels = torch.arange(n) // 500
    x = torch.zeros(n, 1)
    stats = quadruplet_stats(x, labels)
    each = 499 * (1000**2 - 2 * 500**2)
    assert stats == QuadrupletStats(n * each, n * each, n * each)
    assert triplet_stats(x, labels) == TripletStats(n * 499 * 1000, n * 499 * 1000)
    loss = batch_triplet_loss(x, labels, reduction="sum")
    torch.testing.assert_close(loss, torch.tensor(float(n * 499 * 1000)))


STATS = [
    (batch_triplet_loss, triplet_stats, {"smooth", "weight", "precision", "reduction"}),
    (batch_quadruplet_loss, quadruplet_stats, {"weight", "precision", "reduction"}),
]


@pytest.mark.parametrize(("loss", "stats", "without"), STATS)
def test_the_statistics_take_what_the_loss_takes(
    loss: Callable[..., Tensor], stats: Callable[..., Any], without: set[str]
) -> None:
    """By the same names, in the same order, and with the same defaults."""
    of_loss, of_stats = (inspect.signature(f).parameters for f in (loss, stats))
    assert [(k, p.default) for k, p in of_stats.items()] == [
        (k, p.default) for k, p in of_loss.items() if k not in without
    ]
    doc = inspect.getdoc(stats) or ""
    for name in of_stats:
        assert f"\n    {name}: " in doc
    for part in ("Args:", "Returns:", "Raises:", ">>> ", ".. math::"):
        assert part in doc


@pytest.mark.parametrize("stats", [triplet_stats, quadruplet_stats])
def test_the_statistics_take_no_gradient_and_leave_the_mode_as_it_is(
    stats: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = draw(9, "random", seed=23)
    module, asked = inspect.getmodule(stats), []

    def run(*data: Any, **how: Any) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return step.run(*data, **how)

    monkeypatch.setattr(module, "run", run)
    counted = stats(x.requires_grad_(), labels)
    assert asked == [False]
    assert torch.is_grad_enabled()
    assert all(isinstance(count, int) for count in vars(counted).values())
    with pytest.raises(ValueError, match="select must be one of"):
        stats(x, labels, select="hardest")


# Memory.


@over_losses
def test_memory_is_linear_in_the_batch(loss: Callable[..., Tensor], how: Settings) -> None:
    """One matrix of n x n bytes would break this."""
    n, budget = 1500, 2**19
    labels = torch.arange(n) // 3
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with memory_budget(budget), Allocations(x, labels) as allocations:
        loss(x, labels, **how).backward()
    assert allocations.peak < n * n / 1.5
    assert allocations.largest <= max(budget, 24 * n * 3)


# Distance-weighted picks.


def test_distance_weighted_is_the_mean_over_its_picks() -> None:
    x, labels = draw(10, "random", seed=14)

    def by(what: Callable[..., Any], seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return what(x, labels, select="distance_weighted", generator=generator)

    same = (labels[:, None] == labels) & ~torch.eye(10, dtype=torch.bool)
    stats = by(triplet_stats, 1)
    assert stats.valid == int(same.sum())
    value = by(batch_triplet_loss, 1)
    assert value != by(batch_triplet_loss, 2)


def test_distance_weighted_draws_the_same_whatever_the_block_and_in_backward() -> None:
    x, labels = draw(10, "random", seed=15)

    def run(x: Tensor, reduction: str = "none") -> Tensor:
        chance = torch.Generator().manual_seed(1)
        return batch_triplet_loss(
            x, labels, select="distance_weighted", generator=chance, reduction=reduction
        )

    whole = gradients(run, x)
    with tile_shape(3, 3):
        agree(gradients(run, x), whole)
    # Were other negatives drawn in backward, the sum's gradient would be another one.
    agree(gradients(lambda x: run(x).sum(), x), gradients(partial(run, reduction="sum"), x))


# Contrastive, the overlap only.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_online_contrastive(layout: str, reduction: str) -> None:
    x, labels = draw(12, layout, seed=16)
    for how in ({}, {"margin": 3.0}, {"margin": 0.4, "distance": "cosine"}):
        more = {**how, "reduction": reduction}
        with tile_shape(4, 5):
            found = gradients(
                partial(batch_contrastive_loss, labels=labels, select="hard", **more), x
            )
        agree(found, gradients(partial(oracle.online_contrastive, labels=labels, **more), x))


def test_pairs_at_the_edge_of_the_overlap_do_not_overlap() -> None:
    """The similar pair is as far apart as the nearest dissimilar one."""
    x = torch.tensor([[0.0], [1.0], [2.0]])
    assert batch_contrastive_loss(x, [0, 0, 1], margin=5.0, select="hard") == 0
    assert batch_contrastive_loss(x, [0, 1, 0], margin=5.0, select="hard") == 4 + 16


def test_online_contrastive_with_a_reference() -> None:
    x, labels = draw(6, "random", seed=17)
    reference, others = draw(9, "random", seed=18)
    own = torch.tensor([2, -1, 0, 1, -1, 8])

    def found(x: Tensor, rows: Tensor) -> Tensor:
        against = nearfar.Reference(rows, others, own)
        return batch_contrastive_loss(x, labels, margin=3.0, select="hard", reference=against)

    def true(x: Tensor, rows: Tensor) -> Any:
        told = {"reference": rows, "reference_labels": others, "reference_own": own}
        return oracle.online_contrastive(x, labels, margin=3.0, **told)

    agree(gradients(found, x, reference), gradients(true, x, reference))


# What is seen from outside.


def matrix_of(shown: nearfar.Forces, n: int) -> Tensor:
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.index_put_((shown.anchor, shown.other), shown.force, accumulate=True)


@pytest.mark.parametrize("tile", [3, 100])
@over_losses
def test_all_forces_together_are_the_gradient(
    loss: Callable[..., Tensor], how: Settings, tile: int
) -> None:
    n = 12
    x, labels = draw(n, "random", seed=19)
    x = torch.nn.functional.normalize(x)
    more = dict(how)

    def chance() -> Settings:
        return {"generator": torch.Generator().manual_seed(1)} if drawn(how) else {}

    leaf = x.clone().requires_grad_()
    value = loss(leaf, labels, **more, **chance())
    (gradient,) = torch.autograd.grad(value, leaf)
    with tile_shape(tile, tile):
        shown = forces(loss, x, labels, k=n * n * 3, **more, **chance())
    assert shown.loss == pytest.approx(value.item(), rel=1e-9)
    matrix = matrix_of(shown, n)
    both = matrix + matrix.T
    if how.get("distance") == "cosine":
        rebuilt = -both @ x
        rebuilt -= (rebuilt * x).sum(1, keepdim=True) * x
    else:
        apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        if how.get("distance") == "sqeuclidean":
            apart.fill_(0.5)
        by_difference = both / torch.where(apart == 0, 1, apart)
        rebuilt = by_difference.sum(1, keepdim=True) * x - by_difference @ x
    torch.testing.assert_close(rebuilt, gradient, rtol=1e-9, atol=1e-9)
    assert torch.equal(shown.similar, labels[shown.anchor] == labels[shown.other])


DIRECTED = [
    *((batch_triplet_loss, oracle.batch_triplet, {"select": s}) for s in ("all", *PICKED)),
    (batch_triplet_loss, oracle.batch_triplet, {"smooth": True}),
    (batch_triplet_loss, oracle.batch_triplet, {"select": "hard", "swap": True}),
    (batch_quadruplet_loss, oracle.batch_quadruplet, {}),
    (batch_quadruplet_loss, oracle.batch_quadruplet, {"select": "hard"}),
]


@pytest.mark.parametrize(("loss", "truth", "how"), DIRECTED)
def test_each_force_is_the_derivative_by_its_distance(
    loss: Callable[..., Tensor],
    truth: Callable[..., Any],
    how: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of i to j by itself, not added to that of j to i."""
    n = 11
    x, labels = draw(n, "random", seed=22)
    d = oracle.between(x, x, "euclidean").requires_grad_()
    monkeypatch.setattr(oracle, "between", lambda *_: d)
    truth(x, labels, **how)[0].backward()
    with tile_shape(4, 4):
        shown = forces(loss, x, labels, k=n * n * 3, **how)
    torch.testing.assert_close(matrix_of(shown, n), d.grad, rtol=1e-10, atol=1e-12)


def test_forces_count_whom_each_negative_pushes_away() -> None:
    """On a line: the positive at 1 reaches to 2, and two of three negatives are nearer."""
    x = torch.tensor([[0.0], [1.0], [1.5], [1.75], [9.0]])
    shown = forces(batch_triplet_loss, x, [0, 0, 1, 2, 3], reduction="sum", k=50)
    of_first = {
        int(o): float(f)
        for a, o, f in zip(shown.anchor, shown.other, shown.force, strict=True)
        if a == 0
    }
    assert of_first == {1: 2.0, 2: -1.0, 3: -1.0}


def test_in_a_reference_what_an_anchor_does_is_shown_as_its_doing() -> None:
    """With swap the negative at 4 is measured from the positive at 3, both of the reference."""
    shown = forces(
        batch_triplet_loss,
        torch.tensor([[0.0]]),
        [0],
        select="hard",
        swap=True,
        reference=nearfar.Reference(torch.tensor([[9.0], [3.0], [4.0]]), [1, 0, 1]),
    )
    seen = shown.anchor, shown.other, shown.force
    acts = {(int(a), int(o)): float(f) for a, o, f in zip(*seen, strict=True)}
    assert {pair: force for pair, force in acts.items() if force} == {(0, 1): 1.0, (0, 2): -1.0}


@over_losses
def test_without_tuples_there_is_no_force(loss: Callable[..., Tensor], how: Settings) -> None:
    x, _ = draw(6, "random", seed=26)
    shown = forces(loss, x, torch.zeros(6, dtype=torch.long), **how)
    assert shown.loss == 0
    assert not shown.force.any()
    assert shown.pull.shape == shown.push.shape == (6,)


def test_explain_shows_them() -> None:
    x, labels = draw(9, "random", seed=20)
    for loss, how in LOSSES:
        assert loss.__name__ in str(nearfar.explain(loss, x, labels, **how))
    assert "batch_triplet_loss" in str(nearfar.explain(BatchTripletLoss(select="hard"), x, labels))


def test_modules() -> None:
    x, labels = draw(9, "random", seed=21)
    module = BatchTripletLoss(margin=0.3, select="semihard")
    assert torch.equal(
        module(x, labels), batch_triplet_loss(x, labels, margin=0.3, select="semihard")
    )
    assert torch.equal(copy.deepcopy(BatchTripletLoss())(x, labels), batch_triplet_loss(x, labels))
    with pytest.raises(TypeError, match="got return_stats"):
        BatchTripletLoss(return_stats=True)  # type: ignore[call-arg]
    assert torch.equal(BatchQuadrupletLoss()(x, labels), batch_quadruplet_loss(x, labels))
    assert "select='semihard'" in repr(module)


@pytest.mark.parametrize("loss", [batch_triplet_loss, batch_quadruplet_loss])
def test_every_argument_is_documented(loss: Callable[..., Tensor]) -> None:
    doc = inspect.getdoc(loss) or ""
    for name in inspect.signature(loss).parameters:
        assert f"\n    {name}: " in doc
    for part in ("Args:", "Returns:", "Raises:", ">>> ", "Source: ", ".. math::"):
        assert part in doc


ERRORS: list[tuple[Callable[..., Any], Settings, str]] = [
    (
        batch_triplet_loss,
        {"select": "hardest"},
        r"select must be one of 'all', 'hard', .*'hardest'",
    ),
    (
        batch_triplet_loss,
        {"reduction": "avg"},
        r'reduction must be "mean", "active", .*avg',
    ),
    (batch_triplet_loss, {"margin": -1}, r"margin must be a number .*a difference of distances"),
    (batch_triplet_loss, {"margin": "soft"}, r"the soft margin is smooth=True, margin=0\.0"),
    (batch_triplet_loss, {"margin": "softer"}, r"margin must be a number"),
    (batch_triplet_loss, {"distance": "l2"}, r"distance must be one of"),
    (batch_triplet_loss, {"reference": np.ones((2, 3))}, r"Reference\(x, labels\); got ndarray"),
    (batch_quadruplet_loss, {"select": "semihard"}, r"select must be one of 'all', 'hard'"),
    (batch_quadruplet_loss, {"reduction": "avg"}, r"reduction must be "),
    (batch_quadruplet_loss, {"margin2": -0.1}, r"margin2 must be"),
    (batch_quadruplet_loss, {"distance": "l2"}, r"distance must be one of"),
    (batch_contrastive_loss, {"select": "semihard"}, r"select must be one of 'all', 'hard'"),
    (batch_triplet_loss, {"margin": np.ones(3)}, r"margin must be a number"),
    (
        batch_triplet_loss,
        {"select": "distance_weighted", "generator": 3},
        r"generator must be a torch.Generator, got 3.*manual_seed",
    ),
    *(
        (loss, {"distance": "l2", "select": select}, r"distance must be one of .*'l2'")
        for loss, select in (
            (batch_triplet_loss, "hard"),
            (batch_triplet_loss, "semihard"),
            (batch_triplet_loss, "distance_weighted"),
            (batch_quadruplet_loss, "hard"),
        )
    ),
]


@pytest.mark.parametrize(("loss", "how", "message"), ERRORS)
def test_errors_teach(loss: Callable[..., Any], how: Settings, message: str) -> None:
    x, labels = draw(4, "two")
    with pytest.raises((TypeError, ValueError), match=message):
        loss(x, labels, **how)


def test_multi_labels_have_no_quadruplets() -> None:
    x, labels = draw(4, "multi")
    with pytest.raises(ValueError, match=r"three different classes.*batch_triplet_loss takes"):
        batch_quadruplet_loss(x, labels)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 2), (7, 5), (13, 40)])
@pytest.mark.parametrize("reduction", ["none", "active"])
def test_triplets_in_the_order_of_their_classes(shape: tuple[int, int], reduction: str) -> None:
    """Classes smaller and larger than a tile, not in order: as in one block."""
    sizes = [1, 3, 1, 1, 6, 2, 9, 1, 2]
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))]
    x = draw(len(labels), "random", seed=8)[0]
    run = partial(triplets, labels=labels, margin=0.7, reduction=reduction)
    with tile_shape(*shape):
        found = gradients(run, x)
    with tile_shape(2 * len(x), len(x)):
        agree(found, gradients(run, x))
