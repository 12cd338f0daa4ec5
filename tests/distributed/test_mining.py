"""What several processes mine is what one finds that has the whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Failure, attempt, run
from split_cases import SIZES, parts
from torch import Tensor

import nearfar
from nearfar import Reference, mine
from nearfar.engine.budget import tile_shape

pytestmark = pytest.mark.slow  # on several processes

WORLDS = (2, 3)
Found = Tensor | mine.Found | mine.FoundPairs


def drawn() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=chance, dtype=torch.float64)
    x[7] = x[2]  # on another process than its equal
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 3])
    multi = torch.rand(12, 4, generator=chance) < 0.3
    exclude = torch.full((12, 2), -1)
    exclude[:, 0] = torch.arange(12).roll(1)
    exclude[5, 1] = 0
    y = torch.randn(6, 3, generator=chance, dtype=torch.float64)
    return {"x": x, "labels": labels, "multi": multi, "exclude": exclude, "y": y}


# Miner and settings; "multi", "reference" and "exclude" say which of the data it is given.
CASES: dict[str, tuple[Callable[..., Found], dict[str, Any]]] = {
    **{
        f"{miner.__name__}-{distance}": (miner, {"distance": distance})
        for miner in (
            mine.hard_negatives,
            mine.hard_positives,
            mine.semihard_triplets,
            mine.violating_triplets,
            mine.easy_hard_triplets,
            mine.multi_similarity_pairs,
            mine.violating_pairs,
            mine.hard_pairs,
        )
        for distance in ("euclidean", "cosine", "snr")
    },
    "angular": (mine.angular_triplets, {"angle": 30.0}),
    "semihard-multi": (mine.semihard_triplets, {"multi": True, "normalize": True}),
    "guards": (mine.hard_negatives, {"k": 3, "margin": 0.1, "exclude": True}),
    "unlabelled": (mine.hard_negatives, {"k": 20, "labels": None, "exclude": True}),
    "unlabelled-guards": (mine.hard_negatives, {"k": 9, "labels": None, "margin": 0.1}),
    "reference": (mine.hard_negatives, {"k": 2, "reference": True}),
    "unlabelled-reference": (mine.hard_negatives, {"labels": None, "reference": True}),
    "hard_pairs-reference": (mine.hard_pairs, {"reference": True, "share": 0.3}),
    "hard_pairs-none": (mine.hard_pairs, {"share": 0.0}),
    "hard_pairs-multi": (mine.hard_pairs, {"multi": True, "share": 0.07}),
    "uniform": (mine.uniform_pairs, {"bins": 4, "per_bin": 3, "seed": 1}),
    "uniform-reference": (mine.uniform_pairs, {"bins": 3, "seed": 1, "reference": True}),
}


def found(name: str, at: slice, **more: Any) -> Found:
    """What a miner finds for some rows of the batch."""
    miner, how = CASES[name]
    data, how = drawn(), dict(how)
    labels = how.pop("labels", data["multi"] if how.pop("multi", False) else data["labels"])
    if how.pop("reference", False):
        of_y = None if labels is None else torch.arange(6) % 3
        how["reference"] = Reference(data["y"], of_y)
    if how.pop("exclude", False):
        how["exclude"] = data["exclude"][at]
    if "seed" in how:
        seed = how.pop("seed") + (dist.get_rank() if more else 0)
        how["generator"] = torch.Generator().manual_seed(seed)
    with tile_shape(3, 3):
        return miner(data["x"][at], None if labels is None else labels[at], **how, **more)


def on_processes(names: list[str]) -> dict[str, Found]:
    own = parts(SIZES[dist.get_world_size()])[dist.get_rank()]
    return {name: found(name, own, group="world") for name in names}


def tensors(value: Found) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(vars(value).values())


def joined(of_each: list[Found], sizes: tuple[int, ...]) -> list[Tensor]:
    """What all found, its anchors counted in the whole batch."""
    firsts = [at.start for at in parts(sizes)]
    by_anchor = not isinstance(of_each[0], mine.Found)
    moved = []
    for one, first in zip(of_each, firsts, strict=True):
        some = [part.clone() for part in tensors(one)]
        for part in some:
            if by_anchor:
                part[:, 0] += first
        moved.append(some)
    return [torch.cat(part) for part in zip(*moved, strict=True)]


def in_order(entries: Tensor) -> Tensor:
    return torch.tensor(sorted(entries.tolist())).view(entries.shape)


@pytest.mark.parametrize("world", WORLDS)
def test_processes_find_what_one_does(world: int) -> None:
    of_each = run(world, on_processes, list(CASES))
    for name in CASES:
        ours = joined([one[name] for one in of_each], SIZES[world])
        true = tensors(found(name, slice(0, 12)))
        if name.startswith("uniform"):  # which are sorted by bin on each process
            ours, true = [*map(in_order, ours)], [*map(in_order, true)]
        for mined, expected in zip(ours, true, strict=True):
            torch.testing.assert_close(
                mined, expected, msg=lambda text, name=name: f"{name} {text}"
            )


# -- what is drawn --------------------------------------------------------------------------------


def draws(at: slice, seed: int, **more: Any) -> tuple[mine.Found, Tensor, Tensor]:
    data = drawn()
    x, labels = data["x"][at], data["labels"][at]

    def chance() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    weighted = mine.distance_weighted_negatives(x, labels, k=50, generator=chance(), **more)
    few = mine.violating_triplets(x, labels, margin=9.0, max=30, generator=chance(), **more)
    every = mine.violating_triplets(x, labels, margin=9.0, max=10**6, generator=chance(), **more)
    return weighted, few, every


def draws_on_processes() -> list[tuple[mine.Found, Tensor, Tensor]]:
    own = parts(SIZES[dist.get_world_size()])[dist.get_rank()]
    return [draws(own, seed, group="world") for seed in (0, 0, 1)]


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_drawn_is_drawn_from_all(world: int) -> None:
    labels, (_, _, whole) = drawn()["labels"], draws(slice(0, 12), 0)
    again, first, other = zip(*run(world, draws_on_processes), strict=True)
    negatives, _ = joined([one[0] for one in first], SIZES[world])
    assert (labels[negatives] != labels[:, None]).all()
    own = torch.cat([torch.full((n,), i) for i, n in enumerate(SIZES[world])])
    assert (own[negatives] != own[:, None]).any(1).all()  # each row some of another process
    few, every = (joined([one[i] for one in first], SIZES[world])[0] for i in (1, 2))
    assert len(few) == 30  # of all processes
    assert {*map(tuple, few.tolist())} < {*map(tuple, whole.tolist())}
    assert torch.equal(every, whole)
    for one, same, differs in zip(first, again, other, strict=True):
        for mined, repeated in zip(tensors(one[0]), tensors(same[0]), strict=True):
            assert torch.equal(mined, repeated)
        assert torch.equal(one[1], same[1])
        assert not len(one[0].indices) or not torch.equal(one[0].indices, differs[0].indices)


def same_draws() -> Tensor:
    """What is drawn for a row that all processes have, by generators of the same seed."""
    x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-1, 0.1], [0.6, -0.8]])
    others = Reference(x, torch.arange(5))
    chance = torch.Generator().manual_seed(3)
    how = {"k": 40, "generator": chance, "reference": others}
    return mine.distance_weighted_negatives(x[:1], [9], group="world", **how).indices


def test_processes_draw_independently() -> None:
    first, second = run(2, same_draws)
    assert not torch.equal(first, second)


# -- mining, then training ------------------------------------------------------------------------

CONTRASTIVE = partial(nearfar.batch_contrastive_loss, margin=3.0)
TRAINED: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], str]] = {
    "rows": (mine.hard_negatives, CONTRASTIVE, "rows"),
    "multi_similarity": (mine.multi_similarity_pairs, nearfar.multi_similarity_loss, "pairs"),
    "hard_pairs": (mine.hard_pairs, CONTRASTIVE, "pairs"),
    "semihard": (mine.semihard_triplets, nearfar.batch_triplet_loss, "triplets"),
}


def trained(name: str, at: slice, **more: Any) -> tuple[Tensor, Tensor]:
    """The loss of what is mined, and its gradient."""
    miner, loss, kind = TRAINED[name]
    data = drawn()
    x, labels = data["x"][at].clone().requires_grad_(), data["labels"][at]
    mined = miner(x, labels, **more)
    assert all(not part.requires_grad for part in tensors(mined))
    if kind == "rows":
        kind, mined = "pairs", (mine.hard_positives(x, labels, **more), mined)
    value = loss(x, labels, **{kind: mined}, **more)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def trained_on_processes() -> dict[str, tuple[Tensor, Tensor]]:
    own = parts(SIZES[dist.get_world_size()])[dist.get_rank()]
    return {name: trained(name, own, group="world") for name in TRAINED}


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_of_what_was_mined_is_that_of_one_process(world: int) -> None:
    of_each = run(world, trained_on_processes)
    for name in TRAINED:
        value, gradient = trained(name, slice(0, 12))
        assert value > 0
        for one in of_each:
            torch.testing.assert_close(one[name][0], value, rtol=1e-12, atol=1e-12)
        ours = torch.cat([one[name][1] for one in of_each]) / world
        torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)


# -- errors ---------------------------------------------------------------------------------------


def wrong(which: str) -> None:
    data, first = drawn(), dist.get_rank() == 0
    x, labels = data["x"][:4], data["labels"][:4]
    if which == "labels":
        mine.hard_pairs(x, labels[: 3 if first else 4], group="world")
    elif which == "exclude":
        exclude = torch.full((4, 1), 8 if first else 7)
        mine.hard_negatives(x, labels, exclude=exclude, group="world")
    elif which == "unlabelled":
        mine.hard_negatives(x, None if first else labels, group="world")
    elif which == "setting":
        mine.hard_pairs(x, labels, share=0.5 if first else 0.4, group="world")
    elif which == "miner":
        (mine.hard_pairs if first else mine.violating_pairs)(x, labels, group="world")
    else:
        others = Reference(data["y"][: 5 if first else 6], torch.arange(5 if first else 6))
        mine.hard_positives(x, labels, reference=others, group="world")


ERRORS = {
    "labels": "process 0: labels must have one entry per row",
    "exclude": "process 0: exclude must hold rows from 0 to 7",
    "unlabelled": "labels is None on process 0 and an array on process 1",
    "setting": "share is 0.5 on process 0 and 0.4 on process 1",
    "miner": "function is hard_pairs on process 0 and violating_pairs on process 1",
    "reference": "the reference or the proxies must be the same on all processes; got [5, 6] rows",
}


@pytest.mark.parametrize("which", ERRORS)
def test_an_error_of_one_is_an_error_of_all(which: str) -> None:
    for failure in attempt(2, wrong, which, timeout=20):
        assert isinstance(failure, Failure)
        assert failure.kind == "ValueError"
        assert ERRORS[which] in failure.message
