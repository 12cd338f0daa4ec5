"""Runs made to have a fault are told apart from healthy ones, live, in the summary, and later."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import QUICK, make_vectors, write_csv
from sklearn.datasets import load_digits
from torch import nn

from nearfar.app.data.items import read_npz
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.objectives import OBJECTIVES
from nearfar.app.train.split import split_items

ITEMS = ("--identities", "16", "--items", "4", "--embedding-dim", "16")


def findings(run) -> list[dict]:
    return json.loads((run / "summary.json").read_text())["findings"]


def found(run) -> list[str]:
    return [finding["name"] for finding in findings(run)]


def saved(path, x, y):
    np.savez(path, x=x.astype(np.float32), y=y)
    return path


@pytest.fixture
def trained(nearfar, tmp_path):
    """Train into a new folder; the folder, and what was printed."""

    def train(*arguments):
        done = nearfar("train", *arguments, "--out", tmp_path / "run", "--overwrite")
        assert done.status == 0, done.err
        return tmp_path / "run", done.out

    return train


def test_a_run_is_examined_without_the_code_of_its_encoder(nearfar, vector_run, tmp_path):
    shutil.copytree(vector_run, run := tmp_path / "run")
    config = run / "config.toml"
    config.write_text(config.read_text().replace('"auto"', '"gone:make"', 1))
    assert "gone:make" in nearfar("evaluate", run).error
    assert nearfar("doctor", run).out == nearfar("doctor", vector_run).out


# -- false alarms ---------------------------------------------------------------------------------

HEALTHY = (
    "contrastive", "cosine", "triplet", "info_nce", "softmax", "sup_con", "multi_similarity",
    "circle", "batch_triplet", "siglip", "proxy_softmax", "proxy_nca",
)  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_in_peace(nearfar, trained, vectors, name):
    run, out = trained(vectors, "--loss", name, *QUICK)
    assert found(run) == []
    assert "!" not in out
    later = nearfar("doctor", run)
    assert later.status == 0, later.out
    assert later.out.startswith("healthy")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in HEALTHY])
def test_the_other_losses_are_left_in_peace_too(trained, vectors, name):
    run, _ = trained(vectors, "--loss", name, *QUICK)
    assert found(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contrastive", "triplet", "sup_con"])
def test_long_healthy_runs_are_left_in_peace(trained, tmp_path, name):
    data = saved(tmp_path / "more.npz", *make_vectors(n_identities=60, seed=3))
    run, _ = trained(data, "--loss", name, *ITEMS, "--steps", 250, "--far", 0.2)
    assert found(run) == []


@pytest.mark.parametrize("name", ["contrastive", "cosine", "info_nce"])
def test_healthy_runs_on_pairs_are_left_in_peace(trained, pairs_csv, name):
    run, _ = trained(pairs_csv, "--loss", name, *QUICK)
    assert found(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sup_con", "triplet", "contrastive", "proxy_softmax"])
def test_letters_are_left_in_peace(trained, name):
    """60 steps need not beat the raw input, and the writing systems to calibrate on are hard.

    The distances of a network that learned so little need not follow a logistic curve either.
    """
    shares = ("--calibration-share", 0.06, "--test-share", 0.1)
    run, _ = trained("glyphs", "--loss", name, "--steps", 60, "--identities", 32, *shares)
    allowed = {"no-better-than-raw-input", "strict-threshold"}
    if name == "proxy_softmax":
        allowed.add("overconfident-probability")
    assert set(found(run)) <= allowed


# -- faults ---------------------------------------------------------------------------------------


class Drowned(nn.Module):
    """What it learns is lost beside a constant."""

    def __init__(self, shape, d):
        super().__init__()
        self.linear = nn.Linear(shape[0], d)

    def forward(self, x):
        return self.linear(x) + 1000


def narrow(shape, d):
    return nn.Sequential(nn.Linear(shape[0], 2), nn.Linear(2, d))


FAULTS = [
    ("temperature-too-low", ("--loss", "sup_con", "--temperature", "0.0001")),
    ("temperature-too-low", ("--loss", "info_nce", "--temperature", "0.0001")),
    ("temperature-too-low", ("--loss", "proxy_softmax", "--scale", "10000")),
    ("unreachable-margin", ("--loss", "contrastive", "--margin", "3")),
    ("unreachable-margin", ("--loss", "batch_triplet", "--margin", "2.5")),
    ("idle-margin", ("--loss", "contrastive", "--margin", "0")),
    ("idle-margin", ("--loss", "batch_cosine", "--margin", "1")),
    ("exploding-norms", ("--learning-rate", "10")),
    ("collapsed-embedding", ("--loss", "triplet", "--encoder", "test_doctor_runs:Drowned")),
    ("collapsed-embedding", ("--loss", "sup_con", "--encoder", "test_doctor_runs:Drowned")),
    ("coarse-threshold", ("--far", "0.001")),
]


@pytest.mark.parametrize(("name", "options"), FAULTS)
def test_a_run_made_to_have_a_fault(nearfar, trained, vectors, name, options):
    run, out = trained(vectors, *QUICK, *options)
    assert found(run) == [name]
    (finding,) = findings(run)
    assert finding["step"] == 1 or "margin" not in name  # settings are seen at once
    live = [line for line in out.splitlines() if line.startswith("! ")]
    assert len(live) == 1
    assert f"{name}: {finding['seen']}" in live[0]
    assert f"nearfar doctor {run}" in out
    later = nearfar("doctor", run)
    assert later.status == 1
    assert name in later.out
    assert finding["advice"].split(";")[0] in later.out


def test_noise_is_called_noise(trained, tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    run, _ = trained(saved(tmp_path / "noise.npz", x, np.arange(400) // 4), *QUICK)
    assert "no-better-than-chance" in found(run)


def test_ten_digits_are_too_few_identities(nearfar, trained, tmp_path):
    x, y = load_digits(return_X_y=True)
    run, out = trained(saved(tmp_path / "digits.npz", x, y), "--steps", 150, "--no-report")
    expected = ["few-identities", "no-better-than-raw-input", "coarse-threshold"]
    assert found(run) == expected
    assert "There are 6 identities to learn from." in out
    assert out.index("! few-identities") < out.index("training")  # before time is spent on it
    later = nearfar("doctor", run)
    assert later.status == 1
    assert "Add identities: dozens at least" in later.out
    assert "without enough identities to tell from chance: overfit-threshold" in later.out


def test_dimensional_collapse(trained, tmp_path):
    data = saved(tmp_path / "many.npz", *make_vectors(n_identities=100, n_items=4))
    size = ("--steps", 40, "--identities", 48, "--embedding-dim", 64, "--far", 0.05)
    assert found(trained(data, *size)[0]) == []
    run, _ = trained(data, *size, "--encoder", "test_doctor_runs:narrow")
    assert found(run) == ["dimensional-collapse"]


def test_dead_batches(trained, tmp_path):
    data = saved(tmp_path / "easy.npz", *make_vectors(dim=64, noise=0))
    run, _ = trained(data, *QUICK, "--loss", "triplet", "--margin", 0.05)
    assert found(run) == ["dead-batch", "no-better-than-raw-input"]  # what costs nothing is easy
    assert findings(run)[0]["step"] > 1


def separate_pairs(n, *, flipped=False, similar_share=0.5):
    """Pairs that share no item, so that a wrong label joins no two identities."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(n):
        same = i < similar_share * n
        a, b = random.normal(size=(2, 4))
        b = a + 0.1 * random.normal(size=4) if same else b
        cells = (" ".join(f"{value:.4f}" for value in side) for side in (a, b))
        rows.append((*cells, str(same != flipped).lower()))
    return rows


