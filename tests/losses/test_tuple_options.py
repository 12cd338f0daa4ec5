"""What losses over tuples can be asked besides: lists, draws, weights, references and ranges."""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
import tuple_oracle as oracle
from allocations import Allocations
from batch_cases import referring
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tuple_cases import BY_CLASS, LAYOUTS, Settings, agree, draw, gradients, quadruplets, triplets

import nearfar
from nearfar import (
    Reference,
    batch_quadruplet_loss,
    batch_triplet_loss,
    forces,
    memory_budget,
    mine,
    quadruplet_stats,
    triplet_stats,
)
from nearfar.engine import anchors as lookup
from nearfar.engine.budget import tile_shape

few = settings(max_examples=12, derandomize=True, deadline=None, database=None)
SELECTED = ("all", "hard", "easy_positive", "semihard")
OWN = torch.tensor([3, -1, 0, 11, -1, 5, 2])
RANGES: list[Any] = ["active", (0.4, inf), (-1.0, 1.2), (0.3, 1.2), (-inf, inf), (-2.0, 0.0)]


def named(value: Any) -> str:
    """The id of a test's parameter, the same in every process: a function's own name."""
    return str(getattr(value, "__name__", value))


def compare(ours: Callable[..., Any], true: Callable[..., Any], *leaves: Tensor) -> None:
    agree(gradients(ours, *leaves), gradients(true, *leaves), rtol=1e-11)


def a_reference(layout: str = "random", *, own: bool = True) -> tuple[Tensor, Settings]:
    """Twelve rows of a reference, and what else the oracle is told of it."""
    reference, others = draw(12, layout, seed=7)
    return reference, {"reference_labels": others, **({"reference_own": OWN} if own else {})}


def of_own_class(labels: Tensor, told: Settings) -> Settings:
    """The same, each row with the label that it has in the batch."""
    others = told["reference_labels"].clone()
    others[OWN[OWN >= 0]] = labels[OWN >= 0]
    return {**told, "reference_labels": others}


# The mean over some of the terms.


@pytest.mark.parametrize("reduction", RANGES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_range_of_triplets(layout: str, reduction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = draw(11, layout, seed=1)
    weight = torch.linspace(0, 2, 11, dtype=torch.float64)
    for how in (
        *({"select": select} for select in SELECTED),
        {"swap": True},
        {"smooth": True},
        {"smooth": True, "swap": True, "weight": weight},
        {"distance": "cosine", "margin": 0.5, "weight": weight},
        {"distance": "snr"},
    ):
        more = {**how, "reduction": reduction}
        with tile_shape(4, 4):
            compare(
                partial(triplets, labels=labels, **more),
                partial(oracle.batch_triplet, labels=labels, **more),
                x,
            )
    monkeypatch.setattr(lookup, "FEW", 0)
    compare(
        partial(triplets, labels=labels, reduction=reduction, weight=weight),
        partial(oracle.batch_triplet, labels=labels, reduction=reduction, weight=weight),
        x,
    )


@pytest.mark.parametrize("reduction", RANGES, ids=str)
@pytest.mark.parametrize("layout", BY_CLASS)
def test_a_range_of_quadruplets(layout: str, reduction: Any) -> None:
    """The mean over the first terms that count, and that over the second ones, are added."""
    x, labels = draw(10, layout, seed=2)
    weight = torch.linspace(0, 2, 10, dtype=torch.float64)
    for how in (
        {"margin": 0.7},
        {"select": "hard", "weight": weight},
        {"margin": 0.6, "margin2": 0.9, "distance": "cosine", "weight": weight},
        {"distance": "snr"},
    ):
        more = {**how, "reduction": reduction}
        with tile_shape(4, 4):
            compare(
                partial(quadruplets, labels=labels, **more),
                partial(oracle.batch_quadruplet, labels=labels, **more),
                x,
            )


@pytest.mark.parametrize("few_positives", [True, False])
@few
@given(seed=st.integers(0, 2**20))
def test_terms_at_the_ends_of_a_range_are_outside(seed: int, few_positives: bool) -> None:
    """On a grid all arithmetic is exact, and many terms are equal to an end."""
    chance = torch.Generator().manual_seed(seed)
    half = torch.randint(-2, 3, (5, 2), generator=chance, dtype=torch.float64)
    x, labels = torch.cat([half, -half]), torch.randint(0, 3, (10,), generator=chance)
    how = {"margin": 2.0, "distance": "sqeuclidean"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "FEW", lookup.FEW if few_positives else 0)
        for reduction in ((0.0, 2.0), (1.0, 4.0), (2.0, inf), (-1.0, 2.0)):
            more = {**how, "reduction": reduction}
            for swap in (False, True):
                compare(
                    partial(triplets, labels=labels, swap=swap, **more),
                    partial(oracle.batch_triplet, labels=labels, swap=swap, **more),
                    x,
                )
            compare(
                partial(quadruplets, labels=labels, margin2=2.0, **more),
                partial(oracle.batch_quadruplet, labels=labels, margin2=2.0, **more),
                x,
            )


def test_a_range_between_margins_is_the_semihard_triplets() -> None:
    """Hinges below the margin are those of negatives beyond the positive."""
    x, labels = draw(12, "random", seed=3)
    listed = mine.violating_triplets(x, labels, margin=0.5, kind="semihard")
    torch.testing.assert_close(
        batch_triplet_loss(x, labels, margin=0.5, reduction=(0.0, 0.5)),
        batch_triplet_loss(x, None, margin=0.5, triplets=listed),
    )


def test_float32_in_a_narrow_range() -> None:
    """A sum of what is left after subtraction stays within the range of its terms."""
    x, labels = draw(300, "random", seed=4, d=8)
    for loss, ends in ((batch_triplet_loss, 1), (batch_quadruplet_loss, 2)):
        for low, high in ((0.5, 0.5001), (0.0, 0.001), (0.2, 0.4)):
            exact = loss(x, labels, reduction=(low, high))
            found = loss(x.float(), labels, reduction=(low, high))
            assert ends * low <= found <= ends * high
            torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=0)


def test_a_range_without_a_term_is_exactly_0() -> None:
    """Although what is taken away is a sum in another order."""
    x, labels = draw(60, "random", seed=4, d=8)
    leaf = x.float().requires_grad_()
    for loss in (batch_triplet_loss, batch_quadruplet_loss):
        for start in (0.1, 0.3, 0.7):
            value = loss(leaf, labels, reduction=(start, start + 1e-12))
            assert value == 0
            assert not torch.autograd.grad(value, leaf)[0].any()


def test_a_batch_too_large_for_one_tile_takes_a_range() -> None:
    """Sorted by class for all triplets and the active ones, by blocks for a range."""
    labels = torch.arange(120) % 40
    x = draw(120, "one", seed=5)[0]
    for reduction in (*RANGES, "mean"):
        more = {"margin": 0.7, "reduction": reduction}
        with tile_shape(8, 8):
            found = gradients(partial(triplets, labels=labels, **more), x)
        agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **more), x), 1e-11)


