"""What a run remembers of itself, so that a report needs neither the data nor the network.

One file of plain arrays in the run folder: how the verifier changed at a dozen moments of its
training (`Course`), what it made of the test pairs (`Outcome`), and a mark of each item that it has
learned from, so that it knows them again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfar.app.errors import InputError
from nearfar.app.train.arrays import Unreadable, load
from nearfar.app.train.data import as_input
from nearfar.doctor.examine import fingerprints
from nearfar.evaluate import verification

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
        return _checked(_with_curves(_arrays(path)))
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputError(f"{path} is damaged. Train again.") from None


def n_learned_from(run: Path, x: Tensor) -> int | None:
    """How many of these items (n, ...) a run has learned from; None where it does not remember.

    Raises:
        InputError: the record is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        return None
    marks = _arrays(path).get(LEARNED_FROM)
    if marks is None:
        return None
    if marks.dtype != np.uint64:
        raise InputError(f"{path} is damaged. Train again.")
    return int(np.isin(_marks(x), marks).sum())


def _arrays(path: Path) -> dict[str, Array]:
    try:
        found = load(path)
    except (Unreadable, MemoryError):
        found = {}
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} is damaged. Train again.")
    return found


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


# The kind of each array, and its sides: those of one letter have one length, within a part.
# Kinds are those of NumPy, and "r" for floats that may be infinite.
_FORM = {
    "course": {
        "step": "i s",
        "similar": "b p",
        "distance": "f s p",
        "auc": "f s",
        "eer": "f s",
        "alignment": "f s",
        "uniformity": "f s",
        "effective_rank": "f s",
        "force_similar": "b q",
        "force_distance": "f s q",
        "force": "f s q",
    },
    "outcome": {
        "learned_curve": "f 3 p",
        "raw_curve": "r 3 q",
        "hardest": "i h 2",
        "hardest_similar": "b h",
        "hardest_distance": "f h",
        "pairs": "i n 2",
        "similar": "b n",
        "learned": "f n",
        "raw": "r n",
        "identity": "i m",
        "identities": "U c",
        "names": "U m",
        "mapped": "i k",
        "embeddings": "f k d",
        "singular_values": "f v",
        "shown": "i j",
    },
}
# Of the numbers of items or identities: the array whose rows they are.
_ROWS = {"hardest": "names", "pairs": "names", "mapped": "names", "shown": "names"} | {
    "identity": "identities"
}


def _checked(arrays: Mapping[str, Array]) -> Record:
    """A record whose arrays fit each other.

    Raises:
        ValueError, KeyError: one does not, or is missing.
    """
    for part, form in _FORM.items():
        sides: dict[str, int] = {"2": 2, "3": 3}
        for name, described in form.items():
            kind, *letters = described.split()
            array = arrays[f"{part}.{name}"]
            if array.dtype.kind != kind.replace("r", "f") or array.ndim != len(letters):
                raise ValueError(name)
            if kind == "f" and not np.isfinite(array).all():
                raise ValueError(name)
            for letter, side in zip(letters, array.shape, strict=True):
                if (side == 0 and letter not in "hnkj") or sides.setdefault(letter, side) != side:
                    raise ValueError(name)
    record = Record(_part(Course, arrays, "course"), _part(Outcome, arrays, "outcome"))
    outcome = record.outcome
    for name, of in _ROWS.items():
        rows = getattr(outcome, name)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(getattr(outcome, of)):
            raise ValueError(name)
    if len(outcome.inputs) != len(outcome.shown) or outcome.inputs.ndim not in (2, 4):
        raise ValueError("inputs")
    if outcome.inputs.dtype.kind not in "fu" or not np.isin(outcome.hardest, outcome.shown).all():
        raise ValueError("inputs")
    return record


Part = TypeVar("Part", Course, Outcome)


def _part(kind: type[Part], arrays: Any, name: str) -> Part:
    return kind(**{field.name: arrays[f"{name}.{field.name}"] for field in fields(kind)})
