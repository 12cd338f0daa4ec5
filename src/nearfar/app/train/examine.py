"""`nearfar doctor`: what is wrong with a run, or with a file of embeddings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nearfar.app.data.items import read_arrays, read_data
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.tables import SUFFIXES as TABLES
from nearfar.app.train.checkup import examine_record
from nearfar.app.train.record import RECORD, read_record
from nearfar.app.train.run import read_metrics, read_results
from nearfar.app.train.text_evidence import text_facts
from nearfar.doctor import Diagnosis, Evidence, diagnose, examine
from nearfar.doctor.rules import name_of
from nearfar.doctor.text_rules import copied_texts, cut_off_texts, telling_scripts

OF_TEXTS = {name_of(rule) for rule in (copied_texts, cut_off_texts, telling_scripts)}


def examine_path(path: Path, *, similar_label: int | None = None) -> Diagnosis:
    """Look for problems in a run folder, in an .npz of embeddings or in a table of texts.

    Args:
        path: a folder written by `train`; or a file as written by `embed`, with (n, d) embeddings
            `x` and, optionally, (n,) identities `y` as integers or text; or a table of texts.
        similar_label: for a table of pairs with numeric labels.

    Raises:
        InputError: `path` is neither, or is damaged.
    """
    if path.suffix.lower() == ".npz":
        return _examine_embeddings(path)
    if path.is_file() and path.suffix.lower() in TABLES:
        return _examine_texts(path, similar_label)
    if path.is_file():
        raise InputError(
            f"{path} is neither a run folder nor an .npz of embeddings. Name the folder given to "
            "`nearfar train --out`, a file written by `nearfar embed`, or a table of texts."
        )
    run = read_results(path)  # without the network, whose code may be missing
    outcome = read_record(path).outcome if (path / RECORD).is_file() else None
    return examine_record(run.config, run.summary, read_metrics(path), outcome)


def _examine_texts(path: Path, similar_label: int | None) -> Diagnosis:
    data = read_data(str(path), Reads(shape=(), texts=True), similar_label=similar_label)
    found = diagnose(Evidence(texts=text_facts(data, None)))
    asked = {what: names for what, names in found.not_asked.items() if {*names} <= OF_TEXTS}
    return replace(found, not_asked=asked)


def _examine_embeddings(path: Path) -> Diagnosis:
    arrays = read_arrays(path)
    if "x" not in arrays:
        raise InputError(f"{path} has no array 'x'; it has: {', '.join(arrays) or 'none'}.")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim != 2 or x.dtype.kind not in "fiu" or 0 in x.shape:
        raise InputError(
            f"{path}: x has shape {x.shape} and dtype {x.dtype}; it must be (n, d) "
            "numbers, one embedding per row. `nearfar embed` writes such a file."
        )
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iuUS"):
        raise InputError(
            f"{path}: y has shape {y.shape} and dtype {y.dtype}; it must be "
            f"({len(x)},) integers or text, the identity of each row of x."
        )
    labels = None if y is None else np.unique(y, return_inverse=True)[1]
    with np.errstate(over="ignore"):  # the rules find rows that are not finite
        return examine(torch.from_numpy(x.astype(np.float32)), labels)
