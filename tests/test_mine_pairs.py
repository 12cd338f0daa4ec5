"""Miners of pairs and triplets against loops over all of them."""

from collections import Counter
from fractions import Fraction
from math import atan, ceil, degrees, inf
from typing import Any

import pytest
import torch
import tuple_oracle as oracle
from allocations import Allocations
from batch_cases import referring
from torch import Tensor

import nearfar
from nearfar import Reference, memory_budget, mine
from nearfar.engine.budget import tile_shape

OWN = torch.tensor([3, -1, 0, 10, *[-1] * 8])


def draw(n: int = 12, seed: int = 0, multi: bool = False) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=chance, dtype=torch.float64)
    labels = torch.randint(0, 4, (n,), generator=chance)
    return x, torch.rand(n, 4, generator=chance) < 0.3 if multi else labels


class Case:
    """Rows, what a miner is told besides, their distances and who is similar."""

    def __init__(
        self, reference: bool, multi: bool, distance: Any, normalize: bool, *, grid: bool = False
    ) -> None:
        self.x, self.labels = draw(multi=multi)
        told: dict[str, Any] = {}
        if reference:
            y, others = draw(11, seed=1, multi=multi)
            told = {"reference": y, "reference_labels": others, "reference_own": OWN}
        if grid:  # all arithmetic is exact, and many distances are equal
            self.x = self.x.round()
            told = {k: v.round() if k == "reference" else v for k, v in told.items()}
        self.columns = told.get("reference", self.x)
        a, b = ((oracle._unit(t) if normalize else t) for t in (self.x, self.columns))
        self.a, self.b = a, b
        self.d = oracle.between(a, b, distance)
        self.positives, self.negatives = oracle.relations(
            self.labels, told.get("reference_labels"), told.get("reference_own")
        )
        self.how = {**referring(told), "distance": distance, "normalize": normalize}

    def triplets(self) -> list[tuple[int, int, int]]:
        return oracle.select_triplets(self.d, self.positives, self.negatives, "all")

    def pairs(self, kind: str) -> list[tuple[int, int]]:
        of = self.positives if kind == "positive" else self.negatives
        return [(i, j) for i, others in enumerate(of) for j in others]


CASES = [
    (False, False, "euclidean", False),
    (True, False, "sqeuclidean", False),
    (False, True, "cosine", False),
    (True, True, "euclidean", True),
    (False, False, "sqeuclidean", True),
    (True, False, "snr", False),
    (False, True, 3.0, True),
]
over_cases = pytest.mark.parametrize("given", CASES, ids=str)


def as_lists(found: Tensor) -> list[tuple[int, ...]]:
    assert found.dtype == torch.int64
    return [tuple(row) for row in found.tolist()]


@over_cases
@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
def test_violating_triplets(kind: Any, given: Any) -> None:
    case = Case(*given)
    margin = 0.3 * float(case.d.mean())

    def inside(i: int, p: int, n: int) -> bool:
        gap = float(case.d[i, n] - case.d[i, p])
        violates = gap <= margin
        return {
            "all": violates,
            "hard": violates and gap <= 0,
            "semihard": violates and gap > 0,
            "easy": not violates,
        }[kind]

    expected = [t for t in case.triplets() if inside(*t)]
    assert 0 < len(expected) < len(case.triplets())
    with tile_shape(5, 5):
        found = mine.violating_triplets(case.x, case.labels, kind=kind, margin=margin, **case.how)
    assert as_lists(found) == expected


def test_a_gap_that_is_the_margin_violates_it() -> None:
    """And one of 0 is hard: the boundaries of TripletMarginMiner."""
    case = Case(False, False, "sqeuclidean", False, grid=True)
    gaps = Counter()
    for i, p, n in case.triplets():
        gaps[float(case.d[i, n] - case.d[i, p])] += 1
    margin = 2.0
    assert gaps[margin]
    assert gaps[0.0]

    def number(kind: Any) -> int:
        found = mine.violating_triplets(
            case.x, case.labels, kind=kind, margin=margin, distance="sqeuclidean"
        )
        return len(found)

    assert number("all") == sum(k for gap, k in gaps.items() if gap <= margin)
    assert number("hard") == sum(k for gap, k in gaps.items() if gap <= 0)
    assert number("semihard") == sum(k for gap, k in gaps.items() if 0 < gap <= margin)
    assert number("easy") == sum(k for gap, k in gaps.items() if gap > margin)


