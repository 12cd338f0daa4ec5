"""What a training step with `group` may do around the loss: everything it may without."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from split_cases import EVERY, SIZES, drawn, part
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nearfar as nf

pytestmark = pytest.mark.slow  # on several processes


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The part of this process."""
    rank = dist.get_rank()
    chance = torch.Generator().manual_seed(10 * seed + rank)
    labels = torch.randint(0, 3, (5 + rank,), generator=chance)
    return torch.randn(len(labels), 6, generator=chance, dtype=torch.float64), labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


class Sent(TorchDispatchMode):
    """Counts the collectives that are called."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.namespace == "c10d"
        return func(*args, **kwargs or {})


def collectives(reductions: list[Any]) -> dict[tuple[str, Any], tuple[int, int]]:
    """How many collectives the forward and the backward pass of every loss have."""
    world, found = dist.get_world_size(), {}
    for name, case in EVERY.items():
        mine = part(case, drawn(case, torch.float64), SIZES[world], dist.get_rank())
        for reduction in reductions:
            leaves = {k: a.detach().clone().requires_grad_() for k, a in mine.rows.items()}
            with Sent() as forward:
                value = case.run(mine.at(**leaves), reduction, group="world").sum()
            with Sent() as backward:
                value.backward()
            found[name, reduction] = forward.n, backward.n
    return found


def test_collectives_are_in_the_forward_pass_unless_each_row_has_a_loss() -> None:
    (found, _) = run(2, collectives, ["mean", (0.1, 0.5), "none"])
    for (name, reduction), (forward, backward) in found.items():
        assert forward, name
        assert (backward > 0) == (reduction == "none"), (name, reduction)


# -- steps ----------------------------------------------------------------------------------------


def sup_con(x: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return nf.sup_con_loss(x, labels, group="world", **more)


def towers(x: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return nf.siglip_loss(x, x.roll(1, 1), scale=5.0, bias=-1.0, group="world", **more)


def triplets(x: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return nf.batch_triplet_loss(x, labels, group="world", **more)


LOSSES: list[Callable[..., Tensor]] = [sup_con, towers, triplets]


def plain(model: nn.Module, loss: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The value and the gradients of a plain step."""
    x, labels = data()
    value = loss(model(x), labels)
    value.backward()
    return value.detach(), gradients(model)


def backwards() -> None:
    """A backward pass may be repeated, left out on one process, or be of a part of a step."""
    model, (x, labels), rank = network(), data(), dist.get_rank()
    for loss in LOSSES:
        value, true = plain(model, loss)
        again, bits = plain(model, loss)
        assert torch.equal(value, again)
        assert same(true, bits)

        kept = loss(model(x), labels)
        kept.backward(retain_graph=True)
        kept.backward()
        assert same(gradients(model), [g + g for g in true])

        skipped = loss(model(x), labels)  # its backward is skipped on one process
        if rank:
            skipped.backward()
            assert same(gradients(model), true)
        assert same(plain(model, loss)[1], true)

        first, second = loss(model(x), labels), loss(model(x), labels)
        for one in (first, second) if rank else (second, first):  # in any order
            one.backward()
        assert same(gradients(model), [g + g for g in true])


def checkpointed() -> None:
    """The encoder, the loss, or both may be computed again in the backward pass."""
    model, (x, labels) = network(), data()
    for loss in LOSSES:
        value, true = plain(model, loss)

        def step(x: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            return loss(model(x), labels)

        for reentrant in (True, False):
            how = {"use_reentrant": reentrant}
            given = x.clone().requires_grad_()
            for found in (
                loss(checkpoint(model, given, **how), labels),
                checkpoint(step, given, **how),
                checkpoint(loss, model(given), labels, **how),
            ):
                assert torch.equal(found, value)
                found.backward()
                assert same(gradients(model), true)


def without_gradient() -> None:
    """Under no_grad the value is the same; on one process alone, the others learn all the same."""
    model, (x, labels), rank = network(), data(), dist.get_rank()
    for loss in LOSSES:
        value, true = plain(model, loss)
        with torch.no_grad():
            assert torch.equal(loss(model(x), labels), value)
        with torch.inference_mode():
            assert torch.equal(loss(model(x), labels), value)
        with torch.set_grad_enabled(rank == 1):
            found = loss(model(x), labels)
        assert torch.equal(found, value)
        assert found.requires_grad == (rank == 1)
        if rank == 1:
            found.backward()
            assert same(gradients(model), true)
    scale = torch.tensor(1.0, requires_grad=True)
    with torch.set_grad_enabled(rank == 1), pytest.raises(ValueError, match="under no_grad"):
        nf.clip_loss(x, x, scale=scale.exp(), group="world")


def compiled() -> None:
    """A compiled step gives the same bits."""
    # The compiler looks at the gradient of what is no leaf.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    model, (x, labels) = network(), data()
    for loss in LOSSES:
        value, true = plain(model, loss)

        @torch.compile(backend="eager")
        def step(x: Tensor, labels: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            return loss(model(x), labels) * 1.0

        for _ in range(2):
            found = step(x, labels)
            found.backward()
            assert torch.equal(found, value)
            assert same(gradients(model), true)
    torch.compiler.reset()


@pytest.mark.parametrize("steps", [backwards, checkpointed, without_gradient, compiled])
def test_a_step_with_group_is_like_one_without(steps: Callable[[], None]) -> None:
    run(2, steps)
