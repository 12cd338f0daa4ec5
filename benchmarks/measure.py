"""What the benchmarks share: timing in turns, peak memory, printed tables and the results file."""

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
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

PEERS = (
    "pytorch-metric-learning", "sentence-transformers", "open_clip_torch", "scikit-learn",
    "triton", "memeff", "siglip-kernel", "inf-cl",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over repeated calls."""

    median: float
    minimum: float


def run_tool(*words: str, threads: int) -> tuple[float, str]:
    """Run a command of `nearfar`, and print what it prints; the seconds it took, and that text."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "nearfar", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    print(done.stdout)
    return seconds, done.stdout


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: float = 0.25,
    *,
    warm: bool = False,
) -> dict[str, Timing]:
    """Time all calls in this process, one after the other in every repeat.

    If the machine slows down during the run, it then slows all of them alike. Each repeat calls a
    function again and again for `seconds`, at least once, and takes the mean, so that a single
    interruption has little effect.

    Args:
        calls: by the names that the result has.
        repeats: how many times each has its turn.
        seconds: how long a turn lasts.
        warm: whether each has been called before; if not, each is first called once.
    """
    if not warm:
        for call in calls.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_mean(call, seconds))
    return {name: Timing(median(times), min(times)) for name, times in taken.items()}


def contenders(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Time and memory of all calls: the memory is that of their first call, in their order."""
    extra = {name: peak_growth(call) for name, call in calls.items()}
    times = in_turns(calls, repeats, warm=True)
    return {
        name: {"median_s": t.median, "min_s": t.minimum, "extra_bytes": extra[name]}
        for name, t in times.items()
    }


def contenders_table(found: Mapping[str, Any]) -> str:
    """What `contenders` found, to be printed."""
    lines = [
        (name, f"{t['median_s']:.2f} s", f"{t['min_s']:.2f} s", f"{t['extra_bytes'] / 1e6:.0f}")
        for name, t in found.items()
    ]
    return table(("", "median", "min", "extra MB"), lines)


def _mean(call: Callable[[], object], seconds: float) -> float:
    start, done, spent = time.perf_counter(), 0, 0.0
    while not done or spent < seconds:
        call()
        done, spent = done + 1, time.perf_counter() - start
    return spent / done


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grew at its peak during the call.

    Use it once per process, after a warm-up on a tiny input: memory that the process has freed but
    kept is used again, and would not be counted.
    """
    if _forget_peak():
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    before = _highest_ever()
    call()
    return _highest_ever() - before


def _forget_peak() -> bool:
    """Reset Linux's high-water mark to the present size; False if that is not possible."""
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


_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "large": {"action": "store_true", "help": "add the larger sizes"},
    "only": {"default": "", "metavar": "TEXT", "help": "run only the cases whose name has TEXT"},
    "shrink": {
        "type": int,
        "default": 1,
        "metavar": "K",
        "help": "divide all sizes by K, to try the script",
    },
    "threads": {"type": int, "default": torch.get_num_threads(), "metavar": "N"},
}


def arguments(
    doc: str | None, *options: str, repeats: int | None = None
) -> argparse.ArgumentParser:
    """The options that a script shares with others; its docstring is the help text."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in options:
        parser.add_argument(f"--{name}", **_OPTIONS[name])
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results as JSON")
    return parser


@cache
def machine() -> dict[str, Any]:
    """The hardware and software of the figures, as they were when the script started."""
    return {
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "OpenMP's default"),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{peer: installed(peer) for peer in PEERS},
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the machine and the results; the file is complete or is not written at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")
    draft.replace(path)


def load(path: Path) -> tuple[Mapping[str, Any], list[Any]]:
    """The machine and the results that a script saved."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    return saved["machine"], saved["results"]


def header(script: str) -> None:
    """Print what is measured, and on which machine."""
    print(script)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column is aligned to the left, the others to the right."""
    widths = [max(len(row[k]) for row in (columns, *rows)) for k in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  " + "  ".join((cells[0].ljust(widths[0]), *others)).rstrip()

    rule = "  " + "  ".join("-" * w for w in widths)
    return "\n".join((line(columns), rule, *(line(row) for row in rows)))


def verdict(reached: bool) -> str:
    return "yes" if reached else "NO"


def _cpu() -> str:
    """The name of the processor; on x86 with its family and model, which the name may leave out."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    said = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in said:
        name += f" (family {said['cpu family']}, model {said['model']})"
    return name


def _commit() -> str | None:
    """The commit of this checkout, followed by a + if the files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.check_output(
            ["git", "-C", str(here), *words], text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