@pytest.mark.parametrize("flipped", [False, True])
def test_flipped_labels(trained, tmp_path, flipped):
    rows = separate_pairs(400, flipped=flipped)
    table = write_csv(tmp_path / "pairs.csv", ("a", "b", "label"), rows)
    run, _ = trained(table, *QUICK, "--far", 0.1)
    # The raw input says it all, or the opposite.
    assert found(run) == [*["flipped-labels"] * flipped, "no-better-than-raw-input"]
    steps = [finding["step"] for finding in findings(run)]
    assert steps == [*[10] * flipped, None]  # a quarter of them


def test_few_positives_and_imbalance(trained, tmp_path):
    rows = separate_pairs(300, similar_share=0.05)
    table = write_csv(tmp_path / "pairs.csv", ("a", "b", "label"), rows)
    options = ("--steps", 40, "--identities", 32, "--embedding-dim", 16, "--far", 0.1)
    run, _ = trained(table, *options)
    assert found(run) == ["imbalance", "few-positives", "no-better-than-raw-input"]
    assert "285 of 300 labels are 'dissimilar'" in findings(run)[0]["seen"]


def test_duplicates_across_splits(trained, vectors, tmp_path):
    x, y = make_vectors()
    split = split_items(read_npz(vectors), calibration=0.2, test=0.2, seed=0)
    x[y == int(split.test[0])] = x[y == int(split.train[0])]
    run, out = trained(saved(tmp_path / "copied.npz", x, y), *QUICK)
    assert found(run) == ["duplicates-across-splits"]
    assert out.index("! duplicates-across-splits") < out.index("training")


def test_a_threshold_that_does_not_hold(trained, tmp_path):
    """The test identities are all but one and the same, and those to calibrate are not."""
    x, y = make_vectors(n_identities=250, n_items=3, noise=0)
    data = saved(tmp_path / "apart.npz", x, y)
    split = split_items(read_npz(data), calibration=0.2, test=0.2, seed=0)
    alike = torch.isin(torch.from_numpy(y), split.test).numpy()
    x[alike] = 0.05 * x[alike] + x[0]
    run, _ = trained(saved(data, x, y), *QUICK, "--far", 0.01)
    assert found(run) == [
        "no-better-than-raw-input",
        "overfit-threshold",
        "overconfident-probability",
    ]


