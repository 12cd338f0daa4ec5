"""Read CSV and Parquet tables cell by cell, so that an error can name the line.

CSV cells are text and are parsed only when a column is used. A vector is text such as
"0.1 0.2 0.3" or "[0.1, 0.2, 0.3]", or a list in Parquet; an array of vectors is a list of lists, or
vectors separated by semicolons. A comma may also be part of a number, as in "0,5": a cell that can
be read in two ways is refused.
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfar.app.errors import InputError

Floats = npt.NDArray[np.float64]
SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True, eq=False)
class TableFile:
    """Columns of equal length.

    Attributes:
        path: the file.
        columns: the cells of each column by name: text from CSV; bool, numbers, text or lists from
            Parquet.
        n: the number of rows.
        lines: for CSV, the line on which each row ends, counted from 1 as in an editor.
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    n: int
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.n

    def where(self, row: int) -> str:
        """The file and the line or row in it, for error messages."""
        return f"{self.path}, " + (f"line {self.lines[row]}" if self.lines else f"row {row}")

    def column(self, *names: str) -> Sequence[Any]:
        """The first of these columns that exists.

        Raises:
            InputError: none exists; the message lists the columns there are.
        """
        for name in names:
            if name in self.columns:
                return self.columns[name]
        existing = ", ".join(self.columns) or "none"
        raise InputError(
            f"{self.path} has no column {names[0]!r}; its columns are: {existing}. "
            f"Rename one to {names[0]!r}."
        )

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column as (n,) bool, int64 or float64, whichever holds every cell."""
        cells = self.columns[name]
        values = [_number(cell) for cell in cells]
        for row, value in enumerate(values):
            if value is None:
                raise InputError(
                    f"{self.where(row)}: {name} is {_shown(cells[row])}{_not_a_number(cells[row])}"
                )
        kinds = {type(value) for value in values}
        if bool in kinds and len(kinds) > 1:
            row = next(row for row, value in enumerate(values) if type(value) is not bool)
            raise InputError(
                f"{self.where(row)}: {name} is {_shown(cells[row])}, but other rows are true or "
                "false. Use one kind throughout."
            )
        return np.array(values, dtype=bool if kinds <= {bool} else None)

    def vectors(self, name: str) -> Floats:
        """A column of vectors as (n, d), or of arrays of m vectors as (n, m, d)."""
        cells = self.columns[name]
        n = known_length(cells)
        arrays = [vector(cell, f"{self.where(row)}: {name}", n) for row, cell in enumerate(cells)]
        for row, array in enumerate(arrays):
            if array.shape != arrays[0].shape:
                raise InputError(
                    f"{self.where(row)}: {name} holds {_size(array)}, but the first row holds "
                    f"{_size(arrays[0])}; every row must hold the same number."
                )
        return np.stack(arrays) if arrays else np.zeros((0, 0))


def read_table(path: Path, *, may_be_empty: bool = False) -> TableFile:
    """Read a .csv or .parquet file.

    Args:
        path: the file.
        may_be_empty: whether a table without rows is one too.

    Raises:
        InputError: the file is missing, cannot be parsed, has no rows, or has a row with too few or
            too many cells.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if not len(table) and not may_be_empty:
        raise InputError(f"{path} has no rows. Give it a header line and at least one row.")
    return table


def columns_of(path: Path) -> Sequence[str]:
    """The columns of a table; none if it cannot be read, of which `read_table` says why."""
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        with path.open(newline="", encoding="utf-8-sig") as file:
            _, first = next(_non_empty_rows(file), (0, []))
            return [name.strip() for name in first]
    except (OSError, ValueError, csv.Error):  # pyarrow's errors are among these
        return []


def vector(cell: Any, what: str, n: int | None = None) -> Floats:
    """Parse a cell as a vector, (d,), or as an array of vectors, (m, d).

    Args:
        cell: text or a list.
        what: names the cell in error messages.
        n: the length of a vector, if known. It decides whether a comma separates two numbers or is
            part of one, where only one of the two gives n numbers.

    Raises:
        InputError: the cell is not a vector, or can be read in two ways.

    >>> vector("[0.1, 2]", "x")
    array([0.1, 2. ])
    >>> vector("1 2; 3 4", "x").shape
    (2, 2)
    """
    if isinstance(cell, str):
        rows = [_floats(text, what, n) for text in cell.split(";")]
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


