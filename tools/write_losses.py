"""Write the files generated from the list of losses (`nearfar/registry.py`) and their functions.

    python tools/write_losses.py            # after changing the list, a signature or a docstring
    python tools/write_losses.py --check    # check that every file is up to date

Generated are the modules, the imports of `nearfar.losses`, the stub `nearfar/__init__.pyi` that
editors and type checkers read, and, in the docs, the text between `<!-- losses: ... -->` and
`<!-- end -->`.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from textwrap import dedent, fill, indent
from typing import Literal, get_args, get_origin, get_type_hints

import nearfar
from nearfar.registry import LOSSES, Data, Loss

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nearfar"
HEADER = "Written by tools/write_losses.py; do not edit."
WIDTH = 100


class Family:
    """A file of losses.

    Attributes:
        name: the module to import from.
        tree: the syntax tree of the file.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"nearfar.losses.{path.stem}"
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def function(self, name: str) -> ast.FunctionDef | None:
        found = (
            node
            for node in self.tree.body
            if isinstance(node, ast.FunctionDef) and node.name == name
        )
        return next(found, None)

    def imports(self, name: str) -> str | None:
        """The line that imports a name of this file elsewhere; None for a built-in name."""
        for node in self.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        origin = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                        return f"{origin}import {ast.unparse(alias)}"
            elif name in _defined(node):
                return f"from {self.name} import {name}"
        return None


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines: of a class or a type alias."""
    match node:
        case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


@cache
def families() -> tuple[Family, ...]:
    written = {"__init__.py", "modules.py"}
    paths = sorted((PACKAGE / "losses").glob("*.py"))
    return tuple(Family(path) for path in paths if path.name not in written)


def home(loss: Loss) -> tuple[Family, ast.FunctionDef]:
    """The file of a loss and its definition there."""
    for family in families():
        definition = family.function(loss.function)
        if definition:
            return family, definition
    raise SystemExit(f"{loss.function} is in the registry, but not in any file of nearfar/losses.")


def keywords(definition: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """The keyword arguments and their defaults."""
    return list(zip(definition.args.kwonlyargs, definition.args.kw_defaults, strict=True))


def is_data(argument: ast.arg) -> bool:
    """Whether a keyword argument changes with every batch, as weights and pairs do."""
    assert argument.annotation is not None
    kinds = {node.id for node in ast.walk(argument.annotation) if isinstance(node, ast.Name)}
    return bool(kinds & {"ArrayLike", "Pairs", "ReferenceLike"})


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")


@cache
def holder() -> tuple[Family, ast.FunctionDef, dict[str, str]]:
    """What a module that holds proxies takes for them: its constructor, and each description."""
    (base,) = (family for family in families() if family.name.endswith(".base"))
    (held,) = (node for node in base.tree.body if _defined(node) == ["ProxyLossModule"])
    (init,) = (
        node
        for node in ast.walk(held)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    assert isinstance(held, ast.ClassDef)
    return base, init, dict(entries(ast.get_docstring(held) or ""))


# -- the modules ----------------------------------------------------------------------------------


def modules() -> str:
    """The source of `modules.py`: every loss as a class, and the imports."""
    lines = {
        "from typing import TYPE_CHECKING",
        "from torch import Tensor",
        "from nearfar.losses.base import LossModule, ProxyLossModule, by_name",
    }
    base, constructor, _ = holder()
    lines |= needed(base, constructor)
    classes = []
    for loss in LOSSES:
        family, definition = home(loss)
        lines.add(f"from {family.name} import {loss.function}")
        lines |= needed(family, definition)
        classes.append(module(loss, definition))
    docstring = f'"""The losses as modules, which keep their hyperparameters.\n\n{HEADER}\n"""'
    return "\n\n".join([docstring, "\n".join(sorted(lines)), *classes])


def needed(family: Family, definition: ast.FunctionDef) -> set[str]:
    """The imports needed by the signature of a function."""
    arguments = (*definition.args.args, *(argument for argument, _ in keywords(definition)))
    used = {
        node.id
        for argument in arguments
        if argument.annotation
        for node in ast.walk(argument.annotation)
        if isinstance(node, ast.Name)
    }
    return {line for name in used if (line := family.imports(name))}


def module(loss: Loss, definition: ast.FunctionDef) -> str:
    """The class of one loss."""
    arguments = definition.args
    settings = [pair for pair in keywords(definition) if not is_data(pair[0])]
    per_batch = [pair for pair in keywords(definition) if is_data(pair[0])]
    without = [None] * (len(arguments.args) - len(arguments.defaults))
    data = list(zip(arguments.args, [*without, *arguments.defaults], strict=True))
    names = [argument.arg for argument, _ in settings]
    first, several, last = held(loss)
    constructor = [
        *(parameter(argument, None) for argument in first),
        "*",
        *(parameter(*pair) for pair in (*several, *settings, *last)),
    ]
    kept = [argument.arg for argument in first]
    kept += [f"{argument.arg}={argument.arg}" for argument, _ in (*several, *settings, *last)]
    takes = [parameter(*pair) for pair in data if pair[0].arg not in HELD]
    if per_batch:
        takes += ["*", *(parameter(*pair) for pair in per_batch)]
    passed = [
        *(HELD.get(argument.arg, argument.arg) for argument, _ in data),
        *(f"{argument.arg}={argument.arg}" for argument, _ in per_batch),
        *(f"{name}=self.{name}" for name in names),
    ]
    return dedent('''\
        class {module}({base}):
        {docstring}

            loss = staticmethod({function})
            {attributes}

            @by_name
            def __init__(self, {constructor}) -> None:
                super().__init__({kept})

            def forward(self, {takes}) -> Tensor:
                """The loss of a batch; see :func:`nearfar.{function}`."""
                return {function}({passed})

            if TYPE_CHECKING:
                def __call__(self, {takes}) -> Tensor: ...
        ''').format(
        module=loss.module,
        base="ProxyLossModule" if loss.data == "proxies" else "LossModule",
        function=loss.function,
        docstring=documented(loss, ast.get_docstring(definition) or "", constructor),
        attributes="\n    ".join(ast.unparse(argument) for argument, _ in settings),
        constructor=", ".join(constructor),
        kept=", ".join(kept),
        takes=", ".join(takes),
        passed=", ".join(passed),
    )  # fmt: skip


# What a module holds of the data of its function.
HELD = {"proxies": "self.proxies"}

Pairs = list[tuple[ast.arg, ast.expr | None]]


def held(loss: Loss) -> tuple[list[ast.arg], Pairs, Pairs]:
    """What a constructor takes for proxies: by position, then before and after the settings."""
    if loss.data != "proxies":
        return [], [], []
    _, constructor, _ = holder()
    _, *first = constructor.args.args
    several = [pair for pair in keywords(constructor) if pair[0].arg == "sub_centers"]
    last = [pair for pair in keywords(constructor) if pair[0].arg != "sub_centers"]
    return first, several if loss.sub_centers else [], last


def documented(loss: Loss, docstring: str, constructor: list[str]) -> str:
    """The docstring of a class: the summary and hyperparameters from that of its function."""
    described = dict(entries(docstring))
    names = [word.partition(":")[0] for word in constructor if word != "*"]
    holds = ""
    if loss.data == "proxies":
        described |= holder()[2]
        holds = " It holds the proxies: see :class:`~nearfar.losses.base.ProxyLossModule`."
    summary, function = docstring.partition("\n")[0], f":func:`nearfar.{loss.function}`"
    missing = [name for name in names if name not in described]
    if missing:
        raise SystemExit(f"{loss.function} does not describe {', '.join(missing)} under Args.")
    said = [
        fill(f"{name}: {described[name]}", WIDTH - 8, subsequent_indent=" " * 4,
             break_long_words=False, break_on_hyphens=False)
        for name in names
    ]  # fmt: skip
    raw = "r" if "\\" in summary + "".join(said) else ""
    text = [
        f'{raw}"""{summary}',
        "",
        fill(
            f"The module of {function}, which describes the data and the math.{holds}",
            WIDTH - 4,
            break_on_hyphens=False,
        ),
        "",
        "Args:",
        indent("\n".join(said), " " * 4),
        '"""',
    ]
    return indent("\n".join(text), " " * 4)


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """The description of each argument in a docstring."""
    described = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for entry in re.split(r"\n(?=    \S)", described):
        name, _, text = entry.strip().partition(": ")
        yield name, " ".join(text.split())


