"""Losses of triplets and quadruplets by kernels, in Triton's interpreter: as in plain torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import tuple_oracle as oracle
from interpreted import kernels, taken
from torch import Tensor
from tuple_cases import BY_CLASS, LAYOUTS, Settings, agree, draw, gradients, quadruplets, triplets
from waits import accelerator, there

from nearfar import batch_quadruplet_loss, batch_triplet_loss
from nearfar.engine.where import running_kernels

pytestmark = pytest.mark.usefixtures("kernels")

RANGES: list[Any] = ["mean", "none", "active", (-1.0, 1.2), (0.3, 1.2)]
few_slots = pytest.mark.parametrize("few", [False, True], ids=["all slots", "few slots"])
DISTANCES = ("euclidean", "sqeuclidean", "cosine")
TRIPLETS: list[Settings] = [
    *({"distance": distance, "margin": 0.3} for distance in DISTANCES),
    {"smooth": True, "margin": 0.2},
]
QUADRUPLETS: list[Settings] = [
    {"margin": 0.3, "margin2": 0.6, "distance": distance} for distance in DISTANCES
]


def named(cases: list[Settings]) -> Any:
    return pytest.mark.parametrize("how", cases, ids=lambda how: "-".join(map(str, how.values())))


def compare(ours: Callable[..., Any], true: Callable[..., Any], *leaves: Tensor) -> None:
    """Values and gradients of float32 rows against the listed tuples in float64."""
    single = [leaf.float() for leaf in leaves]
    value, rows, counts = gradients(ours, *single)
    found = value.double(), [row.double() for row in rows], counts
    agree(found, gradients(true, *(leaf.double() for leaf in single)), 5e-6)


def triplets_of(layout: str, n: int = 21, **how: Any) -> tuple[Any, Any, Tensor]:
    """The loss by kernels, the listed triplets, and the rows."""
    x, labels = draw(n, layout, seed=1)
    return (
        partial(triplets, labels=labels, **how),
        partial(oracle.batch_triplet, labels=labels, **how),
        x,
    )


def quadruplets_of(layout: str, n: int = 14, **how: Any) -> tuple[Any, Any, Tensor]:
    x, labels = draw(n, layout, seed=2)
    return (
        partial(quadruplets, labels=labels, **how),
        partial(oracle.batch_quadruplet, labels=labels, **how),
        x,
    )


@pytest.fixture
def slots(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positives in several rounds: as if no more than four of each anchor fitted the memory."""
    if few:
        from nearfar.engine.gpu import tuples  # loads Triton

        monkeypatch.setattr(tuples, "_slots", lambda request, n, m: 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["hard", "easy_positive"])
@named(TRIPLETS)
def test_picked_triplets(how: Settings, select: str, layout: str, taken: list[bool]) -> None:
    for reduction in ("none", "active"):
        compare(*triplets_of(layout, **how, select=select, reduction=reduction))
    assert all(taken)


@pytest.mark.parametrize("layout", BY_CLASS)
@named(QUADRUPLETS)
def test_picked_quadruplets(how: Settings, layout: str, taken: list[bool]) -> None:
    compare(*quadruplets_of(layout, **how, select="hard", reduction="none"))
    assert all(taken)


@few_slots
@pytest.mark.usefixtures("slots")
@pytest.mark.parametrize("layout", BY_CLASS)
@pytest.mark.parametrize("select", ["all", "semihard"])
@named(TRIPLETS)
def test_triplets(how: Settings, select: str, layout: str, few: bool, taken: list[bool]) -> None:
    compare(*triplets_of(layout, **how, select=select, reduction="none"))
    assert all(taken)


@pytest.mark.parametrize("layout", BY_CLASS)
@named(QUADRUPLETS)
def test_quadruplets(how: Settings, layout: str, taken: list[bool]) -> None:
    compare(*quadruplets_of(layout, **how, reduction="none"))
    assert all(taken)


def value_of(loss: Any, weight: Tensor, counts: int) -> Any:
    """A loss with weights, without its counts, which a range changes."""
    return lambda x: (loss(x, weight=weight.to(x.dtype))[0], *[()] * counts)


@pytest.mark.parametrize("reduction", RANGES, ids=str)
@pytest.mark.parametrize("smooth", [False, True], ids=["hinge", "smooth"])
def test_reductions_of_triplets(smooth: bool, reduction: Any) -> None:
    weight = torch.linspace(0, 2, 21)
    for select in ("all", "semihard"):
        ours, true, x = triplets_of("random", select=select, smooth=smooth, reduction=reduction)
        found, wanted = value_of(ours, weight, 2), value_of(true, weight, 2)
        compare(found, wanted, x)


