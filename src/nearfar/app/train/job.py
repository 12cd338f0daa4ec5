"""From a config to a run folder, in the order of the stages.

All randomness comes from the config's seed: the split, the weights, the batches, their
augmentation, the measured pairs. The same config and data give the same files, byte for byte, on
the same machine with the same number of threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric, seed_everything
from rich.console import Console
from torch import Tensor

import nearfar
from nearfar.app.data.content import dtype_of
from nearfar.app.data.items import Items, Pairs, items_of
from nearfar.app.train.calibration import write_calibration
from nearfar.app.train.checkup import Checkup
from nearfar.app.train.compare import Comparison, compare, fit
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.frozen import last_layer
from nearfar.app.train.logs import libraries_of, open_logs
from nearfar.app.train.loop import deterministic, fabric_on, optimise
from nearfar.app.train.measure import MeasuredPairs, before_training, measure
from nearfar.app.train.objectives import verifier_distance
from nearfar.app.train.prepare import make_embedder, read_task, refuse_unwritable
from nearfar.app.train.record import Record, write_record
from nearfar.app.train.recorder import outcome
from nearfar.app.train.run import METRICS, WhenFinished, refuse_existing, write_run, writing
from nearfar.app.train.split import Split
from nearfar.app.train.task import Task
from nearfar.app.train.words import (
    network_in_words,
    pairs_in_words,
    task_in_words,
    threshold_in_words,
)
from nearfar.doctor import Diagnosis


def train(
    config: TrainConfig,
    out: Path,
    *,
    overwrite: bool,
    console: Console,
    finish: WhenFinished = None,
    log: Sequence[str] = (),
) -> Comparison:
    """Read, split, train, fit the threshold, measure, write; each stage prints what it does.

    Args:
        config: the settings of the run, with all hyperparameters filled in.
        out: the run folder to write.
        overwrite: whether an existing run may be replaced.
        console: where progress is printed.
        finish: as in `writing`.
        log: where to write the course of the run too; some of `names.LOGS`.

    Returns:
        The figures on the test identities.

    Raises:
        InputError: the data, the config or `out` cannot be used; nothing is written.
    """
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    refuse_unwritable(config, out)
    refuse_existing(out, overwrite=overwrite)
    libraries = libraries_of(log, config.data)

    task = read_task(config, say)
    data, split = task.data, task.split
    checkup = Checkup(task, lambda finding: say(f"! {finding.in_short()}", style="yellow"))

    with (
        open_logs(libraries, config, out, say) as logs,
        writing(out, overwrite=overwrite, finish=finish) as folder,
        deterministic(),
    ):
        seed_everything(config.seed, verbose=False)
        fabric = fabric_on(config.accelerator)
        begun = _begin(task, fabric, checkup, say)
        with (folder / METRICS).open("w", encoding="utf-8") as metrics:
            last, course = optimise(
                begun.task, begun.trained, fabric, metrics, console, checkup, logs
            )

        say(f"fitting the threshold on {len(split.calibration)} calibration identities")
        calibration = begun.measure(split.calibration, raw_distance=None)
        thresholds = fit(calibration, config.far)
        probability = calibration.learned.fit_probability()
        chosen_by = calibration.learned.verification()
        n_trials = chosen_by.n_trials
        say(f"  {threshold_in_words(thresholds.learned, config.far, n_trials)}")

        say(f"measuring on {len(split.test)} test identities, never seen before")
        test = begun.measure(
            split.test, raw_distance=thresholds.raw_distance, untrained=begun.untrained
        )
        say(f"  {pairs_in_words(test)}")
        found = compare(test, thresholds, probability)
        ended = outcome(items_of(data), test, found)
        diagnosis = checkup.end(ended, found.as_dict(), n_trials)
        calibrated = {"auc": chosen_by.auc, "eer": chosen_by.eer, "n_identity_pairs": n_trials}
        logs.end(found, diagnosis, config.steps)
        summary = _summary(data, split, last, calibrated, found, diagnosis)
        if begun.embedder.origin:
            summary["encoder"] = dict(begun.embedder.origin)
        write_run(folder, config, begun.embedder, thresholds, probability, summary)
        write_record(folder, Record(course, ended), _learned_from(items_of(data), split))
        write_calibration(folder, calibration, items_of(data))
    if not diagnosis.healthy:
        say(f"what it means, and what to try: nearfar doctor {out}")
    return found


@dataclass(frozen=True, eq=False)
class _Begun:
    """A new network, and what is trained of it.

    Attributes:
        embedder: the whole network.
        trained: what is trained: the whole, or the layer after a frozen encoder.
        task: the task, on items as `trained` reads them.
        untrained: (m, d) embeddings of test items by a pretrained network, before training.
    """

    embedder: Embedder
    trained: Embedder
    task: Task
    untrained: Tensor | None

    def measure(self, identities: Tensor, **more: Any) -> MeasuredPairs:
        """The pairs of these identities; for the other arguments see `measure.measure`."""
        config = self.task.config
        return measure(
            self.trained,
            self.task.data,
            identities,
            distance=verifier_distance(config.loss, config.hyperparameters),
            seed=config.seed,
            centre=self.embedder.mean,
            **more,
        )


def _begin(task: Task, fabric: Fabric, checkup: Checkup, say: Callable[..., None]) -> _Begun:
    config, data, split = task.config, task.data, task.split
    embedder = make_embedder(config, task.items, split)
    checkup.encoder(embedder)
    fabric.to_device(embedder)
    if embedder.origin:
        say(f"network {network_in_words(embedder)}")
    trained = embedder
    if config.freeze:
        say(f"passing {len(task.items.content):,} items through {config.encoder}, once")
        trained, seen = last_layer(embedder, data)
        task = replace(task, data=seen)
    untrained = before_training(trained, task.data, split.test, config.seed)
    say(f"training {task_in_words(config, trained, data, split, fabric)}")
    return _Begun(embedder, trained, task, untrained)


def _learned_from(items: Items, split: Split) -> list[bytes]:
    """Fingerprints of the items that the network or the threshold has seen."""
    seen = torch.isin(items.identity, torch.cat([split.train, split.calibration]))
    return [one for one, is_seen in zip(items.content.fingerprints(), seen, strict=True) if is_seen]


def _summary(
    data: Items | Pairs,
    split: Split,
    last: dict[str, float],
    calibrated: dict[str, float],
    found: Comparison,
    diagnosis: Diagnosis,
) -> dict[str, Any]:
    """The contents of `summary.json`, none of which depend on when or how fast the run ran."""
    items = items_of(data)
    return {
        "versions": {"nearfar": nearfar.__version__, "torch": torch.__version__},
        "data": {
            "items": len(items.content),
            "identities": len(items.identities),
            "input_shape": list(items.content.shape),
            "dtype": dtype_of(items.content),
            "sha256": data.digest(),
        },
        "split": {
            side: [items.identities[int(i)] for i in getattr(split, side)]
            for side in ("train", "calibration", "test")
        },
        "last_step": last,
        "calibration": calibrated,
        "test": found.as_dict(),
        "findings": [finding.as_dict() for finding in diagnosis.findings],
        "not_asked": diagnosis.as_dict()["not_asked"],
    }
