"""`train --log`: the same numbers in every log, and logs that are missing, fail or are cut short.

Fakes stand in for the three libraries, so that these tests run where none is installed. At the end,
the real ones are read back, each where it is installed.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import QUICK

from nearfar.app.names import LOGS
from nearfar.app.train.logs import MLflow
from nearfar.app.train.recorder import moments


class FakeTensorBoard:
    """`torch.utils.tensorboard`, as far as it is used."""

    def __init__(self):
        self.numbers, self.texts, self.ended = [], {}, None
        self.SummaryWriter = self.opened

    def opened(self, folder):
        self.name, self.fails = folder, None
        return self

    def add_scalar(self, name, value, step):
        if self.fails == step:
            raise OSError("No space left on device\non /logs")
        self.numbers.append((name, value, step))

    def add_text(self, name, text):
        self.texts[name] = text

    def close(self):
        self.ended = "closed"


class FakeWandb:
    """`wandb`, as far as it is used: a step may not go back."""

    url, dir = None, "wandb/offline-run"

    def __init__(self):
        self.numbers, self.texts, self.ended, self.last = [], {}, None, -1
        self.summary, self.Settings = self.texts, SimpleNamespace

    def init(self, project, name, config, settings):
        self.project, self.name, self.config = project, name, config
        return self

    def log(self, values, step):
        assert step >= self.last
        self.last = step
        self.numbers += [(name, value, step) for name, value in values.items()]

    def finish(self, exit_code):
        self.ended = exit_code


class FakeMlflow:
    """`mlflow`, as far as it is used: at most 1,000 metrics at once."""

    def __init__(self):
        self.numbers, self.texts, self.ended, self.sent = [], {}, None, []
        self.entities = SimpleNamespace(Metric=lambda *given: given)

    def MlflowClient(self):  # noqa: N802 - its name there
        return self

    def set_experiment(self, name):
        self.project = name

    def get_tracking_uri(self):
        return "sqlite:///mlflow.db"

    def start_run(self, run_name):
        self.name = run_name
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def log_params(self, params):
        self.config = params

    def log_batch(self, run, metrics):
        assert (run, len(metrics) <= 1000) == ("7", True)
        self.sent.append(len(metrics))
        self.numbers += [(name, value, step) for name, value, _, step in metrics]

    def set_tag(self, run, name, text):
        self.texts[name] = text

    def end_run(self, status):
        self.ended = status


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """The fake libraries by the name of their log, in place of the real ones."""
    made = dict(zip(LOGS, (FakeTensorBoard(), FakeWandb(), FakeMlflow()), strict=True))
    modules = ("torch.utils.tensorboard", "wandb", "mlflow")
    for module, fake in zip(modules, made.values(), strict=True):
        monkeypatch.setitem(sys.modules, module, fake)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def expected(run):
    """The numbers that a log should hold, from the files of the run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(f"train/{k}", line[k], line["step"]) for line in lines for k in line if k != "step"}
    test = json.loads((run / "summary.json").read_text())["test"]
    last = len(lines)
    for side, figures in (("test", test["learned"]), ("raw", test["raw"])):
        at = figures["at_threshold"]
        found |= {(f"{side}/{name}", figures[name], last) for name in ("auc", "eer")}
        found |= {(f"{side}/{name}_at_threshold", at[name], last) for name in ("far", "tar")}
        found.add((f"{side}/threshold", at["threshold"], last))
    return found


def test_every_log_holds_the_numbers_of_the_run(nearfar, vectors, fakes, tmp_path):
    options = [part for name in LOGS for part in ("--log", name)]
    done = nearfar("train", vectors, "--out", tmp_path / "run", *QUICK, *options)
    assert done.status == 0, done.err
    for name, fake in fakes.items():
        assert done.out.count(f"logging to {name}: ") == 1
        of_snapshots = {step for name, _, step in fake.numbers if name == "calibration/auc"}
        rest = [given for given in fake.numbers if not given[0].startswith("calibration/")]
        assert of_snapshots == moments(40)
        assert set(rest) == expected(tmp_path / "run")
        assert len(rest) == len(set(rest))
        assert "no rule that could be checked found anything" in fake.texts["doctor"]
    assert 'loss = "sup_con"' in fakes["tensorboard"].texts["config"]
    assert fakes["tensorboard"].name.startswith(os.path.join("tensorboard", "run-"))  # noqa: PTH118
    assert (fakes["wandb"].project, fakes["wandb"].name) == ("nearfar", "run")
    assert (fakes["mlflow"].project, fakes["mlflow"].name) == ("nearfar", "run")
    config = fakes["wandb"].config
    assert (config["temperature"], config["steps"], "hyperparameters" in config) == (0.1, 40, False)
    assert fakes["mlflow"].config == {name: str(value) for name, value in config.items()}
    assert [fake.ended for fake in fakes.values()] == ["closed", 0, "FINISHED"]


def test_a_log_changes_no_file_of_the_run(nearfar, vectors, fakes, tmp_path):
    for name, more in (("plain", ()), ("logged", ("--log", "wandb", "--log", "wandb"))):
        done = nearfar("train", vectors, "--out", tmp_path / name, *QUICK, *more)
        assert done.status == 0, done.err
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "logged" / path.name).read_bytes(), path.name
    losses = [given for given in fakes["wandb"].numbers if given[0] == "train/loss"]
    assert len(losses) == 40  # named twice, logged once