# Listed triplets.


def some_triplets(labels: Tensor, told: Settings, count: int = 40) -> Tensor:
    """Triplets drawn with replacement, in no order."""
    positives, negatives = oracle.relations(
        labels, told.get("reference_labels"), told.get("reference_own")
    )
    every = oracle.select_triplets(torch.zeros(len(labels), 12), positives, negatives, "all")
    if not every:
        return torch.zeros(0, 3, dtype=torch.int64)
    chance = torch.Generator().manual_seed(0)
    return torch.tensor(every)[torch.randint(0, len(every), (count,), generator=chance)]


@pytest.mark.parametrize("layout", ["random", "multi", "singletons"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("how", [{}, {"swap": True, "distance": "cosine"}, {"smooth": True}])
def test_listed_triplets(how: Settings, labelled: bool, layout: str) -> None:
    """Each counts as often as it is listed."""
    x, labels = draw(7, layout, seed=6)
    listed = some_triplets(labels, {})
    assert len(listed) == 0 or len(listed.unique(dim=0)) < len(listed)
    for reduction in ("mean", "sum", "none", "active", (0.3, 1.1)):
        more = {**how, "reduction": reduction, "triplets": listed}
        with tile_shape(5, 5):
            found = gradients(partial(triplets, labels=labels if labelled else None, **more), x)
        agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **more), x))


@pytest.mark.parametrize("labelled", [True, False])
def test_listed_triplets_of_a_reference(labelled: bool) -> None:
    x, labels = draw(7, "random", seed=6)
    reference, told = a_reference()
    listed = some_triplets(labels, told)
    known = told["reference_labels"] if labelled else None

    def ours(x: Tensor, rows: Tensor) -> Any:
        against = Reference(rows, known, OWN)
        return batch_triplet_loss(
            x, labels if labelled else None, triplets=listed, reference=against, swap=True
        )

    def true(x: Tensor, rows: Tensor) -> Any:
        return oracle.batch_triplet(x, labels, triplets=listed, reference=rows, swap=True, **told)[
            0
        ]

    compare(ours, true, x, reference)


