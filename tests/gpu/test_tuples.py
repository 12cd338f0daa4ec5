"""Losses of triplets and quadruplets by kernels, in Triton's interpreter: as in plain torch."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import tuple_oracle as oracle
from torch import Tensor
from tuple_cases import BY_CLASS, LAYOUTS, Settings, agree, draw, gradients, quadruplets, triplets

from nearfar.engine import gpu

pytestmark = pytest.mark.usefixtures("kernels")

RANGES: list[Any] = ["mean", "none", "active", (-1.0, 1.2), (0.3, 1.2)]
DISTANCES = ("euclidean", "sqeuclidean", "cosine")
TRIPLETS: list[Settings] = [
    *({"distance": distance, "margin": 0.3} for distance in DISTANCES),
    {"smooth": True, "margin": 0.2},
]
QUADRUPLETS: list[Settings] = [
    {"margin": 0.3, "margin2": 0.6, "distance": distance} for distance in DISTANCES
]


@pytest.fixture(autouse=True)
def numpy_warnings() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of an overflow that is masked later."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether kernels ran each comparison."""
    seen: list[bool] = []
    usual = gpu.takes

    def watched(*arguments: Any) -> bool:
        seen.append(usual(*arguments))
        return seen[-1]

    monkeypatch.setattr(gpu, "takes", watched)
    return seen


def named(cases: list[Settings]) -> Any:
    return pytest.mark.parametrize("how", cases, ids=lambda how: "-".join(map(str, how.values())))


def compare(ours: Callable[..., Any], true: Callable[..., Any], *leaves: Tensor) -> None:
    """Values and gradients of float32 rows against the listed tuples in float64."""
    single = [leaf.float() for leaf in leaves]
    value, rows, counts = gradients(ours, *single)
    found = value.double(), [row.double() for row in rows], counts
    agree(found, gradients(true, *(leaf.double() for leaf in single)), 5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["hard", "easy_positive"])
@named(TRIPLETS)
def test_picked_triplets(how: Settings, select: str, layout: str, taken: list[bool]) -> None:
    x, labels = draw(21, layout, seed=1)
    for reduction in ("none", "active"):
        more = {**how, "select": select, "reduction": reduction}
        compare(
            partial(triplets, labels=labels, **more),
            partial(oracle.batch_triplet, labels=labels, **more),
            x,
        )
    assert all(taken)


@pytest.mark.parametrize("layout", BY_CLASS)
@named(QUADRUPLETS)
def test_picked_quadruplets(how: Settings, layout: str, taken: list[bool]) -> None:
    x, labels = draw(21, layout, seed=2)
    more = {**how, "select": "hard", "reduction": "none"}
    compare(
        partial(quadruplets, labels=labels, **more),
        partial(oracle.batch_quadruplet, labels=labels, **more),
        x,
    )
    assert all(taken)
