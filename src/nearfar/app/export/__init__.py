"""Export a run: a folder with which other programs verify, without nearfar and without torch."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import nearfar
from nearfar.app.errors import InputError
from nearfar.app.export.inputs import N_TESTS, TEST_IMAGE, TOKENIZER, ModelInput, input_of
from nearfar.app.export.model import check_installed, embed_by_file, write_onnx
from nearfar.app.output import FolderKind, whole_folder
from nearfar.app.templates import templates
from nearfar.app.train.run import Run, read_run, refuse_inside_run
from nearfar.distance import Distance, between_rows
from nearfar.evaluate import PlattProbability

FORMAT = 1  # of the exported folder
MODEL, THRESHOLD, README = "model.onnx", "threshold.json", "README.md"
TESTS, EXAMPLE = "test_vectors.npz", "verify.py"
FILES = (MODEL, f"{MODEL}.data", THRESHOLD, TOKENIZER, README, TESTS, TEST_IMAGE, EXAMPLE)
EXPORTED = FolderKind("an export", "--onnx", (MODEL, THRESHOLD, EXAMPLE), FILES)
BATCHES = (1, 2, 7, 33)  # sizes with which a written model is tried
CLOSE = 1e-5  # how far a distance by the written model may be from that of the run


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        out: the folder.
        files: the names of its files.
        input: as in `threshold.json`.
        embedding_dim: the length of an embedding.
        size: of the model, in bytes.
        disagreement: the largest difference of a distance by the written model from that of the
            run, among made-up items in batches of several sizes.
    """

    out: str
    files: tuple[str, ...]
    input: Mapping[str, Any]
    embedding_dim: int
    size: int
    disagreement: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self)

    def render(self) -> list[str]:
        """For a terminal."""
        shape = " x ".join(map(str, ["n", *self.input["shape"]]))
        return [
            f"wrote {self.out}: {', '.join(self.files)}",
            f"{MODEL}: {self.input['dtype']} {shape} to embeddings n x {self.embedding_dim}, "
            f"{self.size / 1e6:.1f} MB",
            f"checked with onnxruntime in batches of {', '.join(map(str, BATCHES))}: distances "
            f"differ from the run's by at most {self.disagreement:.1g}",
            f"next: python {self.out}/{EXAMPLE} A B",
        ]


def export_onnx(path: Path, out: Path, *, overwrite: bool = False) -> Exported:
    """Write a run as ONNX, with its threshold, a description, test vectors and an example.

    Args:
        path: the run folder.
        out: the folder to write, completely or not at all.
        overwrite: whether an older export may be replaced.

    Raises:
        InputError: the run cannot be used or exported, or the written model disagrees with it.
    """
    refuse_inside_run(out, "--onnx")
    EXPORTED.refuse_existing(out, overwrite=overwrite)
    check_installed()
    run = read_run(path)
    form = input_of(run)
    model = form.module(run.embedder).eval()
    with whole_folder(out, EXPORTED, overwrite=overwrite) as folder:
        write_onnx(model, form.examples(2), form.names, form.axes, folder / MODEL)
        disagreement = _disagreement(model, run.distance, form, folder / MODEL)
        threshold = _threshold(run, form, folder / MODEL)
        _write_tests(model, run.distance, form, folder)
        text = json.dumps(threshold, indent=2, allow_nan=False) + "\n"
        (folder / THRESHOLD).write_text(text, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(EXAMPLE), folder / EXAMPLE)
        files = {file.name for file in folder.iterdir()} | {README}
        _write_readme(folder, {**threshold, "files": files})
        size = (folder / MODEL).stat().st_size
    ordered = tuple(name for name in FILES if name in files)
    d = threshold["embedding_dim"]
    return Exported(str(out), ordered, form.described(), d, size, disagreement)


def _disagreement(model: nn.Module, distance: Distance, form: ModelInput, file: Path) -> float:
    """The largest difference of a distance; see `Exported`.

    Raises:
        InputError: it is too large.
    """
    batches = [form.examples(n) for n in BATCHES]
    with torch.inference_mode():
        ours = torch.cat([model(*batch) for batch in batches])
    theirs = torch.cat(embed_by_file(file, form.names, batches))
    i, j = torch.tensor(list(combinations(range(len(ours)), 2))).unbind(1)
    by_file = between_rows(theirs[i], theirs[j], distance)
    difference = (by_file - between_rows(ours[i], ours[j], distance)).abs().max().item()
    if not difference <= CLOSE:  # also refuses NaN
        raise InputError(
            f"the exported model gives other distances than the run, by up to {difference:.2g} "
            f"where {CLOSE:g} is allowed, so it is not kept. Does the encoder behave differently "
            "while torch.compiler.is_compiling()?"
        )
    return difference


def _threshold(run: Run, form: ModelInput, model: Path) -> dict[str, Any]:
    """Everything needed to decide, apart from the model."""
    return {
        "format": FORMAT,
        "nearfar": nearfar.__version__,
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "input": form.described(),
        "embedding_dim": run.embedder.embedding_dim,
        "distance": run.distance,
        "threshold": run.thresholds.learned,
        "far": run.thresholds.far,
        "log_likelihood_ratio": run.probability and _log_likelihood_ratio(run.probability),
    }


def _log_likelihood_ratio(probability: PlattProbability) -> dict[str, float]:
    """Its line over the distance, and its limits."""
    at_share = log(probability.share) - log(1 - probability.share)
    low, high = map(log, probability.limits)
    return {
        "slope": probability.slope,
        "intercept": probability.intercept - at_share,
        "low": low,
        "high": high,
    }


def _write_tests(model: nn.Module, distance: Distance, form: ModelInput, folder: Path) -> None:
    """Items, their embeddings and distances, by which another implementation checks itself."""
    beside = form.write_beside(folder)
    items = form.examples(N_TESTS)
    with torch.inference_mode():
        x = model(*items)
    i, j = torch.cartesian_prod(*[torch.arange(N_TESTS)] * 2).unbind(1)
    arrays = {name: item.numpy() for name, item in zip(form.names, items, strict=True)}
    arrays |= {
        "embeddings": x.numpy(),
        "distance": between_rows(x[i], x[j], distance).view(N_TESTS, N_TESTS).numpy(),
        **beside,
    }
    np.savez_compressed(folder / TESTS, **arrays)  # type: ignore[arg-type]


def _write_readme(folder: Path, found: Mapping[str, Any]) -> None:
    close = f"{CLOSE:.0e}".replace("e-0", "e-")
    environment = templates("nearfar.app.export", html=False)
    text = environment.get_template(README).render(found, close=close, n=N_TESTS)
    (folder / README).write_text(text, encoding="utf-8")
