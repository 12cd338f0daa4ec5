"""The probability of "same" in a run: stored, printed by verify, examined by evaluate."""

import json
import math
import shutil

import numpy as np
import pytest

from nearfar.app.train.run import read_run
from nearfar.app.train.use import Decision
from nearfar.evaluate import every_pair

A, B = "0.5 0.2 1 -1 0 0 0 0", "0.6 0.1 1 -1 0 0 0 0"
FAR = "-2 2 -2 2 0 0 0 0"


@pytest.fixture
def old(vector_run, tmp_path):
    """A run as it was before runs had a probability."""
    run = shutil.copytree(vector_run, tmp_path / "old")
    for name, way in (("threshold.json", ()), ("summary.json", ("test",))):
        content = json.loads((run / name).read_text())
        part = content
        for key in way:
            part = part[key]
        del part["reliability" if way else "probability"]
        (run / name).write_text(json.dumps(content))
    return run


def decided(nearfar, *arguments) -> dict:
    done = nearfar("verify", *arguments, "--json")
    assert done.status in (0, 1), done.err
    return json.loads(done.out)


def test_the_probability_is_fitted_on_the_calibration_identities(nearfar, vector_run, vectors):
    out = vector_run.parent / "e.npz"
    assert nearfar("embed", vector_run, vectors, "--out", out, "--overwrite").status == 0
    with np.load(out) as held:
        x, y = held["x"], held["y"]
    summary = json.loads((vector_run / "summary.json").read_text())
    run = read_run(vector_run)
    assert run.probability.prior == 0.5
    sides = {}
    for side in ("calibration", "test"):
        rows = np.isin(y, summary["split"][side])
        labels = np.unique(y[rows], return_inverse=True)[1]
        sides[side] = every_pair(x[rows], labels, distance=run.distance)
    at = np.linspace(0, 2, 9)
    wanted = sides["calibration"].fit_probability()(at)
    np.testing.assert_allclose(run.probability(at), wanted, atol=1e-3)
    holds = sides["test"].reliability(run.probability)
    found = summary["test"]["reliability"]
    assert found["calibration_error"] == pytest.approx(holds.calibration_error, abs=1e-4)
    assert found["log_loss"] == pytest.approx(holds.log_loss, abs=1e-4)
    assert [one["n_similar"] for one in found["bins"]] == [one.n_similar for one in holds.bins]


def test_the_odds_are_those_of_the_prior_times_the_likelihood_ratio(nearfar, vector_run):
    alone = decided(nearfar, vector_run, A, B)
    assert alone["prior"] is alone["probability"] is None
    for prior in (1e-6, 0.01, 0.5, 0.9):
        found = decided(nearfar, vector_run, A, B, "--prior", prior)
        assert {**found, "prior": None, "probability": None} == alone
        odds = prior / (1 - prior) * found["likelihood_ratio"]
        assert found["probability"] == pytest.approx(odds / (1 + odds))
        assert found["prior"] == prior
    assert decided(nearfar, vector_run, A, FAR)["likelihood_ratio"] < 1


def test_verify_prints_the_evidence_and_with_a_prior_the_probability(nearfar, vector_run):
    found = decided(nearfar, vector_run, A, B)
    done = nearfar("verify", vector_run, A, B)
    assert done.status == 0
    first, second = done.out.splitlines()
    assert first.startswith("same: ")
    ratio = found["likelihood_ratio"]
    shown = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    assert f"{shown} times as likely for same pairs as for different ones" in second
    done = nearfar("verify", vector_run, A, FAR, "--prior=0.01")
    assert done.status == 1
    _, second, third = done.out.splitlines()
    assert second.endswith("times as likely for different pairs as for same ones")
    assert third.startswith('probability of "same": ')
    assert third.endswith("if 0.01 of the pairs you compare are the same")


def test_verify_never_prints_a_certainty(nearfar, vector_run):
    said = nearfar("verify", vector_run, A, A, "--prior", 0.9999999).out.splitlines()[-1]
    told = "if 0.9999999 of the pairs you compare are the same"
    assert said == f'probability of "same": above 0.9999, {told}'


def test_evidence_is_no_stronger_than_so_few_identities_can_show(nearfar, vector_run):
    """8 calibration identities: no distance is less likely than 1 in 8 for the same ones."""
    found = decided(nearfar, vector_run, A, FAR)
    assert found["at_limit"]
    assert found["likelihood_ratio"] == pytest.approx(28 / 29 / 8)
    assert "such a distance is at least 8.3 times" in nearfar("verify", vector_run, A, FAR).out


@pytest.mark.parametrize("place", [1, 2, 3])
def test_the_prior_may_stand_anywhere(nearfar, vector_run, place):
    arguments = [vector_run, FAR, A]
    arguments[place:place] = ["--prior", "0.25"]
    assert decided(nearfar, *arguments)["prior"] == 0.25


