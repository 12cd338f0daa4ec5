"""Is nearfar slower than plain torch on a batch of 64?

The other contender is the textbook formula, whose matrix is small at this size.

    pip install nearfar
    python benchmarks/small_batches.py [--large] [--only triplet] [--json small_batches.json]

Forward and backward pass, n = 64, d = 128, in one process, in turns. No loss should take more than
1.5 times as long as the formula. `--large` adds n = 256 and n = 1,024.
"""

from typing import Any

import passive  # noqa: F401
import torch
from cases import CASES, Case, forward_backward
from measure import arguments, header, in_turns, save, table, verdict

D = 128
AT_MOST = 1.5


def measured(case: Case, n: int, repeats: int) -> dict[str, Any]:
    data = case.data(n, D)
    contenders = case.contenders()
    steps = {
        name: forward_backward(contenders[name](data), data) for name in ("nearfar", "textbook")
    }
    times = in_turns(steps, repeats, seconds=0.005)
    return {
        "case": case.name,
        "n": n,
        "d": D,
        "repeats": repeats,
        **{f"{name}_median_s": time.median for name, time in times.items()},
        **{f"{name}_min_s": time.minimum for name, time in times.items()},
        "ratio": times["nearfar"].median / times["textbook"].median,
        "ratio_of_min": times["nearfar"].minimum / times["textbook"].minimum,
    }


def shown(results: list[dict[str, Any]]) -> str:
    columns = (
        "", "nearfar µs", "min", "textbook µs", "min", "ratio", "of min", f"at most {AT_MOST}"
    )  # fmt: skip
    lines = [
        (
            result["case"],
            f"{result['nearfar_median_s'] * 1e6:.0f}",
            f"{result['nearfar_min_s'] * 1e6:.0f}",
            f"{result['textbook_median_s'] * 1e6:.0f}",
            f"{result['textbook_min_s'] * 1e6:.0f}",
            f"{result['ratio']:.2f}",
            f"{result['ratio_of_min']:.2f}",
            verdict(result["ratio"] <= AT_MOST),
        )
        for result in results
    ]
    return table(columns, lines)


def main() -> None:
    asked = arguments(__doc__, "large", "only", "threads", repeats=300).parse_args()
    torch.set_num_threads(asked.threads)
    header("Small batches")
    results = []
    for n in (64, 256, 1024) if asked.large else (64,):
        cases = [case for name, case in CASES.items() if asked.only in name]
        here = [measured(case, n, asked.repeats if n < 1024 else 10) for case in cases]
        print(f"\nn = {n}, d = {D}\n{shown(here)}", flush=True)
        results += here
    save(asked.json, results)


if __name__ == "__main__":
    main()
