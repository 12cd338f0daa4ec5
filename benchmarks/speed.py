"""How fast is a whole-batch loss, and how much memory does it take, beside other implementations?

Forward and backward pass in float32 on the CPU. The others are the textbook formula in plain torch,
as it is and under torch.compile (for CLIP also with one product for each direction, as in
open_clip), pytorch-metric-learning and sentence-transformers.

    pip install nearfar pytorch-metric-learning sentence-transformers
    python benchmarks/speed.py [--large] [--only clip] [--json speed.json]

All contenders of a case run in one process, in turns, on the same input with the same
hyperparameters. Memory is the extra peak of one pass in a fresh process: of nearfar the median of
three processes, of the others one, since their matrices hide what varies.

The "rate of torch.mm" compares the floating-point operations per second of a case's matrix products
with those of a plain product of 4096 x 512 and 512 x 4096, which takes its turn in the same run.
"""

from typing import Any

import passive  # noqa: F401
import torch
from cases import WHOLE_BATCH, Asked, Case, forward_backward
from measure import Timing, arguments, header, in_turns, save, table, verdict
from peak import PROCESSES, in_fresh_processes

PRODUCT = (4096, 4096, 512)


def measured(case: Case, n: int, repeats: int, threads: int) -> dict[str, Any]:
    """Times, memory and losses of all contenders."""
    d = case.asked.d
    data = case.data(n, d)
    steps = {
        name: forward_backward(build(data), data)
        for name, build in case.contenders().items()
        if _is_there(case, name)
    }
    losses = {name: step() for name, step in steps.items()}
    times = in_turns({**steps, "product": _product()}, repeats, warm=True)
    product = times.pop("product")
    peaks = {
        name: in_fresh_processes(
            case.name, name, n, d, threads, processes=PROCESSES if name == "nearfar" else 1
        )["bytes"]
        for name in steps
    }
    contenders = {
        name: {
            "median_s": times[name].median,
            "min_s": times[name].minimum,
            "extra_bytes": peaks[name],
            "loss": losses[name],
            "ours_faster": times[name].median / times["nearfar"].median,
            "ours_memory": peaks["nearfar"] / max(peaks[name], 1),
            "differs": case.peers[name].differs if name in case.peers else "",
        }
        for name in steps
    }
    return {
        "case": case.name, "n": n, "d": d, "repeats": repeats, "contenders": contenders,
        "of_product": _of_product(case, n, d, times["nearfar"], product),
    }  # fmt: skip


def shown(result: dict[str, Any]) -> str:
    columns = ("", "median", "min", "nearfar is", "extra MB", "nearfar takes", "loss")
    lines = [
        (
            name,
            f"{took['median_s'] * 1e3:.1f} ms",
            f"{took['min_s'] * 1e3:.1f} ms",
            "" if name == "nearfar" else f"{took['ours_faster']:.2f} x as fast",
            f"{took['extra_bytes'] / 1e6:.1f}",
            "" if name == "nearfar" else f"1/{1 / max(took['ours_memory'], 1e-9):.1f}",
            f"{took['loss']:.6f}" + (" *" if took["differs"] else ""),
        )
        for name, took in result["contenders"].items()
    ]
    notes = [
        f"  * {name} {took['differs']}"
        for name, took in result["contenders"].items()
        if took["differs"]
    ]
    title = f"\n{result['case']}, n = {result['n']}, d = {result['d']}"
    return "\n".join((title, table(columns, lines), *notes))


def answers(asked: Asked, result: dict[str, Any]) -> list[str]:
    """What should be reached at this size, and whether it was."""
    lines: list[str] = []
    if result["n"] != asked.n:
        return lines
    beside = result["contenders"].get(asked.beside)
    if beside and asked.faster:
        reached = verdict(beside["ours_faster"] >= asked.faster)
        lines.append(f"at least {asked.faster:g} x as fast as {asked.beside}: {reached}")
    if beside and asked.memory:
        reached = verdict(beside["ours_memory"] <= asked.memory)
        lines.append(f"at most 1/{1 / asked.memory:g} of its extra memory: {reached}")
    if result["of_product"]:
        line = f"{result['of_product']:.0%} of the rate of torch.mm"
        if asked.of_product:
            reached = verdict(result["of_product"] >= asked.of_product)
            line += f", at least {asked.of_product:.0%}: {reached}"
        most = result["contenders"]["textbook"]["ours_faster"] / result["of_product"]
        lines += [line, f"its products alone, at that rate: {most:.2f} x as fast as the formula"]
    return lines


def _is_there(case: Case, contender: str) -> bool:
    missing = case.missing(contender)
    if missing:
        print(f"\n(without {contender}: it needs {missing})")
    return missing is None


def _product() -> Any:
    rows, columns, inner = PRODUCT
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    torch.mm(a, b, out=out)  # to warm up
    return lambda: torch.mm(a, b, out=out)


def _of_product(case: Case, n: int, d: int, ours: Timing, product: Timing) -> float | None:
    if case.work is None:
        return None
    rows, columns, inner = PRODUCT
    rate = 2 * rows * columns * inner / product.median
    return case.work * n * n * d / ours.median / rate


def main() -> None:
    parser = arguments(__doc__, "large", "only", "shrink", "threads", repeats=5)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Speed and memory of whole-batch losses")
    results = []
    for case in (case for case in WHOLE_BATCH if asked.only in case.name):
        sizes = {case.asked.n, case.asked.large} if asked.large else {case.asked.n}
        for n in sorted(sizes):
            result = measured(case, n // asked.shrink, asked.repeats, asked.threads)
            result["answers"] = answers(case.asked, result)
            results.append(result)
            print(shown(result), *(f"  {line}" for line in result["answers"]), sep="\n", flush=True)
            save(asked.json, results)  # in case a later contender runs out of memory


if __name__ == "__main__":
    main()