@pytest.mark.parametrize("reduction", RANGES, ids=str)
def test_reductions_of_quadruplets(reduction: Any) -> None:
    weight = torch.linspace(0, 2, 14)
    ours, true, x = quadruplets_of("random", reduction=reduction)
    compare(value_of(ours, weight, 3), value_of(true, weight, 3), x)


@pytest.mark.parametrize("own", [False, True], ids=["set", "own"])
@pytest.mark.parametrize("select", ["hard", "semihard", "all", "quadruplets"])
def test_a_reference(select: str, own: bool, taken: list[bool]) -> None:
    x, labels = draw(9, "random", seed=6)
    reference, others = draw(20, "random", seed=7)
    told: Settings = {"reference_labels": others, "reduction": "none"}
    if own:
        same = (labels[:, None] == others).long()
        told["reference_own"] = torch.where(same.any(1), same.argmax(1), -1)
    if select == "quadruplets":
        ours, true = quadruplets, oracle.batch_quadruplet
    else:
        ours, true, told = triplets, oracle.batch_triplet, {**told, "select": select}
    compare(
        lambda x, r: ours(x, labels, reference=r, **told),
        lambda x, r: true(x, labels, reference=r, **told),
        x,
        reference,
    )
    assert all(taken)


@pytest.mark.parametrize("select", ["all", "hard", "semihard"])
def test_equal_distances(select: str) -> None:
    """On a grid all arithmetic is exact, so that equal distances are equal."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (24, 2), generator=chance).double()
    labels = torch.randint(0, 3, (24,), generator=chance)
    how = {"select": select, "distance": "sqeuclidean", "margin": 1.0, "labels": labels}
    compare(partial(triplets, **how), partial(oracle.batch_triplet, **how), x)
    if select == "all":
        rest = {"distance": "sqeuclidean", "margin": 1.0, "margin2": 2.0, "labels": labels[:16]}
        compare(partial(quadruplets, **rest), partial(oracle.batch_quadruplet, **rest), x[:16])


LOSSES = {
    **{
        select: partial(batch_triplet_loss, select=select) for select in ("all", "hard", "semihard")
    },
    "quadruplets": batch_quadruplet_loss,
}
of_losses = pytest.mark.parametrize("name", LOSSES)


def run(name: str, x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = LOSSES[name](x, torch.arange(len(x)) % 5, **how)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@of_losses
def test_near_rows_and_rows_of_any_length(name: str) -> None:
    base = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    near = base[:1] + 1e-4 * base
    for x, how in (
        (near, {"margin": 1e-5}),
        (near, {"margin": 1e-9, "distance": "cosine"}),
        (base * 1e15, {"margin": 0.0}),
        (base * 1e-15, {"margin": 0.0}),
    ):
        loss, gradient = run(name, x, **how)
        true_loss, true = run(name, x.double(), **how)
        torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            gradient.double(), true, rtol=0, atol=1e-3 * float(true.abs().max())
        )


@of_losses
def test_the_same_bits_each_time_and_nan_is_not_hidden(name: str) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    for one, other in zip(run(name, x), run(name, x), strict=True):
        assert torch.equal(one, other)
    x[3, 2] = torch.nan
    assert run(name, x)[0].isnan()


@of_losses
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision(name: str, precision: Any) -> None:
    """As in plain torch, which rounds the same rows."""
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    found = run(name, x, precision=precision)
    with running_kernels(everywhere=False):
        true = run(name, x, precision=precision)
    torch.testing.assert_close(found, true, rtol=1e-2, atol=2e-2 * float(true[1].abs().max()))


WITHOUT_READS: list[Settings] = [
    {"select": "all"},
    {"select": "all", "reduction": "active"},
    {"select": "all", "smooth": True, "reduction": (0.1, 0.5)},
    {"select": "hard", "distance": "cosine"},
    {"select": "semihard", "reduction": "none"},
]


@pytest.mark.parametrize("how", WITHOUT_READS, ids=lambda how: "-".join(map(str, how.values())))
def test_a_step_reads_nothing_on_the_host(how: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a CUDA graph can capture it."""
    from nearfar.engine.gpu import comparison

    launches: list[str] = []
    monkeypatch.setattr(comparison, "launch", lambda kernel, *_: launches.append(kernel.__name__))
    n = 300  # more pairs than have one mask
    x, labels = there(torch.zeros(n, 8), learned=True), there(torch.arange(n) // 4)
    with accelerator():
        batch_triplet_loss(x, labels, **how).sum().backward()
    assert launches
    assert x.grad is not None
