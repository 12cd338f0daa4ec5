"""`nearfar.distributed.check` passes a right step, and finds the classic mistakes."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import attempt, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nearfar as nf
from nearfar.distributed import Check, check, over

pytestmark = pytest.mark.slow  # on several processes

Batch = dict[str, Any]


def batch(n: int | None = None) -> Batch:
    """This process's part; None: of another size on each."""
    rank = dist.get_rank()
    chance = torch.Generator().manual_seed(rank)
    n = n or 8 + 4 * rank
    labels = torch.randint(0, 3, (n,), generator=chance)
    text = [str(int(label)) for label in labels]
    return {"x": torch.randn(n, 6, generator=chance), "labels": labels, "views": ([1.0], text)}


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *more, nn.Tanh(), nn.Linear(8, 4))


def ddp(*more: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(network(*more))


def sup_con(model: nn.Module, batch: Batch, **how: Any) -> Tensor:
    return nf.sup_con_loss(model(batch["x"]), batch["labels"], **{"group": "world", **how})


def alone(model: nn.Module, batch: Batch) -> Tensor:
    return sup_con(model, batch, group=None)


def averaged(parameters: Iterable[Tensor], by: float) -> Callable[[], None]:
    """What adds up gradients over processes and divides by a number."""

    def average() -> None:
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= by

    return average


def proxies(**how: Any) -> tuple[nf.ProxySoftmaxLoss, Callable[[nn.Module, Batch], Tensor]]:
    """A loss with proxies and a learned scale, beside the model."""
    torch.manual_seed(1)
    scale = nn.Parameter(torch.tensor(8.0))
    criterion = nf.ProxySoftmaxLoss(3, 4, **{"scale": scale, "group": "world", **how})
    return criterion, lambda model, batch: criterion(model(batch["x"]), batch["labels"])


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes without the gradient of others, as it is often written."""
    every = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(every, x.detach())
    every[dist.get_rank()] = x
    return torch.cat(every)


def gathers(model: nn.Module, batch: Batch) -> Tensor:
    return nf.sup_con_loss(gathered(model(batch["x"])), gathered(batch["labels"]))


def verdicts(found: Check) -> dict[str, str]:
    return {one.name: one.verdict for one in found.compared}


def steps() -> dict[str, Check]:
    """Right and wrong steps of two processes."""
    plain, summed = network(), over("world", replicas="summed")
    criterion, by_proxies = proxies()

    def forgets(model: nn.Module, batch: Batch) -> Tensor:
        given = model(batch["x"]), criterion.proxies.detach(), batch["labels"]
        return nf.proxy_softmax_loss(*given, scale=criterion.scale, group="world")

    found = {
        "right": check(ddp(), sup_con, batch()),
        "right proxies": check(ddp(), by_proxies, batch()),
        "right by hand": check(
            plain, sup_con, batch(), after_backward=averaged(plain.parameters(), 2)
        ),
        "right sum": check(
            plain,
            lambda model, batch: sup_con(model, batch, group=summed),
            batch(),
            after_backward=averaged(plain.parameters(), 1),
        ),
        "no group": check(ddp(), alone, batch()),
        "sum": check(plain, sup_con, batch(), after_backward=averaged(plain.parameters(), 1)),
        "averaged sum": check(
            ddp(), lambda model, batch: sup_con(model, batch, group=summed), batch()
        ),
        "proxies": check(
            ddp(), by_proxies, batch(), after_backward=averaged(criterion.parameters(), 1)
        ),
        "proxies alone": check(ddp(), proxies(group=None)[1], batch()),
        "not averaged": check(network(), sup_con, batch()),
        "gathered": check(ddp(), gathers, batch(8), one_process=alone),
        "missing": check(ddp(), forgets, batch(), one_process=by_proxies),
        "dropout": check(ddp(nn.Dropout(0.5)), sup_con, batch()),
        "norm": check(ddp(nn.BatchNorm1d(8)), sup_con, batch()),
    }
    plain[2].requires_grad_(False)
    found["frozen"] = check(
        plain, sup_con, batch(), after_backward=averaged(plain[0].parameters(), 2)
    )
    return found


FIX = {
    "no group": "Each process compares its own rows only: give the loss group=.",
    "sum": '"2 times too large": gradients that are added up over processes should be averaged',
    "averaged sum": '"2 times too small": gradients are averaged',
    "proxies": '"2 times too large": gradients that are added up over processes should be averaged',
    "proxies alone": "Each process compares its own rows only: give the loss group=.",
    "not averaged": '"right if averaged": nobody averages these gradients',
    "gathered": "or the loss gathers rows without the gradient of other processes",
    "missing": "",
    "norm": "1 normalizes by the rows of its process",
}


def test_right_steps_pass_and_each_mistake_is_named() -> None:
    first, second = run(2, steps)
    assert {k: str(v) for k, v in first.items()} == {k: str(v) for k, v in second.items()}
    for name, found in first.items():
        assert found.right == (name not in FIX), f"{name}\n{found}"
        assert FIX.get(name, "") in " ".join(found.notes)
    wrong = {name: verdicts(first[name]) for name in FIX}
    for name in ("sum", "averaged sum", "not averaged", "gathered"):  # the value alone is right
        assert wrong[name].pop("loss") == "right"
    assert set(wrong["sum"].values()) == {"2 times too large"}
    assert set(wrong["averaged sum"].values()) == {"2 times too small"}
    assert set(wrong["gathered"].values()) == {"2 times too small"}
    assert set(wrong["not averaged"].values()) == {"right if averaged"}
    assert set(wrong["no group"].values()) == {"different"}
    of_loss = {"loss parameter 1 (3, 4)", "loss parameter 2 ()"}
    assert {k for k, v in wrong["proxies"].items() if v == "2 times too large"} == of_loss
    assert {k for k, v in wrong["proxies"].items() if v == "right"} == {*wrong["sum"], "loss"}
    assert {k: v for k, v in wrong["missing"].items() if v != "right"} == {
        "loss parameter 1 (3, 4)": "missing"
    }
    assert first["dropout"].notes == ("Dropout was switched off: no two processes drop the same.",)
    shown = [re.sub(r"\de[+-]\d\d", "0e-00", line) for line in str(first["right"]).splitlines()]
    assert shown[2:4] == [
        "loss                0e-00  right",
        "0.weight            0e-00  right",
    ]


def one_of_three() -> Check:
    """Only the last process forgets to average its own gradients."""
    model = network()
    every = averaged(model.parameters(), 3)

    def average() -> None:
        before = [p.grad.clone() for p in model.parameters()]
        every()
        if dist.get_rank() == 2:
            for p, g in zip(model.parameters(), before, strict=True):
                p.grad = g

    return check(model, sup_con, batch(), after_backward=average)


def test_what_differs_between_processes_is_said() -> None:
    (found, *_) = run(3, one_of_three)
    assert verdicts(found)["0.weight"] == "right on processes 0 and 1 and different on process 2"


def state() -> None:
    """Gradients, buffers, random states and training flags stay as they were."""
    model = ddp(nn.BatchNorm1d(8), nn.Dropout(0.5))
    sup_con(model, batch()).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    check(model, lambda model, batch: sup_con(model, batch) + 0 * torch.rand(()), batch())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
    assert all(module.training for module in model.modules())


def whole_batches() -> None:
    """The batch of one process is all of theirs, in the order of the processes."""
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch)
        return sup_con(model, batch)

    check(network(), loss, batch())
    own, whole, again = seen
    assert own is again
    assert whole["x"].shape == (20, 6)
    numbers, text = whole["views"]
    assert (len(numbers), len(text)) == (2, 20)
    assert text == [str(int(label)) for label in whole["labels"]]
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"batch\['x'\] has .*\(6,\) on process 0 and .*\(5,\) on"):
        check(network(), sup_con, {"x": torch.zeros(2, 6 - rank)})
    with pytest.raises(ValueError, match=r"batch\[1\] is 0 on process 0 and 1 on process 1; pass"):
        check(network(), sup_con, (torch.zeros(2), rank))
    with pytest.raises(ValueError, match="loss must return one number with a gradient"):
        check(network(), lambda model, batch: model(batch["x"]), batch())
    with pytest.raises(ValueError, match="loss must return one number with a gradient"):
        check(network(), lambda model, batch: sup_con(model, batch).detach(), batch())


def sharded_network(*, children: bool) -> nn.Sequential:
    """By FSDP2: also its layers, or only the whole, which stays whole between its two passes."""
    model = network()
    for part in (model[0], model[2]) if children else ():
        fully_shard(part)
    return fully_shard(model)


def sharded(children: bool) -> None:
    """Gradients of shards are compared, and those of what is learned beside the model."""
    model = sharded_network(children=children)
    model(batch()["x"])  # no backward follows: parameters may be whole now
    found = check(model, sup_con, batch())
    assert found.right, str(found)
    assert len(found.compared) == 5
    assert set(verdicts(check(model, alone, batch())).values()) == {"different"}
    summed = over("world", replicas="summed")
    found = check(model, lambda model, batch: sup_con(model, batch, group=summed), batch())
    assert [one.verdict for one in found.compared] == ["right"] + ["2 times too small"] * 4
    criterion, by_proxies = proxies()
    found = check(model, by_proxies, batch())
    assert found.right, str(found)
    assert len(found.compared) == 7
    found = check(model, by_proxies, batch(), after_backward=averaged(criterion.parameters(), 1))
    wrong = {k for k, v in verdicts(found).items() if v == "2 times too large"}
    assert wrong == {"loss parameter 1 (3, 4)", "loss parameter 2 ()"}
    assert all(p.grad is None for p in (*model.parameters(), *criterion.parameters()))


def sharded_beside() -> None:
    """What got no gradient is not called right."""
    criterion, by_proxies = proxies(scale=8.0)
    fully_shard(criterion)
    found = check(ddp(), by_proxies, batch())
    assert "loss parameter 1 (3, 4)" not in verdicts(found)
    assert "no gradient was found: loss parameter 1 (3, 4). What is" in " ".join(found.notes)
    frozen = network().requires_grad_(False)
    assert not check(frozen, by_proxies, batch()).right


class Remembers(nn.Module):
    """A model that holds a bank."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.bank = network(), nf.MemoryBank(64, dim=4, group="world")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def remembering(inside: bool) -> None:
    """A bank is as it was, and each of the steps compared has met it so."""
    model = Remembers()
    bank = model.bank
    bank.add(torch.eye(4)[:2], [0, 1])
    trained = DistributedDataParallel(model if inside else model.network)
    before = {k: v.clone() for k, v in bank.state_dict().items()}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, labels = model(batch["x"]), batch["labels"]
        return nf.sup_con_loss(x, labels, reference=bank.add(x, labels), group="world")

    found = check(trained, loss, batch())
    assert found.right, str(found)
    assert bank.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in bank.state_dict().items())
    loss(trained, batch()).backward()
    assert len(bank) == 24


