"""Tests on several processes: started once, since importing torch takes seconds.

    results = run(2, function, argument)   # function(argument) on processes 0 and 1 of a group of 2

Each run has a process group of its own (gloo), so one that fails leaves nothing behind. A process
that dies or hangs is replaced at the next run.
"""

import atexit
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Failure:
    """What a process gives in place of a result.

    Attributes:
        kind: the name of the exception, "died" or "timeout".
        message: its text.
        trace: the traceback.
    """

    kind: str
    message: str
    trace: str = ""


@dataclass(frozen=True)
class Worker:
    process: BaseProcess
    pipe: Connection


_START = 120  # seconds to start a process, on a busy machine
_workers: dict[int, Worker] = {}


def run(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list:
    """Call a function on each process of a group; the results, in the order of the ranks.

    Args:
        world: how many processes.
        function: of a module, since it is sent by name. It reads its rank from torch.distributed.
        arguments: the same for all; results and arguments are pickled.
        timeout: seconds until those that still run are killed.

    Raises:
        AssertionError: a process failed; the message has every traceback.
    """
    results = attempt(world, function, *arguments, timeout=timeout)
    failed = {rank: result for rank, result in enumerate(results) if isinstance(result, Failure)}
    assert not failed, "\n".join(
        f"process {rank} of {world}: {failure.kind}: {failure.message}\n{failure.trace}"
        for rank, failure in failed.items()
    )
    return results


def attempt(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list:
    """As `run`, but a process that fails has a `Failure` in place of its result."""
    _start(world)
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        for rank in range(world):
            task = (function, arguments, rank, world, store, timeout)
            _workers[rank].pipe.send_bytes(pickle.dumps(task))
        return _collect(world, time.monotonic() + timeout)


def _collect(world: int, end: float) -> list:
    results: list[Any] = [None] * world
    waiting = {_workers[rank].pipe: rank for rank in range(world)}
    while waiting:
        ready = wait(list(waiting), max(0.0, end - time.monotonic()))
        for pipe in ready or list(waiting):
            rank = waiting.pop(pipe)
            results[rank] = _received(pipe) if ready else Failure("timeout", "it still ran")
            if isinstance(results[rank], Failure) and results[rank].kind in ("died", "timeout"):
                _stop(_workers.pop(rank))
    return results


def _received(pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return Failure("died", "the process ended without a word")


def _start(world: int) -> None:
    """Start the processes that are not there, and wait until they have imported torch."""
    context = get_context("spawn")
    missing = [r for r in range(world) if r not in _workers or not _workers[r].process.is_alive()]
    for rank in missing:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _workers[rank] = Worker(process, ours)
    for rank in missing:
        assert _workers[rank].pipe.poll(_START), f"process {rank} did not start in {_START} s"
        _workers[rank].pipe.recv_bytes()


def _stop(worker: Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


@atexit.register
def _stop_all() -> None:
    while _workers:
        _stop(_workers.popitem()[1])


# -- in the processes that are started ------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no look-up of the host's name
    with suppress(EOFError, KeyboardInterrupt):
        pipe.send_bytes(b"ready")
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(message: bytes) -> bytes:
    """The pickled result of a task, or of the failure."""
    try:
        function, arguments, rank, world, path, timeout = pickle.loads(message)
        store = dist.FileStore(path, world)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        # Nobody runs, and perhaps dies, while another still connects.
        store.set(f"connected {rank}", "")
        store.wait([f"connected {other}" for other in range(world)], limit)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return pickle.dumps(function(*arguments))
        finally:
            dist.destroy_process_group()
    except Exception as error:
        return pickle.dumps(Failure(type(error).__name__, str(error), traceback.format_exc()))
