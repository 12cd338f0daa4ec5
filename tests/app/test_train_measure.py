"""What a run is measured on: every pair, each identity alike, beside the raw input at its best."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import QUICK, make_vectors
from sklearn.metrics import roc_auc_score

from nearfar.app.data.content import Arrays
from nearfar.app.data.items import Items
from nearfar.app.data.reads import Reads
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.measure import RAW_DISTANCES, measure
from nearfar.evaluate import every_pair


def items_of(x, y):
    names = [str(i) for i in range(int(y.max()) + 1)]
    return Items(Arrays(torch.as_tensor(x).float()), torch.as_tensor(y), [""] * len(y), names)


def measured(items, embedder=None, **options):
    if embedder is None:
        embedder = Embedder(torch.nn.Identity(), Reads(items.content.shape), 8)
        embedder.standardise(*items.content.moments(torch.arange(len(items.content))))
    everyone = torch.arange(len(items.identities))
    options = {"distance": "cosine", "raw_distance": None, "seed": 0, **options}
    return measure(embedder, items, everyone, **options)


def clouds(seed=0, offset=0.0, stretch=0.0):
    """Directions say who it is; an offset common to all, or a length of its own, hides that."""
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(30), 5)
    x = random.normal(size=(30, 6))[y] + 0.3 * random.normal(size=(len(y), 6))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x * np.exp(stretch * random.normal(size=(len(y), 1))) + offset, y


def auc_of(x, y, kind, mean):
    """Over all pairs, each identity the same number of them."""
    x = x - mean if kind == "centred cosine" else x
    if kind != "euclidean":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    a, b = np.triu_indices(len(x), k=1)
    return roc_auc_score(y[a] == y[b], -np.linalg.norm(x[a] - x[b], axis=1))


@pytest.mark.parametrize(
    ("data", "best"),
    [
        ({"stretch": 1.5}, "cosine"),
        ({"offset": 20.0, "stretch": 1.5}, "centred cosine"),
        ({"offset": 0.0, "stretch": 0.0}, None),
    ],
)
def test_the_raw_input_is_measured_by_the_distance_that_does_best(data, best):
    x, y = clouds(**data)
    found = measured(items_of(x, y))
    aucs = {kind: auc_of(x, y, kind, x.mean(0)) for kind in RAW_DISTANCES}
    assert found.raw.verification().auc == pytest.approx(max(aucs.values()), abs=1e-4)
    if best is not None:
        assert found.raw_distance == best
        assert aucs[best] > aucs["euclidean"] + 0.05


def test_the_choice_is_made_on_calibration_identities_and_kept(nearfar, tmp_path):
    x, y = clouds(stretch=1.5)
    np.savez(tmp_path / "v.npz", x=x, y=y)
    out = tmp_path / "run"
    done = nearfar("train", tmp_path / "v.npz", "--out", out, *QUICK)
    assert done.status == 0, done.err
    kept = json.loads((out / "threshold.json").read_text())
    assert kept["raw_distance"] in ("cosine", "centred cosine")
    test = json.loads((out / "summary.json").read_text())["test"]
    assert test["raw"]["distance"] == kept["raw_distance"]
    assert f"raw input, {kept['raw_distance']}" in done.out
    assert nearfar("report", out).status == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"compared by {kept['raw_distance']}" in " ".join(page.split())
    again = nearfar("evaluate", out, "--json")
    assert json.loads(again.out)["raw"] == test["raw"]
    other = nearfar("evaluate", out, tmp_path / "v.npz", "--json")
    assert json.loads(other.out)["raw"]["distance"] == kept["raw_distance"]


def test_a_run_before_0_1_1_still_evaluates_by_euclidean_distance(nearfar, vector_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(vector_run, run)
    threshold = json.loads((run / "threshold.json").read_text())
    del threshold["raw_distance"]
    (run / "threshold.json").write_text(json.dumps(threshold))
    done = nearfar("evaluate", run, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["raw"]["distance"] == "euclidean"
    threshold["raw_distance"] = "chessboard"
    (run / "threshold.json").write_text(json.dumps(threshold))
    done = nearfar("evaluate", run)
    assert done.status == 2
    assert "raw_distance is 'chessboard'" in done.err


def test_a_run_is_measured_on_every_pair(vector_run):
    summary = json.loads((vector_run / "summary.json").read_text())
    test, k = summary["test"], len(summary["split"]["test"])
    assert test["n_identities"] == k
    assert test["n_similar"] == k * 8 * 7 // 2  # 8 items each
    assert test["n_dissimilar"] == k * (k - 1) // 2 * 64
    assert test["n_identity_pairs"] == k * (k - 1) // 2
    assert 0 <= summary["calibration"]["eer"] <= 1


def test_the_threshold_is_fitted_on_every_pair():
    x, y = make_vectors()
    items = items_of(x, y)
    found = measured(items)
    threshold = found.learned.fit_threshold(far=0.02)
    embedder = Embedder(torch.nn.Identity(), Reads((8,)), 8)
    embedder.standardise(*items.content.moments(torch.arange(len(items.content))))
    expected = every_pair(embedder(items.content.x).detach(), y).fit_threshold(far=0.02)
    assert threshold == pytest.approx(expected, abs=1e-7)


def test_one_identity_of_many_items_does_not_make_the_figures_of_a_run():
    random = np.random.default_rng(0)
    y = np.concatenate([np.repeat(np.arange(100), 4), np.full(300, 100)])
    x = random.normal(size=(101, 16))[y] + 0.1 * random.normal(size=(len(y), 16))
    x[y == 100] = random.normal(size=(300, 16))
    found = measured(items_of(x, y))
    figures = found.learned.verification()
    assert figures.auc > 0.98
    assert figures.intervals.n_identities == 101
    similar = found.sample.similar
    of_one = (torch.as_tensor(y)[found.items[found.sample.pairs[similar][:, 0]]] == 100).sum()
    assert figures.n_similar == 600 + 300 * 299 // 2
    assert of_one <= 4000 - 600  # no more than the others leave free


def test_items_of_one_group_are_never_compared(nearfar, tmp_path):
    """Each identity was met in three sessions, and a session looks alike whoever it shows."""
    random = np.random.default_rng(0)
    y, session = np.repeat(np.arange(30), 6), np.tile([0, 0, 1, 1, 2, 2], 30)
    who, where = random.normal(size=(30, 8))[y], 5 * random.normal(size=(3, 8))[session]
    x = who + where + 0.1 * random.normal(size=(180, 8))
    items = replace(items_of(x, y), groups=torch.as_tensor(session))
    found = measured(items)
    assert found.learned.n_similar == found.raw.n_similar == 30 * 3 * 4  # of 15 each
    assert found.learned.n_dissimilar == 30 * 29 // 2 * 24  # of 36 for each two
    a, b = found.items[found.sample.pairs].T
    assert (session[a] != session[b]).all()
    everyone = measured(items_of(x, y), raw_distance="euclidean").raw.verification().auc
    apart = measured(items, raw_distance="euclidean").raw.verification().auc
    assert abs(everyone - apart) > 0.02
    np.savez(tmp_path / "v.npz", x=x, y=y, groups=session)
    done = nearfar("train", tmp_path / "v.npz", "--out", tmp_path / "run", *QUICK)
    assert done.status == 0, done.err
    test = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    assert test["n_similar"] == test["n_identities"] * 12
    other = json.loads(nearfar("evaluate", tmp_path / "run", tmp_path / "v.npz", "--json").out)
    assert (other["n_similar"], other["n_dissimilar"]) == (360, 10440)


def test_too_many_items_are_drawn_and_the_run_says_so(monkeypatch):
    monkeypatch.setattr("nearfar.app.train.measure.MOST_ITEMS", 60)
    x, y = clouds()
    found = measured(items_of(x, y))
    assert (len(found.items), found.n_left_out) == (60, 90)
    assert found.n_identities == 30
    again = measured(items_of(x, y))
    assert torch.equal(found.items, again.items)
