"""How well does the tool verify letters of writing systems that training never saw?

Trains on the built-in data set with the command of `make demo`, and reads the figures that the run
saved. The raw input, compared by its best distance, is measured beside them.

    pip install 'nearfar[app]'
    python benchmarks/glyphs.py [--json glyphs.json]
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import passive  # noqa: F401
import torch
from measure import arguments, header, run_tool, save

STEPS = 450


def measured(steps: int, threads: int) -> dict[str, Any]:
    """The figures of one run, and the seconds that it took with its report."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["train", "glyphs", "--out", str(out), "--steps", str(steps)]
        seconds, _ = run_tool(*command, threads=threads)
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
