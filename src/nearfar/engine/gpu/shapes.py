"""The shape of the tiles of a kernel, from a table: never chosen by the clock while training.

`benchmarks/gpu.py --tune` measures the shapes on a card and writes `shapes.json`, one entry a card,
kernel, dtype and width. Where the table has none, the defaults hold. The same shape gives the same
bits.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from nearfar.engine.budget import Limits

TABLE = Path(__file__).with_name("shapes.json")


@dataclass(frozen=True)
class Shape:
    """The tile of a program: its rows and columns, and how Triton compiles it."""

    rows: int
    columns: int
    warps: int
    stages: int


# Kernel and whether its operands have 16 bits -> the shape for rows of up to 128 numbers, and for
# longer ones: few enough registers and little enough shared memory for every card.
_DEFAULTS = {
    ("collect", True): (Shape(64, 64, 8, 2), Shape(64, 64, 8, 2)),
    ("collect", False): (Shape(64, 64, 8, 2), Shape(64, 64, 8, 2)),
    ("pull", True): (Shape(64, 32, 8, 2), Shape(64, 32, 8, 2)),
    ("pull", False): (Shape(64, 32, 8, 2), Shape(64, 32, 8, 2)),
    ("pull distances", True): (Shape(32, 16, 8, 2), Shape(32, 16, 8, 2)),
    ("pull distances", False): (Shape(32, 16, 8, 2), Shape(32, 16, 8, 2)),
    ("nearest", True): (Shape(64, 64, 8, 2), Shape(64, 32, 8, 2)),
    ("nearest", False): (Shape(64, 32, 8, 1), Shape(64, 16, 8, 1)),
    ("push", True): (Shape(64, 32, 8, 2), Shape(32, 32, 8, 2)),
    ("push", False): (Shape(64, 16, 8, 1), Shape(32, 16, 8, 1)),
    # Whatever the length of the rows:
    ("collect tiles", True): (Shape(128, 64, 8, 3),) * 2,
    ("collect tiles", False): (Shape(128, 64, 8, 2),) * 2,
    ("force tiles", True): (Shape(128, 64, 8, 3),) * 2,
    ("force tiles", False): (Shape(128, 64, 8, 2),) * 2,
    ("multiply", False): (Shape(64, 64, 8, 2),) * 2,
    ("strip", True): (Shape(4, 1024, 4, 1),) * 2,
    ("strip", False): (Shape(4, 1024, 4, 1),) * 2,
    ("join", True): (Shape(16, 64, 4, 1),) * 2,
    ("join", False): (Shape(16, 64, 4, 1),) * 2,
}
# Data centre cards from Hopper on have more shared memory, and their products leave registers.
_HOPPER = {
    ("collect", True): (Shape(128, 64, 8, 3), Shape(128, 64, 8, 2)),
    ("pull", True): (Shape(64, 64, 8, 2), Shape(64, 64, 8, 2)),
    ("pull", False): (Shape(64, 64, 8, 2), Shape(64, 64, 8, 2)),
    ("pull distances", True): (Shape(64, 32, 8, 2), Shape(32, 32, 8, 2)),
    ("pull distances", False): (Shape(64, 32, 8, 2), Shape(64, 32, 8, 2)),
    ("collect tiles", True): (Shape(128, 256, 8, 3),) * 2,
    ("collect tiles", False): (Shape(128, 128, 8, 2),) * 2,
    ("force tiles", True): (Shape(128, 256, 8, 3),) * 2,
    ("force tiles", False): (Shape(128, 128, 8, 2),) * 2,
    ("multiply", False): (Shape(128, 64, 8, 2),) * 2,
}
_BLACKWELL = {
    ("collect tiles", True): (Shape(128, 128, 8, 3),) * 2,
    ("force tiles", True): (Shape(128, 128, 8, 3),) * 2,
}
_OF_GENERATION = {9: _HOPPER, 10: _BLACKWELL}

# Columns of a tile, a quarter of which is written at a time and has 16 bytes.
_LEAST = {"force tiles": 32}


def shape_of(
    kernel: str, dtype: torch.dtype, width: int, device: torch.device, limits: Limits
) -> Shape:
    """The shape for a kernel.

    Args:
        kernel: "collect"; "pull" or "pull distances", which also multiply forces with rows;
            "collect tiles" and "force tiles", in which the rule follows on a product; "strip",
            which reads products; "multiply"; "join", which adds up parts; of triplets and
            quadruplets "nearest", and "push", which also multiplies forces with rows.
        dtype: of the rows as they are multiplied.
        width: how many numbers of a row a program holds.
        device: where the rows are.
        limits: a tile set by the caller overrides the table.
    """
    if limits.tile is not None:
        rows, columns = map(_power_of_two, limits.tile)
        return Shape(rows, max(columns, _LEAST.get(kernel, 0)), 4, 1)
    key = f"{kernel} {str(dtype).removeprefix('torch.')} {width}"
    known = _table().get(_card(device), {}).get(key)
    if known is not None:
        return Shape(*known)
    sort = kernel, dtype.itemsize == 2
    known_here = _OF_GENERATION.get(generation(device), {})
    return known_here.get(sort, _DEFAULTS[sort])[width > 128]


def _power_of_two(size: int) -> int:
    """The smallest tile side that matrix units take and that is not below `size`."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def _table() -> dict[str, dict[str, list[int]]]:
    if not TABLE.exists():
        return {}
    found: dict[str, dict[str, list[int]]] = json.loads(TABLE.read_text())
    return found


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@cache
def generation(device: torch.device) -> int:
    """Of the card: 8 is Ampere, 9 Hopper, 10 and 12 Blackwell."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


@cache
def processors(device: torch.device) -> int:
    """How many programs run at the same time at least."""
    if device.type != "cuda":
        return 4  # the interpreter: enough for several parts
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