# -- the names ------------------------------------------------------------------------------------


def package() -> str:
    """The source of `losses/__init__.py`: the imports."""
    names = sorted(name for loss in LOSSES for name in (loss.function, loss.module))
    imports = sorted(f"from {home(loss)[0].name} import {loss.function}" for loss in LOSSES)
    imports += [f"from nearfar.losses.modules import {loss.module}" for loss in LOSSES]
    docstring = (
        '"""The losses, one family per file; a function is its docstring (the paper), its checks '
        f'and a rule.\n\n{HEADER}\n"""'
    )
    return f"{docstring}\n\n{chr(10).join(imports)}\n\n__all__ = {names!r}\n"


def stub() -> str:
    """The stub that editors and type checkers read in place of `nearfar/__init__.py`."""
    imports = [f"from {module} import {name}" for name, module in nearfar._HOME.items()]
    imports += [
        f"from nearfar import {name}" for name in nearfar.__all__ if name not in nearfar._HOME
    ]
    docstring = f'"""The names of `__init__.py`, which loads each on first use.\n\n{HEADER}\n"""'
    body = f"__version__: str\n\n__all__ = {nearfar.__all__!r}\n"
    return f"{docstring}\n\n{chr(10).join(imports)}\n\n{body}"


# -- the docs -------------------------------------------------------------------------------------

