"""What a command found, for whoever reads it: JSON, a terminal, or plain text."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import typer

from nearfar.tabulate import Table

if TYPE_CHECKING:
    from rich.console import Console


class Found(Protocol):
    """What a command found; `told`, where it has that, gives its lines and tables to print."""

    def as_dict(self) -> Mapping[str, Any]:
        """For JSON."""


def show(found: Found, as_json: bool = False, **more: Any) -> None:
    """Print it.

    Args:
        found: by a command.
        as_json: for machines.
        more: keys of the JSON, over those of `found`.
    """
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), **more}, indent=2))
        return

    terminal = console()
    for part in found.told() if hasattr(found, "told") else [found]:
        if terminal.is_terminal and not isinstance(part, str):
            terminal.print(part.rich() if isinstance(part, Table) else part)
        else:
            typer.echo(f"\n{part.plain()}" if isinstance(part, Table) else str(part))


def console(aside: bool = False) -> "Console":
    """Where progress is told: on stdout, or aside on stderr, which leaves that to JSON."""
    from rich.console import Console

    return Console(stderr=aside)


def note(notes: Iterable[str]) -> None:
    """Print what a reader should know, apart from what was found."""
    for said in notes:
        typer.echo(f"note: {said}", err=True)