def test_the_violating_triplets_are_the_active_ones() -> None:
    """At the margin of a loss, of rows that it normalizes too."""
    x, labels = draw(20, seed=2)
    for normalize in (False, True):
        how = {"margin": 0.4, "normalize": normalize}
        listed = mine.violating_triplets(x, labels, **how)
        assert len(listed) == nearfar.triplet_stats(x, labels, **how).active
        torch.testing.assert_close(
            nearfar.batch_triplet_loss(x, None, triplets=listed, **how),
            nearfar.batch_triplet_loss(x, labels, reduction="active", **how),
        )


def test_some_violating_triplets_whatever_the_block() -> None:
    x, labels = draw(20, seed=3)
    every = as_lists(mine.violating_triplets(x, labels, margin=1.0))

    def some() -> list[tuple[int, ...]]:
        chance = torch.Generator().manual_seed(0)
        return as_lists(mine.violating_triplets(x, labels, margin=1.0, max=9, generator=chance))

    whole = some()
    assert len(whole) == 9
    assert set(whole) <= set(every)
    assert whole == sorted(whole)
    with tile_shape(2, 2):
        assert some() == whole


@over_cases
def test_violating_pairs(given: Any) -> None:
    case = Case(*given)
    near, far = 0.6 * float(case.d.mean()), 0.8 * float(case.d.mean())
    with tile_shape(5, 5):
        found = mine.violating_pairs(
            case.x, case.labels, pos_margin=near, neg_margin=far, **case.how
        )
    positive = [(i, j) for i, j in case.pairs("positive") if case.d[i, j] > near]
    negative = [(i, j) for i, j in case.pairs("negative") if case.d[i, j] < far]
    assert positive
    assert negative
    assert as_lists(found.positive) == positive
    assert as_lists(found.negative) == negative


def test_pairs_at_their_margins_do_not_violate_them() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])
    found = mine.violating_pairs(x, [0, 0, 1], pos_margin=1.0, neg_margin=2.0)
    assert len(found.positive) == len(found.negative) == 0
    found = mine.violating_pairs(x, [0, 0, 1], pos_margin=0.9, neg_margin=2.1)
    assert as_lists(found.positive) == [(0, 1), (1, 0)]
    assert as_lists(found.negative) == [(1, 2), (2, 1)]


@over_cases
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_hard_pairs(share: float, given: Any) -> None:
    case = Case(*given)
    with tile_shape(3, 3):
        found = mine.hard_pairs(case.x, case.labels, share=share, **case.how)
    for kind, pairs in (("positive", found.positive), ("negative", found.negative)):
        every = case.pairs(kind)
        sign = -1 if kind == "positive" else 1
        hardest = sorted(every, key=lambda pair, sign=sign: sign * float(case.d[pair]))
        assert as_lists(pairs) == sorted(hardest[: ceil(Fraction(str(share)) * len(every))])


def test_a_share_is_not_rounded_up_for_a_rounding_error() -> None:
    """0.07 * 100 is 7.000000000000001."""
    x = torch.arange(20.0)[:, None] ** 1.1
    for share, many in ((0.07, 7), (0.0701, 8), (0.29, 29), (1.0, 100)):
        against = Reference(x[10:], [0] * 10)
        found = mine.hard_pairs(x[:10], [0] * 10, share=share, reference=against)
        assert len(found.positive) == many


def test_equally_hard_pairs_are_taken_in_order() -> None:
    x, labels = torch.zeros(6, 2), torch.arange(6) % 2
    with tile_shape(2, 2):
        found = mine.hard_pairs(x, labels, share=0.25)
    assert as_lists(found.positive) == [(0, 2), (0, 4), (1, 3)]
    assert as_lists(found.negative) == [(0, 1), (0, 3), (0, 5), (1, 0), (1, 2)]


@over_cases
def test_uniform_pairs(given: Any) -> None:
    """Each pair of a bin is as likely as another; the last bin holds the largest distance."""
    case = Case(*given)
    bins, draws = 5, 4000
    with tile_shape(4, 4):
        found = mine.uniform_pairs(
            case.x,
            case.labels,
            bins=bins,
            per_bin=draws,
            generator=torch.Generator().manual_seed(0),
            **case.how,
        )
    for kind, pairs in (("positive", found.positive), ("negative", found.negative)):
        every = case.pairs(kind)
        d = torch.tensor([float(case.d[pair]) for pair in every], dtype=torch.float64)
        edges = torch.linspace(d.min(), d.max(), bins + 1, dtype=torch.float64)[1:-1]
        of_bin = (d[:, None] >= edges).sum(1).tolist()
        members = Counter(of_bin)
        drawn = Counter(as_lists(pairs))
        assert len(pairs) == draws * len(members)
        for pair, b in zip(every, of_bin, strict=True):
            share = drawn[pair] / draws
            assert abs(share - 1 / members[b]) < 0.05
        bins_in_order = [of_bin[every.index(pair)] for pair in as_lists(pairs[::50])]
        assert bins_in_order == sorted(bins_in_order)


