"""Sweeps: what is tried, what is kept, and going on after a stop."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_vectors
from rich.console import Console

from nearfar.app.cli import main
from nearfar.app.errors import InputError
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.sweep import FinishedTrial, Sweep, Trial, sweep, trials_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of 150 identities in 4 of 12 coordinates, the rest noise."""
    random = np.random.default_rng(0)
    y = np.repeat(np.arange(150), 4)
    x = random.normal(size=(600, 12)).astype(np.float32)
    x[:, :4] += 1.5 * random.normal(size=(150, 4))[y]
    path = tmp_path_factory.mktemp("sweep") / "vectors.npz"
    np.savez(path, x=x, y=y)
    return path


def command(data: Path, out: Path, *more: str) -> list[str]:
    given = ["--loss", "contrastive", "sup_con", "--margin", "0.3", "0.6", "--out", str(out)]
    return ["sweep", str(data), *given, "--steps", "12", *more]


def test_every_combination_is_trained_on_the_same_splits_and_ranked_by_calibration(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data, tmp_path, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"contrastive-margin-0.3", "contrastive-margin-0.6", "sup_con"}
    assert (
        {trial["name"] for trial in found["trials"]}
        == names
        == {p.name for p in tmp_path.iterdir()}
    )
    by = [trial["calibration_eer"] for trial in found["trials"]]
    assert by == sorted(by)
    assert found["best"] == found["trials"][0]["name"]
    splits = [json.loads((tmp_path / n / "summary.json").read_text())["split"] for n in names]
    assert splits[0] == splits[1] == splits[2]

    # Again: nothing is trained, and the same is said.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command(data, tmp_path)) == 0
    said = capsys.readouterr().out
    assert said.count("already trained") == 3
    assert f"keep {tmp_path / found['best']}" in said.replace("\n", "")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    # Another number of steps is another run, which is not replaced.
    assert main([*command(data, tmp_path), "--steps", "13"]) == 2
    assert "is a run of another config" in capsys.readouterr().err


def test_a_spent_budget_leaves_trials_for_another_time(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data, tmp_path, "--minutes", "0", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trials"]) == 1
    assert found["skipped"] == ["contrastive-margin-0.6", "sup_con"]


def test_a_trial_that_fails_costs_the_others_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    random = np.random.default_rng(1)
    lines = [
        f'"{a:.3f} {b:.3f}","{a + d:.3f} {b:.3f}",{int(d < 1)}'
        for a, b in random.normal(size=(300, 2))
        for d in (random.uniform(0, 0.1), 5.0)
    ]
    pairs.write_text("\n".join(["a,b,label", *lines]))
    given = ["--loss", "sup_con", "contrastive", "--steps", "5", "--similar-label", "1", "--json"]
    assert main(["sweep", str(pairs), "--out", str(tmp_path / "out"), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [trial["name"] for trial in found["trials"]] == ["contrastive"]
    assert "identity" in found["failed"]["sup_con"]


def test_a_setting_goes_to_the_losses_that_have_it() -> None:
    base = TrainConfig(data="glyphs", loss="sup_con")
    trials = trials_of(
        base, ["nt_xent", "triplet", "nt_xent"], {"margin": [0.1], "temperature": [1.0]}
    )
    assert [t.name for t in trials] == ["nt_xent-temperature-1.0", "triplet-margin-0.1"]
    assert trials[1].config.hyperparameters["margin"] == 0.1
    expected = r"none of the losses sup_con has a 'margin'\. 'margin' belongs to: contrastive, "
    with pytest.raises(InputError, match=expected):
        trials_of(base, ["sup_con"], {"margin": [0.1]})
    with pytest.raises(InputError, match="unknown loss"):
        trials_of(base, ["nothing"], {})


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("kept")
    trials = trials_of(TrainConfig(data="nowhere", loss="sup_con"), ["sup_con"], {})
    with pytest.raises(InputError, match=r"is a file\. Name a folder"):
        sweep(trials, file, minutes=1.0, console=Console(quiet=True))
    assert file.read_text() == "kept"


def test_a_tie_is_called_one() -> None:
    def finished(name: str, eer: float, low: float = 0, high: float = 0) -> FinishedTrial:
        intervals = {"eer": {"low": low, "high": high}} if high else None
        test = {"learned": {"eer": eer, "auc": 1 - eer, "intervals": intervals}}
        return FinishedTrial(
            Trial(name, TrainConfig(data="d", loss="sup_con")), Path(name), eer, test
        )

    found = Sweep(
        (
            finished("a", 0.1, 0.05, 0.15),
            finished("b", 0.12, 0.07, 0.2),
            finished("c", 0.3, 0.2, 0.4),
        )
    )
    assert found.tied == ["b"]
    assert "0.0700 to 0.2000" in found.table().plain()
    assert found.decided
    assert found.as_dict()["best"] == "a"
    # Too few identities for intervals: all of them tie, and none is the best.
    few = Sweep((finished("a", 0.1), finished("b", 0.1), finished("c", 0.2)))
    assert few.tied == ["b", "c"]
    assert not few.decided
    assert few.as_dict()["best"] is None
    assert Sweep((finished("a", 0.1),)).decided


def test_too_few_identities_choose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = make_vectors(n_identities=12, n_items=4)
    np.savez(tmp_path / "few.npz", x=x, y=y)
    assert main(command(tmp_path / "few.npz", tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "too few identities to tell them apart" in said
    assert "keep " not in said
    assert "side by side: nearfar compare" in said
