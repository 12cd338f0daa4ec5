"""What a run remembers of itself: snapshots while it trains, and what its test pairs showed."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import QUICK, make_vectors
from sklearn.metrics import roc_auc_score

from nearfar.distance import unit
from nearfar.errors import InputError
from nearfar.evaluate import verification
from nearfar.train import force_sample, recorder
from nearfar.train.config import TrainConfig
from nearfar.train.data import Items
from nearfar.train.objectives import OBJECTIVES, objective, resolve
from nearfar.train.record import RECORD, read_record
from nearfar.train.split import split_items
from nearfar.train.task import Task


def test_snapshots_run_from_the_beginning_to_the_end(vector_run):
    course = read_record(vector_run).course
    assert course.step[0] == 0
    assert course.step[-1] == 40
    assert (np.diff(course.step) > 0).all()
    assert np.diff(course.step)[0] < np.diff(course.step)[-1]
    assert course.distance.shape == (len(course.step), len(course.similar))
    assert course.force.shape == course.force_distance.shape
    for distance, auc in zip(course.distance, course.auc, strict=True):
        assert auc == pytest.approx(roc_auc_score(course.similar, -distance))
    assert course.auc[-1] > course.auc[0]


def test_the_outcome_gives_the_figures_of_the_summary(vector_run):
    outcome = read_record(vector_run).outcome
    test = json.loads((vector_run / "summary.json").read_text())["test"]
    for side in ("learned", "raw"):
        found = verification(getattr(outcome, side), outcome.similar, higher_is_closer=False)
        assert found.auc == pytest.approx(test[side]["auc"], abs=1e-12)
        assert found.eer == pytest.approx(test[side]["eer"], abs=1e-12)
    same = outcome.groups[:, 0] == outcome.groups[:, 1]
    assert (same == outcome.similar).all()
    assert len(outcome.identities) == test["n_identities"]
    kept = dict(zip(outcome.mapped.tolist(), outcome.embeddings.astype(np.float32), strict=True))
    a, b = (np.stack([kept[i] for i in side.tolist()]) for side in outcome.pairs.T)
    np.testing.assert_allclose(1 - (a * b).sum(1), outcome.learned, atol=2e-3)  # float16


def test_the_shown_items_are_those_of_the_hardest_pairs(image_run):
    outcome = read_record(image_run).outcome
    order = np.argsort(outcome.learned, kind="stable")
    similar = outcome.similar[order]
    hardest = [*order[~similar][: recorder.HARDEST], *order[similar][-recorder.HARDEST :]]
    assert set(outcome.shown.tolist()) == set(outcome.pairs[hardest].ravel().tolist())
    assert outcome.inputs.dtype == np.uint8
    assert outcome.inputs.shape == (len(outcome.shown), 3, 16, 16)


def test_thumbnails_are_small_whatever_the_images_are():
    wide = torch.rand(2, 2, 300, 150) * 1e6
    small = recorder._thumbnails(wide)
    assert small.shape == (2, 1, 96, 48)
    assert small.dtype is torch.uint8
    assert recorder._thumbnails(torch.rand(2, 1000)).shape == (2, recorder.COLUMNS)
    assert recorder._thumbnails(torch.ones(1, 1, 4, 4)).eq(0).all()


def test_looking_changes_nothing(nearfar, vector_run, vectors, tmp_path, monkeypatch):
    """The network, batches and metrics are those of a training that nobody looks at."""

    class Blind(recorder.Recorder):
        def after(self, step, network):
            if step == 40:  # too late to change anything
                super().after(step, network)

    monkeypatch.setattr("nearfar.train.loop.Recorder", Blind)
    assert nearfar("train", vectors, "--out", tmp_path / "run", *QUICK).status == 0
    for name in ("model.safetensors", "metrics.jsonl", "threshold.json"):
        assert (tmp_path / "run" / name).read_bytes() == (vector_run / name).read_bytes()


def test_given_pairs_have_a_record_too(nearfar, pairs_csv, tmp_path):
    done = nearfar("train", pairs_csv, "--out", tmp_path / "run", *QUICK)
    assert done.status == 0, done.err
    record = read_record(tmp_path / "run")
    assert record.course.auc[-1] > 0.9
    assert record.course.similar.any()
    assert not record.course.similar.all()
    assert len(record.outcome.pairs) == len(record.outcome.similar)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[::-1]])
def test_a_damaged_record_is_refused(vector_run, tmp_path, damage):
    shutil.copytree(vector_run, tmp_path / "run")
    path = tmp_path / "run" / RECORD
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{RECORD} is damaged"):
        read_record(tmp_path / "run")


def test_a_record_without_a_part_is_refused(vector_run, tmp_path):
    with np.load(vector_run / RECORD, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files if name != "outcome.raw"}
    np.savez(tmp_path / RECORD, **arrays)
    with pytest.raises(InputError, match="damaged"):
        read_record(tmp_path)


def test_a_run_older_than_records_is_read_but_has_none(nearfar, vector_run, tmp_path):
    shutil.copytree(vector_run, tmp_path / "run")
    (tmp_path / "run" / RECORD).unlink()
    assert nearfar("evaluate", tmp_path / "run").status == 0
    with pytest.raises(InputError, match=r"no record\.npz.*Train again"):
        read_record(tmp_path / "run")


def make_task(loss: str) -> Task:
    x, y = make_vectors(n_identities=12, n_items=4)
    items = Items(
        torch.from_numpy(x), torch.from_numpy(y), [""] * len(x), [str(i) for i in range(12)]
    )
    config = TrainConfig("x.npz", loss, hyperparameters=resolve(loss, {}), identities=8, items=4)
    return Task(
        config, objective(loss), items, split_items(items, calibration=0.2, test=0.2, seed=0)
    )


def make_sample(task: Task, *, scale: float = 1.0):
    """Forces on a batch of random embeddings, none left out."""
    generator = torch.Generator().manual_seed(1)
    rows = next(task.batches(generator))
    x = scale * unit(torch.randn(len(rows), 8, generator=generator, dtype=torch.float64))
    proxies = (
        torch.randn(task.n_proxies, 8, generator=generator).double() if task.n_proxies else None
    )
    return force_sample.sample_forces(task, x, rows, proxies), x, rows, proxies


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_shows_forces(name, monkeypatch):
    monkeypatch.setattr(force_sample, "N_SIMILAR", 10)
    monkeypatch.setattr(force_sample, "N_DISSIMILAR", 20)
    found, *_ = make_sample(make_task(name))
    assert found.similar.sum() == 10
    assert (~found.similar).sum() == 20
    assert found.distance.isfinite().all()
    assert found.force.isfinite().all()
    assert found.distance.min() >= -1e-6
    assert found.force[found.similar].sum() > 0
    assert found.force[~found.similar].sum() <= 0


EUCLIDEAN = [name for name, o in OBJECTIVES.items() if "distance" in o.hyperparameters]


@pytest.mark.parametrize("name", EUCLIDEAN)
def test_forces_times_distances_are_the_derivative_by_the_scale(name, monkeypatch):
    monkeypatch.setattr(force_sample, "N_SIMILAR", 10**6)
    monkeypatch.setattr(force_sample, "N_DISSIMILAR", 10**6)
    task = make_task(name)
    found, x, rows, proxies = make_sample(task, scale=0.6)
    value = partial(task.step, task.loss, rows=rows, proxies=proxies)
    up, down = (float(value(x=x * s, generator=torch.Generator())[0]) for s in (1.0001, 0.9999))
    assert float((found.force * found.distance).sum()) == pytest.approx(
        (up - down) / 2e-4, rel=2e-3
    )


# Adding one number to all similarities leaves these as they are.
SHIFTED = ["info_nce", "softmax", "sup_con", "nt_xent", "clip", "proxy_softmax"]


@pytest.mark.parametrize("name", SHIFTED)
def test_pulls_and_pushes_of_a_softmax_cancel(name, monkeypatch):
    monkeypatch.setattr(force_sample, "N_SIMILAR", 10**6)
    monkeypatch.setattr(force_sample, "N_DISSIMILAR", 10**6)
    found, *_ = make_sample(make_task(name))
    assert float(found.force.abs().sum()) > 0.1
    assert abs(float(found.force.sum())) < 1e-4 * float(found.force.abs().sum())
