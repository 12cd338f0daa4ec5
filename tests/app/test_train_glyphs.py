"""The main job as it ships, on the letters."""

import json

import pytest

from nearfar.app.train.objectives import OBJECTIVES

# One thread each, beside those of the other processes: the demo takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def figures(run):
    test = json.loads((run / "summary.json").read_text())["test"]
    return test["learned"], test["raw"]


# Enough of them to tell, and a tenth of the pairs.
FEWER = ("--calibration-share", 0.06, "--test-share", 0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_beats_pixels_in_a_short_run(nearfar, tmp_path, name):
    # A direction of its own for each identity takes longer.
    steps = 300 if "softmax" in name or "proxy" in name else 60
    options = ("--loss", name, "--steps", steps, *FEWER, "--no-report")
    done = nearfar("train", "glyphs", "--out", tmp_path / "run", *options)
    assert done.status == 0, done.err
    learned, raw = figures(tmp_path / "run")
    assert 1 - learned["auc"] < 0.6 * (1 - raw["auc"])
    assert learned["eer"] < 0.7 * raw["eer"]


def test_the_demo_keeps_its_promise(nearfar, tmp_path):
    """On writing systems never seen, with the settings that nothing else is said about."""
    assert nearfar("train", "glyphs", "--out", tmp_path / "run").status == 0
    learned, raw = figures(tmp_path / "run")
    assert learned["auc"] >= 0.995
    assert learned["eer"] <= 0.025 < raw["eer"] / 3
