"""`tools/reach.py`: what it follows and what it counts, on a small package."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

FILES = {
    "__init__.pyi": "from nearfar.losses import loss\n",
    "losses.py": '''
from typing import TYPE_CHECKING
from nearfar import tools
from nearfar.tools import marked, shadowed
from nearfar.tools import other as renamed

if TYPE_CHECKING:
    from nearfar.tools import Alias

# How far apart.
MARGIN, SCALE = 1.0, 2.0


@marked
def loss(x: "Alias", shadowed=1):
    """Half."""

    return tools.Rule(MARGIN).apply(x, SCALE) + renamed(x) + shadowed


def unused():
    return 1
''',
    "tools.py": """
import torch

Alias = int


def marked(function):
    return function


def other(x):
    from nearfar.late import late
    return late(x) + undefined_elsewhere(x)


def shadowed():
    return 0


class Base:
    def overridden(self):
        return 0

    def unused_of_base(self):
        return 0


class Rule(Base):
    # Not negative.
    margin: float

    def __init__(self, margin):
        self.margin = margin

    @property
    def double(self):
        return 2 * self.margin

    def apply(self, x, scale):
        return Step.apply(x, scale).overridden()

    def unused(self):
        return 0


class Step(torch.autograd.Function):
    def backward(self):
        return 1
""",
    "late.py": "late = abs\n",
}


@pytest.fixture
def tool(tmp_path, monkeypatch) -> dict[str, Any]:
    package = tmp_path / "nearfar"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text, encoding="utf-8")
    found = runpy.run_path(str(ROOT / "tools" / "reach.py"))
    monkeypatch.setitem(found["main"].__globals__, "SOURCE", tmp_path)
    return found


def test_every_definition_that_is_mentioned_counts_and_no_other(tool):
    assert {(one.name, one.n_lines) for one in tool["reach"]("loss")} == {
        ("MARGIN, SCALE", 2),  # with the comment
        ("loss", 5),  # with the decorator, the docstring and the blank line
        ("Alias", 1),  # an annotation that is a string, imported under TYPE_CHECKING
        ("marked", 2),
        ("other", 3),  # under another name
        ("late", 1),  # imported inside a function
        ("Base", 2),
        ("Base.overridden", 2),
        ("Rule", 7),  # what stands around its methods
        ("Rule.__init__", 2),
        ("Rule.apply", 2),
        ("Step", 1),
        ("Step.backward", 2),  # torch calls it
    }


def test_of_a_class_that_is_asked_for_every_method_counts(tool):
    names = {one.name for one in tool["reach"]("tools.Rule")}
    assert {"Rule.double", "Rule.unused", "Base.overridden"} <= names
    assert "Base.unused_of_base" not in names


def test_files_and_a_total_are_printed(tool, capsys):
    main: Callable[..., None] = tool["main"]
    main("loss", listed=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["late.py", "1", "definitions", "1", "lines"],
        ["losses.py", "2", "definitions", "7", "lines"],
        ["tools.py", "10", "definitions", "24", "lines"],
        ["3", "files", "13", "definitions", "32", "lines"],
    ]
    main("loss", listed=True)
    assert "\n    Step.backward " in capsys.readouterr().out


def test_a_name_that_is_not_public_is_refused(tool):
    with pytest.raises(SystemExit, match="nearfar has no function or class 'los'"):
        tool["reach"]("los")


def test_a_loss_of_the_library_reaches_the_engine():
    reached = runpy.run_path(str(ROOT / "tools" / "reach.py"))["reach"]("sup_con_loss")
    modules = {one.module.rpartition(".")[0] for one in reached}
    gpu = {"nearfar.engine.gpu", "nearfar.engine.gpu.kernels"}
    assert modules == {"nearfar", "nearfar.engine", "nearfar.losses"} | gpu
