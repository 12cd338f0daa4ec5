"""What a run remembers of itself, so that a report needs neither the data nor the network.

One file of plain arrays in the run folder: how the verifier changed at a dozen moments of its
training (`Course`), what it made of the test pairs (`Outcome`), and a mark of each item that it has
learned from, so that it knows them again.
"""

import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.doctor.examine import fingerprints
from nearfar.errors import InputError
from nearfar.evaluate import verification
from nearfar.train.data import as_input

RECORD = "record.npz"
LEARNED_FROM = "learned_from"
HARDEST = 12  # pairs of each kind that are shown
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Course:
    """A fixed sample of calibration pairs, and of one batch's forces, at s moments of training.

    Attributes:
        step: (s,) int64 steps done; the first is 0, the last is the end.
        similar: (p,) bool, of the calibration pairs.
        distance: (s, p) float32.
        auc: (s,) of those pairs.
        eer: (s,) equal error rate.
        alignment: (s,) mean squared distance of the sample's similar pairs.
        uniformity: (s,) log of the mean of exp(-2 d^2) over all pairs of the sample.
        effective_rank: (s,) exp of the entropy of the sample's singular values.
        force_similar: (q,) bool, of the forces of a training batch.
        force_distance: (s, q) float32, how far apart the two are.
        force: (s, q) float32, > 0 pulls together, < 0 pushes apart.
    """

    step: Array
    similar: Array
    distance: Array
    auc: Array
    eer: Array
    alignment: Array
    uniformity: Array
    effective_rank: Array
    force_similar: Array
    force_distance: Array
    force: Array


@dataclass(frozen=True, eq=False)
class Outcome:
    """Some of the test pairs, the curves of all of them, and the items they are of.

    Attributes:
        learned_curve: (3, p) thresholds, false-accept and true-accept rates of the embeddings'
            distance, over all test pairs.
        raw_curve: (3, q) those of the raw input's.
        hardest: (h, 2) int32, the two items of the closest dissimilar and farthest similar pairs.
        hardest_similar: (h,) bool.
        hardest_distance: (h,) float32, of the embeddings.
        pairs: (n, 2) int32, the two items of each pair of a sample.
        similar: (n,) bool.
        learned: (n,) float32 distances of the embeddings.
        raw: (n,) float32 distances of the raw input.
        identity: (m,) int32, which of `identities` each item shows.
        identities: (c,) their names.
        names: (m,) of the items.
        mapped: (k,) int32, items whose embeddings are kept, whole identities together.
        embeddings: (k, d) float16.
        singular_values: (min(m, d),) of the embeddings of all items, largest first.
        shown: (j,) int32, items of the hardest pairs.
        inputs: (j, d) float32 vectors, or (j, c, h, w) uint8 thumbnails, of what those are.
    """

    learned_curve: Array
    raw_curve: Array
    hardest: Array
    hardest_similar: Array
    hardest_distance: Array
    pairs: Array
    similar: Array
    learned: Array
    raw: Array
    identity: Array
    identities: Array
    names: Array
    mapped: Array
    embeddings: Array
    singular_values: Array
    shown: Array
    inputs: Array


@dataclass(frozen=True, eq=False)
class Record:
    """Both."""

    course: Course
    outcome: Outcome


def write_record(folder: Path, record: Record, learned_from: Tensor) -> None:
    """All of it; `learned_from` are the items that the network or the threshold has seen."""
    arrays = {
        f"{part.name}.{field.name}": getattr(getattr(record, part.name), field.name)
        for part in fields(Record)
        for field in fields(part.type)  # type: ignore[arg-type]
    }
    arrays[LEARNED_FROM] = _marks(learned_from)
    np.savez_compressed(folder / RECORD, **arrays)


def read_record(run: Path) -> Record:
    """The record in a run folder.

    Raises:
        InputError: the run has none, or it is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        raise InputError(
            f"{run} has no {RECORD}: it was trained before runs kept one. Train again: "
            f"nearfar train --config {run}/config.toml --out NEW"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            held = _with_curves({name: arrays[name] for name in arrays.files})
            return Record(_part(Course, held, "course"), _part(Outcome, held, "outcome"))
    except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is damaged. Train again.") from None


def n_learned_from(run: Path, x: Tensor) -> int | None:
    """How many of these items (n, ...) a run has learned from; None where it does not remember.

    Raises:
        InputError: the record is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if LEARNED_FROM not in arrays:
                return None
            return int(np.isin(_marks(x), arrays[LEARNED_FROM]).sum())
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is damaged. Train again.") from None


def _marks(x: Tensor) -> Array:
    """(n,) uint64 of items (n, ...), equal where all their bits are; of others hardly ever.

    An 8-bit image among deeper ones, which make it float32, has the mark that it has by itself.
    """
    marks = np.frombuffer(b"".join(mark[:8] for mark in fingerprints(x)), dtype="<u8").copy()
    if x.ndim == 4 and x.is_floating_point():
        bytes_ = (255 * x).round().clamp(0, 255).to(torch.uint8)
        eight_bit = (as_input(bytes_) == x).flatten(1).all(1)
        if eight_bit.any():
            marks[eight_bit.numpy()] = _marks(bytes_[eight_bit])
    return marks


def _with_curves(arrays: dict[str, Array]) -> dict[str, Array]:
    """What a record before 0.1.1 lacks; all pairs that it was measured on are in its sample."""
    if "outcome.learned_curve" in arrays:
        return arrays
    similar, learned = arrays["outcome.similar"], arrays["outcome.learned"]
    added = {}
    for side in ("learned", "raw"):
        distance = arrays[f"outcome.{side}"]
        curve = verification(distance, similar, higher_is_closer=False).curve
        added[f"outcome.{side}_curve"] = np.stack([curve.threshold, curve.far, curve.tar])
    order = np.argsort(learned, kind="stable")
    same = similar[order]
    hardest = np.concatenate([order[~same][:HARDEST], order[same][::-1][:HARDEST]])
    added["outcome.hardest"] = arrays["outcome.pairs"][hardest]
    added["outcome.hardest_similar"] = similar[hardest]
    added["outcome.hardest_distance"] = learned[hardest]
    return {**arrays, **added}


Part = TypeVar("Part", Course, Outcome)


def _part(kind: type[Part], arrays: Any, name: str) -> Part:
    return kind(**{field.name: arrays[f"{name}.{field.name}"] for field in fields(kind)})
