"""Every pair of labelled embeddings, measured tile by tile and never all held in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows, check_distance, unit
from nearfar.engine.budget import current_limits, tile
from nearfar.engine.closeness import by_distance
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.processes import Split
from nearfar.engine.relation import within
from nearfar.engine.slices import spans
from nearfar.engine.together import meet_without_gradient
from nearfar.evaluate.difference import Difference, difference_of
from nearfar.evaluate.intervals import check_draws
from nearfar.evaluate.pairs import sample_pairs
from nearfar.evaluate.probability import PlattProbability, platt_of
from nearfar.evaluate.reliability import BINS, Probability, Reliability, Sums, reliability_of
from nearfar.evaluate.scores import Floats, Integers
from nearfar.evaluate.tally import ByIdentity, Tally, bin_ends, counted
from nearfar.evaluate.threshold import (
    AtThreshold,
    check_far,
    check_threshold,
    decisions_of,
    first_rejected,
)
from nearfar.evaluate.verification import Verification, figures_of
from nearfar.inputs import ArrayLike, batch, lift
from nearfar.labels import class_ids

MOST_ITEMS = 10_000  # 50 million pairs
MOST_SIMILAR = 4_000_000  # pairs, whose distances are held in memory
_DRAWN = 20_000  # dissimilar distances drawn at random as steps of the curve
_ROWS = 512  # of the drawn pairs, gathered at a time
_BUFFERS = 16  # float32 copies of a tile held at the same time


@dataclass(frozen=True, eq=False)
class FarPair:
    """A pair of items, and the distance between them.

    Attributes:
        a: the row of one item.
        b: the row of the other.
        distance: the distance between them.
    """

    a: int
    b: int
    distance: float


@dataclass(frozen=True, eq=False)
class _PairDistances:
    """Some pairs: (k,) distances, and (k,) positions of their items when sorted by label."""

    distance: Tensor
    a: Tensor
    b: Tensor

    def where(self, wanted: Tensor) -> "_PairDistances":
        return _PairDistances(self.distance[wanted], self.a[wanted], self.b[wanted])


class EveryPair:
    """The pairs of labelled embeddings; made by `every_pair`.

    Rates are averages over identities: the pairs of an identity have a total weight of 1, and so do
    the pairs of any two identities. So every identity counts the same, however many items it has.

    Attributes:
        distance: the distance that is measured.
        n_items: how many items are compared.
        n_left_out: how many items were left out at random because there are too many pairs.
        n_identities: how many identities are compared.
        n_similar: how many similar pairs there are.
        n_dissimilar: how many dissimilar pairs.
    """

    def __init__(
        self, x: Tensor, rows: Tensor, identity: Tensor, never: Tensor | None, distance: Distance
    ) -> None:
        self.distance, self.n_items, self.n_left_out = distance, len(x), len(identity) - len(x)
        self._rows = rows.cpu()  # the rows compared, sorted by identity
        _, self._identity = identity[rows].cpu().unique_consecutive(return_inverse=True)  # type: ignore[no-untyped-call]
        self._never = None if never is None else never[rows].cpu()
        self._x = unit(x) if distance == "cosine" else x
        self._closeness = by_distance(distance)
        self._prepared, _ = self._closeness.prepare(self._x, None)
        sizes = torch.bincount(self._identity)
        self.n_identities = len(sizes)
        self._counts = _pairs_of_identities(sizes, self._identity, self._never)
        own = self._counts.diagonal()
        self.n_similar = int(own.sum())
        self.n_dissimilar = int((self._counts.sum() - own.sum()) // 2)
        if not self.n_similar or not self.n_dissimilar:
            kind = "dissimilar" if self.n_similar else "similar"
            raise ValueError(
                f"labels must give similar and dissimilar pairs; there is no {kind} pair to "
                "compare."
            )

    def verification(
        self,
        *,
        far: Sequence[float] = (0.1, 0.01, 0.001),
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Verification:
        """AUC, EER, TAR at each FAR, best accuracy and F1, the curves, and intervals.

        Args:
            far: false-accept rates at which to give the true-accept rate. A rate f takes 30 / f
                pairs of identities.
            level: confidence level of the intervals.
            resamples: number of resamples in the bootstrap over identities.
            seed: of the bootstrap.
        """
        check_draws(level, resamples)
        return figures_of(self._tally, far, level=level, resamples=resamples, seed=seed)

    def difference(
        self,
        other: "EveryPair",
        *,
        far: Sequence[float] = (0.1, 0.01, 0.001),
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Difference:
        """These embeddings compared with others of the same items; see `difference`.

        Args:
            other: made from the same labels, `never_within` and seed.
            far: as in `verification`.
            level: confidence level of the intervals.
            resamples: number of resamples in the bootstrap over identities.
            seed: of the bootstrap.

        Raises:
            ValueError: `other` holds other pairs.
        """
        check_draws(level, resamples)
        if not self._of_same_pairs(other):
            raise ValueError(
                "other must be made from the same labels, never_within and seed: it holds "
                f"{other.n_similar:,} similar and {other.n_dissimilar:,} dissimilar pairs of "
                f"{other.n_items:,} items, where this one holds {self.n_similar:,} and "
                f"{self.n_dissimilar:,} of {self.n_items:,}."
            )
        tallies = self._tally, other._tally
        return difference_of(tallies, far, level=level, resamples=resamples, seed=seed)

    def _of_same_pairs(self, other: "EveryPair") -> bool:
        if not (
            torch.equal(self._rows, other._rows) and torch.equal(self._identity, other._identity)
        ):
            return False
        mine, theirs = self._never, other._never
        if mine is None or theirs is None:
            return mine is theirs
        return torch.equal(mine, theirs)

    def at_threshold(
        self, threshold: float, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> AtThreshold:
        """The figures on these pairs of a threshold that was fitted on other identities."""
        check_draws(level, resamples)
        check_threshold(threshold)
        tally = self._two_steps(threshold)
        return decisions_of(tally, threshold, level=level, resamples=resamples, seed=seed)

    def fit_threshold(self, *, far: float) -> float:
        """The loosest threshold whose false-accept rate on these pairs is at most `far`."""
        check_far(far)
        tally = self._tally
        allowed = far * float(tally.dissimilar.sum())
        step, margin = first_rejected(tally.dissimilar, allowed), 0
        ends = np.concatenate([[-np.inf], tally.distance[:-1], [np.inf]])
        # The search measures every pair again. With other tiles, such as under another
        # `memory_budget`, some distances are rounded differently, and the pair may be found in a
        # neighbouring step.
        while True:
            low, high = ends[[max(step - margin, 0), min(step + 1 + margin, len(ends) - 1)]]
            threshold = self._loosest_between(low, high, allowed)
            if threshold is not None:
                return threshold
            margin = 2 * margin + 1

    def _loosest_between(self, low: float, high: float, allowed: float) -> float | None:
        """The loosest threshold that accepts dissimilar pairs of at most the allowed weight.

        None if the first pair that it rejects is not above `low` and at most `high`.
        """
        below, distances, weights = 0.0, [], []
        for part in self._dissimilar():
            part = part.where(part.distance <= high)
            distance, weight = part.distance.numpy(), self._weight(*self._identities(part))
            below += float(weight[distance <= low].sum())
            distances.append(distance[distance > low])
            weights.append(weight[distance > low])
        distance, weight = np.concatenate(distances), np.concatenate(weights)
        order = np.argsort(distance, kind="stable")
        place = first_rejected(np.append(below, weight[order]), allowed) - 1
        if place == len(order) and high == np.inf:  # at a rate near 1, no pair is rejected
            place -= 1
        if not 0 <= place < len(order):
            return None
        return float(np.nextafter(distance[order[place]], -np.inf))

    def fit_probability(self, *, prior: float = 0.5) -> PlattProbability:
        """The probability of "same" over the distance; see `platt_probability`.

        If similar pairs are farther apart than dissimilar ones, it is the prior at any distance.
        Dissimilar pairs between two steps of the curve are taken at their mean distance.
        """
        tally, mean = self._counted_pairs
        near, far = tally.similar > 0, tally.dissimilar > 0
        apart = replace(
            tally,
            distance=np.append(tally.distance[near], mean[far]),
            similar=np.append(tally.similar[near], np.zeros(far.sum())),
            dissimilar=np.append(np.zeros(near.sum()), tally.dissimilar[far]),
        )
        return platt_of(apart, prior)

    def reliability(
        self,
        probability: Probability,
        *,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Reliability:
        """Whether a probability that was fitted on other identities holds on these pairs."""
        check_draws(level, resamples)
        sums, bins = Sums(probability), _Bins(np.arange(BINS), BINS, self.n_identities)
        similar, own = self._of_similar()
        weight = self._weight(own, own)
        bins.add(1, sums.add(1, similar, weight), own, weight)
        for part in self._dissimilar():
            a, b = self._identities(part)
            weight = self._weight(a, b)
            step = sums.add(0, part.distance, weight)
            bins.add(0, step, a, weight)
            bins.add(0, step, b, weight)
        far, near = sums.weight
        tally = self._counted(np.arange(BINS, dtype=np.float64), near, far, bins)
        return reliability_of(sums, tally, level=level, resamples=resamples, seed=seed)

    def hardest(self, n: int) -> tuple[list[FarPair], list[FarPair]]:
        """The n closest dissimilar and the n farthest similar pairs, hardest first."""
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a number of pairs, 1 or more, got {n!r}.")
        near = _Nearest(n)
        for measured in self._dissimilar():
            near.add(measured)
        far = _Nearest(n)
        for measured in self._similar():
            far.add(_PairDistances(-measured.distance, measured.a, measured.b))
        return self._pairs(near.kept, 1), self._pairs(far.kept, -1)

    def _pairs(self, kept: _PairDistances, sign: int) -> list[FarPair]:
        rows = zip(
            self._rows[kept.a].tolist(),
            self._rows[kept.b].tolist(),
            (sign * kept.distance).tolist(),
            strict=True,
        )
        return [FarPair(a, b, d) for a, b, d in rows]

    @property
    def _tally(self) -> Tally:
        return self._counted_pairs[0]

    @cached_property
    def _counted_pairs(self) -> tuple[Tally, Floats]:
        """All pairs counted, and (s,) the mean distance of the dissimilar ones at each step."""
        similar, own = self._of_similar()
        steps, drawn = self._steps(similar)
        step, weight = steps.of(similar).numpy(), self._weight(own, own)
        near = counted(step, len(steps), weight)
        guess = counted(steps.of(drawn).numpy(), len(steps))
        bins = _Bins(bin_ends(near, guess), len(steps), self.n_identities)
        bins.add(1, step, own, weight)
        far, total = torch.zeros(2, len(steps), dtype=torch.float64)
        last = 0.0
        for part in self._dissimilar():
            a, b = self._identities(part)
            place, weight = steps.of(part.distance), self._weight(a, b)
            each = torch.from_numpy(weight)
            far.index_add_(0, place, each)
            total.index_add_(0, place, each * part.distance)
            bins.add(0, place.numpy(), a, weight)
            bins.add(0, place.numpy(), b, weight)
            last = max(last, float(part.distance.amax()))
        mean = (total / far).numpy()  # NaN, never read, at a step without any
        return self._counted(steps.upper_ends(last), near, far.numpy(), bins), mean

    def _counted(self, distance: Floats, near: Floats, far: Floats, bins: "_Bins") -> Tally:
        known = ByIdentity(bins.ends, (bins.weight.numpy(),), self._n_to_learn_from, True)
        return Tally(distance, near, far, self.n_similar, self.n_dissimilar, self._n_trials, known)

    def _two_steps(self, threshold: float) -> Tally:
        """The pairs counted in two steps: accepted and rejected."""
        bins = _Bins(np.arange(2), 2, self.n_identities)
        similar, own = self._of_similar()
        weight, step = self._weight(own, own), (similar > threshold).long().numpy()
        near = counted(step, 2, weight)
        bins.add(1, step, own, weight)
        accepted = 0.0
        for part in self._dissimilar():
            a, b = self._identities(part.where(part.distance <= threshold))
            weight, step = self._weight(a, b), np.zeros(len(a), dtype=np.int64)
            accepted += float(weight.sum())
            bins.add(0, step, a, weight)
            bins.add(0, step, b, weight)
        trials = (self._counts > 0).sum(1) - (self._counts.diagonal() > 0).long()
        bins.weight[:, 0, 1] = trials - bins.weight[:, 0, 0]
        accepted = min(accepted, self._n_trials)  # rounding may push the sum slightly above
        far = np.array([accepted, self._n_trials - accepted])
        return self._counted(np.array([threshold, np.inf]), near, far, bins)

    @cached_property
    def _n_trials(self) -> int:
        """The number of pairs of identities with something to compare."""
        return int(((self._counts > 0).sum() - (self._counts.diagonal() > 0).sum()) // 2)

    @cached_property
    def _n_to_learn_from(self) -> int:
        own = self._counts.diagonal() > 0
        others = (self._counts > 0).sum(1) - own.long() > 0
        return min(int(own.sum()), int(others.sum()))

    def _steps(self, similar: Tensor) -> tuple["_Steps", Tensor]:
        """The steps of the curve, and the distances of some dissimilar pairs.

        Between two similar distances the true-accept rate is constant, so the distances of the
        similar pairs give every figure exactly. Some dissimilar distances are added so that few
        pairs lie between two steps, where `fit_threshold` has to search.
        """
        a, b, same = sample_pairs(self._identity, 2 * _DRAWN, seed=0)
        pairs = torch.stack([a[~same], b[~same]], 1)
        drawn = torch.cat(
            [
                between_rows(self._x[part[:, 0]], self._x[part[:, 1]], self.distance).cpu()
                for part in pairs.split(_ROWS)  # type: ignore[no-untyped-call]
            ]
        )
        return _Steps(torch.cat([similar, drawn]).unique()), drawn  # type: ignore[no-untyped-call]

    def _of_similar(self) -> tuple[Tensor, Integers]:
        """(p,) distances of the similar pairs, and (p,) their identities."""
        parts = list(self._similar())
        who = self._identity[torch.cat([part.a for part in parts])]
        return torch.cat([part.distance for part in parts]), who.numpy()

    def _identities(self, part: _PairDistances) -> tuple[Integers, Integers]:
        return self._identity[part.a].numpy(), self._identity[part.b].numpy()

    def _weight(self, a: Integers, b: Integers) -> Floats:
        """(k,) the weight of one pair of these identities."""
        found: Floats = self._share.ravel()[a * self.n_identities + b]
        return found

    @cached_property
    def _share(self) -> Floats:
        with np.errstate(divide="ignore"):  # entries without pairs are never read
            found: Floats = 1 / self._counts.numpy().astype(np.float64)
        return found

    def _similar(self) -> Iterator[_PairDistances]:
        return self._measured(similar=True)

    def _dissimilar(self) -> Iterator[_PairDistances]:
        return self._measured(similar=False)

    def _measured(self, *, similar: bool) -> Iterator[_PairDistances]:
        """The pairs of one kind, each once, tile by tile."""
        x, who = self._prepared, self._identity
        height, width = tile(current_limits(), x.device, x.element_size(), _BUFFERS)
        for rows in spans(self.n_items, height):
            for columns in spans(self.n_items, width):
                apart = who[rows.stop - 1] < who[columns.start]  # all dissimilar
                if columns.stop <= rows.start or (similar and apart):
                    continue
                wanted = self._wanted(rows, columns, similar)
                if not wanted.any():
                    continue
                values = self._closeness.measure(x[rows], x[columns])[0].cpu()
                if wanted.all():
                    i = torch.arange(rows.start, rows.stop).repeat_interleave(values.shape[1])
                    j = torch.arange(columns.start, columns.stop).repeat(values.shape[0])
                    yield _PairDistances(values.flatten(), i, j)
                else:
                    i, j = wanted.nonzero(as_tuple=True)
                    yield _PairDistances(values[i, j], i + rows.start, j + columns.start)

    def _wanted(self, rows: slice, columns: slice, similar: bool) -> Tensor:
        """(r, c) bool, the pairs of one kind in a tile that may be compared, each once."""
        wanted: Tensor = (self._identity[rows, None] == self._identity[columns]) == similar
        if columns.start < rows.stop:
            place = torch.arange(max(rows.stop, columns.stop))
            wanted.logical_and_(place[rows, None] < place[columns])
        if self._never is not None:
            group = self._never[rows, None]
            wanted.logical_and_((group != self._never[columns]) | (group < 0))
        return wanted


@over_processes
def every_pair(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance = "cosine",
    never_within: ArrayLike | None = None,
    seed: int = 0,
    group: Group | None = None,
) -> EveryPair:
    """Every pair of labelled embeddings, to compute verification figures on.

    All pairs are counted, in memory that does not grow with their number; 13 million pairs take a
    few seconds. Above 10,000 items (50 million pairs) or 4 million similar pairs, items are drawn
    by seed: as many of each identity as stay within both limits, and fewer identities if even two
    items of each are too many.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids, the identity of each row.
        distance: "cosine", "euclidean", "sqeuclidean", "manhattan" or the p of a p-norm. Not "snr",
            by which a pair has two distances.
        never_within: (n,) ids of groups whose items are never compared with each other, such as the
            camera or the session of a recording; -1 for none.
        seed: of the draw, if there are too many pairs.
        group: the processes that the items are spread over, as in a loss. Each gathers the items
            that are compared, 10,000 at most, and can then compute every figure without the others;
            rows of pairs count all items, in the order of the processes. None: this one has all.

    Raises:
        ValueError: no similar or no dissimilar pairs, rows that are not finite, wrong shapes, a
            distance that is another from each end of a pair.

    >>> x = torch.tensor([[0.0], [1], [10], [13], [4], [3]])
    >>> pairs = every_pair(x, [0, 0, 1, 1, 2, 2], distance="euclidean")
    >>> pairs.n_similar, pairs.n_dissimilar
    (3, 12)
    >>> found = pairs.verification()
    >>> round(found.auc, 4), round(pairs.fit_threshold(far=0.2), 4)
    (0.9444, 3.0)
    """
    distance = check_distance(distance)
    if not by_distance(distance).symmetric:
        raise ValueError(
            "distance must be one of 'euclidean', 'sqeuclidean', 'cosine', 'manhattan', or a "
            "number p of at least 1 for the p-norm, by which a pair has one distance; got "
            f"{distance!r}."
        )
    rows = lift("x", batch("x", x).detach())
    if not rows.isfinite().all():
        bad = (~rows.isfinite().all(1)).nonzero()[:, 0]
        raise ValueError(
            f"x[{int(bad[0])}] is not finite ({len(bad)} of {len(rows)} rows are not)."
        )
    identity = class_ids(labels, like=rows)
    never = None
    if never_within is not None:
        never = class_ids(never_within, like=rows, name="never_within")
    split = None
    if group is not None:
        split, identity, never = _items_of_all(group, rows, identity, never)
    chosen = within_bounds(identity.cpu(), seed)
    chosen = chosen[identity.cpu()[chosen].argsort(stable=True)].to(rows.device)
    compared = rows[chosen] if split is None else _gathered(rows, chosen, split)
    return EveryPair(compared, chosen, identity, never, distance)


def _items_of_all(
    group: Group, rows: Tensor, identity: Tensor, never: Tensor | None
) -> tuple[Split, Tensor, Tensor | None]:
    """How the items are spread over processes, and the identities and groups of all."""
    together, relation = meet_without_gradient(group, rows, None, within(identity, rows))
    assert relation.column_labels is not None
    never = None if never is None else together.rows.gather(never)
    return together.rows, relation.column_labels, never


def _gathered(rows: Tensor, chosen: Tensor, split: Split) -> Tensor:
    """Some of the rows of all processes, given by their numbers, in this order."""
    here = [(chosen >= part.start) & (chosen < part.stop) for part in split.parts]
    own = rows[chosen[here[split.processes.rank]] - split.own.start]
    sent = Split(split.processes, [int(those.sum()) for those in here]).gather(own)
    found = torch.empty_like(sent)
    found[torch.cat([those.nonzero()[:, 0] for those in here])] = sent
    return found


def within_bounds(identity: Tensor, seed: int, most_items: int = MOST_ITEMS) -> Tensor:
    """The rows to compare: all, or as many of each identity as fit, drawn by seed."""
    _, who, sizes = identity.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    each = _most_each(sizes, most_items)
    if each == 0:
        return torch.arange(len(identity))
    random = np.random.default_rng([seed, 4])
    order = torch.from_numpy(random.permutation(len(identity)))
    order = order[who[order].argsort(stable=True)]  # by identity, in random order within each
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[who[order]]
    kept = place < each
    if int(sizes.clamp(max=each).sum()) > most_items:  # even two of each are too many
        lot = torch.from_numpy(random.permutation(len(sizes)))
        chosen = lot[sizes[lot].clamp(max=each).cumsum(0) <= most_items]
        kept &= torch.isin(who[order], chosen)
    return order[kept].sort().values


def _most_each(sizes: Tensor, most_items: int) -> int:
    """How many items of an identity may be compared, at least 2; 0 for all."""

    def fits(each: int) -> bool:
        kept = sizes.clamp(max=each).double()
        similar = float((kept * (kept - 1)).sum()) / 2
        return float(kept.sum()) <= most_items and similar <= MOST_SIMILAR

    low, high = 2, max(int(sizes.max()) if len(sizes) else 0, 2)
    if fits(high):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _pairs_of_identities(sizes: Tensor, who: Tensor, never: Tensor | None) -> Tensor:
    """(k, k) the numbers of pairs to compare between any two identities, and within each."""
    n = sizes.double()
    counts = n[:, None] * n
    if never is not None:
        inside = never >= 0
        groups, group = never[inside].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        held = torch.zeros(len(sizes), len(groups))
        held.index_put_((who[inside], group), torch.ones(len(group)), accumulate=True)
        counts -= (held @ held.T).double()
        alone = torch.bincount(who[~inside], minlength=len(sizes))
        own = counts.diagonal() - alone  # items without a group were paired with themselves
    else:
        own = counts.diagonal() - n
    counts.diagonal().copy_(own / 2)
    return counts.round().long()


class _Steps:
    """Which step of the curve a distance belongs to: 2k just below the k-th number, 2k + 1 at it.

    A table of equally wide cells leaves few numbers to compare with, which is ten times as fast as
    a binary search.
    """

    CELLS, ROUNDS = 2**18, 4

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        just_after = numbers.nextafter(numbers.new_tensor(torch.inf))
        self._ends = torch.stack([numbers, just_after], 1).flatten()
        self._low = numbers[0]
        self._by = self.CELLS / (numbers[-1] - numbers[0]).clamp(min=1e-30)
        self._first = torch.searchsorted(self._cell(self._ends), torch.arange(self.CELLS))
        self._padded = torch.cat([self._ends, numbers.new_tensor([torch.inf])])

    def __len__(self) -> int:
        return self._ends.shape[0] + 1

    def of(self, distance: Tensor) -> Tensor:
        """(k,) int64."""
        step = self._first[self._cell(distance)]
        for _ in range(self.ROUNDS):
            step += self._padded[step] <= distance
        rest = (self._padded[step] <= distance).nonzero()[:, 0]
        step[rest] = torch.searchsorted(self._ends, distance[rest], right=True)
        return step

    def upper_ends(self, last: float) -> Floats:
        """The largest distance at each step; `last` at the last step."""
        below = self._numbers.nextafter(self._numbers.new_tensor(-torch.inf))
        ends = torch.stack([below, self._numbers], 1).flatten().double().numpy()
        return np.append(ends, max(last, float(self._numbers[-1])))

    def _cell(self, distance: Tensor) -> Tensor:
        """The cell of a distance; monotone in the distance despite rounding."""
        return ((distance - self._low) * self._by).clamp_(0, self.CELLS - 1).long()


class _Bins:
    """The weight of the pairs of each identity in each bin, for `ByIdentity`.

    Attributes:
        ends: (c,) the last step of each bin.
        weight: (k, 2, c) float64, see `ByIdentity.parts`.
    """

    def __init__(self, ends: Integers, n_steps: int, n_identities: int) -> None:
        self.ends = ends
        self._bin = np.searchsorted(ends, np.arange(n_steps))
        self.weight = torch.zeros(n_identities, 2, len(ends), dtype=torch.float64)

    def add(self, kind: int, step: Integers, identity: Integers, weight: Floats) -> None:
        """Kind 0: dissimilar pairs, 1: similar ones."""
        c = len(self.ends)
        place = torch.from_numpy((2 * identity + kind) * c + self._bin[step])
        self.weight.view(-1).index_add_(0, place, torch.from_numpy(weight))


class _Nearest:
    """Keeps the n closest of all pairs added; of equally close ones, the first."""

    def __init__(self, n: int) -> None:
        nothing = torch.zeros(0, dtype=torch.int64)
        self._n, self.kept = n, _PairDistances(torch.zeros(0), nothing, nothing)

    def add(self, measured: _PairDistances) -> None:
        kept = self.kept
        if len(kept.a) == self._n:
            closer = measured.distance < kept.distance[-1]
            measured = measured.where(closer)
        if not len(measured.a):
            return
        distance = torch.cat([kept.distance.to(measured.distance.dtype), measured.distance])
        order = distance.argsort(stable=True)[: self._n]
        a, b = (torch.cat([getattr(kept, s), getattr(measured, s)])[order] for s in "ab")
        self.kept = _PairDistances(distance[order], a, b)
