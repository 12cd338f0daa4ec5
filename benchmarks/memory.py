"""Does the memory of every whole-batch loss grow with n, and not with n^2?

Only nearfar is measured, since the (n, n) matrix of the others takes 1 GB at n = 16,384; `speed.py`
compares them at smaller sizes.

    pip install nearfar
    python benchmarks/memory.py [--large] [--only clip] [--json memory.json]

Peak extra memory of one forward and backward pass in a fresh process, the median of --repeats
processes, with d = 128. Where n doubles, it should grow at most 2.3 times, and NT-Xent should take
at most 200 MB at n = 8,192. `--large` adds the cases that have a limit at another size, once: CLIP
should take at most 600 MB at n = 65,536 and d = 256.
"""

from collections.abc import Iterator
from typing import Any

import passive  # noqa: F401
import torch
from cases import CASES, WHOLE_BATCH
from measure import arguments, header, save, table, verdict
from peak import in_fresh_processes

N, D = 16384, 128
GROWTH = 2.3


def growth(case: str, n: int, threads: int, processes: int) -> dict[str, Any]:
    half = in_fresh_processes(case, "nearfar", n // 2, D, threads, processes)
    whole = in_fresh_processes(case, "nearfar", n, D, threads, processes)
    return {
        "case": case,
        "d": D,
        "n": [n // 2, n],
        "extra_bytes": [half["bytes"], whole["bytes"]],
        "seconds": [half["seconds"], whole["seconds"]],
        "growth": whole["bytes"] / max(half["bytes"], 1),
        "reached": whole["bytes"] <= GROWTH * half["bytes"] and _small(case, n // 2, D, half),
    }


def single(case: str, n: int, d: int, threads: int) -> dict[str, Any]:
    took = in_fresh_processes(case, "nearfar", n, d, threads, processes=1)
    return {
        "case": case,
        "d": d,
        "n": [n],
        "extra_bytes": [took["bytes"]],
        "seconds": [took["seconds"]],
        "reached": _small(case, n, d, took),
    }


def limits(cases: list[str]) -> Iterator[tuple[str, int, int, float]]:
    """Cases, sizes and bytes: the limits at another length of row than `growth` measures."""
    for case in cases:
        for (n, d), most in CASES[case].at_most.items():
            if d != D:
                yield case, n, d, most


def shown(results: list[dict[str, Any]], n: int) -> str:
    columns = ("", f"MB at {n // 2}", f"MB at {n}", "growth", "s", f"at most {GROWTH}")
    lines = [
        (
            result["case"],
            *(f"{extra / 1e6:.1f}" for extra in result["extra_bytes"]),
            f"{result['growth']:.2f}",
            f"{result['seconds'][-1]:.1f}",
            verdict(result["reached"]),
        )
        for result in results
    ]
    return "\n" + table(columns, lines)


def shown_single(result: dict[str, Any], most: float) -> str:
    extra, seconds = result["extra_bytes"][0], result["seconds"][0]
    return (
        f"{result['case']}, n = {result['n'][0]}, d = {result['d']}: {extra / 1e6:.0f} MB extra, "
        f"{seconds:.1f} s; at most {most / 1e6:.0f} MB: {verdict(result['reached'])}"
    )


def _small(case: str, n: int, d: int, took: Any) -> bool:
    return bool(took["bytes"] <= CASES[case].at_most.get((n, d), float("inf")))


def main() -> None:
    parser = arguments(__doc__, "large", "only", "shrink", "threads", repeats=3)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Memory as the batch grows")
    # One setting for each loss: a margin changes what is computed in a tile, not the tiles.
    cases = [
        case.name
        for case in WHOLE_BATCH
        if asked.only in case.name and case.name == case.ours.__name__
    ]
    n = N // asked.shrink
    results = [growth(case, n, asked.threads, asked.repeats) for case in cases]
    print(shown(results, n))
    for case, rows, d, most in limits(cases) if asked.large else ():
        results.append(single(case, rows // asked.shrink, d, asked.threads))
        print(f"\n{shown_single(results[-1], most)}")
    save(asked.json, results)


if __name__ == "__main__":
    main()
