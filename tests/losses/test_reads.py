"""On an accelerator no loss waits for the device, so that a CUDA graph can capture a step.

See `waits.py` for what stands for one.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import batch_cases
import cases
import pytest
import torch
import tuple_cases
from batch_cases import CASES, Case, Data, gradients, near, over
from torch import Tensor
from unread import unread
from waits import WaitsError, accelerator, there

import nearfar as nf
from nearfar.engine.budget import tile_shape

REDUCTIONS: list[Any] = ["mean", "sum", "none", "active", (0.1, 0.5)]
# Several tiles; and a batch too large for one mask of all its pairs.
SIZES: list[tuple[int, tuple[int, int] | None]] = [(12, (6, 7)), (300, None)]

# Why a loss reads values all the same; docs/conventions.md lists these reasons.
CLOSE = "pairs so close that digits cancel are looked for"
TUPLES = "how many tuples there are, and which, depends on the labels or distances"
CLASSES = "how many classes have two rows depends on the labels"
LISTED = "a list is checked, and what is listed differs from step to step"


def backward(loss: Tensor) -> None:
    (loss.sum() if loss.ndim else loss).backward()


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(minlength=4),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "mask": lambda x: x[x > 0],
    "mask assigned": lambda x: x.index_put_((x > 0,), x),
    "number assigned": lambda x: x.__setitem__(x.long(), 0.0),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "from a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "from a number": lambda x: torch.as_tensor(1.0, device=x.device),
    "mixed": lambda x: x @ torch.ones(3),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_waits_is_noticed(read: Callable[[Tensor], object]) -> None:
    with accelerator(), pytest.raises(WaitsError):
        read(torch.zeros(3, device="meta"))


def test_what_waits_in_a_backward_is_noticed() -> None:
    y = there(torch.zeros(3), learned=True) * 2
    y.register_hook(lambda gradient: gradient.sum().item())
    with accelerator(), pytest.raises(WaitsError):
        backward(y)


def test_what_does_not_wait_passes() -> None:
    x = there(torch.zeros(3), learned=True)
    with accelerator():
        backward(torch.where(x > 0, x, 0.0) + x.new_full((), 3.0))
        torch.as_tensor(x, dtype=torch.float64)


def reason(case: Case) -> str | None:
    known = inspect.signature(case.function).parameters
    chosen = {name: case.hyper.get(name, of.default) for name, of in known.items()}
    by_distance = chosen.get("distance") in ("euclidean", "sqeuclidean", "cosine", "snr")
    by_distance = by_distance or case.function is nf.batch_cosine_loss
    return CLOSE if by_distance or chosen.get("similarity") == "sqeuclidean" else None


def normalized(case: Case) -> list[dict[str, bool]]:
    """With and without, where the loss lets one choose and the case does not."""
    fixed = {"normalize", "angle_margin", "cosine_margin"} & set(case.hyper)
    if fixed or "normalize" not in case.takes:
        return [{}]
    return [{"normalize": True}, {"normalize": False}]


def step(case: Case, reduction: Any) -> None:
    for n, tile in SIZES:
        data = case.draw(n, 6, dtype=torch.float32)
        for how in normalized(case) if tile else [{}]:
            rows = {name: there(x, learned=True) for name, x in data.rows.items()}
            others = {name: there(x) for name, x in data.others.items()}
            with accelerator(tile):
                backward(case.run(Data(rows, others), reduction, **how))


SOME = [
    pytest.param(how, marks=pytest.mark.slow) if how in ("sum", "active") else how
    for how in REDUCTIONS
]


@pytest.mark.parametrize("reduction", SOME, ids=str)
@over([case for case in CASES if reason(case) is None])
def test_batches(case: Case, reduction: Any) -> None:
    step(case, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_aligned_rows(case: cases.Case, reduction: Any) -> None:
    x, labels = case.draw(12, 4, dtype=torch.float32)
    x, labels = tuple(there(a, learned=True) for a in x), tuple(map(there, labels))
    with accelerator():
        backward(case.run(x, labels, reduction if "reduction" in case.takes else "none"))


def squared(d: Tensor) -> tuple[Tensor, Tensor]:
    return d.square(), 2 * d


def margin(tile: Any) -> tuple[Tensor, Tensor]:
    near = tile.closeness.where(tile.positive, 0).sum(1)
    return (tile.closeness.where(tile.negative, 0).sum(1) - near).relu(), tile.positive.any(1)


RULES: dict[str, tuple[Any, bool]] = {
    "pairs": (nf.PairRule(squared, torch.relu), False),
    "all pairs": (nf.PairRule(squared, torch.relu, balanced=False), False),
    "learned": (nf.PairRule(lambda d, t: (d * t).exp(), lambda d, t: (d + t).relu()), True),
    "anchors": (margin, False),
}


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize(("rule", "learned"), RULES.values(), ids=RULES)
def test_a_rule_of_your_own(rule: Any, learned: bool, reduction: Any) -> None:
    t = (torch.ones((), device="meta", requires_grad=True),) if learned else ()
    for n, tile in SIZES:
        x = torch.empty(n, 6, device="meta", requires_grad=True)
        labels = torch.empty(n, dtype=torch.long, device="meta")
        with accelerator(tile):
            how = {"similarity": "cosine", "learned": t, "reduction": reduction}
            backward(nf.batch_loss(rule, x, labels, **how))


def triplets(x: Tensor, labels: Tensor, **how: Any) -> Tensor:
    return nf.batch_triplet_loss(x, labels, distance="manhattan", **how)


def quadruplets(x: Tensor, labels: Tensor, **how: Any) -> Tensor:
    return nf.batch_quadruplet_loss(x, labels, distance="manhattan", **how)


def listed(k: int, n: int = 20) -> Tensor:
    return torch.empty(n, k, dtype=torch.long, device="meta")


OTHERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "triplets-all": (triplets, TUPLES),
    "triplets-smooth": (partial(triplets, smooth=True), TUPLES),
    "triplets-swap": (partial(triplets, swap=True), TUPLES),
    "triplets-hard": (partial(triplets, select="hard"), TUPLES),
    "triplets-easy": (partial(triplets, select="easy_positive"), TUPLES),
    "triplets-semihard": (partial(triplets, select="semihard"), TUPLES),
    "triplets-weighted": (partial(triplets, select="distance_weighted"), TUPLES),
    "triplets-drawn": (partial(triplets, n_per_anchor=2), TUPLES),
    "quadruplets-all": (quadruplets, TUPLES),
    "quadruplets-hard": (partial(quadruplets, select="hard"), TUPLES),
    "n_pair": (nf.n_pair_loss, CLASSES),
    "listed-pairs": (lambda x, y: nf.batch_cosine_loss(x, y, pairs=(listed(2), listed(2))), LISTED),
    "listed-triplets": (lambda x, y: triplets(x, y, triplets=listed(3)), LISTED),
    "negatives-sqeuclidean": (
        lambda x, y: nf.info_nce_loss(x, x, x, similarity="sqeuclidean"),
        CLOSE,
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{case.name}: {why}") for case in CASES if (why := reason(case))],
)
def test_a_batch_that_waits(case: Case) -> None:
    """Once a reason is gone, this fails, and the list of reasons can be shortened."""
    for reduction in REDUCTIONS:
        with pytest.raises(WaitsError):
            step(case, reduction)


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, id=f"{name}: {why}") for name, (loss, why) in OTHERS.items()]
)
def test_another_that_waits(loss: Callable[..., Tensor]) -> None:
    x = torch.empty(30, 6, device="meta", requires_grad=True)
    with accelerator(), pytest.raises(WaitsError):
        backward(loss(x, torch.empty(30, dtype=torch.long, device="meta")))


def test_the_conventions_list_what_waits() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/conventions.md").read_text().split())
    for why in (CLOSE, TUPLES, CLASSES, LISTED):
        assert f": {why}" in page


@pytest.fixture
def without_reads() -> Iterator[None]:
    with unread():
        yield


@over(CASES)
def test_numbers_are_the_same_without_a_read(case: Case, request: pytest.FixtureRequest) -> None:
    def run() -> Iterator[Any]:
        for n, tile in SIZES:
            data = case.draw(n, 6)
            with tile_shape(*tile) if tile else nullcontext():
                for how in ("mean", "none") if n > 256 else REDUCTIONS:
                    yield gradients(partial(case.run, reduction=how), data)

    true = list(run())
    request.getfixturevalue("without_reads")
    for found, expected in zip(run(), true, strict=True):
        near(found, expected, rtol=1e-9, floor=1e-12)


@pytest.mark.parametrize("layout", tuple_cases.LAYOUTS)
@pytest.mark.parametrize("select", ["all", "hard", "semihard"])
def test_triplets_are_the_same_without_a_read(
    select: str, layout: str, request: pytest.FixtureRequest
) -> None:
    x, labels = tuple_cases.draw(40, layout)
    loss = partial(tuple_cases.triplets, labels=labels, select=select)
    with tile_shape(7, 9):
        true = tuple_cases.gradients(loss, x)
        request.getfixturevalue("without_reads")
        tuple_cases.agree(tuple_cases.gradients(loss, x), true)


@over(batch_cases.PLAIN)
@pytest.mark.parametrize("bad", [inf, nan])
@pytest.mark.usefixtures("without_reads")
def test_without_a_read_a_bad_row_makes_the_loss_nan(case: Case, bad: float) -> None:
    data = case.draw(12)
    for name, x in data.rows.items():
        if x.ndim:
            changed = x.clone()
            changed[3, ..., 0] = bad
            assert case.run(data.at(**{name: changed}), "mean").isnan()


@pytest.mark.usefixtures("without_reads")
def test_rows_of_any_length_have_a_direction_without_a_read() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = x * torch.tensor([1e-18, 1e-3, 1, 1e3, 1e18, 1e30])[:, None]
    torch.testing.assert_close(nf.clip_loss(y, y, scale=5.0), nf.clip_loss(x, x, scale=5.0))
    y[2] = 0
    assert nf.clip_loss(y, y, scale=5.0).isfinite()
