"""Tables, .csv and .parquet: damaged ones, and sound ones that are written oddly."""

import io
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import make_vectors, pair_rows
from damage import EITHER, LINE, READ, SAME, Arguments, Input, Shelf, damages, using

TAKERS = ("embed", "evaluate", "train", "evaluate")
EXPLAINED = ("explain", "--loss", "contrastive", "--json")


def inputs() -> Iterator[Input]:
    for ending, whole, flips in (("csv", csv(), 15), ("parquet", parquet(), 40)):
        cut = LINE if ending == "parquet" else EITHER
        for i, damage in enumerate(damages(f"pairs.{ending}", flips, cut=cut)):

            def write(
                folder: Path, shelf: Shelf, i=i, damage=damage, whole=whole, ending=ending
            ) -> Arguments:
                path = folder / f"pairs.{ending}"
                path.write_bytes(damage.done(whole))
                if i % 5 == 4:
                    return *EXPLAINED[:1], path, *EXPLAINED[1:]
                return using(i, shelf, path, TAKERS)

            answer = damage.answer
            yield Input(
                f"{ending}, damaged",
                damage.name,
                write,
                answer,
                f"pairs.{ending}" if answer == LINE else "",
            )
    for name, (command, content, answer) in CSV.items():

        def write_csv(
            folder: Path, shelf: Shelf, command=command, content=content, answer=answer
        ) -> Arguments:
            (folder / "odd.csv").write_bytes(content())
            if answer == SAME:
                (folder / "plain.csv").write_bytes(csv())
            if command == "explain":
                return *EXPLAINED[:1], folder / "odd.csv", *EXPLAINED[1:]
            return using(0, shelf, folder / "odd.csv", (command,))

        yield Input(
            "csv, odd", f"{name}, to {command}", write_csv, answer, CULPRITS.get(name, "odd.csv")
        )
    for name, (command, columns, answer) in PARQUET.items():

        def write_parquet(
            folder: Path, shelf: Shelf, command=command, columns=columns, answer=answer
        ) -> Arguments:
            (folder / "odd.parquet").write_bytes(parquet(**columns()))
            if answer == SAME:
                (folder / "plain.parquet").write_bytes(parquet())
            if command == "explain":
                return *EXPLAINED[:1], folder / "odd.parquet", *EXPLAINED[1:]
            return using(0, shelf, folder / "odd.parquet", (command,))

        yield Input(
            "parquet, odd",
            f"{name}, to {command}",
            write_parquet,
            answer,
            "odd.parquet" if answer == LINE else "",
        )


def rows() -> list[tuple[list[float], list[float], bool]]:
    x, y = make_vectors(16, 4)
    x = np.round(x.astype(np.float64), 3).tolist()
    return [(x[a], x[b], same) for a, b, same in pair_rows(y, 60)]


def cell(numbers: list[float]) -> str:
    return " ".join(map(str, numbers))


def lines() -> list[str]:
    written = [f"{cell(a)},{cell(b)},{str(same).lower()}" for a, b, same in rows()]
    return ["a,b,label", *written]


def csv() -> bytes:
    return "\n".join(lines()).encode() + b"\n"


def text(
    change: Callable[[list[str]], list[str]], encoding: str = "utf-8", end: str = "\n"
) -> bytes:
    return (end.join(change(lines())) + end).encode(encoding)


def edited(row: int, change: Callable[[str], str]) -> Callable[[], bytes]:
    """One line changed, as an editor counts from 1."""

    def edit(all_lines: list[str]) -> list[str]:
        return [change(line) if i == row else line for i, line in enumerate(all_lines, 1)]

    return lambda: text(edit)


def with_cell(column: int, new: str) -> Callable[[], bytes]:
    def put(line: str) -> str:
        cells = line.split(",")
        cells[column] = new
        return ",".join(cells)

    return edited(4, put)


def first_number(new: str) -> Callable[[], bytes]:
    return edited(4, lambda line: f"{new} {line.partition(' ')[2]}")


def every(change: Callable[[str], str], **how: Any) -> Callable[[], bytes]:
    return lambda: text(lambda all_lines: [change(line) for line in all_lines], **how)


def quoted(line: str) -> str:
    return ",".join(f'"{cell}"' for cell in line.split(","))


def wide_characters(line: str) -> str:
    """Digits of Arabic."""
    return line.translate({ord("0") + i: 0x660 + i for i in range(10)})


