"""How well does the tool verify letters of writing systems that training never saw?

Trains on the built-in data set with the command of `make demo`, and reads the figures that the run
saved. The raw input, compared by its best distance, is measured beside them.

    pip install 'nearfar[app]'
    python benchmarks/glyphs.py [--json glyphs.json]
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import passive  # noqa: F401
import torch
from measure import arguments, header, save

STEPS = 450


def measured(steps: int, threads: int) -> dict[str, Any]:
    """The figures of one run, and the seconds that it took with its report."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "nearfar", "train", "glyphs", "--out", str(out)]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--steps", str(steps)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr or done.stdout)
        print(done.stdout)
        test = json.loads((out / "summary.json").read_text(encoding="utf-8"))["test"]
    return {"steps": steps, "seconds": seconds, "test": test}


def main() -> None:
    parser = arguments(__doc__, "threads")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Verification of unseen writing systems")
    result = measured(asked.steps, asked.threads)
    print(f"{result['seconds']:.0f} s")
    save(asked.json, [result])


if __name__ == "__main__":
    main()
