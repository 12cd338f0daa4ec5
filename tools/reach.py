"""Counts what one must read to understand a function of nearfar from end to end.

    python tools/reach.py sup_con_loss          # lines and definitions, file by file
    python tools/reach.py sup_con_loss --list   # and each definition

Starting from a public name, every definition of the package that is mentioned is followed: the
functions, classes, constants and type aliases that a definition names in its body, its signature
or its decorators. A definition counts from the comment above it to its last line, docstring and
blank lines included. Of a class, the lines outside its methods count, and so does each method whose
name is used anywhere in what is reached, on whatever object. Methods such as `__init__` always
count, and if a base class comes from outside the package, all methods do, since that class may call
them.

So it counts too much rather than too little: branches that this function never takes, and methods
that share their name with a tensor's. Imports and module docstrings are not counted, nor is what is
found only at run time, by a name in a string.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "nearfar"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Statements = tuple[ast.stmt, ...]


@dataclass(frozen=True)
class Definition:
    """Some lines of a file that belong together.

    Attributes:
        module: the module that they stand in, such as "nearfar.labels".
        name: what they define; "Class.method" for a method.
        nodes: the statements; several for an overloaded function.
        methods: of a class, by name; each is a definition of its own.
    """

    module: str
    name: str
    nodes: Statements = field(compare=False)
    methods: dict[str, Statements] = field(default_factory=dict, compare=False)

    @property
    def n_lines(self) -> int:
        lines = parsed(self.module).lines
        inside = [node for nodes in self.methods.values() for node in nodes]
        return sum(_n_lines(n, lines) for n in self.nodes) - sum(_n_lines(n, lines) for n in inside)


@dataclass(frozen=True)
class Module:
    """A module of the package, parsed.

    Attributes:
        path: its file.
        lines: of the file.
        imports: each imported name, and its path: `import a.b as c` gives {"c": ["a", "b"]}.
        definitions: by each name that they define.
    """

    path: Path
    lines: list[str]
    imports: dict[str, list[str]]
    definitions: dict[str, Definition]


def reach(name: str) -> list[Definition]:
    """Every definition that is reached from a public name, such as "evaluate.fit_threshold"."""
    start = _find([PACKAGE, *name.split(".")])
    if start is None:
        raise SystemExit(f"{PACKAGE} has no function or class {name!r}.")
    reached, queue = {start}, [start]
    used = set(start.methods)  # attributes; if a class was asked for, all its methods count
    while queue:
        definition = queue.pop()
        for path in _mentioned(definition):
            found = _meant(definition.module, path)
            if found is not None and found not in reached:
                reached.add(found)
                queue.append(found)
            used.update(path[1:])
        if not queue:  # now all attributes that are used are known
            queue = [method for method in _methods(reached, used) if method not in reached]
            reached.update(queue)
    return sorted(reached, key=lambda one: (one.module, one.nodes[0].lineno))


def _methods(reached: set[Definition], used: set[str]) -> Iterator[Definition]:
    """The methods of reached classes that count."""
    for definition in reached:
        outside = _has_outside_base(definition)
        for name, nodes in definition.methods.items():
            if name in used or name.startswith("__") or outside:
                yield Definition(definition.module, f"{definition.name}.{name}", nodes)


def _has_outside_base(definition: Definition) -> bool:
    """Whether a class inherits, other than the marks of typing, from outside the package."""
    classes = [node for node in definition.nodes if isinstance(node, ast.ClassDef)]
    for base in (base for node in classes for base in node.bases):
        path = _path(base.value if isinstance(base, ast.Subscript) else base)
        marks = path in (["Protocol"], ["Generic"], ["NamedTuple"])
        if not marks and _meant(definition.module, path) is None:
            return True
    return False


def _meant(module: str, path: list[str]) -> Definition | None:
    """The definition that a dotted name means in a module; None if it is none of the package's."""
    known = parsed(module)
    if path[0] in known.definitions:
        return known.definitions[path[0]]
    return _find([*known.imports[path[0]], *path[1:]]) if path[0] in known.imports else None


def _find(path: list[str]) -> Definition | None:
    """The definition at an absolute path, such as ["nearfar", "labels", "refuse"].

    What follows the name of a function or class is left aside.
    """
    for n in range(len(path) - 1, 0, -1):
        module, name = ".".join(path[:n]), path[n]
        if _file(module) is not None and parsed(module).imports.get(name) != path[: n + 1]:
            return _meant(module, path[n:])
    return None


def _file(module: str) -> Path | None:
    """The file of a module of the package; a stub says where the package's lazy names come from."""
    if module.partition(".")[0] != PACKAGE:
        return None
    base = SOURCE.joinpath(*module.split("."))
    candidates = (base / "__init__.pyi", base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.exists()), None)


