"""The evidence that rules examine, from `explain`, `examine`, a training run or a run folder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from nearfar.distance import Distance, check_distance
from nearfar.doctor.finding import Missing
from nearfar.doctor.texts import TextFacts
from nearfar.engine.norms import DistanceFunction
from nearfar.engine.observe import Quantity
from nearfar.inputs import between
from nearfar.memory import Drift

SETTLED = 0.25  # share of the training steps; earlier, the network is practically untrained

# What rules may lack, worded to follow "without". Rules that lack the same are listed together.
LABELS = "labels"
LOSS = "a loss"
METRICS = "the metrics of a training run"
SPLIT = "a split"
TEST = "test pairs"
PROBABILITY = 'a probability of "same"'

Known = TypeVar("Known")


def known(value: Known | None, what: str) -> Known:
    """`value`.

    Raises:
        Missing: it is None, so the rule that needs it cannot be checked.
    """
    if value is None:
        raise Missing(what)
    return value


@dataclass(frozen=True, eq=False)
class Apart:
    """How far apart labelled rows are.

    Attributes:
        similar: (p,) distances of similar rows; similarities are negated, so larger is farther.
        dissimilar: (q,) distances of dissimilar rows.
        closeness: what was measured.
        n_rows: the number of rows that the pairs consist of; None if no two pairs share a row.
    """

    similar: Tensor
    dissimilar: Tensor
    closeness: Quantity = "distance"
    n_rows: int | None = None


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of embeddings.

    Attributes:
        values: (min(n, d),) singular values, after the mean row is subtracted.
        n: number of rows.
        d: numbers per row.
        n_classes: number of classes; None without labels.
        of: the name of the tower, if there are two.
    """

    values: Tensor
    n: int
    d: int
    n_classes: int | None = None
    of: str = ""


@dataclass(frozen=True)
class Matches:
    """How well the rows of two towers find their match.

    Attributes:
        n: how many rows each tower has.
        nearer: how often a row is nearer to its own match than to another row's match.
        elsewhere: share of the rows that have a mutual nearest neighbour in the other tower that is
            not their match.
    """

    n: int
    nearer: float
    elsewhere: float


@dataclass(frozen=True)
class Commonest:
    """The most frequent label.

    Attributes:
        label: its name.
        count: how often it occurs.
        total: how many labels there are.
    """

    label: str
    count: int
    total: int


@dataclass(frozen=True)
class Side:
    """One side of a split.

    Attributes:
        identities: the identities on it.
        items: a fingerprint of each item on it; empty if the items are not known.
    """

    identities: Collection[str]
    items: Collection[bytes] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of test pairs.

    Attributes:
        value: the figure.
        low: the lower end of its interval; None if there are too few identities for one.
        high: the upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Claim:
    """A probability of "same", and how often test pairs with about this probability are the same.

    Attributes:
        claimed: the probability, for equally many same and different pairs.
        seen: the share of these pairs that are the same, so weighted.
    """

    claimed: float
    seen: Figure


@dataclass(frozen=True)
class Fitted:
    """A threshold, and what it does on test pairs.

    Attributes:
        far: the false-accept rate it was fitted at.
        n_pairs: number of pairs of calibration identities.
        n_identities: number of calibration identities.
        test_far: false-accept rate on the test pairs.
        test_pairs: number of dissimilar test pairs.
        test_identities: number of test identities.
        test_auc: how often a similar test pair is closer than a dissimilar one; None: not known.
        test_far_high: upper end of the interval of `test_far`; None: not known.
        test_tar: true-accept rate on the test pairs; None: not known.
        test_tar_at_far: true-accept rate of a threshold at `far` on them; None: not known.
    """

    far: float
    n_pairs: int | None
    n_identities: int
    test_far: float
    test_pairs: int
    test_identities: int
    test_auc: float | None = None
    test_far_high: float | None = None
    test_tar: float | None = None
    test_tar_at_far: float | None = None

    def __post_init__(self) -> None:
        for name in ("far", "test_far", "test_auc", "test_far_high", "test_tar", "test_tar_at_far"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), 0, 1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known about a batch, a split or a training run; every part is optional.

    A rule that needs a missing part raises `Missing`.

    Attributes:
        loss: the name of the loss function.
        settings: the hyperparameters it was called with.
        progress: the share of training that is done, from 0 to 1; rules about what training should
            have achieved wait for a quarter.
        apart: distances of labelled rows.
        spread: distances between every two rows, if there are no labels: by the name of the tower,
            or by "" if there is only one.
        matches: whether the rows of two towers find their match.
        lengths: (n,) lengths of the embeddings.
        broken: (n,) bool, rows that are NaN or infinite, or whose loss is.
        active: (n,) bool, whether any force acts in the row.
        wakes: the margin at which the first row would become active.
        value: the loss.
        collapsed_value: what the loss would be if all embeddings were the same.
        held: (a,) for each anchor whose negatives matter, the largest share of its push that one
            negative receives.
        positives: (n,) how many positives each anchor has.
        commonest: the most frequent label.
        spectrum: the singular values of the embeddings.
        drift: how far the rows of a memory are from the present ones of their items.
        history: the metrics of a training run step by step, named as in `metrics.jsonl`.
        sides: the sides of a split, by name.
        fitted: the threshold.
        learned_auc: AUC of the test pairs, by the distance of the embeddings.
        raw_auc: AUC of the test pairs, by the distance of the raw input.
        claims: the probabilities of "same" on the test pairs.
        texts: what is known of the items, if they are texts.
    """

    loss: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: float = 1.0
    apart: Apart | None = None
    spread: Mapping[str, Tensor] = field(default_factory=dict)
    matches: Matches | None = None
    lengths: Tensor | None = None
    broken: Tensor | None = None
    active: Tensor | None = None
    wakes: float | None = None
    value: float | None = None
    collapsed_value: float | None = None
    held: Tensor | None = None
    positives: Tensor | None = None
    commonest: Commonest | None = None
    spectrum: Spectrum | None = None
    drift: Drift | None = None
    history: Sequence[Mapping[str, float]] = ()
    sides: Mapping[str, Side] = field(default_factory=dict)
    fitted: Fitted | None = None
    learned_auc: Figure | None = None
    raw_auc: Figure | None = None
    claims: Sequence[Claim] | None = None
    texts: TextFacts | None = None

    def __post_init__(self) -> None:
        between("progress", self.progress, 0, 1, ", the share of the training that is done")

    def wait_until_settled(self) -> None:
        """Called by rules about what training should have achieved.

        Raises:
            Missing: too little of the training is done.
        """
        if self.progress < SETTLED:
            raise Missing("a quarter of the training steps")

    def setting(self, name: str) -> float | None:
        """A numeric hyperparameter; None if it is text, such as a distance."""
        value = self.settings.get(name)
        if isinstance(value, Tensor):
            return float(value.item())
        return float(value) if isinstance(value, int | float) else None

    def distance(self) -> Distance | DistanceFunction | None:
        """The distance of the loss in its only form; None if it has none."""
        distance = self.settings.get("distance")
        return distance if distance is None or callable(distance) else check_distance(distance)

    def temperature(self) -> float | None:
        """The temperature, or 1 / scale."""
        scale = self.setting("scale")
        return 1 / scale if scale else self.setting("temperature")


def fires(rule: Callable[[Evidence], object], evidence: Evidence) -> bool:
    """Whether a rule fires; for another rule that would only repeat its finding."""
    try:
        return rule(evidence) is not None
    except Missing:
        return False