def test_the_list_of_all_triplets_is_no_list() -> None:
    x, labels = draw(9, "random", seed=8)
    every = torch.cat([mine.violating_triplets(x, labels, kind=kind) for kind in ("all", "easy")])
    for how in ({}, {"swap": True}, {"smooth": True}, {"reduction": "active"}):
        alone = gradients(partial(batch_triplet_loss, labels=labels, **how), x)
        shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
        agree(
            gradients(partial(batch_triplet_loss, labels=labels, triplets=shuffled, **how), x),
            alone,
        )
    semihard = partial(batch_triplet_loss, labels=labels, select="semihard")
    listed = mine.semihard_triplets(x, labels)
    agree(
        gradients(partial(batch_triplet_loss, labels=None, triplets=listed), x),
        gradients(semihard, x),
    )
    assert triplet_stats(x, None, triplets=every) == triplet_stats(x, labels)


def test_a_list_may_be_overwritten_before_backward() -> None:
    x, labels = draw(9, "random", seed=8)
    x.requires_grad_()
    listed = mine.semihard_triplets(x, labels)
    loss = batch_triplet_loss(x, labels, triplets=listed, reduction="none")
    kept = listed.clone()
    listed.zero_()
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    again = batch_triplet_loss(x, labels, triplets=kept, reduction="sum")
    torch.testing.assert_close(gradient, torch.autograd.grad(again, x)[0])


@pytest.mark.parametrize(
    "listed", [[], np.zeros((0, 3), int), torch.zeros(0, 3, dtype=torch.int32), [[0, 1, 2]]]
)
def test_lists_of_every_kind(listed: Any) -> None:
    x = torch.tensor([[0.0], [1.0], [1.5]], requires_grad=True)
    loss = batch_triplet_loss(x, None, triplets=listed)
    assert loss == (0.5 if len(listed) else 0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[:, 0].tolist() == ([0.0, 1.0, -1.0] if len(listed) else [0.0] * 3)


def test_forces_of_a_list_show_who_is_similar() -> None:
    x = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    listed = [[0, 1, 2], [0, 1, 2], [3, 2, 0]]
    shown = forces(batch_triplet_loss, x, None, triplets=listed, reduction="sum")
    seen = zip(shown.anchor, shown.other, shown.similar, shown.force, strict=True)
    acts = {(int(a), int(o)): (bool(s), float(f)) for a, o, s, f in seen}
    assert acts == {(0, 1): (True, 2.0), (0, 2): (False, -2.0)}
    assert "batch_triplet_loss" in str(
        nearfar.explain(batch_triplet_loss, x, None, triplets=listed)
    )


def test_a_list_takes_memory_that_grows_with_it() -> None:
    n = 400
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, chance = torch.arange(n) // 4, torch.Generator().manual_seed(0)
    listed = mine.violating_triplets(x, labels, margin=9.0, max=50_000, generator=chance)
    peaks = []
    for some in (listed[::2], listed):
        with memory_budget(2**17), Allocations(x, some, labels) as allocations:
            batch_triplet_loss(x, labels, triplets=some).backward()
        peaks.append(allocations.peak)
        assert allocations.peak < 6 * some.nbytes + 2**19
    assert peaks[1] < 2.2 * peaks[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_per_pair_is_the_loss_of_each_listed_triplet(weighted: bool) -> None:
    """In the order of the list, with gradients."""
    x, labels = draw(7, "random", seed=6)
    listed = some_triplets(labels, {})
    weight = torch.linspace(0, 2, 7, dtype=torch.float64) if weighted else None
    how: Settings = {"triplets": listed, "weight": weight, "swap": True}

    def true(x: Tensor) -> Tensor:
        i, p, n = (x[rows] for rows in listed.T)
        each = nearfar.triplet_loss(i, p, n, swap=True, reduction="none")
        return each if weight is None else each * weight[listed[:, 0]]

    with tile_shape(5, 5):
        found = gradients(lambda x: nearfar.per_pair(batch_triplet_loss, x, None, **how), x)
    agree(found, gradients(true, x))
    module = nearfar.BatchTripletLoss(swap=True)
    told = {k: v for k, v in how.items() if k != "swap"}
    assert torch.equal(nearfar.per_pair(module, x, labels, **told), found[0])


# Drawn triplets.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("against", [False, True])
def test_drawn_triplets_are_triplets_of_their_anchor(layout: str, against: bool) -> None:
    """So many of each anchor that has one, and the same ones whatever the tile and in backward."""
    x, labels = draw(7, layout, seed=6)
    told: Settings = {}
    if against:
        reference, told = a_reference(layout)
        told = {"reference": reference, **told}
    positives, negatives = oracle.relations(
        labels, told.get("reference_labels"), told.get("reference_own")
    )
    how = {**referring(told), "n_per_anchor": 5}
    anchors = sum(1 for p, n in zip(positives, negatives, strict=True) if p and n)
    assert triplet_stats(x, labels, **how).valid == 5 * anchors

    def run(x: Tensor, reduction: str = "none") -> Tensor:
        chance = torch.Generator().manual_seed(1)
        return batch_triplet_loss(x, labels, generator=chance, reduction=reduction, **how)

    whole = gradients(run, x)
    with tile_shape(2, 2):
        agree(gradients(run, x), whole)
    agree(gradients(lambda x: run(x).sum(), x), gradients(partial(run, reduction="sum"), x))


@pytest.mark.parametrize("layout", ["random", "multi"])
def test_triplets_are_drawn_evenly(layout: str) -> None:
    """At unequal distances, a large mean of draws is the mean over all."""
    x, labels = draw(9, layout, seed=9)
    reference, told = a_reference(layout, own=False)
    of_row = {"reference_own": torch.tensor([3, -1, 0, 11, -1, 5, 2, 4, -1])}
    how: Settings = {"margin": 50.0, "distance": "sqeuclidean", "reduction": "none"}
    more = referring({"reference": reference, **told, **of_row})
    every = batch_triplet_loss(x, labels, **how, **more)
    n_of_each = batch_triplet_loss(
        torch.zeros_like(x),
        labels,
        margin=1.0,
        reduction="none",
        **{
            "reference": Reference(
                torch.zeros_like(reference), told["reference_labels"], of_row["reference_own"]
            )
        },
    )
    draws = 20_000
    chance = torch.Generator().manual_seed(0)
    found = batch_triplet_loss(x, labels, n_per_anchor=draws, generator=chance, **how, **more)
    some = n_of_each > 0
    assert some.sum() > 4
    torch.testing.assert_close(
        found[some] / draws, every[some] / n_of_each[some], rtol=0.01, atol=0
    )
    assert not found[~some].any()


def test_each_pair_of_a_positive_and_a_negative_is_drawn() -> None:
    """By a distance that names the two."""
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [30.0], [70.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    chance = torch.Generator().manual_seed(0)
    found = torch.zeros(2, 3)
    for _ in range(600):
        loss = batch_triplet_loss(
            x, labels, margin=100.0, n_per_anchor=1, generator=chance, reduction="none"
        )
        value = 100 - float(loss[0])
        negative = min(range(3), key=lambda j: abs((10, 30, 70)[j] - value - 1.5))
        positive = round((10, 30, 70)[negative] - value) - 1
        found[positive, negative] += 1
    assert (found / 600 - 1 / 6).abs().max() < 0.06


# The negative's distance from anchor or positive.


@pytest.mark.parametrize("n_classes", [1, 2, 12])
@pytest.mark.parametrize("smooth", [False, True])
def test_swapped_triplets_of_classes_larger_than_a_block(n_classes: int, smooth: bool) -> None:
    labels = torch.arange(24) * 7 % n_classes
    x = draw(24, "one", seed=10)[0]
    for shape in ((1, 1), (5, 5), (40, 40)):
        for reduction in ("mean", "none"):
            how = {"swap": True, "smooth": smooth, "reduction": reduction}
            with tile_shape(*shape):
                found = gradients(partial(triplets, labels=labels, **how), x)
            agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **how), x), 1e-11)


