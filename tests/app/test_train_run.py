"""The main job: what a run holds, that it repeats, and that it is written whole or not at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, Ran, make_vectors, pair_rows, write_csv

from nearfar.app.errors import InputError
from nearfar.app.train.calibration import CALIBRATION
from nearfar.app.train.objectives import OBJECTIVES
from nearfar.app.train.record import RECORD
from nearfar.app.train.run import FILES, read_run, writing

TINY = ("--steps", "3", "--identities", "4", "--items", "2", "--embedding-dim", "4", "--no-report")


def content(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def figures(run: Path) -> tuple[float, float]:
    test = json.loads((run / "summary.json").read_text())["test"]
    return test["learned"]["auc"], test["raw"]["auc"]


def test_a_run_holds_what_it_says(vector_run):
    assert sorted(content(vector_run)) == sorted([*FILES, RECORD, CALIBRATION])
    lines = [json.loads(line) for line in (vector_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    norms = {"gradient_norm", "embedding_norm"}
    assert set(lines[0]) == {"step", "loss", "active_share", "lr", *norms}
    assert all(line[norm] > 0 for line in lines for norm in norms)
    summary = json.loads((vector_run / "summary.json").read_text())
    split = summary["split"]
    sides = [set(split[side]) for side in ("train", "calibration", "test")]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 40
    assert summary["last_step"] == lines[-1]


def test_nothing_depends_on_the_place_or_the_moment(vector_run, vectors):
    for name, held in content(vector_run).items():
        assert str(vector_run).encode() not in held, name
        if name != "config.toml":  # which says what to train on, as it was typed
            assert str(vectors.parent).encode() not in held, name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_trains(nearfar, vectors, tmp_path, name):
    done = nearfar("train", vectors, "--out", tmp_path / "run", "--loss", name, *QUICK)
    assert done.status == 0, done.err
    learned, raw = figures(tmp_path / "run")
    assert learned > 0.9
    assert raw < 0.75


@pytest.mark.parametrize("name", ["contrastive", "cosine", "info_nce"])
def test_losses_train_on_given_pairs(nearfar, pairs_csv, tmp_path, name):
    done = nearfar("train", pairs_csv, "--out", tmp_path / "run", "--loss", name, *QUICK)
    assert done.status == 0, done.err
    assert "dissimilar pairs across two sides are left out" in done.out
    learned, raw = figures(tmp_path / "run")
    assert learned > 0.9
    assert raw < 0.75


def test_a_folder_of_images(nearfar, image_run, folder):
    learned, raw = figures(image_run)
    assert learned >= raw  # whose cosine sees through the changing light
    assert read_run(image_run).embedder.reads.shape == (3, 16, 16)
    a, b, other = (folder / "person 03" / f for f in ("0.jpg", "1.png", "2.jpg"))
    assert nearfar("verify", image_run, a, a).out.startswith("same: ")
    assert nearfar("verify", image_run, a, b).status in (0, 1)
    assert nearfar("verify", image_run, a, other, "--json").status in (0, 1)


def test_the_same_seed_gives_the_same_files(nearfar, folder, tmp_path):
    """In this process twice, and in another one."""
    options = ["--seed", "7", "--image-size", "16", *TINY]
    for name in ("one", "two"):
        assert nearfar("train", folder, "--out", tmp_path / name, *options).status == 0
    command = [sys.executable, "-m", "nearfar", "train", folder, "--out", tmp_path / "three"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")
    done = nearfar("train", folder, "--out", tmp_path / "four", *options, "--seed", "8")
    assert done.status == 0
    assert (
        content(tmp_path / "one")["model.safetensors"]
        != (content(tmp_path / "four")["model.safetensors"])
    )


def test_a_config_repeats_its_run(nearfar, vector_run, tmp_path):
    config = vector_run / "config.toml"
    again = nearfar("train", "--config", config, "--out", tmp_path / "again", "--no-report")
    assert again.status == 0
    assert content(tmp_path / "again") == content(vector_run)
    other = ["--loss", "cosine", "--steps", "3"]
    assert nearfar("train", "--config", config, "--out", tmp_path / "b", *other).status == 0
    written = read_run(tmp_path / "b").config
    assert (written.loss, written.steps, written.identities) == ("cosine", 3, 16)
    assert dict(written.hyperparameters) == {"margin": 0.3}


def test_evaluate_repeats_the_figures_of_the_summary(nearfar, vector_run, vectors):
    found = json.loads(nearfar("evaluate", vector_run, "--json").out)
    assert found.pop("notes") == []
    assert found == json.loads((vector_run / "summary.json").read_text())["test"]
    everything = nearfar("evaluate", vector_run, vectors, "--json")
    assert "flatter" in everything.err
    assert json.loads(everything.out)["n_identities"] == 40
    # A dash in the table is told what it means: at few identities, and at few dissimilar pairs.
    for data in ([], [vectors]):
        shown = nearfar("evaluate", vector_run, *data).out
        assert " - " in shown
        assert "-: too few to tell" in shown


def test_evaluate_notices_what_the_run_has_learned_from(nearfar, vector_run, tmp_path):
    x, y = make_vectors()
    split = json.loads((vector_run / "summary.json").read_text())["split"]
    train, test = (np.isin(y, [int(name) for name in split[side]]) for side in ("train", "test"))
    shutil.copytree(vector_run, old := tmp_path / "old")  # a run from before runs kept marks
    with np.load(old / RECORD, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files if name != "learned_from"}
    np.savez(old / RECORD, **arrays)

    def notes(run, rows, names=y, by=0.0) -> list[str]:
        np.savez(tmp_path / "data.npz", x=x[rows] + np.float32(by), y=names[rows])
        done = nearfar("evaluate", run, tmp_path / "data.npz", "--json")
        found: list[str] = json.loads(done.out)["notes"]
        assert done.err.count("note: ") == len(found)
        return found

    assert notes(vector_run, test) == []
    (seen,) = notes(vector_run, train, names=y + 1000)
    assert f"has learned from {train.sum()} of the {train.sum()} items" in seen
    (both,) = notes(vector_run, train | test)
    assert f"has learned from {train.sum()} of the {(train | test).sum()} items" in both
    assert notes(vector_run, train, names=y + 1000, by=1.0) == []
    n = len(split["train"])
    for run, by in ((vector_run, 1.0), (old, 0.0)):
        (names,) = notes(run, train, by=by)
        assert f"{n} of the {n} identities" in names
        assert "if they are the same identities" in names
    assert notes(old, test) == []


def test_evaluate_knows_pairs_by_their_items(nearfar, pairs_csv, tmp_path):
    run = tmp_path / "run"
    assert nearfar("train", pairs_csv, "--out", run, *TINY).status == 0
    lines = pairs_csv.read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join(lines[:-1]))
    assert "has learned from" in nearfar("evaluate", run, tmp_path / "some.csv").err
    other = write_csv(
        tmp_path / "other.csv",
        ("a", "b", "label"),
        [("1 " * 8, "2 " * 8, "true"), ("1 " * 8, "3 " * 8, "false")],
    )
    assert nearfar("evaluate", run, other).err == ""  # though all call their items "identity 0"


def test_dissimilar_pairs_within_an_identity_are_noted(nearfar, pairs_csv, tmp_path):
    header, *lines = pairs_csv.read_text().splitlines()
    (first, _), (_, third) = (line.split(",")[:2] for line in lines[:2])
    odd = tmp_path / "odd.csv"
    odd.write_text("\n".join([header, *lines, f"{third},{first},false"]))
    note = f"note: 1 of {len(lines) + 1} pairs are labelled dissimilar, but other pairs connect"
    done = nearfar("train", odd, "--out", tmp_path / "run", *TINY)
    assert done.out.count(note) == 1
    assert f"odd.csv, line {len(lines) + 2})" in done.out
    assert note in nearfar("evaluate", tmp_path / "run", odd).err
    assert "note:" not in nearfar("train", pairs_csv, "--out", tmp_path / "fine", *TINY).out


def test_evaluate_notices_that_the_data_changed(nearfar, tmp_path):
    data = tmp_path / "v.npz"
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 3)), np.repeat(np.arange(10), 4)
    np.savez(data, x=x, y=y)
    assert nearfar("train", data, "--out", tmp_path / "run", *TINY).status == 0
    np.savez(data, x=x + 1, y=y)
    assert "has changed since" in nearfar("evaluate", tmp_path / "run").error


def test_verify_says_same_different_or_error(nearfar, vector_run, vectors, tmp_path):
    x = np.load(vectors)["x"]
    signal = x[:, :4]  # where identities differ
    farthest = int(((signal - signal[0]) ** 2).sum(1).argmax())
    rows = [f"{vectors}:{row}" for row in (0, 1, farthest)]
    same = nearfar("verify", vector_run, rows[0], rows[1])
    assert (same.status, same.out.split(":")[0]) == (0, "same")
    different = nearfar("verify", vector_run, rows[0], rows[2], "--json")
    assert different.status == 1
    decision = json.loads(different.out)
    assert not decision["same"]
    assert decision["distance"] > decision["threshold"]
    assert decision["far"] == 0.2
    np.save(tmp_path / "a.npy", x[0])
    text = " ".join(map(str, x[0].tolist()))
    assert "distance 0.0000" in nearfar("verify", vector_run, tmp_path / "a.npy", text).out


def test_embed_writes_what_evaluate_measures(nearfar, vector_run, vectors, tmp_path):
    out = tmp_path / "deep" / "e.npz"
    assert nearfar("embed", vector_run, vectors, "--out", out).status == 0
    with np.load(out, allow_pickle=False) as held:
        assert held["x"].shape == (320, 16)
        np.testing.assert_allclose(np.linalg.norm(held["x"], axis=1), 1, rtol=1e-5)
        assert held["y"][8] == "1"
        assert held["names"][8] == "vectors.npz:8"
    assert "exists" in nearfar("embed", vector_run, vectors, "--out", out).error
    assert nearfar("embed", vector_run, vectors, "--out", out, "--overwrite").status == 0
    # Embeddings are vectors with identities, so they are data again.
    assert nearfar("train", out, "--out", tmp_path / "again", *TINY).status == 0


def test_parquet_and_csv_pairs_are_the_same_data(nearfar, pairs_csv, tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = [line.split(",") for line in pairs_csv.read_text().splitlines()[1:]]
    columns = {
        "a": [[float(v) for v in a.split()] for a, _, _ in lines],
        "b": [[float(v) for v in b.split()] for _, b, _ in lines],
        "label": [int(label == "true") for _, _, label in lines],
    }
    table = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    options = ["--similar-label", "1", *TINY]
    assert nearfar("train", table, "--out", tmp_path / "parquet", *options).status == 0
    assert nearfar("train", pairs_csv, "--out", tmp_path / "csv", *TINY).status == 0
    parquet, text = content(tmp_path / "parquet"), content(tmp_path / "csv")
    assert parquet["model.safetensors"] == text["model.safetensors"]


def test_pairs_of_image_paths(nearfar, folder, tmp_path):
    folder = Path(shutil.copytree(folder, tmp_path / "photos"))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*g"))
    y = np.repeat(np.arange(12), 4)
    rows = [(files[a], files[b], int(not same)) for a, b, same in pair_rows(y)]
    table = write_csv(folder / "pairs.csv", ("a", "b", "label"), rows)
    out = tmp_path / "run"
    done = nearfar("train", table, "--out", out, "--similar-label", "0", "--image-size", 16, *TINY)
    assert done.status == 0, done.err
    assert read_run(out).embedder.reads.shape == (3, 16, 16)


FAILING = """
from torch import nn

