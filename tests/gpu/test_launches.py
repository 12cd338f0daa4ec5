"""What launches the kernels: no read on the host, and kernels that compile for real cards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_cases import CASES, Case, over
from interpreted import kernels
from waits import accelerator, there

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that a program may have
# Bytes a thread may spill: distances keep some for the branch in which pairs are measured again.
SPILLED, SPILLED_FOR_DISTANCES = 128, 1536
DISTANCES = ("lifted_structure", "lifted_pair", "batch_contrastive", "batch_cosine", "hard")
AHEAD = Path(__file__).with_name("ahead.py")


@pytest.fixture
def launches(kernels: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched; none runs, since a tensor of the meta device has no values."""
    from nearfar.engine.gpu import comparison

    seen: list[str] = []
    monkeypatch.setattr(comparison, "launch", lambda kernel, *_: seen.append(kernel.__name__))
    return seen


def has_kernels(case: Case) -> bool:
    known = (None, "euclidean", "sqeuclidean", "cosine")
    listed = case.hard and len(case.hard) > 1  # negatives of each row
    return case.hyper.get("distance") in known and not case.sub_centers and not listed


@pytest.mark.parametrize("reduction", ["mean", "none", "active", (0.1, 0.5)], ids=str)
@over([case for case in CASES if has_kernels(case)])
def test_a_step_reads_nothing_on_the_host(case: Case, reduction: Any, launches: list[str]) -> None:
    """So that a CUDA graph can capture it."""
    data = case.draw(40, 20, dtype=torch.float32)
    rows = {name: there(x, learned=True) for name, x in data.rows.items()}
    others = {name: there(x) for name, x in data.others.items()}
    with accelerator():
        loss = case.run(type(data)(rows, others), reduction)
        loss.sum().backward()
    assert launches
    assert all(x.grad is not None for x in rows.values())


@pytest.mark.parametrize(
    ("capability", "d", "precision"),
    [
        (80, 128, "bfloat16"),
        (80, 512, "float32"),
        (86, 256, "float32"),
        (89, 128, "float16"),
        (90, 128, "bfloat16"),
        (90, 128, "float32"),
        (90, 512, "bfloat16"),
        (100, 128, "tf32"),
    ],
)
def test_they_compile(capability: int, d: int, precision: str) -> None:
    """For cards that are not here: into registers, and into the memory that a program has."""
    triton = pytest.importorskip("triton", reason="the kernels need Triton")
    if triton.__version__ < "3.7" and capability == 100:
        pytest.skip("kernels do not run there with this Triton")
    command = [sys.executable, AHEAD, str(capability), str(d), precision]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in found} >= {
        "collect",
        "collect_terms",
        "pull",
        "visit",
        "look",
    }
    for each in found:
        assert each["shared"] <= SHARED[capability] * 1024, each
        if each["triton"] < "3.7":  # which spills more
            continue
        most = SPILLED_FOR_DISTANCES if each["loss"] in DISTANCES else SPILLED
        assert each["spilled"] <= most, each
