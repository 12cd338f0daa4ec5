"""How much memory does a run on large photos take, and which part of it is slow?

Makes photos of random textures, trains a network of timm on them, and reads the peak of resident
memory and the rates that the run prints. Beside that, it decodes some by threads and by processes.

    pip install 'nearfar[app,vision]'
    python benchmarks/photos.py [--files 20000] [--encoder timm:resnet18] [--json photos.json]
"""

import os
import re
import resource
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import passive  # noqa: F401
import torch
from measure import arguments, header, run_tool, save
from PIL import Image

from nearfar.app.data.fit import Fit
from nearfar.app.data.pixels import read_picture

SIDE, EACH, STEPS = 256, 8, 300
FIT = Fit(224, 224, 3, "bicubic", 235, keeps_shape=True)
DECODED = 1000
SETTINGS = ("--weights", "random", "--identities", "16", "--items", "2", "--no-report")


def make(folder: Path, n: int) -> None:
    """n JPEG photos of about 10 kB, of n / 8 identities: smooth textures with noise."""
    random = np.random.default_rng(0)
    for identity in range(n // EACH):
        (folder / f"{identity:05d}").mkdir(parents=True)
        texture = random.integers(0, 256, (12, 12, 3))
        for number in range(EACH):
            small = np.clip(texture + random.normal(0, 25, texture.shape), 0, 255).astype(np.uint8)
            large = np.asarray(
                Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            )
            noisy = np.clip(large + random.normal(0, 3, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{identity:05d}/{number}.jpg", quality=72)


def decode(files: list[Path]) -> int:
    return sum(len(read_picture(file, FIT).pixels) for file in files)


def decoding(files: list[Path], workers: int) -> dict[str, float]:
    """Images per second by threads, and by processes, which are warm."""
    pools: dict[str, Executor] = {
        "threads": ThreadPoolExecutor(workers),
        "processes": ProcessPoolExecutor(workers, mp_context=get_context("spawn")),
    }
    parts = [files[start : start + 20] for start in range(0, len(files), 20)]
    found = {}
    for kind, pool in pools.items():
        with pool:
            list(pool.map(decode, parts[:workers]))
            start = time.perf_counter()
            list(pool.map(decode, parts))
            found[kind] = len(files) / (time.perf_counter() - start)
    return found


def trained(folder: Path, out: Path, encoder: str, steps: int, threads: int) -> dict[str, Any]:
    """The peak of resident memory of a run, its rates as printed, and the seconds it took."""
    command = ["train", str(folder), "--out", str(out), "--encoder", encoder]
    seconds, printed = run_tool(*command, "--steps", str(steps), *SETTINGS, threads=threads)
    rates = re.search(r"decoding: ([\d,]+) images/s.*network: ([\d,]+) images/s", printed)
    if rates is None:
        sys.exit("these images fit into memory: ask for more --files")
    decoded, network = (float(rate.replace(",", "")) for rate in rates.groups())
    # The largest of the child processes so far, in kB on Linux.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"peak_bytes": peak, "decoded_s": decoded, "network_s": network, "seconds": seconds}


def main() -> None:
    parser = arguments(__doc__, "threads")
    parser.add_argument("--files", type=int, default=20_000, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--encoder", default="timm:resnet18")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    header("Large photos")
    with TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        make(folder, asked.files)
        result = trained(folder, Path(place) / "run", asked.encoder, asked.steps, asked.threads)
        files = sorted(folder.glob("*/*.jpg"))[:DECODED]
        result |= {"files": asked.files, "encoder": asked.encoder, "steps": asked.steps}
        result["decoding"] = decoding(files, os.cpu_count() or 1)
    print(f"peak {result['peak_bytes'] / 1e9:.2f} GB, {result['seconds']:.0f} s; decoding alone:")
    for kind, rate in result["decoding"].items():
        print(f"  {rate:,.0f} images/s by {kind}")
    save(asked.json, [result])


if __name__ == "__main__":
    main()
