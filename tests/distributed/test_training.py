"""Trainers that average gradients end where one process with the whole batch does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nearfar as nf
from nearfar.distributed import over

STEPS, ROWS = 5, 12
SIZES = {2: (5, 7), 4: (4, 2, 3, 3)}


class Model(nn.Module):
    """A network and a loss with parameters of its own, in one module as DDP wants it."""

    def __init__(self, loss: nn.Module, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.loss = loss
        if group is not None:
            loss.group = group

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self.loss, nf.CLIPLoss):
            return self.loss(self.network(x), self.network(x.flip(1)))
        return self.loss(self.network(x), labels)


def temperature() -> nn.Module:
    return nf.SupConLoss(temperature=nn.Parameter(torch.tensor([0.3], dtype=torch.float64)))


def proxies() -> nn.Module:
    chance = torch.Generator().manual_seed(1)
    return nf.ProxySoftmaxLoss(4, 4, scale=6.0, generator=chance, dtype=torch.float64)


def towers() -> nn.Module:
    return nf.CLIPLoss(scale=nn.Parameter(torch.tensor([5.0], dtype=torch.float64)))


def triplets() -> nn.Module:
    return nf.BatchTripletLoss(margin=0.3)


LOSSES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (temperature, proxies, towers, triplets)
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 6, generator=chance, dtype=torch.float64)
    return x, torch.randint(0, 4, (ROWS,), generator=chance)


def part(step: int) -> tuple[Tensor, Tensor]:
    sizes = SIZES[dist.get_world_size()]
    first = sum(sizes[: dist.get_rank()])
    own = slice(first, first + sizes[dist.get_rank()])
    x, labels = batch(step)
    return x[own], labels[own]


def train(model: nn.Module, data: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*data(step)).backward()
        optimizer.step()


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def by_ddp(name: str) -> list[Tensor]:
    model = Model(LOSSES[name](), "world")
    train(DistributedDataParallel(model), part)
    return parameters(model)


class Both(nn.Module):
    """A network that DDP wraps, and a loss that it does not."""

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    forward = Model.forward


def by_ddp_without_the_loss(name: str) -> list[Tensor]:
    model = Model(LOSSES[name](), "world")
    train(Both(DistributedDataParallel(model.network), model.loss), part)
    return parameters(model)


def by_summing_hook(name: str) -> list[Tensor]:
    """A trainer that sums the gradients, of all parameters."""
    model = Model(LOSSES[name](), over("world", replicas="summed"))

    def step(x: Tensor, labels: Tensor) -> Any:
        class Loss:
            def backward(self) -> None:
                model(x, labels).backward()
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)

        return Loss()

    wrapped = Both(model.network, model.loss)
    wrapped.forward = step
    train(wrapped, part)
    return parameters(model)


def by_fsdp(name: str) -> list[Tensor]:
    model = Model(LOSSES[name](), "world")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.network, mesh=mesh)
    train(fully_shard(model, mesh=mesh), part)
    return [p.full_tensor().clone() for p in model.parameters()]


def by_ddp_in_halves(name: str) -> list[Tensor]:
    """Losses of two processes each, gradients averaged over four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "loss"))
    model = Model(LOSSES[name](), mesh["loss"])
    train(DistributedDataParallel(model), part)
    return parameters(model)


def alone(name: str) -> list[Tensor]:
    model = Model(LOSSES[name]())
    train(model, batch)
    return parameters(model)


def in_halves(name: str) -> list[Tensor]:
    """The mean of the losses of each half of the batch."""
    model = Model(LOSSES[name]())
    wrapped = Both(model.network, model.loss)

    def mean(x: Tensor, labels: Tensor) -> Tensor:
        half = SIZES[4][0] + SIZES[4][1]
        return (model(x[:half], labels[:half]) + model(x[half:], labels[half:])) / 2

    wrapped.forward = mean
    train(wrapped, batch)
    return parameters(model)


WAYS = [
    (2, by_ddp, alone),
    *(
        pytest.param(*way, marks=pytest.mark.slow)
        for way in (
            (2, by_ddp_without_the_loss, alone),
            (2, by_summing_hook, alone),
            (2, by_fsdp, alone),
            (4, by_ddp_in_halves, in_halves),
        )
    ),
]


@pytest.mark.parametrize(("world", "way", "truth"), WAYS, ids=lambda v: getattr(v, "__name__", v))
def test_parameters_after_some_steps_are_those_of_one_process(
    world: int, way: Callable[[str], list[Tensor]], truth: Callable[[str], list[Tensor]]
) -> None:
    for name in LOSSES:
        start = parameters(Model(LOSSES[name]()))
        true = truth(name)
        assert not any(map(torch.equal, true[::2], start[::2]))  # every weight has moved
        for found in run(world, way, name):
            for ours, theirs in zip(found, true, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)
