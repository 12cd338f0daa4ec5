"""What a user must not lose to the tool, and what no script may take for an answer."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, make_vectors, write_csv
from PIL import Image

from nearfar.app.errors import InputError
from nearfar.app.train.run import FILES, writing

TINY = ("--steps", "2", *QUICK[2:])


def vectors_file(path: Path, **more) -> Path:
    x, y = make_vectors(n_identities=12, n_items=4)
    np.savez(path, **{"x": x, "y": y, **more})
    return path


@pytest.fixture
def run(vector_run, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(vector_run, tmp_path / "damaged"))


def change(run: Path, name: str, **values) -> None:
    content = json.loads((run / name).read_text())
    for key, value in values.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    (run / name).write_text(json.dumps(content))


ONE, OTHER = "-0.5 0.2 1 1 1 1 1 1", "0.5 0.2 1 1 1 1 1 1"


def test_what_appears_at_out_during_training_is_kept(tmp_path):
    out = tmp_path / "run"

    def late() -> None:
        with writing(out) as folder:
            (folder / "config.toml").write_text("new")
            out.mkdir()
            (out / "thesis.txt").write_text("precious")

    with pytest.raises(InputError, match="The new one is in"):
        late()
    assert (out / "thesis.txt").read_text() == "precious"
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert (kept / "config.toml").read_text() == "new"
    assert not kept.name.startswith(".")


def test_overwrite_replaces_runs_only(nearfar, vectors, run):
    (run / "notes.txt").write_text("mine")
    done = nearfar("train", vectors, "--out", run, "--overwrite", *TINY)
    assert "'notes.txt', which is not part of a run" in done.error
    assert (run / "notes.txt").read_text() == "mine"


def test_overwrite_through_a_link_replaces_what_it_leads_to(nearfar, vectors, run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    before = (run / "model.safetensors").read_bytes()
    done = nearfar("train", vectors, "--out", link, "--overwrite", *TINY)
    assert done.status == 0, done.err
    assert link.is_symlink()
    assert (run / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "link"]


def test_a_place_that_cannot_be_written_is_refused_before_training(
    nearfar, vectors, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "the folder you are in" in nearfar("train", vectors, "--out", ".", *TINY).error
    inside = nearfar("train", folder, "--out", folder / "run", *TINY)
    assert "lies inside the data" in inside.error
    odd = vectors_file(tmp_path / os.fsdecode(b"d\xff.npz"))
    assert "not valid text" in nearfar("train", odd, "--out", "odd", *TINY).error


def test_data_are_not_written_over(nearfar, run, folder, tmp_path, monkeypatch):
    data = vectors_file(tmp_path / "v.npz")
    before = data.read_bytes()
    (link := tmp_path / "link.npz").symlink_to(data)
    for out in (data, link):
        done = nearfar("embed", run, data, "--out", out, "--overwrite")
        assert f"--out {out} is the data" in done.error
    assert "is the data" in nearfar("train", data, "--out", data, "--overwrite", *TINY).error
    assert data.read_bytes() == before
    for command in (("embed", run), ("sweep",)):
        done = nearfar(*command, folder, "--out", folder / "e.npz")
        assert "lies inside the data" in done.error
        assert done.out == ""
    monkeypatch.chdir(tmp_path)  # where a folder may have the name of the built-in letters
    (tmp_path / "glyphs").mkdir()
    assert nearfar("embed", run, "glyphs", "--out", "glyphs/e.npz").error.endswith("(8,).")


@pytest.mark.parametrize(
    "command",
    [
        ("train", "DATA", "--out", "RUN/again", *TINY),
        ("sweep", "DATA", "--out", "RUN", "--steps", 2),
        ("sweep", "DATA", "--out", "RUN/sweep", "--steps", 2),
        ("embed", "RUN", "DATA", "--out", "RUN/record.npz", "--overwrite"),
        ("report", "RUN", "--out", "RUN/other.html"),
    ],
    ids=lambda command: " ".join(command[:4:3]),
)
def test_nothing_is_written_into_a_run(nearfar, run, tmp_path, command):
    places = {"DATA": vectors_file(tmp_path / "v.npz")}
    held = {path.name: path.read_bytes() for path in run.iterdir()}
    done = nearfar(*(places.get(word, str(word).replace("RUN", str(run))) for word in command))
    assert done.status == 2
    assert f"lies inside the run {run}" in done.error
    assert done.out == ""
    assert {path.name: path.read_bytes() for path in run.iterdir()} == held
    assert nearfar("report", run, "--out", run / "report.html").status == 0


def test_degrees_of_similarity_train(nearfar, tmp_path):
    x, y = make_vectors(n_identities=12, n_items=4)
    cells = [" ".join(f"{value:.4f}" for value in row) for row in x]
    pairs = [(i, j) for i in range(len(y)) for j in range(i + 1, len(y))]
    rows = [(cells[i], cells[j], 0.9 if y[i] == y[j] else 0.2) for i, j in pairs]
    table = write_csv(tmp_path / "degrees.csv", ("a", "b", "label"), rows)
    for loss in ("contrastive", "cosine"):
        done = nearfar(
            "train", table, "--similar-label", 1, "--loss", loss, "--out", tmp_path / loss, *TINY
        )
        assert done.status == 0, done.err


def test_vectors_may_begin_with_a_minus(nearfar, vector_run):
    assert nearfar("verify", vector_run, ONE, OTHER).status in (0, 1)
    assert json.loads(nearfar("verify", vector_run, ONE, OTHER, "--json").out)["distance"] > 0
    assert nearfar("verify", "--json", "--", vector_run, ONE, OTHER).status in (0, 1)
    assert "No such option: --jsno" in nearfar("verify", vector_run, ONE, OTHER, "--jsno").error


@pytest.mark.parametrize(
    ("change_of", "named"),
    [
        ({"threshold": float("nan")}, "threshold is not a finite number"),
        ({"raw_threshold": float("inf")}, "raw_threshold is not a finite number"),
        ({"far": -1}, "far is not a rate"),
        ({"distance": "sqeuclidean"}, "the run uses"),
    ],
)
def test_a_damaged_threshold_decides_nothing(nearfar, run, change_of, named):
    change(run, "threshold.json", **change_of)
    done = nearfar("verify", run, ONE, OTHER)
    assert done.status == 2
    assert named in done.error


@pytest.mark.parametrize("part", ["data", "split", "test", "versions"])
def test_a_damaged_summary_is_named(nearfar, run, part):
    change(run, "summary.json", **{part: None})
    for command in ("doctor", "report", "evaluate"):
        assert f"it has no '{part}'" in nearfar(command, run).error


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("", "it is empty"),
        ("{}\n", "line 1: it has no 'step'"),
        ("5\n", "line 1: it is not an object"),
        ('{"step": 1, "loss": 2}\n{"step": 2, "loss": "low"}\n', "line 2: loss is not a finite"),
    ],
)
def test_damaged_metrics_are_named(nearfar, run, lines, named):
    (run / "metrics.jsonl").write_text(lines)
    for command in ("doctor", "report"):
        assert f"metrics.jsonl is damaged: {named}" in nearfar(command, run).error


@pytest.mark.parametrize(
    ("way", "value", "named"),
    [
        ("data.sha256", None, "it has no 'data.sha256'"),
        ("split.test", "1 2", "split.test is not a list"),
        ("split.test", [1], "split.test is not text"),
        ("test.n_identities", True, "test.n_identities is not a whole number"),
        ("test.learned", 3, "test.learned is not an object"),
        ("test.learned.eer", 1.5, "test.learned.eer is not a rate"),
        (
            "test.learned.tar_at_far",
            {"often": 1},
            "test.learned.tar_at_far.often is not named by a rate",
        ),
        ("test.raw.at_threshold.tar", "all", "test.raw.at_threshold.tar is not a rate"),
        ("findings", [{"name": "x"}], "it has no 'findings.seen'"),
    ],
)
def test_a_damaged_part_of_a_summary_is_named(nearfar, run, way, value, named):
    content = json.loads((run / "summary.json").read_text())
    *ways, last = way.split(".")
    part = content
    for key in ways:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    (run / "summary.json").write_text(json.dumps(content))
    for command in ("doctor", "report"):
        assert f"summary.json is damaged: {named}" in nearfar(command, run).error


@pytest.mark.parametrize(
    "name", ["summary.json", "threshold.json", "metrics.jsonl", "config.toml", "model.safetensors"]
)
def test_brackets_in_brackets_overrun_nothing(nearfar, run, name):
    brackets = b"[" * 100_000
    if name == "model.safetensors":
        brackets = len(brackets).to_bytes(8, "little") + brackets
    (run / name).write_bytes(b"format = " * (name == "config.toml") + brackets)
    command = ("verify", run, ONE, OTHER) if name == "model.safetensors" else ("doctor", run)
    done = nearfar(*command)
    assert done.status == 2
    assert name in done.error


def test_a_network_of_other_data_is_named(nearfar, run, image_run):
    (run / "model.safetensors").write_bytes((image_run / "model.safetensors").read_bytes())
    done = nearfar("evaluate", run)
    assert "holds items of shape (8,), but the network" in done.error


def test_numbers_beyond_float32_are_no_items(nearfar, run, tmp_path):
    assert nearfar("verify", run, "1e300" + " 1" * 7, OTHER).status == 2
    np.save(tmp_path / "huge.npy", np.full(8, 1e300))
    assert nearfar("verify", run, tmp_path / "huge.npy", OTHER).status == 2
    table = write_csv(
        tmp_path / "p.csv",
        ("a", "b", "label"),
        [("1 2", "3 4", "true"), ("1 1e300", "3 4", "false")],
    )
    done = nearfar("train", table, "--out", tmp_path / "out", *TINY)
    assert "line 3: a holds a number beyond float32" in done.err


def test_a_network_without_numbers_decides_nothing(nearfar, run):
    from safetensors.torch import load_file, save_file

    from nearfar.app.train.run import read_run

    path = run / "model.safetensors"
    described = {
        "nearfar": json.dumps(
            {"format": 1, "input_shape": list(read_run(run).embedder.reads.shape)}
        )
    }
    state = load_file(path)
    name = next(name for name, value in state.items() if value.ndim == 2)
    state[name][0] = torch.nan
    save_file(state, path, metadata=described)
    done = nearfar("verify", run, ONE, OTHER)
    assert done.status == 2
    assert "returns NaN or infinity" in done.error


def test_a_mistake_of_ours_is_no_answer(nearfar, vector_run, monkeypatch):
    def broken(*_):
        raise RuntimeError("oops")

    monkeypatch.setattr("nearfar.app.train.use.verify_items", broken)
    done = nearfar("verify", vector_run, ONE, OTHER)
    assert done.status == 2
    assert "please report it" in done.err


def out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "allocate",
    [lambda: np.empty(10**16), lambda: torch.empty(10**16), out_of_gpu_memory],
    ids=["numpy", "torch", "a GPU"],
)
def test_memory_that_ran_out_is_no_mistake_of_ours(
    nearfar, vectors, tmp_path, monkeypatch, allocate
):
    def greedy(*_):
        allocate()

    monkeypatch.setattr("nearfar.app.train.job.optimise", greedy)
    done = nearfar("train", vectors, "--out", tmp_path / "run", *TINY)
    assert done.status == 2
    assert done.error.startswith("nearfar: error: memory ran out. ")
    for option in ("--identities", "--items", "--image-size", "--embedding-dim"):
        assert option in done.error
    assert list(tmp_path.iterdir()) == []


def test_an_array_larger_than_memory_is_named(nearfar, tmp_path, monkeypatch):
    def greedy(*_, **__):
        raise MemoryError

    data = vectors_file(tmp_path / "v.npz")
    monkeypatch.setattr("nearfar.app.data.items.np.load", greedy)
    done = nearfar("train", data, "--out", tmp_path / "run", *TINY)
    assert "v.npz does not fit into memory" in done.error


def test_names_and_text_of_arrays_are_checked_before_training(nearfar, tmp_path):
    short = vectors_file(tmp_path / "short.npz", names=np.array(["a", "b"]))
    done = nearfar("train", short, "--out", tmp_path / "out", *TINY)
    assert "names has shape (2,)" in done.err
    y = np.array([f"é{i // 4}".encode() for i in range(48)])
    assert (
        nearfar(
            "train", vectors_file(tmp_path / "b.npz", y=y), "--out", tmp_path / "b", *TINY
        ).status
        == 0
    )
    bad = vectors_file(tmp_path / "bad.npz", y=np.array([b"\xff%d" % (i // 4) for i in range(48)]))
    assert "not UTF-8" in nearfar("train", bad, "--out", tmp_path / "c", *TINY).err


def test_an_embedding_of_one_number_has_a_report(nearfar, vectors, tmp_path):
    options = ("--steps", "2", "--items", "4", "--embedding-dim", "1")
    assert nearfar("train", vectors, "--out", tmp_path / "one", *options).status == 0
    assert (tmp_path / "one" / "report.html").is_file()


def test_a_sweep_does_not_mix_data(nearfar, tmp_path):
    data = vectors_file(tmp_path / "v.npz")
    command = ("sweep", data, "--loss", "triplet", "--out", tmp_path / "sweep", "--steps", "2")
    assert nearfar(*command, "--margin", "0.2").status == 0
    vectors_file(data, x=make_vectors(n_identities=12, n_items=4, seed=1)[0])
    done = nearfar(*command, "--margin", "0.2", "0.4")
    assert done.status == 2
    assert "has changed since" in done.err


def test_options_may_stand_before_the_data_of_a_sweep(nearfar, vectors, tmp_path):
    done = nearfar(
        "sweep", "--out", tmp_path / "s", "--seed", 1, vectors, "--loss", "triplet", "--steps", 2
    )
    assert done.status == 0, done.err


def test_pairs_are_embedded_without_their_labels(nearfar, vector_run, pairs_csv, tmp_path):
    done = nearfar("embed", vector_run, pairs_csv, "--out", tmp_path / "e.npz")
    assert done.status == 0, done.err
    with np.load(tmp_path / "e.npz") as found:
        assert set(found.files) == {"x", "names"}
    assert "y (identities)" not in done.out


def test_an_image_that_its_reader_stumbles_over_is_named(nearfar, image_run, tmp_path, monkeypatch):
    import struct

    path = tmp_path / "odd.png"
    Image.new("L", (8, 8)).save(path)

    def stumble(_):
        raise struct.error("odd tag")

    monkeypatch.setattr("nearfar.app.data.pixels.depth", lambda _, image: stumble(image))
    assert "odd.png cannot be read: it is damaged" in nearfar("verify", image_run, path, path).error


def test_a_hang_up_clears_up_too(tmp_path):
    from nearfar.app.cli import _termination_as_interrupt

    def hung_up() -> None:
        with _termination_as_interrupt(), writing(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(KeyboardInterrupt):
        hung_up()
    assert list(tmp_path.iterdir()) == []


def test_a_table_with_other_separators_is_told_so(nearfar, tmp_path):
    (tmp_path / "semi.csv").write_text("a;b;label\n1;2;true\n")
    done = nearfar("explain", tmp_path / "semi.csv", "--loss", "contrastive")
    assert "';' between cells" in done.error


def test_every_file_of_a_run_is_known(vector_run):
    """Or --overwrite would refuse it."""
    from nearfar.app.train.run import OPTIONAL

    assert {path.name for path in vector_run.iterdir()} <= {*FILES, *OPTIONAL}


def test_loose_images_are_embedded(nearfar, image_run, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(folder.rglob("*.jpg"))[:3]):
        shutil.copy(file, flat / f"{i}.jpg")
    done = nearfar("embed", image_run, flat, "--out", tmp_path / "e.npz")
    assert done.status == 0, done.err
    with np.load(tmp_path / "e.npz") as found:
        assert found["names"].tolist() == ["0.jpg", "1.jpg", "2.jpg"]
        assert "y" not in found
    assert "no subfolders" in nearfar("train", flat, "--out", tmp_path / "run").err