SAME_CSV: dict[str, Callable[[], bytes]] = {
    "every cell in quotes": every(quoted),
    "spaces around cells": every(lambda line: "  " + line.replace(",", "  ,  ") + "  "),
    "tabs between numbers": every(lambda line: line.replace(" ", "\t")),
    "no-break spaces between numbers": every(lambda line: line.replace(" ", "\u00a0")),
    "a byte order mark": lambda: b"\xef\xbb\xbf" + csv(),
    "CR LF": every(str, end="\r\n"),
    "CR alone": every(str, end="\r"),
    "no end of the last line": lambda: csv().rstrip(b"\n"),
    "empty lines": every(lambda line: line + "\n\n"),
    "empty columns at the end": every(lambda line: line + ",,,"),
    "lines of commas at the end": lambda: csv() + b",,\n" * 500,
    "TRUE and FALSE": every(lambda line: line.replace("true", "TRUE").replace("false", "False")),
    "lists in brackets": every(lambda line: line if line.startswith("a") else bracketed(line)),
    "exponents": first_number(f"{rows()[2][0][0] * 10:.6f}e-1"),
    "another column with anything": every(lambda line: line + ',"<b>\u202e, 1"'),
    "a cell in quotes with line ends": every(lambda line: line + ',"one\ntwo\r\nthree"'),
    "columns in another order": lambda: text(
        lambda all_lines: [",".join(reversed(line.split(","))) for line in all_lines]
    ),
    "header in quotes": edited(1, quoted),
    "numbers by rows of pandas": lambda: text(
        lambda all_lines: [
            "," + all_lines[0],
            *(f"{i},{line}" for i, line in enumerate(all_lines[1:])),
        ]
    ),
    "a cell of a million characters": every(lambda line: line + "," + "x" * 20_000),
}


def bracketed(line: str) -> str:
    a, b, label = line.split(",")
    return f'"[{a.replace(" ", ", ")}]","[{b.replace(" ", ", ")}]",{label}'


REFUSED_CSV: dict[str, Callable[[], bytes]] = {
    "UTF-16": every(str, encoding="utf-16"),
    "UTF-16 without a mark": every(str, encoding="utf-16-le"),
    "UTF-32": every(str, encoding="utf-32"),
    "Latin-1 with an accent": every(lambda line: line + ",é", encoding="latin-1"),
    "a NUL byte": edited(5, lambda line: line.replace("e", "\0")),
    "a NUL in the header": edited(1, lambda line: line + "\0"),
    "NUL bytes at the end": lambda: csv() + bytes(4096),
    "semicolons": every(lambda line: line.replace(",", ";")),
    "tabs between cells": every(lambda line: line.replace(",", "\t")),
    "a quote that is not closed": edited(3, lambda line: '"' + line),
    "a line too short": edited(6, lambda line: line.partition(",")[0]),
    "a line too long": edited(6, lambda line: line + ",1"),
    "the header twice": edited(9, lambda line: "a,b,label\n" + line),
    "a column twice": every(lambda line: line + "," + line.partition(",")[0]),
    "no header": edited(1, lambda line: lines()[1]),
    "a header of other case": edited(1, str.upper),
    "only a header": lambda: b"a,b,label\n",
    "only line ends": lambda: b"\n" * 100,
    "only commas": lambda: b",,\n" * 100,
    "one quote": lambda: b'"',
    "1e400": first_number("1e400"),
    "nan": first_number("nan"),
    "-inf": first_number("-Infinity"),
    "hexadecimal": first_number("0x1A"),
    "a minus sign of typography": first_number("\u22121.5"),
    "a Roman numeral": first_number("\u2163"),
    "a superscript": first_number("2\u00b2"),
    "a fraction": first_number("1/2"),
    "a percentage": first_number("12%"),
    "a currency": first_number("$3"),
    "a time": first_number("12:30"),
    "a formula": first_number("=A1"),
    "an underscore": first_number("1_000"),
    "decimal commas": every(lambda line: quoted(line).replace(".", ",")),
    "an empty cell": with_cell(1, ""),
    "a cell of spaces": with_cell(1, "   "),
    "a vector of other length": with_cell(1, "1 2 3"),
    "a list in a list": with_cell(1, "[[1 2 3 4 5 6 7 8]]"),
    "two vectors": with_cell(1, "1 2 3 4; 5 6 7 8"),
    "an image that is not there": with_cell(1, "no.png"),
    "an image with NUL in its name": with_cell(1, '"a\0b.png"'),
    "an image with a name too long": with_cell(1, "n" * 5000 + ".png"),
    "an image that is a folder": with_cell(1, "..png"),
    "a label of 2": with_cell(2, "2"),
    "a label of 10^400": with_cell(2, "1" + "0" * 400),
    "a label of 5,000 digits": with_cell(2, "9" * 5000),
    "a label of -1": with_cell(2, "-1"),
    "a label of yes": with_cell(2, "yes"),
    "a label of nan": with_cell(2, "nan"),
    "a label that is empty": with_cell(2, ""),
    "a label with a comma": with_cell(2, '"0,5"'),
    "every label 1": every(lambda line: line.replace("true", "1").replace("false", "1")),
    "labels of 0 and 1, unexplained": every(
        lambda line: line.replace("true", "1").replace("false", "0")
    ),
}