@pytest.mark.parametrize("distance", ["snr", "manhattan", 3, inf])
@pytest.mark.parametrize("against", [False, True])
def test_swapped_triplets_by_every_distance(distance: Any, against: bool) -> None:
    """The signal-to-noise distance from the positive is measured in the positive's signal."""
    x, labels = draw(7, "random", seed=6)
    reference, told = a_reference()
    how = {"swap": True, "distance": distance, "reduction": "none"}
    with tile_shape(3, 3):
        if not against:
            found = gradients(partial(triplets, labels=labels, **how), x)
            true = gradients(partial(oracle.batch_triplet, labels=labels, **how), x)
        else:
            more = {**how, **told}
            found = gradients(lambda x, r: triplets(x, labels, reference=r, **more), x, reference)
            true = gradients(
                lambda x, r: oracle.batch_triplet(x, labels, reference=r, **more), x, reference
            )
    agree(found, true, 1e-11)


@pytest.mark.parametrize("n_classes", [2, 400])
def test_swapped_triplets_take_linear_memory(n_classes: int) -> None:
    """However many of the rows are positives of a block."""
    n = 1200
    rows = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(n) % n_classes
    against = Reference(rows, labels, torch.arange(4))
    with memory_budget(2**18), Allocations(rows, labels) as allocations:
        batch_triplet_loss(rows[:4], labels[:4], swap=True, reference=against).backward()
    assert allocations.peak < n * n / 1.5


