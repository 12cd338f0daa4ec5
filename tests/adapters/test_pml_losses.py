"""Every loss of the door beside theirs: the same values and gradients on random float64 rows.

What is mined, the reference, the reducer and the distance vary. Where the two say different things,
the test says what, and docs/from-pytorch-metric-learning.md tells their users.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from nearfar.adapters.pml import losses as ours

N, D, CLASSES = 20, 5, 6
Indices = tuple[Tensor, ...] | None


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def draw(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=chance, dtype=torch.float64).requires_grad_()
    return x, torch.randint(0, CLASSES, (n,), generator=chance)


class Doubled(reducers.MeanReducer):  # type: ignore[misc]
    """A reducer that nearfar does not know."""

    def element_reduction(self, losses: Tensor, *_: Any) -> Tensor:
        return losses.mean() * 2


REDUCERS: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "mean": reducers.MeanReducer,
    "active": reducers.AvgNonZeroReducer,
    "between": lambda: reducers.ThresholdReducer(low=0.1, high=0.9),
    "below": lambda: reducers.ThresholdReducer(high=0.9),
    "sum": reducers.SumReducer,
    "of_classes": lambda: reducers.ClassWeightedReducer(torch.arange(1.0, CLASSES + 1)),
    "of_anchors": reducers.PerAnchorReducer,
    "active_anchors": lambda: reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
    "own": Doubled,
}

MINED: dict[str, Callable[..., Indices]] = {
    "none": lambda *_: None,
    "pairs": miners.PairMarginMiner(pos_margin=0.9, neg_margin=1.5),
    "triplets": miners.TripletMarginMiner(margin=0.1),
}

DISTANCES: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "euclidean": distances.LpDistance,
    "raw": lambda: distances.LpDistance(normalize_embeddings=False),
    "squared": lambda: distances.LpDistance(power=2),
    "raw_squared": lambda: distances.LpDistance(power=2, normalize_embeddings=False),
    "manhattan": lambda: distances.LpDistance(p=1),
    "p=3": lambda: distances.LpDistance(p=3),
    "raw_p=3": lambda: distances.LpDistance(p=3, normalize_embeddings=False),
    "snr": distances.SNRDistance,
    "cosine": distances.CosineSimilarity,
    "product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
}

OF_DISTANCES = [
    "default", "euclidean", "raw", "squared", "raw_squared", "manhattan", "p=3", "raw_p=3", "snr",
    "cosine",
]  # fmt: skip
OF_SIMILARITIES = ["default", "squared", "raw_squared", "cosine", "product"]

# Which arguments, which distances, and whether a reference is taken.
LOSSES: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "ContrastiveLoss": ({"pos_margin": 0.1, "neg_margin": 0.9}, [*OF_DISTANCES, "product"], True),
    "SignalToNoiseRatioContrastiveLoss": ({}, ["default"], True),
    "TripletMarginLoss": ({"margin": 0.2}, OF_DISTANCES, True),
    "NTXentLoss": ({"temperature": 0.4}, OF_SIMILARITIES, True),
    "SupConLoss": ({"temperature": 0.4}, OF_SIMILARITIES, True),
    "MultiSimilarityLoss": ({}, OF_SIMILARITIES, True),
    "CircleLoss": ({"m": 0.3, "gamma": 8}, ["default"], True),
    "GeneralizedLiftedStructureLoss": ({"neg_margin": 1.1}, OF_DISTANCES[:-1], True),
    "LiftedStructureLoss": ({"neg_margin": 1.1}, OF_DISTANCES[:-1], False),
    "NCALoss": ({"softmax_scale": 2}, OF_SIMILARITIES, True),
    "NPairsLoss": ({}, OF_SIMILARITIES, False),
    "ArcFaceLoss": ({}, ["default"], False),
    "CosFaceLoss": ({}, ["default"], False),
    "SubCenterArcFaceLoss": ({}, ["default"], False),
    "NormalizedSoftmaxLoss": ({}, ["default", "cosine", "product"], False),
    "ProxyNCALoss": ({"softmax_scale": 2}, OF_SIMILARITIES, False),
    "ProxyAnchorLoss": ({"margin": 0.2, "alpha": 16}, ["default"], False),
    "ThresholdConsistentMarginLoss": ({}, ["default"], False),
}
PROXIES = [name for name in LOSSES if hasattr(getattr(theirs, name), "get_logits")]
LIFTED = ("GeneralizedLiftedStructureLoss", "LiftedStructureLoss")
OF_PAIRS = (
    "ContrastiveLoss", "SignalToNoiseRatioContrastiveLoss", "NTXentLoss", "LiftedStructureLoss"
)  # fmt: skip
# Their losses have the shape (n, 1), which a weight of classes would make (n, n).
IN_A_COLUMN = (*LIFTED, "MultiSimilarityLoss", "CircleLoss")


def both(name: str, **settings: Any) -> tuple[Any, Any]:
    """Their loss and ours, with the same weights in float64."""
    if name in PROXIES:
        settings |= {"num_classes": CLASSES, "embedding_size": D}
    settings = {k: v for k, v in settings.items() if v is not None}
    their, our = (getattr(module, name)(**settings) for module in (theirs, ours))
    if name in PROXIES:
        their.double()
        our.double().load_state_dict(their.state_dict())
    return their, our


def same_step(
    their: Any,
    our: Any,
    x: Tensor,
    labels: Tensor,
    found: Indices = None,
    *,
    for_theirs: Indices = None,
    **reference: Tensor,
) -> None:
    """Values, and gradients of rows, reference and weights."""
    leaves = [x, *(t for t in reference.values() if t.requires_grad)]
    values = our(x, labels, found, **reference), their(x, labels, for_theirs or found, **reference)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
    grads = [
        # Where no term counts, theirs is a 0 without a graph.
        torch.autograd.grad(
            value + 0 * x.sum(), [*leaves, *loss.parameters()], materialize_grads=True
        )
        for value, loss in zip(values, (our, their), strict=True)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def data(name: str) -> tuple[Tensor, Tensor]:
    """Of a lifted loss every anchor has both kinds: theirs takes the log of an empty sum as 0."""
    x, labels = draw()
    return x, (torch.arange(N) % 5 if name in LIFTED else labels)


def mined(how: str, name: str, *rows: Tensor) -> Indices:
    found = MINED[how](*rows)
    if found is None or name not in LIFTED:
        return found
    a1, p, a2, n = lmu.convert_to_pairs(found, rows[1])
    near, far = torch.isin(a1, a2), torch.isin(a2, a1)
    return a1[near], p[near], a2[far], n[far]


class OneColumn(torch.nn.Module):
    """A reducer of theirs, for losses of theirs of shape (n, 1), which it would broadcast."""

    def __init__(self, reducer: Any) -> None:
        super().__init__()
        self.reducer = reducer

    def forward(self, parts: dict[str, Any], *rows: Tensor) -> Tensor:
        flat = {name: part | {"losses": part["losses"].flatten()} for name, part in parts.items()}
        value: Tensor = self.reducer(flat, *rows)
        return value


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("how", MINED)
@pytest.mark.parametrize("name", LOSSES)
def test_reducers(name: str, how: str, reducer: str) -> None:
    settings, *_ = LOSSES[name]
    if name == "TripletMarginLoss" and "anchors" in reducer:
        pytest.skip("theirs does not take it for triplets")
    their, our = both(name, **settings, reducer=REDUCERS[reducer]())
    if name in IN_A_COLUMN:
        their.reducer = OneColumn(their.reducer)
    x, labels = data(name)
    found = mined(how, name, x, labels)
    once = found
    if how == "triplets" and "anchors" in reducer and name in OF_PAIRS:
        # The gradient of theirs counts a pair as often as it was mined, though the value does not.
        once = distinct_terms(name, found)
    same_step(their, our, x, labels, found, for_theirs=once)


def distinct_terms(name: str, found: Indices) -> Indices:
    """Mined pairs, each once where it has a term of its own."""
    a1, p, a2, n = lmu.convert_to_pairs(found, None)
    near, far = torch.stack([a1, p], 1).unique(dim=0), torch.stack([a2, n], 1)
    if "Contrastive" in name:
        far = far.unique(dim=0)
    return (*near.T, *far.T)


@pytest.mark.parametrize("how", MINED)
@pytest.mark.parametrize(
    ("name", "distance"), [(name, d) for name, (_, some, _) in LOSSES.items() for d in some]
)
def test_distances(name: str, distance: str, how: str) -> None:
    settings, *_ = LOSSES[name]
    their, our = both(name, **settings, distance=DISTANCES[distance]())
    x, labels = data(name)
    same_step(their, our, x, labels, mined(how, name, x, labels))


@pytest.mark.parametrize("same_items", [False, True])
@pytest.mark.parametrize("reducer", ["default", "mean", "between", "of_classes"])
@pytest.mark.parametrize("how", MINED)
@pytest.mark.parametrize("name", [name for name, (_, _, ref) in LOSSES.items() if ref])
def test_references(name: str, how: str, reducer: str, same_items: bool) -> None:
    """The same labels object says that row i of the reference is row i of the batch."""
    settings, *_ = LOSSES[name]
    their, our = both(name, **settings, reducer=REDUCERS[reducer]())
    if name in IN_A_COLUMN:
        their.reducer = OneColumn(their.reducer)
    x, labels = data(name)
    y, others = draw(N if same_items else 26, seed=1)
    others = labels if same_items else torch.arange(26) % 5 if name in LIFTED else others
    found = mined(how, name, x, labels, y, others)
    same_step(their, our, x, labels, found, ref_emb=y, ref_labels=others)
