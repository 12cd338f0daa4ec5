"""The door inside the other library: its wrappers, trainers, checkpoints and low precision."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from allocations import Allocations
from processes import run
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances as their_distances
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning import miners as their_miners
from pytorch_metric_learning import regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

import nearfar as nf
from nearfar.adapters import pml
from nearfar.adapters.pml import as_pml, distances, losses, miners, reducers

N, D, CLASSES = 24, 5, 6
PROGRAM = """\
import numpy as np
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, samplers, trainers

np.random.seed(0)
torch.manual_seed(0)
centres = torch.randn(10, 12)
labels = torch.arange(10).repeat_interleave(16)
items = centres[labels] + torch.randn(len(labels), 12)
dataset = torch.utils.data.TensorDataset(items, labels)

models = {
    "trunk": torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU()),
    "embedder": torch.nn.Linear(32, 6),
}
metric_loss = losses.MultipleLosses(
    [
        losses.TripletMarginLoss(
            margin=0.2,
            distance=distances.CosineSimilarity(),
            reducer=reducers.ThresholdReducer(low=0),
        ),
        losses.ArcFaceLoss(10, 6, margin=15, scale=16),
        losses.MultiSimilarityLoss(),
    ],
    weights=[1.0, 0.5, 0.5],
)
miner = miners.MultiSimilarityMiner(epsilon=0.1)
optimizers = {
    "trunk_optimizer": torch.optim.SGD(models["trunk"].parameters(), lr=0.1),
    "embedder_optimizer": torch.optim.SGD(models["embedder"].parameters(), lr=0.1),
    "metric_loss_optimizer": torch.optim.SGD(metric_loss.parameters(), lr=0.1),
}


def show(trainer):
    if trainer.iteration % 4 == 3:
        print(f"{trainer.losses['metric_loss']:.4f}")


trainers.MetricLossOnly(
    models,
    optimizers,
    batch_size=40,
    loss_funcs={"metric_loss": metric_loss},
    mining_funcs={"tuple_miner": miner},
    dataset=dataset,
    sampler=samplers.MPerClassSampler(labels, m=4, length_before_new_iter=len(dataset)),
    dataloader_num_workers=0,
    data_device="cpu",
    end_of_iteration_hook=show,
).train(num_epochs=3)

memory = losses.CrossBatchMemory(
    losses.NTXentLoss(temperature=0.1), embedding_size=6, memory_size=120, miner=miner
)
network = torch.nn.Linear(12, 6)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for step in range(12):
    chosen = torch.randint(0, len(items), (40,))
    value = memory(network(items[chosen]), labels[chosen])
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    if step % 4 == 3:
        print(f"{value.item():.4f}")
