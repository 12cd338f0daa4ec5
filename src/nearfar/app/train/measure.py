"""Measure labelled pairs of some identities, by the embeddings and by the raw input."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from nearfar.app.data.content import Batch, Content, read_ahead
from nearfar.app.data.items import Items, Pairs, items_of
from nearfar.app.errors import InputError
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.split import rows_to_measure
from nearfar.distance import Distance, between_rows, unit
from nearfar.engine.slices import spans
from nearfar.evaluate import (
    AtThreshold,
    Difference,
    FarPair,
    PlattProbability,
    Reliability,
    Verification,
    at_threshold,
    difference,
    every_pair,
    fit_threshold,
    reliability,
    sample_pairs,
    verification,
)
from nearfar.evaluate.every_pair import MOST_ITEMS, within_bounds
from nearfar.evaluate.probability import platt_of, tally_of_scores

SAMPLE = 8000  # pairs kept for the report and for choosing the raw distance
CHUNK = 512  # items or pairs processed at a time
RAW_NUMBERS = 2**27  # the most numbers of raw input to compare at once

RawDistance = Literal["euclidean", "cosine", "centred cosine"]
RAW_DISTANCES: tuple[RawDistance, ...] = get_args(RawDistance)


class LabelledPairs(Protocol):
    """Labelled pairs that can be measured, whether given in a table or all pairs of some items."""

    @property
    def n_similar(self) -> int: ...
    @property
    def n_dissimilar(self) -> int: ...

    def verification(self) -> Verification: ...
    def at_threshold(self, threshold: float) -> AtThreshold: ...
    def fit_threshold(self, *, far: float) -> float: ...
    def fit_probability(self) -> PlattProbability: ...
    def reliability(self, probability: PlattProbability) -> Reliability: ...
    def hardest(self, n: int) -> tuple[list[FarPair], list[FarPair]]: ...
    def difference(self, other: Any) -> Difference: ...


@dataclass(frozen=True, eq=False)
class GivenPairs:
    """Pairs labelled in a table, with the same methods as `evaluate.EveryPair`.

    Attributes:
        pairs: (n, 2) int64, positions of the two items of each pair.
        identities: (n, 2) int64, their identities.
        similar: (n,) bool.
        distance: (n,) distance of each pair.
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

    def fit_probability(self) -> PlattProbability:
        tally = tally_of_scores(
            self.distance, self.similar, False, self.identities, "identities", None
        )
        return platt_of(tally, prior=0.5)

    def reliability(self, probability: PlattProbability) -> Reliability:
        return reliability(
            self.distance,
            self.similar,
            probability,
            groups=self.identities,
            average="identities",
        )

    def difference(self, other: "GivenPairs") -> Difference:
        return difference(
            self.distance,
            other.distance,
            self.similar,
            higher_is_closer=False,
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
    """A sample of the pairs, for a report; see `record.Outcome`.

    Attributes:
        pairs: (n, 2) int64, positions of the two items of each pair.
        similar: (n,) bool.
        learned: (n,) distances of the embeddings.
        raw: (n,) distances of the raw input.
    """

    pairs: Tensor
    similar: Tensor
    learned: Tensor
    raw: Tensor


@dataclass(frozen=True, eq=False)
class MeasuredPairs:
    """The labelled pairs of some identities, measured by two distances.

    Attributes:
        learned: the pairs with the distances of the embeddings.
        raw: the pairs with the distances of the raw input.
        untrained: the pairs with the distances of a pretrained network before training, if it is
            one.
        raw_distance: the name of the distance of the raw input.
        n_identities: the number of identities in the pairs.
        n_left_out: the number of items left out, since they would make too many pairs.
        items: (m,) int64, the items that are compared, in ascending order.
        embeddings: (m, d) their embeddings.
        sample: a sample of the pairs, given as positions in `items`, like the hardest pairs.
    """

    learned: LabelledPairs
    raw: LabelledPairs
    untrained: LabelledPairs | None
    raw_distance: RawDistance
    n_identities: int
    n_left_out: int
    items: Tensor
    embeddings: Tensor
    sample: Sample


def embed(embedder: Embedder, content: Content, rows: Tensor | None = None) -> Tensor:
    """(n, d) embeddings of the items in these rows, (n,), or of all.

    Leaves the embedder in evaluation mode.
    """
    return _applied(embedder, embedder, content, rows)


def features(embedder: Embedder, content: Content, rows: Tensor | None = None) -> Tensor:
    """(n, features) what the encoder makes of these items, as `embed`."""
    return _applied(embedder.features, embedder, content, rows)


def _applied(
    function: Callable[[Batch], Tensor], embedder: Embedder, content: Content, rows: Tensor | None
) -> Tensor:
    embedder.eval()
    device = next(iter([*embedder.parameters(), *embedder.buffers()])).device
    rows = torch.arange(len(content)) if rows is None else rows
    order = content.alike(rows)
    parts = (rows[order[part]] for part in spans(len(rows), content.at_once))
    # Pieces made between the activations would keep their memory from being used again.
    found: Tensor | None = None
    done = 0
    with torch.no_grad():
        for _, batch in read_ahead(content, parts):
            x = function(move_data_to_device(embedder.prepare(batch), device))
            found = x.new_empty(len(rows), x.shape[1], device="cpu") if found is None else found
            found[done : done + len(x)] = x
            done += len(x)
    assert found is not None
    return found[order.argsort()]


def embed_items(embedder: Embedder, items: Items, rows: Tensor) -> Tensor:
    """(n, d) embeddings of the items in these rows, (n,).

    Raises:
        InputError: an embedding is NaN or infinite, which huge numbers in the input cause.
    """
    x = embed(embedder, items.content, rows)
    bad = ~x.isfinite().all(1)
    if bad.any():
        raise InputError(
            "the network returns NaN or infinity for "
            f"{items.names[int(rows[bad.int().argmax()])]} ({int(bad.sum()):,} of {len(bad):,} "
            "items). Check them for huge numbers; or train again."
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
    centre: Tensor | None = None,
    untrained: Tensor | None = None,
) -> MeasuredPairs:
    """Measure all pairs of items of these identities, or the given pairs among them.

    Args:
        embedder: the network.
        data: items, of which every pair is measured, or pairs.
        identities: (i,) the identities whose items are compared.
        distance: the distance of the embeddings.
        raw_distance: the distance of the raw input; None for the one with the best AUC.
        seed: random seed for the sample, and for the items to compare if there are too many.
        centre: the mean of the raw input of the training items; None for that of the embedder.
        untrained: (m, d) what `before_training` gave for these identities and this seed.
    """
    items = items_of(data)
    used, n_left_out, given = _compared(data, identities, seed)
    identity = items.identity[used]
    pairs, similar = _sample(items, used, given, seed)
    x, raw = (
        embed_items(embedder, items, used),
        _Raw(items.content.raw(used), embedder.mean if centre is None else centre),
    )
    raw_distance = raw_distance or raw.best(pairs, identity[pairs], similar)
    learned, by_raw = x[pairs], raw.between(pairs, raw_distance)
    sample = Sample(pairs, similar, between_rows(learned[:, 0], learned[:, 1], distance), by_raw)
    by: Callable[[Tensor, Distance], LabelledPairs]
    by_raw_input: LabelledPairs
    if given is None:
        groups = None if items.groups is None else items.groups[used]
        by = partial(_among, identity, groups)
        by_raw_input = by(raw.rows(raw_distance), raw.measure(raw_distance))
    else:
        of = given.pairs, identity[given.pairs], given.similar
        by = partial(_given, of)
        by_raw_input = GivenPairs(*of, raw.between(given.pairs, raw_distance))
    return MeasuredPairs(
        by(x, distance),
        by_raw_input,
        None if untrained is None else by(untrained, distance),
        raw_distance,
        len(identity.unique()),  # type: ignore[no-untyped-call]
        n_left_out,
        used,
        x,
        sample,
    )


def before_training(
    embedder: Embedder, data: Items | Pairs, identities: Tensor, seed: int
) -> Tensor | None:
    """(m, d) what a pretrained network makes of the items that `measure` will compare.

    None if the network is not pretrained.
    """
    if not embedder.pretrained:
        return None
    used, _, _ = _compared(data, identities, seed)
    return unit(features(embedder, items_of(data).content, used))


def _among(identity: Tensor, groups: Tensor | None, x: Tensor, distance: Distance) -> LabelledPairs:
    return every_pair(x, identity, never_within=groups, distance=distance)


def _given(of: tuple[Tensor, Tensor, Tensor], x: Tensor, distance: Distance) -> LabelledPairs:
    a, b = x[of[0]].unbind(1)
    return GivenPairs(*of, between_rows(a, b, distance))


@dataclass(frozen=True, eq=False)
class _Given:
    """Given pairs: (n, 2) positions among the compared items, and (n,) labels."""

    pairs: Tensor
    similar: Tensor


def _compared(
    data: Items | Pairs, identities: Tensor, seed: int
) -> tuple[Tensor, int, _Given | None]:
    """The items to compare, the number of items left out, and the given pairs if any."""
    if isinstance(data, Pairs):
        rows = rows_to_measure(data, identities)
        pairs = torch.stack([data.a[rows], data.b[rows]], 1)
        used, place = pairs.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        return used, 0, _Given(place, data.is_similar()[rows])
    there = torch.isin(data.identity, identities).nonzero()[:, 0]
    most = min(MOST_ITEMS, RAW_NUMBERS // data.content.raw(there[:1]).numel())
    used = there[within_bounds(data.identity[there], seed, most)]
    return used, len(there) - len(used), None


def _sample(items: Items, used: Tensor, given: _Given | None, seed: int) -> tuple[Tensor, Tensor]:
    """A sample of pairs, (n, 2), half of them similar if possible, and (n,) whether they are."""
    if given is not None:
        order = torch.randperm(len(given.similar), generator=torch.Generator().manual_seed(seed))
        pairs, similar = given.pairs[order], given.similar[order]
    else:
        n = SAMPLE if items.groups is None else 4 * SAMPLE  # pairs within a group are dropped below
        a, b, similar = sample_pairs(items.identity[used], n, seed)
        kept = items.comparable(used[a], used[b])
        pairs, similar = torch.stack([a, b], 1)[kept], similar[kept]
    kinds = [kind.nonzero()[: SAMPLE // 2, 0] for kind in (similar, ~similar)]
    chosen = torch.cat(kinds)
    return pairs[chosen], similar[chosen]


class _Raw:
    """Distances of the raw input, the baselines for the learned distance.

    "centred cosine" is the cosine distance after the mean of the training items, one number per
    channel or column, has been subtracted, as the network does.
    """

    def __init__(self, x: Tensor, mean: Tensor) -> None:
        self._x, self._mean = x, mean.cpu()

    def rows(self, distance: RawDistance, at: Tensor | None = None) -> Tensor:
        """(n, d) the rows that `measure(distance)` compares."""
        x = self._x if at is None else self._x[at]
        return (x - self._mean if distance == "centred cosine" else x).flatten(1)

    @staticmethod
    def measure(distance: RawDistance) -> Distance:
        return "euclidean" if distance == "euclidean" else "cosine"

    def between(self, pairs: Tensor, distance: RawDistance) -> Tensor:
        """(n,) distances of the pairs, (n, 2)."""
        measure = self.measure(distance)
        found = [
            between_rows(self.rows(distance, part[:, 0]), self.rows(distance, part[:, 1]), measure)
            for part in _chunks(pairs)
        ]
        return torch.cat(found)

    def best(self, pairs: Tensor, identities: Tensor, similar: Tensor) -> RawDistance:
        """The distance with the largest AUC; ties go to the first in `RAW_DISTANCES`."""

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
