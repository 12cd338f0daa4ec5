"""Every distance in every loss that takes one: tiles, lists of tuples, and functions of one's own.

The distances between aligned rows are in the table of `cases.py`; those of tiles in that of
`batch_cases.py` too.
"""

from collections.abc import Callable
from functools import partial
from math import inf, nan
from typing import Any

import pytest
import torch
import tuple_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearfar as nf
from nearfar.distance import Distance, between_rows
from nearfar.engine.budget import tile_shape
from nearfar.engine.closeness import by_distance

few = settings(max_examples=12, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**20)

NEW: list[Distance] = ["snr", "manhattan", 3, 1.5, 2.5, 40.0, inf]
each = pytest.mark.parametrize("distance", NEW, ids=str)


def said(distance: Any) -> str:
    return getattr(distance, "__name__", str(distance))


def draw(n: int, d: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=chance, dtype=torch.float64).to(dtype)


def gradients(loss: Callable[..., Tensor], *rows: Tensor) -> tuple[Tensor, ...]:
    """The loss under unequal weights, and the gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in rows]
    value = loss(*leaves)
    steps = torch.linspace(-0.5, 0.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    total = (value * (1.5 + steps if value.numel() > 1 else 1)).sum()
    return value.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)


def agree(found: tuple[Tensor, ...], true: tuple[Tensor, ...], rtol: float = 1e-11) -> None:
    for a, b in zip(found, true, strict=True):
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * size)


# A tile.


def measured(distance: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
    closeness = by_distance(distance)
    a, b = closeness.prepare(x, y)
    return closeness.measure(a, a if b is None else b)[0]


@each
def test_a_tile_holds_the_distances_between_its_rows_and_columns(distance: Distance) -> None:
    for r, c, d in ((5, 7, 4), (1, 9, 2), (40, 30, 3), (3, 2, 700)):
        x, y = draw(r, d), draw(c, d, seed=1)
        true = oracle.between(x, y, distance)
        torch.testing.assert_close(measured(distance, x, y), true, rtol=1e-12, atol=1e-12)
        apart = ~torch.eye(r, dtype=torch.bool)  # a row's distance to itself has no meaning
        within = oracle.between(x, x, distance)[apart]
        torch.testing.assert_close(measured(distance, x)[apart], within, rtol=1e-12, atol=1e-12)


@each
def test_a_tile_without_rows_or_columns_is_empty(distance: Distance) -> None:
    for r, c in ((0, 3), (3, 0), (0, 0)):
        assert measured(distance, draw(r), draw(c)).shape == (r, c)
    assert measured(distance, draw(0)).shape == (0, 0)


@each
def test_a_tile_and_aligned_rows_agree_on_extremes(distance: Distance) -> None:
    """Huge, tiny and constant rows, alone and mixed, in float32: the same numbers, none NaN."""
    for size in (1e-30, 1e-15, 1.0, 1e15, 1e25):
        for other in (1e-15, 1.0, 1e15, size):
            x, y = size * draw(6, dtype=torch.float32), other * draw(8, seed=1, dtype=torch.float32)
            x[1], x[2], y[0], y[1] = 0, size, 0, x[3]
            found = measured(distance, x, y)
            rows, columns = torch.cartesian_prod(torch.arange(6), torch.arange(8)).T
            true = between_rows(x[rows], y[columns], distance).reshape(6, 8)
            assert found.isfinite().all()
            torch.testing.assert_close(found, true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("apart", [1e-2, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@each
def test_near_duplicates_keep_their_digits(distance: Distance, offset: float, apart: float) -> None:
    """In float32, far from 0 too; coordinates on a grid, so that adding 100 rounds nothing."""
    x = (draw(20, 16) * 2**10).round() / 2**10
    x[10:] = x[:10] + apart * draw(10, 16, seed=1).sign().mul(2**16 * apart).round() / 2**16 / apart
    near = torch.arange(10)
    found = measured(distance, (x + offset).float())[near, near + 10].double()
    true = oracle.between(x, x, distance)[near, near + 10]
    torch.testing.assert_close(found, true, rtol=2e-5, atol=0)


def weighing(factors: Tensor) -> Callable[[nf.Tile], Tensor]:
    """A rule that adds up all distances of an anchor to others, each by its own factor."""

    def rule(tile: nf.Tile) -> Tensor:
        others = tile.positive | tile.negative
        return (tile.closeness * factors[tile.rows, tile.columns]).where(others, 0).sum(1)

    return rule


@pytest.mark.parametrize("reference", [False, True])
@each
def test_every_gradient_of_a_tile(distance: Distance, reference: bool) -> None:
    """By both ends, in one tile and in many, for rows that are far, close and equal."""
    x, y = draw(9), draw(11, seed=1)
    x[3], x[4], y[5], y[6] = x[2], x[1] + 1e-7, x[2], x[7] + 1e-7
    factors, labels = draw(9, 11, seed=2), torch.arange(9) % 3

    def ours(x: Tensor, y: Tensor) -> Tensor:
        against = nf.Reference(y, torch.arange(11) % 3) if reference else None
        how: dict[str, Any] = {"distance": distance, "reference": against, "reduction": "none"}
        return nf.batch_loss(weighing(factors), x, labels, **how)

    def truth(x: Tensor, y: Tensor) -> Tensor:
        apart = ~torch.eye(9, 11 if reference else 9, dtype=torch.bool) | reference
        d = oracle.between(x, y if reference else x, distance)
        return (d * factors[:, : d.shape[1]]).where(apart, 0).sum(1)

    expected = gradients(truth, x, y)
    for shape in ((20, 20), (4, 3)):
        with tile_shape(*shape):
            agree(gradients(ours, x, y), expected, 1e-7 if distance == inf else 1e-9)


@each
def test_equal_rows_are_at_0_without_gradient(distance: Distance) -> None:
    x = draw(1).repeat(4, 1)

    def loss(x: Tensor) -> Tensor:
        rule = weighing(torch.ones(4, 4))
        return nf.batch_loss(rule, x, [0, 0, 1, 1], distance=distance)

    _, gradient = gradients(loss, x)
    assert not gradient.any()
    pair = partial(nf.batch_contrastive_loss, labels=[0, 0, 1, 1], margin=0.0, distance=distance)
    value, gradient = gradients(pair, x)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("reference", [False, True])
def test_a_pair_of_an_asymmetric_distance_is_seen_from_both_ends(reference: bool) -> None:
    """In a batch with itself, no tile may stand for its transpose."""
    x = draw(13) * torch.linspace(0.5, 3, 13)[:, None]
    labels = torch.arange(13) % 4
    d = oracle.between(x, x, "snr")
    assert (d - d.T).abs().max() > 1
    how: dict[str, Any] = {"distance": "snr", "margin": 2.0, "reduction": "none"}
    if reference:
        how["reference"] = nf.Reference(x, labels, own=torch.arange(13))
    same = labels[:, None] == labels
    terms = torch.where(same, d.square(), (2 - d).relu().square()).fill_diagonal_(0)
    with tile_shape(3, 3):
        torch.testing.assert_close(nf.batch_contrastive_loss(x, labels, **how), terms.sum(1))


# What the names say.


@pytest.mark.parametrize(
    ("name", "p"), [("manhattan", 1), ("manhattan", 1.0), ("euclidean", 2), ("euclidean", 2.0)]
)
def test_a_norm_that_has_a_name_is_the_same_by_its_number(name: Any, p: float) -> None:
    x, y, labels = draw(12), draw(12, seed=1), torch.arange(12) // 3
    for loss in (
        lambda how: nf.contrastive_loss(x, y, labels > 1, distance=how),
        lambda how: nf.batch_contrastive_loss(x, labels, distance=how),
        lambda how: nf.batch_triplet_loss(x, labels, distance=how, select="hard"),
        lambda how: nf.batch_quadruplet_loss(x, labels, distance=how),
        lambda how: nf.mine.hard_negatives(x, labels, distance=how).distances,
    ):
        assert torch.equal(loss(name), loss(p))


@few
@given(seeds, st.floats(1, 60), st.floats(1, 60))
def test_norms_shrink_with_p_and_lie_between_their_limits(seed: int, p: float, q: float) -> None:
    x, y = draw(7, 5, seed), draw(7, 5, seed + 1)
    of = {r: between_rows(x, y, r) for r in (p, q, 1, 2, inf)}
    low, high = sorted((p, q))
    assert (of[high] <= of[low] * (1 + 1e-12)).all()
    assert (of[inf] <= of[high] * (1 + 1e-12)).all()
    assert (of[low] <= of[1] * (1 + 1e-12)).all()
    torch.testing.assert_close(of[2], (x - y).norm(dim=1))


@few
@given(seeds, st.sampled_from(["manhattan", 1.5, 3, inf]), st.floats(1e-3, 1e3))
def test_a_norm_scales_and_obeys_the_triangle(seed: int, p: Any, factor: float) -> None:
    x, y, z = (draw(7, 5, seed + k) for k in range(3))
    direct = between_rows(x, z, p)
    assert (direct <= (between_rows(x, y, p) + between_rows(y, z, p)) * (1 + 1e-12)).all()
    torch.testing.assert_close(between_rows(factor * x, factor * z, p), factor * direct)


@few
@given(seeds, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_the_snr_distance_knows_neither_a_common_factor_nor_a_shift(
    seed: int, factor: float, shift: float
) -> None:
    x, y = draw(7, 5, seed), draw(9, 5, seed + 1)
    d = measured("snr", x, y)
    torch.testing.assert_close(measured("snr", factor * x, factor * y), d)
    torch.testing.assert_close(measured("snr", x + shift, y - 2 * shift), d)


def test_example_of_the_snr_distance() -> None:
    """Noise of variance 1 in a signal of variance 4, and the reverse."""
    signal, noise = torch.tensor([[2.0, -2, 2, -2]]), torch.tensor([[1.0, 1, -1, -1]])
    assert between_rows(signal, signal + noise, "snr").item() == 0.25
    assert between_rows(noise, signal + noise, "snr").item() == 4
    assert between_rows(signal + noise, signal, "snr").item() == pytest.approx(0.2)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e-25])
def test_a_constant_row_has_no_signal_and_no_gradient(value: float) -> None:
    """Though its mean is not it, to the last digit."""
    constant, other = torch.full((1, 5), value), draw(1, 5, dtype=torch.float32)
    d, *both = gradients(partial(between_rows, distance="snr"), constant, other)
    assert d.item() == 1
    assert not any(gradient.any() for gradient in both)
    x = torch.cat([constant, other, draw(2, 5, 1, torch.float32)])
    rule = weighing(torch.tensor([[0.0, 1, 1, 1], *[[0.0] * 4] * 3]))
    loss = partial(nf.batch_loss, rule, labels=[0, 1, 2, 3], distance="snr", reduction="sum")
    total, gradient = gradients(loss, x)
    assert total == 3
    assert not gradient.any()


def test_a_signal_too_faint_beside_the_noise() -> None:
    """Its distance is the largest number, without gradient; and 0 times infinity is no gradient."""
    faint, loud = draw(3, dtype=torch.float32), draw(3, seed=1, dtype=torch.float32)
    d, *both = gradients(partial(between_rows, distance="snr"), 1e-18 * faint, 1e25 * loud)
    assert (d == torch.finfo(torch.float32).max).all()
    assert not any(gradient.any() for gradient in both)
    for low, high in ((4e-19, 1e20), (1e-15, 1e10)):
        x = torch.cat([low * faint, high * loud])
        for labels in (torch.arange(6), torch.arange(6) // 3):
            for near, far in (
                (torch.zeros_like, lambda d: (1 - d).relu()),
                (torch.clone, torch.neg),
            ):
                how: dict[str, Any] = {"distance": "snr", "reduction": "none"}
                run = partial(nf.batch_loss, nf.PairRule(near, far), labels=labels, **how)
                value, gradient = gradients(run, x)
                assert not value.isnan().any()  # a sum of largest numbers is infinite
                assert gradient.isfinite().all()


def test_ties_in_the_largest_difference_share_the_gradient() -> None:
    x, y = torch.tensor([[1.0, 1, 0]]), torch.tensor([[0.0, 0, 0]])
    expected = torch.tensor([[0.5, 0.5, 0]])
    _, gradient, _ = gradients(partial(between_rows, distance=inf), x, y)
    torch.testing.assert_close(gradient, expected)
    of_batch = partial(nf.batch_contrastive_loss, labels=[0, 0], distance=inf, reduction="sum")
    _, gradient = gradients(of_batch, torch.cat([x, y]))
    torch.testing.assert_close(gradient, torch.cat([4 * expected, -4 * expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each
def test_a_second_derivative_at_equal_rows_is_a_number(
    distance: Distance, dtype: torch.dtype
) -> None:
    x = draw(3, dtype=dtype)
    x[0] = 0
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    d = between_rows(leaves[0], leaves[1], distance)
    first = torch.autograd.grad(d.sum(), leaves, create_graph=True)
    assert not any(g.any() for g in first)
    weighted = sum((g * draw(3, seed=k, dtype=dtype)).sum() for k, g in enumerate(first))
    assert isinstance(weighted, Tensor)
    second = torch.autograd.grad(weighted, leaves, materialize_grads=True, allow_unused=True)
    assert all(g.isfinite().all() for g in second)


# Tuples.

TRIPLETS = [
    {"distance": distance, "select": select, **more}
    for distance in ("snr", "manhattan", 3, inf)
    for select, more in (
        ("all", {}),
        ("all", {"smooth": True}),
        ("all", {"swap": True}),
        ("all", {"swap": True, "smooth": True, "normalize": True}),
        ("hard", {}),
        ("easy_positive", {"swap": True}),
        ("semihard", {}),
        ("semihard", {"swap": True}),
    )
]


def name_of(how: dict[str, Any]) -> str:
    return "-".join(map(str, how.values()))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("how", TRIPLETS, ids=name_of)
def test_triplets_equal_the_listed_ones(how: dict[str, Any], reference: bool) -> None:
    """Classes are small, so that those of symmetric distances are visited by class."""
    x, y, labels = draw(12), draw(10, seed=1), torch.arange(12) % 4
    others = torch.arange(10) % 5

    def ours(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        more = {"reference": nf.Reference(y, others)} if reference else {}
        return nf.batch_triplet_loss(x, labels, **how, **more, reduction=reduction)

    def truth(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        more = {"reference": y, "reference_labels": others} if reference else {}
        return oracle.batch_triplet(x, labels, **how, **more, reduction=reduction)[0]

    for reduction in ("mean", "none", "active"):
        with tile_shape(4, 4):
            found = gradients(partial(ours, reduction=reduction), x, y)
        agree(found, gradients(partial(truth, reduction=reduction), x, y))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("select", ["all", "hard"])
@pytest.mark.parametrize("distance", ["snr", "manhattan", 3, inf])
def test_quadruplets_equal_the_listed_ones(distance: Any, select: str, reference: bool) -> None:
    x, y, labels, others = draw(10), draw(9, seed=1), torch.arange(10) % 4, torch.arange(9) % 5
    how: dict[str, Any] = {"distance": distance, "select": select, "margin2": 0.7}

    def ours(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        more = {"reference": nf.Reference(y, others)} if reference else {}
        return nf.batch_quadruplet_loss(x, labels, **how, **more, reduction=reduction)

    def truth(x: Tensor, y: Tensor, reduction: str) -> tuple[Any, ...]:
        more = {"reference": y, "reference_labels": others} if reference else {}
        return oracle.batch_quadruplet(x, labels, **how, **more, reduction=reduction)

    for reduction in ("mean", "none", "active"):
        with tile_shape(4, 4):
            found = gradients(partial(ours, reduction=reduction), x, y)
        agree(found, gradients(lambda *rows, r=reduction: truth(*rows, r)[0], x, y))
    if not reference:
        stats = nf.quadruplet_stats(x, labels, **how)
        assert (stats.valid, stats.active, stats.active2) == truth(x, y, "sum")[1:]


@pytest.mark.parametrize("loss", [nf.batch_triplet_loss, nf.batch_quadruplet_loss])
def test_observers_see_the_forces_of_an_asymmetric_distance(loss: Callable[..., Tensor]) -> None:
    """They add up to the gradient: with distances as leaves, by the oracle."""
    x, labels = draw(9), torch.arange(9) % 3
    shown = nf.forces(loss, x, labels, distance="snr", k=10**4)
    d = oracle.between(x, x, "snr").requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "between", lambda *_: d)
        truth = getattr(oracle, loss.__name__.removesuffix("_loss"))(x, labels)[0]
    (force,) = torch.autograd.grad(truth, d)
    found = torch.zeros(9, 9, dtype=torch.float64)
    found[shown.anchor, shown.other] = shown.force
    torch.testing.assert_close(found, force)
    torch.testing.assert_close(shown.closeness, d[shown.anchor, shown.other].detach())


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "identical": lambda a: torch.full_like(a, 0.7),
    "zero": torch.zeros_like,
    "one row zero": lambda a: torch.cat([torch.zeros_like(a[:1]), a[1:]]),
    "constant rows": lambda a: a[:, :1].expand_as(a).contiguous(),
    "size 1e25": lambda a: a * 1e25,
    "size 1e-30": lambda a: a * 1e-30,
    "far from 0": lambda a: a + 1e4,
}
LOSSES: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (nf.batch_triplet_loss, {}),
    (nf.batch_triplet_loss, {"smooth": True}),
    *((nf.batch_triplet_loss, {"select": s}) for s in ("hard", "semihard")),
    (nf.batch_triplet_loss, {"select": "hard", "swap": True}),
    *((nf.batch_quadruplet_loss, {"select": s}) for s in ("all", "hard")),
    (nf.lifted_structure_loss, {}),
]


@pytest.mark.parametrize("extreme", EXTREMES)
@each
def test_finite_in_finite_out(distance: Distance, extreme: str) -> None:
    for dtype in (torch.float64, torch.float32):
        x = EXTREMES[extreme](draw(9, dtype=dtype))
        for loss, how in LOSSES:
            run = partial(loss, labels=torch.arange(9) % 3, distance=distance, **how)
            for reduction in ("mean", "none"):
                value, gradient = gradients(partial(run, reduction=reduction), x)
                assert value.isfinite().all(), how
                assert gradient.isfinite().all(), how


@pytest.mark.parametrize("bad", [nan, inf])
@each
def test_a_row_that_is_not_finite_makes_the_loss_nan(distance: Distance, bad: float) -> None:
    x = draw(9)
    x[4, 1] = bad
    for loss, how in LOSSES:
        assert loss(x, torch.arange(9) % 3, distance=distance, **how).isnan()
    far = nf.triplet_loss(x, x.flip(0), x.roll(1, 0), distance=distance, reduction="none")
    assert far.isnan().tolist() == [k in (4, 5) for k in range(9)]


@each
def test_gradcheck(distance: Distance) -> None:
    x, labels = draw(6, 3, seed=5).requires_grad_(), torch.arange(6) % 3
    for loss, how in LOSSES[:1] + LOSSES[3:6]:
        run = partial(loss, labels=labels, distance=distance, **how)
        assert torch.autograd.gradcheck(run, x)


@each
def test_same_input_same_bits(distance: Distance) -> None:
    x, labels = draw(33, 17, dtype=torch.float32), torch.arange(33) % 9
    for loss, how in LOSSES:
        run = partial(loss, labels=labels, distance=distance, **how)
        first, again = gradients(run, x), gradients(run, x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# A function of one's own.


def canberra(a: Tensor, b: Tensor) -> Tensor:
    gap = (a[:, None] - b).abs()
    return (gap / (1 + a.abs()[:, None] + b.abs())).sum(-1)


def one_sided(a: Tensor, b: Tensor) -> Tensor:
    """Only where the other row is larger."""
    return (b - a[:, None]).relu().sum(-1)


RULE = nf.PairRule(torch.square, lambda d: (2 - d).relu().square())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("function", [canberra, one_sided])
def test_a_function_of_ones_own(function: Callable[..., Tensor], reference: bool) -> None:
    x, y, labels, others = draw(9), draw(7, seed=1), torch.arange(9) % 3, torch.arange(7) % 3

    def ours(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        against = nf.Reference(y, others) if reference else None
        how: dict[str, Any] = {"distance": function, "reference": against, "reduction": reduction}
        return nf.batch_loss(RULE, x, labels, **how)

    def truth(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        d = function(x, y if reference else x)
        near = labels[:, None] == (others if reference else labels)
        apart = torch.ones_like(near) if reference else ~torch.eye(9, dtype=torch.bool)
        pull, push = d.square(), (2 - d).relu().square()
        if reduction == "mean":
            return pull[near & apart].mean() + push[~near].mean()
        return torch.where(near, pull, push).where(apart, 0).sum(1)

    for reduction in ("mean", "none"):
        expected = gradients(partial(truth, reduction=reduction), x, y)
        for shape in ((20, 20), (4, 3)):
            with tile_shape(*shape):
                agree(gradients(partial(ours, reduction=reduction), x, y), expected)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("distance", [*NEW, canberra, one_sided], ids=said)
def test_listed_pairs(distance: Any, reference: bool) -> None:
    """More than the rows of a small tile, some of them twice; of equal rows too."""
    x, y = draw(9), draw(7, seed=1)
    x[3], y[2] = x[1], x[1]
    m = 7 if reference else 9
    every = torch.cartesian_prod(torch.arange(9), torch.arange(m))
    every = every if reference else every[every[:, 0] != every[:, 1]]
    near, far = torch.cat([every[::3], every[:5]]), torch.cat([every[1::3], every[2::3]])

    def ours(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        against = nf.Reference(y, None) if reference else None
        how: dict[str, Any] = {"distance": distance, "reference": against, "reduction": reduction}
        return nf.batch_loss(RULE, x, None, pairs=(near, far), **how)

    def truth(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        columns = y if reference else x
        of = distance if callable(distance) else partial(oracle.between, distance=distance)
        d = of(x, columns)
        pull, push = d[tuple(near.T)].square(), (2 - d[tuple(far.T)]).relu().square()
        if reduction == "mean":
            return pull.mean() + push.mean()
        per_row = torch.zeros(9, dtype=torch.float64).index_add(0, near[:, 0], pull)
        return per_row.index_add(0, far[:, 0], push)

    for reduction in ("mean", "none"):
        expected = gradients(partial(truth, reduction=reduction), x, y)
        agree(gradients(partial(ours, reduction=reduction), x, y), expected, 1e-9)


def test_what_a_function_of_ones_own_returns_is_not_overwritten() -> None:
    x, kept = draw(4), torch.ones(4, 4, dtype=torch.float64)
    rule = nf.PairRule(torch.square, torch.square)
    for function in (lambda a, b: kept, lambda a, b: kept[:1, :1].expand(4, 4), lambda a, b: a):
        with torch.no_grad():
            nf.batch_loss(rule, x, [0, 0, 1, 1], distance=function)
    assert torch.equal(kept, torch.ones_like(kept))
    assert torch.equal(x, draw(4))
    _, gradient = gradients(
        lambda x: nf.batch_loss(rule, x, [0, 0, 1, 1], distance=lambda a, b: a), x
    )
    assert gradient.isfinite().all()


def test_a_function_that_cannot_be_derived_is_refused_where_a_gradient_is_wanted() -> None:
    x = draw(4).requires_grad_()
    rule = nf.PairRule(torch.square, torch.square)
    for function in (
        lambda a, b: torch.ones(4, 4, dtype=torch.float64),
        lambda a, b: torch.cdist(a, b).detach(),
    ):
        with pytest.raises(ValueError, match=r"distance must be a function .* autograd can derive"):
            nf.batch_loss(rule, x, [0, 0, 1, 1], distance=function)


@pytest.mark.parametrize(
    "loss", [nf.batch_contrastive_loss, nf.lifted_structure_loss, nf.lifted_pair_loss]
)
def test_only_batch_loss_takes_a_function(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"distance must be one of .* nearfar\.batch_loss takes"):
        loss(draw(4), [0, 0, 1, 1], distance=lambda a, b: torch.cdist(a, b))


def test_a_function_of_ones_own_that_is_wrong_is_told_how() -> None:
    x, labels, rule = draw(4), [0, 0, 1, 1], lambda tile: tile.closeness.sum(1)
    learned = torch.nn.Parameter(torch.eye(4, dtype=torch.float64))
    wrong: list[tuple[type[Exception], str, Callable[..., Any]]] = [
        (TypeError, "distance must return .*, as a tensor; got float", lambda a, b: 1.0),
        (ValueError, r"of shape \(4, 4\); got \(4,\)", lambda a, b: (a - b).norm(dim=1)),
        (
            ValueError,
            r"shape \(4, 4\) that requires a gradient, .* Apply it to the embeddings before",
            lambda a, b: torch.cdist(a @ learned, b @ learned, p=1),
        ),
    ]
    for error, message, function in wrong:
        with pytest.raises(error, match=message):
            nf.batch_loss(rule, x.requires_grad_(), labels, distance=function)
    for loss in (nf.batch_triplet_loss, nf.lifted_structure_loss, nf.mine.hard_negatives):
        if loss is not nf.lifted_structure_loss:
            with pytest.raises(ValueError, match="batch_loss takes a function of your own"):
                loss(x, labels, distance=canberra)


# What a rule of one's own sees.


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "seen",
    [
        {"distance": "euclidean"},
        {"distance": "manhattan"},
        {"distance": "snr"},
        {"distance": canberra},
        {"distance": "cosine"},
        {"similarity": "cosine"},
        {"similarity": "inner_product"},
        {"similarity": "sqeuclidean"},
    ],
    ids=lambda seen: "-".join(map(said, seen.values())),
)
def test_rows_are_scaled_where_asked(seen: dict[str, Any], normalize: bool) -> None:
    x, labels, factors = 3 * draw(7), torch.arange(7) % 3, draw(7, 7, seed=2)

    def truth(x: Tensor) -> Tensor:
        (kind, what) = next(iter(seen.items()))
        if normalize or what == "cosine":
            x = x / x.norm(dim=1, keepdim=True)
        if kind == "similarity":
            d = -oracle.between(x, x, "sqeuclidean") if what == "sqeuclidean" else x @ x.T
        else:
            d = what(x, x) if callable(what) else oracle.between(x, x, what)
        return (d * factors).masked_fill(torch.eye(7, dtype=torch.bool), 0).sum(1)

    def ours(x: Tensor) -> Tensor:
        how: dict[str, Any] = {**seen, "normalize": normalize, "reduction": "none"}
        return nf.batch_loss(weighing(factors), x, labels, **how)

    with tile_shape(3, 4):
        agree(gradients(ours, x), gradients(truth, x))


def test_the_forces_of_a_similarity_pull_where_it_should_grow() -> None:
    x, labels = draw(6), [0, 0, 0, 1, 1, 1]
    rule = nf.PairRule(torch.neg, torch.exp)
    shown = nf.forces(nf.batch_loss, rule, x, labels, similarity="sqeuclidean")
    assert ((shown.force > 0) == shown.similar).all()
    assert (shown.closeness < 0).all()
