"""A wrong argument on one process is the same error on all, and what comes after it is right."""

import gc
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import Failure, attempt, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import nearfar as nf
from nearfar.distributed import over
from nearfar.engine.processes import Processes

pytestmark = pytest.mark.slow  # on several processes

WORLD, BAD = 3, 1  # processes, and the one that is called wrongly
N, D = 4, 3
Call = Callable[..., Tensor]


def rows(seed: int = 0) -> Tensor:
    drawn = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


def labels() -> Tensor:
    return torch.arange(N) % 2


def batch(loss: Call = nf.sup_con_loss, **changed: Any) -> Tensor:
    given = {"x": rows(), "labels": labels(), "group": "world", **changed}
    given = {name: value for name, value in given.items() if value is not MISSING}
    return loss(given.pop("x"), **given)


def batch_in(precision: Any) -> Tensor:
    with nf.precision(precision):
        return batch(x=rows().float())


def towers(loss: Call = nf.clip_loss, **changed: Any) -> Tensor:
    given = {"x": rows(), "y": rows(1), "scale": 5.0, "group": "world", **changed}
    return loss(given.pop("x"), given.pop("y"), **given)


def signed(learned: tuple[bool, bool]) -> Tensor:
    scale, bias = (torch.tensor(2.0, requires_grad=wanted) for wanted in learned)
    return towers(nf.siglip_loss, scale=scale, bias=bias)


def proxies(loss: Call = nf.proxy_softmax_loss, **changed: Any) -> Tensor:
    given = {"x": rows(), "proxies": rows(2)[:2], "labels": labels(), "group": "world", **changed}
    return loss(given.pop("x"), given.pop("proxies"), given.pop("labels"), **given)


def listed(pairs: Any = ((0, 2), (1, 3)), **changed: Any) -> Tensor:
    found = torch.tensor(pairs), torch.tensor([[2, 3]])
    given = {"labels": None, "pairs": found, **changed}
    return batch(nf.batch_contrastive_loss, **given)


def squared(d: Tensor) -> Tensor:
    return d.square()


def hinge(d: Tensor) -> Tensor:
    return (1 - d).relu()


def own(rule: Any = None, **changed: Any) -> Tensor:
    given = {"x": rows(), "labels": labels(), "distance": "euclidean", "group": "world", **changed}
    return nf.batch_loss(rule or nf.PairRule(squared, hinge), **given)


def nearest(tile: nf.Tile) -> tuple[Tensor, Tensor]:
    return tile.closeness.amin(1), tile.positive.any(1)


def farthest(tile: nf.Tile) -> tuple[Tensor, Tensor]:
    return tile.closeness.amax(1), tile.positive.any(1)


