"""The command itself: help, errors, explain, and what it does without its libraries."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv

import nearfar as nf
from nearfar.explain_table import LOSSES


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_version_and_help(nearfar):
    assert nearfar("--version").out == f"nearfar {nf.__version__}\n"
    shown = nearfar("--help").out
    for command in ("train", "evaluate", "verify", "embed", "explain"):
        assert command in shown
        assert "nearfar" in nearfar(command, "--help").out
    for loss in LOSSES:
        assert loss in nearfar("train", "--help").out
    assert "Usage" in nearfar().out


def test_importing_the_library_loads_nothing_of_the_tool():
    done = run_python(
        "import sys\nfrom nearfar import *\n"
        "app = ['lightning_fabric', 'typer', 'sklearn', 'scipy', 'matplotlib',"
        "'rich', 'PIL', 'pyarrow', 'safetensors', 'tomli_w', 'nearfar.cli', 'nearfar.train',"
        "'nearfar.evaluate', 'torch._dynamo']; print([name for name in app if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("missing", "user"),
    [
        ("typer", "nearfar.commands"),
        ("PIL", "nearfar.train.images"),
        ("altair", "nearfar.report"),
    ],
)
def test_without_its_libraries_the_command_says_what_to_install(
    nearfar, folder, tmp_path, monkeypatch, missing, user
):
    """Before it trains."""
    import_module(user)  # which is as it was when the test ends
    for name in [
        name for name in sys.modules if f"{name}.".startswith((f"{user}.", f"{missing}."))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    done = nearfar("train", folder, "--out", tmp_path / "run", "--steps", 1)
    assert done.status == 2
    assert done.error.startswith(f"nearfar: error: the command line tool needs {missing}: ")
    assert "pip install 'nearfar[app]'" in done.error
    assert "step" not in done.out
    assert list(tmp_path.iterdir()) == []


def test_what_the_tool_imports_is_declared():
    from nearfar import cli, commands

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["app"]
    declared = {re.split("[<>=]", requirement)[0] for requirement in extra}
    distributions = packages_distributions()
    used = {distributions[module][0].lower().replace("_", "-") for module in cli.APP}
    assert used == declared
    (comment,) = re.findall("# The command line tool: (.*)\\.", text)
    assert set(comment.split(", ")) == {
        c.callback.__name__ for c in commands.app.registered_commands
    }


def test_unwritable_places_are_one_line(nearfar, vectors, tmp_path):
    (tmp_path / "file").write_text("")
    done = nearfar("train", vectors, "--out", tmp_path / "file" / "run", "--steps", 1)
    assert done.status == 2
    assert "cannot be written" in done.error


PAIRS = [("[0, 0]", "3 4", 1), ("0 0", "0 1", 0), ("0 0", "0.3,0.4", 0)]


def test_explain_a_table_of_vectors(nearfar, tmp_path):
    table = write_csv(tmp_path / "pairs.csv", ("a", "b", "label"), PAIRS)
    options = ["--loss", "contrastive", "--margin", 2, "--similar-label", 1]
    shown = nearfar("explain", table, *options)
    assert shown.status == 0, shown.err
    assert "contrastive_loss" in shown.out
    found = json.loads(nearfar("explain", table, *options, "--json").out)
    assert [row["loss"] for row in found["rows"]] == pytest.approx([25, 1, 2.25])
    assert found["mean"] == pytest.approx(28.25 / 3)
    few = json.loads(nearfar("explain", table, *options, "--json", "--limit", 2).out)
    assert len(few["rows"]) == 2
    assert few["mean"] == found["mean"]


def test_explain_a_table_of_distances(nearfar, tmp_path):
    rows = [(0.5, "true"), (0.3, "false"), (1.5, "false")]
    table = write_csv(tmp_path / "pairs.csv", ("distance", "label"), rows)
    found = json.loads(nearfar("explain", table, "--loss", "contrastive", "--json").out)
    assert found["loss"] == "contrastive_loss_from_distance"
    assert [row["loss"] for row in found["rows"]] == pytest.approx([0.25, 0.49, 0])


def random_rows(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


TABLES = {
    "contrastive": {"x1": random_rows(6, 3), "x2": random_rows(6, 3) + 1, "y": np.arange(6) < 3},
    "cosine": {"x1": random_rows(6, 3), "x2": random_rows(6, 3) + 1},
    "triplet": {
        "anchor": random_rows(6, 3),
        "positive": random_rows(6, 3) + 1,
        "negative": random_rows(6, 3) - 1,
    },
    "quadruplet": {
        "anchor": random_rows(6, 3),
        "positive": random_rows(6, 3) + 1,
        "negative": random_rows(6, 3) - 1,
        "negative2": random_rows(6, 3) + 2,
    },
    "info_nce": {
        "query": random_rows(6, 3),
        "positive": random_rows(6, 3) + 1,
        "negatives": random_rows(6, 2, 3),
    },
    "softmax": {"logits": random_rows(6, 3), "target": np.arange(6) % 3},
}


@pytest.mark.parametrize("name", LOSSES)
def test_explain_every_loss_from_npz_and_parquet(nearfar, tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    data = TABLES[name]
    np.savez(tmp_path / "t.npz", **data)
    columns = {key: value.tolist() for key, value in data.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    expected = nf.explain(LOSSES[name], *data.values()).as_dict()
    for file in ("t.npz", "t.parquet"):
        done = nearfar("explain", tmp_path / file, "--loss", name, "--json")
        assert done.status == 0, done.err
        found = json.loads(done.out)
        assert found["rows"][3]["reading"] == expected["rows"][3]["reading"]
        assert found["mean"] == pytest.approx(expected["mean"], rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "header", "options", "named"),
    [
        (PAIRS, "a,b,label", ["--loss", "contrastive"], ["--similar-label 1"]),
        (PAIRS, "a,b,label", ["--loss", "contrast"], ["unknown loss 'contrast'", "softmax"]),
        (PAIRS, "a,b,label", ["--loss", "triplet"], ["no column 'anchor'", "a, b, label"]),
        (PAIRS, "a,c,label", ["--loss", "cosine"], ["no column 'x2' (or 'b')"]),
        (PAIRS, "a,b,z", ["--loss", "contrastive"], ["no column 'y' (or 'label')"]),
        (PAIRS, "a,b,z", ["--loss", "cosine", "--temperature", 1], ["no 'temperature'", "margin"]),
        (PAIRS, "a,b,z", ["--loss", "cosine", "--margin", 3], ["t.csv", "margin must be", "3"]),
        ([("0 0", "1", "true")], "a,b,label", ["--loss", "contrastive"], ["t.csv", "(1, 2)"]),
        ([("0 x", "1", "true")], "a,b,label", ["--loss", "contrastive"], ["line 2", "'x'"]),
        ([(-1, "true")], "d,y", ["--loss", "contrastive"], ["t.csv", "d[0] is -1"]),
    ],
)
def test_explain_refuses(nearfar, tmp_path, rows, header, options, named):
    done = nearfar("explain", write_csv(tmp_path / "t.csv", header.split(","), rows), *options)
    assert done.status == 2
    for name in named:
        assert name in done.error
    assert done.out == ""
