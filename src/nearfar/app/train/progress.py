"""The progress of training: a bar in a terminal, a few lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10  # per run, if the output is not a terminal


class Show(Protocol):
    """Called after every step."""

    def __call__(self, *, loss: float, active: float, items: int) -> None: ...


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Show]:
    """Show loss, active share and items per second, at every step or about ten times per run."""
    with _bar(console, steps) if console.is_terminal else _lines(console, steps) as show:
        yield show


@contextmanager
def _bar(console: Console, steps: int) -> Iterator[Show]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed:>4}/{task.total}  {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, figures="")
        clock = _Clock()

        def show(*, loss: float, active: float, items: int) -> None:
            bar.update(task, advance=1, figures=_figures(loss, active, clock.rate(items)))

        yield show


@contextmanager
def _lines(console: Console, steps: int) -> Iterator[Show]:
    clock, every, step = _Clock(), -(-steps // LINES), 0

    def show(*, loss: float, active: float, items: int) -> None:
        nonlocal step
        step += 1
        rate = clock.rate(items)
        if step % every == 0 or step in (1, steps):
            console.print(
                f"  step {step:>{len(str(steps))}}/{steps}  {_figures(loss, active, rate)}"
            )

    yield show


@contextmanager
def reading(what: str, n: int) -> Iterator[Callable[[], None]]:
    """Show how many of n files are read, in a terminal; call what is returned after each."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} files"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=n)
        yield lambda: bar.advance(task)


class _Clock:
    """Measures items per second since it was created."""

    def __init__(self) -> None:
        self.start, self.items = time.perf_counter(), 0

    def rate(self, items: int) -> float:
        self.items += items
        return self.items / max(time.perf_counter() - self.start, 1e-9)


def _figures(loss: float, active: float, rate: float) -> str:
    return f"loss {loss:.4f}  active {active:4.0%}  {rate:,.0f} items/s"
