"""Whether one score separates the same pairs better than another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nearfar.engine.meeting import Group, over_processes
from nearfar.evaluate.intervals import (
    FEWEST_IDENTITIES,
    Interval,
    check_average,
    check_draws,
    intervals_of_differences,
)
from nearfar.evaluate.scores import Floats, checked
from nearfar.evaluate.tally import Average, Tally, tally_of
from nearfar.evaluate.verification import Intervals, Verification, figures_at, figures_of
from nearfar.inputs import ArrayLike
from nearfar.plain import number, plain
from nearfar.tabulate import Table


@dataclass(frozen=True)
class Difference:
    """Figures of two scores of the same pairs, and by how much they differ.

    Attributes:
        a: the figures of one score, each with its own interval.
        b: the figures of the other.
        auc: AUC of a minus that of b; positive if a is better.
        eer: EER of a minus that of b; negative if a is better.
        tar_at_far: false-accept rate -> true-accept rate of a minus that of b; None if there are
            too few pairs for it.
        intervals: of these differences; None without `groups`, or with fewer than 30 identities
            among the similar or among the dissimilar pairs.
    """

    a: Verification
    b: Verification
    auc: float
    eer: float
    tar_at_far: Mapping[float, float | None]
    intervals: Intervals | None = None

    def table(self) -> Table:
        """Each figure of both, the difference, and its interval."""
        level = f"{100 * self.intervals.level:g}% interval" if self.intervals else "interval"
        return Table(("figure", "a", "b", "a - b", level), list(self._rows()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        held = {**vars(self), "a": self.a.as_dict(), "b": self.b.as_dict()}
        held["intervals"] = self.intervals and self.intervals.as_dict()
        found: dict[str, Any] = plain(held)
        return found

    def __str__(self) -> str:
        pairs = f"{self.a.n_similar} similar and {self.a.n_dissimilar} dissimilar pairs"
        return f"{pairs}\n{self.table().plain()}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        a, b, known = self.a, self.b, self.intervals
        yield _row("AUC", a.auc, b.auc, self.auc, known.auc if known else None)
        yield _row("EER", a.eer, b.eer, self.eer, known.eer if known else None)
        for far, apart in self.tar_at_far.items():
            name, of_a, of_b = f"TAR at FAR {far:g}", a.tar_at_far[far], b.tar_at_far[far]
            if apart is None:
                yield name, "-", "-", "-", a.too_few(far)
            else:
                yield _row(name, of_a, of_b, apart, known.tar_at_far[far] if known else None)


def _row(
    name: str, a: float | None, b: float | None, apart: float, interval: Interval | None
) -> tuple[str, ...]:
    span = f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else "-"
    return name, number(a), number(b), f"{apart:+.4f}", span


@over_processes
def difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    similar: ArrayLike,
    *,
    higher_is_closer: bool | tuple[bool, bool],
    far: Sequence[float] = (0.1, 0.01, 0.001),
    groups: ArrayLike | None = None,
    average: Average = "pairs",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    group: Group | None = None,
) -> Difference:
    """By how much two scores of the same pairs differ in AUC, EER and TAR at each FAR.

    If 0 lies outside an interval, the difference is more than the choice of these identities
    explains. Two intervals of the figures themselves may overlap all the same: both scores find the
    same identities hard, and that part of the error cancels in the difference.

    For two sets of embeddings of the same items see `EveryPair.difference`.

    Args:
        scores_a: (n,) distances or similarities.
        scores_b: (n,) distances or similarities of the same pairs, on any scale.
        similar: (n,) bool.
        higher_is_closer: True for similarities, False for distances; or one for a and one for b.
        far: false-accept rates at which to compare true-accept rates. Each score has its own
            threshold at that rate; see `verification`.
        groups: (n, 2) integers, the two identities of each pair, or (n,) if a pair has only one.
            With it, differences have intervals, by a bootstrap over identities in which both scores
            are resampled alike. See `nearfar.evaluate.intervals.intervals_of_differences`.
        average: what rates are averaged over, "pairs" or "identities"; see `verification`.
        level: confidence level of the intervals.
        resamples: number of resamples in the bootstrap.
        seed: of the bootstrap.
        group: the processes that the pairs are spread over; see `verification`.

    Raises:
        TypeError: labels that are not bool, identities that are not integers, a wrong
            `higher_is_closer`.
        ValueError: no similar or no dissimilar pairs, scores that are not finite, wrong shapes, a
            rate in `far` that is below 0, or 1 or more.

    >>> random = np.random.default_rng(0)
    >>> a, same = np.arange(3000) % 60, np.arange(3000) < 1500
    >>> b = np.where(same, a, (a + random.integers(1, 60, 3000)) % 60)
    >>> hard = random.normal(size=60)  # identities, for both scores
    >>> common = 2.0 * ~same + hard[a] + hard[b]
    >>> before, after = common + random.normal(size=(2, 3000)) * [[1.8], [1.0]]
    >>> options = {"higher_is_closer": False, "far": (0.1,), "groups": np.stack([a, b], 1)}
    >>> print(difference(after, before, same, **options))
    1500 similar and 1500 dissimilar pairs
    figure               a       b    a - b  95% interval
    --------------  ------  ------  -------  ------------------
    AUC             0.7884  0.7426  +0.0458  +0.0168 to +0.0749
    EER             0.2840  0.3180  -0.0340  -0.0657 to -0.0023
    TAR at FAR 0.1  0.4893  0.3927  +0.0967  +0.0116 to +0.1818
    """
    check_draws(level, resamples)
    check_average(average, groups)
    if isinstance(higher_is_closer, bool):
        higher_is_closer = higher_is_closer, higher_is_closer
    if not isinstance(higher_is_closer, tuple) or [*map(type, higher_is_closer)] != [bool, bool]:
        raise TypeError(
            "higher_is_closer must be True for similarities or False for distances, or a tuple of "
            f"one for a and one for b; got {higher_is_closer!r}."
        )
    closer_a, closer_b = higher_is_closer

    def tally(scores: ArrayLike, higher: bool, name: str) -> Tally:
        closeness, same, known = checked(scores, similar, higher, groups, group, name)
        return tally_of(-closeness, same, known, average)

    return difference_of(
        (tally(scores_a, closer_a, "scores_a"), tally(scores_b, closer_b, "scores_b")),
        far,
        level=level,
        resamples=resamples,
        seed=seed,
        signs=(-1 if closer_a else 1, -1 if closer_b else 1),
    )


def difference_of(
    tallies: tuple[Tally, Tally],
    far: Sequence[float],
    *,
    level: float,
    resamples: int,
    seed: int,
    signs: tuple[int, int] = (1, 1),
) -> Difference:
    """The differences between two tallies of the same pairs; `signs` as in `figures_of`."""
    a, b = (
        figures_of(tally, far, level=level, resamples=resamples, seed=seed, sign=sign)
        for tally, sign in zip(tallies, signs, strict=True)
    )
    enough = [f for f, tar in a.tar_at_far.items() if tar is not None]
    first, second = (_estimates(found, enough) for found in (a, b))
    auc, eer, *tars = (first - second).tolist()
    none: dict[float, Any] = dict.fromkeys(a.tar_at_far)
    known, intervals = tallies[0].by_identity, None
    if known is not None and known.n >= FEWEST_IDENTITIES:
        of_auc, of_eer, *of_tars = intervals_of_differences(
            figures_at(enough),
            tallies,
            (first, second),
            level=level,
            resamples=resamples,
            seed=seed,
        )
        at_far = none | dict(zip(enough, of_tars, strict=True))
        intervals = Intervals(level, known.n, of_auc, of_eer, at_far)
    return Difference(a, b, auc, eer, none | dict(zip(enough, tars, strict=True)), intervals)


def _estimates(found: Verification, far: Sequence[float]) -> Floats:
    return np.array([found.auc, found.eer, *(found.tar_at_far[f] for f in far)], dtype=np.float64)