@pytest.mark.parametrize("prior", ["0.0", "1.0", "-0.1", "nan", "inf", "1e-13", "0.9999999999999"])
def test_a_prior_is_a_share(nearfar, vector_run, prior):
    for given in (["--prior", prior], [f"--prior={prior}"]):
        done = nearfar("verify", vector_run, A, B, *given)
        assert done.status == 2
        limits = "between 1e-12 and 1 - 1e-12"
        assert f"--prior must be a share of same pairs {limits}, got {prior}." in done.error


@pytest.mark.parametrize("prior", ["often", ""])
def test_a_prior_is_a_number(nearfar, vector_run, prior):
    done = nearfar("verify", vector_run, A, B, "--prior", prior)
    assert done.status == 2
    assert "Invalid value for '--prior'" in done.error


def test_a_run_on_given_pairs_has_one_too(nearfar, pairs_csv, tmp_path):
    from conftest import QUICK

    run = tmp_path / "run"
    assert nearfar("train", pairs_csv, "--out", run, *QUICK).status == 0
    assert read_run(run).probability.slope < 0
    done = nearfar("evaluate", run)
    assert len(json.loads((run / "summary.json").read_text())["split"]["test"]) < 30
    assert "if half of the pairs are: calibration error - (needs 30 identities)" in done.out
    assert json.loads(nearfar("evaluate", run, "--json").out)["reliability"]["bins"]


def test_the_calibration_error_needs_as_many_identities_as_an_interval(
    nearfar, vector_run, vectors
):
    done = nearfar("evaluate", vector_run, vectors)  # 40 identities
    assert "if half of the pairs are: calibration error 0." in done.out


def test_data_that_teach_nothing_still_make_a_run(nearfar, tmp_path):
    """Each item is nearer to one of another identity: then no distance says anything."""
    x = np.repeat(np.random.default_rng(0).normal(size=(60, 4)), 2, 0)
    y = np.arange(120) // 2 + np.arange(120) % 2  # of two equal rows, each is of another identity
    np.savez(tmp_path / "v.npz", x=x.astype(np.float32), y=y % 60)
    run = tmp_path / "run"
    options = ("--steps", 1, "--identities", 4, "--items", 2, "--embedding-dim", 4, "--no-report")
    assert nearfar("train", tmp_path / "v.npz", "--out", run, *options).status == 0
    item = " ".join(map(str, x[0]))
    assert decided(nearfar, run, item, item)["likelihood_ratio"] == pytest.approx(1)
    assert decided(nearfar, run, item, item, "--prior", 0.2)["probability"] == pytest.approx(0.2)


def test_an_older_run_still_decides_and_says_what_to_do(nearfar, old, tmp_path):
    done = nearfar("verify", old, A, B)
    assert done.status == 0
    assert done.out.splitlines()[1] == (
        "no likelihood ratio: the run was trained by an older nearfar; train again"
    )
    assert decided(nearfar, old, A, B)["likelihood_ratio"] is None
    again = f"Train again: nearfar train --config {old}/config.toml --out NEW"
    assert again in nearfar("verify", old, A, B, "--prior", 0.1).error
    done = nearfar("evaluate", old)
    assert done.status == 0
    assert again in done.err
    assert "calibration error" not in done.out
    assert json.loads(nearfar("evaluate", old, "--json").out)["reliability"] is None


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("slope", None, "it has no 'probability.slope'"),
        ("slope", "steep", "probability.slope is not a finite number"),
        ("share", 0.0, "its probability is out of range"),
        ("low", 0.9999, "its probability is out of range"),
        ("high", 1.0, "its probability is out of range"),
        ("prior", 1.0, "its probability is out of range"),
        ("prior", -1, "probability.prior is not a rate"),
    ],
)
def test_a_damaged_probability_says_nothing(nearfar, vector_run, tmp_path, name, value, named):
    run = shutil.copytree(vector_run, tmp_path / "run")
    content = json.loads((run / "threshold.json").read_text())
    content["probability"] |= {name: value}
    if value is None:
        del content["probability"][name]
    (run / "threshold.json").write_text(json.dumps(content))
    assert f"threshold.json is damaged: {named}" in nearfar("verify", run, A, B).error


def test_a_curve_beyond_all_measure_stays_finite(nearfar, vector_run, tmp_path):
    run = shutil.copytree(vector_run, tmp_path / "run")
    content = json.loads((run / "threshold.json").read_text())
    content["probability"] |= {"slope": -1.7e308, "intercept": 1.7e308}
    (run / "threshold.json").write_text(json.dumps(content))
    found = decided(nearfar, run, A, FAR, "--prior", 0.5)
    assert math.isfinite(found["likelihood_ratio"])
    assert 0 < found["probability"] < 1


def test_a_threshold_that_the_evidence_speaks_against_is_said_to_be_loose():
    def said(distance, ratio):
        same = distance <= 0.9
        return Decision(same, distance, 0.9, 0.01, "cosine", ratio, False, None, None).render()

    assert len(said(0.8, 2.0)) == 2
    assert (
        len(said(0.95, 2.0)) == 2
    )  # stricter than the evidence: what a low false-accept rate takes
    assert "the evidence speaks against the threshold" in said(0.85, 0.2)[2]
