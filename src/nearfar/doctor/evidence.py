"""What the rules look at, whoever gathered it: `explain`, `examine`, a training, a run folder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from nearfar.doctor.finding import Missing
from nearfar.inputs import between
from nearfar.observe import Closeness

SETTLED = 0.25  # of a training; before, it is the untrained network that one sees

# What rules miss, in words that follow "without": those of one kind are named together.
LABELS = "labels"
LOSS = "a loss"
METRICS = "the metrics of a training run"
SPLIT = "a split"
TEST = "test pairs"

Known = TypeVar("Known")


def known(value: Known | None, what: str) -> Known:
    """`value`.

    Raises:
        Missing: there is none, and the rule that asks cannot speak.
    """
    if value is None:
        raise Missing(what)
    return value


@dataclass(frozen=True, eq=False)
class Apart:
    """How far apart labelled rows are.

    Attributes:
        similar: (p,) of the similar rows; similarities negated, so that larger is farther.
        dissimilar: (q,) of the dissimilar ones.
        closeness: what was measured.
        n_rows: how many rows all those pairs are made of, where a row is in many of them; None
            where the pairs have nothing in common.
    """

    similar: Tensor
    dissimilar: Tensor
    closeness: Closeness = "distance"
    n_rows: int | None = None


@dataclass(frozen=True, eq=False)
class Spectrum:
    """In how many directions embeddings spread.

    Attributes:
        values: (min(n, d),) singular values of the rows less their mean.
        n: rows.
        d: numbers in a row.
        n_classes: of the rows; None where they have no labels.
        of: which rows they are, where there are two towers.
    """

    values: Tensor
    n: int
    d: int
    n_classes: int | None = None
    of: str = ""


@dataclass(frozen=True)
class Matches:
    """Whether the rows of two towers find their match.

    Attributes:
        n: how many rows each tower has.
        nearer: how often a row is nearer to its match than to the match of another row.
        elsewhere: share of the rows that have, in the other tower, a row that is not their match
            and each other's nearest with them.
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
        identities: who is in it.
        items: a fingerprint of each item in it; empty where the items are not known.
    """

    identities: Collection[str]
    items: Collection[bytes] = ()


@dataclass(frozen=True)
class Figure:
    """A figure of test pairs.

    Attributes:
        value: of the figure.
        low: the lower end of its interval; None where there are too few identities for one.
        high: its upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Fitted:
    """A threshold, and what became of it on test pairs.

    Attributes:
        far: the rate it was fitted at.
        n_pairs: pairs of calibration identities.
        n_identities: calibration identities.
        test_far: the rate on the test pairs.
        test_pairs: dissimilar test pairs.
        test_identities: test identities.
        test_auc: how often a similar test pair is the closer one of two; None: not known.
        test_far_high: upper end of the interval of `test_far`; None: not known.
        test_tar: true-accept rate on the test pairs; None: not known.
        test_tar_at_far: what it would be there with a threshold at `far`; None: not known.
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
    """Each a piece of what happened; a rule whose piece is missing says so, and nothing else.

    Attributes:
        loss: the name of the loss function.
        settings: what it was called with.
        progress: how much of the training is done, from 0 to 1; rules about what training should
            have achieved wait for a quarter of it.
        apart: distances of labelled rows.
        spread: distances between any two rows, whoever they are, where labels do not tell: by the
            name of a tower, or by "" where there is but one.
        matches: of two towers.
        lengths: (n,) of the embeddings.
        broken: (n,) bool, rows that are NaN or infinite, or whose loss is.
        active: (n,) bool, whether any force acts in the row.
        wakes: the margin at which the first row would become active.
        value: of the loss.
        collapsed_value: what the loss would be if all embeddings were the same.
        held: (a,) for each anchor with something to push off, the share of its push that one
            negative holds.
        positives: (n,) how many positives each anchor has.
        commonest: the most frequent label.
        spectrum: of the embeddings.
        history: a training's metrics step by step, named as in `metrics.jsonl`.
        sides: of a split, by name.
        fitted: the threshold.
        learned_auc: of the test pairs, by the distance of the embeddings.
        raw_auc: by that of the raw input.
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
    history: Sequence[Mapping[str, float]] = ()
    sides: Mapping[str, Side] = field(default_factory=dict)
    fitted: Fitted | None = None
    learned_auc: Figure | None = None
    raw_auc: Figure | None = None

    def __post_init__(self) -> None:
        between("progress", self.progress, 0, 1, ", the share of the training that is done")

    def wait_until_settled(self) -> None:
        """Called by rules about what training should have achieved.

        Raises:
            Missing: too little of it is done.
        """
        if self.progress < SETTLED:
            raise Missing("a quarter of the training")

    def setting(self, name: str) -> float | None:
        """A hyperparameter that is a number; None for one that is a word, such as margin="soft"."""
        value = self.settings.get(name)
        if isinstance(value, Tensor):
            return float(value.item())
        return float(value) if isinstance(value, int | float) else None

    def temperature(self) -> float | None:
        """The temperature, or 1 / scale."""
        scale = self.setting("scale")
        return 1 / scale if scale else self.setting("temperature")


def fires(rule: Callable[[Evidence], object], evidence: Evidence) -> bool:
    """Whether a rule finds something, for another one that would only say the same."""
    try:
        return rule(evidence) is not None
    except Missing:
        return False
