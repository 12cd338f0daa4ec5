"""`nearfar search`: who in a gallery a query shows, or that it is nobody known."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any

from torch import Tensor

from nearfar.app.errors import InputError
from nearfar.app.gallery.enroll import about, gallery_of, recalled
from nearfar.app.gallery.nearest import Match, nearest_identities, uses_graphs
from nearfar.app.gallery.store import Gallery, steadily
from nearfar.app.gallery.strangers import Floats, OpenSet, Strangers
from nearfar.app.train.calibration import read_calibration
from nearfar.app.train.run import Run, read_run
from nearfar.app.train.use import embed_addresses
from nearfar.evaluate.probability import PlattProbability
from nearfar.plain import plain
from nearfar.tabulate import Table

_LISTED = 20  # identities whose likelihood ratios are known one by one


@dataclass(frozen=True)
class Candidate:
    """An identity near a query.

    Attributes:
        identity: its name.
        item: the name of its nearest item.
        distance: of the query to that item.
        likelihood_ratio: how many times as likely an identity comes so near if it is the one that
            the query shows; None if no calibration identity has two items.
        at_limit: whether it would be further from 1 if there were more calibration identities.
        probability: that the query shows this identity; None without a prior.
    """

    identity: str
    item: str
    distance: float
    likelihood_ratio: float | None
    at_limit: bool
    probability: float | None


@dataclass(frozen=True)
class Answer:
    """Whom a query shows.

    Attributes:
        query: its address.
        found: the nearest identity, if it is within the threshold; None: nobody known.
        candidates: the nearest identities, whether they are within it or not.
        nobody: the probability that the query shows nobody in the gallery; None without a prior.
    """

    query: str
    found: str | None
    candidates: Sequence[Candidate]
    nobody: float | None


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to some queries.

    Attributes:
        answers: one for each query.
        open_set: the threshold of the gallery, and what to expect of it.
        gallery: what was searched.
        by_graph: whether graphs were used.
        prior: the share of queries that show somebody in the gallery; None: not told.
    """

    answers: Sequence[Answer]
    open_set: OpenSet
    gallery: Gallery
    by_graph: bool
    prior: float | None

    @property
    def all_found(self) -> bool:
        return all(answer.found is not None for answer in self.answers)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the threshold."""
        return [*filter(None, [self.open_set.warning])]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = plain(
            {
                "answers": [asdict(answer) for answer in self.answers],
                "open_set": self.open_set.as_dict(),
                **about(self.gallery),
                "by_graph": self.by_graph,
                "prior": self.prior,
                "notes": self.notes,
            }
        )
        return found

    def render(self) -> Iterator[str | Table]:
        """For a terminal."""
        limit = self.open_set.threshold
        for answer in self.answers:
            nearest = answer.candidates[0]
            near = f"{self.gallery.distance} distance {nearest.distance:.4f}"
            if answer.found is not None:
                yield f"{answer.query}: {answer.found}, {near} <= threshold {limit:.4f}"
            else:
                yield f"{answer.query}: nobody known; nearest {near} > threshold {limit:.4f}"
            yield self._table(answer)
            if answer.nobody is not None:
                yield f"\nprobability of nobody known: {_share(answer.nobody)}"
            yield ""
        yield str(self.open_set)
        if self.prior is not None:
            yield (
                f"probabilities hold if {self.prior} of the queries show somebody in the gallery; "
                "who is found depends on the threshold alone, so the two may disagree"
            )
        if self.by_graph and self.gallery.recall:
            yield f"searched by graphs, which {recalled(self.gallery.recall)}; --exact finds all"

    def _table(self, answer: Answer) -> Table:
        header = ["identity", "nearest item", "distance"]
        columns = [
            [one.identity for one in answer.candidates],
            [one.item for one in answer.candidates],
            [f"{one.distance:.4f}" for one in answer.candidates],
        ]
        if answer.candidates[0].likelihood_ratio is not None:
            header.append("likelihood ratio")
            columns.append([_ratio(one) for one in answer.candidates])
        if self.prior is not None:
            header.append("probability")
            columns.append([_share(one.probability) for one in answer.candidates])
        return Table(tuple(header), list(zip(*columns, strict=True)))


def _ratio(one: Candidate) -> str:
    ratio = one.likelihood_ratio or 0.0
    shown = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    beyond = (">= " if ratio >= 1 else "<= ") * one.at_limit
    return f"{beyond}{shown}"


def _share(probability: float | None) -> str:
    if probability is None:
        return "-"
    # Rounded to 0 or 1, it would claim to be certain.
    if probability < 0.0001:
        return "below 0.0001"
    return f"{probability:.4f}" if probability <= 0.9999 else "above 0.9999"


def search(
    path: Path,
    place: Path,
    queries: Sequence[str],
    *,
    k: int,
    prior: float | None,
    far: float | None,
    exact: bool,
) -> Answers:
    """Search a gallery for some items.

    Args:
        path: the run folder.
        place: the gallery.
        queries: addresses of items; see `address.read_item`.
        k: how many identities to name for each.
        prior: the share of queries that show somebody in the gallery; None: no probability is
            given.
        far: the share of strangers that may be taken for somebody; None: that of the run.
        exact: whether every row is compared, without graphs.

    Raises:
        InputError: the run, the gallery or a query cannot be used.
    """
    run = read_run(path)
    searched = searchable(run, place, far)
    if prior is not None and searched.probability is None:
        raise InputError(
            f"--prior needs a probability, and {path} has none: no calibration identity has two "
            "items. Train again, with more items of each."
        )
    x = embed_addresses(run, queries)
    return search_embedded(run, searched, queries, x, k=k, prior=prior, exact=exact)


@dataclass(frozen=True, eq=False)
class Searchable:
    """A gallery that can be searched.

    Attributes:
        gallery: what is in it.
        open_set: its threshold, and what to expect of it.
        probability: of "same", over the distance to the nearest item of an identity; None: unknown.
        as_many: how many identities count; see `Strangers.as_many`.
    """

    gallery: Gallery
    open_set: OpenSet
    probability: PlattProbability | None
    as_many: int


def searchable(run: Run, place: Path, far: float | None) -> Searchable:
    """A gallery of this run, and its threshold.

    Raises:
        InputError: it cannot be read, is empty or of another run, or has no threshold.
    """
    gallery = gallery_of(run, place)
    if not gallery.n_identities:
        raise InputError(
            f"{place} is empty. Add to it: nearfar enroll RUN DATA --out {place} --add"
        )
    per_identity = max(1, round(gallery.n / gallery.n_identities))
    strangers = Strangers.of(read_calibration(run.path), run.distance, per_identity)
    rate = run.thresholds.far if far is None else far
    return Searchable(
        gallery,
        strangers.open_set(gallery.n_identities, gallery.n, rate),
        # Of single items, the curve of `verify`, which more pairs were counted for.
        run.probability if per_identity == 1 else strangers.probability,
        strangers.as_many(gallery.n_identities, gallery.n),
    )


def search_embedded(
    run: Run,
    searched: Searchable,
    queries: Sequence[str],
    x: Tensor,
    *,
    k: int,
    prior: float | None,
    exact: bool,
) -> Answers:
    """Search a gallery for some embeddings.

    Args:
        run: the run that made them.
        searched: the gallery.
        queries: what answers call each of them.
        x: (n, d) embeddings.
        k: as for `search`.
        prior: as for `search`.
        exact: as for `search`.
    """
    gallery, found = steadily(
        searched.gallery,
        lambda: gallery_of(run, searched.gallery.path),
        lambda held: nearest_identities(held, x, max(k, _LISTED), exact=exact),
    )
    answers = [
        _answer(searched, query, matches, k, prior)
        for query, matches in zip(queries, found, strict=True)
    ]
    by_graph = not exact and uses_graphs(gallery, max(k, _LISTED))
    return Answers(answers, searched.open_set, gallery, by_graph, prior)


def _answer(
    searched: Searchable, query: str, matches: Sequence[Match], k: int, prior: float | None
) -> Answer:
    probability = searched.probability
    ratios, shares, nobody = None, None, None
    if probability is not None:
        ratios = probability.likelihood_ratio([match.distance for match in matches]).numpy()
        if prior is not None:
            shares, nobody = posterior(ratios, max(searched.as_many, len(ratios)), prior)
    candidates = [
        Candidate(
            match.identity,
            match.item,
            match.distance,
            None if ratios is None else float(ratios[i]),
            probability is not None and _at_limit(probability, match.distance),
            None if shares is None else float(shares[i]),
        )
        for i, match in enumerate(matches[:k])
    ]
    within = bool(matches) and matches[0].distance <= searched.open_set.threshold
    return Answer(query, matches[0].identity if within else None, candidates, nobody)


def _at_limit(probability: PlattProbability, distance: float) -> bool:
    ratio = probability.likelihood_ratio([distance]).item()
    return any(isclose(ratio, limit) for limit in probability.limits)


def posterior(ratios: Floats, n_identities: int, prior: float) -> tuple[Floats, float]:
    r"""The probability of each identity, and of nobody.

    .. math:: P(i) = \frac{\pi L_i / M}{1 - \pi + \pi \sum_j L_j / M}

    Each identity is as likely as the others before the query is seen, and the distances to
    different identities are independent given who it is. Of identities beyond those listed, each
    counts as the farthest that is, but at most 1: that is what likelihood ratios of strangers are
    on average.

    Args:
        ratios: (k,) likelihood ratios of the nearest identities, nearest first.
        n_identities: how many there are.
        prior: that the query shows one of them.

    >>> from numpy import array
    >>> shares, nobody = posterior(array([98.0, 1.0]), 2, 0.5)
    >>> shares.round(4).tolist(), round(nobody, 4)
    ([0.9703, 0.0099], 0.0198)
    """
    others = (n_identities - len(ratios)) * min(1.0, float(ratios[-1]))
    each = prior * ratios / n_identities
    total = 1 - prior + float(each.sum()) + prior * others / n_identities
    return each / total, (1 - prior) / total