def known_length(cells: Iterable[Any]) -> int | None:
    """The length of the vector in the first cell that can be read in one way only, or None."""
    for cell in cells:
        text = cell.split(";")[0] if isinstance(cell, str) else ""
        if not (is_blank(text) or _with_commas_inside(text)):
            return len(_tokens(text))
    return None


def refuse_bad_labels(
    labels: npt.NDArray[Any],
    name: str,
    where: Callable[[int], str],
    path: Path,
    similar_label: int | None,
) -> None:
    """Refuse pair labels that are out of range, or numbers that could mean similar or dissimilar.

    Args:
        labels: (n,) bool or numbers.
        name: the column.
        where: gives the position of a row, for error messages.
        path: the file of the labels.
        similar_label: which of 0 and 1 means similar; None if not given.
    """
    if labels.dtype == bool:
        return
    outside = ~((labels >= 0) & (labels <= 1))
    if outside.any():
        row = int(outside.argmax())
        signs = bool(np.isin(labels, (-1, 1)).all())
        fix = (
            "write 1 and 0, or true and false, in place of 1 and -1"
            if signs
            else "it must lie between 0 and 1"
        )
        raise InputError(f"{where(row)}: {name} is {labels[row]}; {fix}.")
    if similar_label is None:
        raise InputError(
            f"{path}: the labels are numbers, and it is unknown which one means similar. Add "
            "--similar-label 1 if 1 marks similar pairs, --similar-label 0 if 0 does."
        )


def is_blank(cell: Any) -> bool:
    """Whether a cell is empty: None, blank text, or the NaN that marks a missing value."""
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def looks_like_vector(cell: Any) -> bool:
    """Whether a cell starts with a number, so that anything else in it is an error."""
    if not isinstance(cell, str):
        return cell is not None
    first = cell.replace("[", " ").replace(",", " ").replace(";", " ").split()[:1]
    return bool(first) and _is_float(first[0])


def _tokens(text: str) -> list[str]:
    """The parts separated by commas and spaces."""
    return text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()


def _floats(text: str, what: str, n: int | None) -> list[float]:
    tokens = _tokens(text)
    for token in tokens:
        if not _is_float(token):
            raise InputError(f"{what} holds {token!r}, which is not a number.")
    other = _with_commas_inside(text)
    if other and not (len(tokens) == n != len(other)):
        raise InputError(
            f"{what} holds {_shown(text.strip())}, which can be read in two ways: "
            f"{_listed(tokens)}, or {_listed(other)}. Write decimals with a point, and only spaces "
            "between numbers."
        )
    return [float(token) for token in tokens]


# 0,5 has a decimal comma; 1.234,5 has one too; 1,234 and 1,234.5 have commas between thousands.
_DECIMAL = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")


def _readings(number: str) -> list[str]:
    """The ways to read a number that contains commas, in Python's notation."""
    found = []
    if _DECIMAL.fullmatch(number):
        found.append(number.replace(".", "").replace(",", "."))
    if _THOUSANDS.fullmatch(number):
        found.append(number.replace(",", ""))
    return found


def _with_commas_inside(text: str) -> list[str]:
    """The numbers of a cell if its commas are part of them; empty if that is impossible.

    >>> _with_commas_inside("0,693 -0,470 1")
    ['0.693', '-0.470', '1']
    >>> _with_commas_inside("0.1,0.2 0.3"), _with_commas_inside("1, 2, 3")
    ([], [])
    """
    if "," not in text:
        return []
    inner = text.strip().removeprefix("[").removesuffix("]")
    chunks = [chunk for word in inner.split() if (chunk := word.strip(","))]
    if inner != text.strip() and len(chunks) == 1:  # [1,2] is a list written by a program
        return []
    found = [[chunk] if _is_float(chunk) else _readings(chunk) for chunk in chunks]
    if not all(found) or not any("," in chunk for chunk in chunks):
        return []
    return [readings[0] for readings in found]


def _listed(numbers: Sequence[str]) -> str:
    first = ", ".join(numbers[:4]) + ", ..." * (len(numbers) > 4)
    return f"{len(numbers)} number{'s' * (len(numbers) > 1)} ({first})"