"""


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def draw(n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=chance, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randint(0, CLASSES, (n,), generator=chance)


def agree(ours: Tensor, their: Tensor, *leaves: Tensor, to: float = 1e-9) -> None:
    torch.testing.assert_close(ours, their, rtol=to, atol=to)
    grads = [torch.autograd.grad(v, leaves, materialize_grads=True) for v in (ours, their)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=to, atol=to)


def test_a_training_program_prints_the_same_with_its_import_changed() -> None:
    changed = PROGRAM.replace(
        "from pytorch_metric_learning import", "from nearfar.adapters.pml import"
    )
    printed = []
    for text in (PROGRAM, changed):
        out = io.StringIO()
        with redirect_stdout(out), warnings.catch_warnings():
            # Their progress bar converts a loss that requires a gradient.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")
            exec(compile(text, "a program", "exec"), {"__name__": "__main__"})
        printed.append([float(line) for line in out.getvalue().split()])
    assert changed != PROGRAM
    assert len(printed[0]) == 6
    assert printed[1] == pytest.approx(printed[0], abs=2e-4)


# Wrappers.

IN_MEMORY: dict[str, dict[str, Any]] = {
    "CircleLoss": {},
    "ContrastiveLoss": {},
    "GeneralizedLiftedStructureLoss": {},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NTXentLoss": {},
    "SignalToNoiseRatioContrastiveLoss": {},
    "SupConLoss": {},
    "TripletMarginLoss": {},
}


@pytest.mark.parametrize("miner", ["none", "MultiSimilarityMiner", "TripletMarginMiner"])
@pytest.mark.parametrize("name", IN_MEMORY)
def test_memory_of_earlier_batches(name: str, miner: str) -> None:
    """Twelve rows a step, in a memory that wraps round; every class is in each batch twice."""
    if name == "GeneralizedLiftedStructureLoss" and miner != "none":
        pytest.skip("theirs gives anchors with one kind of pairs a loss: the log of an empty sum")
    memories = []
    for of_losses, of_miners in ((losses, miners), (theirs, their_miners)):
        mine = None if miner == "none" else getattr(of_miners, miner)()
        memories.append(
            of_losses.CrossBatchMemory(getattr(of_losses, name)(), D, memory_size=30, miner=mine)
        )
    for step in range(5):
        x = draw(12, seed=step)[0]
        labels = torch.arange(12) % CLASSES
        agree(*(memory(x, labels) for memory in memories), x)


@pytest.mark.parametrize("enqueued", [False, True])
def test_memory_with_a_mask_or_with_tuples_of_the_batch(enqueued: bool) -> None:
    memories = [
        module.CrossBatchMemory(module.NTXentLoss(), D, memory_size=30)
        for module in (losses, theirs)
    ]
    for step in range(4):
        x, labels = draw(12, seed=step)[0], torch.arange(12) % CLASSES
        found = their_miners.PairMarginMiner()(x, labels)
        more = {"enqueue_mask": torch.arange(12) >= 6} if enqueued else {"indices_tuple": found}
        agree(*(memory(x, labels, **more) for memory in memories), x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", [n for n in IN_MEMORY if "Lifted" not in n])
def test_two_views_without_labels(name: str, symmetric: bool) -> None:
    (x, _), (y, _) = draw(), draw(seed=1)
    ours, their = (
        module.SelfSupervisedLoss(getattr(module, name)(), symmetric=symmetric)(x, y)
        for module in (losses, theirs)
    )
    agree(ours, their, x, y)


def test_several_losses_with_miners() -> None:
    x, labels = draw()
    values = [
        of_losses.MultipleLosses(
            {"a": of_losses.TripletMarginLoss(), "b": of_losses.SupConLoss()},
            miners={"a": of_miners.TripletMarginMiner()},
            weights={"a": 2.0, "b": 0.5},
        )(x, labels)
        for of_losses, of_miners in ((losses, miners), (theirs, their_miners))
    ]
    agree(*values, x)


def of_one_process(name: str, efficient: bool) -> tuple[list[float], Tensor]:
    rank = torch.distributed.get_rank()
    values, grads = [], []
    for module in (losses, theirs):
        x, labels = draw(12, seed=rank)
        loss = DistributedLossWrapper(getattr(module, name)(), efficient=efficient)
        value = loss(x, labels)
        value.backward()
        values.append(value.item())
        grads.append(x.grad)
    return values, torch.stack(grads)


@pytest.mark.slow
@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("name", ["NTXentLoss", "ContrastiveLoss", "SupConLoss"])
def test_several_processes(name: str, efficient: bool) -> None:
    for values, grads in run(2, of_one_process, name, efficient):
        assert values[0] == pytest.approx(values[1], rel=1e-9)
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# Options of single losses.


@pytest.mark.parametrize("how", ["none", "pairs", "triplets"])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_swapped_and_smooth_triplets(swap: bool, smooth: bool, how: str) -> None:
    x, labels = draw()
    found = {
        "none": None,
        "pairs": their_miners.PairMarginMiner(0.9, 1.5)(x, labels),
        "triplets": their_miners.TripletMarginMiner()(x, labels),
    }[how]
    ours, their = (
        module.TripletMarginLoss(swap=swap, smooth_loss=smooth)(x, labels, found)
        for module in (losses, theirs)
    )
    agree(ours, their, x)


def test_drawn_triplets_have_the_mean_of_theirs() -> None:
    x, labels = draw()
    means = []
    for module in (losses, theirs):
        loss = module.TripletMarginLoss(
            margin=0.5, triplets_per_anchor=5, reducer=reducers.MeanReducer()
        )
        means.append(torch.stack([loss(x, labels).detach() for _ in range(300)]))
    spread = (means[0].var() / 300 + means[1].var() / 300).sqrt().item()
    assert abs(means[0].mean() - means[1].mean()).item() < 4 * spread
    nothing = losses.TripletMarginLoss(triplets_per_anchor=5, reducer=reducers.DoNothingReducer())
    assert len(nothing(x, labels)["loss"]["losses"]) == 5 * N


def test_swapped_triplets_of_a_reference_are_all_of_its_rows() -> None:
    """Theirs takes the positive of the swap from the batch, by its index in the reference."""
    (x, labels), (y, others) = draw(), draw(seed=1)
    mat = their_distances.LpDistance()
    a, p, n = lmu.get_all_triplets_indices(labels, others)
    near, far, swapped = mat(x, y)[a, p], mat(x, y)[a, n], mat(y, y)[p, n]
    violations = (near - torch.minimum(far, swapped) + 0.05).relu()
    loss = losses.TripletMarginLoss(swap=True)(x, labels, ref_emb=y, ref_labels=others)
    agree(loss, violations[violations > 0].mean(), x, y)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (2.0, 0.3)])
@pytest.mark.parametrize("how", ["none", "pairs", "triplets"])
def test_margins_consistent_with_a_threshold(how: str, weights: tuple[float, float]) -> None:
    x, labels = draw()
    found = {
        "none": None,
        "pairs": their_miners.PairMarginMiner(0.9, 1.5)(x, labels),
        "triplets": their_miners.TripletMarginMiner()(x, labels),
    }[how]
    ours, their = (
        module.ThresholdConsistentMarginLoss(lambda_plus=weights[0], lambda_minus=weights[1])(
            x, labels, found
        )
        for module in (losses, theirs)
    )
    agree(ours, their, x)


@pytest.mark.parametrize("name", ["ContrastiveLoss", "NTXentLoss", "TripletMarginLoss", "NCALoss"])
@pytest.mark.parametrize("mined", [False, True])
def test_losses_as_they_are(name: str, mined: bool) -> None:
    """`DoNothingReducer` returns the loss of each pair, triplet or row, and which it is."""
    x, labels = draw()
    found = their_miners.PairMarginMiner(0.9, 1.5)(x, labels) if mined else None
    ours, their = (
        getattr(module, name)(reducer=reducers.DoNothingReducer())(x, labels, found)
        for module in (losses, theirs)
    )
    assert ours.keys() == their.keys()
    for part, true in their.items():
        assert ours[part]["reduction_type"] == true["reduction_type"]
        torch.testing.assert_close(ours[part]["losses"], true["losses"], rtol=1e-9, atol=1e-9)
        indices = true["indices"]
        torch.testing.assert_close(
            ours[part]["indices"], indices if torch.is_tensor(indices) else tuple(indices)
        )


@pytest.mark.parametrize("mined", [False, True])
def test_a_reducer_for_each_part(mined: bool) -> None:
    x, labels = draw()
    found = their_miners.PairMarginMiner(0.9, 1.5)(x, labels) if mined else None
    each = {"pos_loss": reducers.MeanReducer(), "neg_loss": reducers.SumReducer()}
    ours, their = (
        module.ContrastiveLoss(reducer=reducers.MultipleReducers(each))(x, labels, found)
        for module in (losses, theirs)
    )
    agree(ours, their, x)


def test_an_aggregation_of_the_users_own() -> None:
    def largest(losses: Tensor, _: Tensor) -> Tensor:
        return losses.amax(1)

    x, labels = draw()
    ours, their = (
        module.NTXentLoss(reducer=reducers.PerAnchorReducer(aggregation_func=largest))(x, labels)
        for module in (losses, theirs)
    )
    agree(ours, their, x)


def test_a_cosine_above_1_as_a_margin() -> None:
    x, labels = draw()
    ours, their = (
        module.ContrastiveLoss(1.5, 0.4, distance=distances.CosineSimilarity())(x, labels)
        for module in (losses, theirs)
    )
    agree(ours, their, x)


def test_rows_of_float64_widen_weights_as_there() -> None:
    x, labels = draw()
    made = [module.ArcFaceLoss(CLASSES, D) for module in (losses, theirs)]
    made[0].load_state_dict(made[1].state_dict())
    agree(made[0](x, labels), made[1](x, labels), x)
    assert made[0].W.dtype == torch.float64


def test_regularizers() -> None:
    x, labels = draw()
    for name in ("ContrastiveLoss", "SupConLoss", "ArcFaceLoss", "ProxyAnchorLoss"):
        how: dict[str, Any] = {
            "embedding_regularizer": regularizers.LpRegularizer(),
            "embedding_reg_weight": 0.3,
        }
        if "Face" in name or "Proxy" in name:
            how |= {"num_classes": CLASSES, "embedding_size": D, "weight_reg_weight": 0.2}
            how["weight_regularizer"] = regularizers.RegularFaceRegularizer()
        ours, their = (getattr(module, name)(**how).double() for module in (losses, theirs))
        ours.load_state_dict(their.state_dict())
        agree(ours(x, labels), their(x, labels), x)


def test_a_negative_margin_between_similarities_is_refused_with_its_reason() -> None:
    loss = losses.LiftedStructureLoss(distance=distances.CosineSimilarity())
    with pytest.raises(ValueError, match="margin must be"):
        loss(*draw())
    x, labels = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.arange(N) % 5
    ours, their = (
        module.LiftedStructureLoss(0.2, 0.9, distance=distances.CosineSimilarity())(x, labels)
        for module in (losses, theirs)
    )
    agree(ours, their, x)


# Weights.

WITH_WEIGHTS = [
    "ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss",
    "SubCenterArcFaceLoss",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_checkpoints_load_both_ways_and_the_same_seed_starts_the_same(name: str) -> None:
    made = []
    for module in (losses, theirs):
        torch.manual_seed(5)
        made.append(getattr(module, name)(num_classes=CLASSES, embedding_size=D))
    for one, other in (made, reversed(made)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])
        other.load_state_dict(one.state_dict())
    x, _ = draw(dtype=torch.float32)
    assert torch.equal(made[0].get_logits(x), made[1].get_logits(x))
    half = made[0].get_logits(x.half())
    torch.testing.assert_close(half, made[1].get_logits(x), rtol=1e-2, atol=0.1)


def test_outliers_of_sub_centres() -> None:
    x, labels = draw(dtype=torch.float32)
    made = losses.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=D)
    their = theirs.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=D)
    their.load_state_dict(made.state_dict())
    for one, other in zip(made.get_outliers(x, labels), their.get_outliers(x, labels), strict=True):
        torch.testing.assert_close(one, other)
    assert made.get_outliers(x.half(), labels)[1].dtype == torch.float32


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_keep_their_dtype(name: str) -> None:
    """Theirs turns them into that of the rows, float16 under autocast."""
    x, labels = draw(dtype=torch.float16)
    loss = getattr(losses, name)(num_classes=CLASSES, embedding_size=D)
    before = copy.deepcopy(loss.state_dict())
    loss(x, labels).backward()
    (weights,) = loss.parameters()
    assert weights.dtype == weights.grad.dtype == torch.float32
    assert weights.grad.isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*IN_MEMORY, "LiftedStructureLoss", "NPairsLoss"])
def test_low_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    x, labels = draw(dtype=dtype)
    labels = torch.arange(N) % 4
    low = getattr(losses, name)()(x, labels)
    high = getattr(losses, name)()(x.double(), labels)
    torch.testing.assert_close(low.double(), high, rtol=1e-2, atol=1e-4)
    (grad,) = torch.autograd.grad(low, x)
    (true,) = torch.autograd.grad(high, x)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, true, rtol=2e-2, atol=1e-3)


def test_autocast() -> None:
    network, (x, labels) = torch.nn.Linear(D, 4), draw(dtype=torch.float32)
    loss = losses.ArcFaceLoss(CLASSES, 4)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = network(x)
        found = miners.MultiSimilarityMiner()(embeddings, labels)
        total = loss(embeddings, labels, found) + losses.SupConLoss()(embeddings, labels, found)
    total.backward()
    assert embeddings.dtype == torch.bfloat16
    assert network.weight.grad.isfinite().all()
    assert loss.W.dtype == torch.float32


@pytest.mark.parametrize("name", [*IN_MEMORY, "ArcFaceLoss", "ProxyNCALoss"])
def test_copies_and_pickles(name: str) -> None:
    sizes = {"num_classes": CLASSES, "embedding_size": D} if name in WITH_WEIGHTS else {}
    x, labels = draw(dtype=torch.float32)
    loss = getattr(losses, name)(**sizes)
    value = loss(x, labels)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(x, labels), value)
    assert isinstance(loss, getattr(theirs, name))


# Memory.

LARGE = 2048
SQUARE = LARGE**2  # bytes of one number for each pair, if it were a bool


@pytest.mark.slow
@pytest.mark.parametrize("reducer", ["default", "of_classes", "of_anchors"])
@pytest.mark.parametrize("name", [*IN_MEMORY, "LiftedStructureLoss", "NPairsLoss"])
def test_memory_is_linear_in_the_batch(name: str, reducer: str) -> None:
    if name == "TripletMarginLoss" and reducer == "of_anchors":
        pytest.skip("no reducer of theirs for triplets")
    labels = torch.arange(LARGE) % 512
    how = {
        "default": lambda: None,
        "of_classes": lambda: reducers.ClassWeightedReducer(torch.ones(512)),
        "of_anchors": reducers.PerAnchorReducer,
    }[reducer]()
    loss = getattr(losses, name)(reducer=how)

    x = torch.randn(LARGE, 32, requires_grad=True)
    with nf.memory_budget(2**20), Allocations(x) as seen:
        loss(x, labels).backward()
    assert seen.peak < SQUARE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchHardMiner", "DistanceWeightedMiner", "HDCMiner"])
def test_miners_take_memory_linear_in_the_batch(name: str) -> None:
    x, labels = torch.randn(LARGE, 32), torch.arange(LARGE) % 512
    miner = getattr(miners, name)(**({"filter_percentage": 0.001} if name == "HDCMiner" else {}))
    with nf.memory_budget(2**20), Allocations(x) as seen:
        miner(x, labels)
    assert seen.peak < SQUARE


# Any loss of nearfar.


@pytest.mark.parametrize("how", ["none", "pairs", "triplets"])
@pytest.mark.parametrize(
    "loss",
    [
        nf.SupConLoss(temperature=0.3),
        nf.BatchContrastiveLoss(margin=0.8, reduction="active"),
        nf.BatchTripletLoss(margin=0.3),
        nf.MultiSimilarityLoss(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_any_loss_of_a_batch(loss: Any, how: str) -> None:
    (x, labels), (y, others) = draw(), draw(30, seed=1)
    found = {
        "none": None,
        "pairs": their_miners.PairMarginMiner(0.9, 1.5)(x, labels, y, others),
        "triplets": their_miners.TripletMarginMiner()(x, labels, y, others),
    }[how]
    listed: dict[str, Any] = {}
    if found is not None and isinstance(loss, nf.BatchTripletLoss):
        listed["triplets"] = torch.stack(lmu.convert_to_triplets(found, labels), 1)
    elif found is not None:
        a1, p, a2, n = lmu.convert_to_pairs(found, labels)
        listed["pairs"] = torch.stack([a1, p], 1), torch.stack([a2, n], 1)
    expected = loss(x, labels, reference=nf.Reference(y, others), **listed)
    agree(as_pml(loss)(x, labels, found, y, others), expected, x, y)


def test_functions_with_hyperparameters_and_rules() -> None:
    x, labels = draw()
    agree(
        as_pml(nf.circle_loss, margin=0.4, reduction="sum")(x, labels),
        nf.circle_loss(x, labels, margin=0.4, reduction="sum"),
        x,
    )
    rule = nf.PairRule(torch.square, lambda d: (1 - d).relu())
    wrapped = as_pml(nf.batch_loss, rule=rule, distance="euclidean")
    agree(wrapped(x, labels), nf.batch_loss(rule, x, labels, distance="euclidean"), x)
    memory = theirs.CrossBatchMemory(wrapped, D, memory_size=N)
    expected = nf.batch_loss(rule, x, labels, distance="euclidean", reference=itself(x, labels))
    agree(memory(x, labels), expected, x)


def test_losses_with_proxies() -> None:
    x, labels = draw(dtype=torch.float32)
    loss = nf.ProxySoftmaxLoss(CLASSES, D, angle_margin=0.3)
    wrapped = as_pml(loss)
    agree(wrapped(x, labels), loss(x, labels), x, loss.proxies)
    assert list(wrapped.parameters()) == [loss.proxies]
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        wrapped(x, labels, (labels, labels, labels))


def test_wrappers_of_theirs_take_any_loss() -> None:
    x, labels = draw()
    loss = as_pml(nf.BatchContrastiveLoss(margin=0.8))
    memory = theirs.CrossBatchMemory(loss, D, memory_size=N)
    everyone = memory(x, labels)
    agree(
        everyone, nf.batch_contrastive_loss(x, labels, margin=0.8, reference=itself(x, labels)), x
    )
    y = x.detach() + 0.1
    items = torch.arange(N)
    agree(
        theirs.SelfSupervisedLoss(loss)(x, y),
        nf.batch_contrastive_loss(torch.cat([x, y]), items.repeat(2), margin=0.8),
        x,
    )
    agree(theirs.MultipleLosses([loss, loss])(x, labels), 2 * loss(x, labels), x)
    assert isinstance(DistributedLossWrapper(loss), DistributedLossWrapper)
    assert repr(loss).startswith("as_pml(")
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, labels), loss(x, labels))
    regular = as_pml(nf.SupConLoss())
    with pytest.raises(Exception, match="not supported"):
        theirs.CrossBatchMemory(as_pml(nf.ProxySoftmaxLoss(CLASSES, D)), D)
    assert regular(x, labels).ndim == 0


def itself(x: Tensor, labels: Tensor) -> nf.Reference:
    """The batch as a reference without a gradient, as a memory holds it."""
    return nf.Reference(x.detach(), labels, torch.arange(N))


@pytest.mark.parametrize(
    ("loss", "given", "match"),
    [
        (nf.TripletLoss(), {}, "TripletLoss takes aligned rows"),
        (nf.clip_loss, {}, "clip_loss takes two towers"),
        (nf.proxy_softmax_loss, {}, "proxies, which a module holds"),
        (torch.nn.CrossEntropyLoss(), {}, "CrossEntropyLoss takes what nearfar does not know"),
        (nf.SupConLoss(), {"temperature": 0.2}, "holds its hyperparameters"),
        (nf.SupConLoss, {}, r"you passed the class: make one, SupConLoss\("),
        (nf.sup_con_loss, {"temprature": 1.0}, r"sup_con_loss: got an unexpected .* 'temprature'"),
        (nf.batch_loss, {"distance": "cosine"}, r"batch_loss: missing a required .*'rule'"),
    ],
)
def test_losses_that_cannot_be_wrapped(loss: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        as_pml(loss, **given)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (nf.sup_con_loss, {"reduction": "none"}),
        (nf.batch_loss, {"rule": torch.relu, "distance": "cosine", "reduction": "none"}),
        (nf.SupConLoss(reduction="none"), {}),
        (nf.ProxySoftmaxLoss(CLASSES, D, reduction="none"), {}),
    ],
    ids=["function", "rule", "module", "proxies"],
)
def test_a_loss_that_is_not_one_number_is_refused(loss: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='reduction="none"'):
        as_pml(loss, **given)


def test_lists_and_references_that_a_loss_does_not_take() -> None:
    x, labels = draw()
    found = their_miners.PairMarginMiner(0.9, 1.5)(x, labels)
    with pytest.raises(ValueError, match="NPairLoss takes no pairs: leave indices_tuple out"):
        as_pml(nf.NPairLoss())(x, labels, found)
    with pytest.raises(ValueError, match="NPairLoss takes no reference: leave ref_emb out"):
        as_pml(nf.NPairLoss())(x, labels, ref_emb=x + 1, ref_labels=labels)


# What is not here.


@pytest.mark.parametrize("module", ["losses", "miners", "distances", "reducers"])
def test_every_name_of_theirs_is_here_or_says_what_comes_nearest(module: str) -> None:
    ours, their = (
        getattr(pml, module),
        __import__(f"pytorch_metric_learning.{module}", fromlist=["x"]),
    )
    names = {name for name, value in vars(their).items() if isinstance(value, type)}
    assert set(ours.__all__) <= names
    for name in names - set(ours.__all__):
        with pytest.raises(ImportError, match=rf"nearfar has no {module}\.{name}\. Nearest: \w+"):
            exec(f"from nearfar.adapters.pml.{module} import {name}")
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = ours.Nonsense


def test_the_parts_that_are_left_alone_are_theirs() -> None:
    import pytorch_metric_learning.samplers as samplers

    assert pml.samplers is samplers
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = pml.nonsense


class Mine(their_distances.LpDistance):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: losses.ContrastiveLoss(distance=Mine()), r"no counterpart of the distance Mine\("),
        (lambda: losses.ContrastiveLoss(distance=distances.LpDistance(power=3)), "LpDistance.p=2"),
        (lambda: losses.NTXentLoss(distance=distances.LpDistance()), "no similarity"),
        (lambda: losses.NCALoss(distance=distances.SNRDistance()), "SNRDistance.* no similarity"),
        (
            lambda: losses.TripletMarginLoss(
                distance=distances.DotProductSimilarity(normalize_embeddings=False)
            ),
            r"no distance of .*CosineSimilarity\(\)",
        ),
        (
            lambda: miners.PairMarginMiner(
                distance=distances.DotProductSimilarity(normalize_embeddings=False)
            ),
            "no distance",
        ),
        (
            lambda: losses.NormalizedSoftmaxLoss(3, 2, distance=distances.LpDistance(power=2)),
            "halve the temperature",
        ),
        (
            lambda: losses.ProxyAnchorLoss(3, 2, distance=distances.LpDistance()),
            "ProxyAnchorLoss: take",
        ),
        (
            lambda: losses.TripletMarginLoss(reducer=reducers.PerAnchorReducer()),
            "takes no triplets",
        ),
        (
            lambda: losses.NTXentLoss(reducer=reducers.DivisorReducer()),
            "NTXentLoss has no divisor",
        ),
        (
            lambda: losses.ContrastiveLoss(
                reducer=reducers.MultipleReducers({"pos_loss": reducers.DivisorReducer()})
            ),
            "ContrastiveLoss has no divisor",
        ),
    ],
)
def test_what_cannot_be_said_is_an_error_of_the_constructor(make: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make()


def test_a_lifted_loss_of_a_reference_is_refused() -> None:
    x, labels = draw()
    with pytest.raises(ValueError, match="take GeneralizedLiftedStructureLoss"):
        losses.LiftedStructureLoss()(x, labels, ref_emb=x + 1, ref_labels=labels)


def test_an_anchor_with_only_one_kind_has_no_lifted_loss() -> None:
    """Theirs takes the logarithm of an empty sum as 0."""
    x, labels = draw(4)[0], torch.tensor([0, 0, 1, 2])
    for module, lone in ((losses, False), (theirs, True)):
        reducer = reducers.DoNothingReducer()
        terms = module.GeneralizedLiftedStructureLoss(reducer=reducer)(x, labels)
        assert (terms["loss"]["losses"].flatten() > 0).tolist() == [True, True, lone, lone]


def test_a_pair_or_anchor_without_negatives_has_no_lifted_loss() -> None:
    x, labels = draw(4)[0], torch.tensor([0, 0, 1, 2])
    near, far = torch.tensor([0, 1]), torch.tensor([2, 3])
    found = near, near.flip(0), far, far.flip(0)
    for name in ("LiftedStructureLoss", "GeneralizedLiftedStructureLoss"):
        assert getattr(losses, name)()(x, labels, found) == 0
        assert getattr(theirs, name)()(x, labels, found) > 0


@pytest.mark.parametrize(
    ("name", "given", "dtype"),
    [
        ("SupConLoss", (), torch.float32),
        ("MultiSimilarityLoss", (), torch.float32),
        ("ContrastiveLoss", (), torch.bfloat16),
        ("SignalToNoiseRatioContrastiveLoss", (), torch.bfloat16),
        ("ProxyAnchorLoss", (CLASSES, D), torch.bfloat16),
    ],
)
def test_a_loss_is_float32_unless_their_reducer_adds_two_parts(
    name: str, given: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, labels = draw(dtype=torch.bfloat16)
    assert getattr(losses, name)(*given)(x, labels).dtype == dtype


def test_a_lone_pair_of_each_kind_counts() -> None:
    """Theirs returns 0 if no kind has more than one pair."""
    x, _ = draw(3)
    found = tuple(torch.tensor([i]) for i in (0, 1, 0, 2))
    mean = nf.batch_contrastive_loss(
        x, None, pairs=([[0, 1]], [[0, 2]]), squared=False, normalize=True
    )
    agree(losses.ContrastiveLoss(neg_margin=1.0)(x, None, found), mean, x)
    assert theirs.ContrastiveLoss()(x, None, found) == 0


def test_one_class_has_a_loss() -> None:
    """Theirs returns 0 without a dissimilar pair, though the anchors choose among the similar."""
    x, labels = draw()[0], torch.zeros(N, dtype=torch.long)
    agree(losses.SupConLoss()(x, labels), nf.sup_con_loss(x, labels, reduction="active"), x)
    assert theirs.SupConLoss()(x, labels) == 0


def test_cosine_margins_of_a_reference_are_between_its_rows_and_the_batch() -> None:
    """Theirs takes both ends of a pair from the batch."""
    (x, labels), (y, others) = draw(), draw(30, seed=1)
    cosines = their_distances.CosineSimilarity()(x, y)
    same = labels[:, None] == others
    near, far = (0.9 - cosines[same]).relu(), (cosines[~same] - 0.5).relu()
    expected = near[near > 0].mean() + far[far > 0].mean()
    loss = losses.ThresholdConsistentMarginLoss()
    agree(loss(x, labels, ref_emb=y, ref_labels=others), expected, x, y)


@pytest.mark.parametrize("mined", [False, True])
def test_means_of_anchors_with_a_longer_reference(mined: bool) -> None:
    """Theirs has room for as many columns as there are rows."""
    (x, labels), (y, others) = draw(), draw(30, seed=1)
    found = lmu.get_all_pairs_indices(labels, others) if mined else None
    loss = losses.ContrastiveLoss(0.1, 0.9, reducer=reducers.PerAnchorReducer())
    d, same = their_distances.LpDistance()(x, y), labels[:, None] == others
    expected = [
        (terms * kind).sum(1) / kind.sum(1).clamp(min=1)
        for terms, kind in (((d - 0.1).relu(), same), ((0.9 - d).relu(), ~same))
    ]
    expected_mean = expected[0].mean() + expected[1].mean()
    agree(loss(x, labels, found, y, others), expected_mean, x, y)


def test_small_temperatures_keep_their_gradient() -> None:
    """In theirs a softmax that underflows becomes the smallest number, and its gradient 0."""
    x, labels = draw(dtype=torch.float32)
    ours, their = (module.NTXentLoss(temperature=0.001)(x, labels) for module in (losses, theirs))
    exact = nf.nt_xent_loss(x.double(), labels, temperature=0.001)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=0)
    assert their < 0.9 * exact
