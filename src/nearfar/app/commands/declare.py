"""What the commands share: how one is declared, and the arguments that several take.

`train.config` declares the settings of a run and of its loss; a command lists the ones it takes.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

import nearfar
from nearfar.app.names import GLYPHS
from nearfar.app.train.config import Hyperparameters, TrainConfig, options_of

OPTIONS = {**options_of(TrainConfig), **options_of(Hyperparameters)}
FLAGS = {name: "--" + name.replace("_", "-") for name in OPTIONS}
Command = Callable[..., None]
Decorator = Callable[[Command], Command]

app = typer.Typer(
    help="Teach a network to tell same from different, and use what it learned.",
    epilog="Begin with: nearfar train glyphs --out runs/demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text)


def option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


DATA = argument(
    "DATA",
    f"'{GLYPHS}' (built in), a folder with one subfolder of images per identity, an .npz with "
    "arrays x and y, or a .csv or .parquet: of pairs, with columns a, b and label, or of texts, "
    "with columns text and identity.",
)
RunFolder = Annotated[Path, argument("RUN", "A run folder written by train.")]
AsJson = Annotated[bool, option("Print JSON.", "--json")]
Prior = Annotated[
    float | None,
    option("Share of same pairs among all that you compare; gives a probability.", "--prior"),
]
Overwrite = Annotated[bool, option("Replace --out if it exists.", "--overwrite")]


def command(*examples: str, takes: Iterable[str] = (), several: Iterable[str] = ()) -> Decorator:
    """Register a command; the settings it `takes` reach it as **given if used, range-checked."""
    epilog = "\n\n".join(["Examples:", *(f"  nearfar {example}" for example in examples)])
    options = [_parameter(name, name in several) for name in takes]

    def decorate(run: Command) -> Command:
        @wraps(run)
        def checked(**arguments: Any) -> None:
            used = {name: value for name, value in arguments.items() if value not in (None, [])}
            for name in filter(OPTIONS.get, used):
                OPTIONS[name][1].check(FLAGS[name], used[name])
            run(**used)

        declared = signature(run)  # what typer reads: there, the options replace **given
        own = [p for p in declared.parameters.values() if p.kind is not p.VAR_KEYWORD]
        checked.__signature__ = declared.replace(parameters=own + options)  # type: ignore[attr-defined]
        return app.command(epilog=epilog if examples else None)(checked)

    return decorate


def _parameter(name: str, several: bool) -> Parameter:
    """The parameter that typer turns into an option; its value is None if the option is unused."""
    kind, declared = OPTIONS[name]
    default = getattr(TrainConfig, name, None)
    text, metavar = declared.help, "|".join(map(str, declared.choices)) or None
    if type(default) in (int, float):
        text = f"{text.removesuffix('.')} ({default})."
    if several:
        text, metavar = f"Values to try. {text}", "NAME..." if kind is str else "X..."
    switch = (
        [FLAGS[name]] if bool in (kind, *get_args(kind)) and not default else []
    )  # a name drops the --no- form
    shown = option(text, *switch, metavar=metavar, rich_help_panel=declared.panel)
    annotation = Annotated[(list[kind] if several else kind) | None, shown]  # type: ignore[valid-type]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nearfar {nearfar.__version__}")
        raise typer.Exit


Version = Annotated[bool, option("Show version.", "--version", callback=_version, is_eager=True)]


@app.callback()
def root(version: Version = False) -> None: ...
