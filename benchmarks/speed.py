"""How much faster and smaller than the peers? Forward and backward, float32, on the CPU.

Peers: the textbook formula in plain torch, as it is and by torch.compile (for CLIP also with a
product for each direction, as open_clip has it), pytorch-metric-learning, sentence-transformers.

    pip install nearfar pytorch-metric-learning sentence-transformers
    python benchmarks/speed.py [--large] [--only clip] [--json speed.json]

All contenders of a case run in this process, in turns, with equal hyperparameters on the same
input. Peak memory is that of one pass in a fresh process, the median of three. "of a product's
rate" is that of the case's operations as a share of that of a plain 4096 x 4096 x 512 product,
which has its turn too; "nothing but products" is how much faster than the formula ours would be at
that rate, did it do nothing else.
"""

from typing import Any

import passive  # noqa: F401
import torch
from cases import WHOLE_BATCH, Asked, Case, forward_backward
from measure import Timing, arguments, header, in_turns, save, table, verdict
from peak import in_fresh_processes

PRODUCT = (4096, 4096, 512)


def measured(case: Case, n: int, repeats: int, threads: int) -> dict[str, Any]:
    """Times, memory and losses of all contenders, and what is asked of ours."""
    d = case.asked.d
    data = case.data(n, d)
    steps = {
        name: forward_backward(build(data), data)
        for name, build in case.contenders().items()
        if _is_there(case, name)
    }
    losses = {name: step() for name, step in steps.items()}
    times = in_turns({**steps, "product": _product()}, repeats)
    product = times.pop("product")
    peaks = {name: in_fresh_processes(case.name, name, n, d, threads)["bytes"] for name in steps}
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
    columns = ("", "median", "min", "ours is", "extra MB", "ours takes", "loss")
    lines = [
        (
            name,
            f"{took['median_s'] * 1e3:.1f} ms",
            f"{took['min_s'] * 1e3:.1f} ms",
            "" if name == "nearfar" else f"{took['ours_faster']:.2f} x faster",
            f"{took['extra_bytes'] / 1e6:.1f}",
            "" if name == "nearfar" else f"1/{1 / max(took['ours_memory'], 1e-9):.1f}",
            f"{took['loss']:.6f}" + (" *" if took["differs"] else ""),
        )
        for name, took in result["contenders"].items()
    ]
    notes = [f"  * {took['differs']}" for took in result["contenders"].values() if took["differs"]]
    title = f"\n{result['case']}, n = {result['n']}, d = {result['d']}"
    return "\n".join((title, table(columns, lines), *notes))


def answers(question: Asked, result: dict[str, Any]) -> list[str]:
    """What was asked at this size, what came, and whether that is enough."""
    lines: list[str] = []
    if result["n"] != question.n:
        return lines
    beside = result["contenders"].get(question.beside)
    if beside and question.faster:
        reached = verdict(beside["ours_faster"] >= question.faster)
        lines.append(f"at least {question.faster:g} x faster than {question.beside}: {reached}")
    if beside and question.memory:
        reached = verdict(beside["ours_memory"] <= question.memory)
        lines.append(f"at most 1/{1 / question.memory:g} of its extra memory: {reached}")
    if result["of_product"]:
        line = f"{result['of_product']:.0%} of a product's rate"
        if question.of_product:
            reached = verdict(result["of_product"] >= question.of_product)
            line += f", at least {question.of_product:.0%}: {reached}"
        most = result["contenders"]["textbook"]["ours_faster"] / result["of_product"]
        lines += [line, f"nothing but products would be {most:.2f} x faster than the formula"]
    return lines


def _is_there(case: Case, contender: str) -> bool:
    missing = case.missing(contender)
    if missing:
        print(f"\n({contender} is left out: {missing})")
    return missing is None


def _product() -> Any:
    rows, columns, inner = PRODUCT
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return lambda: torch.mm(a, b, out=out)


def _of_product(case: Case, n: int, d: int, ours: Timing, product: Timing) -> float | None:
    if case.work is None:
        return None
    rows, columns, inner = PRODUCT
    rate = 2 * rows * columns * inner / product.median
    return case.work * n * n * d / ours.median / rate


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--shrink", type=int, default=1, metavar="K", help="n / K, for a quick try")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Speed and memory beside the peers")
    results = []
    for case in (case for case in WHOLE_BATCH if asked.only in case.name):
        sizes = {case.asked.n, case.asked.large} if asked.large else {case.asked.n}
        for n in sorted(sizes):
            result = measured(case, n // asked.shrink, asked.repeats, asked.threads)
            result["answers"] = answers(case.asked, result)
            results.append(result)
            print(shown(result), *(f"  {line}" for line in result["answers"]), sep="\n", flush=True)
            save(asked.json, results)  # what is there, should a large peer run out of memory


if __name__ == "__main__":
    main()