def test_uniform_pairs_need_only_the_generator() -> None:
    x, labels = draw(14, seed=4)

    def run(seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        found = mine.uniform_pairs(x, labels, bins=7, per_bin=3, generator=chance)
        return torch.cat([found.positive, found.negative])

    with tile_shape(2, 2):
        in_blocks = run(3)
    assert torch.equal(run(3), in_blocks)
    assert not torch.equal(run(3), run(4))
    equal = mine.uniform_pairs(torch.zeros(4, 2), [0, 0, 1, 1], bins=3, per_bin=2)
    assert equal.positive.shape == equal.negative.shape == (2, 2)


def pick(case: Case, i: int, positive: str, negative: str, ranges: Any) -> list[tuple[int, int]]:
    """The positives and negatives of a row that are chosen, as pairs."""
    d = case.d[i].tolist()
    near = [j for j in case.positives[i] if ranges[0][0] <= d[j] <= ranges[0][1]]
    far = [j for j in case.negatives[i] if ranges[1][0] <= d[j] <= ranges[1][1]]

    def one(of: list[int], choice: str, *, is_positive: bool) -> list[int]:
        if choice == "all" or not of:
            return of
        farthest = (choice != "easy") if is_positive else (choice == "easy")
        best = (max if farthest else min)(of, key=lambda j: d[j])
        return [best]

    if positive == "semihard":
        far = one(far, negative, is_positive=False)
        near = [j for j in near if far and d[j] < d[far[0]]]
        near = one(near, "hard", is_positive=True)
    else:
        near = one(near, positive, is_positive=True)
        if negative == "semihard":
            far = [j for j in far if near and d[j] > d[near[0]]]
            far = one(far, "hard", is_positive=False)
        else:
            far = one(far, negative, is_positive=False)
    return [(p, n) for p in near for n in far]


CHOICES = [
    (p, n)
    for p in ("easy", "hard", "semihard", "all")
    for n in ("hard", "semihard", "easy", "all")
    if {p, n} not in ({"semihard"}, {"all"}, {"semihard", "all"})
]


@over_cases
@pytest.mark.parametrize(("positive", "negative"), CHOICES)
def test_easy_hard_triplets(positive: Any, negative: Any, given: Any) -> None:
    case = Case(*given)
    middle = float(case.d.median())
    for ranges in (((-inf, inf), (-inf, inf)), ((0.2 * middle, 1.5 * middle), (middle / 2, inf))):
        expected = [
            (i, p, n)
            for i in range(len(case.x))
            for p, n in pick(case, i, positive, negative, ranges)
        ]
        with tile_shape(5, 5):
            found = mine.easy_hard_triplets(
                case.x,
                case.labels,
                positive=positive,
                negative=negative,
                positive_range=ranges[0],
                negative_range=ranges[1],
                **case.how,
            )
        assert sorted(as_lists(found)) == sorted(expected)
        assert found[:, 0].tolist() == sorted(found[:, 0].tolist())


def test_batch_hard_is_what_the_loss_selects() -> None:
    x, labels = draw(15, seed=5)
    for select, positive in (("hard", "hard"), ("easy_positive", "easy")):
        listed = mine.easy_hard_triplets(x, labels, positive=positive, negative="hard")
        torch.testing.assert_close(
            nearfar.batch_triplet_loss(x, None, triplets=listed),
            nearfar.batch_triplet_loss(x, labels, select=select),
        )


@pytest.mark.parametrize("given", [CASES[0], CASES[3]], ids=str)
@pytest.mark.parametrize("angle", [0.0, 20.0, 45.0, 80.0])
def test_angular_triplets(angle: float, given: Any) -> None:
    case = Case(*given)

    def wide(i: int, p: int, n: int) -> bool:
        middle = (case.a[i] + case.b[p]) / 2
        near, far = float((case.a[i] - case.b[p]).norm()), float((case.b[n] - middle).norm())
        return degrees(atan(near / (2 * far))) > angle

    how = {k: v for k, v in case.how.items() if k != "distance"}
    with tile_shape(4, 4):
        found = mine.angular_triplets(case.x, case.labels, angle=angle, **how)
    expected = [t for t in case.triplets() if wide(*t)]
    assert as_lists(found) == expected
    assert angle == 80 or expected


def test_a_negative_in_the_middle_sees_a_right_angle() -> None:
    x = torch.tensor([[0.0, 0], [0, 2], [0, 1], [5, 5], [5, 5], [5, 5]])
    found = mine.angular_triplets(x, [0, 0, 1, 2, 2, 3], angle=89.0)
    assert as_lists(found) == [(0, 1, 2), (1, 0, 2)]  # three equal rows see no angle


def test_what_is_mined_normalized_matches_a_loss_that_normalizes() -> None:
    x, labels = draw(12, seed=6)
    x = x * torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None]
    unit = torch.nn.functional.normalize(x)
    miners: list[tuple[Any, dict[str, Any]]] = [
        (mine.hard_negatives, {"k": 3}),
        (mine.hard_positives, {"k": 2}),
        (mine.semihard_triplets, {}),
        (mine.multi_similarity_pairs, {"distance": "euclidean"}),
        (mine.violating_triplets, {}),
        (mine.violating_pairs, {}),
        (mine.hard_pairs, {"share": 0.2}),
        (mine.easy_hard_triplets, {}),
        (mine.angular_triplets, {}),
    ]
    for miner, how in miners:
        found, true = miner(x, labels, normalize=True, **how), miner(unit, labels, **how)
        other = miner(x, labels, **how)
        parts = [
            vars(f).values() if isinstance(f, mine.Found | mine.FoundPairs) else [f]
            for f in (found, true, other)
        ]
        assert all(torch.allclose(a, b) for a, b in zip(parts[0], parts[1], strict=True))
        same = [
            a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(parts[0], parts[2], strict=True)
        ]
        assert not all(same), miner.__name__


