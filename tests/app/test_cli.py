"""The command itself: help, errors, explain, and what it does without its libraries."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import write_csv

import nearfar as nf
from nearfar.app import commands
from nearfar.app.commands import OPTIONS
from nearfar.app.explain_table import FUNCTIONS
from nearfar.app.names import SWEPT
from nearfar.app.train.config import Hyperparameters, TrainConfig, options_of


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_version_and_help(nearfar):
    assert nearfar("--version").out == f"nearfar {nf.__version__}\n"
    shown = nearfar("--help").out
    for command in ("train", "evaluate", "verify", "embed", "explain"):
        assert command in shown
        assert "nearfar" in nearfar(command, "--help").out
    for loss in FUNCTIONS:
        assert loss in nearfar("train", "--help").out
    assert "Usage" in nearfar().out


COMMANDS = typer.main.get_command(commands.app).commands
SETTINGS = {f.name: f for f in fields(TrainConfig) if f.name not in ("data", "hyperparameters")}


def options(command):
    return {option.name: option for option in COMMANDS[command].params}


def test_every_setting_and_hyperparameter_is_an_option_of_train():
    taken = options("train")
    own = {"out", "data", "config", "report", "log", "overwrite"}
    assert taken.keys() - own == SETTINGS.keys() | options_of(Hyperparameters).keys()
    for name, (kind, declared) in OPTIONS.items():
        option = taken[name]
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert option.default is None  # what is not given is left to the config, or its file
        assert option.rich_help_panel == declared.panel
        assert option.help.startswith(declared.help[:-1])
        assert option.help.endswith(".")
        assert option.is_flag == (kind in (bool, bool | None))


def test_the_help_says_the_defaults():
    for name, setting in SETTINGS.items():
        if isinstance(setting.default, float) or type(setting.default) is int:
            assert options("train")[name].help.endswith(f" ({setting.default}).")
    assert options("train")["augment"].secondary_opts == ["--no-augment"]
    assert options("train")["swap"].secondary_opts == []  # off where nothing is said


@pytest.mark.parametrize("command", ["evaluate", "embed", "sweep", "explain"])
def test_an_option_is_the_same_in_every_command(command):
    shared = options(command).keys() & OPTIONS.keys() - {"loss" if command == "explain" else ""}
    for name in shared:
        option, same = options(command)[name], options("train")[name]
        assert option.opts == same.opts
        assert option.rich_help_panel == same.rich_help_panel
        if command == "sweep" and name in SWEPT:
            assert option.multiple
            assert option.help == f"Values to try. {same.help}"
        else:
            assert not option.multiple
            assert (option.help, option.metavar) == (same.help, same.metavar)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "DATA", "--out", "r", "--steps", 0], "--steps must lie between 1 and 1,000,000"),
        (["train", "DATA", "--out", "r", "--far", 2], "--far must lie between 0 and 0.5, got 2."),
        (["train", "DATA", "--out", "r", "--learning-rate", "nan"], "got nan."),
        (["train", "DATA", "--out", "r", "--similar-label", 2], "must be one of 0, 1; got 2."),
        (["train", "DATA", "--out", "r", "--single", "x"], "--single must be one of keep, leave-"),
        (["train", "DATA", "--out", "r", "--weight-decay", -1], "--weight-decay must lie between"),
        (["train", "DATA", "--out", "r", "--margin", "nan"], "the sup_con loss has no 'margin'"),
        (["train", "DATA", "--out", "r", "--items", 1.5], "Invalid value for '--items': "),
        (["train", "DATA", "--out", "r", "--no-swap"], "No such option: --no-swap"),
        (["train", "--out", "r"], "train needs DATA, for instance: nearfar train glyphs"),
        (["train", "DATA"], "Missing option '--out'. See nearfar train --help."),
        (["evaluate", "r", "--identity-depth", 10], "--identity-depth must lie between 1 and 9"),
        (["embed", "r", "DATA", "--out", "e.npz", "--identity-depth", 0], "got 0."),
        (["explain", "t", "--loss", "cosine", "--similar-label", 7], "--similar-label must be one"),
        (["explain", "t", "--loss", "cosine", "--scale", 7], "No such option: --scale"),
        (["sweep", "DATA", "--out", "s", "--seed", -1], "--seed must lie between 0 and 2,147,483"),
        (["sweep", "DATA", "--out", "s", "--margin", 1, "b"], "Invalid value for '--margin': "),
        (["sweep", "DATA", "--out", "s", "--bias", 1], "No such option: --bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_a_wrong_option_is_told_by_its_name(nearfar, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    done = nearfar(*arguments)
    assert done.status == 2
    assert told in done.error
    assert not list(tmp_path.iterdir())


def test_importing_the_library_loads_nothing_of_the_tool():
    done = run_python(
        "import sys\nfrom nearfar import *\n"
        "app = ['lightning_fabric', 'typer', 'sklearn', 'scipy', 'matplotlib',"
        "'rich', 'PIL', 'pyarrow', 'safetensors', 'tomli_w', 'nearfar.app',"
        "'nearfar.evaluate', 'torch._dynamo']; print([name for name in app if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("missing", "user"),
    [
        ("typer", "nearfar.app.commands.declare"),
        ("PIL", "nearfar.app.data.images"),
        ("altair", "nearfar.app.report"),
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


def dashed(distribution):
    return distribution.lower().replace("_", "-")


def test_what_the_tool_imports_is_declared():
    from nearfar.app import cli

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["app"]
    declared = {re.split("[<>=]", requirement)[0] for requirement in extra}
    distributions = packages_distributions()
    used = {
        # Several may install one module, as lightning and lightning-fabric do.
        next(name for found in distributions[module] if (name := dashed(found)) in declared)
        for module in cli.APP_LIBRARIES
    }
    assert used == declared


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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_explain_every_loss_from_npz_and_parquet(nearfar, tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    data = TABLES[name]
    np.savez(tmp_path / "t.npz", **data)
    columns = {key: value.tolist() for key, value in data.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    expected = nf.explain(FUNCTIONS[name], *data.values()).as_dict()
    for file in ("t.npz", "t.parquet"):
        done = nearfar("explain", tmp_path / file, "--loss", name, "--json")
        assert done.status == 0, done.err
        found = json.loads(done.out)
        assert found["rows"][3]["reading"] == expected["rows"][3]["reading"]
        assert found["mean"] == pytest.approx(expected["mean"], rel=1e-4)


def test_explain_a_table_whose_other_rows_are_the_negatives(nearfar, tmp_path):
    data = {name: TABLES["info_nce"][name] for name in ("query", "positive")}
    np.savez(tmp_path / "t.npz", **data)
    done = nearfar("explain", tmp_path / "t.npz", "--loss", "info_nce", "--json")
    assert done.status == 0, done.err
    found, expected = json.loads(done.out), nf.explain(nf.info_nce_loss, *data.values()).as_dict()
    assert found["n"] == 6
    assert found["rows"][0]["other"] == expected["rows"][0]["other"]


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