def test_mlflow_is_sent_many_metrics_at_once(nearfar, vectors, fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(MLflow, "MOST", 60)
    monkeypatch.setattr(MLflow, "SECONDS", 1000)  # whatever the machine does meanwhile
    done = nearfar("train", vectors, "--out", tmp_path / "run", *QUICK, "--log", "mlflow")
    assert done.status == 0, done.err
    sent = fakes["mlflow"].sent
    assert len(sent) < 10
    assert all(60 <= n < 70 for n in sent[:-1])


def test_a_log_that_fails_is_left_out_and_training_goes_on(
    nearfar, vectors, fakes, tmp_path, monkeypatch
):
    board = fakes["tensorboard"]
    monkeypatch.setattr(board, "opened", lambda folder: setattr(board, "fails", 7) or board)
    board.SummaryWriter = board.opened
    options = ("--log", "tensorboard", "--log", "wandb")
    done = nearfar("train", vectors, "--out", tmp_path / "run", *QUICK, *options)
    assert done.status == 0, done.err
    said = "note: --log tensorboard stops here: No space left on device on /logs"
    assert done.out.count("stops here") == done.out.count(said) == 1
    assert max(step for _, _, step in board.numbers) == 6
    assert max(step for _, _, step in fakes["wandb"].numbers) == 40
    assert fakes["wandb"].ended == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_a_log_is_closed_when_training_ends_early(
    nearfar, vectors, fakes, tmp_path, monkeypatch, error
):
    def stop(*given):
        raise error

    monkeypatch.setattr("nearfar.app.train.job.compare", stop)
    options = [part for name in LOGS for part in ("--log", name)]
    done = nearfar("train", vectors, "--out", tmp_path / "run", *QUICK, *options)
    assert done.status == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert [fake.ended for fake in fakes.values()] == ["closed", 1, "FAILED"]
    assert len({step for _, _, step in fakes["mlflow"].numbers}) == 41  # also what was still held
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LOGS)
def test_a_missing_library_is_named_before_anything_is_read(nearfar, tmp_path, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    done = nearfar("train", tmp_path / "none.npz", "--out", tmp_path / "run", "--log", name)
    assert (done.status, done.out) == (2, "")
    assert f"--log {name} needs {name}, which is not installed: pip install {name}" in done.error


def test_a_log_that_cannot_start_is_told_before_training(
    nearfar, vectors, fakes, tmp_path, monkeypatch
):
    def refused(**given):
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(fakes["wandb"], "init", refused)
    options = ("--log", "tensorboard", "--log", "wandb")
    done = nearfar("train", vectors, "--out", tmp_path / "run", *QUICK, *options)
    assert (done.status, "training" in done.out) == (2, False)
    assert done.error.endswith(
        "--log wandb cannot start: No API key configured. Use `wandb login` to log in."
    )
    assert fakes["tensorboard"].ended == "closed"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_log_and_logs_among_the_data_are_refused(
    nearfar, folder, fakes, tmp_path, monkeypatch
):
    done = nearfar("train", "glyphs", "--out", tmp_path / "run", "--log", "comet")
    assert done.status == 2
    assert "--log must be one of tensorboard, wandb, mlflow; got 'comet'." in done.error
    monkeypatch.chdir(folder / "person 03")
    done = nearfar("train", folder, "--out", tmp_path / "run", "--log", "wandb")
    assert done.status == 2
    assert "--log writes into the folder you are in, which lies inside the data" in done.error


# -- the real libraries, where they are installed --------------------------------------------------

READ_BACK = {
    "tensorboard": """
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
(file,) = Path("tensorboard").glob("run-*/events*")
held = EventAccumulator(str(file)).Reload()
print([[s.step, s.value] for s in held.Scalars("train/loss")])
print(held.Scalars("test/auc")[0].value)
""",
    "wandb": """
import json, struct
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
(file,) = Path("wandb").glob("offline-run-*/*.wandb")
data, at, held, lines = file.read_bytes(), 7, b"", []
while at < len(data):  # LevelDB's format of a log: blocks of 32 KiB, which cut records into parts
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    _, size, kind = struct.unpack_from("<IHB", data, at)  # kinds 1 and 4 end a record
    held, at = held + data[at + 7 : at + 7 + size], at + 7 + size
    if kind in (1, 4):
        record, held = Record.FromString(held), b""
        items = record.history.item
        names = ((i.key or "/".join(i.nested_key), i.value_json) for i in items)
        lines.append({name: json.loads(value) for name, value in names})
lines = [line for line in lines if line]
print([[l["_step"], l["train/loss"]] for l in lines if "train/loss" in l])
print(lines[-1]["test/auc"])
""",
    "mlflow": """
import mlflow
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("nearfar").experiment_id
(run,) = client.search_runs([experiment])
assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
history = client.get_metric_history(run.info.run_id, "train/loss")
print(sorted([m.step, m.value] for m in history))
print(run.data.metrics["test/auc"])
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGS)
def test_the_real_library_holds_what_was_logged(vectors, tmp_path, name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    environment["MLFLOW_TRACKING_URI"] = "sqlite:///mlflow.db"

    def python(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    python("-m", "nearfar", "train", vectors, "--out", "run", *QUICK, "--log", name)
    losses, auc = map(json.loads, python("-c", READ_BACK[name]).splitlines()[-2:])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in losses] == [line["step"] for line in lines]
    assert [loss for _, loss in losses] == pytest.approx([line["loss"] for line in lines])
    test = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    assert auc == pytest.approx(test["learned"]["auc"])
