"""How long does the tool take to answer, beside the time it takes to import torch?

    pip install 'nearfar[app]'
    python benchmarks/startup.py [--json startup.json]

Each command runs in a process of its own, in turns.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import passive  # noqa: F401
from measure import arguments, header, in_turns, save, table

TOOL = ("-m", "nearfar")
COMMANDS = {
    "import torch": ("-c", "import torch"),
    "import nearfar": ("-c", "import nearfar"),
    "nearfar --help": (*TOOL, "--help"),
    "nearfar train --nonsense": (*TOOL, "train", "--nonsense"),  # a mistyped option
    "nearfar train --steps 0": (*TOOL, "train", "glyphs", "--steps", "0"),  # out of range
}


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], capture_output=True)


def measured(repeats: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], object]] = {
        name: partial(run, *words) for name, words in COMMANDS.items()
    }
    times = in_turns(calls, repeats, seconds=0)
    return [
        {"command": name, "median_s": took.median, "min_s": took.minimum}
        for name, took in times.items()
    ]


def shown(results: list[dict[str, Any]]) -> str:
    lines = [
        (result["command"], f"{result['median_s']:.2f} s", f"{result['min_s']:.2f} s")
        for result in results
    ]
    return "\n" + table(("", "median", "min"), lines)


def main() -> None:
    asked = arguments(__doc__, repeats=5).parse_args()
    header("Start-up")
    results = measured(asked.repeats)
    print(shown(results))
    save(asked.json, results)


if __name__ == "__main__":
    main()