def test_a_threshold_that_is_too_strict(trained, tmp_path):
    """The identities to calibrate on come in twos that are all but the same."""
    x, y = make_vectors(n_identities=250, n_items=3, noise=1)
    data = saved(tmp_path / "twins.npz", x, y)
    split = split_items(read_npz(data), calibration=0.2, test=0.2, seed=0)
    for one, twin in split.calibration.view(-1, 2).tolist():
        x[y == twin] = x[y == one] + 0.01
    run, _ = trained(saved(data, x, y), *QUICK, "--far", 0.01)
    assert found(run) == ["strict-threshold"]


def test_what_a_run_could_not_be_asked(nearfar, vector_run, tmp_path):
    """What training saw is not held against the files, which know less."""
    summary = json.loads((vector_run / "summary.json").read_text())
    few = "enough identities to tell from chance"
    assert few in summary["not_asked"]
    assert not any("dead-batch" in names for names in summary["not_asked"].values())
    said = json.loads(nearfar("doctor", vector_run, "--json").out)
    assert said["not_asked"] == summary["not_asked"]
    run = shutil.copytree(vector_run, tmp_path / "run")
    del summary["not_asked"], summary["calibration"]  # older than that
    (run / "summary.json").write_text(json.dumps(summary))
    said = json.loads(nearfar("doctor", run, "--json").out)
    assert "coarse-threshold" in said["not_asked"]["the number of calibration pairs"]


def test_an_identity_leak_in_a_run_that_says_so_itself(nearfar, vector_run, tmp_path):
    run = shutil.copytree(vector_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["split"]["test"][0] = summary["split"]["train"][0]
    (run / "summary.json").write_text(json.dumps(summary))
    assert nearfar("doctor", run).out.startswith("! identity-leak: 1 of 8 identities of test")


# -- the command ----------------------------------------------------------------------------------


def test_runs_older_than_the_doctor(nearfar, vector_run, tmp_path):
    run = shutil.copytree(vector_run, tmp_path / "run")
    (run / "record.npz").unlink()
    summary = json.loads((run / "summary.json").read_text())
    del summary["findings"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert nearfar("doctor", run).status == 0
    assert nearfar("evaluate", run).status == 0


def test_a_file_of_embeddings(nearfar, vector_run, vectors, tmp_path):
    written = tmp_path / "embeddings.npz"
    assert nearfar("embed", vector_run, vectors, "--out", written).status == 0
    assert nearfar("doctor", written).status == 0
    with np.load(written) as arrays:
        x, y = arrays["x"], arrays["y"]
    collapsed = nearfar("doctor", saved(tmp_path / "one.npz", 1 + 1e-4 * x, y), "--json")
    assert collapsed.status == 1
    said = json.loads(collapsed.out)
    assert not said["healthy"]
    assert [finding["name"] for finding in said["findings"]] == ["collapsed-embedding"]
    np.savez(tmp_path / "unlabelled.npz", x=1 + 1e-4 * x)
    unlabelled = nearfar("doctor", tmp_path / "unlabelled.npz")
    assert unlabelled.status == 1
    assert unlabelled.out.startswith("! collapsed-embedding: Nine in ten pairs of rows are at most")
    assert "\nnot checked, without labels: flipped-labels, " in unlabelled.out
    x[3] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    assert nearfar("doctor", tmp_path / "nan.npz").out.startswith("! not-a-number: 1 of")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.arange(3)}, "no array 'x'"),
        ({"x": np.zeros((3, 2, 2))}, "must be (n, d) numbers"),
        ({"x": np.zeros((0, 2))}, "must be (n, d) numbers"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, dtype=int)}, "must be (3,) integers or text"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "must be (3,) integers or text"),
    ],
)
def test_what_is_no_file_of_embeddings(nearfar, tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    done = nearfar("doctor", tmp_path / "bad.npz")
    assert done.status == 2
    assert says in done.error


def test_what_is_no_run(nearfar, vector_run, tmp_path):
    assert nearfar("doctor", tmp_path / "nothing").status == 2
    assert nearfar("doctor", tmp_path / "nothing.npz").status == 2
    assert "neither a run folder nor an .npz" in nearfar("doctor", __file__).error
    run = shutil.copytree(vector_run, tmp_path / "run")
    (run / "metrics.jsonl").write_text("{")
    assert "is damaged" in nearfar("doctor", run).error


def test_the_doctor_does_not_change_what_is_trained(trained, vectors, monkeypatch):
    with_doctor = (trained(vectors, *QUICK)[0] / "model.safetensors").read_bytes()
    monkeypatch.setattr("nearfar.app.train.checkup.Checkup.step", lambda *_: None)
    without = (trained(vectors, *QUICK)[0] / "model.safetensors").read_bytes()
    assert with_doctor == without
    assert TrainConfig(data="", loss="sup_con").far == 0.01  # what the runs above rely on