@pytest.mark.parametrize("kind", ["hard", "easy"])
def test_memory_does_not_grow_with_the_triplets(kind: Any) -> None:
    """2.4 million triplets are seen, and a hundred kept."""
    n = 300
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 10
    with memory_budget(2**19), Allocations(x, labels) as allocations:
        found = mine.violating_triplets(x, labels, kind=kind, max=100)
    assert len(found) == 100
    assert allocations.peak < 3 * 2**19


ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    (mine.violating_triplets, {"margin": -0.1}, "margin must be a number at least 0"),
    (mine.violating_triplets, {"kind": "medium"}, "kind must be one of 'all', 'hard', 'semihard'"),
    (mine.violating_triplets, {"max": 0}, "max must be an integer of at least 1"),
    (mine.violating_triplets, {"max": 2, "generator": 3}, "generator must be a torch.Generator"),
    (mine.violating_pairs, {"pos_margin": -1}, "pos_margin must be a number at least 0"),
    (mine.violating_pairs, {"neg_margin": inf}, "neg_margin must be a number at least 0"),
    (mine.hard_pairs, {"share": 50}, "share must be a number from 0 to 1"),
    (mine.uniform_pairs, {"bins": 0}, "bins must be an integer of at least 1"),
    (mine.uniform_pairs, {"per_bin": 0.5}, "per_bin must be an integer of at least 1"),
    (mine.angular_triplets, {"angle": 90}, "angle must be a number from 0 to .*in degrees"),
    (mine.angular_triplets, {"angle": -1}, "angle must be a number from 0"),
    (
        mine.easy_hard_triplets,
        {"positive": "hardest"},
        "positive must be one of 'hard', 'semihard'",
    ),
    (mine.easy_hard_triplets, {"negative": 1}, "negative must be one of 'hard'"),
    (mine.easy_hard_triplets, {"positive": "all", "negative": "all"}, 'not both be "all"'),
    (mine.easy_hard_triplets, {"positive": "semihard"}, "must not be 'semihard' and 'semihard'"),
    (mine.easy_hard_triplets, {"positive": "all"}, "'all' and 'semihard'.*semihard_triplets takes"),
    (mine.easy_hard_triplets, {"positive_range": (2, 1)}, r"positive_range must be two numbers"),
    (mine.easy_hard_triplets, {"negative_range": 2}, r"negative_range must be two numbers"),
]


@pytest.mark.parametrize(("miner", "how", "message"), ERRORS)
def test_errors_teach(miner: Any, how: dict[str, Any], message: str) -> None:
    x, labels = draw(4)
    with pytest.raises((TypeError, ValueError), match=message):
        miner(x, labels, **how)
