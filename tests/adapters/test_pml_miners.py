"""Every miner of the door beside theirs: the same tuples; those that draw, by their law."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances
from pytorch_metric_learning import miners as theirs

from nearfar.adapters.pml import miners as ours

N, D, CLASSES = 24, 5, 6
STRATEGIES = ("easy", "hard", "semihard", "all")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def draw(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=chance, dtype=torch.float64)
    # Some classes have one row, so that some rows have no positive.
    return x, torch.cat(
        [torch.randint(0, CLASSES, (n - 2,), generator=chance), torch.tensor([7, 8])]
    )


def tuples(found: tuple[Tensor, ...]) -> tuple[Counter[Any], ...]:
    """What was found, in any order: triplets, or pairs of both kinds."""
    parts = [found] if len(found) == 3 else [found[:2], found[2:]]
    return tuple(Counter(map(tuple, torch.stack(part, 1).tolist())) for part in parts)


def same(name: str, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    if name == "HDCMiner":  # (i, j) and (j, i) are equally hard, and either may be the last
        one, other = (
            tuple(end for kind in (f[:2], f[2:]) for end in torch.stack(kind, 1).sort(1).values.T)
            for f in (one, other)
        )
    assert tuples(one) == tuples(other)


BY_NAME: list[tuple[str, dict[str, Any]]] = [
    ("MultiSimilarityMiner", {}),
    ("MultiSimilarityMiner", {"epsilon": 0.4}),
    ("PairMarginMiner", {}),
    ("PairMarginMiner", {"pos_margin": 0.5, "neg_margin": 0.9}),
    ("HDCMiner", {}),
    ("HDCMiner", {"filter_percentage": 0.3}),
    *[("TripletMarginMiner", {"type_of_triplets": k}) for k in ("all", "hard", "semihard", "easy")],
    ("TripletMarginMiner", {"margin": 0.4}),
    ("AngularMiner", {}),
    ("AngularMiner", {"angle": 35}),
    ("BatchHardMiner", {}),
    ("BatchEasyHardMiner", {}),
    ("EmbeddingsAlreadyPackagedAsTriplets", {}),
    *[
        ("BatchEasyHardMiner", {"pos_strategy": near, "neg_strategy": far, **ranges})
        for near in STRATEGIES
        for far in STRATEGIES
        if {near, far} not in ({"semihard"}, {"semihard", "all"})
        for ranges in ({}, {"allowed_pos_range": (0.4, 1.2), "allowed_neg_range": (0.5, 1.3)})
    ],
]
DISTANCES: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "euclidean": distances.LpDistance,
    "raw": lambda: distances.LpDistance(normalize_embeddings=False),
    "squared": lambda: distances.LpDistance(power=2),
    "manhattan": lambda: distances.LpDistance(p=1),
    "snr": distances.SNRDistance,
    "cosine": distances.CosineSimilarity,
}
AS_THEY_ARE = ("AngularMiner", "EmbeddingsAlreadyPackagedAsTriplets")


def both(name: str, settings: dict[str, Any], distance: str) -> list[Any]:
    given = {} if distance == "default" else {"distance": DISTANCES[distance]()}
    return [getattr(module, name)(**settings, **given) for module in (ours, theirs)]


@pytest.mark.parametrize("reference", ["none", "another", "same_items"])
@pytest.mark.parametrize(("name", "settings"), BY_NAME, ids=str)
def test_the_same_tuples(name: str, settings: dict[str, Any], reference: str) -> None:
    x, labels = draw()
    more: tuple[Tensor, ...] = ()
    if reference == "another":
        more = draw(30, seed=1)
    elif reference == "same_items":  # the same labels object: row i is row i of the batch
        more = draw(seed=1)[0], labels
    if reference == "same_items" and name == "MultiSimilarityMiner":
        pytest.skip("theirs then finds each row as its own positive and negative")
    our, their = both(name, settings, "default")
    same(name, our(x, labels, *more), their(x, labels, *more))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("name", "settings"), [m for m in BY_NAME if m[0] not in AS_THEY_ARE], ids=str
)
def test_distances(name: str, settings: dict[str, Any], distance: str) -> None:
    x, labels = draw()
    our, their = both(name, settings, distance)
    same(name, our(x, labels), their(x, labels))


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.arange(6)], ids=["one", "all"])
@pytest.mark.parametrize(("name", "settings"), BY_NAME, ids=str)
def test_classes_that_leave_nothing_to_compare(
    name: str, settings: dict[str, Any], labels: Tensor
) -> None:
    x = draw(6)[0]
    our, their = both(name, settings, "default")
    same(name, our(x, labels), their(x, labels))


@pytest.mark.parametrize("found_by", ["PairMarginMiner", "TripletMarginMiner"])
def test_hard_pairs_among_those_of_another_miner(found_by: str) -> None:
    x, labels = draw()
    earlier = getattr(theirs, found_by)()(x, labels)
    found = []
    for module in (ours, theirs):
        miner = module.HDCMiner(filter_percentage=0.3)
        miner.set_idx_externally(earlier, labels)
        found.append(tuples(miner(x, labels)))
    assert found[0] == found[1]


def test_hard_pairs_among_those_of_another_miner_stay_the_same() -> None:
    """Theirs mines a second time among what it found the first time."""
    x, labels = draw()
    miner = ours.HDCMiner(filter_percentage=0.3)
    miner.set_idx_externally(theirs.PairMarginMiner()(x, labels), labels)
    assert tuples(miner(x, labels)) == tuples(miner(x, labels))


def test_no_row_is_its_own_pair_in_a_reference_of_the_same_items() -> None:
    x, labels = draw()
    a1, p, a2, n = ours.MultiSimilarityMiner(epsilon=2.0)(x, labels, x + 0.1, labels)
    assert len(a1) > 0
    assert len(a2) > 0
    assert not (a1 == p).any()
    assert not (a2 == n).any()


def test_what_was_found_is_counted() -> None:
    x, labels = draw()
    our, their = both("PairMarginMiner", {}, "default")
    our(x, labels)
    their(x, labels)
    assert (our.num_pos_pairs, our.num_neg_pairs) == (their.num_pos_pairs, their.num_neg_pairs)


# Those that draw: as many, and the same chances.


def frequencies(miner: Any, *rows: Tensor, times: int = 400) -> list[Counter[Any]]:
    """How often each tuple was found; both kinds of pairs, or (anchor, negative) of triplets."""
    total: list[Counter[Any]] = []
    for _ in range(times):
        found = miner(*rows)
        some = tuples(found if len(found) == 4 else (found[0], found[1], found[0], found[2]))
        total = [a + b for a, b in zip(total, some, strict=True)] if total else list(some)
    return total


def same_law(one: Counter[Any], other: Counter[Any]) -> None:
    """No difference beyond five standard deviations of counts of rare events."""
    assert one.total() == other.total()
    for key in one | other:
        assert abs(one[key] - other[key]) < 5 * (one[key] + other[key] + 1) ** 0.5 + 1, key


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("UniformHistogramMiner", {"num_bins": 6, "pos_per_bin": 3, "neg_per_bin": 5}),
        ("DistanceWeightedMiner", {}),
        ("DistanceWeightedMiner", {"cutoff": 0.8, "nonzero_loss_cutoff": 1.0}),
    ],
    ids=str,
)
def test_the_same_law(name: str, settings: dict[str, Any], reference: bool) -> None:
    rows = draw(14) + (draw(16, seed=1) if reference else ())
    our, their = (frequencies(miner, *rows) for miner in both(name, settings, "default"))
    for one, other in zip(our, their, strict=True):
        same_law(one, other)


@pytest.mark.parametrize("name", ["UniformHistogramMiner", "DistanceWeightedMiner"])
def test_the_same_seed_draws_the_same(name: str) -> None:
    x, labels = draw()
    miner = getattr(ours, name)()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = miner(x, labels)
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(first, miner(x, labels), strict=True))


def test_no_positive_draws_nothing() -> None:
    found = ours.DistanceWeightedMiner()(draw(6)[0], torch.arange(6))
    assert [part.tolist() for part in found] == [[], [], []]
