"""Train several settings on the same split, and choose the best.

The choice is by equal error rate on the calibration identities. Test figures would be biased if
they made the choice: among many equally good settings, the luckiest would win.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from nearfar.app.errors import InputError
from nearfar.app.names import SWEPT
from nearfar.app.train.config import Setting, TrainConfig
from nearfar.app.train.config_file import default_loss
from nearfar.app.train.job import train
from nearfar.app.train.objectives import belonging, objective, resolve
from nearfar.app.train.prepare import read_configured
from nearfar.app.train.record import RECORD, read_record
from nearfar.app.train.run import SUMMARY, read_results, refuse_inside, refuse_inside_run
from nearfar.evaluate.intervals import FEWEST_IDENTITIES
from nearfar.tabulate import Table


@dataclass(frozen=True)
class Trial:
    """One setting.

    Attributes:
        name: the name of its run folder: the loss, and the hyperparameters that vary.
        config: the config of the run.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that has been trained.

    Attributes:
        trial: the trial.
        run: its run folder.
        chosen_by: equal error rate on the calibration identities.
        test: figures on the test identities, as in `summary.json`.
    """

    trial: Trial
    run: Path
    chosen_by: float
    test: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        finished: the trained trials, best first by the calibration identities.
        skipped: trials for which no time was left.
        failed: trials that could not be trained, and why.
    """

    finished: tuple[FinishedTrial, ...]
    skipped: tuple[Trial, ...] = ()
    failed: tuple[tuple[Trial, str], ...] = ()

    @property
    def best(self) -> FinishedTrial:
        return self.finished[0]

    @property
    def decided(self) -> bool:
        """Whether there are enough identities to rank the trials, or only one trial."""
        return len(self.finished) == 1 or _interval(self.best) is not None

    @property
    def tied(self) -> list[str]:
        """Trials whose difference from the best may be due to chance.

        These are trials with the same calibration figure, trials whose interval contains the test
        figure of the best, and trials without an interval.
        """
        figure = self.best.test["learned"]["eer"]

        def tied(other: FinishedTrial) -> bool:
            s = _interval(other)
            equal = other.chosen_by == self.best.chosen_by
            return equal or s is None or s["low"] <= figure <= s["high"]

        return [f.trial.name for f in self.finished[1:] if tied(f)]

    def table(self) -> Table:
        """One row per trial: the figure it is ranked by, and figures on the test identities."""
        rows = [
            (
                f.trial.name,
                f"{f.chosen_by:.4f}",
                f"{f.test['learned']['eer']:.4f}",
                "–" if (s := _interval(f)) is None else f"{s['low']:.4f} to {s['high']:.4f}",
                f"{f.test['learned']['auc']:.4f}",
            )
            for f in self.finished
        ]
        return Table(("trial", "EER, calibration", "EER, test", "interval", "AUC, test"), rows)

    def render(self) -> list[str | Table]:
        """For a terminal: the table, which trial to keep, and what is missing."""
        if self.decided:
            lines = [f"keep {self.best.run}, the best on the calibration identities"]
            if self.tied:
                lines.append(f"not clearly better than: {', '.join(self.tied)}")
        else:
            few = "too few identities to tell them apart"
            lines = [f"{few}: intervals need {FEWEST_IDENTITIES} test identities"]
        lines += [f"{trial.name} failed: {why}" for trial, why in self.failed]
        if self.skipped:
            left = ", ".join(trial.name for trial in self.skipped)
            more = "the same command with more --minutes continues"
            lines.append(f"no time was left for: {left}; {more}")
        if len(self.finished) > 1:
            runs = " ".join(str(f.run) for f in self.finished)
            lines.append(f"side by side: nearfar compare {runs}")
        return [self.table(), "", *lines]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "best": self.best.trial.name if self.decided else None,
            "tied": self.tied,
            "trials": [
                {
                    "name": f.trial.name,
                    "run": str(f.run),
                    "calibration_eer": f.chosen_by,
                    "test": dict(f.test),
                }
                for f in self.finished
            ],
            "skipped": [trial.name for trial in self.skipped],
            "failed": {trial.name: why for trial, why in self.failed},
        }


def trials_from(data: str, given: Mapping[str, Any]) -> list[Trial]:
    """The trials that a command line asks for.

    Args:
        data: the data to train on.
        given: fields of `TrainConfig`, and lists of values for the options in `SWEPT`.

    Raises:
        InputError: as in `trials_of`, or a field is out of range.
    """
    fields = {name: value for name, value in given.items() if name not in SWEPT}
    settings = {name: value for name, value in given.items() if name in SWEPT and name != "loss"}
    losses = given.get("loss", [default_loss(data)])
    return trials_of(TrainConfig(data, losses[0], **fields), losses, settings)


