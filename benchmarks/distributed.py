"""Does a loss over several processes have the gradients of one process with the whole batch?

Processes on this machine (gloo, a thread each) train one step under DistributedDataParallel: an
encoder of one layer for each tower, and what the loss learns. The others are the textbook formula
on gathered rows, pytorch-metric-learning's DistributedLossWrapper, open_clip's losses and
sentence-transformers' gather.

    make bench-distributed
    python benchmarks/distributed.py [--only clip] [--processes 2 4] [--json distributed.json]

- Gradients, in float64: those after the averaging, beside those of the same contender in a group of
  one process. With the same number of rows on every process, and with unequal ones.
- Memory: the peak of what the operations of one step allocate on a process beyond its input, which
  is in float32; gradients count.
- Time: that of the slowest process, forward and backward, without the encoder. Contenders take
  turns, and the ratio is to the formula of the same run.
"""

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import passive  # noqa: F401
import torch
import torch.distributed as dist
from distributed_cases import CASES, TEXTBOOK, Case, Data
from measure import arguments, header, save, table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Processes and allocations are those of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from allocations import Allocations
from processes import Failure, attempt, run

D = 256
SMALL = 16, 8  # rows of a process and their length, where gradients are compared
RIGHT = 1e-9  # a relative error in float64
PATIENCE = 15.0  # seconds until a process is said to hang; a step takes a fraction of one
Found = tuple[float, dict[str, Tensor]]


# -- on each process ------------------------------------------------------------------------------


