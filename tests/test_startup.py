"""What is loaded when, and the names of the package, which are loaded when they are used."""

import ast
import inspect
import os
import pickle
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from shutil import which

import pytest

import nearfar
from nearfar.app import names
from nearfar.app.explain_table import FUNCTIONS
from nearfar.app.train.config import Hyperparameters, options_of
from nearfar.app.train.objectives import OBJECTIVES

HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "PIL",
    "pyarrow",
    "altair",
    "jinja2",
    "safetensors",
    "lightning_fabric",
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def libraries_loaded_by(code: str) -> set[str]:
    """The libraries that a new process has loaded after this code, without Python's own."""
    last = "import sys; print(); print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = run_python(f"{code}\n{last}")
    assert done.returncode == 0, done.stderr
    found: list[str] = ast.literal_eval(done.stdout.splitlines()[-1])
    return set(found) - sys.stdlib_module_names - {"__mp_main__", "nearfar"}


def loaded_by(code: str) -> list[str]:
    """Which of the heavy libraries a new process has loaded after this code."""
    libraries = libraries_loaded_by(code)
    return [name for name in HEAVY if name in libraries]


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import nearfar; nearfar.__version__; dir(nearfar)") == []


def test_the_core_loads_torch_and_numpy_and_no_other_library():
    source = Path(inspect.getfile(nearfar)).parent
    paths = [path.relative_to(source.parent).with_suffix("") for path in source.rglob("*.py")]
    core = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    more = ("nearfar.adapters.", "nearfar.keras", "nearfar.app", "nearfar.__main__")
    more += ("nearfar.engine.gpu.",)
    core = [name for name in core if not name.startswith(more)]
    assert {"nearfar.mine", "nearfar.engine.step", "nearfar.insight.explain"} <= set(core)
    loaded = libraries_loaded_by(f"import {', '.join(core)}")
    assert {"torch", "numpy"} <= loaded
    assert loaded <= libraries_loaded_by("import numpy.random, torch")


WITHOUT_LIBRARIES = """
import sys
from importlib import import_module

ADAPTERS = {adapters}


class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in [library for _, library, _ in ADAPTERS]:
            raise ModuleNotFoundError(name=name)


sys.meta_path.insert(0, Missing)
for module, library, extra in ADAPTERS:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        said = f"{{library}} is not installed: pip install 'nearfar[{{extra}}]'"
        assert str(error) == said, error
    else:
        raise AssertionError(module)
"""


def test_an_adapter_without_its_library_says_what_to_install():
    adapters = [
        ("nearfar.adapters.open_clip", "open_clip", "openclip"),
        ("nearfar.adapters.pml", "pytorch_metric_learning", "pml"),
        ("nearfar.adapters.sentence_transformers", "sentence_transformers", "st"),
        ("nearfar.adapters.sklearn", "sklearn", "sklearn"),
        ("nearfar.keras", "keras", "keras"),
    ]
    done = run_python(WITHOUT_LIBRARIES.format(adapters=adapters))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["--nonsense"],
        ["nonsense"],
        *([command, "--help"] for command in ("train", "sweep", "explain", "report")),
        ["train", "glyphs", "--nonsense"],
        ["train"],
        ["train", "--out", "run"],
        ["train", "glyphs", "--out", "run", "--steps", "many"],
        ["train", "glyphs", "--out", "run", "--steps", "0"],
        ["evaluate", "run", "--identity-depth", "10"],
    ],
    ids=" ".join,
)
def test_help_and_a_wrong_word_load_nothing_heavy(arguments):
    assert loaded_by(f"from nearfar.app.cli import main; main({arguments})") == []


def test_the_names_of_the_losses_are_those_of_the_objectives():
    assert tuple(OBJECTIVES) == names.TRAINED
    assert (names.FOR_ITEMS, names.FOR_PAIRS) == ("sup_con", "contrastive")
    assert OBJECTIVES[names.FOR_PAIRS].from_pairs
    assert not OBJECTIVES[names.FOR_ITEMS].from_pairs


def test_the_declared_hyperparameters_are_those_of_the_objectives():
    declared = {name: kind for name, (kind, _) in options_of(Hyperparameters).items()}
    had = {name: type(v) for o in OBJECTIVES.values() for name, v in o.hyperparameters.items()}
    assert had == declared
    assert set(names.SWEPT) <= {"loss", *declared}