# What the line names, where it is not the file.
CULPRITS = {
    "every label true": "every pair is labelled similar",
    "every label false": "every pair is labelled dissimilar",
}

Odd = tuple[str, Callable[[], Any], str]
CSV: dict[str, Odd] = {
    **{name: ("embed", content, SAME) for name, content in SAME_CSV.items()},
    **{
        name: (("train", "evaluate", "explain")[i % 3], content, LINE)
        for i, (name, content) in enumerate(REFUSED_CSV.items())
    },
    "digits of Arabic": ("evaluate", every(wide_characters), READ),
    "a table of 20,000 columns": (
        "evaluate",
        lambda: text(
            lambda all_lines: [
                all_lines[0] + "".join(f",c{i}" for i in range(20_000)),
                *(line + "," * 20_000 for line in all_lines[1:20]),
            ]
        ),
        EITHER,
    ),
    "a label of a billion digits of zero": (
        "explain",
        with_cell(2, "0." + "0" * 5000 + "1"),
        EITHER,
    ),
    "every label true": ("train", every(lambda line: line.replace("false", "true")), LINE),
    "every label false": ("train", every(lambda line: line.replace("true", "false")), LINE),
    "1e39, beyond float32": ("train", first_number("1e39"), LINE),
    "one pair": ("evaluate", lambda: text(lambda all_lines: all_lines[:2]), LINE),
    "every line twice": ("evaluate", lambda: text(lambda a: [a[0], *a[1:], *a[1:]]), READ),
}


def parquet(**changed: Any) -> bytes:
    a, b, label = zip(*rows(), strict=True)
    columns = {"a": list(a), "b": list(b), "label": list(label), **changed}
    made = {name: column for name, column in columns.items() if column is not None}
    held = io.BytesIO()
    pq.write_table(pa.table(made), held)
    return held.getvalue()


def changed(**new: Callable[[list[Any]], Any]) -> Callable[[], dict[str, Any]]:
    """Columns made from those of a plain table."""

    def make() -> dict[str, Any]:
        plain = dict(zip(("a", "b", "label"), map(list, zip(*rows(), strict=True)), strict=True))
        return {name: change(plain.get(name, plain["a"])) for name, change in new.items()}

    return make


def typed(kind: Any) -> Callable[[list[Any]], Any]:
    return lambda column: pa.array(column, kind)


def put(value: Any) -> Callable[[list[Any]], Any]:
    """Another value in the third row."""
    return lambda column: [*column[:2], value, *column[3:]]


def in_place_3(value: Any) -> Callable[[list[Any]], Any]:
    return lambda column: put([value, *column[2][1:]])(column)


