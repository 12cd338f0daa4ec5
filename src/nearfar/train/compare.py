"""What training bought: the figures of the embeddings beside those of the raw input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.distance import Distance, between_rows
from nearfar.evaluate import (
    AtThreshold,
    Verification,
    at_threshold,
    fit_threshold,
    sample_pairs,
    verification,
)
from nearfar.evaluate.intervals import FEWEST_IDENTITIES
from nearfar.evaluate.plain import number
from nearfar.evaluate.verification import ERRORS_NEEDED
from nearfar.tabulate import Table
from nearfar.train.data import Items, Pairs, as_input

N_PAIRS = 8000
CHUNK = 512  # items or pairs at a time


@dataclass(frozen=True, eq=False)
class Distances:
    """Labelled pairs and how far apart they are, twice.

    Attributes:
        pairs: (n, 2) int64, the two items of each pair.
        identities: (n, 2) int64, the identities of the two.
        similar: (n,) bool.
        learned: (n,) distances of the embeddings.
        raw: (n,) Euclidean distances of the raw input.
        items: (m,) int64, the items that are in these pairs, each once.
        embeddings: (m, d) of those.
    """

    pairs: Tensor
    identities: Tensor
    similar: Tensor
    learned: Tensor
    raw: Tensor
    items: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Thresholds:
    """Fitted on the same calibration pairs, at the same false-accept rate.

    Attributes:
        learned: of the embeddings' distance.
        raw: of the raw input's.
        far: the rate.
    """

    learned: float
    raw: float
    far: float


@dataclass(frozen=True)
class Comparison:
    """Figures of the embeddings and of the raw input on the same pairs.

    Attributes:
        n_identities: how many identities the pairs are of.
        learned: figures of the embeddings' distance.
        raw: figures of the raw input's.
        learned_at: those at the fitted threshold.
        raw_at: those at the raw input's fitted threshold.
        fitted_far: the false-accept rate both thresholds were fitted at.
    """

    n_identities: int
    learned: Verification
    raw: Verification
    learned_at: AtThreshold
    raw_at: AtThreshold
    fitted_far: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "n_identities": self.n_identities,
            "n_similar": self.learned.n_similar,
            "n_dissimilar": self.learned.n_dissimilar,
            "fitted_far": self.fitted_far,
            "learned": _figures(self.learned, self.learned_at),
            "raw": _figures(self.raw, self.raw_at),
        }


def embed(embedder: nn.Module, x: Tensor) -> Tensor:
    """(n, d) embeddings of items, as they were read; the embedder is left in evaluation mode."""
    embedder.eval()
    device = next(iter([*embedder.parameters(), *embedder.buffers()])).device
    with torch.no_grad():
        return torch.cat([embedder(as_input(part).to(device)).cpu() for part in _chunks(x)])


def item_distances(
    embedder: nn.Module, items: Items, identities: Tensor, distance: Distance, *, seed: int
) -> Distances:
    """Balanced pairs of the items of these identities, chosen by seed."""
    rows = torch.isin(items.identity, identities).nonzero()[:, 0]
    a, b, similar = sample_pairs(items.identity[rows], N_PAIRS, seed)
    return _distances(embedder, items, torch.stack([rows[a], rows[b]], 1), similar, distance)


def pair_distances(
    embedder: nn.Module, pairs: Pairs, rows: Tensor, distance: Distance
) -> Distances:
    """These rows of the given pairs."""
    both = torch.stack([pairs.a[rows], pairs.b[rows]], 1)
    return _distances(embedder, pairs.items, both, pairs.is_similar()[rows], distance)


def fit(calibration: Distances, far: float) -> Thresholds:
    """The thresholds that calibration pairs give."""
    learned, raw = (
        fit_threshold(distances, calibration.similar, higher_is_closer=False, far=far)
        for distances in (calibration.learned, calibration.raw)
    )
    return Thresholds(learned, raw, far)


def compare(test: Distances, thresholds: Thresholds, n_identities: int) -> Comparison:
    """All figures of both distances, with intervals where there are identities enough."""
    given: dict[str, Any] = {
        "similar": test.similar,
        "groups": test.identities,
        "higher_is_closer": False,
    }
    return Comparison(
        n_identities,
        verification(test.learned, **given),
        verification(test.raw, **given),
        at_threshold(test.learned, threshold=thresholds.learned, **given),
        at_threshold(test.raw, threshold=thresholds.raw, **given),
        thresholds.far,
    )


def table(found: Comparison) -> Table:
    """Each figure of the embeddings, where it is likely to lie, and the same one of the raw input.

    A figure that takes more dissimilar pairs than there are is a dash.
    """
    learned, raw = found.learned, found.raw
    at, raw_at = found.learned_at, found.raw_at
    of, of_at = learned.intervals, at.intervals
    figures = [
        ("AUC", learned.auc, of and of.auc, raw.auc),
        ("EER", learned.eer, of and of.eer, raw.eer),
        *(
            (f"TAR at FAR {far:.3g}", tar, of and of.tar_at_far[far], raw.tar_at_far[far])
            for far, tar in learned.tar_at_far.items()
        ),
        ("FAR at the threshold", at.far, of_at and of_at.far, raw_at.far),
        ("TAR at the threshold", at.tar, of_at and of_at.tar, raw_at.tar),
        ("accuracy at the threshold", at.accuracy, of_at and of_at.accuracy, raw_at.accuracy),
    ]
    rows = [
        (name, number(value), str(span or "-"), number(other))
        for name, value, span, other in figures
    ]
    level = f"{of.level:.0%} interval" if of else "interval"
    return Table(("figure", "learned", level, "raw input"), rows)


def dashes(found: Comparison) -> str:
    """What the dashes of `table` mean; empty where it has none."""
    if found.learned.intervals and None not in found.learned.tar_at_far.values():
        return ""
    return (
        f"-: too few to tell. Intervals take {FEWEST_IDENTITIES} identities among the similar and "
        f"{FEWEST_IDENTITIES} among the dissimilar pairs, a rate at FAR f takes "
        f"{ERRORS_NEEDED} / f dissimilar pairs."
    )


def _distances(
    embedder: nn.Module, items: Items, pairs: Tensor, similar: Tensor, distance: Distance
) -> Distances:
    used, index = pairs.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    embeddings = embed(embedder, items.x[used])
    learned = between_rows(embeddings[index[:, 0]], embeddings[index[:, 1]], distance)
    raw = [raw_distance(items.x[part[:, 0]], items.x[part[:, 1]]) for part in _chunks(pairs)]
    identities = items.identity[pairs]
    return Distances(pairs, identities, similar, learned, torch.cat(raw), used, embeddings)


def raw_distance(x1: Tensor, x2: Tensor) -> Tensor:
    """Euclidean distance of items as they were read."""
    return between_rows(as_input(x1).flatten(1), as_input(x2).flatten(1), "euclidean")


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def _figures(found: Verification, at: AtThreshold) -> Mapping[str, Any]:
    """What does not depend on the choice of a threshold on the test pairs themselves."""
    figures = found.as_dict()
    chosen = ("auc", "eer", "tar_at_far", "intervals")
    return {**{name: figures[name] for name in chosen}, "at_threshold": at.as_dict()}
