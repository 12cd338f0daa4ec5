"""What follows from the list of losses: modules, names, and what is written of them."""

import ast
import inspect
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch

import nearfar
from nearfar.distance import DistanceName
from nearfar.losses.base import LossModule, ProxyLossModule
from nearfar.registry import LOSSES, Loss

ROOT = Path(__file__).parents[2]
DISTANCES = get_args(DistanceName)
FAMILIES = sorted((ROOT / "src" / "nearfar" / "losses").glob("[!_]*.py"))

each = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.function)


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "write_losses.py"))


def test_what_is_written_is_up_to_date(tool, capsys):
    status = tool["main"](check=True)
    assert (status, capsys.readouterr().out) == (0, "")


def test_outdated_files_are_reported(tool, monkeypatch, capsys):
    path = ROOT / "src" / "nearfar" / "__init__.pyi"
    monkeypatch.setitem(tool["main"].__globals__, "sources", lambda: [(path, "another")])
    assert tool["main"](check=True) == 1
    said = "src/nearfar/__init__.pyi is out of date: run python tools/write_losses.py.\n"
    assert capsys.readouterr().out == said


def defined(family: Path) -> ModuleType:
    return import_module(f"nearfar.losses.{family.stem}")


def test_every_loss_is_in_the_list():
    """A loss is a public function whose docstring names its source."""
    found = {
        node.name
        for family in FAMILIES
        if family.stem != "own"  # user-defined losses are not listed
        for node in ast.parse(family.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and "\nSource: " in (inspect.getdoc(getattr(defined(family), node.name)) or "")
    }
    assert found == {loss.function for loss in LOSSES}
    modules = {m.__name__ for m in vars(nearfar.losses).values() if is_module_of_a_loss(m)}
    assert modules == {loss.module for loss in LOSSES}
    assert nearfar.losses.__all__ == sorted({loss.function for loss in LOSSES} | modules)


def is_module_of_a_loss(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, LossModule)


HELD = {**inspect.signature(ProxyLossModule).parameters}  # what it takes for the proxies it holds
del HELD["hyperparameters"]


@each
def test_function_and_module_take_the_same(loss: Loss) -> None:
    """Names, types, order and defaults: what is data by `forward`, the rest by the constructor."""
    function, module = getattr(nearfar, loss.function), getattr(nearfar, loss.module)
    assert module.loss is function
    takes = dict(inspect.signature(function).parameters)
    forward = dict(inspect.signature(module.forward).parameters)
    del forward["self"]
    settings = dict(inspect.signature(module).parameters)
    if loss.data == "proxies":
        assert module.__bases__ == (ProxyLossModule,)
        del takes["proxies"]
        for name, parameter in HELD.items():
            assert settings.pop(name, None) == (
                None if name == "sub_centers" and not loss.sub_centers else parameter
            )
    else:
        assert module.__bases__ == (LossModule,)
    assert {**forward, **settings} == takes
    order = list(takes)
    for some in (forward, settings):
        assert sorted(some, key=order.index) == list(some)
    assert all(p.kind is p.KEYWORD_ONLY for p in settings.values())
    assert inspect.get_annotations(module) == {k: p.annotation for k, p in settings.items()}


@each
def test_a_module_describes_its_hyperparameters_as_its_function_does(loss: Loss) -> None:
    function, module = getattr(nearfar, loss.function), getattr(nearfar, loss.module)
    of_function, of_module = inspect.getdoc(function) or "", inspect.getdoc(module) or ""
    assert of_module.partition("\n")[0] == of_function.partition("\n")[0]
    assert f":func:`nearfar.{loss.function}`" in of_module
    flat = " ".join(of_module.split())
    for name in inspect.signature(module).parameters:
        held = loss.data == "proxies" and name in HELD
        described = inspect.getdoc(ProxyLossModule) or "" if held else of_function
        first_line = described.partition(f"    {name}: ")[2].partition("\n")[0]
        assert f" {name}: {first_line}" in flat


@each
def test_the_list_says_which_losses_take_several_proxies_per_class(loss: Loss) -> None:
    if loss.data == "proxies":
        function = getattr(nearfar, loss.function)
        x, centers = torch.eye(3), torch.eye(6, 3).view(3, 2, 3)
        if loss.sub_centers:
            assert function(x, centers, [0, 1, 2]).isfinite()
        else:
            with pytest.raises(ValueError, match=r"one per class; got \(3, 2, 3\)"):
                function(x, centers, [0, 1, 2])


def test_pages_are_written_where_they_ask_for_it(tool):
    page = "Before.\n<!-- losses: traced -->\nold\n<!-- end -->\nAfter."
    there = tool["page"](page)
    assert there.startswith("Before.\n<!-- losses: traced -->\n`contrastive_loss`, `contrast")
    assert there.endswith("\n<!-- end -->\nAfter.")
    assert "old" not in there
    assert tool["page"](there) == there
    reference = tool["page"]("<!-- losses: reference of proxies -->\n<!-- end -->")
    assert "\n.. losses::\n\n   proxy_softmax_loss\n   proxy_nca_loss\n" in reference
    with pytest.raises(SystemExit, match="losses: all: the blocks are by data, trained"):
        tool["page"]("<!-- losses: all --><!-- end -->")


@each
def test_the_table_of_options_says_what_a_loss_takes(tool: dict[str, Any], loss: Loss) -> None:
    header, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tool["options"]().splitlines()
        if line.startswith("| ")
    )
    (row,) = (row for row in rows if row[0] == f"`{loss.function}`")
    told = dict(zip(header, row, strict=True))
    takes = inspect.signature(getattr(nearfar, loss.function)).parameters
    for name in ("weight", "reference"):
        assert told[f"`{name}`"] == ("yes" if name in takes else "")
    for column, names in (
        ("listed", ("pairs", "triplets")),
        ("closeness", ("distance", "similarity")),
        ("`normalize`", ("normalize",)),
        ("may be learned", ("temperature", "scale", "bias")),
    ):
        said = re.findall(r"`(\w+)(?:=(.*?))?`", told[column])
        taken = [name for name in names if name in takes]
        if column == "may be learned":
            taken = [name for name in taken if "Tensor" in str(takes[name].annotation)]
        assert [name for name, _ in said] == taken
        assert all(ast.literal_eval(value) == takes[name].default for name, value in said if value)
    assert len(rows) == len(LOSSES)


