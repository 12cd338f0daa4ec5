"""Reading CSV and Parquet tables cell by cell, so that an error can name the line.

A CSV cell is text; nothing is guessed from a column as a whole before it is asked for. A vector
is text like "0.1 0.2 0.3" or "[0.1, 0.2, 0.3]", or a list in Parquet; an array of vectors is a list
of lists, or vectors separated by semicolons.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfar.errors import InputError

Floats = npt.NDArray[np.float64]
SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length.

    Attributes:
        path: the file.
        columns: name -> cells: text from CSV; bool, numbers, text or lists from Parquet.
        lines: for CSV, the line each row ends on, as an editor counts.
    """

    path: Path
    columns: dict[str, Sequence[Any]]
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """The file and the place in it, for a message."""
        return f"{self.path}, " + (f"line {self.lines[row]}" if self.lines else f"row {row}")

    def column(self, *names: str) -> Sequence[Any]:
        """The first of these columns that is there.

        Raises:
            InputError: none is; the message lists those that are.
        """
        for name in names:
            if name in self.columns:
                return self.columns[name]
        there = ", ".join(self.columns) or "none"
        raise InputError(
            f"{self.path} has no column {names[0]!r}; its columns are: {there}. "
            f"Rename one to {names[0]!r}."
        )

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column as (n,) bool, int64 or float64, whichever holds every cell."""
        cells = self.columns[name]
        values = [_number(cell) for cell in cells]
        for row, value in enumerate(values):
            if value is None:
                raise InputError(
                    f"{self.where(row)}: {name} is {_shown(cells[row])}, "
                    "which is neither a number nor true or false: write one of these."
                )
        kinds = {type(value) for value in values}
        if bool in kinds and len(kinds) > 1:
            row = next(row for row, value in enumerate(values) if type(value) is not bool)
            raise InputError(
                f"{self.where(row)}: {name} is {_shown(cells[row])}, but other rows say true or "
                "false. Use one kind throughout."
            )
        return np.array(values, dtype=bool if kinds <= {bool} else None)

    def vectors(self, name: str) -> Floats:
        """A column of vectors as (n, d), or of arrays of m vectors as (n, m, d)."""
        cells = self.columns[name]
        arrays = [vector(cell, f"{self.where(row)}: {name}") for row, cell in enumerate(cells)]
        for row, array in enumerate(arrays):
            if array.shape != arrays[0].shape:
                raise InputError(
                    f"{self.where(row)}: {name} holds {_size(array)} and the first row "
                    f"{_size(arrays[0])}; every row must hold as many."
                )
        return np.stack(arrays) if arrays else np.zeros((0, 0))


def read_table(path: Path) -> Table:
    """A .csv or .parquet file.

    Raises:
        InputError: no such file, not such a file, no rows, a row with too few or too many cells.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if not len(table):
        raise InputError(f"{path} has no rows. Give it a header line and at least one row.")
    return table


def vector(cell: Any, what: str) -> Floats:
    """A cell as (d,) or (m, d) numbers.

    Raises:
        InputError: `what` names the cell in the message.

    >>> vector("[0.1, 2]", "x")
    array([0.1, 2. ])
    >>> vector("1 2; 3 4", "x").shape
    (2, 2)
    """
    if isinstance(cell, str):
        rows = [_floats(text, what) for text in cell.split(";")]
        cell = rows if len(rows) > 1 else rows[0]
    try:
        array = np.asarray(cell, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {_shown(cell)}, which is not a vector.") from None
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"{what} is {_shown(cell)}, which is not a vector.")
    if not np.isfinite(array).all():
        raise InputError(f"{what} holds {array[~np.isfinite(array)][0]}. Remove or repair it.")
    return array


def refuse_ambiguous_labels(
    path: Path, labels: npt.NDArray[Any], similar_label: int | None
) -> None:
    """Numbers that nothing says how to read."""
    if labels.dtype != bool and similar_label is None:
        raise InputError(
            f"{path}: the labels are numbers, and nothing says which means similar. Add "
            "--similar-label 1 if 1 marks similar pairs, --similar-label 0 if 0 does."
        )


def looks_like_vector(cell: Any) -> bool:
    """Whether a cell begins like a vector, so that what follows is an error if it is not one."""
    if not isinstance(cell, str):
        return cell is not None
    first = cell.replace("[", " ").replace(",", " ").replace(";", " ").split()[:1]
    return bool(first) and _is_float(first[0])


def _floats(text: str, what: str) -> list[float]:
    tokens = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for token in tokens:
        if not _is_float(token):
            raise InputError(f"{what} holds {token!r}, which is not a number.")
    return [float(token) for token in tokens]


def _is_float(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _number(cell: Any) -> bool | int | float | None:
    if isinstance(cell, str):
        text = cell.strip().lower()
        if text in ("true", "false"):
            return text == "true"
        try:
            return int(text)
        except ValueError:
            cell = float(text) if _is_float(text) else None
    return cell if isinstance(cell, bool | int | float) and np.isfinite(cell) else None


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a long vector
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if len(header) == 1 and (mark := next((m for m in ";\t" if m in header[0]), "")):
                raise InputError(f"{path} has {mark!r} between cells. Save it with commas.")
            rows, lines = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(row)} cells under "
                        f"{len(header)} headers. Put a vector with commas in quotes."
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}. Save it as UTF-8.") from None
    _refuse_repeated(path, header)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return Table(path, dict(columns), lines)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from None
    _refuse_repeated(path, table.column_names)
    return Table(path, {name: table.column(name).to_pylist() for name in table.column_names})


def _refuse_repeated(path: Path, header: Sequence[str]) -> None:
    repeated = [name for name in header if list(header).count(name) > 1]
    if repeated:
        raise InputError(f"{path} has two columns called {repeated[0]!r}. Rename one.")


def _shown(cell: Any) -> str:
    return "empty" if cell in (None, "") else f"{cell!r:.60}"


def _size(array: Floats) -> str:
    return " x ".join(map(str, array.shape)) + " numbers"