MISSING = object()
# What is called by all, what one process calls in its place, and what all of them are told.
CASES: dict[str, tuple[Call, Call, str]] = {
    "shape": (batch, lambda: batch(x=rows()[0]), "process 1: x must"),
    "width": (
        batch,
        lambda: batch(x=rows()[:, :2]),
        "width 3 on processes 0 and 2 and 2 on process 1",
    ),
    "dtype": (
        batch,
        lambda: batch(x=rows().float()),
        "torch.float64 on processes 0 and 2 and torch.float32 on process 1",
    ),
    "no array": (batch, lambda: batch(x="rows"), "process 1: x must be a tensor or an array"),
    "float labels": (batch, lambda: batch(labels=labels() + 0.5), "process 1: labels must"),
    "NaN labels": (batch, lambda: batch(labels=labels() * torch.nan), "process 1: labels must"),
    "fewer labels": (batch, lambda: batch(labels=labels()[1:]), "process 1: labels must"),
    "kind of labels": (
        batch,
        lambda: batch(labels=torch.eye(N, 5).bool()),
        "class ids on processes 0 and 2 and multi-labels of 5 classes on process 1",
    ),
    "missing labels": (batch, lambda: batch(labels=MISSING), "process 1: sup_con_loss() missing"),
    "temperature": (
        batch,
        lambda: batch(temperature=0.2),
        "temperature is 0.1 on processes 0 and 2 and 0.2 on process 1",
    ),
    "temperature out of range": (
        batch,
        lambda: batch(temperature=-1.0),
        "process 1: temperature must be",
    ),
    "reduction": (batch, lambda: batch(reduction="maen"), "process 1: reduction must be"),
    "keyword": (batch, lambda: batch(temprature=0.1), "process 1: sup_con_loss() got an"),
    "another loss": (
        batch,
        lambda: batch(nf.nca_loss),
        "function is sup_con_loss on processes 0 and 2 and nca_loss on process 1",
    ),
    "weight": (batch, lambda: batch(weight=[-1.0] * N), "process 1: weight must be 0 or more"),
    "precision": (batch, lambda: batch(precision="half"), "process 1: precision must be"),
    "reference": (batch, lambda: batch(reference=rows()), "process 1: reference must hold rows"),
    "ring": (
        batch,
        lambda: batch(group=over(ring=True)),
        "group is over(ring=False, replicas='averaged', handshake='each') on processes 0 and 2",
    ),
    "replicas": (
        batch,
        lambda: batch(group=over(replicas="summed")),
        "replicas='summed', handshake='each') on process 1",
    ),
    "handshake": (
        batch,
        lambda: batch(group=over(handshake="first")),
        "handshake='first') on process 1",
    ),
    "precision of the products": (
        lambda: batch_in("float32"),
        lambda: batch_in("bfloat16"),
        "products are computed in float32 in plain torch on cpu on processes 0 and 2 and in bfloat",
    ),
    "margin": (
        lambda: batch(nf.batch_triplet_loss, margin=0.1),
        lambda: batch(nf.batch_triplet_loss, margin=0.2),
        "margin is 0.1 on processes 0 and 2 and 0.2 on process 1",
    ),
    "selection": (
        lambda: batch(nf.batch_triplet_loss),
        lambda: batch(nf.batch_triplet_loss, select="hardest"),
        "process 1: select must be",
    ),
    "towers of different shape": (towers, lambda: towers(y=rows()[1:]), "process 1: y must have"),
    "missing scale": (
        towers,
        lambda: nf.clip_loss(rows(), rows(1), group="world"),  # type: ignore[call-arg]
        "process 1: clip_loss() missing",
    ),
    "learned scale": (
        lambda: towers(scale=torch.tensor(5.0, requires_grad=True)),
        lambda: towers(scale=torch.tensor(5.0)),
        "beside the rows is scale on processes 0 and 2 and nothing on process 1",
    ),
    "learned bias": (
        lambda: signed(learned=(True, False)),
        lambda: signed(learned=(False, True)),
        "beside the rows is scale on processes 0 and 2 and bias on process 1",
    ),
    "dtype of the other tower": (
        towers,
        lambda: towers(y=rows(1).bfloat16()),
        "torch.float64 on processes 0 and 2 and torch.bfloat16 on process 1",
    ),
    "proxies": (
        proxies,
        lambda: proxies(proxies=rows(2)),
        "the reference or the proxies must be the same on all processes; got [2, 4, 2] rows",
    ),
    "class id": (proxies, lambda: proxies(labels=labels() + 5), "process 1: labels must"),
    "pairs": (listed, lambda: listed(((0, 2), (1, 99))), "process 1: pairs[0]"),
    "an item with itself": (
        listed,
        lambda: listed(((0, 2), (1, N + 1))),
        "process 1: pairs[0], the similar ones: entry 1 is [1, 5], whose other row is the anchor",
    ),
    "no pairs": (
        lambda: batch(nf.batch_contrastive_loss),
        listed,
        "labels is an array on processes 0 and 2 and None on process 1",
    ),
    "rule": (own, lambda: own(rule=3), "process 1: "),
    "another rule": (
        lambda: own(nearest),
        lambda: own(farthest),
        "rule is nearest on processes 0 and 2 and farthest on process 1",
    ),
    "another pair rule": (
        own,
        lambda: own(nf.PairRule(squared, squared)),
        "rule is PairRule(squared, hinge, ",
    ),
    "learned": (own, lambda: own(learned=3), "process 1: "),
    "bank": (
        lambda: batch(reference=nf.MemoryBank(4, D, dtype=torch.float64)),
        lambda: batch(reference=nf.Reference(rows().detach(), labels())),
        "reference is MemoryBank on processes 0 and 2 and Reference(an array, an array, None) on",
    ),
}