def _not_a_number(cell: Any) -> str:
    """Why a cell is not a number, and what to write instead."""
    readings = _readings(cell.strip()) if isinstance(cell, str) else []
    if len(readings) > 1:
        return f", which can be read in two ways: write {' or '.join(readings)}."
    if readings:
        return f", with a comma: write {readings[0]}."
    return ", which is neither a number nor true or false: write one of these."


def _is_float(token: str) -> bool:
    """Whether it is a number in any notation but Python's, which also reads 1_000 as 1000."""
    try:
        float(token)
    except ValueError:
        return False
    return "_" not in token


def _number(cell: Any) -> bool | int | float | None:
    if isinstance(cell, str):
        text = cell.strip().lower()
        if text in ("true", "false"):
            return text == "true"
        if not _is_float(text):
            return None
        try:
            cell = int(text)
        except ValueError:  # a fraction, or thousands of digits
            cell = float(text)
    if isinstance(cell, float):
        return cell if isfinite(cell) else None
    return cell if isinstance(cell, int) and abs(cell) < 2**63 else None


def _read_csv(path: Path) -> TableFile:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a long vector
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            non_empty = _non_empty_rows(file)
            _, first = next(non_empty, (0, []))
            header = _without_trailing_blanks([name.strip() for name in first])
            if len(header) == 1 and (mark := next((m for m in ";\t" if m in header[0]), "")):
                raise InputError(f"{path} has {mark!r} between cells. Save it with commas.")
            lines, rows = [], []
            for line, row in non_empty:
                rows.append(_cells(row, header, f"{path}, line {line}"))
                lines.append(line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}. Save it as UTF-8.") from None
    _refuse_repeated(path, [name for name in header if name])
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header) if name}
    return TableFile(path, columns, len(rows), lines)


def _non_empty_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the line on which it ends.

    Spreadsheets write empty rows, ",,", for every row that was ever formatted.
    """
    reader = csv.reader(file)
    for row in reader:
        if not all(map(is_blank, row)):
            yield reader.line_num, row


def _cells(row: Sequence[str], header: Sequence[str], where: str) -> list[str]:
    """The cells of a row, one for each header; further cells must be empty.

    The first column may have no name, like the index that pandas writes; any other column without
    a name must be empty.
    """
    cells = [*row[: len(header)], *_without_trailing_blanks(row[len(header) :])]
    if len(cells) != len(header):
        raise InputError(
            f"{where}: {len(cells)} cells under {len(header)} headers. "
            "Put a vector with commas in quotes."
        )
    for i, (name, cell) in enumerate(zip(header, cells, strict=True)):
        if i and not name and not is_blank(cell):
            raise InputError(
                f"{where}: {_shown(cell)} is in column {i + 1}, which has no name. Name the "
                "column, or empty it."
            )
    return cells


def _without_trailing_blanks(cells: Sequence[str]) -> list[str]:
    n = max((i for i, cell in enumerate(cells, 1) if not is_blank(cell)), default=0)
    return list(cells[:n])


def _read_parquet(path: Path) -> TableFile:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from None
    _refuse_repeated(path, table.column_names)
    return TableFile(path, _Columns(path, table), table.num_rows)


class _Columns(Mapping[str, Sequence[Any]]):
    """Arrow columns, each converted to Python values when it is used.

    Columns that are never used may be of any type, even one that Python cannot represent.
    """

    def __init__(self, path: Path, table: Any) -> None:
        self._path, self._table = path, table
        self._read: dict[str, Sequence[Any]] = {}

    def __getitem__(self, name: str) -> Sequence[Any]:
        if name not in self._table.column_names:
            raise KeyError(name)
        if name not in self._read:
            column = self._table.column(name)
            try:
                self._read[name] = column.to_pylist()
            except Exception as error:  # pyarrow raises almost any kind
                raise InputError(
                    f"{self._path}: {name} is a column of {column.type}, which cannot be read "
                    f"here: {error}"
                ) from None
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table.column_names)


def _refuse_repeated(path: Path, header: Sequence[str]) -> None:
    repeated = next((name for name, n in Counter(header).items() if n > 1), None)
    if repeated is not None:
        raise InputError(f"{path} has two columns called {repeated!r}. Rename one.")


def _shown(cell: Any) -> str:
    return "empty" if cell in (None, "") else f"{cell!r:.60}"


def _size(array: Floats) -> str:
    return " x ".join(map(str, array.shape)) + " numbers"