PARQUET: dict[str, Odd] = {
    "float32": (
        "embed",
        changed(a=typed(pa.list_(pa.float32())), b=typed(pa.list_(pa.float32()))),
        SAME,
    ),
    "lists of fixed length": ("embed", changed(a=typed(pa.list_(pa.float64(), 8))), SAME),
    "large lists": ("embed", changed(a=typed(pa.large_list(pa.float64()))), SAME),
    "vectors as text": (
        "embed",
        changed(a=lambda c: list(map(cell, c)), b=lambda c: list(map(cell, c))),
        SAME,
    ),
    "vectors as text in a dictionary": (
        "embed",
        changed(
            a=lambda c: pa.array(list(map(cell, c))).dictionary_encode(),
            b=lambda c: list(map(cell, c)),
        ),
        SAME,
    ),
    "vectors as JSON": (
        "embed",
        changed(a=lambda c: list(map(json.dumps, c)), b=lambda c: list(map(json.dumps, c))),
        SAME,
    ),
    "other columns of odd types": (
        "embed",
        changed(
            c=lambda c: [{"x": 1, "y": [None]}] * len(c),
            d=lambda c: [datetime(9999, 12, 31)] * len(c),
            e=lambda c: [Decimal("1.5")] * len(c),
            f=lambda c: [b"\xff"] * len(c),
            g=lambda c: [None] * len(c),
        ),
        SAME,
    ),
    "decimals": (
        "evaluate",
        changed(
            a=lambda c: pa.array(
                [[Decimal(str(v)) for v in r] for r in c], pa.list_(pa.decimal128(9, 3))
            )
        ),
        READ,
    ),
    "labels of 8-bit integers": (
        "evaluate",
        changed(label=lambda c: pa.array(map(int, c), pa.int8())),
        LINE,
    ),
    "labels as text": ("evaluate", changed(label=lambda c: [str(v).upper() for v in c]), READ),
    "labels of decimals": ("evaluate", changed(label=lambda c: [Decimal(int(v)) for v in c]), LINE),
    "labels of bytes": ("evaluate", changed(label=lambda c: [b"true"] * len(c)), LINE),
    "labels of times": ("evaluate", changed(label=lambda c: [datetime(2020, 1, 1)] * len(c)), LINE),
    "labels of lists": ("explain", changed(label=lambda c: [[1]] * len(c)), LINE),
    "labels of structures": ("explain", changed(label=lambda c: [{"x": 1}] * len(c)), LINE),
    "a label that is null": ("train", changed(label=put(None)), LINE),
    "labels all null": ("train", changed(label=lambda c: [None] * len(c)), LINE),
    "a vector that is null": ("train", changed(a=put(None)), LINE),
    "a number that is null": ("evaluate", changed(a=in_place_3(None)), LINE),
    "a number that is NaN": ("explain", changed(a=in_place_3(float("nan"))), LINE),
    "a number that is infinite": ("train", changed(b=in_place_3(float("inf"))), LINE),
    "a number beyond float32": ("embed", changed(b=in_place_3(1e300)), LINE),
    "an empty vector": ("evaluate", changed(a=put([])), LINE),
    "a vector too long": ("explain", changed(a=put([1.0] * 9)), LINE),
    "columns of numbers": (
        "evaluate",
        changed(a=lambda c: [r[0] for r in c], b=lambda c: [r[0] for r in c]),
        LINE,
    ),
    "columns of bools": ("train", changed(a=lambda c: [True] * len(c)), LINE),
    "vectors of bools": ("train", changed(a=lambda c: [[True] * 8] * len(c)), EITHER),
    "vectors of times": (
        "evaluate",
        changed(a=lambda c: [[datetime(2020, 1, 1)] * 8] * len(c)),
        LINE,
    ),
    "vectors of text": ("evaluate", changed(a=lambda c: [list(map(str, r)) for r in c]), EITHER),
    "vectors of words": ("explain", changed(a=lambda c: [["one"] * 8] * len(c)), LINE),
    "vectors of bytes": ("train", changed(a=lambda c: [bytes(8)] * len(c)), LINE),
    "vectors of structures": ("embed", changed(a=lambda c: [{"x": 1.0}] * len(c)), LINE),
    "vectors of maps": (
        "embed",
        changed(a=lambda c: pa.array([[("k", 1.0)]] * len(c), pa.map_(pa.string(), pa.float64()))),
        LINE,
    ),
    "lists of lists of lists": ("train", changed(a=lambda c: [[[[1.0]]]] * len(c)), LINE),
    "times beyond the calendar": (
        "embed",
        changed(c=lambda c: pa.array([2**62] * len(c), pa.timestamp("us"))),
        SAME,
    ),
    "durations beyond reason": (
        "embed",
        changed(c=lambda c: pa.array([2**62] * len(c), pa.duration("s"))),
        EITHER,
    ),
    "nanoseconds": (
        "embed",
        changed(c=lambda c: pa.array([1] * len(c), pa.timestamp("ns"))),
        EITHER,
    ),
    "a time zone that nobody knows": (
        "embed",
        changed(c=lambda c: pa.array([1] * len(c), pa.timestamp("us", "Mars/Base"))),
        EITHER,
    ),
    "no label": ("train", changed(label=lambda c: None), LINE),
    "no columns": ("train", lambda: {"a": None, "b": None, "label": None}, LINE),
    "no rows": (
        "train",
        changed(
            a=lambda c: pa.array([], pa.list_(pa.float64())),
            b=lambda c: pa.array([], pa.list_(pa.float64())),
            label=lambda c: pa.array([], pa.bool_()),
        ),
        LINE,
    ),
    "groups of structures": (
        "evaluate",
        changed(groups=lambda c: [{"x": i} for i in range(len(c))]),
        EITHER,
    ),
    "groups of bytes": (
        "evaluate",
        changed(groups=lambda c: [b"\xff%d" % i for i in range(len(c))]),
        EITHER,
    ),
}