def test_what_losses_take_for_reduction_is_told_once(tool: dict[str, Any]) -> None:
    *_, last = tool["options"]().strip().split("\n\n")
    assert last.startswith('`reduction` is one of `"mean"`, `"active"`, `"sum"`, `"none"`, `(low, ')
    assert last.count("one of") == len({tool["reductions"](loss) for loss in LOSSES})


WRITTEN = {"losses/modules.py", "losses/__init__.py"}
MOST_MENTIONS = 3  # its row of the list, its defaults in the tool, how the benchmarks measure it


def hand_written(loss: Loss) -> list[Path]:
    """The code outside the tests that is not the loss's own."""
    package = ROOT / "src" / "nearfar"
    own = Path(inspect.getfile(inspect.unwrap(getattr(nearfar, loss.function))))
    paths = [
        path for part in ("src", "tools", "benchmarks") for path in (ROOT / part).rglob("*.py")
    ]
    generated = [package / name for name in WRITTEN]
    # What is to be reached on a GPU, and on several processes, are lists of losses.
    lists = ("gpu_cases.py", "tune.py", "distributed_cases.py")
    measured = [ROOT / "benchmarks" / name for name in lists]
    # An adapter gives the losses of another library by name.
    adapters = [*package.glob("adapters/**/*.py"), *package.glob("keras/**/*.py")]
    chosen = package / "app" / "audit" / "spaces.py"  # the audit learns labels by one loss
    left_out = (own, chosen, *generated, *measured, *adapters)
    return [path for path in paths if path not in left_out]


@cache
def parsed(path: Path) -> ast.Module:
    """A file, read once for all losses."""
    return ast.parse(path.read_text(encoding="utf-8"))


def mentions(loss: Loss, path: Path) -> set[int]:
    """The lines of a file that name a loss: its function, its module, or what the tool calls it.

    Prose does not count: comments, docstrings, error messages and examples of commands. Nor do
    losses of other libraries that happen to have the same name.
    """
    tree = parsed(path)
    prose, foreign = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
        elif isinstance(node, ast.Raise):
            prose |= set(ast.walk(node))
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] != "nearfar":
            foreign |= {alias.name for alias in node.names}
    named = {loss.function, loss.module} - foreign
    lines = set()
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if node not in prose:
                words = set() if " --" in text else set(re.findall(r"\w+", text))
                # In a sentence, a name such as "softmax" may be an ordinary word.
                of_tool = loss.name in words if "_" in loss.name else text == loss.name
                found = bool(named & words) or (of_tool and text not in DISTANCES)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found = name in named
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.keyword(arg=name):
                found = name in named
            case _:
                found = False
        if found:
            lines.add(node.lineno)
    return lines


