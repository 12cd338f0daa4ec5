"""How fast are losses over all, or the hardest, triplets and quadruplets, and how do they grow?

The other contender is pytorch-metric-learning, which lists the triplets; it has no quadruplets over
a batch.

    pip install nearfar pytorch-metric-learning
    python benchmarks/tuples.py [--large] [--only semihard] [--json tuples.json]

Forward and backward pass in float32, d = 128, 8 rows per class. Contenders are timed in one
process, in turns; extra peak memory is that of one pass in a fresh process. `--large` adds the
size at which the other takes many seconds and gigabytes, and how time grows with n.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import passive  # noqa: F401
import torch
from measure import (
    arguments,
    header,
    in_turns,
    installed,
    peak_growth,
    save,
    table,
    verdict,
)
from torch import Tensor

import nearfar

D, PER_CLASS = 128, 8
MARGIN, MARGIN2 = 0.2, 0.1
PEER = "pytorch-metric-learning"
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """A case at a size, and what it should reach.

    Attributes:
        case: which triplets or quadruplets.
        n: rows.
        faster: at least this many times as fast as pytorch-metric-learning.
        memory: at most this share of its memory.
        seconds: at most.
        extra: bytes at most.
        beside: measure pytorch-metric-learning too; at some sizes it takes minutes and tens of
            gigabytes.
        large: only with --large, with at most three repeats.
        differs: what pytorch-metric-learning does differently.
    """

    case: str
    n: int
    faster: float | None = None
    memory: float | None = None
    seconds: float | None = None
    extra: float | None = None
    beside: bool = True
    large: bool = False
    differs: str = ""


_SEMIHARD = (
    "takes every negative beyond the positive and within the margin, nearfar only the nearest"
)
QUESTIONS = [
    Question("all", 1024, faster=60, memory=1 / 40),
    Question("all", 4096, faster=80, large=True),
    Question("all", 8192, seconds=3, extra=300e6, beside=False),
    Question("semihard", 1024, faster=50, differs=_SEMIHARD),
    Question("hard", 4096, faster=5, memory=1 / 10),
    Question("distance_weighted", 1024),
    Question("quadruplets", 4096, seconds=15, extra=600e6),
    Question("quadruplets, hard", 4096),
]
GROWTH = ("all", "semihard", "hard", "quadruplets")
AT_MOST = 20.0


def ours(case: str) -> partial[Tensor]:
    if case.startswith("quadruplets"):
        select = "hard" if case.endswith("hard") else "all"
        return partial(nearfar.batch_quadruplet_loss, margin=MARGIN, margin2=MARGIN2, select=select)
    return partial(nearfar.batch_triplet_loss, margin=MARGIN, select=case)


def named(case: str) -> dict[str, str]:
    """What the tables call a case."""
    loss = ours(case)
    return {"function": loss.func.__name__, "select": loss.keywords["select"]}


def theirs(case: str) -> Loss | None:
    if installed(PEER) is None or case.startswith("quadruplets"):
        return None
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import MeanReducer

    distance = LpDistance(normalize_embeddings=False)
    loss: Any = losses.TripletMarginLoss(
        margin=MARGIN, distance=distance, reducer=MeanReducer(), triplets_per_anchor="all"
    )
    if case == "all":
        return lambda x, labels: loss(x, labels)
    miner: Any = {
        "hard": lambda: miners.BatchHardMiner(distance=distance),
        "semihard": lambda: miners.TripletMarginMiner(
            margin=MARGIN, type_of_triplets="semihard", distance=distance
        ),
        "distance_weighted": lambda: miners.DistanceWeightedMiner(distance=LpDistance()),
    }[case]()
    return lambda x, labels: loss(x, labels, miner(x, labels))


def data(n: int) -> tuple[Tensor, Tensor]:
    """Rows of about length 1 around the centre of their class."""
    torch.manual_seed(0)
    labels = torch.arange(n) // PER_CLASS
    centres = torch.randn(int(labels.max()) + 1, D)
    x = (torch.randn(n, D) + centres[labels]) / (2 * D) ** 0.5
    return x.requires_grad_(), labels


def step(loss: Loss, x: Tensor, labels: Tensor) -> float:
    x.grad = None
    value = loss(x, labels)
    value.backward()
    return value.item()


def contenders(case: str) -> dict[str, Loss]:
    peer = theirs(case)
    return {"nearfar": ours(case), **({} if peer is None else {PEER: peer})}


def peak(case: str, contender: str, n: int, threads: int) -> int:
    """Extra bytes of one pass in a fresh process."""
    command = [sys.executable, __file__, "--peak", case, contender, str(n)]
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=True,
    )
    return int(json.loads(done.stdout))


def own_peak(case: str, contender: str, n: int) -> int:
    loss = contenders(case)[contender]
    step(loss, *data(64))
    x, labels = data(n)
    return peak_growth(lambda: step(loss, x, labels))


def measured(question: Question, n: int, repeats: int, threads: int) -> dict[str, Any]:
    x, labels = data(n)
    losses = contenders(question.case) if question.beside else {"nearfar": ours(question.case)}
    repeats = min(3, repeats) if question.large else repeats
    steps = {name: partial(step, loss, x, labels) for name, loss in losses.items()}
    values = {name: call() for name, call in steps.items()}
    times = in_turns(steps, repeats, warm=True)
    took = {
        name: {
            "median_s": times[name].median,
            "min_s": times[name].minimum,
            "extra_bytes": peak(question.case, name, n, threads),
            "loss": values[name],
        }
        for name in steps
    }
    return {
        "case": question.case,
        **named(question.case),
        "n": n,
        "d": D,
        "contenders": took,
        "differs": question.differs,
        "answers": answers(question, n, took),
    }


def answers(question: Question, n: int, took: dict[str, Any]) -> list[str]:
    """What should be reached at this size, and whether it was."""
    notes = [f"* {PEER} {question.differs}"] if question.differs and PEER in took else []
    if n != question.n:
        return notes
    mine, peer, lines = took["nearfar"], took.get(PEER), []
    if question.seconds:
        reached = verdict(mine["median_s"] <= question.seconds)
        lines.append(f"{mine['median_s']:.2f} s, at most {question.seconds:g}: {reached}")
    if question.extra:
        reached = verdict(mine["extra_bytes"] <= question.extra)
        lines.append(
            f"{mine['extra_bytes'] / 1e6:.0f} MB, at most {question.extra / 1e6:g}: {reached}"
        )
    if peer and question.faster:
        ratio = peer["median_s"] / mine["median_s"]
        reached = verdict(ratio >= question.faster)
        lines.append(f"{ratio:.0f} x as fast, at least {question.faster:g}: {reached}")
    if peer and question.memory:
        ratio = peer["extra_bytes"] / max(mine["extra_bytes"], 1)
        reached = verdict(ratio >= 1 / question.memory)
        lines.append(
            f"1/{ratio:.0f} of its extra memory, at most 1/{1 / question.memory:g}: {reached}"
        )
    return lines + notes


def growth(case: str, sizes: tuple[int, int], repeats: int) -> dict[str, Any]:
    """How much longer a pass takes on 4 times the rows, which have 16 times the pairs."""
    loss = ours(case)
    times = in_turns({str(n): partial(step, loss, *data(n)) for n in sizes}, repeats)
    small, large = (times[str(n)] for n in sizes)
    ratio = large.median / small.median
    reached = verdict(ratio <= AT_MOST)
    line = (
        f"{ratio:.1f} x the time from n = {sizes[0]} to {sizes[1]}, at most {AT_MOST:g}: {reached}"
    )
    return {
        "case": case,
        **named(case),
        "sizes": sizes,
        "d": D,
        "growth": ratio,
        "growth_of_min": large.minimum / small.minimum,
        "answers": [line],
    }


def shown(result: dict[str, Any]) -> str:
    columns = ("", "median", "min", "extra MB", "loss")
    lines = [
        (
            name,
            f"{took['median_s'] * 1e3:.1f} ms",
            f"{took['min_s'] * 1e3:.1f} ms",
            f"{took['extra_bytes'] / 1e6:.1f}",
            f"{took['loss']:.6f}",
        )
        for name, took in result["contenders"].items()
    ]
    return "\n".join((f"\n{result['case']}, n = {result['n']}", table(columns, lines)))


def main() -> None:
    parser = arguments(__doc__, "large", "only", "shrink", "threads", repeats=5)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.peak:
        case, contender, n = asked.peak
        print(own_peak(case, contender, int(n)))
        return
    header("Triplets and quadruplets")
    results = []
    for question in QUESTIONS:
        if asked.only in question.case and (asked.large or not question.large):
            result = measured(question, question.n // asked.shrink, asked.repeats, asked.threads)
            results.append(result)
            print(shown(result), *(f"  {line}" for line in result["answers"]), sep="\n", flush=True)
    for case in GROWTH if asked.large else ():
        if asked.only in case:
            sizes = (2048 // asked.shrink, 8192 // asked.shrink)
            results.append(growth(case, sizes, asked.repeats))
            print(f"\n{case}\n  {results[-1]['answers'][0]}", flush=True)
    save(asked.json, results)


if __name__ == "__main__":
    main()
