"""The result of `explain`, and how it prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nearfar.doctor.finding import Finding
from nearfar.insight.readings import way
from nearfar.plain import number, plain
from nearfar.tabulate import Table

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 20  # rows that a printed table shows by default


@dataclass(frozen=True)
class Row:
    """One pair or tuple; for a whole batch, an anchor and another row that it acts on.

    Attributes:
        index: the row in the data; for a whole batch, the row of the anchor.
        label: "similar", "dissimilar" or a degree; None for tuples, whose roles imply it.
        measured: the distances or similarities that the loss sees, by name.
        loss: the loss of the row; None for a pair of a whole batch, where only anchors have one.
        forces: for each measured value, how hard the row is pulled together (> 0) or pushed apart
            (< 0): the derivative of its loss with respect to how far apart it is. 0 at distance 0,
            where no direction is defined.
        reading: the same in words.
        other: for a whole batch, the row that the anchor acts on.
    """

    index: int
    label: str | None
    measured: Mapping[str, float]
    loss: float | None
    forces: Mapping[str, float]
    reading: str
    other: int | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table, and renders in terminals and notebooks.

    Attributes:
        loss: the name of the loss.
        hyperparameters: what it was called with, but for what is so by default.
        rows: one `Row` per pair or tuple; for a whole batch, the strongest forces.
        n: how many rows (pairs, tuples, anchors) the loss is over; with `group`, those of this
            process.
        total: the sum of the losses; with `group`, over all processes, and so is the mean.
        mean: the loss with reduction="mean", which training minimises by default. What it is the
            mean over (rows, pairs, triplets), the docstring of the loss says.
        active_share: share of the rows with a force of at least a millionth of the strongest;
            nothing is learned from the others.
        pull: the sum of all pulls.
        push: the sum of all pushes.
        findings: what looks wrong, with evidence and advice; empty if nothing does. With `group`,
            only NaN is looked for, since other processes have the other rows.
        limit: how many rows to print; `rows` has them all.
        listed: the pairs or triplets that alone count, such as "24 listed pairs"; None: all.
        n_of_all: with `group`, how many rows all processes have; None without. All but this, the
            total and the mean is of this process's rows.
    """

    loss: str
    hyperparameters: Mapping[str, Any]
    rows: tuple[Row, ...]
    n: int
    total: float
    mean: float
    active_share: float
    pull: float
    push: float
    findings: tuple[Finding, ...]
    limit: int = SHOWN
    listed: str | None = None
    n_of_all: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN, which JSON lacks, becomes None."""
        found: dict[str, Any] = plain(asdict(self))
        del found["limit"]  # concerns printing only
        return found

    def __str__(self) -> str:
        found = [f"! {finding}" for finding in self.findings]
        return "\n".join([self._title(), "", self._table().plain(), *self._more(), *found])

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        found = [Text.assemble((f"! {f.name}: ", "bold yellow"), f.text) for f in self.findings]
        more = [Text(line, "dim") for line in self._more()]
        return Group(Text(self._title(), "bold"), self._table().rich(), *more, *found)

    def _repr_html_(self) -> str:
        found = [f"<li><b>{escape(f.name)}</b>: {escape(f.text)}</li>" for f in self.findings]
        more = "".join(f"<p>{escape(line)}</p>" for line in self._more())
        advice = f"<ul>{''.join(found)}</ul>" if found else ""
        return f"<p><b>{escape(self._title())}</b></p>{self._table().html()}{more}{advice}"

    def _title(self) -> str:
        settings = ", ".join(f"{k}={_setting(v)}" for k, v in self.hyperparameters.items())
        over = f"{self.n} rows" + (f" over {self.listed}" if self.listed else "")
        mean = f"mean loss {self.mean:.4g} (sum {self.total:.4g})"
        if self.n_of_all is not None:
            over, mean = (
                f"{mean} over {self.n_of_all} rows of all processes",
                f"of this one: {over}",
            )
        return (
            f"{self.loss}({settings})\n{over}, {mean}, {self.active_share:.0%} active, "
            f"pull {self.pull:.4g}, push {self.push:.4g}"
        )

    def _table(self) -> Table:
        first = self.rows[0] if self.rows else Row(0, None, {}, 0.0, {}, "")
        labelled = () if first.label is None else ("label",)
        loss = () if first.loss is None else ("loss",)
        another = () if first.other is None else ("other",)
        header = ("row", *another, *labelled, *first.measured, *loss, "force", "reading")
        return Table(header, [_cells(row) for row in self.rows[: self.limit]])

    def _more(self) -> list[str]:
        hidden = len(self.rows) - self.limit
        return [f"... and {hidden} more rows; a larger limit shows them"] if hidden > 0 else []


def _cells(row: Row) -> tuple[str, ...]:
    label = () if row.label is None else (row.label,)
    values = tuple(number(value) for value in row.measured.values())
    pull = sum(max(force, 0.0) for force in row.forces.values())
    push = sum(max(-force, 0.0) for force in row.forces.values())
    force = ", ".join(way(f) for f in (pull, -push) if f)
    loss = () if row.loss is None else (number(row.loss),)
    other = () if row.other is None else (str(row.other),)
    return (str(row.index), *other, *label, *values, *loss, force or "none", row.reading)


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
