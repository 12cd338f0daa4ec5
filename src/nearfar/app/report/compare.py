"""Compare runs side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from nearfar.app.errors import InputError
from nearfar.app.report.chart import ROWS, Datum, Plot, false_accepts, short, spec
from nearfar.app.report.decision import curve_rows
from nearfar.app.report.study import Study, read_study
from nearfar.app.report.words import figures_table, percent, verdict
from nearfar.tabulate import Table

# "tableau10" without its grey; further runs repeat the colours with dashed lines.
COLOURS = ["#4c78a8", "#e4761a", "#3f9b49", "#e45756", "#b279a2", "#8a6d3b", "#39a0a6", "#7d5fb2"]
POINTS = 200


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Runs to compare.

    Attributes:
        names: the names of the run folders.
        studies: the contents of the run folders.
    """

    names: tuple[str, ...]
    studies: tuple[Study, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names, with a number added to those that occur more than once."""
        repeated = {name for name in self.names if self.names.count(name) > 1}
        return tuple(
            f"{name} ({i + 1})" if name in repeated else name for i, name in enumerate(self.names)
        )

    @property
    def warning(self) -> str | None:
        """Why the figures cannot be compared; None if they can."""
        first, *others = self.studies
        different = [
            label
            for label, study in zip(self.labels[1:], others, strict=True)
            if study.fingerprint != first.fingerprint
        ]
        if not different:
            return None
        return (
            f"Measured on other data or other test identities than {self.labels[0]}: "
            f"{', '.join(different)}. Such figures cannot show which run is better."
        )

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        pairs = zip(self.labels, self.studies, strict=True)
        return [(label, verdict(study.test, study.findings)) for label, study in pairs]

    def settings(self) -> Table:
        """The settings in which the configs differ."""
        configs = [_settings(study) for study in self.studies]
        keys = sorted({key for config in configs for key in config})
        differ = [key for key in keys if len({config.get(key, "–") for config in configs}) > 1]
        rows = [(key, *(config.get(key, "–") for config in configs)) for key in differ]
        return Table(("setting", *self.labels), rows)

    def table(self) -> Table:
        """Each figure of each run with its interval, and that of the raw input if runs share it."""
        tables = [figures_table(study.test) for study in self.studies]
        rows = []
        for lines in zip(*tables, strict=True):
            cells = [f"{line[1]} ({line[2]})" if line[2] != "–" else line[1] for line in lines]
            raw = [] if self.warning else [lines[0][3]]
            rows.append((lines[0][0], *cells, *raw))
        return Table(("figure", *self.labels, *([] if self.warning else ["raw input"])), rows)

    def figures(self) -> list[Plot]:
        return [self._roc(), self._course(), self._losses()]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        runs = zip(self.labels, self.studies, strict=True)
        return {
            "comparable": self.warning is None,
            "warning": self.warning,
            "runs": {label: dict(study.test) for label, study in runs},
        }

    def render(self) -> list[Table]:
        """For a terminal."""
        return [self.table()]

    def _roc(self) -> Plot:
        pairs = list(zip(self.labels, self.studies, strict=True))
        least = min(1 / study.n_trials for study in self.studies)
        rows = [row for label, study in pairs for row in curve_rows(study.learned, label, least)]
        chart = self._drawn().encode(
            x=false_accepts(least),
            y=alt.Y(
                "tar:Q",
                title="true accepts, of same pairs",
                axis=alt.Axis(format="~%"),
                scale=alt.Scale(zero=False, nice=True),
            ),
            order="far:Q",
        )
        return Plot(
            "roc",
            "ROC",
            "Each point is a threshold. Higher is better, and further left is stricter; the scale "
            "of false accepts is logarithmic.",
            f"One rising curve for each of {len(pairs)} runs.",
            Table(
                ("run", "AUC", "equal error rate"),
                [
                    (label, f"{test['auc']:.4f}", percent(test["eer"]))
                    for label, study in pairs
                    for test in [study.test["learned"]]
                ],
            ),
            spec(chart, rows, height=340),
        )

    def _course(self) -> Plot:
        rows = [
            {"step": int(step), "value": short(eer), "of": label}
            for label, study in zip(self.labels, self.studies, strict=True)
            for step, eer in zip(study.course.step, study.course.eer, strict=True)
        ]
        return self._lines(
            "errors",
            "Equal error rate on calibration identities",
            "How fast each run learns what generalises to identities it was not trained on.",
            rows,
            "equal error rate",
        )

    def _losses(self) -> Plot:
        rows = []
        for label, study in zip(self.labels, self.studies, strict=True):
            n = len(study.metrics)
            for i in np.unique(np.linspace(0, n - 1, min(POINTS, n)).round().astype(int)):
                line = study.metrics[i]
                rows.append({"step": line["step"], "value": short(line["loss"]), "of": label})
        return self._lines(
            "losses",
            "Loss",
            "Losses of different kinds or hyperparameters have different scales: compare the "
            "shapes of the curves, not their levels.",
            rows,
            "loss",
        )

    def _lines(self, name: str, title: str, caption: str, rows: Sequence[Datum], unit: str) -> Plot:
        chart = self._drawn().encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=6)),
            y=alt.Y("value:Q", title=unit, axis=alt.Axis(tickCount=5, format=".4~g")),
        )
        ends = {row["of"]: row for row in rows}
        return Plot(
            name,
            title,
            caption,
            f"One line for each of {len(ends)} runs.",
            Table(
                ("run", "at the end"), [(label, f"{row['value']:g}") for label, row in ends.items()]
            ),
            spec(chart, rows, height=240),
        )

    def _drawn(self) -> alt.Chart:
        scale = alt.Scale(domain=list(self.labels), range=COLOURS)
        dashes = alt.Scale(
            domain=list(self.labels),
            range=[[1, 0] if i < len(COLOURS) else [4, 3] for i in range(len(self.labels))],
        )
        drawn: alt.Chart = (
            alt.Chart(ROWS)
            .mark_line(strokeWidth=2)
            .encode(
                color=alt.Color("of:N", scale=scale),
                strokeDash=alt.StrokeDash("of:N", scale=dashes),
            )
        )
        return drawn


def compare_runs(runs: Sequence[Path]) -> RunComparison:
    """Read the runs in these folders.

    Raises:
        InputError: there are fewer than two, or one cannot be read or has no record.
    """
    if len(runs) < 2:
        raise InputError(f"compare needs two runs or more, got {len(runs)}: compare RUN RUN")
    return RunComparison(
        tuple(run.resolve().name for run in runs), tuple(read_study(run) for run in runs)
    )


def _settings(study: Study) -> dict[str, str]:
    settings = dict(vars(study.config))
    settings |= settings.pop("hyperparameters")
    return {name: str(value) for name, value in settings.items()}