@pytest.mark.parametrize(
    ("steps", "arguments"),
    [
        (state, ()),
        (whole_batches, ()),
        (sharded, (False,)),
        (sharded, (True,)),
        (sharded_beside, ()),
        (remembering, (False,)),
        (remembering, (True,)),
    ],
)
def test_a_check_leaves_the_state_and_takes_any_batch_and_model(
    steps: Callable[..., None], arguments: tuple[bool, ...]
) -> None:
    run(2, steps, *arguments)


def fails_on_one(how: str) -> None:
    """The second process raises, returns no number, or has no labels."""
    last = dist.get_rank() == 1

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if last and how == "raises":
            raise KeyError("mine")
        return model(batch["x"]) if last and how == "rows" else sup_con(model, batch)

    given = batch() if how != "keys" or not last else {"x": batch()["x"]}
    check(ddp(), loss, given)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raises", "process 1: KeyError: 'mine'"),
        ("rows", "process 1: loss must return one number"),
        ("keys", "process 0: KeyError: 'labels'"),
    ],
)
def test_an_error_of_one_process_is_one_of_all(how: str, error: str) -> None:
    for failure in attempt(2, fails_on_one, how, timeout=20):
        assert error in failure.message


def test_a_check_needs_processes() -> None:
    with pytest.raises(RuntimeError, match="start them with torchrun"):
        check(network(), sup_con, {})
