"""A run folder, read for a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import to_toml
from nearfar.app.train.record import Array, Course, Outcome, read_record
from nearfar.app.train.run import Results, read_metrics, read_results
from nearfar.registry import find


@dataclass(frozen=True, eq=False)
class Side:
    """What one distance is worth on the test pairs.

    Attributes:
        figures: as in `summary.json`.
        threshold: (p,) of the points of the curve, rising.
        far: (p,) false-accept rates.
        tar: (p,) true-accept rates.
    """

    figures: Mapping[str, Any]
    threshold: Array
    far: Array
    tar: Array


@dataclass(frozen=True, eq=False)
class Study:
    """What there is to say about a run; neither its data nor its network is needed.

    Attributes:
        results: config, thresholds and summary.
        metrics: a line a step.
        course: of the training.
        outcome: on the test pairs.
    """

    results: Results
    metrics: list[dict[str, float]]
    course: Course
    outcome: Outcome

    @property
    def config(self) -> TrainConfig:
        return self.results.config

    @property
    def test(self) -> Mapping[str, Any]:
        """The figures on the test pairs, as in `summary.json`."""
        found: Mapping[str, Any] = self.results.summary["test"]
        return found

    @property
    def findings(self) -> list[Mapping[str, Any]] | None:
        """Of the doctor; None where the run is older than the doctor."""
        found: list[Mapping[str, Any]] | None = self.results.summary.get("findings")
        return found

    @property
    def learned(self) -> Side:
        """Figures and curve of the embeddings' distance."""
        return Side(self.test["learned"], *self.outcome.learned_curve)

    @property
    def raw(self) -> Side:
        """Those of the raw input's."""
        return Side(self.test["raw"], *self.outcome.raw_curve)

    @property
    def raw_distance(self) -> str:
        """By which the raw input was compared; runs before 0.1.1 knew one only."""
        return str(self.test["raw"].get("distance", "euclidean"))

    @property
    def n_trials(self) -> int:
        """Pairs of different identities; of different items in runs before 0.1.1."""
        return int(self.test.get("n_identity_pairs", self.test["n_dissimilar"]))

    @property
    def margin(self) -> float | None:
        """The distance beyond which dissimilar pairs are left alone, of losses that have one."""
        margin, loss = self.config.hyperparameters.get("margin"), find(self.config.loss)
        if margin is None or loss is None or loss.pair_margin is None:
            return None  # that of tuples is a difference of distances, which has no place here
        return 1 - float(margin) if loss.pair_margin == "cosine" else float(margin)

    @property
    def toml(self) -> str:
        return to_toml(self.config)

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """What two runs must share for their figures to be comparable."""
        summary = self.results.summary
        return (summary["data"]["sha256"], *summary["split"]["test"])


def read_study(run: Path) -> Study:
    """A run folder.

    Raises:
        InputError: it is no run, is damaged, or was trained before runs kept a record.
    """
    results, record = read_results(run), read_record(run)
    return Study(results, read_metrics(run), record.course, record.outcome)