def trials_of(
    base: TrainConfig, losses: Sequence[str], settings: Mapping[str, Sequence[Setting]]
) -> list[Trial]:
    """Every loss with every combination of the hyperparameters that it has.

    Args:
        base: the config of everything else.
        losses: names of losses.
        settings: values to try for each hyperparameter.

    Raises:
        InputError: an unknown loss, a setting that none of the losses has, a value one refuses.

    >>> base = TrainConfig(data="glyphs", loss="sup_con")
    >>> [t.name for t in trials_of(base, ["triplet", "sup_con"], {"margin": [0.1, 0.2]})]
    ['triplet-margin-0.1', 'triplet-margin-0.2', 'sup_con']
    """
    for name in settings:
        if not any(name in objective(loss).hyperparameters for loss in losses):
            among = f"none of the losses {', '.join(losses)} has a {name!r}"
            raise InputError(f"{among}.{belonging(name)}")
    found = {}
    for loss in dict.fromkeys(losses):
        own = {k: v for k, v in settings.items() if k in objective(loss).hyperparameters}
        for values in product(*own.values()):
            varied = dict(zip(own, values, strict=True))
            name = "-".join([loss, *(f"{key}-{value}" for key, value in varied.items())])
            config = replace(base, loss=loss, hyperparameters=resolve(loss, varied))
            found[name] = Trial(name, config)
    return list(found.values())


def sweep(trials: Sequence[Trial], out: Path, *, minutes: float, console: Console) -> Sweep:
    """Train the trials one after the other, each into its own folder of `out`.

    A trial whose run already exists with the same config is not trained again, so that an
    interrupted sweep continues where it stopped.

    Args:
        trials: the trials to train.
        out: the folder for all runs.
        minutes: no trial is started that, taking as long as the longest so far, would end later.
        console: where progress is printed.

    Raises:
        InputError: no trial can be trained, or `out` holds something else under a trial's name.
    """
    if not trials:
        raise InputError("a sweep needs at least one loss.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Name a folder as --out: a sweep writes several runs.")
    refuse_inside(out, trials[0].config.data)
    refuse_inside_run(out / trials[0].name)
    finished: list[FinishedTrial] = []
    skipped: list[Trial] = []
    failed: list[tuple[Trial, str]] = []
    start, longest, digest = time.monotonic(), 0.0, ""
    for number, trial in enumerate(trials, 1):
        run = out / trial.name
        begun = time.monotonic()
        if _is_done(run, trial):
            digest = digest or _digest(trial.config)
            if read_results(run).summary["data"].get("sha256") != digest:
                raise InputError(
                    f"{trial.config.data} has changed since {run} was trained on it. Choose "
                    "another --out."
                )
            console.print(f"{trial.name}: already trained", markup=False, highlight=False)
        elif finished and begun - start + longest > 60 * minutes:
            skipped.append(trial)
            continue
        else:
            title = f"\n[{number}/{len(trials)}] {trial.name}"
            console.print(title, markup=False, highlight=False, style="bold")
            try:
                train(trial.config, run, overwrite=False, console=console)
            except InputError as error:  # one trial that diverges does not stop the others
                failed.append((trial, str(error)))
                continue
            longest = max(longest, time.monotonic() - begun)
        finished.append(_finished(trial, run))
    if not finished:
        raise InputError(f"no trial could be trained. {failed[0][0].name}: {failed[0][1]}")
    finished.sort(key=lambda f: f.chosen_by)  # stable: ties keep the order of the trials
    return Sweep(tuple(finished), tuple(skipped), tuple(failed))


def _is_done(run: Path, trial: Trial) -> bool:
    if not ((run / SUMMARY).is_file() and (run / RECORD).is_file()):
        return False
    if read_results(run).config == trial.config:
        return True
    raise InputError(f"{run} is a run of another config. Choose another --out, or remove it.")


def _digest(config: TrainConfig) -> str:
    """The digest of the data, which all trials must share to be comparable."""
    return read_configured(config).digest()


def _finished(trial: Trial, run: Path) -> FinishedTrial:
    summary = read_results(run).summary
    if "calibration" in summary:
        eer = float(summary["calibration"]["eer"])
    else:  # a run before 0.1.1
        eer = float(read_record(run).course.eer[-1])
    return FinishedTrial(trial, run, eer, summary["test"])


def _interval(finished: FinishedTrial) -> Mapping[str, float] | None:
    known: Mapping[str, Any] = finished.test["learned"].get("intervals") or {}
    return known.get("eer")
