"""What the rules look at, whoever gathered it: `explain`, `examine`, a training, a run folder."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nearfar.observe import Closeness

SETTLED = 0.25  # of a training; before, it is the untrained network that one sees


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
    """

    values: Tensor
    n: int
    d: int
    n_classes: int | None = None


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
class Fitted:
    """A threshold, and what became of it on test pairs.

    Attributes:
        far: the rate it was fitted at.
        n_pairs: dissimilar calibration pairs.
        n_identities: calibration identities.
        test_far: the rate on the test pairs.
        test_pairs: dissimilar test pairs.
        test_identities: test identities.
        test_auc: how often a similar test pair is the closer one of two; None: not known.
    """

    far: float
    n_pairs: int | None
    n_identities: int
    test_far: float
    test_pairs: int
    test_identities: int
    test_auc: float | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """Each a piece of what happened; a rule whose piece is missing stays silent.

    Attributes:
        loss: the name of the loss function.
        settings: what it was called with.
        progress: how much of the training is done, from 0 to 1; rules about what training should
            have achieved wait for a quarter of it.
        apart: distances of labelled rows.
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
    """

    loss: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: float = 1.0
    apart: Apart | None = None
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