def test_swapped_triplets_with_equal_distances() -> None:
    """Half of the force acts on the anchor and half on the positive, as in `triplet_loss`."""
    x = torch.tensor([[0.0, 1], [0.0, -1], [1.0, 0]], requires_grad=True)
    weight = [1.0, 0.0, 1.0]  # that of the other way round would make up for it
    whole = batch_triplet_loss(x, [0, 0, 1], swap=True, weight=weight, reduction="sum")
    one = nearfar.triplet_loss(x[:1], x[1:2], x[2:], swap=True)
    assert whole == one
    found, true = (torch.autograd.grad(loss, x)[0] for loss in (whole, one))
    torch.testing.assert_close(found, true)


def test_swapped_triplets_show_their_forces() -> None:
    """Observers are shown each pair once: those of a list of all triplets."""
    x, labels = draw(8, "random", seed=11)
    every = mine.violating_triplets(x, labels, margin=99.0)
    one = forces(batch_triplet_loss, x, labels, swap=True, k=99)
    other = forces(batch_triplet_loss, x, labels, swap=True, triplets=every, k=99)
    torch.testing.assert_close(one.force, other.force)
    assert len(set(zip(one.anchor.tolist(), one.other.tolist(), strict=True))) == len(one.anchor)


# Weights, and rows of length 1.

WEIGHTED: list[tuple[Callable[..., Any], Callable[..., Any], Settings]] = [
    *((triplets, oracle.batch_triplet, {"select": select}) for select in SELECTED),
    (triplets, oracle.batch_triplet, {"swap": True, "distance": "cosine"}),
    (triplets, oracle.batch_triplet, {"smooth": True}),
    (quadruplets, oracle.batch_quadruplet, {}),
    (quadruplets, oracle.batch_quadruplet, {"select": "hard"}),
]
over_weighted = pytest.mark.parametrize(("ours", "true", "how"), WEIGHTED, ids=named)


@over_weighted
def test_weights(ours: Callable[..., Any], true: Callable[..., Any], how: Settings) -> None:
    """Of an anchor: the mean divides by the weights of the terms."""
    x, labels = draw(11, "random", seed=12)
    weight = torch.tensor([0, 0.5, 2, 1, 0, 3, 0.1, 1, 1, 0.2, 5], dtype=torch.float64)
    for reduction in ("mean", "sum", "none", "active"):
        more = {**how, "weight": weight, "reduction": reduction}
        with tile_shape(4, 4):
            compare(partial(ours, labels=labels, **more), partial(true, labels=labels, **more), x)
    nothing = gradients(partial(ours, labels=labels, weight=weight * 0, **how), x)
    assert not nothing[0].any()
    assert not nothing[1][0].any()


def test_weights_of_a_batch_too_large_for_one_tile() -> None:
    labels = torch.arange(60) % 20
    x, weight = draw(60, "one", seed=13)[0], torch.linspace(0, 2, 60, dtype=torch.float64)
    for reduction in ("mean", "none", "active"):
        how = {"weight": weight, "reduction": reduction}
        with tile_shape(8, 8):
            found = gradients(partial(triplets, labels=labels, **how), x)
        agree(found, gradients(partial(oracle.batch_triplet, labels=labels, **how), x), 1e-11)


@over_weighted
def test_normalize(ours: Callable[..., Any], true: Callable[..., Any], how: Settings) -> None:
    """The length of a row does not matter; a row without one is 0."""
    x, labels = draw(11, "random", seed=14)
    x[3] = 0
    how = {**how, "margin": 0.6}
    compare(
        partial(ours, labels=labels, normalize=True, **how),
        partial(true, labels=labels, normalize=True, **how),
        x,
    )
    stretched = x * torch.linspace(0.5, 9, 11, dtype=torch.float64)[:, None]
    both = [ours(rows, labels, normalize=True, **how)[0] for rows in (x, stretched)]
    torch.testing.assert_close(*both)


# Distance-weighted negatives with other cutoffs.


@pytest.mark.parametrize(
    ("cutoff", "nonzero_loss_cutoff"), [(0.0, 1.4), (0.0, 2.0), (0.8, 1.2), (0.0, 0.0), (2.0, 2.0)]
)
@pytest.mark.parametrize("d", [1, 2, 3, 64])
def test_any_cutoff_draws_negatives(cutoff: float, nonzero_loss_cutoff: float, d: int) -> None:
    """Among rows that are equal, opposite, and 0."""
    x = torch.randn(10, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1], x[2], x[3] = x[0], -x[0], 0
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 2, 0])
    chance = torch.Generator().manual_seed(0)
    how = {"cutoff": cutoff, "nonzero_loss_cutoff": nonzero_loss_cutoff, "generator": chance}
    for rows in (x, x.float()):
        found = mine.distance_weighted_negatives(rows, labels, k=50, **how)
        assert (found.indices >= 0).all()
        assert (labels[found.indices] != labels[:, None]).all()
        leaf = rows.clone().requires_grad_()
        loss = batch_triplet_loss(leaf, labels, select="distance_weighted", **how)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_without_a_cutoff_a_negative_at_distance_0_is_drawn() -> None:
    """Its weight is infinite in more than two dimensions, as the formula's is."""
    x = torch.nn.functional.normalize(torch.eye(4)[[0, 1, 0, 2]] + 0.01)
    chance = torch.Generator().manual_seed(0)
    found = mine.distance_weighted_negatives(x, [0, 0, 1, 1], k=50, cutoff=0, generator=chance)
    assert (found.indices[0] == 2).all()


