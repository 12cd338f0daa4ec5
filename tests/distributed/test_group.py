"""The loss and the gradients of several processes are those of one that has the whole batch."""

from typing import Any

import pytest
import torch
from batch_cases import near
from processes import run
from split_cases import EVERY, SIZES, derived, drawn, joined, on_processes

REDUCTIONS: list[Any] = ["mean", "sum", "none", "active", (0.1, 0.5)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# In float32 a softmax this sharp is as far from itself on one process, by another order of sums.
SHARP = ("info_nce-0.001",)


def wrong(
    world: int,
    reductions: list[Any],
    dtype: torch.dtype = torch.float64,
    tile: tuple[int, int] | None = None,
    **how: Any,
) -> dict[tuple[str, Any], str]:
    """The cases in which processes find something else than one, and what."""
    names = [name for name in EVERY if dtype is torch.float64 or name not in SHARP]
    found = run(world, on_processes, names, reductions, dtype, how, tile, timeout=280)
    errors = {}
    for name in names:
        case = EVERY[name]
        data = drawn(case, dtype)
        for reduction in reductions:
            true = derived(case, data, reduction)
            of_each = [one[name, reduction] for one in found]
            try:
                ours = joined(case, data, of_each, reduction, how.get("replicas", "averaged"))
                floor = TOLERANCE[dtype]
                near((ours.value, ours.gradients), (true.value, true.gradients), floor, floor)
            except AssertionError as error:
                errors[name, reduction] = str(error)
    return errors


@pytest.mark.slow  # on several processes
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_every_loss_is_that_of_one_process(ring: bool) -> None:
    assert not wrong(3, ["mean"], tile=(3, 4), ring=ring)


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", SIZES)
def test_every_loss_and_reduction_is_that_of_one_process(
    world: int, dtype: torch.dtype, ring: bool
) -> None:
    assert not wrong(world, REDUCTIONS, dtype, ring=ring)


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_gradients_that_are_to_be_summed(ring: bool) -> None:
    assert not wrong(2, ["mean", "none"], replicas="summed", ring=ring)
