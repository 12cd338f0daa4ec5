"""The shape of the source: no import circles, layers that point one way, functions of a screen."""

import ast
import io
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# From the lowest; a module imports from its own layer and from those below (docs/architecture.md).
LAYERS = (
    {
        "registry",
        "reduction",
        "inputs",
        "spectrum",
        "tabulate",
        "plain",
        "shards",
        "extras",
        "similar_label",
    },
    {"labels", "distance", "listed", "reference"},
    {"engine"},
    {"losses", "distributed", "memory", "cached"},
    {"mine", "evaluate", "doctor", "insight"},
    {"adapters", "keras"},
    {"app", "trained"},
)
MOST_LINES = 60


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def statements(node: ast.AST, *, when_loaded: bool) -> Iterator[ast.AST]:
    """Every node, or only what runs when the module is loaded."""
    if when_loaded:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from statements(child, when_loaded=when_loaded)


def imported(tree: ast.Module, *, when_loaded: bool) -> set[str]:
    """The modules of the package that are imported."""
    found = set()
    for node in statements(tree, when_loaded=when_loaded):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in full}
    return found & set(MODULES)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, the first and last the same; [] if there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert circle({name: imported(tree_of(name), when_loaded=True) for name in MODULES}) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] in "abc"
    inner = ast.parse(
        "def f():\n    import nearfar.labels\nif TYPE_CHECKING:\n    import nearfar.mine"
    )
    assert imported(inner, when_loaded=True) == set()
    assert imported(inner, when_loaded=False) == {"nearfar.labels", "nearfar.mine"}


def layer_of(module: str) -> int | None:
    """None for the package itself and for `python -m nearfar`, which belong to no layer."""
    name = f"{module}.".split(".")[1]
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def test_every_module_has_a_layer():
    assert {name for name in MODULES if layer_of(name) is None} == {"nearfar", "nearfar.__main__"}


@pytest.mark.parametrize("names", LAYERS, ids=lambda names: "-".join(sorted(names)))
def test_imports_point_to_lower_layers(names):
    """Also those inside functions."""
    layer = LAYERS.index(names)
    wrong = {
        (module, other)
        for module in MODULES
        if layer_of(module) == layer
        for other in imported(tree_of(module), when_loaded=False)
        if (layer_of(other) or 0) > layer
    }
    assert wrong == set()


def lines_of_code(function: ast.AST, text: str) -> int:
    """The lines of a function, decorators left out, that hold more than a comment or docstring."""
    left_out = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in left_out
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines & set(range(function.lineno, function.end_lineno + 1)))


def functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods by name, but not those inside other functions, which count there."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}.{child.name}")
        else:
            yield from functions(child, prefix)


def test_every_function_fits_a_screen():
    long = {
        name
        for module, path in MODULES.items()
        for name, function in functions(tree_of(module), module)
        if function.end_lineno - function.lineno >= MOST_LINES
        and lines_of_code(function, path.read_text(encoding="utf-8")) > MOST_LINES
    }
    assert long == set()


def test_lines_of_code_are_counted_without_docstrings_comments_and_blank_lines():
    text = '''
@decorated
def function(
    x,
):
    """A docstring.

    Of three lines.
    """
    # A comment.
    text = """

    two lines more"""

    return text  # a comment beside
'''
    (function,) = ast.parse(text).body
    assert lines_of_code(function, text) == 3 + 3 + 1
