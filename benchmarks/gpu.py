"""How fast is nearfar on a GPU, how much memory does it take, and is what was aimed at reached?

Forward and backward pass, on one NVIDIA GPU. The others are the textbook formula in plain torch, as
it is and under torch.compile, nearfar without its kernels ("plain torch"), and libraries for single
losses.

    pip install nearfar memeff siglip-kernel inf-cl
    python benchmarks/gpu.py [--huge] [--only clip sup_con] [--json runs/bench/gpu.json]

All contenders of a row run in one process, in turns, on the same rows: float32 under autocast to
bfloat16, or float32 throughout where the name says so; other libraries get rows in bfloat16, Inf-CL
in float32. CLIP has a fixed scale, as memeff has; SigLIP learns its scale and bias. What is not
installed, or fails, is left out and named.

Times are of CUDA events, memory is the extra peak of torch's allocator, gradients included. A rate
counts the operations of the matrix products that a loss needs (8 N²d for CLIP, 6 N²d for SigLIP and
InfoNCE) and is compared with that of a bfloat16 product of 8,192^3, which takes its turn in the
same run.

Small batches are captured in a CUDA graph, backward included, and measured as they are beside the
formula. At last, every loss is computed three times here and once in another process, and all bits
must agree.

    python benchmarks/gpu.py --tune     # measures tile shapes, and writes them for this card
    python benchmarks/gpu.py --smoke    # tries the script on a CPU, in Triton's interpreter
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import passive  # noqa: F401

if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

import torch
from cases import Case, Data
from device import NotCapturedError, Step, captured, extra_bytes, in_turns, product
from gpu_cases import (
    CONTENDERS,
    EXACT,
    EXACT_FORMULA,
    HUGE,
    ITEMS,
    LOSSES,
    NEARFAR,
    SIZES,
    AsExact,
    How,
    Item,
    Row,
    Target,
    shown,
    small_items,
)
from measure import arguments, header, installed, save, table, verdict
from torch import Tensor
from tune import QUICK, TINY, Sizes, tuned

from nearfar.engine.gpu.shapes import TABLE
from nearfar.engine.where import kernels_run_on, running_kernels

BITS = {
    "name": "every loss",
    "wanted": "the same bits in three runs and in another process",
}
BITS_AT = ((2048, 128), (2048, 512))
BITS_OF = (NEARFAR, EXACT)


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where.

    Attributes:
        device: where.
        shrink: what sizes above 1,024 are divided by.
        repeats: turns of each contender.
        seconds: of a turn.
        sizes: of small batches.
        compiler: that torch.compile uses.
        product: the side of the matrices whose product a rate is compared with.
    """

    device: torch.device
    shrink: int = 1
    repeats: int = 20
    seconds: float = 0.05
    sizes: tuple[int, ...] = SIZES
    compiler: str = "inductor"
    product: int = 8192

    def sized(self, n: int, d: int) -> tuple[int, int]:
        """The rows and the numbers in a row that are measured in place of those asked for."""
        if self.device.type == "cpu":
            return 24, 16
        return max(n // self.shrink, min(n, 1024)), d


def plan(asked: argparse.Namespace) -> Plan:
    if asked.smoke:
        return Plan(torch.device("cpu"), 1, 1, 0.0, (16,), "eager", 24)
    if not torch.cuda.is_available():
        sys.exit("gpu: torch sees no CUDA device here. --smoke tries the script on a CPU.")
    device = torch.device("cuda", torch.cuda.current_device())
    return Plan(device, 8, 5, 0.02, (64,)) if asked.quick else Plan(device)


# -- contenders -----------------------------------------------------------------------------------


def step(loss: Callable[[], Tensor], data: Data, how: How, at: Plan) -> Step:
    """A pass forward and backward: the loss, then the gradient of every leaf."""
    rounding = torch.autocast(at.device.type, torch.bfloat16, enabled=how.autocast)

    def call() -> tuple[Tensor, ...]:
        kernels = nullcontext() if how.kernels else running_kernels(everywhere=False)
        with rounding, kernels:
            value = loss()
        return (value.detach(), *torch.autograd.grad(value, data.leaves))

    return call


@cache
def drawn(case: Case, item: Item, at: Plan, dtype: torch.dtype = torch.float32) -> Data:
    """The data of a loss; all contenders of an item share them."""
    return case.data(item.n, item.d).to(torch.float32, at.device).to(dtype)


def contender(name: str, item: Item, at: Plan) -> Step:
    """A contender of an item, by name."""
    if name in item.others:
        rounded = name in item.peers
        data = drawn(item.case, item, at, torch.bfloat16 if rounded else torch.float32)
        loss = item.others[name].build(*data.embeddings, *data.labels, **data.hyper)
        return step(loss, data, How(autocast=False), at)  # it would make normalised rows float32
    how = CONTENDERS[name]
    case = how.case or item.case
    data = drawn(replace(case, learned=("scale",)) if how.learned else case, item, at)
    if how.function == "nearfar":
        function = case.ours
    elif how.function == "formula":
        function = case.textbook
    else:
        # Code for this size alone, and not for all after it has seen two.
        function = torch.compile(case.textbook, dynamic=False, backend=at.compiler)
    passed = step(lambda: function(*data.embeddings, *data.labels, **data.hyper), data, how, at)
    return captured(passed, at.device) if how.captured else passed


def ready(item: Item, at: Plan) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """The contenders that run, their losses, and why the others do not."""
    steps, losses, left_out = {}, {}, {}
    forget(at)
    for name in item.names:
        peer = item.others.get(name)
        if peer and peer.package and installed(peer.package) is None:
            left_out[name] = f"it needs `pip install {peer.package}`"
            continue
        try:
            call = contender(name, item, at)
            losses[name] = call()[0].item()
            steps[name] = call
        except NotCapturedError as error:
            left_out[name] = str(error)
        except Exception as error:  # of a library or a compiler: the others are measured still
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return steps, losses, left_out


def forget(at: Plan) -> None:
    """Free what the item before has left: its rows, its compiled code and its memory."""
    drawn.cache_clear()
    torch.compiler.reset()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()


# -- items ----------------------------------------------------------------------------------------


def measured(asked: Item, at: Plan) -> dict[str, Any]:
    """Times, memory and losses of all contenders of an item, and what was reached."""
    n, d = at.sized(asked.n, asked.d)
    item = replace(asked, n=n, d=d)
    steps, losses, left_out = ready(item, at)
    times = in_turns(
        {**steps, "product": product(at.product, at.device)}, at.repeats, at.seconds, at.device
    )
    rate = 2 * at.product**3 / times["product"].median
    work = item.case.work
    row = {
        **named(item), "repeats": at.repeats,
        "contenders": {
            name: {
                "median_s": times[name].median, "min_s": times[name].minimum,
                "extra_bytes": _memory(name, call, at), "loss": losses[name],
            }
            for name, call in steps.items()
        },
        "left_out": left_out,
        "product_rate": rate,
        "floor_s": None if work is None else work * n * n * d / rate,
        "gradient_bytes": sum(x.nbytes for x in drawn(item.case, item, at).leaves),
    }  # fmt: skip
    compared = any(isinstance(target, AsExact) for target in item.targets)
    if compared and EXACT in steps and EXACT_FORMULA in steps:
        row["errors"] = errors(item, at)
    row["answers"] = [
        answer(target, row, judged=(n, d) == (asked.n, asked.d)) for target in item.targets
    ]
    return row


def named(item: Item) -> dict[str, Any]:
    name = item.case.name + item.also
    return {"case": name, "small": item.small, "n": item.n, "d": item.d}


def _memory(name: str, call: Step, at: Plan) -> int | None:
    """None for a graph, which keeps its memory."""
    how = CONTENDERS.get(name)
    return None if how and how.captured else extra_bytes(call, at.device)


def answer(target: Target, row: Row, *, judged: bool) -> dict[str, Any]:
    """What was found; None as `reached` if it cannot be said, or is measured at another size."""
    for name in (target.of, target.beside):
        if name and name not in row["contenders"]:
            why = f"{name} is left out: {row['left_out'].get(name, 'not measured')}"
            return told(target, why, False if judged and name == target.of else None)
    found, reached = target.found(row)
    return told(target, found, reached if judged else None)


def told(target: Target, found: str = "", reached: bool | None = None) -> dict[str, Any]:
    return {"wanted": target.wanted, "found": found, "reached": reached}


def errors(item: Item, at: Plan) -> dict[str, float]:
    """The largest relative error against float64, on a quarter of the rows to save memory."""
    item = replace(item, n=max(item.n // 4, min(item.n, 1024)))
    data = drawn(item.case, item, at, torch.float64)
    function = item.case.textbook
    truth = step(lambda: function(*data.embeddings, **data.hyper), data, How(autocast=False), at)()
    return {
        name: max(map(_relative, contender(name, item, at)(), truth))
        for name in (EXACT, EXACT_FORMULA)
    }


def _relative(got: Tensor, truth: Tensor) -> float:
    return ((got - truth).abs().max() / truth.abs().max()).item()


# -- the same bits --------------------------------------------------------------------------------


def digests(only: Sequence[str], at: Plan) -> dict[str, str]:
    """The digest of the loss and the gradients of every loss; empty where it fails."""
    forget(at)
    return {
        f"{item.name}, {name}": _digest(name, item, at)
        for case in LOSSES
        if chosen(case.name, only)
        for n, d in (at.sized(n, d) for n, d in BITS_AT)
        for item in [Item(case, n, d)]
        for name in BITS_OF
    }


def _digest(name: str, item: Item, at: Plan) -> str:
    digest = hashlib.sha256()
    try:
        results = contender(name, item, at)()
    except RuntimeError:
        return ""
    for tensor in results:
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def same_bits(only: Sequence[str], options: Sequence[str], at: Plan) -> dict[str, Any]:
    """Whether all runs agree: three in this process, and one in another."""
    first, *others = (digests(only, at) for _ in range(3))
    command = [sys.executable, __file__, "--digests", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    others.append(json.loads(done.stdout))
    differ = [
        name
        for name, digest in first.items()
        if not digest or any(other[name] != digest for other in others)
    ]
    found = f"{len(first) - len(differ)} of {len(first)}"
    return {
        "case": BITS["name"],
        "small": False,
        "differ": differ,
        "answers": [{"wanted": BITS["wanted"], "found": found, "reached": not differ}],
    }


# -- what is printed ------------------------------------------------------------------------------


def printed(row: Row) -> str:
    columns = ("", "median", "min", "extra MB", "of the rate", "loss")
    lines = [
        (
            name,
            shown(took["median_s"]),
            shown(took["min_s"]),
            "" if took["extra_bytes"] is None else f"{took['extra_bytes'] / 1e6:,.1f}",
            f"{row['floor_s'] / took['median_s']:.0%}" if row["floor_s"] else "",
            f"{took['loss']:.6g}",
        )
        for name, took in row["contenders"].items()
    ]
    notes = [f"  (without {name}: {why})" for name, why in row["left_out"].items()]
    return "\n".join((f"\n{row['case']}, {row['n']:,} x {row['d']}", table(columns, lines), *notes))


def printed_answers(row: Row) -> str:
    verdicts = {None: "", True: f": {verdict(True)}", False: f": {verdict(False)}"}
    return "\n".join(
        f"  {each['wanted']}: {each['found']}{verdicts[each['reached']]}" for each in row["answers"]
    )


def summary(rows: Sequence[Row]) -> str:
    answers = [(row, each) for row in rows for each in row["answers"]]
    lines = [f"{sum(each['reached'] is True for _, each in answers)} of {len(answers)} reached"]
    lines += [
        f"  {word}: {row['case']}, {each['wanted']}"
        for reached, word in ((False, "not reached"), (None, "not known"))
        for row, each in answers
        if each["reached"] is reached
    ]
    return "\n".join(("", *lines))


def unmeasured() -> list[dict[str, Any]]:
    """The rows of the results before anything is measured."""
    items = [*ITEMS, HUGE, *small_items()]
    rows = [
        {
            **named(item), "contenders": {},
            "answers": [told(target) for target in item.targets],
        }
        for item in items
    ]  # fmt: skip
    answers = [{"wanted": BITS["wanted"], "found": "", "reached": None}]
    return [*rows, {"case": BITS["name"], "small": False, "answers": answers}]


# -- the command line -----------------------------------------------------------------------------


def chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(text in name for text in only)


def measure(asked: argparse.Namespace, at: Plan) -> None:
    header("Losses on a GPU")
    if not kernels_run_on(at.device):
        print(
            "nearfar's kernels do not run here: they need Triton 3.6 and an Ampere card or newer."
        )
    rows: list[dict[str, Any]] = []
    items = [*ITEMS, *([HUGE] if asked.huge else []), *small_items(at.sizes)]
    for item in items:
        if chosen(item.name, asked.only):
            rows.append(measured(item, at))
            print(printed(rows[-1]), printed_answers(rows[-1]), sep="\n", flush=True)
            save(asked.json, rows)
    options = [name for name in ("--smoke", "--quick") if name in sys.argv]
    options += ["--only", *asked.only] if asked.only else []
    rows.append(same_bits(asked.only, options, at))
    print(f"\n{BITS['name']}", printed_answers(rows[-1]), *rows[-1]["differ"], sep="\n")
    save(asked.json, rows)
    print(summary(rows))


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels on a CPU; NumPy, with which they compute there, warns of what is masked later."""
    with running_kernels(everywhere=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows that have NAME")
    parser.add_argument("--huge", action="store_true", help="add CLIP with 1,048,576 rows")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, smaller sizes")
    parser.add_argument("--smoke", action="store_true", help="all of it tiny, on a CPU")
    parser.add_argument(
        "--tune", nargs="?", type=Path, const=TABLE, metavar="FILE",
        help="measure tile shapes and write them to FILE, the table of the kernels if not given",
    )  # fmt: skip
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.smoke and asked.tune == TABLE:
        parser.error("--smoke tunes nothing worth keeping: name a file, --tune FILE")
    return asked


def main() -> None:
    asked = parsed()
    at = plan(asked)
    with interpreted() if asked.smoke else nullcontext():
        if asked.digests:
            print(json.dumps(digests(asked.only, at)))
        elif asked.tune:
            sizes = TINY if asked.smoke else QUICK if asked.quick else Sizes()
            tuned(asked.tune, asked.only, at.device, sizes)
        else:
            measure(asked, at)


if __name__ == "__main__":
    main()
