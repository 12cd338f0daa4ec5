"""Time, memory and CUDA graphs on a device. A CPU, which has its own clock, is for trying."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import torch
from measure import Timing, peak_growth
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]
Call = Callable[[], object]


class NotCapturedError(Exception):
    """A step cannot be captured in a CUDA graph; the message says why."""


def in_turns(
    calls: Mapping[str, Call], repeats: int, seconds: float, device: torch.device
) -> dict[str, Timing]:
    """Seconds per call: all take turns in every repeat, as in measure.py.

    A turn is as many calls as fill `seconds`, at least one, between two events of the device. Each
    call must have been made before.
    """
    counts = {name: _count(call, seconds, device) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_mean(call, counts[name], device))
    return {name: Timing(median(times), min(times)) for name, times in taken.items()}


def _count(call: Call, seconds: float, device: torch.device) -> int:
    return max(1, int(seconds / max(_mean(call, 1, device), 1e-6)))


def _mean(call: Call, count: int, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / count


def extra_bytes(call: Call, device: torch.device) -> int:
    """Bytes by which the memory in use grew at its peak during a call, its results included.

    The call must have been made before, so that what libraries keep for good is not counted.
    """
    if device.type == "cpu":
        return peak_growth(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def captured(step: Step, device: torch.device) -> Call:
    """The replay of a step, captured in a CUDA graph.

    Raises:
        NotCapturedError: the step cannot be captured.
    """
    if device.type == "cpu":
        raise NotCapturedError("a CPU has no graphs")
    try:
        _warmed_up(step)
        with _no_reads():
            step()
        graph = torch.cuda.CUDAGraph()
        with _same_stream(), torch.cuda.graph(graph):
            results = step()
    except RuntimeError as error:
        raise NotCapturedError(str(error).splitlines()[0]) from error

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results  # which the graph writes into, so they live as long as it does

    return replay


def _warmed_up(step: Step) -> None:
    """Run a step on a stream of its own, which CUDA asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def _no_reads() -> Iterator[None]:
    """Raise where the host waits for the device: during a capture, that would break torch."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _same_stream() -> Iterator[None]:
    """Return to the current stream, which a capture that fails does not."""
    before = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(before)


def product(side: int, device: torch.device) -> Call:
    """A product of square bfloat16 matrices, whose rate others are compared with."""
    a, b, out = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)
