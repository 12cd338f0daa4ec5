"""The training loop."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from nearfar.app.data.content import Batch, read_ahead
from nearfar.app.errors import InputError
from nearfar.app.train.backward import backward
from nearfar.app.train.batches import distort
from nearfar.app.train.checkup import Checkup
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.logs import Logs
from nearfar.app.train.objectives import WithProxies
from nearfar.app.train.pace import PaceOfTraining
from nearfar.app.train.progress import progress
from nearfar.app.train.rates import parameter_groups
from nearfar.app.train.record import Course
from nearfar.app.train.recorder import Norms, Recorder
from nearfar.app.train.task import Task


def optimise(
    task: Task,
    embedder: Embedder,
    fabric: Fabric,
    metrics: TextIO,
    console: Console,
    checkup: Checkup,
    logs: Logs,
) -> tuple[dict[str, float], Course]:
    """Run the training loop, one line of metrics per step; return the last line and the course."""
    config, items = task.config, task.items
    network: Any = WithProxies(embedder.train(), task.n_proxies)
    optimizer: Any = torch.optim.AdamW(
        parameter_groups(network, config), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=config.steps + 1,
    )
    norms, recorder = Norms(network), Recorder(task, logs.snapshot)
    network, optimizer = fabric.setup(network, optimizer)
    generator = torch.Generator().manual_seed(config.seed)
    pace = PaceOfTraining(items.content)
    batches = read_ahead(items.content, task.batches(generator), task.items_in)

    def prepared(batch: Batch) -> Batch:
        x = embedder.prepare(batch)
        if config.augment and isinstance(x, Tensor) and x.ndim == 4:
            x = distort(x, generator)
        return fabric.to_device(x)

    line: dict[str, Any] = {}
    recorder.after(0, network)
    with progress(console, config.steps) as show:
        for step in range(1, config.steps + 1):
            rows, batch = next(batches)
            pace.start()
            loss_of = partial(
                task.step, task.loss, rows=rows, proxies=network.proxies, generator=generator
            )
            x, loss, active = backward(
                network, prepared(batch), loss_of, fabric, config.chunk_tokens
            )
            line = {"step": step, "loss": loss.item(), "active_share": active.item()}
            line |= {"lr": float(max(schedule.get_last_lr())), **norms.line()}
            _refuse_divergence(line)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            pace.stop(len(x))
            metrics.write(json.dumps(line) + "\n")
            logs.step(line)
            checkup.step(line, x, rows, network.proxies)
            recorder.after(step, network)
            show(loss=line["loss"], active=line["active_share"], items=len(rows))
    if words := pace.in_words():
        console.print(f"  {words}", highlight=False, soft_wrap=True)
    return line, recorder.course()


@contextmanager
def deterministic() -> Iterator[None]:
    """Use only deterministic algorithms; restores the previous settings on exit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for CUDA matrix products
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # no such memory is read here, and filling is slow
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filling


def fabric_on(accelerator: str) -> Fabric:
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Fabric(accelerator=accelerator, devices=1)
    except Exception as error:  # Lightning raises several kinds for a missing device
        raise InputError(f"--accelerator {accelerator}: {error}") from None


def _refuse_divergence(line: dict[str, float]) -> None:
    if line["loss"] - line["loss"] != 0:  # infinite or NaN
        raise InputError(
            f"the loss became {line['loss']} at step {line['step']}: training diverged. "
            "Lower --learning-rate, or check the scale of the input."
        )