def refused(names: list[str]) -> dict[str, tuple[str, float]]:
    """The error of each case and how long it took; afterwards the right call is right."""
    found = {}
    for name in names:
        right, wrong, _ = CASES[name]
        start = time.monotonic()
        try:
            (wrong if dist.get_rank() == BAD else right)()
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}", time.monotonic() - start
        else:
            found[name] = "no error", 0.0
        right().backward()
    return found


def test_a_wrong_argument_of_one_process_is_the_same_error_on_all() -> None:
    found = run(WORLD, refused, list(CASES))
    for name, (_, _, said) in CASES.items():
        errors, seconds = zip(*(each[name] for each in found), strict=True)
        assert len(set(errors)) == 1, (name, errors)
        assert said in errors[0], (name, errors[0])
        assert max(seconds) < 5, name


# -- groups ---------------------------------------------------------------------------------------


def test_without_processes_the_error_says_how_to_start_them() -> None:
    with pytest.raises(
        RuntimeError, match=r"torchrun and call torch\.distributed\.init_process_gro"
    ):
        batch()


@pytest.mark.parametrize(
    "group", ["nccl", 0, torch.device("cpu"), over], ids=["name", "rank", "device", "over itself"]
)
def test_what_is_no_group_is_refused(group: Any) -> None:
    for call in (lambda: batch(group=group), lambda: over(group)):
        with pytest.raises(
            TypeError, match=r'group must be "world", a torch\.distributed\.Process'
        ):
            call()


def test_over_names_a_wrong_argument() -> None:
    for name, wrong, error in (
        ("ring", 1, TypeError),
        ("replicas", "average", ValueError),
        ("handshake", "once", ValueError),
    ):
        with pytest.raises(error, match=f"{name} must be"):
            over(**{name: wrong})
    with pytest.raises(TypeError, match="group must be"):
        over(over("world"))  # type: ignore[arg-type]


