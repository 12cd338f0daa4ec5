"""Peak extra memory and time of one forward and backward pass in a fresh process.

python benchmarks/peak.py clip_loss nearfar 8192 512

prints one line of JSON. The memory is what the pass adds to a process that has loaded its
libraries, made its input and trained on two tiny batches; the gradients of the input count. The
other scripts call this one.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TypedDict

import passive  # noqa: F401
import torch
from cases import CASES, forward_backward
from measure import peak_growth

PROCESSES = 3


class Peak(TypedDict):
    """What one pass took."""

    bytes: int
    seconds: float
    loss: float


def in_fresh_processes(
    case: str, contender: str, n: int, d: int, threads: int, processes: int = PROCESSES
) -> Peak:
    """The median of several processes, since how much freed memory stays is partly chance."""
    passes = [_in_fresh_process(case, contender, n, d, threads) for _ in range(processes)]
    return sorted(passes, key=lambda peak: peak["bytes"])[len(passes) // 2]


def _in_fresh_process(case: str, contender: str, n: int, d: int, threads: int) -> Peak:
    command = [sys.executable, __file__, case, contender, str(n), str(d), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise RuntimeError(
            f"{case} of {contender} at n={n}, d={d} ended with status {done.returncode}: "
            f"{done.stderr.strip()[-2000:] or 'killed, probably out of memory'}"
        )
    peak: Peak = json.loads(done.stdout.splitlines()[-1])
    return peak


def one_pass(case: str, contender: str, n: int, d: int) -> Peak:
    build = CASES[case].contenders()[contender]
    data = CASES[case].data(n, d)
    step = forward_backward(build(data), data)
    for few in (16, 24):  # after two sizes, torch.compile has code for all sizes
        tiny = CASES[case].data(few, d)
        forward_backward(build(tiny), tiny)()
    losses = []
    start = time.perf_counter()
    growth = peak_growth(lambda: losses.append(step()))
    return {"bytes": growth, "seconds": time.perf_counter() - start, "loss": losses[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("contender", help="nearfar, textbook, or another of the case's contenders")
    parser.add_argument("n", type=int)
    parser.add_argument("d", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(json.dumps(one_pass(asked.case, asked.contender, asked.n, asked.d)))


if __name__ == "__main__":
    main()
