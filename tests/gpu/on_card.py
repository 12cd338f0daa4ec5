"""Hold every loss on a GPU to float64 on the CPU: what to run first on a card.

`make check-gpu` runs it. It prints one line a loss and precision, and in the end what failed: an
error above the bound, other bits the second time, or a step that a CUDA graph cannot capture.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from batch_cases import CASES, Case, Data, gradients
from torch import Tensor

import nearfar as nf
from nearfar.engine.where import kernels_run_on

# The largest error of a gradient, as a share of its norm. Where rows are rounded, another triplet
# may be chosen or a hinge may open, so that only what is plainly wrong is found.
BOUNDS = {"float32": 1e-4, "tf32": 0.3, "bfloat16": 0.3, "float16": 0.3}
Loss = Callable[[Data], Tensor]


def losses(n: int, d: int) -> Iterator[tuple[str, Loss, Data]]:
    """Every loss, with data in float32."""
    for case in CASES:
        yield (
            case.name,
            partial(Case.run, case, reduction="mean"),
            case.draw(n, d).to(torch.float32),
        )
    chance = torch.Generator().manual_seed(0)
    x, labels = torch.randn(n, d, generator=chance), torch.arange(n) % (n // 4)
    for select in ("all", "hard", "semihard"):
        yield f"{select} triplets", partial(_tuples, nf.batch_triplet_loss, select), _of(x, labels)
    for select in ("all", "hard"):
        loss = partial(_tuples, nf.batch_quadruplet_loss, select)
        yield f"{select} quadruplets", loss, _of(x, labels)


def _of(x: Tensor, labels: Tensor) -> Data:
    return Data({"x": x}, {"labels": labels})


def _tuples(function: Callable[..., Tensor], select: str, data: Data, **more: Any) -> Tensor:
    return function(data.rows["x"], data.others["labels"], select=select, **more)


def on(device: str, data: Data) -> Data:
    """The data on a device."""
    rows = {name: x.to(device) for name, x in data.rows.items()}
    return Data(rows, {name: x.to(device) for name, x in data.others.items()})


def check(loss: Loss, data: Data, precision: str, device: str) -> tuple[float, bool]:
    """The largest error, and whether a second time gives the same bits."""
    true = gradients(loss, data.to(torch.float64))
    there = on(device, data)
    again = [gradients(partial(loss, precision=precision), there) for _ in range(2)]
    pairs = [(again[0][0], true[0]), *((again[0][1][k], true[1][k]) for k in true[1])]
    error = max(
        float((a.cpu().double() - b.double()).norm() / b.norm().double().clamp(min=1e-6))
        for a, b in pairs
    )
    same = [torch.equal(a, again[1][1][k]) for k, a in again[0][1].items()]
    return error, all(same) and torch.equal(again[0][0], again[1][0])


def captured(loss: Loss, data: Data) -> str:
    """What a graph makes of a step: "" if it gives the same, else what went wrong."""
    rows = {name: x.cuda().requires_grad_() for name, x in data.rows.items()}
    others = {name: x.cuda() for name, x in data.others.items()}

    def step() -> Tensor:
        value = loss(Data(rows, others))
        value.backward()
        return value.detach()

    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = step()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if torch.equal(value, expected) else "another value"


def main(
    device: str = "cuda",
    n: int = 300,
    widths: tuple[int, ...] = (48, 128, 300),
    names: tuple[str, ...] = (),
) -> int:
    """The number of failures, of all losses or of those named."""
    failed = []
    for d in widths:
        for name, loss, data in losses(n, d):
            if names and name not in names:
                continue
            for precision, bound in BOUNDS.items():
                try:
                    error, same = check(loss, data, precision, device)
                except ValueError as refused:  # distances that are no products
                    print(f"{name} {d} {precision}: {str(refused)[:60]}")
                    continue
                line = f"{name} {d} {precision}: error {error:.1e}{'' if same else ', other bits'}"
                print(line, flush=True)
                if not error <= bound or not same:
                    failed.append(line)
            if device == "cuda" and d == widths[0]:
                wrong = captured(loss, data)
                print(f"{name} captured: {wrong or 'the same'}", flush=True)
                failed += [f"{name} captured: {wrong}"] if wrong else []
    print(f"\n{len(failed)} failed", *failed, sep="\n")
    return len(failed)


if __name__ == "__main__":
    if not kernels_run_on(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        sys.exit("nearfar's kernels do not run here: see docs/gpu.md for what they need.")
    sys.exit(min(main(), 1))
