"""What training bought: the figures of the embeddings beside those of the raw input."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.distance import Distance, between_rows
from nearfar.evaluate.verification import (
    AtThreshold,
    Verification,
    at_threshold,
    fit_threshold,
    sample_pairs,
    verification,
)
from nearfar.tabulate import Table
from nearfar.train.data import Items, Pairs, as_input

N_PAIRS = 8000
CHUNK = 512  # items or pairs at a time


@dataclass(frozen=True, eq=False)
class Distances:
    """Labelled pairs and how far apart they are, twice.

    Attributes:
        similar: (n,) bool.
        learned: (n,) distances of the embeddings.
        raw: (n,) Euclidean distances of the raw input.
    """

    similar: Tensor
    learned: Tensor
    raw: Tensor


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
    return _distances(embedder, items.x[rows], a, b, similar, distance)


def pair_distances(
    embedder: nn.Module, pairs: Pairs, rows: Tensor, distance: Distance
) -> Distances:
    """These rows of the given pairs."""
    a, b, similar = pairs.a[rows], pairs.b[rows], pairs.is_similar()[rows]
    used, index = torch.unique(torch.cat([a, b]), return_inverse=True)
    a, b = index.view(2, -1)
    return _distances(embedder, pairs.items.x[used], a, b, similar, distance)


def fit(calibration: Distances, far: float) -> Thresholds:
    """The thresholds that calibration pairs give."""
    learned, raw = (
        fit_threshold(distances, calibration.similar, higher_is_closer=False, far=far)
        for distances in (calibration.learned, calibration.raw)
    )
    return Thresholds(learned, raw, far)


def compare(test: Distances, thresholds: Thresholds, n_identities: int) -> Comparison:
    """All figures of both distances."""
    figures = partial(verification, similar=test.similar, higher_is_closer=False)
    decisions = partial(at_threshold, similar=test.similar, higher_is_closer=False)
    return Comparison(
        n_identities,
        figures(test.learned),
        figures(test.raw),
        decisions(test.learned, threshold=thresholds.learned),
        decisions(test.raw, threshold=thresholds.raw),
        thresholds.far,
    )


def table(found: Comparison) -> Table:
    """Each figure of the embeddings beside the same one of the raw input."""
    pairs = [
        ("AUC", found.learned.auc, found.raw.auc),
        ("EER", found.learned.eer, found.raw.eer),
        *(
            (f"TAR at FAR {far:.3g}", tar, found.raw.tar_at_far[far])
            for far, tar in found.learned.tar_at_far.items()
        ),
        ("FAR at the threshold", found.learned_at.far, found.raw_at.far),
        ("TAR at the threshold", found.learned_at.tar, found.raw_at.tar),
        ("accuracy at the threshold", found.learned_at.accuracy, found.raw_at.accuracy),
    ]
    rows = [(name, f"{learned:.4f}", f"{raw:.4f}") for name, learned, raw in pairs]
    return Table(("figure", "learned", "raw input"), rows)


def _distances(
    embedder: nn.Module, x: Tensor, a: Tensor, b: Tensor, similar: Tensor, distance: Distance
) -> Distances:
    embeddings = embed(embedder, x)
    learned = between_rows(embeddings[a], embeddings[b], distance)
    parts = zip(_chunks(a), _chunks(b), strict=True)
    raw = torch.cat([raw_distance(x[rows_a], x[rows_b]) for rows_a, rows_b in parts])
    return Distances(similar, learned, raw)


def raw_distance(x1: Tensor, x2: Tensor) -> Tensor:
    """Euclidean distance of items as they were read."""
    return between_rows(as_input(x1).flatten(1), as_input(x2).flatten(1), "euclidean")


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def _figures(found: Verification, at: AtThreshold) -> Mapping[str, Any]:
    tar = {f"{far:g}": rate for far, rate in found.tar_at_far.items()}
    return {"auc": found.auc, "eer": found.eer, "tar_at_far": tar, "at_threshold": asdict(at)}