def test_the_loss_draws_by_its_cutoffs() -> None:
    """With a first cutoff at the second, all near negatives are as likely, and no other is."""
    x = torch.tensor([[1.0, 0], [0.9, 0.1], [0.8, 0.6], [0.6, 0.8], [-1, 0.2]], dtype=torch.float64)
    labels, chance = torch.tensor([0, 0, 1, 2, 3]), torch.Generator().manual_seed(0)
    how = {"select": "distance_weighted", "margin": 9.0, "generator": chance, "reduction": "none"}
    losses = torch.stack(
        [
            batch_triplet_loss(x, labels, cutoff=1.2, nonzero_loss_cutoff=1.2, **how)[0]
            for _ in range(300)
        ]
    )
    of_each = [9 + (x[0] - x[1]).norm() - (x[0] - x[j]).norm() for j in (2, 3)]
    share = [(losses - of).abs().lt(1e-9).float().mean() for of in of_each]
    assert sum(share) == 1
    assert abs(share[0] - 0.5) < 0.1


# Quadruplets of a reference.

QUADRUPLETS: list[Settings] = [
    {"select": select, **how}
    for select in ("all", "hard")
    for how in (
        {},
        {"margin": 0.4, "margin2": 0.9, "distance": "cosine"},
        {"margin": 3.0, "distance": "sqeuclidean", "normalize": True},
        {"distance": "snr"},
        {"margin2": 1.0, "distance": 3.0},
    )
]


