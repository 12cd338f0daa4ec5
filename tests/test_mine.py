"""Miners against loops over the distances, their guards, and what they promise."""

import inspect
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
import tuple_oracle as oracle
from allocations import Allocations
from batch_cases import referring
from conftest import near_duplicates
from torch import Tensor

import nearfar
from nearfar import memory_budget, mine
from nearfar.engine.budget import tile_shape

# Those of a batch; tests/test_mine_corpus.py has the one of a corpus.
MINERS = [
    getattr(mine, name) for name in mine.__all__ if name.islower() and name != "corpus_negatives"
]


def draw(n: int = 14, seed: int = 0, multi: bool = False) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=chance, dtype=torch.float64)
    labels = torch.randint(0, 4, (n,), generator=chance)
    return x, torch.rand(n, 4, generator=chance) < 0.3 if multi else labels


def hardest(
    d: Tensor, chosen: list[list[int]], k: int, *, farthest: bool = False
) -> tuple[Tensor, Tensor]:
    """The k nearest or farthest of those chosen for each row."""
    indices, distances = torch.full((len(d), k), -1), torch.full((len(d), k), inf).double()
    for i, others in enumerate(chosen):
        for slot, j in enumerate(sorted(others, key=lambda j: d[i, j], reverse=farthest)[:k]):
            indices[i, slot], distances[i, slot] = j, d[i, j]
    return indices, distances


def agree(found: mine.Found, indices: Tensor, distances: Tensor) -> None:
    assert torch.equal(found.indices, indices)
    assert found.indices.dtype == torch.int64
    torch.testing.assert_close(found.distances, distances)


SHAPES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("reference", [False, True])
def test_the_nearest_of_near_duplicates(reference: bool, apart: float) -> None:
    """By cosines in float32, that is mostly chance: 1 - cos keeps no digit, unit rows lose some."""
    for seed in range(50):
        x, labels = near_duplicates(seed, apart), torch.arange(12)
        if reference:
            against = nearfar.Reference(x, labels, own=labels)
            found = mine.hard_negatives(x, labels, distance="cosine", reference=against)
        else:
            found = mine.hard_negatives(x, labels, distance="cosine")
        assert (found.distances >= 0).all()
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        true = (unit[:, None] - unit).square().sum(2) / 2
        nearest = true.fill_diagonal_(inf).amin(1, keepdim=True)
        # To the other five rows the seven are as far as float32 can tell.
        assert torch.equal(true.gather(1, found.indices)[:7], nearest[:7]), seed
        torch.testing.assert_close(found.distances.double(), nearest, rtol=1e-5, atol=0)


def test_the_nearest_in_a_batch_that_collapses() -> None:
    """So many are close that all are measured together."""
    x = torch.ones(300, 16) + 1e-3 * torch.randn(
        300, 16, generator=torch.Generator().manual_seed(0)
    )
    found = mine.hard_negatives(x, torch.arange(300), distance="cosine")
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    true = ((unit[:, None] - unit).square().sum(2) / 2).fill_diagonal_(inf)
    nearest = true.amin(1, keepdim=True)
    torch.testing.assert_close(true.gather(1, found.indices), nearest, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.distances.double(), nearest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "snr", "manhattan", 3])