class Failing(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + self.training
        return super().forward(x) * (float("nan") if self.calls > 20 and self.training else 1.0)

def make(input_shape, embedding_dim):
    return Failing(input_shape[0], embedding_dim)
"""


def test_a_run_is_replaced_only_when_the_new_one_is_complete(
    nearfar, vectors, tmp_path, tmp_path_factory, monkeypatch
):
    modules = tmp_path_factory.mktemp("modules")
    (modules / "failing_after_20_steps.py").write_text(FAILING)
    monkeypatch.syspath_prepend(modules)
    out = tmp_path / "run"
    assert nearfar("train", vectors, "--out", out, *TINY).status == 0
    before = content(out)
    refused = nearfar("train", vectors, "--out", out, *TINY, "--seed", 1)
    assert "--overwrite" in refused.error
    bad = ["--steps", 50, "--encoder", "failing_after_20_steps:make"]
    failed = nearfar("train", vectors, "--out", out, *TINY, *bad, "--overwrite")
    assert failed.status == 2
    assert "the loss became nan at step 21" in failed.error
    assert content(out) == before
    assert nearfar("train", vectors, "--out", out, *TINY, "--seed", 1, "--overwrite").status == 0
    assert content(out)["model.safetensors"] != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def overwritten(nearfar, vectors, run, monkeypatch, ends) -> Ran:
    """Train over a run that has a report, where writing the new one ends in its own way."""
    (run / "report.html").write_text("the old report")
    monkeypatch.setattr("nearfar.app.report.page.write_report", ends)
    return nearfar("train", vectors, "--out", run, "--overwrite", *TINY[:-1])


def test_a_run_takes_its_place_with_its_report(nearfar, vector_run, vectors, tmp_path, monkeypatch):
    """Whoever is killed while it is written has the old run, and its report."""
    run = Path(shutil.copytree(vector_run, tmp_path / "run"))
    seen = []

    def killed(folder: Path, page: Path) -> str:
        seen.append((page.parent == folder, sorted(content(folder)), content(run)))
        raise KeyboardInterrupt

    done = overwritten(nearfar, vectors, run, monkeypatch, killed)
    assert done.status == 130
    ((inside, written, before),) = seen
    assert inside
    assert written == sorted([*FILES, RECORD, CALIBRATION])
    assert before["report.html"] == b"the old report"
    assert before["model.safetensors"] == content(vector_run)["model.safetensors"]
    assert content(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_report_that_fails_costs_no_run(nearfar, vector_run, vectors, tmp_path, monkeypatch):
    run = Path(shutil.copytree(vector_run, tmp_path / "run"))

    def failing(folder: Path, page: Path) -> str:
        raise InputError("no room for a report")

    done = overwritten(nearfar, vectors, run, monkeypatch, failing)
    assert done.status == 2
    assert done.error == "nearfar: error: no room for a report"
    assert f"wrote {run} without its report; to try again: nearfar report {run}" in done.out
    assert sorted(content(run)) == sorted([*FILES, RECORD, CALIBRATION])
    assert content(run)["model.safetensors"] != content(vector_run)["model.safetensors"]


def test_only_runs_are_overwritten(nearfar, vectors, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    done = nearfar("train", vectors, "--out", tmp_path / "home", "--overwrite", *TINY)
    assert "not a run folder" in done.error
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def half() -> None:
        with writing(tmp_path / "new" / "run") as folder:
            (folder / "config.toml").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_run_leaves_nothing(vectors, tmp_path):
    command = [sys.executable, "-m", "nearfar", "train", vectors, "--out", tmp_path / "out" / "run"]
    with subprocess.Popen(
        [*map(str, command), "--steps", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as running:
        assert running.stdout is not None
        while " step " not in (line := running.stdout.readline()):
            assert line, "ended early"
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=30)
    assert said == "nearfar: error: interrupted; nothing unfinished is left\n"
    assert running.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_run_is_refused(vector_run, tmp_path, name):
    for file in FILES:
        if file != name:
            (tmp_path / file).write_bytes((vector_run / file).read_bytes())
    with pytest.raises(InputError, match=f"has no {name}"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", [name for name in FILES if name != "metrics.jsonl"])
def test_a_damaged_run_is_refused(vector_run, tmp_path, name):
    for file in FILES:
        (tmp_path / file).write_bytes((vector_run / file).read_bytes())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:20])  # in a value; half of a config may be a config
    with pytest.raises(InputError, match=name):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["config.toml", "threshold.json", "summary.json"])
def test_a_run_of_another_version_is_refused(nearfar, vector_run, tmp_path, name):
    for file in FILES:
        held = (vector_run / file).read_bytes()
        if file == name:
            held = held.replace(b"format = 1", b"format = 99").replace(
                b'"format": 1', b'"format": 99'
            )
        (tmp_path / file).write_bytes(held)
    assert "run format 99" in nearfar("evaluate", tmp_path).error


def test_nothing_reads_pickles():
    import nearfar as package

    root = Path(package.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        for opens, safe in (("np.load", "allow_pickle=False"), ("torch.load", "weights_only=True")):
            calls = re.findall(rf"{re.escape(opens)}\(([^)]*)\)", text)
            assert all(safe in call for call in calls), path