def groups_of_some() -> None:
    """Groups that this process is in, or not."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    if rank < 2:
        batch(group=pair).backward()
    else:
        with pytest.raises(ValueError, match="group must be one that this process belongs to"):
            batch(group=pair)
        with pytest.raises(ValueError, match="group must be one that this process belongs to"):
            over(pair)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"one dimension of a DeviceMesh, such as mesh\['a'\]"):
        batch(group=mesh)
    everywhere = batch(group=mesh["b"])
    assert torch.equal(everywhere, batch())
    alone = dist.new_group([rank], use_local_synchronization=True)
    for group in (alone, over(alone, replicas="summed"), mesh["a"]):
        for call in (batch, towers, proxies, own):
            x, y = rows(), rows()
            one, none = call(x=x, group=group), call(x=y, group=None)
            one.backward(), none.backward()
            assert torch.equal(one, none)
            assert torch.equal(x.grad, y.grad)
    assert not torch.equal(batch(group=None), everywhere)


def test_only_members_of_a_group_may_call_and_one_of_one_is_none() -> None:
    run(WORLD, groups_of_some)


def forgets_a_group() -> bool:
    """Whether a group that is destroyed is gone."""
    group = dist.new_group()
    batch(group=group)
    known = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return known() is None


def test_a_group_that_is_destroyed_is_not_kept() -> None:
    assert run(2, forgets_a_group) == [True, True]


# -- processes that end ---------------------------------------------------------------------------


def one_ends(how: str) -> float:
    """The seconds until those that remain learn that one has ended, or does not come."""
    limit = 2 if how == "late" else 60
    group = dist.new_group(timeout=timedelta(seconds=limit))
    batch(group=group)
    start = time.monotonic()
    if dist.get_rank() == BAD:
        if how == "killed":
            os._exit(1)
        time.sleep(4)
        return 0.0
    with pytest.raises(RuntimeError, match="lost another process of the group, which"):
        batch(group=group)
    return time.monotonic() - start


@pytest.mark.parametrize("how", ["killed", "late"])
def test_the_others_end_within_the_timeout_of_the_group(how: str) -> None:
    found = attempt(WORLD, one_ends, how)
    for rank in {*range(WORLD)} - {BAD}:
        assert isinstance(found[rank], float), found[rank]
        assert found[rank] < 3
    assert isinstance(found[BAD], Failure) == (how == "killed")


# -- one handshake for many steps -----------------------------------------------------------------


def first_only() -> None:
    """Later steps of the same shape tell nothing between hosts."""
    told = []
    tell, tell_any = Processes.tell, Processes.tell_any

    def counted(of: Call) -> Call:
        def call(self: Processes, *given: Any) -> Any:
            told.append(given)
            return of(self, *given)

        return call

    with (
        patch.object(Processes, "tell", counted(tell)),
        patch.object(Processes, "tell_any", counted(tell_any)),
    ):
        for call in (batch, towers, proxies, listed, own):
            group, every = over("world", handshake="first"), call()
            once = call(group=group)
            told.clear()
            assert torch.equal(call(group=group), once)
            assert torch.equal(every, once)
            assert not told
            call()
            assert told
        group = over("world", handshake="first")
        batch(group=group)
        with pytest.raises(
            ValueError, match=r"is for steps of fixed shape: rows is 3 now, and was 4"
        ):
            batch(x=rows()[1:], labels=labels()[1:], group=group)
        told.clear()
        batch(temperature=0.2, group=group)  # other settings have a handshake of their own
        assert told


def test_the_first_handshake_is_the_only_one_where_that_is_asked_for() -> None:
    run(2, first_only)


def same_settings() -> list[float]:
    """Calls that are written differently and mean the same."""
    rank = dist.get_rank()
    as_tuple = tuple(labels().tolist())
    calls = (
        lambda: batch(temperature=0.1) if rank else batch(),
        lambda: batch(temperature=np.float64(0.1)) if rank else batch(),
        lambda: batch(nf.batch_triplet_loss, margin=1) if rank else batch(nf.batch_triplet_loss),
        lambda: batch(nf.SupConLoss(group="world"), group=MISSING) if rank else batch(),
        lambda: batch(labels=as_tuple if rank else as_tuple[::-1]),
    )
    return [call().item() for call in calls]


def test_calls_that_mean_the_same_meet() -> None:
    first, *others = run(WORLD, same_settings)
    assert all(other == first for other in others)


def by_the_store(names: list[str]) -> tuple[float, dict[str, tuple[str, float]], int]:
    """A loss and errors where the group cannot send what is in a host's memory, as with NCCL."""
    usual = batch().item()
    as_nccl = {"_sends_from_cpu": False, "_reachable": lambda self, x: x}
    with patch.multiple(Processes, **as_nccl):
        for _ in range(3):
            assert batch().item() == usual
        store = dist.distributed_c10d._get_default_store()
        return usual, refused(names), store.num_keys()


def test_processes_may_tell_each_other_by_their_store() -> None:
    names = ["shape", "temperature", "NaN labels", "pairs"]
    found = run(WORLD, by_the_store, names)
    for _, errors, _ in found:
        assert all(CASES[name][2] in errors[name][0] for name in names)


def dies_in_the_loss(method: str, after: int) -> str:
    if dist.get_rank() == BAD:
        usual = getattr(Processes, method)

        def dying(processes: Processes, *arguments: Any, **more: Any) -> Any:
            nonlocal after
            after -= 1
            if after < 0:
                os._exit(1)
            return usual(processes, *arguments, **more)

        setattr(Processes, method, dying)
    try:
        batch(group=over(ring=method == "pass_on"))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_process_that_dies_inside_a_loss_is_named_as_what_it_is() -> None:
    # In the gather of labels, and of rows; and in the first or second step of a ring.
    for where in (("each", 1), ("each", 2), ("pass_on", 0), ("pass_on", 1)):
        found = attempt(WORLD, dies_in_the_loss, *where)
        assert found[BAD].kind == "died"
        for rank in (0, 2):
            assert "lost another process of the group" in str(found[rank]), found[rank]
