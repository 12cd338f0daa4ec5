"""nearfar beside pytorch-metric-learning, with the same options on the same random float64 rows.

`make test-peers` installs it and runs this file. Values and gradients agree to 1e-9. Where the two
say different things, the comment of the test says what, and docs/from-pytorch-metric-learning.md
tells their users.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, radians
from typing import Any

import pytest
import torch
from torch import Tensor

import nearfar as nf
from nearfar import mine

pytest.importorskip("pytorch_metric_learning", reason="make test-peers installs it")

from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils as theirs

N, D, CLASSES = 24, 6, 6
Pairs = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def draw(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=chance, dtype=torch.float64).requires_grad_()
    return x, torch.randint(0, CLASSES, (n,), generator=chance)


def agree(ours: Tensor, their: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours, their, rtol=1e-9, atol=1e-9)
    # Where no term counts, theirs is a 0 without a path to some of the leaves.
    how = {"retain_graph": True, "materialize_grads": True}
    found, true = (torch.autograd.grad(loss, leaves, **how) for loss in (ours, their))
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


REDUCERS: dict[Any, Callable[[], Any]] = {
    "mean": reducers.MeanReducer,
    "active": reducers.AvgNonZeroReducer,
    (0.2, 1.5): lambda: reducers.ThresholdReducer(low=0.2, high=1.5),
    (0.5, inf): lambda: reducers.ThresholdReducer(low=0.5),
}

MINERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "MultiSimilarityMiner": miners.MultiSimilarityMiner,
    "PairMarginMiner": miners.PairMarginMiner,
    "TripletMarginMiner": miners.TripletMarginMiner,
    "semihard": lambda: miners.TripletMarginMiner(type_of_triplets="semihard"),
    "easy": lambda: miners.TripletMarginMiner(type_of_triplets="easy"),
    "BatchHardMiner": miners.BatchHardMiner,
    "BatchEasyHardMiner": miners.BatchEasyHardMiner,
    "AngularMiner": miners.AngularMiner,
    "DistanceWeightedMiner": miners.DistanceWeightedMiner,
    "HDCMiner": miners.HDCMiner,
    "UniformHistogramMiner": miners.UniformHistogramMiner,
}
every_miner = pytest.mark.parametrize("miner", MINERS)
every_reducer = pytest.mark.parametrize("reduction", REDUCERS, ids=str)


def mined(miner: str, x: Tensor, labels: Tensor) -> Any:
    """What a miner of theirs returns; None without one."""
    found = MINERS[miner]()
    return None if found is None else found(x, labels)


def as_pairs(found: Any, labels: Tensor, *, once: bool = False) -> Pairs | None:
    """What their miner found, as our `pairs`; triplets become pairs as in their losses.

    `once`: some of their losses mark pairs in a mask, and so count a pair once.
    """
    if found is None:
        return None
    a1, p, a2, n = theirs.convert_to_pairs(found, labels)
    pairs = torch.stack([a1, p], 1), torch.stack([a2, n], 1)
    return tuple(part.unique(dim=0) for part in pairs) if once else pairs  # type: ignore[return-value]


@dataclass(frozen=True)
class OfPairs:
    """A loss of pairs, theirs and ours."""

    their: Callable[..., Any]
    ours: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    once: bool = True


DISTANCES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "euclidean": (distances.LpDistance, {"distance": "euclidean", "normalize": True}),
    "raw": (
        lambda: distances.LpDistance(normalize_embeddings=False),
        {"distance": "euclidean", "normalize": False},
    ),
    "squared": (
        lambda: distances.LpDistance(power=2),
        {"distance": "sqeuclidean", "normalize": True},
    ),
    "manhattan": (
        lambda: distances.LpDistance(p=1),
        {"distance": "manhattan", "normalize": False},
    ),
    "p=3": (
        lambda: distances.LpDistance(p=3, normalize_embeddings=False),
        {"distance": 3.0, "normalize": False},
    ),
    "snr": (
        lambda: distances.SNRDistance(normalize_embeddings=False),
        {"distance": "snr", "normalize": False},
    ),
}
every_distance = pytest.mark.parametrize("distance", DISTANCES)
# Their LpDistance normalizes rows to length 1 in the Euclidean norm only for p = 2.
DISTANCES["manhattan"] = (
    lambda: distances.LpDistance(p=1, normalize_embeddings=False),
    DISTANCES["manhattan"][1],
)


@every_reducer
@every_distance
@every_miner
def test_contrastive(miner: str, distance: str, reduction: Any) -> None:
    x, labels = draw()
    found = mined(miner, x, labels)
    their, ours = DISTANCES[distance]
    loss = losses.ContrastiveLoss(
        pos_margin=0.1, neg_margin=1.3, distance=their(), reducer=REDUCERS[reduction]()
    )
    mean = nf.batch_contrastive_loss(
        x,
        labels,
        margin=1.3,
        pos_margin=0.1,
        squared=False,
        pairs=as_pairs(found, labels),
        reduction=reduction,
        **ours,
    )
    agree(mean, loss(x, labels, found), x)


@pytest.mark.parametrize(("near", "far"), [(1.0, 0.0), (0.8, 0.3), (0.5, -0.2)])
def test_contrastive_by_cosines(near: float, far: float) -> None:
    x, labels = draw()
    settings = {"distance": "cosine", "squared": False, "reduction": "active"}
    loss = losses.ContrastiveLoss(
        distance=distances.CosineSimilarity(), pos_margin=near, neg_margin=far
    )
    ours = nf.batch_contrastive_loss(x, labels, pos_margin=1 - near, margin=1 - far, **settings)
    agree(ours, loss(x, labels), x)
    loss = losses.ThresholdConsistentMarginLoss()
    ours = nf.batch_contrastive_loss(x, labels, pos_margin=0.1, margin=0.5, **settings)
    agree(ours, loss(x, labels), x)


def test_signal_to_noise_contrastive() -> None:
    x, labels = draw()
    settings = {"distance": "snr", "normalize": True, "squared": False, "reduction": "active"}
    their = losses.SignalToNoiseRatioContrastiveLoss()
    agree(nf.batch_contrastive_loss(x, labels, **settings), their(x, labels), x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_views_without_labels(symmetric: bool) -> None:
    (x, _), (y, _) = draw(), draw(seed=1)
    their = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.4), symmetric=symmetric)
    items = torch.arange(len(x))
    if symmetric:
        ours = nf.nt_xent_loss(torch.cat([x, y]), torch.cat([items, items]), temperature=0.4)
    else:
        ours = nf.nt_xent_loss(x, items, temperature=0.4, reference=nf.Reference(y, items))
    agree(ours, their(x, y), x, y)


@every_reducer
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@every_distance
@every_miner
def test_triplet(miner: str, distance: str, swap: bool, smooth: bool, reduction: Any) -> None:
    x, labels = draw(14)
    found = mined(miner, x, labels)
    their, ours = DISTANCES[distance]
    loss = losses.TripletMarginLoss(
        margin=0.2, swap=swap, smooth_loss=smooth, distance=their(), reducer=REDUCERS[reduction]()
    )
    triplets = None
    if found is not None:
        triplets = torch.stack(theirs.convert_to_triplets(found, labels, labels), 1)
    mean = nf.batch_triplet_loss(
        x,
        labels,
        margin=0.2,
        swap=swap,
        smooth=smooth,
        triplets=triplets,
        reduction=reduction,
        **ours,
    )
    agree(mean, loss(x, labels, found), x)


ANCHOR_LOSSES = {
    "SupCon": OfPairs(
        lambda **how: losses.SupConLoss(temperature=0.3, **how),
        nf.sup_con_loss,
        {"temperature": 0.3},
    ),
    "Circle": OfPairs(
        lambda **how: losses.CircleLoss(m=0.3, gamma=8, **how),
        nf.circle_loss,
        {"margin": 0.3, "scale": 8.0},
    ),
    "MultiSimilarity": OfPairs(losses.MultiSimilarityLoss, nf.multi_similarity_loss),
    "GeneralizedLifted": OfPairs(
        losses.GeneralizedLiftedStructureLoss,
        nf.lifted_structure_loss,
        {"normalize": True},
    ),
}


@pytest.mark.parametrize("reduction", ["active", (0.2, 1.5), "sum"], ids=str)
@every_miner
@pytest.mark.parametrize("loss", ANCHOR_LOSSES)
def test_losses_of_anchors(loss: str, miner: str, reduction: Any) -> None:
    """Their mean also counts anchors that have nothing to compare, which ours leaves out.

    A lifted loss of theirs takes the logarithm of an empty sum as 0, so that an anchor without
    positives, or without negatives, has a loss. The paper's sums are over at least one.
    """
    x, labels = draw()
    found, pair = mined(miner, x, labels), ANCHOR_LOSSES[loss]
    reducer = reducers.SumReducer if reduction == "sum" else REDUCERS[reduction]
    ours = pair.ours(
        x,
        labels,
        pairs=as_pairs(found, labels, once=True),
        reduction=reduction,
        **pair.settings,
    )
    their = pair.their(reducer=reducer())
    if loss == "GeneralizedLifted":
        pairs = as_pairs(found, labels, once=True) or _everyone(labels)
        both = set(pairs[0][:, 0].tolist()) & set(pairs[1][:, 0].tolist())
        kept = [torch.tensor([int(i) in both for i in part[:, 0]]) for part in pairs]
        found = tuple(end for part, k in zip(pairs, kept, strict=True) for end in part[k].T)
        if len(both) < len(x):
            pytest.skip("theirs gives rows with nothing to compare a loss")
    agree(ours, their(x, labels, found), x)


def _everyone(labels: Tensor) -> Pairs:
    same, other = labels[:, None] == labels, ~torch.eye(len(labels), dtype=torch.bool)
    return (same & other).nonzero(), (~same).nonzero()


@every_reducer
@every_miner
def test_nt_xent(miner: str, reduction: Any) -> None:
    x, labels = draw()
    found = mined(miner, x, labels)
    their = losses.NTXentLoss(temperature=0.4, reducer=REDUCERS[reduction]())
    ours = nf.nt_xent_loss(
        x, labels, temperature=0.4, pairs=as_pairs(found, labels), reduction=reduction
    )
    agree(ours, their(x, labels, found), x)


@pytest.mark.parametrize("loss", ["NTXent", "SupCon"])
def test_a_temperature_over_squared_distances(loss: str) -> None:
    x, labels = draw()
    settings = {"temperature": 0.4, "similarity": "sqeuclidean"}
    if loss == "NTXent":
        their = losses.NTXentLoss(temperature=0.4, distance=distances.LpDistance(power=2))
        agree(nf.nt_xent_loss(x, labels, **settings), their(x, labels), x)
    else:
        their = losses.SupConLoss(temperature=0.4, distance=distances.LpDistance(power=2))
        agree(nf.sup_con_loss(x, labels, reduction="active", **settings), their(x, labels), x)


@every_reducer
def test_with_a_reference(reduction: Any) -> None:
    x, labels = draw()
    y, others = draw(30, seed=1)
    reference = nf.Reference(y, others)
    for their, ours in (
        (
            losses.NTXentLoss(temperature=0.4, reducer=REDUCERS[reduction]()),
            nf.nt_xent_loss(x, labels, temperature=0.4, reference=reference, reduction=reduction),
        ),
        (
            losses.ContrastiveLoss(reducer=REDUCERS[reduction]()),
            nf.batch_contrastive_loss(
                x, labels, normalize=True, squared=False, reference=reference, reduction=reduction
            ),
        ),
        (
            losses.TripletMarginLoss(margin=0.2, reducer=REDUCERS[reduction]()),
            nf.batch_triplet_loss(
                x, labels, margin=0.2, normalize=True, reference=reference, reduction=reduction
            ),
        ),
    ):
        agree(ours, their(x, labels, ref_emb=y, ref_labels=others), x, y)


@every_reducer
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_nca(scale: float, reduction: Any) -> None:
    x, labels = draw()
    their = losses.NCALoss(softmax_scale=scale, reducer=REDUCERS[reduction]())
    ours = nf.nca_loss(x, labels, scale=scale, similarity="sqeuclidean", reduction=reduction)
    agree(ours, their(x, labels), x)


@every_miner
def test_nca_with_a_miner(miner: str) -> None:
    """A miner of theirs weighs rows here, and their mean does not divide by the weights."""
    x, labels = draw()
    found = mined(miner, x, labels)
    weight = theirs.convert_to_weights(found, labels, dtype=x.dtype)
    their = losses.NCALoss(reducer=reducers.SumReducer())
    ours = nf.nca_loss(x, labels, similarity="sqeuclidean", weight=weight, reduction="sum")
    agree(ours, their(x, labels, found), x)


@every_reducer
@pytest.mark.parametrize("normalize", [True, False])
def test_n_pairs(normalize: bool, reduction: Any) -> None:
    x, labels = draw()
    distance = distances.DotProductSimilarity(normalize_embeddings=normalize)
    their = losses.NPairsLoss(distance=distance, reducer=REDUCERS[reduction]())
    agree(nf.n_pair_loss(x, labels, normalize=normalize, reduction=reduction), their(x, labels), x)


@every_reducer
@every_miner
def test_lifted_as_in_the_paper(miner: str, reduction: Any) -> None:
    """Theirs gives a pair without negatives the loss d^2 / 2; the logarithm of nothing is not 0."""
    x, labels = draw()
    found = mined(miner, x, labels)
    pairs = as_pairs(found, labels)
    if pairs is not None:
        have = set(pairs[1][:, 0].tolist())
        keep = torch.tensor([bool({int(i), int(j)} & have) for i, j in pairs[0]], dtype=torch.bool)
        pairs = pairs[0][keep], pairs[1]
        found = (*pairs[0].T, *pairs[1].T)
        if not len(pairs[0]):
            pytest.skip("no similar pair has a negative")
    their = losses.LiftedStructureLoss(reducer=REDUCERS[reduction]())
    ours = nf.lifted_pair_loss(x, labels, normalize=True, pairs=pairs, reduction=reduction)
    agree(ours, their(x, labels, found), x)


# Proxies. Their classifiers keep the weights as (d, classes).


def proxies_of(loss: Any) -> Tensor:
    """Their proxies in float64, as a leaf (classes, d)."""
    weights = loss.proxies if hasattr(loss, "proxies") else loss.W
    weights.data = torch.randn(weights.shape, dtype=torch.float64)
    return weights


@every_miner
@pytest.mark.parametrize("name", ["ArcFace", "CosFace", "NormalizedSoftmax", "SubCenter"])
def test_classifiers(name: str, miner: str) -> None:
    x, labels = draw()
    found = mined(miner, x, labels)
    size = {"num_classes": CLASSES, "embedding_size": D, "reducer": reducers.SumReducer()}
    their, settings = {
        "ArcFace": (
            lambda: losses.ArcFaceLoss(margin=28.6, scale=20, **size),
            {"scale": 20.0, "angle_margin": radians(28.6)},
        ),
        "CosFace": (
            lambda: losses.CosFaceLoss(margin=0.35, scale=20, **size),
            {"scale": 20.0, "cosine_margin": 0.35},
        ),
        "NormalizedSoftmax": (
            lambda: losses.NormalizedSoftmaxLoss(temperature=0.05, **size),
            {"scale": 20.0},
        ),
        "SubCenter": (
            lambda: losses.SubCenterArcFaceLoss(margin=28.6, scale=20, sub_centers=3, **size),
            {"scale": 20.0, "angle_margin": radians(28.6)},
        ),
    }[name]
    loss = their()
    weights = proxies_of(loss)
    ours = weights.T.reshape(CLASSES, 3, D) if name == "SubCenter" else weights.T
    weight = theirs.convert_to_weights(found, labels, dtype=x.dtype)
    mean = nf.proxy_softmax_loss(x, ours, labels, weight=weight, reduction="sum", **settings)
    agree(mean, loss(x, labels, found), x, weights)


def test_proxy_anchor() -> None:
    x, labels = draw()
    loss = losses.ProxyAnchorLoss(CLASSES, D, margin=0.2, alpha=16)
    weights = proxies_of(loss)
    ours = nf.proxy_anchor_loss(x, weights, labels, margin=0.2, scale=16.0)
    agree(ours, loss(x, labels), x, weights)


@every_miner
def test_proxy_nca(miner: str) -> None:
    """Theirs has the own proxy in the denominator: a softmax over minus the squared distances."""
    x, labels = draw()
    found = mined(miner, x, labels)
    loss = losses.ProxyNCALoss(CLASSES, D, softmax_scale=3, reducer=reducers.SumReducer())
    weights = proxies_of(loss)
    weight = theirs.convert_to_weights(found, labels, dtype=x.dtype, using_ref=True)
    ours = nf.proxy_softmax_loss(x, weights, labels, scale=6.0, weight=weight, reduction="sum")
    agree(ours, loss(x, labels, found), x, weights)


# The miners themselves.


def same_tuples(ours: Tensor, *their: Tensor) -> None:
    """The same tuples in any order."""
    assert sorted(ours.tolist()) == sorted(torch.stack(their, 1).tolist())


@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
def test_triplets_by_margin(kind: str) -> None:
    x, labels = draw()
    found = miners.TripletMarginMiner(margin=0.2, type_of_triplets=kind)(x, labels)
    ours = mine.violating_triplets(x, labels, margin=0.2, kind=kind, normalize=True)
    same_tuples(ours, *found)


def test_angular_triplets() -> None:
    """Of the rows as they are: theirs does not normalize them, whatever its distance says."""
    x, labels = draw()
    same_tuples(
        mine.angular_triplets(x, labels, angle=25.0),
        *miners.AngularMiner(angle=25)(x, labels),
    )


def test_pairs_by_margin() -> None:
    x, labels = draw()
    a1, p, a2, n = miners.PairMarginMiner(pos_margin=0.9, neg_margin=1.3)(x, labels)
    ours = mine.violating_pairs(x, labels, pos_margin=0.9, neg_margin=1.3, normalize=True)
    same_tuples(ours.positive, a1, p)
    same_tuples(ours.negative, a2, n)


def test_multi_similarity_pairs() -> None:
    """Theirs also keeps, for anchors with only one kind, what the missing kind would exclude."""
    x, labels = draw()
    a1, p, a2, n = miners.MultiSimilarityMiner(epsilon=0.1)(x, labels)
    ours = mine.multi_similarity_pairs(x, labels, epsilon=0.1)
    same_tuples(ours.positive, a1, p)
    same_tuples(ours.negative, a2, n)


def test_hard_pairs() -> None:
    x, labels = draw()
    a1, p, a2, n = miners.HDCMiner(filter_percentage=0.3)(x, labels)
    ours = mine.hard_pairs(x, labels, share=0.3, normalize=True)
    same_tuples(ours.positive, a1, p)
    same_tuples(ours.negative, a2, n)


@pytest.mark.parametrize("positive", ["easy", "hard", "semihard", "all"])
@pytest.mark.parametrize("negative", ["hard", "semihard", "easy", "all"])
@pytest.mark.parametrize("ranges", [(None, None), ((0.5, 1.2), (0.4, 1.3))])
def test_easy_and_hard_triplets(positive: Any, negative: Any, ranges: Any) -> None:
    """Theirs returns pairs where one side is all of them, here made into triplets."""
    if {positive, negative} in ({"semihard"}, {"all"}, {"semihard", "all"}):
        pytest.skip("both refuse it, or it is every triplet")
    if "all" in (positive, negative) and ranges[0] is not None:
        pytest.skip("theirs ignores the range of a side of which it takes all")
    x, labels = draw()
    found = miners.BatchEasyHardMiner(
        pos_strategy=positive,
        neg_strategy=negative,
        allowed_pos_range=ranges[0],
        allowed_neg_range=ranges[1],
    )(x, labels)
    triplets = theirs.convert_to_triplets(found, labels, labels)
    ours = mine.easy_hard_triplets(
        x,
        labels,
        positive=positive,
        negative=negative,
        positive_range=ranges[0],
        negative_range=ranges[1],
        normalize=True,
    )
    same_tuples(ours, *triplets)
