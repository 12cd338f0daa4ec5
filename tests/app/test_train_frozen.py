"""Pretrained networks: left as they are, or compared with what they were before training."""

import json
import sys
from types import ModuleType

import pytest
import torch
from conftest import QUICK
from torch import nn

from nearfar.app import names
from nearfar.app.data.reads import Reads
from nearfar.app.train import frozen
from nearfar.app.train.compare import gained
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import read_config
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.run import read_run

FEATURES = 12


class Counting(nn.Linear):
    """A network that knows how many items it has seen."""

    seen = 0

    def forward(self, x):
        Counting.seen += len(x)
        return super().forward(x)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """A library of one pretrained network, in whose features noise is loud."""
    module = ModuleType("library_of_one")

    def build(config: TrainConfig, reads: Reads, *, weights: bool) -> Embedder:
        network = Counting(8, FEATURES)
        if weights:
            nn.init.orthogonal_(network.weight, generator=torch.Generator().manual_seed(3))
        dim = config.embedding_dim or FEATURES
        head = nn.Linear(FEATURES, dim, bias=False)
        nn.init.eye_(head.weight)
        return Embedder(network, reads, dim, head=head, pretrained=True)

    module.reads, module.build = lambda config: Reads(), build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "library_of_one", module)
    monkeypatch.setitem(names.PRETRAINED, "fake", "library_of_one")
    frozen._last.clear()
    Counting.seen = 0


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture
def train(nearfar, vectors, tmp_path):
    def run(*options, name="run"):
        done = nearfar(
            "train", vectors, "--out", tmp_path / name, "--encoder", "fake:one", *options
        )
        assert done.status == 0, done.err
        return tmp_path / name, done

    return run


def test_a_frozen_network_sees_each_item_once_and_stays(train, vectors, nearfar):
    run, done = train("--freeze", *QUICK)
    assert Counting.seen == 320
    assert "passing 320 items through fake:one, once" in done.out
    embedder = read_run(run).embedder
    wanted = nn.init.orthogonal_(
        torch.empty(FEATURES, 8), generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(embedder.encoder.weight, wanted)
    assert not torch.equal(embedder.head.weight, torch.eye(16, FEATURES))
    # The whole network, from the run folder, gives what the layer alone gave in training.
    shown = nearfar("evaluate", run, "--json")
    test, again = summary(run)["test"], json.loads(shown.out)
    assert again["learned"]["eer"] == pytest.approx(test["learned"]["eer"], abs=1e-6)
    assert again["gain"] is None  # what the network was before is not in the folder
    assert summary(run)["data"]["input_shape"] == [8]


def test_training_is_compared_with_the_network_before_it(train):
    for options in (["--freeze"], ["--learning-rate", 0.003]):
        run, done = train(*options, *QUICK, name=f"run-{len(options)}")
        test = summary(run)["test"]
        gain = test["gain"]
        assert gain["before"]["eer"] + gain["eer"] == pytest.approx(test["learned"]["eer"])
        assert gain["before"]["auc"] + gain["auc"] == pytest.approx(test["learned"]["auc"])
        assert gain["eer"] < 0  # half of the columns say nothing, which training finds out
        assert "training lowered the equal error rate of the pretrained network" in done.out
        page = (run / "report.html").read_text() if "--no-report" not in QUICK else ""
        assert not page or "Training lowered the equal error rate" in page


def test_no_change_is_neither_up_nor_down():
    gain = {"before": {"eer": 0.25}, "eer": -0.00001, "intervals": None}
    assert (
        gained(gain) == "training left the pretrained network's equal error rate as it was, 25.00 %"
    )


def test_items_of_a_frozen_network_are_not_distorted():
    assert TrainConfig("x", "sup_con", encoder="fake:one").augment
    assert not TrainConfig("x", "sup_con", encoder="fake:one", freeze=True).augment


def test_a_sweep_passes_items_through_a_frozen_network_once(nearfar, vectors, tmp_path):
    done = nearfar(
        *("sweep", vectors, "--out", tmp_path / "s", "--encoder", "fake:one", "--freeze"),
        *("--loss", "triplet", "sup_con", "--steps", 3),
    )
    assert done.status == 0, done.err
    assert Counting.seen == 320


def test_defaults_depend_on_the_encoder(train, nearfar, vectors, tmp_path):
    config = read_config(train("--steps", 2, "--no-report")[0] / "config.toml")
    assert (config.learning_rate, config.embedding_dim, config.freeze) == (0.00005, None, None)
    run, _ = train("--steps", 2, "--freeze", "--no-report", name="frozen")
    config = read_config(run / "config.toml")
    assert (config.learning_rate, config.freeze) == (0.003, True)
    again = nearfar(
        "train", "--config", run / "config.toml", "--out", tmp_path / "a", "--no-report"
    )
    assert again.status == 0, again.err
    assert (run / "model.safetensors").read_bytes() == (
        tmp_path / "a/model.safetensors"
    ).read_bytes()


def test_only_a_pretrained_network_can_stay_as_it_is(nearfar, vectors, tmp_path):
    done = nearfar("train", vectors, "--out", tmp_path / "run", "--freeze")
    assert done.status == 2
    assert "--freeze leaves a pretrained network as it is, and --encoder is auto." in done.error
