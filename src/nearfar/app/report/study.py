"""Read a run folder for a report."""

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
class DistanceResult:
    """The figures and the ROC curve of one distance on the test pairs.

    Attributes:
        figures: as in `summary.json`.
        threshold: (p,) thresholds of the points of the curve, ascending.
        far: (p,) false-accept rates.
        tar: (p,) true-accept rates.
    """

    figures: Mapping[str, Any]
    threshold: Array
    far: Array
    tar: Array


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that a report says about a run, without its data or its network.

    Attributes:
        results: config, thresholds and summary.
        metrics: the metrics of each step.
        course: the course of training.
        outcome: the outcome on the test pairs.
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
        """The findings of the doctor; None if the run is older than the doctor."""
        found: list[Mapping[str, Any]] | None = self.results.summary.get("findings")
        return found

    @property
    def learned(self) -> DistanceResult:
        """Figures and curve of the distance of the embeddings."""
        return DistanceResult(self.test["learned"], *self.outcome.learned_curve)

    @property
    def raw(self) -> DistanceResult:
        """Figures and curve of the distance of the raw input."""
        return DistanceResult(self.test["raw"], *self.outcome.raw_curve)

    @property
    def raw_distance(self) -> str:
        """The distance by which the raw input is compared; runs before 0.1.1 had only one."""
        return str(self.test["raw"].get("distance", "euclidean"))

    @property
    def n_trials(self) -> int:
        """The number of pairs of identities; of dissimilar items in runs before 0.1.1."""
        return int(self.test.get("n_identity_pairs", self.test["n_dissimilar"]))

    @property
    def margin(self) -> float | None:
        """The distance beyond which the loss ignores dissimilar pairs; None if there is none."""
        margin, loss = self.config.hyperparameters.get("margin"), find(self.config.loss)
        if margin is None or loss is None or loss.pair_margin is None:
            return None  # the margin of a tuple loss is a difference of distances
        return 1 - float(margin) if loss.pair_margin == "cosine" else float(margin)

    @property
    def toml(self) -> str:
        return to_toml(self.config)

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Equal for runs whose figures are comparable: the data and the test identities."""
        summary = self.results.summary
        return (summary["data"]["sha256"], *summary["split"]["test"])


def read_study(run: Path) -> Study:
    """Read a run folder.

    Raises:
        InputError: it is not a run, is damaged, or has no record.
    """
    results, record = read_results(run), read_record(run)
    return Study(results, read_metrics(run), record.course, record.outcome)