@pytest.mark.parametrize(("reference", "multi"), SHAPES)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_hard_positives_and_negatives(reference: bool, multi: bool, k: int, distance: Any) -> None:
    x, labels = draw(multi=multi)
    how: dict[str, Any] = {}
    if reference:
        y, others = draw(11, seed=1, multi=multi)
        own = torch.tensor([3, -1, 0, 10, *[-1] * 10])
        how = {"reference": y, "reference_labels": others, "reference_own": own}
    d = oracle.between(x, how.get("reference", x), distance)
    positives, negatives = oracle.relations(
        labels, how.get("reference_labels"), how.get("reference_own")
    )
    with tile_shape(4, 4):
        near = mine.hard_negatives(x, labels, k=k, distance=distance, **referring(how))
        far = mine.hard_positives(x, labels, k=k, distance=distance, **referring(how))
    agree(near, *hardest(d, negatives, k))
    agree(far, *hardest(d, positives, k, farthest=True))


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "snr", 1.5])
@pytest.mark.parametrize(
    "guard",
    [
        {"margin": 0.2},
        {"margin": -0.3},
        {"relative_margin": 0.1},
        {"score_range": (-0.5, 0.4)},
        {"margin": 0.1, "relative_margin": 0.3, "score_range": (-2.0, 0.9)},
    ],
)
def test_guards(guard: dict[str, Any], distance: Any) -> None:
    """Positives of every sign of cosine, and rows without positive."""
    x, labels = draw(20, seed=2)
    labels[5] = 77
    d = oracle.between(x, x, distance)
    score = 1 - d if distance == "cosine" else -d
    positives, negatives = oracle.relations(labels, None, None)

    def kept(i: int, j: int) -> bool:
        s = float(score[i, j])
        low, high = guard.get("score_range", (-inf, inf))
        if not low <= s <= high:
            return False
        if not positives[i]:
            return True
        least = min(float(score[i, p]) for p in positives[i])
        limit = least - guard.get("margin", -inf)
        return s <= min(limit, least - guard.get("relative_margin", -inf) * abs(least))

    chosen = [[j for j in negatives[i] if kept(i, j)] for i in range(20)]
    assert chosen != negatives
    with tile_shape(3, 3):
        agree(
            mine.hard_negatives(x, labels, k=4, distance=distance, **guard), *hardest(d, chosen, 4)
        )


def test_relative_margin_is_a_margin_below_0_too() -> None:
    """Positive at cosine -0.5: a tenth below is -0.55; a factor of 0.9 would ask for -0.45."""

    def at(cosine: float) -> list[float]:
        return [cosine, (1 - cosine**2) ** 0.5]

    x = torch.tensor([at(1.0), at(-0.5), at(-0.52), at(-0.58)])
    found = mine.hard_negatives(x, [0, 0, 1, 2], distance="cosine", relative_margin=0.1)
    assert found.indices[0].item() == 3


def test_exclude_names_known_positives() -> None:
    x, labels = draw(9, seed=3)
    known = torch.tensor([[1, -1], [0, 2], *[[-1, -1]] * 7], dtype=torch.int32)
    d = oracle.between(x, x, "euclidean")
    positives, negatives = oracle.relations(labels, None, None)
    for i, row in enumerate(known.tolist()):
        positives[i] = sorted({*positives[i], *row} - {-1})
        negatives[i] = [j for j in negatives[i] if j not in row]
    agree(mine.hard_negatives(x, labels, k=3, exclude=known), *hardest(d, negatives, 3))
    limits = [max((float(d[i, j]) for j in positives[i]), default=-inf) for i in range(9)]
    chosen = [[j for j in negatives[i] if d[i, j] >= limits[i]] for i in range(9)]
    found = mine.hard_negatives(x, labels, k=3, exclude=known, margin=0.0)
    agree(found, *hardest(d, chosen, 3))


def test_known_positives_count_for_the_margin() -> None:
    x = torch.tensor([[0.0], [1], [3], [5], [6]])
    known = torch.tensor([[3], [-1], [-1], [-1], [-1]])
    assert mine.hard_negatives(x, [0, 0, 1, 2, 3], margin=0.0).indices[0] == 2
    assert mine.hard_negatives(x, [0, 0, 1, 2, 3], margin=0.0, exclude=known).indices[0] == 4


def test_a_row_that_excludes_itself_is_no_positive_of_its_own() -> None:
    """As the best of a search that finds the query itself; its distance to itself is no answer."""
    x, labels = draw()
    x = x / 10  # or a positive far away hides what is made of that distance
    known = torch.arange(len(x))[:, None]
    for how in ({}, {"reference": nearfar.Reference(x, labels, known[:, 0])}):
        plain = mine.hard_negatives(x, labels, margin=0.0, **how)
        found = mine.hard_negatives(x, labels, margin=0.0, exclude=known, **how)
        agree(found, plain.indices, plain.distances)