BEGIN, END = "<!-- losses: {} -->", "<!-- end -->"


def by_data() -> str:
    """The losses by the data they take."""
    takes: dict[Data, str] = {
        "rows": "pairs, triplets, quadruplets in rows",
        "batch": "a batch with class labels",
        "towers": "two towers, row i matches row i",
        "proxies": "learned proxies of classes, with the margins of ArcFace and CosFace, and "
        "sub-centres",
    }
    rows = [
        f"| {what} | {code(loss for loss in LOSSES if loss.takes(data))} |"
        for data, what in takes.items()
    ]
    return table("| data | losses |", rows)


def trained() -> str:
    """The losses of the command line and their defaults."""
    # Imported here, since it loads the losses, which must be written first.
    from nearfar.app.train.objectives import OBJECTIVES

    rows = []
    for name, objective in OBJECTIVES.items():
        settings = (f"{key} {shown(value)}" for key, value in objective.hyperparameters.items())
        pairs = "yes" if objective.from_pairs else "no"
        rows.append(f"| {name} | {', '.join(settings)} | {pairs} |")
    return table("| `--loss` | defaults | trains on given pairs |", rows)


def shown(value: object) -> str:
    if isinstance(value, ast.expr):
        return ast.unparse(value).replace("'", '"')
    return str(value).lower() if isinstance(value, bool) else str(value)


def options() -> str:
    """The keywords that many losses share: which loss takes which, and some defaults."""
    rows, over = [], dict[str, list[Loss]]()
    for loss in LOSSES:
        _, definition = home(loss)
        takes = {argument.arg: default for argument, default in keywords(definition)}
        learned = [argument.arg for argument, _ in keywords(definition) if is_learned(argument)]
        cells = [
            *("yes" if name in takes else "" for name in ("weight", "reference")),
            ", ".join(f"`{name}`" for name in ("pairs", "triplets") if name in takes),
            *(assigned(takes, *names) for names in (("distance", "similarity"), ("normalize",))),
            ", ".join(f"`{name}`" for name in learned),
        ]
        rows.append(f"| `{loss.function}` | {' | '.join(cells)} |")
        over.setdefault(reductions(loss), []).append(loss)
    header = "| loss | `weight` | `reference` | listed | closeness | `normalize` | may be learned |"
    common, *others = sorted(over, key=lambda text: -len(over[text]))
    text = [f"`reduction` is one of {common}"]
    text += [f"of {code(over[other])} one of {other}" for other in others]
    return table(header, rows) + "\n" + filled("; ".join(text) + ".") + "\n"


def assigned(takes: Mapping[str, ast.expr | None], *names: str) -> str:
    """Those of some keywords that are taken, with their defaults."""
    taken = {name: takes[name] for name in names if name in takes}
    return ", ".join(f"`{k}={'...' if v is None else shown(v)}`" for k, v in taken.items())