class Training(nn.Module):
    """An encoder for each tower, and a loss; its output is the value of the loss."""

    def __init__(self, loss: nn.Module, towers: int, d: int) -> None:
        super().__init__()
        layers = [nn.Linear(d, d, bias=False, dtype=torch.float64) for _ in range(towers)]
        self.encoders, self.loss = nn.ModuleList(layers), loss

    def forward(self, rows: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        encoded = (encode(x) for encode, x in zip(self.encoders, rows, strict=True))
        value: Tensor = self.loss(*encoded, *labels)
        return value


def drawn(case: Case, sizes: Sequence[int], d: int) -> Data:
    """The rows of this process, of a batch that is the same however it is split."""
    torch.manual_seed(0)
    first = sum(sizes[: dist.get_rank()])
    return case.draw(sum(sizes), d).part(slice(first, first + sizes[dist.get_rank()]))


def made(name: str, contender: str) -> None:
    """Import what a contender needs, which takes its time."""
    CASES[name].contenders[contender].build(CASES[name].draw(*SMALL).learned)


def trained(name: str, contender: str, sizes: Sequence[int]) -> Found:
    """The value of the loss, and the gradients after one step."""
    case, d = CASES[name], SMALL[1]
    data = drawn(case, sizes, d).to(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # others call what is deprecated
        loss = case.contenders[contender].build(data.learned)
        torch.manual_seed(1)  # the same encoders, whatever a loss has drawn
        model = Training(loss, len(data.rows), d)
        on_all = DistributedDataParallel(model)  # averages gradients as long as it lives
        value = on_all(data.rows, data.labels)
        value.backward()
    # A parameter that the loss leaves out has no gradient.
    named = {name: p.grad for name, p in model.named_parameters()}
    return value.item(), {k: g.clone() for k, g in named.items() if g is not None}


def measured(name: str, contenders: Sequence[str], n: int, d: int, repeats: int) -> dict[str, Any]:
    """Bytes and seconds of each contender, in turns."""
    case, world = CASES[name], dist.get_world_size()
    data = drawn(case, [n] * world, d)
    rows = [x.clone().requires_grad_() for x in data.rows]
    losses = {name: case.contenders[name].build(data.learned) for name in contenders}

    def step(loss: nn.Module) -> None:
        for leaf in (*rows, *loss.parameters()):
            leaf.grad = None
        loss(*rows, *data.labels).backward()

    took: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for contender, loss in losses.items():
            with Allocations(*rows, *data.labels, *loss.parameters()) as seen:
                step(loss)
            took[contender] = {"bytes": seen.peak, "seconds": []}
        for _ in range(repeats):
            for contender, loss in losses.items():
                dist.barrier()
                start = time.perf_counter()
                step(loss)
                dist.barrier()
                took[contender]["seconds"].append(time.perf_counter() - start)
    return took


# -- what they found ------------------------------------------------------------------------------

Said = Mapping[str, Any]


def beside(found: Tensor, true: Tensor) -> dict[str, Any]:
    """The relative error, and in words whether it is right or another multiple of the truth."""
    size = true.norm()
    factor = (found.flatten() @ true.flatten() / size**2).item()
    error, of_multiple = (((found - by * true).norm() / size).item() for by in (1.0, factor))
    if error <= RIGHT:
        text = "right"
    elif of_multiple > RIGHT:
        text = f"{error:.0%} off".replace("%", " %")
    else:
        text = f"x {factor:g}" if factor >= 1 else f"x 1/{1 / factor:g}"
    return {"text": text, "error": error}


def judged(found: Sequence[Found], alone: Found) -> dict[str, Said]:
    """What is said of the value on all processes, and of each kind of gradient."""
    said = {"value": of_values([value for value, _ in found], alone[0])}
    # Those of one process: the averaging leaves the same on all.
    answers = {name: beside(found[0][1][name], true) for name, true in alone[1].items()}
    encoders = {name for name in answers if name.startswith("encoders")}
    for kind, names in (("encoder", encoders), ("learned", answers.keys() - encoders)):
        if names:
            said[kind] = answers[max(names, key=lambda name: answers[name]["error"])]
    return said


def of_values(values: Sequence[float], true: float) -> Said:
    """Of the mean over processes, and whether each has a value of its own."""
    of_each, whole = (torch.tensor(v, dtype=torch.float64) for v in (values, [true]))
    said, of_mean = beside(of_each, whole.expand(len(values))), beside(of_each.mean(), whole[0])
    own = said["text"] != of_mean["text"]
    return {**said, "text": of_mean["text"], "own": own}


def outcome(name: str, contender: str, sizes: Sequence[int], alone: Found) -> dict[str, Any]:
    """What a contender makes of a batch that is split so."""
    found = attempt(len(sizes), trained, name, contender, sizes, timeout=PATIENCE)
    failures = [one for one in found if isinstance(one, Failure)]
    if not failures:
        return judged(found, alone)
    ends = {"timeout" if "timed out" in f.message.lower() else f.kind for f in failures}
    how = "crashes" if "died" in ends else "hangs" if "timeout" in ends else "raises"
    return {"failed": how, "why": f"{failures[0].kind}: {failures[0].message.strip()[:200]}"}


def gradients(name: str, contender: str, processes: Sequence[int]) -> list[dict[str, Any]]:
    """What it finds with as many rows on every process, and with more on some than on others."""
    found = []
    for world in processes:
        run(world, made, name, contender, timeout=300)
        n, row = SMALL[0], {"processes": world}
        unequal = [n - 3 + 6 * k // (world - 1) for k in range(world)]
        for kind, sizes in (("equal", [n] * world), ("unequal", unequal)):
            (alone,) = run(1, trained, name, contender, [sum(sizes)])
            row[kind] = outcome(name, contender, sizes, alone)
            row[f"alone_{kind}"] = alone[0]
        found.append(row)
    return found


def costs(name: str, contenders: Sequence[str], world: int, n: int, repeats: int) -> dict[str, Any]:
    """Memory of the process that takes most, and time; both by contender."""
    of_each = run(world, measured, name, contenders, n, D, repeats, timeout=1800)
    found = {}
    for contender in contenders:
        times = of_each[0][contender]["seconds"]  # a step lasts until all have ended
        found[contender] = {
            "median_s": median(times),
            "min_s": min(times),
            "extra_bytes": max(one[contender]["bytes"] for one in of_each),
        }
    return found


# -- the script -----------------------------------------------------------------------------------


def compared(name: str, asked: Any) -> dict[str, Any]:
    """Everything about one loss."""
    case = CASES[name]
    missing = {c.missing for c in case.contenders.values() if c.missing}
    for package in missing:
        print(f"\n(without {package}, which is not installed)")
    there = [name for name, c in case.contenders.items() if not c.missing]
    found = {one: gradients(name, one, asked.processes) for one in there}
    n = 2 * SMALL[0] if asked.quick else case.rows
    runs = []
    for world in asked.processes:
        able = [one for one, rows in found.items() if all("failed" not in r["equal"] for r in rows)]
        took = costs(name, able, world, n, asked.repeats)
        runs.append({"processes": world, "contenders": took})
    return {"case": name, "n": n, "d": D, "gradients": found, "costs": runs}


def in_words(answer: Mapping[str, Any]) -> str:
    if "failed" in answer:
        return f"{answer['failed']} ({answer['why']})"
    texts = (
        f"{kind}{' of its own, mean' * said.get('own', False)} {said['text']} ({said['error']:.0e})"
        for kind, said in answer.items()
    )
    return ", ".join(texts)


def shown(result: Mapping[str, Any]) -> str:
    lines = [f"\n{result['case']}"]
    for contender, rows in result["gradients"].items():
        for row in rows:
            lines += [
                f"  {contender}, {row['processes']} processes, {kind} rows: {in_words(row[kind])}"
                for kind in ("equal", "unequal")
            ]
    for row in result["costs"]:
        took = row["contenders"]
        cells = [
            (
                contender,
                f"{of['extra_bytes'] / 1e6:.1f}",
                f"{of['median_s'] * 1e3:.0f} ms",
                f"{of['median_s'] / took[TEXTBOOK]['median_s']:.2f}",
                f"{of['min_s'] / took[TEXTBOOK]['min_s']:.2f}",
            )
            for contender, of in took.items()
        ]
        lines.append(f"\n{row['processes']} processes of {result['n']} x {result['d']}")
        lines.append(table(("", "MB", "time", "of the formula's", "shortest"), cells))
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, "only", repeats=7)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], metavar="N")
    parser.add_argument("--quick", action="store_true", help="tiny batches, to try the script")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as on each of the processes
    header("Losses over several processes")
    results = []
    for name in (name for name in CASES if asked.only in name):
        results.append(compared(name, asked))
        print(shown(results[-1]), flush=True)
        save(asked.json, results)  # in case a later one runs out of memory


if __name__ == "__main__":
    main()