def test_without_labels_only_exclude_says_who_is_similar() -> None:
    """Questions and a corpus: question i is answered by passage i."""
    questions, passages = draw(4, seed=4)[0], draw(7, seed=5)[0]
    own = torch.arange(4)[:, None]
    against = nearfar.Reference(passages, None)
    found = mine.hard_negatives(questions, None, k=6, reference=against, exclude=own)
    others = [[j for j in range(7) if j != i] for i in range(4)]
    agree(found, *hardest(oracle.between(questions, passages, "euclidean"), others, 6))
    within = mine.hard_negatives(questions, None, k=3)
    assert (within.indices != own).all()


@pytest.mark.parametrize("distance", ["euclidean", "snr", "manhattan", inf])
@pytest.mark.parametrize("multi", [False, True])
def test_semihard_triplets(multi: bool, distance: Any) -> None:
    x, labels = draw(multi=multi)
    d = oracle.between(x, x, distance)
    expected = oracle.select_triplets(d, *oracle.relations(labels, None, None), "semihard")
    with tile_shape(3, 3):
        found = mine.semihard_triplets(x, labels, distance=distance)
    assert found.tolist() == [list(t) for t in expected]
    if distance != "euclidean":
        return
    chance = torch.Generator().manual_seed(0)
    some = mine.semihard_triplets(x, labels, max=5, generator=chance)
    assert len(some) == 5
    assert some.tolist() == sorted(some.tolist())
    assert all(tuple(t) in expected for t in some.tolist())
    again = mine.semihard_triplets(x, labels, max=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(some, again)
    assert len(mine.semihard_triplets(x, labels, max=10**6)) == len(expected)


def test_some_of_the_triplets_are_drawn_evenly_and_no_others_are_kept() -> None:
    x, labels = draw(seed=9)
    every = mine.semihard_triplets(x, labels).tolist()
    times = torch.zeros(len(every))
    chance = torch.Generator().manual_seed(0)
    rounds, some = 600, 4
    for _ in range(rounds):
        found = mine.semihard_triplets(x, labels, max=some, generator=chance).tolist()
        assert len({tuple(t) for t in found}) == some
        for triplet in found:
            times[every.index(triplet)] += 1
    share = rounds * some / len(every)
    assert (times - share).abs().max() < 5 * share**0.5
    with tile_shape(2, 2):
        in_blocks = mine.semihard_triplets(x, labels, max=3, generator=chance.manual_seed(7))
    assert torch.equal(
        in_blocks, mine.semihard_triplets(x, labels, max=3, generator=chance.manual_seed(7))
    )
    n = 1600
    x, halves = torch.randn(n, 2, generator=chance), torch.arange(n) % 2
    with memory_budget(2**19), Allocations(x, halves) as allocations:
        assert len(mine.semihard_triplets(x, halves, max=10)) == 10
    assert allocations.peak < 24 * n * n / 2 / 4


def test_triplets_bring_the_loss_that_selects_them() -> None:
    x, labels = draw()
    i, p, n = mine.semihard_triplets(x, labels).T
    torch.testing.assert_close(
        nearfar.triplet_loss(x[i], x[p], x[n]),
        nearfar.batch_triplet_loss(x, labels, select="semihard"),
    )


@pytest.mark.parametrize("distance", ["cosine", "snr", "manhattan"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_multi_similarity_pairs(epsilon: float, distance: Any) -> None:
    x, labels = draw(seed=6)
    labels[3] = 9
    s = -oracle.between(x, x, distance)
    positives, negatives = oracle.relations(labels, None, None)
    near, far = [], []
    for i, (p, n) in enumerate(zip(positives, negatives, strict=True)):
        if p and n:
            near += [[i, j] for j in p if s[i, j] < max(s[i, k] for k in n) + epsilon]
            far += [[i, j] for j in n if s[i, j] > min(s[i, k] for k in p) - epsilon]
    with tile_shape(5, 5):
        found = mine.multi_similarity_pairs(x, labels, epsilon=epsilon, distance=distance)
    assert found.positive.tolist() == near
    assert found.negative.tolist() == far


@pytest.mark.parametrize("dim", [2, 3, 6])
def test_distance_weighted_negatives_are_drawn_by_their_weights(dim: int) -> None:
    """1 / q(d), where q(d) = d^(D - 2) (1 - d^2 / 4)^((D - 3) / 2), the same for all below 0.5."""
    labels, chance = draw(9, seed=7)[1], torch.Generator().manual_seed(7)
    x = torch.nn.functional.normalize(torch.randn(9, dim, generator=chance, dtype=torch.float64))
    x[:, 0] += 0.5
    d = oracle.between(*[torch.nn.functional.normalize(x)] * 2, "euclidean")
    chance = torch.Generator().manual_seed(0)
    draws = 20_000
    found = mine.distance_weighted_negatives(x, labels, k=draws, generator=chance)
    negatives = oracle.relations(labels, None, None)[1]
    for i, row in enumerate(negatives):
        weight = torch.zeros(9, dtype=torch.float64)
        for j in row:
            far = max(float(d[i, j]), 0.5)
            density = far ** (dim - 2) * (1 - far**2 / 4) ** ((dim - 3) / 2) if far < 1.4 else inf
            weight[j] = 1 / density
        if not weight.any():
            weight[row] = 1
        share = torch.bincount(found.indices[i], minlength=9) / draws
        torch.testing.assert_close(share.double(), weight / weight.sum(), atol=0.02, rtol=0)
        torch.testing.assert_close(found.distances[i], d[i, found.indices[i]])


def test_where_all_negatives_are_far_all_weigh_the_same() -> None:
    x = torch.tensor([[1.0, 0], [0.9, 0.1], [-1, 0.5], [-1, 0], [-1, -0.3]])
    labels, chance = [0, 0, 1, 2, 3], torch.Generator().manual_seed(0)
    found = mine.distance_weighted_negatives(x, labels, k=6000, generator=chance).indices[0]
    share = torch.bincount(found, minlength=5) / 6000
    torch.testing.assert_close(share, torch.tensor([0, 0, 1, 1, 1]) / 3, atol=0.03, rtol=0)


@pytest.mark.parametrize("d", [3, 5])
def test_opposite_rows_are_drawn_where_there_are_no_others(d: int) -> None:
    """At distance 2 the density is 0, and its logarithm none."""
    x = torch.eye(d)[[0, 0, 0]]
    x[2] = -x[0]
    found = mine.distance_weighted_negatives(x, [0, 0, 1], nonzero_loss_cutoff=2.0, k=2)
    assert found.indices[:2].tolist() == [[2, 2], [2, 2]]
    assert found.distances[:2].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert (found.indices[2] < 2).all()


def test_distance_weighted_negatives_need_only_the_generator() -> None:
    x, labels = draw(9, seed=8)

    def run(seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        return mine.distance_weighted_negatives(x, labels, k=5, generator=chance).indices

    with tile_shape(2, 2):
        in_blocks = run(3)
    assert torch.equal(run(3), in_blocks)
    assert not torch.equal(run(3), run(4))
    alone = mine.distance_weighted_negatives(x, torch.zeros(9, dtype=torch.long), k=2)
    assert (alone.indices == -1).all()


# Of all miners.


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: miner.__name__)
@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one(miner: Callable[..., Any], n: int) -> None:
    found = miner(torch.zeros(n, 3), torch.zeros(n, dtype=torch.long))
    if isinstance(found, mine.Found):
        assert found.indices.shape == (n, 1)
        assert (found.indices == -1).all()
    elif isinstance(found, mine.FoundPairs):
        assert found.positive.shape == found.negative.shape == (0, 2)
    else:
        assert found.shape == (0, 3)


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: miner.__name__)
def test_an_empty_reference(miner: Callable[..., Any]) -> None:
    x, labels = draw(5)
    empty = nearfar.Reference(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    found = miner(x, labels, reference=empty)
    if isinstance(found, mine.Found):
        assert (found.indices == -1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_mistake_6_indices_are_int64_whatever_the_labels(dtype: Any) -> None:
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    labels = (np.arange(300) % 5).astype(dtype)
    assert mine.hard_negatives(x, labels).indices.max() > 255
    assert mine.semihard_triplets(x, labels).max() == 299


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: miner.__name__)
def test_nothing_of_a_miner_carries_a_gradient(miner: Callable[..., Any]) -> None:
    x, labels = draw(8)
    found = miner(x.half().requires_grad_(), labels)
    values = (
        vars(found).values()
        if hasattr(found, "__dict__") and not isinstance(found, Tensor)
        else [found]
    )
    assert not any(v.requires_grad for v in values)


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: miner.__name__)
def test_no_matrix_is_stored(miner: Callable[..., Any]) -> None:
    n = 1500
    x = torch.nn.functional.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(n) // 3
    few: dict[Any, dict[str, Any]] = {
        mine.multi_similarity_pairs: {"epsilon": -1.9},
        mine.violating_triplets: {"max": 50},
        mine.angular_triplets: {"max": 50},
        mine.violating_pairs: {"neg_margin": 0.01},
        mine.hard_pairs: {"share": 1e-4},
    }
    how = few.get(miner, {})
    with memory_budget(2**19), Allocations(x, labels) as allocations:
        miner(x, labels, **how)
    assert allocations.peak < n * n / 1.5


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: miner.__name__)
def test_every_argument_is_documented(miner: Callable[..., Any]) -> None:
    doc = inspect.getdoc(miner) or ""
    for name in inspect.signature(miner).parameters:
        assert f"\n    {name}: " in doc
    for part in ("Args:", "Returns:", "Raises:", ">>> ", "Source: "):
        assert part in doc


ERRORS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (mine.hard_negatives, {"k": 0}, "k must be an integer of at least 1"),
    (mine.hard_negatives, {"k": True}, "k must be an integer of at least 1"),
    (mine.hard_positives, {"k": 1.5}, "k must be an integer of at least 1"),
    (mine.hard_negatives, {"relative_margin": -0.1}, "relative_margin must be a number at least 0"),
    (mine.hard_negatives, {"margin": inf}, "margin must be"),
    (mine.hard_negatives, {"score_range": (1, 0)}, "low <= high"),
    (mine.hard_negatives, {"exclude": [[0.5]]}, "integer dtype"),
    (mine.hard_negatives, {"exclude": [[0]]}, r"exclude must have shape \(4, e\)"),
    (mine.hard_negatives, {"exclude": [[4]] * 4}, r"exclude must hold rows from 0 to 3, or -1"),
    (mine.hard_negatives, {"exclude": [[0, 4]] * 4}, r"exclude\[0\] is \[0, 4\]"),
    (mine.hard_negatives, {"score_range": 3}, r"score_range must be two numbers .*got 3"),
    (mine.hard_negatives, {"score_range": ("a", 2)}, r"score_range must be two numbers"),
    *(
        (miner, {"distance": "Cosine"}, "distance must be one of")
        for miner in (mine.hard_negatives, mine.hard_positives, mine.semihard_triplets)
    ),
    (mine.semihard_triplets, {"max": 0}, "max must be an integer of at least 1"),
    (mine.multi_similarity_pairs, {"epsilon": inf}, "epsilon must be"),
    (mine.distance_weighted_negatives, {"cutoff": -0.1}, "cutoff must be"),
    (mine.distance_weighted_negatives, {"nonzero_loss_cutoff": 0.1}, "nonzero_loss_cutoff must be"),
    *(
        (miner, {"reference": torch.ones(2, 3)}, r"nearfar\.Reference\(x, labels\)")
        for miner in MINERS
    ),
    (mine.hard_positives, {"reference": nearfar.Reference([[0.0] * 3], None)}, "must have a label"),
]


@pytest.mark.parametrize(("miner", "how", "message"), ERRORS)
def test_errors_teach(miner: Callable[..., Any], how: dict[str, Any], message: str) -> None:
    x, labels = draw(4)
    with pytest.raises((TypeError, ValueError), match=message):
        miner(x, labels, **how)


@pytest.mark.parametrize(
    "reference", [torch.ones(2, 3), nearfar.Reference(torch.ones(2, 3), [0, 1])]
)
def test_without_labels_the_reference_has_none(reference: Any) -> None:
    with pytest.raises(TypeError, match=r"reference=nearfar\.Reference\(x, "):
        mine.hard_negatives(draw(4)[0], None, reference=reference)
