"""Small data for the tool's tests: vectors, images and pairs that a few steps can learn."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# The tensors are tiny: a second thread costs more than it brings, many times so on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
# GPU kernels run in Triton's interpreter, which must be known before Triton is loaded.
os.environ.setdefault("TRITON_INTERPRET", "1")

SMALL = ("--items", "4", "--embedding-dim", "16", "--no-report")
# 8 calibration identities, 28 pairs of them, allow for no lower rate.
QUICK = ("--steps", "40", "--identities", "16", "--far", "0.2", *SMALL)


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def nearfar(capsys):
    """Run the command line in this process."""
    from nearfar.app.cli import main

    def run(*arguments) -> Ran:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Ran(status, said.out, said.err)

    return run


def make_vectors(n_identities=40, n_items=8, dim=8, noise=3.0, seed=0):
    """Identities differ in half of the columns; the others are louder and say nothing."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(n_identities, 1, dim // 2))
    signal = centre + 0.1 * random.normal(size=(n_identities, n_items, dim // 2))
    loud = noise * random.normal(size=(n_identities, n_items, dim - dim // 2))
    x = np.concatenate([signal, loud], 2).reshape(-1, dim).astype(np.float32)
    return x, np.repeat(np.arange(n_identities), n_items)


def make_images(n_identities=12, n_items=4, side=16, seed=0):
    """(n, side, side) uint8: blotches of its own for each identity, under changing light."""
    random = np.random.default_rng(seed)
    blotches = random.random((n_identities, 4, 4)).repeat(side // 4, 1).repeat(side // 4, 2)
    light = random.uniform(0, 0.5, size=(n_identities, n_items, 1, 1))
    x = 0.5 * blotches[:, None] + light + 0.02 * random.random((n_identities, n_items, side, side))
    return (x.reshape(-1, side, side).clip(0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def vectors(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "vectors.npz"
    x, y = make_vectors()
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Images of several formats, sizes and modes, in a subfolder per identity."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images") / "photos"
    for i, pixels in enumerate(make_images()):
        identity, item = divmod(i, 4)
        image = Image.fromarray(pixels).resize((20 + item, 24))
        path = root / f"person {identity:02d}" / f"{item}.{'png' if item % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert(["L", "RGB", "L", "L"][item]).save(path)
    (root / "notes.txt").write_text("not an image")
    return root


def pair_rows(y, n_dissimilar=600, seed=0):
    """Each item with the next of its identity, and random items of two."""
    random = np.random.default_rng(seed)
    near = [(i, i + 1, True) for i in range(len(y) - 1) if y[i] == y[i + 1]]
    drawn = random.integers(0, len(y), size=(4 * n_dissimilar, 2))
    far = [(a, b, False) for a, b in drawn.tolist() if y[a] != y[b]][:n_dissimilar]
    return near + far


def write_csv(path: Path, header, rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="session")
def pairs_csv(tmp_path_factory) -> Path:
    """Pairs of vectors as text, labelled true and false."""
    x, y = make_vectors()
    cells = [" ".join(f"{value:.5f}" for value in row) for row in x]
    rows = [(cells[a], cells[b], str(same).lower()) for a, b, same in pair_rows(y)]
    return write_csv(tmp_path_factory.mktemp("pairs") / "pairs.csv", ("a", "b", "label"), rows)


@pytest.fixture(scope="session")
def vector_run(tmp_path_factory, vectors) -> Path:
    """A run trained on `vectors`."""
    from nearfar.app.cli import main

    out = tmp_path_factory.mktemp("runs") / "vectors"
    assert main(["train", str(vectors), "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="session")
def image_run(tmp_path_factory, folder) -> Path:
    """A run trained on `folder`."""
    from nearfar.app.cli import main

    out = tmp_path_factory.mktemp("runs") / "images"
    options = ["--image-size", "16", *QUICK]
    assert main(["train", str(folder), "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="session")
def vector_gallery(tmp_path_factory, vector_run, vectors) -> Path:
    """The items of `vectors` in a gallery of `vector_run`."""
    from nearfar.app.cli import main

    out = tmp_path_factory.mktemp("galleries") / "vectors.gallery"
    assert main(["enroll", str(vector_run), str(vectors), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory) -> Path:
    """A run trained on the built-in letters, for a moment."""
    from nearfar.app.cli import main

    out = tmp_path_factory.mktemp("runs") / "glyphs"
    options = ["--steps", "12", "--identities", "16", "--loss", "contrastive", "--no-report"]
    options += ["--calibration-share", "0.06", "--test-share", "0.06"]
    assert main(["train", "glyphs", "--out", str(out), *options]) == 0
    return out


def near_duplicates(seed: int, apart: float) -> Tensor:
    """Seven rows of nearly one direction and others, of any length, in float32."""
    chance = torch.Generator().manual_seed(seed)
    d = (8, 32, 128)[seed % 3]
    base = torch.randn(1, d, generator=chance)
    near = base + apart * torch.randn(6, d, generator=chance)
    others = torch.randn(5, d, generator=chance)
    return torch.cat([base, near, others]) * (1 + torch.rand(12, 1, generator=chance))
