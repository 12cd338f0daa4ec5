"""Does the memory of every whole-batch loss grow with n, and not with n^2?

No peers: their (n, n) matrix alone takes 1 GB at n = 16,384. `speed.py` has them at smaller sizes.

    pip install nearfar
    python benchmarks/memory.py [--large] [--only clip] [--json memory.json]

Peak extra memory of one forward and backward pass in a fresh process, the median of --repeats of
them, d = 128. It may grow 2.3 times where n doubles, and NT-Xent may take 200 MB at 8,192. With
`--large` also the cases that have a limit at another size, once: CLIP may take 600 MB at
n = 65,536, d = 256.
"""

from collections.abc import Iterator
from typing import Any

import passive  # noqa: F401
import torch
from cases import CASES, WHOLE_BATCH
from measure import arguments, header, save, table, verdict
from peak import in_fresh_processes

D = 128
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


def _small(case: str, n: int, d: int, took: Any) -> bool:
    return bool(took["bytes"] <= CASES[case].at_most.get((n, d), float("inf")))


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--n", type=int, default=16384, help="the larger of the two sizes")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Memory as the batch grows")
    cases = [case.name for case in WHOLE_BATCH if asked.only in case.name]
    results = [growth(case, asked.n, asked.threads, asked.repeats) for case in cases]
    print(shown(results, asked.n))
    for case, n, d, most in limits(cases) if asked.large else ():
        large = single(case, n, d, asked.threads)
        results.append(large)
        extra, seconds = large["extra_bytes"][0], large["seconds"][0]
        print(f"\n{case}, n = {n}, d = {d}: {extra / 1e6:.0f} MB extra, {seconds:.1f} s; "
              f"at most {most / 1e6:.0f} MB: {verdict(large['reached'])}")  # fmt: skip
    save(asked.json, results)


if __name__ == "__main__":
    main()
