"""The record of a run, from which a report is made without the data or the network.

One file of plain arrays in the run folder: the state of the verifier at a dozen steps of training
(`Course`), its results on the test pairs (`Outcome`), and a fingerprint of each item that it
learned from, by which such an item is recognised later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nearfar.app.data.arrays import Unreadable, load
from nearfar.app.errors import InputError
from nearfar.evaluate.verification import verification

RECORD = "record.npz"
LEARNED_FROM = "learned_from"
HARDEST = 12  # similar and dissimilar pairs to show, each
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Course:
    """A fixed sample of calibration pairs, and the forces on one batch, at s steps of training.

    Attributes:
        step: (s,) int64, the number of steps done, from 0 to the last step.
        similar: (p,) bool, for the calibration pairs.
        distance: (s, p) float32, their distances.
        auc: (s,) area under the ROC curve of those pairs.
        eer: (s,) equal error rate of those pairs.
        alignment: (s,) mean squared distance of the sample's similar pairs.
        uniformity: (s,) log of the mean of exp(-2 d^2) over all pairs of the sample.
        effective_rank: (s,) exp of the entropy of the sample's singular values.
        force_similar: (q,) bool, for the pairs of a training batch.
        force_distance: (s, q) float32, their distances.
        force: (s, q) float32, the forces on them: > 0 pulls together, < 0 pushes apart.
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
    """Some of the test pairs, the ROC curves over all of them, and the items of those pairs.

    Attributes:
        learned_curve: (3, p) thresholds, false-accept rates and true-accept rates of the
            embeddings' distance, over all test pairs.
        raw_curve: (3, q) the same for the distance of the raw input.
        hardest: (h, 2) int32, the two items of the closest dissimilar and farthest similar pairs.
        hardest_similar: (h,) bool.
        hardest_distance: (h,) float32, distances of their embeddings.
        pairs: (n, 2) int32, the two items of each pair in a sample.
        similar: (n,) bool.
        learned: (n,) float32 distances of the embeddings.
        raw: (n,) float32 distances of the raw input.
        identity: (m,) int32, index into `identities` for each item.
        identities: (c,) names of the identities.
        names: (m,) names of the items.
        mapped: (k,) int32, items whose embeddings are kept, whole identities together.
        embeddings: (k, d) float16, embeddings of the items in `mapped`.
        singular_values: (min(m, d),) singular values of all embeddings, largest first.
        shown: (j,) int32, items of the hardest pairs.
        inputs: what the items in `shown` hold: (j, d) float32 vectors, (j, c, h, w) uint8
            thumbnails, or (j,) texts.
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
    """The course of training, and its outcome on the test pairs."""

    course: Course
    outcome: Outcome


def write_record(folder: Path, record: Record, learned_from: Sequence[bytes]) -> None:
    """Write the record; `learned_from`: fingerprints of what the network or threshold has seen."""
    arrays = {
        f"{part.name}.{field.name}": getattr(getattr(record, part.name), field.name)
        for part in fields(Record)
        for field in fields(part.type)  # type: ignore[arg-type]
    }
    arrays[LEARNED_FROM] = _shortened(learned_from)
    np.savez_compressed(folder / RECORD, **arrays)


def read_record(run: Path) -> Record:
    """The record in a run folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        raise InputError(
            f"{run} has no {RECORD}: it was trained by an older nearfar. Train again: "
            f"nearfar train --config {run}/config.toml --out NEW"
        )
    try:
        return _checked(_with_curves(_arrays(path)))
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputError(f"{path} is damaged. Train again.") from None


def n_learned_from(run: Path, fingerprints: Sequence[bytes]) -> int | None:
    """How many of the items a run has learned from; None if its record does not say.

    Raises:
        InputError: the record is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        return None
    known = _arrays(path).get(LEARNED_FROM)
    if known is None:
        return None
    if known.dtype != np.uint64:
        raise InputError(f"{path} is damaged. Train again.")
    return int(np.isin(_shortened(fingerprints), known).sum())


def _arrays(path: Path) -> dict[str, Array]:
    try:
        found = load(path)
    except (Unreadable, MemoryError):
        found = {}
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} is damaged. Train again.")
    return found


def _shortened(fingerprints: Sequence[bytes]) -> Array:
    """(n,) uint64, the first half of each fingerprint."""
    return np.frombuffer(b"".join(one[:8] for one in fingerprints), dtype="<u8").copy()


def _with_curves(arrays: dict[str, Array]) -> dict[str, Array]:
    """Add the curves that a record before 0.1.1 lacks; its sample holds all of its test pairs."""
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


# The dtype kind of each array and its axes: within a part, axes of one letter have one length.
# Kinds are those of NumPy, or "r" for floats that may be infinite.
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
# For arrays of indices: the array they index.
_ROWS = {"hardest": "names", "pairs": "names", "mapped": "names", "shown": "names"} | {
    "identity": "identities"
}


def _checked(arrays: Mapping[str, Array]) -> Record:
    """Build the record, after checking that its arrays fit each other.

    Raises:
        ValueError: an array does not fit.
        KeyError: an array is missing.
    """
    for part, form in _FORM.items():
        lengths: dict[str, int] = {"2": 2, "3": 3}
        for name, described in form.items():
            kind, *letters = described.split()
            array = arrays[f"{part}.{name}"]
            if array.dtype.kind != kind.replace("r", "f") or array.ndim != len(letters):
                raise ValueError(name)
            if kind == "f" and not np.isfinite(array).all():
                raise ValueError(name)
            for letter, n in zip(letters, array.shape, strict=True):
                if (n == 0 and letter not in "hnkj") or lengths.setdefault(letter, n) != n:
                    raise ValueError(name)
    record = Record(_part(Course, arrays, "course"), _part(Outcome, arrays, "outcome"))
    outcome = record.outcome
    for name, of in _ROWS.items():
        rows = getattr(outcome, name)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(getattr(outcome, of)):
            raise ValueError(name)
    axes = {"f": (2, 4), "u": (2, 4), "U": (1,)}.get(outcome.inputs.dtype.kind, ())
    if len(outcome.inputs) != len(outcome.shown) or outcome.inputs.ndim not in axes:
        raise ValueError("inputs")
    if not np.isin(outcome.hardest, outcome.shown).all():
        raise ValueError("inputs")
    return record


Part = TypeVar("Part", Course, Outcome)


def _part(kind: type[Part], arrays: Any, name: str) -> Part:
    return kind(**{field.name: arrays[f"{name}.{field.name}"] for field in fields(kind)})
