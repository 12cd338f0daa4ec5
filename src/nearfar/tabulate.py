"""A table that can be shown as plain text, in a terminal with `rich`, or in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Columns of text with headers; a column of numbers is aligned to the right."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def plain(self) -> str:
        """Fixed-width text.

        >>> print(Table(("pair", "distance"), [("a", "0.5"), ("bc", "12.0")]).plain())
        pair  distance
        ----  --------
        a          0.5
        bc        12.0
        """
        columns = [[head, *cells] for head, cells in zip(self.header, self._columns(), strict=True)]
        widths = [max(map(len, column)) for column in columns]
        lines = [self.header, tuple("-" * width for width in widths), *self.rows]
        pads = [str.rjust if right else str.ljust for right in self._numeric()]
        return "\n".join(
            "  ".join(f(cell, w) for f, cell, w in zip(pads, line, widths, strict=True)).rstrip()
            for line in lines
        )

    def rich(self) -> "RichTable":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD)
        for head, right in zip(self.header, self._numeric(), strict=True):
            table.add_column(head, justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))  # Text, since a cell may hold [brackets]
        return table

    def html(self) -> str:
        """An HTML table in the style of the page that shows it."""
        align = ["right" if right else "left" for right in self._numeric()]

        def line(tag: str, cells: tuple[str, ...]) -> str:
            aligned = zip(cells, align, strict=True)
            inner = "".join(
                f'<{tag} style="text-align:{a}">{escape(c)}</{tag}>' for c, a in aligned
            )
            return f"<tr>{inner}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f"<table><thead>{line('th', self.header)}</thead><tbody>{body}</tbody></table>"

    def _columns(self) -> list[tuple[str, ...]]:
        return list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.header)

    def _numeric(self) -> list[bool]:
        return [all(map(_is_number, cells)) and bool(cells) for cells in self._columns()]


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%").strip() or "0")
    except ValueError:
        return False
    return True
