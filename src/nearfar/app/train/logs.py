"""The course of a training run, written where people look: TensorBoard, W&B, MLflow.

Numbers have the same names everywhere:

- `train/loss` and the other metrics of each step;
- `calibration/auc` and what else a snapshot measures, on a sample of calibration pairs;
- `test/auc` and the other figures on the test identities; `raw/auc`, those of the raw input.

A log is of what happened, so that of an interrupted run stays, unlike its run folder.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from nearfar.app.errors import InputError
from nearfar.app.names import GLYPHS, LOGS
from nearfar.app.text import printable
from nearfar.app.train.compare import Comparison
from nearfar.app.train.config import Setting, TrainConfig
from nearfar.app.train.config_file import to_toml
from nearfar.app.train.recorder import Snapshot
from nearfar.doctor import Diagnosis
from nearfar.evaluate import AtThreshold, Verification

SNAPSHOT = ("auc", "eer", "alignment", "uniformity", "effective_rank")
Numbers = Mapping[str, float]


class Log(Protocol):
    """One place that a run is written to; made from its library, the run's name and its config.

    Attributes:
        where: where to look.
    """

    where: str

    def __init__(self, library: Any, name: str, config: TrainConfig) -> None: ...

    def numbers(self, values: Numbers, step: int) -> None: ...

    def text(self, name: str, text: str) -> None: ...

    def close(self, *, completed: bool) -> None: ...


class TensorBoard:
    FOLDER = "tensorboard"
    where = f"tensorboard --logdir {FOLDER}"

    def __init__(self, library: Any, name: str, config: TrainConfig) -> None:
        started = time.strftime("%Y%m%d-%H%M%S")  # a run of the same name is another curve
        self._writer = library.SummaryWriter(str(Path(self.FOLDER) / f"{name}-{started}"))
        self.text("config", to_toml(config))

    def numbers(self, values: Numbers, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str) -> None:
        self._writer.add_text(name, f"```\n{text}\n```")  # read as Markdown

    def close(self, *, completed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, library: Any, name: str, config: TrainConfig) -> None:
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", "nearfar"),
            name=name,
            config=settings_of(config),
            settings=library.Settings(console="off"),  # it would write into the progress bar
        )
        self.where = self._run.url or self._run.dir  # there is no page of an offline run

    def numbers(self, values: Numbers, step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str) -> None:
        self._run.summary[name] = text

    def close(self, *, completed: bool) -> None:
        self._run.finish(exit_code=int(not completed))


class MLflow:
    MOST, SECONDS = 500, 5.0  # metrics sent at once, and how long they may wait

    def __init__(self, library: Any, name: str, config: TrainConfig) -> None:
        # Its own defaults keep a training run waiting for minutes after the network went down.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._library, self._client = library, library.MlflowClient()
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            library.set_experiment("nearfar")
        self._run = library.start_run(run_name=name).info.run_id
        library.log_params({key: str(v)[:250] for key, v in settings_of(config).items()})
        self._held: list[Any] = []
        self._sent = time.monotonic()
        self.where = library.get_tracking_uri()

    def numbers(self, values: Numbers, step: int) -> None:
        now, metric = int(time.time() * 1000), self._library.entities.Metric
        self._held += [metric(name, value, now, step) for name, value in values.items()]
        if len(self._held) >= self.MOST or time.monotonic() - self._sent > self.SECONDS:
            self._send()

    def _send(self) -> None:
        self._client.log_batch(self._run, metrics=self._held)
        self._held, self._sent = [], time.monotonic()

    def text(self, name: str, text: str) -> None:
        self._client.set_tag(self._run, name, text[:5000])

    def close(self, *, completed: bool) -> None:
        try:
            self._send()
        finally:
            self._library.end_run("FINISHED" if completed else "FAILED")


# In the order of `names.LOGS`: the module to import, what pip calls it, and its log.
_LIBRARIES = ("torch.utils.tensorboard", "wandb", "mlflow")
_KINDS: dict[str, tuple[str, type[Log]]] = dict(
    zip(LOGS, zip(_LIBRARIES, (TensorBoard, WeightsAndBiases, MLflow), strict=True), strict=True)
)


class Logs:
    """All logs of a run; one that fails is reported once, and left out from then on.

    Args:
        config: the settings of the run.
        name: what the run is called.
        say: called with a line for each log that opens, or fails.
    """

    def __init__(self, config: TrainConfig, name: str, say: Callable[[str], None]) -> None:
        self._config, self._name, self._say = config, name, say
        self._logs: dict[str, Log] = {}

    def open(self, kind: str, library: Any) -> None:
        """Begin to write to one more.

        Raises:
            InputError: it does not work: nobody has logged in, for example.
        """
        try:
            log = _KINDS[kind][1](library, self._name, self._config)
        except Exception as error:
            raise InputError(f"--log {kind} cannot start: {_one_line(error)}") from None
        self._logs[kind] = log
        self._say(f"logging to {kind}: {log.where}")

    def step(self, line: Numbers) -> None:
        """Log the metrics of a step, a line of `metrics.jsonl`."""
        values = {f"train/{name}": value for name, value in line.items() if name != "step"}
        self._each(lambda log: log.numbers(values, int(line["step"])))

    def snapshot(self, taken: Snapshot) -> None:
        """Log the figures on the sample of calibration pairs."""
        values = {f"calibration/{name}": getattr(taken, name) for name in SNAPSHOT}
        self._each(lambda log: log.numbers(values, taken.step))

    def end(self, found: Comparison, diagnosis: Diagnosis, step: int) -> None:
        """Log the figures on the test identities, and the findings of the doctor."""
        learned = _figures("test", found.learned, found.learned_at)
        values = {**learned, **_figures("raw", found.raw, found.raw_at)}
        self._each(lambda log: log.numbers(values, step))
        self._each(lambda log: log.text("doctor", str(diagnosis)))

    def close(self, *, completed: bool) -> None:
        self._each(lambda log: log.close(completed=completed))

    def _each(self, tell: Callable[[Log], None]) -> None:
        for kind, log in list(self._logs.items()):
            try:
                tell(log)
            except Exception as error:  # a lost connection must not lose the training
                del self._logs[kind]
                self._say(f"note: --log {kind} stops here: {_one_line(error)}")


@contextmanager
def open_logs(
    libraries: Mapping[str, Any], config: TrainConfig, out: Path, say: Callable[[str], None]
) -> Iterator[Logs]:
    """The logs of a run, which are closed when the block ends, in whatever way.

    Args:
        libraries: see `libraries_of`.
        config: the settings of the run.
        out: the run folder, by whose name the run is called.
        say: called with a line for each log that opens, or fails.

    Raises:
        InputError: a log cannot be opened.
    """
    logs, completed = Logs(config, printable(out.resolve().name), say), False
    try:
        for kind, library in libraries.items():
            logs.open(kind, library)
        yield logs
        completed = True
    finally:
        logs.close(completed=completed)


def libraries_of(names: Sequence[str], data: str) -> dict[str, Any]:
    """The modules of these logs, for a run on this data.

    Raises:
        InputError: there is no such log, its library is not installed, or its files would lie among
            the data.
    """
    found = {}
    for name in names:
        if name not in _KINDS:
            raise InputError(f"--log must be one of {', '.join(LOGS)}; got {name!r}.")
        try:
            found[name] = import_module(_KINDS[name][0])
        except ModuleNotFoundError as missing:
            library = (missing.name or name).partition(".")[0]
            raise InputError(
                f"--log {name} needs {library}, which is not installed: pip install {library}"
            ) from None
        except Exception as error:  # installed, but not for this version of something else
            raise InputError(f"--log {name} cannot be loaded: {_one_line(error)}") from None
    if found:
        _refuse_among(data)
    return found


def _refuse_among(data: str) -> None:
    """Refuse to write logs into the data: they go to the folder that the user is in."""
    source = Path(data)
    if data != GLYPHS and source.is_dir() and Path.cwd().is_relative_to(source.resolve()):
        raise InputError(
            f"--log writes into the folder you are in, which lies inside the data, {data}. "
            "Go to another folder."
        )


def settings_of(config: TrainConfig) -> dict[str, Setting]:
    """All settings by name, those of the loss beside the others."""
    held = asdict(config)
    of_loss: Mapping[str, Setting] = held.pop("hyperparameters")
    return {**{name: value for name, value in held.items() if value is not None}, **of_loss}


def _figures(where: str, found: Verification, at: AtThreshold) -> dict[str, float]:
    figures = {
        "auc": found.auc,
        "eer": found.eer,
        **{f"tar_at_far_{far:g}": tar for far, tar in found.tar_at_far.items()},
        "threshold": at.threshold,
        "far_at_threshold": at.far,
        "tar_at_threshold": at.tar,
    }
    return {f"{where}/{name}": value for name, value in figures.items() if value is not None}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
