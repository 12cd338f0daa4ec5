"""What follows from the list of losses: modules, names, and what is written of them."""

import ast
import inspect
import runpy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nearfar
from nearfar.losses.base import LossModule
from nearfar.registry import LOSSES, Loss

ROOT = Path(__file__).parents[1]
FAMILIES = sorted((ROOT / "src" / "nearfar" / "losses").glob("[!_]*.py"))

each = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.function)


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "write_losses.py"))


def test_what_is_written_is_up_to_date(tool, capsys):
    status = tool["main"](check=True)
    assert (status, capsys.readouterr().out) == (0, "")


def test_what_is_out_of_date_is_told(tool, monkeypatch, capsys):
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


@each
def test_function_and_module_take_the_same(loss: Loss) -> None:
    """Names, types, order and defaults: what is data by `forward`, the rest by the constructor."""
    function, module = getattr(nearfar, loss.function), getattr(nearfar, loss.module)
    assert module.loss is function
    assert module.__bases__ == (LossModule,)
    takes = inspect.signature(function).parameters
    forward = dict(inspect.signature(module.forward).parameters)
    del forward["self"]
    settings = inspect.signature(module).parameters
    assert {**forward, **settings} == {k: p for k, p in takes.items() if k != "return_stats"}
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
        first_line = of_function.partition(f"    {name}: ")[2].partition("\n")[0]
        assert f" {name}: {first_line}" in flat


def test_pages_are_written_where_they_ask_for_it(tool):
    page = "Before.\n<!-- losses: weighted -->\nold\n<!-- end -->\nAfter."
    there = tool["page"](page)
    assert there.startswith("Before.\n<!-- losses: weighted -->\n`info_nce_loss`, `clip_loss`")
    assert there.endswith("\n<!-- end -->\nAfter.")
    assert "old" not in there
    assert "batch_cosine_loss" not in there
    assert tool["page"](there) == there
    reference = tool["page"]("<!-- losses: reference of proxies -->\n<!-- end -->")
    assert "\n.. losses::\n\n   proxy_softmax_loss\n   proxy_nca_loss\n" in reference
    with pytest.raises(SystemExit, match="losses: all: the blocks are by data, trained"):
        tool["page"]("<!-- losses: all --><!-- end -->")
