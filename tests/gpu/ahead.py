"""Compile what a loss would launch for a card that is not here, and say what it needs there.

Run as a program, since a process either interprets kernels or compiles them:

    python tests/gpu/ahead.py 90 clip sup_con      # compute capability, names of losses; all: none
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from nearfar.engine.gpu import language

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have


def signature(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """The type of an argument as the compiler takes it; notes what is constant or aligned."""
    if isinstance(value, tuple):
        made = [signature(v, (*path, k), constants, attributes) for k, v in enumerate(value)]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype]
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32"


def compiled(kernel: Any, shape: Any, arguments: tuple, settings: dict, capability: int) -> dict:
    constants, attributes = {}, {}
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    types = {n: signature(v, (k,), constants, attributes) for k, (n, v) in enumerate(given.items())}
    for name, value in {**settings, "ROWS": shape.rows, "COLUMNS": shape.columns}.items():
        types[name] = "constexpr"
        constants[(names.index(name),)] = value
    source = ASTSource(kernel, types, constants, attributes)
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = resources(made.asm["ptx"], capability)
    return {"kernel": kernel.__name__, "shared": made.metadata.shared, **used}


def resources(ptx: str, capability: int) -> dict:
    """Registers and spilled bytes, as the assembler reports them."""
    assembler = get_ptxas(capability).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [assembler, "-v", f"--gpu-name={name}", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = (
        int(re.search(pattern, said)[1]) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st")
    )
    return {"registers": used, "spilled": spilled, "serialized": "wgmma" in said}


@contextmanager
def compiling(capability: int) -> Iterator[list[dict]]:
    """Launches are compiled, and nothing runs."""
    found: list[dict] = []
    seen = set()

    def launch(kernel, grid, shape, arguments, settings):
        key = repr(
            (
                kernel.__name__,
                shape,
                sorted(settings.items(), key=str),
                [
                    [v.dtype if isinstance(v, torch.Tensor) else v is None for v in a]
                    if isinstance(a, tuple)
                    else type(a)
                    for a in arguments
                ],
            )
        )
        if key not in seen:
            seen.add(key)
            found.append(
                {**compiled(kernel, shape, arguments, settings, capability), "shape": str(shape)}
            )

    from nearfar.engine.gpu import comparison

    usual = language.launch
    language.launch = comparison.launch = launch
    try:
        yield found
    finally:
        language.launch = comparison.launch = usual


def main(capability: int, names: list[str]) -> None:
    import nearfar as nf
    from nearfar.engine.where import running_kernels

    n = 64
    labels = torch.arange(n) // 4
    losses = {
        "clip": lambda x, y, p: nf.clip_loss(x, y, scale=20.0, precision=p),
        "sup_con": lambda x, y, p: nf.sup_con_loss(x, labels, precision=p),
        "circle": lambda x, y, p: nf.circle_loss(x, labels, precision=p),
        "nt_xent": lambda x, y, p: nf.nt_xent_loss(x, labels, precision=p),
        "lifted": lambda x, y, p: nf.lifted_structure_loss(x, labels, precision=p),
        "lifted pair": lambda x, y, p: nf.lifted_pair_loss(x, labels, precision=p),
    }
    for name in names or losses:
        for d in (128, 256, 512):
            for precision in ("bfloat16", "float32"):
                x, y = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
                with running_kernels(everywhere=True), compiling(capability) as found:
                    losses[name](x, y, precision).backward()
                for each in found:
                    print(name, d, precision, json.dumps(each), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