def test_explain_takes_the_hyperparameters_of_its_losses():
    taken = {name for loss in FUNCTIONS.values() for name in inspect.signature(loss).parameters}
    assert set(names.EXPLAINED) == taken & set(options_of(Hyperparameters))


def stub() -> ast.Module:
    path = Path(inspect.getfile(nearfar)).with_suffix(".pyi")
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_stub_says_what_the_package_loads():
    """Each name from the same module, so that editors and type checkers see what runs."""
    imported, listed = {}, None
    for node in stub().body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname is None for alias in node.names)
            imported |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) == "__all__"
            listed = ast.literal_eval(node.value)
    assert listed == nearfar.__all__
    assert sorted(imported) == nearfar.__all__
    for name, module in imported.items():
        there = f"nearfar.{name}" if module == "nearfar" else module
        found = getattr(nearfar, name)
        assert found is (
            import_module(there) if module == "nearfar" else getattr(import_module(there), name)
        )


def test_every_public_name_is_there_and_the_same_wherever_it_is_asked_for():
    assert set(nearfar.__all__) <= set(dir(nearfar))
    everything: dict[str, object] = {}
    exec("from nearfar import *", everything)
    for name in nearfar.__all__:
        found = getattr(nearfar, name)
        assert everything[name] is found is getattr(nearfar, name)
        if not inspect.ismodule(found):
            assert pickle.loads(pickle.dumps(found)) is found


def test_submodules_are_there_without_an_import_of_their_own():
    said = run_python("import nearfar; print(nearfar.evaluate.__name__)").stdout
    assert said == "nearfar.evaluate\n"


def test_a_wrong_name_is_told_as_python_tells_it():
    with pytest.raises(AttributeError, match="'nearfar' has no attribute 'contrastive_los'"):
        _ = nearfar.contrastive_los
    with pytest.raises(ImportError, match="cannot import name 'contrastive_los' from 'nearfar'"):
        exec("from nearfar import contrastive_los")
    assert not hasattr(nearfar, "__wrapped__")
    hint = run_python("import nearfar; nearfar.contrastive_los").stderr
    assert "Did you mean: 'contrastive_loss'?" in hint


def test_a_submodule_that_lacks_its_library_says_which():
    code = "import sys; sys.modules['typer'] = None\nimport nearfar.app.commands"
    assert "import of typer halted" in run_python(code).stderr


NAME = "OMP_WAIT_POLICY"


@pytest.mark.parametrize(("given", "seen"), [({}, "passive"), ({NAME: "active"}, "active")])
@pytest.mark.parametrize("start", ["main(['train', 'glyphs', '--out', 'run'])", "runpy"])
def test_waiting_threads_do_not_spin_unless_the_user_wants_them_to(given, seen, start, tmp_path):
    """OpenMP reads the policy when torch is loaded, so that is when it must be there."""
    environment = {k: v for k, v in os.environ.items() if k != NAME} | given
    if start == "runpy":
        start = (
            "import runpy; sys.argv[1:] = ['train', 'glyphs', '--out', 'run']\n"
            "runpy.run_module('nearfar', run_name='__main__')"
        )
    code = f"""
import os, sys
class Witness:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get({NAME!r}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Witness())
from nearfar.app.cli import main
{start}
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"{seen}\n", "")


def test_benchmarks_wait_as_the_tool_does():
    """Each script that can be started sets the policy before it loads torch."""
    scripts = [
        path
        for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    ]
    assert len(scripts) >= 7
    for path in scripts:
        lines = path.read_text(encoding="utf-8").splitlines()
        imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        first = next(k for k, name in enumerate(imports) if name in ("torch", "cases", "measure"))
        assert "passive" in imports[:first], path


@pytest.mark.skipif(not which("make"), reason="needs make")
@pytest.mark.parametrize(("given", "seen"), [({}, "passive"), ({NAME: "active"}, "active")])
def test_make_and_so_ci_waits_as_the_tool_does(given, seen):
    environment = {k: v for k, v in os.environ.items() if k != NAME} | given
    command = ["make", "--no-print-directory", f"--eval=show:;@echo $${NAME}", "show"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{seen}\n", done.stderr
    targets = re.findall(r"^make (\S+)$", (root / ".ci" / "run").read_text(), re.MULTILINE)
    assert {"check", "test"} <= set(targets)
