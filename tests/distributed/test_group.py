"""The loss and the gradients of several processes are those of one that has the whole batch."""

from typing import Any

import pytest
import torch
from batch_cases import near
from processes import run
from split_cases import EVERY, SIZES, derived, drawn, joined, on_processes

REDUCTIONS: list[Any] = ["mean", "sum", "none", "active", (0.1, 0.5)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def wrong(
    names: list[str], world: int, dtype: torch.dtype, reductions: list[Any], **how: Any
) -> dict[tuple[str, Any], str]:
    """The cases in which processes find something else than one, and what."""
    how = {"ring": False, "replicas": "averaged", **how}
    found = run(world, on_processes, names, reductions, dtype, how["ring"], how["replicas"])
    errors = {}
    for name in names:
        case = EVERY[name]
        data = drawn(case, dtype)
        for reduction in reductions:
            true = derived(case, data, reduction)
            of_each = [one[name, reduction] for one in found]
            try:
                ours = joined(case, data, of_each, reduction, how["replicas"])
                floor = TOLERANCE[dtype]
                near((ours.value, ours.gradients), (true.value, true.gradients), floor, floor)
            except AssertionError as error:
                errors[name, reduction] = str(error)
    return errors


@pytest.mark.parametrize("world", SIZES)
def test_every_loss_is_that_of_one_process(world: int) -> None:
    assert not wrong(list(EVERY), world, torch.float64, REDUCTIONS)