@cache
def parsed(name: str) -> Module:
    path = _file(name)
    assert path is not None
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    by_name: dict[str, Statements] = defaultdict(tuple)
    for statement in tree.body:
        for defined in dict.fromkeys(_defined(statement)):
            by_name[defined] += (statement,)
    together: dict[Statements, list[str]] = defaultdict(list)  # `a, b = 1, 2` is one definition
    for defined, nodes in by_name.items():
        together[nodes].append(defined)
    definitions = {
        defined: Definition(name, ", ".join(names), nodes, _methods_of(nodes))
        for nodes, names in together.items()
        for defined in names
    }
    return Module(path, text.splitlines(), dict(_imports(tree)), definitions)


def _imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Each imported name and its path; also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, [*node.module.split("."), alias.name]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name.split(".")
                yield (alias.asname, path) if alias.asname else (path[0], path[:1])


def _defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top level of a module defines."""
    if not isinstance(statement, ast.Import | ast.ImportFrom):
        yield from _stored(statement)


def _methods_of(nodes: Statements) -> dict[str, Statements]:
    methods: dict[str, Statements] = defaultdict(tuple)
    for node in nodes:
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, Function):
                methods[inner.name] += (inner,)
    return dict(methods)


def _mentioned(definition: Definition) -> Iterator[list[str]]:
    """The dotted names in a definition that do not start with a local variable."""
    methods = frozenset(node for nodes in definition.methods.values() for node in nodes)
    for node in definition.nodes:
        yield from _names(node, frozenset(), methods)


def _names(
    node: ast.AST, local: frozenset[str], without: frozenset[ast.stmt]
) -> Iterator[list[str]]:
    """The dotted names in a node, other than inside the statements `without`.

    "?" stands for a local variable or a computed object: only its attributes matter.
    """
    match node:
        case ast.Name() | ast.Attribute():
            path = _path(node)
            yield ["?", *path[1:]] if path[0] in local else path
            while isinstance(node, ast.Attribute):
                node = node.value
            if not isinstance(node, ast.Name):
                yield from _names(node, local, without)
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            inside = local | frozenset(_locals(node))
            body = node.body if isinstance(node.body, list) else [node.body]
            if isinstance(node, Function) and node.returns is not None:
                yield from _of_strings(node.returns)
            for child in ast.iter_child_nodes(node):
                yield from _names(child, inside if child in body else local, without)
            return
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            local = local.union(*(_stored(part.target) for part in node.generators))
        case ast.arg(annotation=ast.expr() as annotation) | ast.AnnAssign(annotation=annotation):
            yield from _of_strings(annotation)
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
            yield ["?", name]
    for child in ast.iter_child_nodes(node):
        if child not in without:
            yield from _names(child, local, without)


def _of_strings(annotation: ast.expr) -> Iterator[list[str]]:
    """The names in the parts of an annotation that are written as strings."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                parsed_string = ast.parse(node.value, mode="eval")
            except SyntaxError:  # a value of a Literal
                continue
            yield from _names(parsed_string, frozenset(), frozenset())


def _path(node: ast.expr) -> list[str]:
    """`a.b.c` as a list; what is computed, as in `f(x).b`, starts with "?"."""
    if isinstance(node, ast.Attribute):
        return [*_path(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else ["?"]


def _locals(function: Function | ast.Lambda) -> Iterator[str]:
    """The parameters and variables of a function."""
    yield from (node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg))
    if isinstance(function, Function):
        for statement in function.body:
            yield from _stored(statement)


def _stored(node: ast.AST) -> Iterator[str]:
    """The names that are bound here, and not only in a function or comprehension inside."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.ExceptHandler(name=str(name)):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
            return
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            return
    for child in ast.iter_child_nodes(node):
        yield from _stored(child)


def _n_lines(node: ast.stmt, lines: list[str]) -> int:
    """The lines of a statement, with its decorators and the comment above it."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    assert node.end_lineno is not None
    return node.end_lineno - first + 1


def main(name: str, listed: bool) -> None:
    reached = reach(name)
    by_module: dict[str, list[Definition]] = defaultdict(list)
    for definition in reached:
        by_module[definition.module].append(definition)
    for module, definitions in by_module.items():
        _print_row(parsed(module).path.relative_to(SOURCE / PACKAGE).as_posix(), definitions)
        for one in definitions if listed else ():
            print(f"    {one.name:<45}{one.n_lines:>10,}")
    _print_row(f"{len(by_module)} files", reached)


def _print_row(name: str, definitions: list[Definition]) -> None:
    n_lines = sum(definition.n_lines for definition in definitions)
    print(f"{name:<32}{len(definitions):>5} definitions{n_lines:>10,} lines")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count what a function reaches.")
    parser.add_argument("name", help="a public name, such as explain or evaluate.verification")
    parser.add_argument("--list", action="store_true", help="name each definition")
    arguments = parser.parse_args()
    main(arguments.name, arguments.list)
