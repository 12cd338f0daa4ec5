"""The page on Lightning: its programs run, and give the same weights on two processes as on one."""

import os
import warnings
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from guides import CODE, ROOT, check_code
from processes import attempt, run
from torch import Tensor

pytest.importorskip("lightning")

PAGE = "docs/adapters/lightning.md"
SETTINGS = "max_epochs=5, devices=1, use_distributed_sampler=False, logger=False"
# What Lightning says of its own code, of its defaults, and of loaders without workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
]


def test_the_page_prints_what_it_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_code(PAGE, capsys)


def program() -> tuple[str, str]:
    """The two programs of the page."""
    first, second = (code for code, _ in CODE.findall((ROOT / PAGE).read_text(encoding="utf-8")))
    return first, second


def test_the_program_is_shorter_than_sixty_lines():
    assert len(program()[0].splitlines()) < 60


def weights(devices: int, **settings: Any) -> list[dict[str, Tensor]]:
    """What both programs learn in an epoch, in float64, on processes as torchrun starts them."""
    warnings.filterwarnings("ignore", module="lightning")  # as pytestmark says
    settings = {"max_epochs": 1, "accelerator": "cpu", "precision": "64-true", **settings}
    settings = {"use_distributed_sampler": False, "logger": False, "devices": devices, **settings}
    place = {}
    if devices > 1:
        settings |= {"strategy": "ddp"}
        rank = str(dist.get_rank())
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": str(devices)}
        place |= {"LOCAL_WORLD_SIZE": str(devices), "TORCHELASTIC_RUN_ID": "test"}
    names: dict[str, Any] = {"__name__": "__main__", "settings": settings}
    found = []
    with patch.dict(os.environ, place):
        for code in program():
            assert code.count(SETTINGS) == 1
            exec(compile(code.replace(SETTINGS, "**settings"), PAGE, "exec"), names)
            found.append(names["trainer"].lightning_module.state_dict())
    return found


@pytest.mark.slow
def test_two_processes_learn_the_weights_of_one():
    alone, cached = weights(1)
    torch.testing.assert_close(cached, alone)
    for found in run(2, weights, 2, timeout=120):
        for each in found:
            torch.testing.assert_close(each, alone)


@pytest.mark.slow
def test_batches_that_would_be_dealt_twice_are_refused():
    for failure in attempt(2, partial(weights, use_distributed_sampler=True), 2, timeout=120):
        assert failure.kind == "TypeError"
        assert "set `Trainer(use_distributed_sampler=False)`" in failure.message
