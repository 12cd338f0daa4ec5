"""Compile what a loss would launch for a card that is not here, and say what it needs there.

Run as a program, since a process either interprets kernels or compiles them:

    python tests/gpu/ahead.py 90 128 bfloat16 clip sup_con  # capability, d, precision, losses
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

import nearfar as nf
from nearfar.engine.gpu import comparison, language, shapes
from nearfar.engine.where import running_kernels


class Card:
    """What Triton asks of a driver before it compiles: the card."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


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
def compiling(capability: int) -> Iterator[dict[int, dict]]:
    """Launches are compiled, each kernel once, and nothing runs."""
    found: dict[int, dict] = {}

    def launch(kernel, grid, shape, arguments, settings):
        made = kernel.warmup(*arguments, **settings, **language.of_shape(shape, kernel), grid=grid)
        if id(made) not in found:
            used = resources(made.asm["ptx"], capability)
            about = {"kernel": kernel.__name__, "shape": str(shape), "shared": made.metadata.shared}
            about["triton"] = triton.__version__
            found[id(made)] = {**about, **used}

    usual = language.launch, shapes.generation
    driver.set_active(Card(capability))
    language.launch = comparison.launch = launch
    shapes.generation = lambda device: capability // 10
    try:
        yield found
    finally:
        language.launch, shapes.generation = usual
        comparison.launch = language.launch


def losses(d: int, precision: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Losses that together launch every kernel in every way."""
    labels = torch.arange(64) // 4
    several = torch.eye(16, dtype=torch.bool)[labels]
    x, y = torch.randn(64, d, requires_grad=True), torch.randn(64, d)
    scale, proxies = torch.tensor(20.0, requires_grad=True), torch.randn(16, d)
    loss_of = {
        "clip": partial(nf.clip_loss, x, y, scale=scale),
        "siglip": partial(nf.siglip_loss, x, y, scale=scale, bias=-5.0),
        "sup_con": partial(nf.sup_con_loss, x, labels),
        "nt_xent": partial(nf.nt_xent_loss, x, labels),
        "multi_similarity": partial(nf.multi_similarity_loss, x, several),
        "circle": partial(nf.circle_loss, x, labels),
        "lifted_structure": partial(nf.lifted_structure_loss, x, labels),
        "lifted_pair": partial(nf.lifted_pair_loss, x, labels),
        "batch_contrastive": partial(nf.batch_contrastive_loss, x, labels),
        "batch_cosine": partial(nf.batch_cosine_loss, x, labels),
        "hard": partial(nf.batch_contrastive_loss, x, labels, margin=1.0, select="hard"),
        "info_nce": partial(nf.info_nce_loss, x, y),
        "proxy_softmax": partial(nf.proxy_softmax_loss, x, proxies, labels, scale=20.0),
    }
    return {name: partial(loss, precision=precision) for name, loss in loss_of.items()}


def losses_of_tuples(d: int, precision: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Losses of triplets and quadruplets, which are compiled by name: they spill more registers."""
    labels = torch.arange(64) // 4
    x = torch.randn(64, d, requires_grad=True)
    loss_of = {
        "hard triplets": partial(nf.batch_triplet_loss, x, labels, select="hard"),
        "semihard triplets": partial(nf.batch_triplet_loss, x, labels, select="semihard"),
        "triplets": partial(nf.batch_triplet_loss, x, labels),
        "smooth triplets": partial(nf.batch_triplet_loss, x, labels, smooth=True),
        "quadruplets": partial(nf.batch_quadruplet_loss, x, labels),
    }
    return {name: partial(loss, precision=precision) for name, loss in loss_of.items()}


def main(capability: int, d: int, precision: str, names: list[str]) -> None:
    """Print a line of JSON for each kernel."""
    known: set[int] = set()
    with running_kernels(everywhere=True), compiling(capability) as found:
        known_losses = losses(d, precision)
        if names:
            every = {**known_losses, **losses_of_tuples(d, precision)}
            known_losses = {name: every[name] for name in names}
        for name, loss in known_losses.items():
            loss().backward()
            for key in found.keys() - known:
                print(json.dumps({"loss": name, **found[key]}), flush=True)
            known |= found.keys()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