@pytest.mark.parametrize("layout", ["random", "two", "singletons", "pairs"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("how", QUADRUPLETS, ids=str)
def test_quadruplets_of_a_reference(how: Settings, own: bool, layout: str) -> None:
    x, labels = draw(7, layout, seed=6)
    reference, told = a_reference(layout, own=own)
    if own:
        told = of_own_class(labels, told)
    weight = torch.tensor([1, 0.5, 0, 2, 1, 1, 3], dtype=torch.float64)
    for reduction in ("mean", "none", "active", (0.1, 1.5)):
        more = {**how, **told, "reduction": reduction, "weight": weight}
        with tile_shape(3, 3):
            compare(
                lambda x, r, more=more: quadruplets(x, labels, reference=r, **more),
                lambda x, r, more=more: oracle.batch_quadruplet(x, labels, reference=r, **more),
                x,
                reference,
            )


def test_the_batch_as_its_own_reference() -> None:
    """Only sums are in another order."""
    x, labels = draw(12, "random", seed=15)
    for select in ("all", "hard"):
        for reduction in ("mean", "none", "active"):
            how = {"select": select, "reduction": reduction}
            alone = gradients(partial(quadruplets, labels=labels, **how), x)
            value, (rows, columns), counts = gradients(
                lambda x, r, how=how: quadruplets(
                    x,
                    labels,
                    reference=r,
                    reference_labels=labels,
                    reference_own=torch.arange(12),
                    **how,
                ),
                x,
                x.clone(),
            )
            agree((value, [rows + columns], counts), alone, 1e-11)


def test_forces_of_quadruplets_of_a_reference() -> None:
    """What the anchors do; two rows of the reference are pushed by nobody."""
    x, labels = draw(7, "random", seed=6)
    reference, told = a_reference(own=False)
    against = Reference(reference, told["reference_labels"])
    d = oracle.between(x, reference, "euclidean").requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        among = oracle.between(reference, reference, "euclidean")
        patch.setattr(oracle, "between", lambda a, *_: d if a is x else among)
        oracle.batch_quadruplet(x, labels, reference=reference, **told)[0].backward()
    with tile_shape(3, 3):
        shown = forces(batch_quadruplet_loss, x, labels, reference=against, k=7 * 12 * 2)
    found = torch.zeros_like(d)
    found[shown.anchor, shown.other] += shown.force
    torch.testing.assert_close(found, d.grad, rtol=1e-10, atol=1e-12)


def test_two_means_over_quadruplets_are_not_shown_as_one() -> None:
    x, labels = draw(9, "random", seed=3)
    with pytest.raises(ValueError, match=r"a mean over some quadruplets: pass"):
        forces(batch_quadruplet_loss, x, labels, reduction="active")


@pytest.mark.parametrize("select", ["all", "hard"])
def test_quadruplets_of_a_reference_take_linear_memory(select: Any) -> None:
    n, m, budget = 600, 1500, 2**19
    x, rows = (torch.randn(k, 4, generator=torch.Generator().manual_seed(k)) for k in (n, m))
    against = Reference(rows.requires_grad_(), torch.arange(m) // 3)
    with memory_budget(budget), Allocations(x, rows) as allocations:
        batch_quadruplet_loss(
            x.requires_grad_(), torch.arange(n) // 3, select=select, reference=against
        ).backward()
    assert allocations.peak < m * m / 1.5


# Numbers.

OPTIONS: list[tuple[Callable[..., Tensor], Settings]] = [
    (batch_triplet_loss, {"reduction": (0.2, 1.3)}),
    (batch_triplet_loss, {"swap": True, "reduction": (0.2, 1.3)}),
    (batch_triplet_loss, {"swap": True, "normalize": True}),
    (batch_triplet_loss, {"triplets": [[0, 1, 2], [3, 4, 5], [1, 0, 4]], "swap": True}),
    (batch_quadruplet_loss, {"reduction": (0.1, 1.1)}),
    (batch_quadruplet_loss, {"normalize": True, "select": "hard", "reduction": "active"}),
]
over_options = pytest.mark.parametrize(("loss", "how"), OPTIONS, ids=named)


@over_options
def test_gradcheck(loss: Callable[..., Tensor], how: Settings) -> None:
    x, _ = draw(7, "one", seed=16)
    labels = torch.tensor([0, 0, 1, 2, 2, 0, 1])
    assert torch.autograd.gradcheck(partial(loss, labels=labels, **how), x.requires_grad_())


def test_gradcheck_of_quadruplets_of_a_reference() -> None:
    x, labels = draw(7, "random", seed=6)
    reference, told = a_reference(own=False)
    for how in ({}, {"reduction": "none"}, {"select": "hard"}, {"reduction": (0.1, 1.5)}):
        assert torch.autograd.gradcheck(
            lambda x, r, how=how: batch_quadruplet_loss(
                x, labels, reference=Reference(r, told["reference_labels"]), **how
            ),
            (x.requires_grad_(), reference.requires_grad_()),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@over_options
def test_finite_in_finite_out(loss: Callable[..., Tensor], how: Settings, dtype: Any) -> None:
    x, _ = draw(7, "one", seed=17)
    labels = torch.tensor([0, 0, 1, 2, 2, 0, 1])
    equal, zero = x[:1].repeat(7, 1), x * (torch.arange(7) % 2)[:, None]
    sizes = [1, 1e4] if dtype is torch.float16 else [1, 1e4, 1e15, 1e-15]
    for rows in (*(x * size for size in sizes), equal, zero):
        leaf = rows.to(dtype).requires_grad_()
        value = loss(leaf, labels, **how)
        assert value.isfinite()
        assert torch.autograd.grad(value, leaf)[0].isfinite().all() or dtype is torch.float16
    for bad in (torch.nan, inf):
        worse = x.clone()
        worse[4, 1] = bad
        assert loss(worse, labels, **how).isnan()


def test_low_precision_sums_both_means_before_rounding() -> None:
    x, labels = draw(12, "random", seed=18)
    low = x.half().requires_grad_()
    (found,) = torch.autograd.grad(batch_quadruplet_loss(low, labels, reduction="active"), low)
    wide = low.detach().float().requires_grad_()
    (true,) = torch.autograd.grad(batch_quadruplet_loss(wide, labels, reduction="active"), wide)
    assert torch.equal(found, true.half())


X, LABELS = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 0, 1, 1, 2])
ERRORS: list[tuple[Callable[..., Any], Settings, str]] = [
    (
        batch_triplet_loss,
        {"triplets": [[0, 1, 2]], "select": "hard"},
        "triplets says which triplets",
    ),
    (batch_triplet_loss, {"n_per_anchor": 2, "select": "hard"}, "n_per_anchor says which triplets"),
    (batch_triplet_loss, {"n_per_anchor": 2, "triplets": [[0, 1, 2]]}, "n_per_anchor draws"),
    (batch_triplet_loss, {"n_per_anchor": 0}, "n_per_anchor must be an integer of at least 1"),
    (batch_triplet_loss, {"n_per_anchor": True}, "n_per_anchor must be an integer of at least 1"),
    (
        batch_triplet_loss,
        {"n_per_anchor": 2, "generator": 7},
        "generator must be a torch.Generator",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0.0, 1, 2]]},
        "triplets must be row indices of an integer",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[True] * 3]},
        "triplets must be row indices of an integer",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1]]},
        r"triplets must have shape \(t, 3\).*got \(1, 2\)",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1]] * 3},
        r"got \(3, 2\). Pass torch.tensor\(triplets\).T",
    ),
    (
        batch_triplet_loss,
        {"triplets": torch.zeros(3, 2, dtype=torch.int64)},
        r"Pass triplets.T",
    ),
    (batch_triplet_loss, {"triplets": [0, 1, 2]}, r"triplets must have shape \(t, 3\)"),
    (
        batch_triplet_loss,
        {"triplets": tuple(torch.tensor([0, 1, 2]) for _ in range(3))},
        r"got three arrays.*pass torch.stack\(\[a, p, n\], 1\)",
    ),
    (
        batch_triplet_loss,
        {"triplets": [np.array([0, 1]) for _ in range(3)]},
        r"got three arrays.*pass np.stack\(\[a, p, n\], 1\)",
    ),
    (
        batch_triplet_loss,
        {"triplets": (mine.hard_positives(X, LABELS), mine.hard_negatives(X, LABELS))},
        "not rows or pairs that a miner found: nearfar.mine.easy_hard_triplets",
    ),
    (
        batch_triplet_loss,
        {"triplets": mine.hard_pairs(X, LABELS)},
        "not rows or pairs that a miner found: nearfar.mine.easy_hard_triplets",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1, 5]]},
        r"^triplets\[0\] is \[0, 1, 5\], whose negative is not in the batch, which has rows 0 to 4 "
        r"\(1 of 1\)\.$",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1, 2], [-1, 1, 2]]},
        r"^triplets\[1\] is \[-1, 1, 2\], whose anchor is not in the batch",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 0, 2]]},
        r"triplets\[0\] is \[0, 0, 2\], whose positive is the anchor itself",
    ),
    (
        batch_triplet_loss,
        {"labels": None, "triplets": [[0, 1, 1]]},
        "whose positive and negative are the same row",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1, 2], [0, 2, 1]]},
        r"^triplets\[1\] is \[0, 2, 1\], whose anchor and positive share no label",
    ),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1, 2], [2, 3, 3]]},
        "whose positive and negative are the same row",
    ),
    (batch_triplet_loss, {"labels": None}, "unless pairs or triplets are listed"),
    (
        batch_triplet_loss,
        {"triplets": [[0, 1, 2]], "reference": Reference(X, LABELS, [1, 0, 2, 3, 4])},
        r"triplets\[0\] is \[0, 1, 2\], whose positive is the anchor itself",
    ),
    (batch_triplet_loss, {"cutoff": -0.1}, "cutoff must be a number from 0 to 2, a distance"),
    (batch_triplet_loss, {"nonzero_loss_cutoff": 0.4}, "nonzero_loss_cutoff must be a number from"),
    (batch_triplet_loss, {"weight": [1.0]}, r"weight must have shape \(5,\)"),
    (batch_triplet_loss, {"weight": [-1.0] * 5}, "weight must be 0 or more"),
    (batch_triplet_loss, {"reduction": (1.0, 0.5)}, "low < high"),
    (batch_quadruplet_loss, {"weight": [1.0]}, r"weight must have shape \(5,\)"),
    (batch_quadruplet_loss, {"reference": X}, r"Reference\(x, labels\)"),
    (
        batch_quadruplet_loss,
        {"reference": Reference(X, LABELS, [0, 2, -1, -1, -1])},
        "reference.own must be a row of the reference with the same label; reference.own.1. is 2",
    ),
    (quadruplet_stats, {"reference": Reference(X, LABELS, [0, 2, -1, -1, -1])}, "the same label"),
]


@pytest.mark.parametrize(("loss", "how", "message"), ERRORS)
def test_errors_teach(loss: Callable[..., Any], how: Settings, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        loss(X, **{"labels": LABELS, **how})


def test_multi_labels_of_a_reference_have_no_quadruplets() -> None:
    x, labels = draw(4, "multi")
    with pytest.raises(ValueError, match=r"three different classes"):
        batch_quadruplet_loss(x, labels, reference=Reference(x, labels))


@pytest.mark.parametrize("m", [0, 1])
def test_a_reference_of_few_rows(m: int) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    rows = torch.randn(m, 3, requires_grad=True)
    against = Reference(rows, torch.zeros(m, dtype=torch.long))
    for loss, hows in (
        (batch_triplet_loss, ({"swap": True}, {"n_per_anchor": 2}, {"reduction": (0.1, 0.2)})),
        (batch_quadruplet_loss, ({}, {"select": "hard"}, {"reduction": "active"})),
    ):
        for how in hows:
            value = loss(x, [0, 0, 1, 1], reference=against, **how)
            assert value == 0
            assert not any(g.any() for g in torch.autograd.grad(value, (x, rows)))
