"""What a run remembers of itself: snapshots while it trains, and what its test pairs showed."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import QUICK, make_vectors
from sklearn.metrics import roc_auc_score

from nearfar.app.data.content import COLUMNS, Arrays, thumbnails
from nearfar.app.data.items import Items
from nearfar.app.errors import InputError
from nearfar.app.train import force_sample, record, recorder
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import read_config, to_toml
from nearfar.app.train.objectives import OBJECTIVES, objective, resolve
from nearfar.app.train.record import RECORD, read_record
from nearfar.app.train.split import split_items
from nearfar.app.train.task import Task
from nearfar.distance import unit
from nearfar.evaluate import verification


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
    groups = outcome.identity[outcome.pairs]
    options = {"higher_is_closer": False, "groups": groups, "average": "identities"}
    for side in ("learned", "raw"):
        threshold, far, tar = getattr(outcome, f"{side}_curve")
        wide = np.diff(far, prepend=0)
        auc = (wide * (tar + np.append(0, tar[:-1]))).sum() / 2
        assert auc == pytest.approx(test[side]["auc"], abs=2e-3)
        at = test[side]["at_threshold"]
        place = threshold.tolist().index(at["threshold"])
        assert (far[place], tar[place]) == (at["far"], at["tar"])
        assert (np.diff(threshold) >= 0).all()
        # The sample holds all similar pairs here, and many of the dissimilar ones.
        sampled = verification(getattr(outcome, side), outcome.similar, **options)
        assert sampled.auc == pytest.approx(test[side]["auc"], abs=0.02)
    assert ((groups[:, 0] == groups[:, 1]) == outcome.similar).all()
    assert len(outcome.identities) == test["n_identities"]
    kept = dict(zip(outcome.mapped.tolist(), outcome.embeddings.astype(np.float32), strict=True))
    a, b = (np.stack([kept[i] for i in side.tolist()]) for side in outcome.pairs.T)
    np.testing.assert_allclose(1 - (a * b).sum(1), outcome.learned, atol=2e-3)  # float16


def test_the_shown_items_are_those_of_the_hardest_pairs(image_run):
    outcome = read_record(image_run).outcome
    assert set(outcome.shown.tolist()) == set(outcome.hardest.ravel().tolist())
    same = outcome.identity[outcome.hardest[:, 0]] == outcome.identity[outcome.hardest[:, 1]]
    assert (same == outcome.hardest_similar).all()
    far, near = outcome.hardest_distance[same], outcome.hardest_distance[~same]
    assert (np.diff(far) <= 0).all()
    assert (np.diff(near) >= 0).all()
    # Nothing in the sample is harder.
    assert outcome.learned[outcome.similar].max() == pytest.approx(far[0], abs=1e-6)
    assert outcome.learned[~outcome.similar].min() >= near[0] - 1e-6
    assert outcome.inputs.dtype == np.uint8
    assert outcome.inputs.shape == (len(outcome.shown), 3, 16, 16)


def test_thumbnails_are_small_whatever_the_images_are():
    wide = torch.rand(2, 2, 300, 150) * 1e6
    small = thumbnails(wide)
    assert small.shape == (2, 1, 96, 48)
    assert small.dtype is torch.uint8
    assert Arrays(torch.rand(2, 1000)).shown(torch.arange(2)).shape == (2, COLUMNS)
    assert thumbnails(torch.ones(1, 1, 4, 4)).eq(0).all()


def test_looking_changes_nothing(nearfar, vector_run, vectors, tmp_path, monkeypatch):
    """The network, batches and metrics are those of a training that nobody looks at."""

    class Blind(recorder.Recorder):
        def after(self, step, network):
            if step == 40:  # too late to change anything
                super().after(step, network)

    monkeypatch.setattr("nearfar.app.train.loop.Recorder", Blind)
    assert nearfar("train", vectors, "--out", tmp_path / "run", *QUICK).status == 0
    for name in ("model.safetensors", "metrics.jsonl", "threshold.json"):
        assert (tmp_path / "run" / name).read_bytes() == (vector_run / name).read_bytes()


def test_given_pairs_have_a_record_too(nearfar, pairs_csv, tmp_path):
    done = nearfar("train", pairs_csv, "--out", tmp_path / "run", *QUICK)
    assert done.status == 0, done.err
    found = read_record(tmp_path / "run")
    assert found.course.auc[-1] > 0.9
    assert found.course.similar.any()
    assert not found.course.similar.all()
    assert len(found.outcome.pairs) == len(found.outcome.similar)


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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("course.similar", lambda a: a[:-1]),
        ("course.distance", lambda a: a[:0]),
        ("course.auc", lambda a: a[0]),
        ("course.force", lambda a: a.T),
        ("outcome.embeddings", lambda a: np.full_like(a, np.nan)),
        ("outcome.names", lambda a: np.zeros(len(a))),
        ("outcome.identity", lambda a: a + 1000),
        ("outcome.mapped", lambda a: a - 1),
        ("outcome.shown", lambda a: a[::-1] * 0),
        ("outcome.inputs", lambda a: a[:-1]),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_arrays_that_do_not_fit_each_other_are_refused(vector_run, tmp_path, name, change):
    run = shutil.copytree(vector_run, tmp_path / "run")
    with np.load(run / RECORD) as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(run / RECORD, **{**arrays, name: change(arrays[name])})
    with pytest.raises(InputError, match="damaged"):
        read_record(run)


def test_a_record_before_0_1_1_has_its_curves_made(vector_run, tmp_path):
    new = ("learned_curve", "raw_curve", "hardest", "hardest_similar", "hardest_distance")
    with np.load(vector_run / RECORD, allow_pickle=False) as held:
        arrays = {n: held[n] for n in held.files if n.removeprefix("outcome.") not in new}
    np.savez(tmp_path / RECORD, **arrays)
    outcome = read_record(tmp_path).outcome
    found = verification(outcome.learned, outcome.similar, higher_is_closer=False)
    np.testing.assert_array_equal(outcome.learned_curve[1], found.curve.far)
    assert outcome.hardest_distance[0] == outcome.learned[~outcome.similar].min()
    assert outcome.hardest_similar.sum() == (~outcome.hardest_similar).sum() == record.HARDEST


def test_a_run_older_than_records_is_read_but_has_none(nearfar, vector_run, tmp_path):
    shutil.copytree(vector_run, tmp_path / "run")
    (tmp_path / "run" / RECORD).unlink()
    assert nearfar("evaluate", tmp_path / "run").status == 0
    with pytest.raises(InputError, match=r"no record\.npz.*Train again"):
        read_record(tmp_path / "run")


def test_a_run_of_0_1_with_its_soft_margin_is_read(nearfar, vector_run, tmp_path):
    """Its config holds what the loss no longer takes; only to train again, that must be changed."""
    run = shutil.copytree(vector_run, tmp_path / "run")
    soft = {"margin": "soft", "distance": "cosine"}
    config = replace(
        read_config(run / "config.toml"), loss="batch_triplet", hyperparameters=soft, steps=2
    )
    (run / "config.toml").write_text(to_toml(config), encoding="utf-8", newline="")
    for command in ("evaluate", "report", "doctor"):
        assert nearfar(command, run).status in (0, 1), command
    assert nearfar("compare", run, vector_run).status == 0
    assert "margin" in (run / "report.html").read_text(encoding="utf-8")
    again = ("train", "--config", run / "config.toml", "--out", tmp_path / "again", "--no-report")
    assert "the soft margin is smooth=True, margin=0.0" in nearfar(*again).error
    done = nearfar(*again, "--margin", 0, "--smooth")
    assert done.status == 0, done.err
    assert read_config(tmp_path / "again" / "config.toml").hyperparameters["smooth"] is True


def make_task(loss: str) -> Task:
    x, y = make_vectors(n_identities=12, n_items=4)
    items = Items(
        Arrays(torch.from_numpy(x)), torch.from_numpy(y), [""] * len(x), [str(i) for i in range(12)]
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
    assert found.distance.min() >= -1e-6, (
        "the plot takes what a loss measures for a similarity, unless the loss has `distance` in "
        "its DEFAULTS or a pair_margin in registry.py"
    )
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