def is_learned(argument: ast.arg) -> bool:
    """Whether a keyword takes a number or a tensor, which gets a gradient."""
    assert argument.annotation is not None
    return {"float", "Tensor"} <= set(ast.unparse(argument.annotation).split(" | "))


def reductions(loss: Loss) -> str:
    """What a loss takes for `reduction`."""
    hint = get_type_hints(getattr(nearfar, loss.function))["reduction"]
    kinds = [hint] if get_origin(hint) is Literal else get_args(hint)
    names = [
        f'`"{name}"`' for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)
    ]
    pair = ["`(low, high)`"] if any(get_origin(kind) is tuple for kind in kinds) else []
    return ", ".join([*names, *pair])


def traced() -> str:
    """The losses that `torch.compile` traces completely: those that do not loop over tiles."""
    rows = code(loss for loss in LOSSES if loss.data == "rows")
    both = code(loss for loss in LOSSES if loss.also == "rows")
    return f"{rows}, and {both} with `negatives`."


def broken() -> str:
    """The losses that loop over tiles."""
    others = code(loss for loss in LOSSES if loss.data != "rows" and not loss.also)
    both = code(loss for loss in LOSSES if loss.also == "rows")
    return f"{others}, and {both} without `negatives`."


def reference(data: Data) -> str:
    """The directive that documents each function and its module in the API reference."""
    names = [f"   {loss.function}" for loss in LOSSES if loss.data == data]
    directive = [".. currentmodule:: nearfar", "", ".. losses::", "", *names]
    return "\n".join(["", "```{eval-rst}", *directive, "```", ""])


def code(losses: Iterable[Loss]) -> str:
    return ", ".join(f"`{loss.function}`" for loss in losses)


def table(header: str, rows: list[str]) -> str:
    rule = "|---" * (header.count("|") - 1) + "|"
    return "\n".join(["", header, rule, *rows, ""])


def filled(text: str) -> str:
    return fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "by data": by_data,
    "trained": trained,
    "options": options,
    "traced": traced,
    "broken": broken,
    **{f"reference of {data}": partial(reference, data) for data in get_args(Data)},
}


def page(text: str) -> str:
    """A page of the docs with its generated blocks updated."""

    def written(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise SystemExit(f"losses: {name}: the blocks are {', '.join(BLOCKS)}.")
        block = BLOCKS[name]()
        if not block.startswith("\n"):
            block = filled(block)
        return f"{BEGIN.format(name)}\n{block}\n{END}"

    return re.sub(f"{BEGIN.format('(.*?)')}.*?{END}", written, text, flags=re.DOTALL)


# -- the files ------------------------------------------------------------------------------------


def tidied(source: str, name: str) -> str:
    """Python source, formatted and with sorted imports."""
    for command in (["check", "--fix", "--quiet", "--select", "I,RUF022"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", name, "-"]
        done = subprocess.run(
            ruff, input=source, cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr or done.stdout}")
        source = done.stdout
    return source


def sources() -> Iterator[tuple[Path, str]]:
    """Each generated file of the package, and its up-to-date contents."""
    for name, text in (
        ("losses/modules.py", modules),
        ("losses/__init__.py", package),
        ("__init__.pyi", stub),
    ):
        path = PACKAGE / name
        yield path, tidied(text(), str(path))


def pages() -> Iterator[tuple[Path, str]]:
    """Each page of the docs, and its up-to-date contents."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))):
        yield path, page(path.read_text(encoding="utf-8"))


def main(check: bool) -> int:
    """Write or check all files; returns 1 if a check found a file out of date, else 0."""
    status = 0
    for written in (sources, pages):  # the pages are made from the written package
        if status:
            break
        for path, text in written():
            if path.exists() and path.read_text(encoding="utf-8") == text:
                continue
            name = path.relative_to(ROOT)
            if check:
                print(f"{name} is out of date: run python tools/write_losses.py.")
                status = 1
            else:
                path.write_text(text, encoding="utf-8", newline="\n")
                print(f"wrote {name}")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if a file would change"
    )
    sys.exit(main(parser.parse_args().check))
