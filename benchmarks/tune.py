"""The tile shapes of the GPU kernels, measured on a card: `gpu.py --tune`.

For every kernel, dtype and width of rows that the losses below ask the table of shapes for, shapes
around the default are tried: first tiles, then warps and stages for the fastest tile. Those that
fail to compile are dropped, and those for which registers spill more than for another. The others
are timed by the losses that ask for them. What the table has for other cards stays.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from unittest.mock import patch

import torch
from cases import CASES, Case
from device import in_turns
from gpu_cases import TUPLES

import nearfar
from nearfar.engine.budget import Limits
from nearfar.engine.gpu import kernels, shapes
from nearfar.engine.gpu.shapes import Shape
from nearfar.engine.precision import Precision

# Both sides, one side, pair by pair, positive by positive, distances, triplets.
NAMES = (
    "clip_loss", "info_nce_loss", "siglip_loss", "sup_con_loss", "nt_xent_loss",
    "batch_contrastive_loss",
)  # fmt: skip
LOSSES = [*(CASES[name] for name in NAMES), *TUPLES]
Known = dict[str, list[int]]


@dataclass(frozen=True)
class Sizes:
    """The rows, the numbers in a row and the precisions that are tried, and the turns of each."""

    rows: int = 8192
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    precisions: tuple[Precision, ...] = ("bfloat16", "float16", "float32")
    repeats: int = 5
    seconds: float = 0.02


QUICK = Sizes(widths=(128, 512), precisions=("bfloat16",), repeats=3)
TINY = Sizes(24, (16,), ("float32",), 1, 0.0)


class Trial:
    """The shapes of a card while they are tried; notes which of them are asked for."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.asked: set[str] = set()

    def get(self, key: str) -> list[int] | None:
        self.asked.add(key)
        return self.known.get(key)


@contextmanager
def trying(known: Known, card: str) -> Iterator[Trial]:
    """Kernels take their shapes from here, and their defaults where there is none."""
    trial = Trial(known)
    with patch.object(shapes, "_table", lambda: {card: trial}):
        yield trial


def asked_for(
    sizes: Sizes, card: str, device: torch.device
) -> dict[str, list[Callable[[], object]]]:
    """What the table is asked for, and the passes of the losses that ask."""
    asking: dict[str, list[Callable[[], object]]] = {}
    for case, d, precision in product(LOSSES, sizes.widths, sizes.precisions):
        call = one_pass(case, d, precision, sizes, device)
        with trying({}, card) as trial:
            try:
                call()
            except Exception as error:  # other losses may ask for the same shapes
                print(f"without {case.name}, {d}, {precision}: {type(error).__name__}")
                continue
        for key in trial.asked:
            asking.setdefault(key, []).append(call)
    missed = {kernel for kernel, _ in shapes._DEFAULTS} - {key.rsplit(" ", 2)[0] for key in asking}
    if missed:
        print(f"no loss here asks for a shape of: {', '.join(sorted(missed))}")
    return asking


def one_pass(
    case: Case, d: int, precision: Precision, sizes: Sizes, device: torch.device
) -> Callable[[], object]:
    """A pass of a loss, forward and backward."""
    data = case.data(sizes.rows, d).to(torch.float32, device)

    def call() -> object:
        with nearfar.precision(precision):
            loss = case.ours(*data.embeddings, *data.labels, **data.hyper)
        return torch.autograd.grad(loss, data.leaves)

    return call


def tiles(default: Shape) -> list[Shape]:
    """The default tile, and those with half or twice its sides."""
    return [
        replace(default, rows=rows, columns=columns)
        for rows in around(default.rows)
        for columns in around(default.columns)
    ]


def around(size: int) -> tuple[int, ...]:
    return size, max(size // 2, 1), 2 * size


def compilations(tile: Shape) -> list[Shape]:
    """A tile with the warps and stages that it may be compiled for; as it is first."""
    others = [replace(tile, warps=w, stages=s) for w in (4, 8) for s in (1, 2, 3, 4)]
    return [tile, *(shape for shape in others if shape != tile)]


def fastest(
    candidates: Sequence[Shape], run: Callable[[Shape], object], sizes: Sizes, device: torch.device
) -> Shape | None:
    """The fastest of those that spill least, the first of equals; None if none compiles."""
    spilled = {shape: spills(run, shape, device) for shape in candidates}
    there = {shape: count for shape, count in spilled.items() if count is not None}
    least = [shape for shape, count in there.items() if count == min(there.values())]
    if not least:
        return None
    calls = {str(k): (lambda shape=shape: run(shape)) for k, shape in enumerate(least)}
    times = in_turns(calls, sizes.repeats, sizes.seconds, device)
    return least[min(range(len(least)), key=lambda k: times[str(k)].median)]


def spills(run: Callable[[Shape], object], shape: Shape, device: torch.device) -> int | None:
    """How many registers spill in all kernels of a run; None if one cannot be compiled."""
    functions = launched()
    for function in functions:
        function.device_caches.clear()
    try:
        run(shape)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # compilers and drivers have many kinds
        print(f"    {astuple(shape)}: {type(error).__name__}")
        return None
    return sum(
        compiled.n_spills
        for function in functions
        for cached in function.device_caches.values()
        for compiled in cached[0].values()
    )


def launched() -> list[Any]:
    """The functions that Triton compiles, each once; none where it interprets them."""
    modules = iter_modules(kernels.__path__, f"{kernels.__name__}.")
    values = (v for module in modules for v in vars(import_module(module.name)).values())
    return list({id(value): value for value in values if hasattr(value, "device_caches")}.values())


def default(key: str, device: torch.device) -> Shape:
    kernel, dtype, width = key.rsplit(" ", 2)
    return shapes.shape_of(kernel, getattr(torch, dtype), int(width), device, Limits())


def tuned(path: Path, only: Sequence[str], device: torch.device, sizes: Sizes) -> None:
    """Measure every shape that is asked for, and write the fastest to a table of shapes."""
    card = shapes._card(device)
    asking = asked_for(sizes, card, device)
    table = json.loads(path.read_text()) if path.exists() else {}
    known = dict(table.get(card, {}))
    for key in (key for key in sorted(asking) if not only or any(text in key for text in only)):
        chosen = best(key, known, asking[key], card, sizes, device)
        if chosen is not None:
            known[key] = list(astuple(chosen))
            path.write_text(written({**table, card: known}))


def best(
    key: str,
    known: Mapping[str, list[int]],
    calls: Sequence[Callable[[], object]],
    card: str,
    sizes: Sizes,
    device: torch.device,
) -> Shape | None:
    """The best shape for a key, other shapes being as known."""

    def run(shape: Shape) -> None:
        with trying({**known, key: list(astuple(shape))}, card):
            for call in calls:
                call()

    with trying({}, card):
        usual = default(key, device)
    print(f"{key}, by default {astuple(usual)}, in {len(calls)} passes", flush=True)
    tile = fastest(tiles(usual), run, sizes, device)
    shape = None if tile is None else fastest(compilations(tile), run, sizes, device)
    print(f"  {'none compiles' if shape is None else astuple(shape)}", flush=True)
    return shape


def written(table: Mapping[str, Mapping[str, list[int]]]) -> str:
    """A table of shapes as JSON, in the order of names, a line for each shape."""
    cards = []
    for card in sorted(table):
        lines = (f"    {json.dumps(key)}: {table[card][key]}" for key in sorted(table[card]))
        cards.append(f"  {json.dumps(card)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(cards) + "\n}\n"