@each
def test_other_code_hardly_mentions_a_loss(loss: Loss) -> None:
    """What it has to know follows from the list and from the function, so a new one just works."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in hand_written(loss)
        for line in mentions(loss, path)
    }
    assert len(found) <= MOST_MENTIONS, found
    names = re.compile(rf"\b({loss.function}|{loss.module})\b")
    assert not names.search((ROOT / "Makefile").read_text(encoding="utf-8"))


def test_code_is_distinguished_from_prose(tmp_path):
    loss = Loss("half_loss", "HalfLoss", "batch")
    path = tmp_path / "code.py"
    path.write_text(MENTIONS, encoding="utf-8")
    marked = {i for i, line in enumerate(MENTIONS.splitlines(), 1) if line.endswith("# here")}
    assert mentions(loss, path) == marked


MENTIONS = '''
"""half_loss in a docstring."""
from nearfar import half_loss as h  # here
from nearfar.losses.modules import HalfLoss  # here
A = nearfar.half_loss(x)  # here
B = {"half": 1, "a half": 2}  # here
C = f"{x} like half_loss"  # here
D = other_half_loss
# half_loss in a comment
if D:
    raise TypeError("pass half_loss")
'''


def beside(degrees: float) -> torch.Tensor:
    """Two rows of length 1 at an angle."""
    angle = math.radians(degrees)
    return torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])


@each
def test_a_pair_margin_is_what_the_list_says(loss: Loss) -> None:
    """Two dissimilar rows 30 degrees apart: at a distance of 0.52, with a cosine of 0.87."""
    function = getattr(nearfar, loss.function)
    takes = inspect.signature(function).parameters
    if loss.pair_margin is None:
        if "margin" in takes and loss.data == "batch":
            # Between dissimilar rows alone it changes nothing, even between equal ones.
            low, high = (function(torch.ones(3, 2), [0, 1, 2], margin=m) for m in (0.5, 0.9))
            assert low == high, "the margin is one of pairs: say so by pair_margin in registry.py"
        return
    x = beside(30)
    d = [float((x[0] - x[1]).norm())]
    data = {"x": x, "labels": [0, 1], "x1": x[:1], "x2": x[1:], "y": [False], "d": d}
    given = {name: data[name] for name in takes if name in data}
    beyond = {margin: not function(**given, margin=margin).any() for margin in (0.5, 0.9)}
    assert (
        beyond
        == {"distance": {0.5: True, 0.9: False}, "cosine": {0.5: False, 0.9: True}}[
            loss.pair_margin
        ]
    )


NEW_LOSS = '''
"""A new loss."""

from typing import TypeAlias

from torch import Tensor

from nearfar.inputs import ArrayLike
from nearfar.losses.batch_pair import batch_contrastive_loss
from nearfar.reduction import Reduction

Half: TypeAlias = float


def half_loss(
    x: ArrayLike, labels: ArrayLike, *, margin: Half = 0.5, weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Half of a loss.

    Args:
        x: (n, d) embeddings.
        labels: (n,) class ids.
        margin: from which dissimilar pairs are left alone, which is told at such a length that it
            takes two lines, and more of them in the module.
        weight: none.
        reduction: "mean", "sum" or "none".

    Source: this test.
    """
    return batch_contrastive_loss(x, labels, margin=margin, reduction=reduction) / 2
'''

USE = """
import runpy
import torch, nearfar as nf
from nearfar.app.train.objectives import OBJECTIVES, Batch
x, labels = torch.randn(6, 3), torch.arange(6) // 2
module = nf.HalfLoss(margin=0.7)
assert repr(module) == "HalfLoss(margin=0.7, reduction='mean')"
assert torch.equal(module(x, labels, weight=None), nf.half_loss(x, labels, margin=0.7))
nf.doctor.examine(x, labels, loss=module)
loss, _ = OBJECTIVES["half"].from_batch(nf.half_loss, Batch(x, labels, torch.Generator()))
assert loss == nf.half_loss(x, labels)
assert runpy.run_path("tools/write_losses.py")["main"](check=True) == 0
"""


@pytest.mark.slow
def test_a_new_loss_is_its_function_a_row_and_a_row_of_defaults(tmp_path):
    """All else is written or follows."""
    for part in ("src", "tools", "docs"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("assets", "__p*")
        )
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "src" / "nearfar"
    (package / "losses" / "half.py").write_text(NEW_LOSS, encoding="utf-8")
    for name, row in (
        ("registry.py", '    Loss("half_loss", "HalfLoss", "batch"),\n'),
        ("app/names.py", '    "half": {"margin": 0.25},\n'),
    ):
        lines = (package / name).read_text(encoding="utf-8").splitlines(keepends=True)
        last = max(i for i, line in enumerate(lines) if "proxy_anchor" in line)
        (package / name).write_text("".join([*lines[: last + 1], row, *lines[last + 1 :]]))

    def python(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    wrote = python("tools/write_losses.py")
    for name in ("losses/modules.py", "losses/__init__.py", "__init__.pyi"):
        assert f"wrote src/nearfar/{name}\n" in wrote
    python("-c", USE)
    assert "`half_loss`" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| half | margin 0.25 | no |" in (tmp_path / "docs/data.md").read_text(encoding="utf-8")
    assert (tmp_path / "docs/conventions.md").read_text(encoding="utf-8").count("`half_loss`") == 1
    assert "    HalfLoss,\n" in (package / "__init__.pyi").read_text(encoding="utf-8")
