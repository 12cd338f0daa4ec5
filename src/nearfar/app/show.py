"""Print the result of a command: as JSON, for a terminal, or as plain text."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import typer

from nearfar.tabulate import Table

if TYPE_CHECKING:
    from rich.console import Console


class Result(Protocol):
    """The result of a command; its optional method `render` returns lines and tables to print."""

    def as_dict(self) -> Mapping[str, Any]:
        """For JSON."""


def show(result: Result, as_json: bool = False, **more: Any) -> None:
    """Print the result of a command.

    Args:
        result: what to print.
        as_json: whether to print JSON instead of text.
        more: keys of the JSON that replace or extend those of `result`.
    """
    if as_json:
        typer.echo(json.dumps({**result.as_dict(), **more}, indent=2))
        return

    terminal = console()
    for part in result.render() if hasattr(result, "render") else [result]:
        if terminal.is_terminal and not isinstance(part, str):
            terminal.print(part.rich() if isinstance(part, Table) else part)
        else:
            typer.echo(f"\n{part.plain()}" if isinstance(part, Table) else str(part))


def console(stderr: bool = False) -> "Console":
    """The console for progress messages: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    return Console(stderr=stderr)


def note(notes: Iterable[str]) -> None:
    """Print notes to stderr, apart from the result."""
    for text in notes:
        typer.echo(f"note: {text}", err=True)
