"""The labelled pairs of some identities, measured by the embeddings and by the raw input."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from nearfar.app.errors import InputError
from nearfar.app.train.data import Items, Pairs, as_input, items_of
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.split import rows_to_measure
from nearfar.distance import Distance, between_rows
from nearfar.engine.slices import spans
from nearfar.evaluate import (
    AtThreshold,
    FarPair,
    Verification,
    at_threshold,
    every_pair,
    fit_threshold,
    sample_pairs,
    verification,
)
from nearfar.evaluate.every_pair import MOST_ITEMS, within_bounds

SAMPLE = 8000  # pairs that are kept for a report and to choose the raw distance by
CHUNK = 512  # items or pairs at a time
RAW_NUMBERS = 2**27  # of the raw input, at most, that are compared at once

RawDistance = Literal["euclidean", "cosine", "centred cosine"]
RAW_DISTANCES: tuple[RawDistance, ...] = get_args(RawDistance)


class LabelledPairs(Protocol):
    """What figures are asked of, whether pairs were given or are all there are."""

    @property
    def n_similar(self) -> int: ...
    @property
    def n_dissimilar(self) -> int: ...

    def verification(self) -> Verification: ...
    def at_threshold(self, threshold: float) -> AtThreshold: ...
    def fit_threshold(self, *, far: float) -> float: ...
    def hardest(self, n: int) -> tuple[list[FarPair], list[FarPair]]: ...


@dataclass(frozen=True, eq=False)
class GivenPairs:
    """Pairs that somebody labelled, with the same methods as `evaluate.EveryPair`.

    Attributes:
        pairs: (n, 2) int64, places of the two items of each pair.
        identities: (n, 2) int64, their identities.
        similar: (n,) bool.
        distance: (n,) between the two.
    """

    pairs: Tensor
    identities: Tensor
    similar: Tensor
    distance: Tensor

    @property
    def n_similar(self) -> int:
        return int(self.similar.sum())

    @property
    def n_dissimilar(self) -> int:
        return len(self.similar) - self.n_similar

    def verification(self) -> Verification:
        return verification(
            self.distance,
            self.similar,
            higher_is_closer=False,
            groups=self.identities,
            average="identities",
        )

    def at_threshold(self, threshold: float) -> AtThreshold:
        return at_threshold(
            self.distance,
            self.similar,
            threshold,
            higher_is_closer=False,
            groups=self.identities,
            average="identities",
        )

    def fit_threshold(self, *, far: float) -> float:
        return fit_threshold(
            self.distance,
            self.similar,
            higher_is_closer=False,
            far=far,
            groups=self.identities,
            average="identities",
        )

    def hardest(self, n: int) -> tuple[list[FarPair], list[FarPair]]:
        order = self.distance.argsort(stable=True)
        near = order[~self.similar[order]][:n]
        far = order[self.similar[order]].flip(0)[:n]
        return self._named(near), self._named(far)

    def _named(self, rows: Tensor) -> list[FarPair]:
        pairs, distances = self.pairs[rows].tolist(), self.distance[rows].tolist()
        return [FarPair(a, b, d) for (a, b), d in zip(pairs, distances, strict=True)]


@dataclass(frozen=True, eq=False)
class Sample:
    """Some of the pairs, for a report; see `record.Outcome`.

    Attributes:
        pairs: (n, 2) int64, places of the two items of each pair.
        similar: (n,) bool.
        learned: (n,) distances of the embeddings.
        raw: (n,) distances of the raw input.
    """

    pairs: Tensor
    similar: Tensor
    learned: Tensor
    raw: Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """The labelled pairs of some identities, measured twice.

    Attributes:
        learned: by the distance of the embeddings.
        raw: by the distance of the raw input.
        raw_distance: the name of that.
        n_identities: how many identities the pairs are of.
        n_left_out: how many of their items are not compared, since they would make too many pairs.
        items: (m,) int64, the items that are compared, rising.
        embeddings: (m, d) of those.
        sample: some of the pairs; they, as the hardest ones, are places in `items`.
    """

    learned: LabelledPairs
    raw: LabelledPairs
    raw_distance: RawDistance
    n_identities: int
    n_left_out: int
    items: Tensor
    embeddings: Tensor
    sample: Sample


def embed(embedder: nn.Module, x: Tensor) -> Tensor:
    """(n, d) embeddings of items, as they were read; the embedder is left in evaluation mode."""
    embedder.eval()
    device = next(iter([*embedder.parameters(), *embedder.buffers()])).device
    with torch.no_grad():
        return torch.cat([embedder(as_input(part).to(device)).cpu() for part in _chunks(x)])


def embed_items(embedder: nn.Module, items: Items, rows: Tensor) -> Tensor:
    """(n, d) embeddings of the items in these rows, (n,).

    Raises:
        InputError: one is NaN or infinite, as those of huge numbers are.
    """
    x = embed(embedder, items.x[rows])
    bad = ~x.isfinite().all(1)
    if bad.any():
        raise InputError(
            f"the network gives no number for {items.names[int(rows[bad.int().argmax()])]} "
            f"({int(bad.sum()):,} of {len(bad):,} items). Look for numbers that are far too large "
            "in them; or train again."
        )
    return x


def measure(
    embedder: Embedder,
    data: Items | Pairs,
    identities: Tensor,
    *,
    distance: Distance,
    raw_distance: RawDistance | None,
    seed: int,
) -> Measured:
    """Measure every pair of the items of these identities, or those of the given pairs.

    Args:
        embedder: the network.
        data: the items.
        identities: (i,) whose items to compare.
        distance: of the embeddings.
        raw_distance: of the raw input; None: the one that tells these pairs apart best, by AUC.
        seed: of what is drawn: a sample, and the items to compare where there are too many.
    """
    items = items_of(data)
    used, n_left_out, given = _compared(data, identities, seed)
    identity = items.identity[used]
    pairs, similar = _sample(items, used, given, seed)
    x, raw = embed_items(embedder, items, used), _Raw(items.x[used], embedder)
    raw_distance = raw_distance or raw.best(pairs, identity[pairs], similar)
    learned, by_raw = x[pairs], raw.between(pairs, raw_distance)
    sample = Sample(pairs, similar, between_rows(learned[:, 0], learned[:, 1], distance), by_raw)
    sides: tuple[LabelledPairs, LabelledPairs]
    if given is None:
        groups = None if items.groups is None else items.groups[used]
        among = partial(every_pair, labels=identity, never_within=groups)
        sides = (
            among(x, distance=distance),
            among(raw.rows(raw_distance), distance=raw.measure(raw_distance)),
        )
    else:
        of = given.pairs, identity[given.pairs], given.similar
        a, b = x[given.pairs].unbind(1)
        sides = (
            GivenPairs(*of, between_rows(a, b, distance)),
            GivenPairs(*of, raw.between(given.pairs, raw_distance)),
        )
    n_identities = len(identity.unique())  # type: ignore[no-untyped-call]
    return Measured(sides[0], sides[1], raw_distance, n_identities, n_left_out, used, x, sample)


@dataclass(frozen=True, eq=False)
class _Given:
    """(n, 2) places of given pairs among the items that are compared, and (n,) their labels."""

    pairs: Tensor
    similar: Tensor


def _compared(
    data: Items | Pairs, identities: Tensor, seed: int
) -> tuple[Tensor, int, _Given | None]:
    """The items to compare, how many are left out, and the given pairs."""
    if isinstance(data, Pairs):
        rows = rows_to_measure(data, identities)
        pairs = torch.stack([data.a[rows], data.b[rows]], 1)
        used, place = pairs.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        return used, 0, _Given(place, data.is_similar()[rows])
    there = torch.isin(data.identity, identities).nonzero()[:, 0]
    most = min(MOST_ITEMS, RAW_NUMBERS // data.x[0].numel())
    used = there[within_bounds(data.identity[there], seed, most)]
    return used, len(there) - len(used), None


def _sample(items: Items, used: Tensor, given: _Given | None, seed: int) -> tuple[Tensor, Tensor]:
    """(n, 2) some pairs, half of them similar where there are enough; (n,) whether they are."""
    if given is not None:
        order = torch.randperm(len(given.similar), generator=torch.Generator().manual_seed(seed))
        pairs, similar = given.pairs[order], given.similar[order]
    else:
        n = SAMPLE if items.groups is None else 4 * SAMPLE  # some must not be compared
        a, b, similar = sample_pairs(items.identity[used], n, seed)
        kept = items.comparable(used[a], used[b])
        pairs, similar = torch.stack([a, b], 1)[kept], similar[kept]
    kinds = [kind.nonzero()[: SAMPLE // 2, 0] for kind in (similar, ~similar)]
    chosen = torch.cat(kinds)
    return pairs[chosen], similar[chosen]


class _Raw:
    """The raw input, by each of the distances that training is compared with.

    "centred cosine" is the cosine after the mean of the training items, a number a channel or
    column, has been taken away, as the network does it.
    """

    def __init__(self, x: Tensor, embedder: Embedder) -> None:
        self._x, self._mean = x, embedder.mean.cpu()

    def rows(self, distance: RawDistance, at: Tensor | None = None) -> Tensor:
        """(n, d) what `measure(distance)` compares."""
        x = as_input(self._x if at is None else self._x[at])
        return (x - self._mean if distance == "centred cosine" else x).flatten(1)

    @staticmethod
    def measure(distance: RawDistance) -> Distance:
        return "euclidean" if distance == "euclidean" else "cosine"

    def between(self, pairs: Tensor, distance: RawDistance) -> Tensor:
        """(n,) of (n, 2) pairs."""
        measure = self.measure(distance)
        found = [
            between_rows(self.rows(distance, part[:, 0]), self.rows(distance, part[:, 1]), measure)
            for part in _chunks(pairs)
        ]
        return torch.cat(found)

    def best(self, pairs: Tensor, identities: Tensor, similar: Tensor) -> RawDistance:
        """The distance with the largest AUC; of equal ones the one named first."""

        def auc(distance: RawDistance) -> float:
            found = verification(
                self.between(pairs, distance),
                similar,
                higher_is_closer=False,
                groups=identities,
                average="identities",
                resamples=100,
            )
            return found.auc

        return max(RAW_DISTANCES, key=auc)


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[part] for part in spans(len(rows), CHUNK)]
