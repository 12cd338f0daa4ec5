"""What the benchmark scripts share: timing in turns, peak memory, tables, and the results file."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

PEERS = ("pytorch-metric-learning", "sentence-transformers")


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over repeated calls."""

    median: float
    minimum: float


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.25
) -> dict[str, Timing]:
    """Time all calls in this process, one after the other in every repeat.

    A machine that gets slower while it works then slows all of them alike. A repeat of a call is
    the mean of as many in a row as take `seconds`, one at least: a single interruption decides
    nothing then. Each is called once beforehand, to warm up.
    """
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_mean(call, seconds))
    return {name: Timing(median(times), min(times)) for name, times in taken.items()}


def _mean(call: Callable[[], object], seconds: float) -> float:
    start, done, spent = time.perf_counter(), 0, 0.0
    while not done or spent < seconds:
        call()
        done, spent = done + 1, time.perf_counter() - start
    return spent / done


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grew at its peak during the call.

    Call it once a process, after a warm-up on a tiny input: freed memory that the process has kept
    is used again and would not count.
    """
    if _forget_peak():
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    before = _highest_ever()
    call()
    return _highest_ever() - before


def _forget_peak() -> bool:
    """Set Linux's high-water mark back to the present size; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _highest_ever() -> int:
    import resource  # not on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def arguments(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options of every script; its docstring is the help text."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="add the larger sizes")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results as JSON")
    return parser


@cache
def machine() -> dict[str, Any]:
    """The hardware and the software that the figures belong to, as the script started."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "as OpenMP likes"),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{peer: installed(peer) for peer in PEERS},
        "commit": _commit(),
    }


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the machine and the results, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")
    draft.replace(path)


def header(script: str) -> None:
    """Say what is measured and on what."""
    print(script)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, all others to the right."""
    widths = [max(len(row[k]) for row in (columns, *rows)) for k in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  " + "  ".join((cells[0].ljust(widths[0]), *others)).rstrip()

    rule = "  " + "  ".join("-" * w for w in widths)
    return "\n".join((line(columns), rule, *(line(row) for row in rows)))


def verdict(reached: bool) -> str:
    return "yes" if reached else "NO"


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with a + where files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.check_output(
            ["git", "-C", str(here), *words], text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
