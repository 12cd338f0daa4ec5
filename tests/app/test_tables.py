"""What spreadsheets do to tables: commas for points, empty columns and rows, other labels."""

import json

import numpy as np
import pytest
from conftest import write_csv

from nearfar.app import tables
from nearfar.app.errors import InputError
from nearfar.app.tables import read_table, vector

HEADER = ("a", "b", "label")
TINY = ("--steps", "2", "--identities", "4", "--items", "2", "--embedding-dim", "4", "--no-report")


def pair_cells(n_identities=20, seed=0):
    """Pairs of vectors as text with points, and true or false: enough to train on."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(n_identities, 1, 3))
    x = centre + 0.1 * random.normal(size=(n_identities, 3, 3))
    text = [[" ".join(f"{value:.3f}" for value in item) for item in items] for items in x]
    near = [(items[0], other, "true") for items in text for other in items[1:]]
    ends = random.integers(n_identities, size=(200, 2))
    return near + [(text[i][0], text[j][1], "false") for i, j in ends.tolist() if i != j]


def refusal(run, *command):
    done = run(*command)
    assert done.status == 2
    return done.error


@pytest.mark.parametrize(
    ("cell", "one", "other"),
    [
        ("0,693 -0,470 0,379", "6 numbers (0, 693, -0, 470, ...)", "3 numbers (0.693, -0.470, 0.3"),
        ("0,693, -0,470, 0,379", "6 numbers", "3 numbers"),
        ("0,693\t1\t0,379", "5 numbers", "3 numbers (0.693, 1, 0.379)"),
        ("-1,5e-3 2", "3 numbers (-1, 5e-3, 2)", "2 numbers (-1.5e-3, 2)"),
        ("5,6", "2 numbers (5, 6)", "1 number (5.6)"),
        ("1.234,5 2", "3 numbers (1.234, 5, 2)", "2 numbers (1234.5, 2)"),
        ("1,234.5 2", "3 numbers (1, 234.5, 2)", "2 numbers (1234.5, 2)"),
        ("[0,5 0,25]", "4 numbers", "2 numbers (0.5, 0.25)"),
        ("0.5 0.25; 0,5 0,25", "4 numbers", "2 numbers (0.5, 0.25)"),
    ],
)
def test_a_vector_of_two_readings_is_refused_with_both(cell, one, other):
    with pytest.raises(InputError, match="can be read in two ways") as refused:
        vector(cell, "line 2: a")
    for words in ("line 2: a", repr(cell.split("; ")[-1])[:-1], one, other, "with a point"):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("cell", "numbers"),
    [
        ("0.1,0.2,0.3", [0.1, 0.2, 0.3]),
        ("0.1, 0.2, 0.3", [0.1, 0.2, 0.3]),
        ("1, 2, 3", [1, 2, 3]),
        ("1,2,3", [1, 2, 3]),
        ("[1,2]", [1, 2]),
        ("1 2 3", [1, 2, 3]),
        ("0.5,2 3", [0.5, 2, 3]),
        ("-.5 ,1e3", [-0.5, 1000]),
    ],
)
def test_a_vector_of_one_reading_is_read(cell, numbers):
    assert vector(cell, "a").tolist() == numbers


def test_other_cells_may_settle_how_commas_are_read(nearfar, vector_run, tmp_path):
    """They can say that commas separate; they never make a comma part of a number."""
    path = write_csv(tmp_path / "t.csv", ("x",), [("5,6",), ("0.25,1",), ("1,2",)])
    assert read_table(path).vectors("x").tolist() == [[5, 6], [0.25, 1], [1, 2]]
    path = write_csv(tmp_path / "t.csv", ("x",), [("1 0 0",), ("0,5 0,5 0,5",)])
    with pytest.raises(InputError, match=r"line 3: x .* 6 numbers .* 3 numbers"):
        read_table(path).vectors("x")
    eight = "1,2 3,4 5,6 7,8"
    assert nearfar("verify", vector_run, eight, eight).status == 0  # 4 numbers would not do
    assert "two ways" in refusal(nearfar, "verify", vector_run, *2 * [f"{eight} {eight}"])


def test_decimal_commas_are_refused_wherever_a_table_is_read(nearfar, vector_run, tmp_path):
    rows = [[a.replace(".", ","), b.replace(".", ","), label] for a, b, label in pair_cells()]
    table = write_csv(tmp_path / "p.csv", HEADER, rows)
    for command in (
        ("train", table, "--out", tmp_path / "run"),
        ("explain", table, "--loss", "contrastive"),
        ("embed", vector_run, table, "--out", tmp_path / "e.npz"),
    ):
        error = refusal(nearfar, *command)
        assert "p.csv, line 2: a holds" in error
        assert "6 numbers" in error
        assert "3 numbers" in error
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("cell", "fix"),
    [
        ("0,5", "with a comma: write 0.5."),
        ("1,234", "can be read in two ways: write 1.234 or 1234."),
        ("1,234.5", "write 1234.5."),
        ("1.234,5", "write 1234.5."),
    ],
)
def test_a_number_with_a_comma_is_refused_with_what_it_may_be(nearfar, tmp_path, cell, fix):
    table = write_csv(tmp_path / "t.csv", ("distance", "label"), [("1", "true"), (cell, "false")])
    error = refusal(nearfar, "explain", table, "--loss", "contrastive")
    assert f"t.csv, line 3: distance is '{cell}'" in error
    assert fix in error


def text_of(rows, end="\r\n"):
    return "".join(",".join(row) + end for row in rows)


@pytest.mark.parametrize(
    "untidy",
    [
        lambda rows: [[*row, "", ""] for row in rows],
        lambda rows: [*rows, ["", "", ""], [" ", "", "\t"]],
        lambda rows: [*rows[:3], ["", "", ""], *rows[3:]],
        lambda rows: [["", "", ""], *rows],
        lambda rows: [rows[0], *([*row, ""] for row in rows[1:])],
        lambda rows: [[*rows[0], "", ""], *rows[1:]],
        lambda rows: [[row[0], "", *row[1:]] for row in rows],
        lambda rows: [["", *rows[0]], *([str(i), *row] for i, row in enumerate(rows[1:]))],
        lambda rows: [*rows, [""] * 16384],
    ],
    ids=[
        "empty columns",
        "empty rows at the end",
        "an empty row within",
        "an empty row first",
        "cells beyond the header",
        "a header beyond the cells",
        "an empty column within",
        "the row numbers of pandas",
        "an empty row as wide as a sheet",
    ],
)
def test_what_is_empty_in_a_spreadsheet_is_nothing(nearfar, tmp_path, untidy):
    rows = [list(HEADER), *map(list, pair_cells())]
    (tmp_path / "tidy.csv").write_text(text_of(rows))
    (tmp_path / "untidy.csv").write_text(text_of(untidy(rows)))
    tidy, found = (read_table(tmp_path / f"{name}.csv") for name in ("tidy", "untidy"))
    assert found.columns == tidy.columns
    read = [nearfar("explain", table.path, "--loss", "contrastive") for table in (tidy, found)]
    assert read[0].status == read[1].status == 0
    assert read[0].out == read[1].out


def test_empty_rows_and_columns_train(nearfar, tmp_path):
    rows = [[*HEADER, "", ""], *([*row, "", ""] for row in pair_cells()), [""] * 5]
    (tmp_path / "p.csv").write_text(text_of(rows))
    done = nearfar("train", tmp_path / "p.csv", "--out", tmp_path / "run", *TINY)
    assert done.status == 0, done.err


def test_lines_are_counted_with_the_empty_ones(tmp_path):
    (tmp_path / "t.csv").write_text("x,label\n,\n\n1 2,true\n,\n1 2,maybe\n")
    with pytest.raises(InputError, match=r"t\.csv, line 6: label is 'maybe'"):
        read_table(tmp_path / "t.csv").numbers("label")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,,b\n1,2,3\n", ["line 2: '2' is in column 2, which has no name"]),
        ("a,b,,\n1,2,,4\n", ["line 2: 4 cells under 2 headers", "in quotes"]),
        ("a,b\n1\n", ["line 2: 1 cells under 2 headers"]),
        (",,\n,,\n", ["has no rows"]),
        ("a,b,a\n1,2,3\n", ["two columns called 'a'"]),
    ],
)
def test_what_is_not_empty_is_never_dropped(tmp_path, text, named):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError) as refused:
        read_table(tmp_path / "t.csv")
    for words in named:
        assert words in str(refused.value)


@pytest.mark.parametrize("option", [(), ("--similar-label", "1"), ("--similar-label", "0")])
@pytest.mark.parametrize(("one", "minus"), [("1", "-1"), ("1.0", "-1.0")])
def test_labels_of_both_signs_are_told_what_to_write(nearfar, tmp_path, option, one, minus):
    rows = [(a, b, one if label == "true" else minus) for a, b, label in pair_cells()]
    table = write_csv(tmp_path / "p.csv", HEADER, rows)
    line = 2 + [label for *_, label in rows].index(minus)
    for command in (
        ("train", table, "--out", tmp_path / "run", *option),
        ("explain", table, "--loss", "contrastive", *option),
        ("explain", table, "--loss", "cosine", *option),
    ):
        error = refusal(nearfar, *command)
        assert f"p.csv, line {line}: label is {minus}; write 1 and 0" in error


def test_labels_of_both_signs_in_arrays_and_by_distance(nearfar, tmp_path):
    np.savez(tmp_path / "p.npz", distance=np.array([0.1, 2, 3]), y=np.array([1, 1, -1]))
    error = refusal(nearfar, "explain", tmp_path / "p.npz", "--loss", "contrastive")
    assert "p.npz, row 2: y is -1; write 1 and 0" in error
    table = write_csv(tmp_path / "p.csv", ("distance", "label"), [(1, 1), (2, 0.5), (3, -0.25)])
    explain = ("explain", table, "--loss", "contrastive", "--similar-label", 1)
    assert "line 4: label is -0.25; it must lie between 0 and 1" in refusal(nearfar, *explain)
    rows = [(1, 1), (2, 0.5), (3, 0)]
    assert nearfar(*explain[:1], write_csv(table, ("d", "y"), rows), *explain[2:]).status == 0


def test_empty_cells_of_other_columns_do_no_harm(nearfar, tmp_path):
    rows = [(*row, "") for row in pair_cells()]
    table = write_csv(tmp_path / "p.csv", (*HEADER, "remarks"), rows)
    done = nearfar("explain", table, "--loss", "contrastive", "--json")
    assert json.loads(done.out)["loss"]


def test_a_column_that_python_lacks_matters_only_where_it_is_asked_for(nearfar, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    a, b, label = zip(*pair_cells(), strict=True)
    beyond = pa.array([2**62] * len(a), pa.timestamp("us"))
    columns = {"when": beyond, "a": list(a), "b": list(b), "label": list(label)}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    done = nearfar("train", tmp_path / "p.parquet", "--out", tmp_path / "run", *TINY)
    assert done.status == 0, done.err
    pq.write_table(pa.table({**columns, "label": beyond}), tmp_path / "p.parquet")
    refused = refusal(nearfar, "train", tmp_path / "p.parquet", "--out", tmp_path / "r", *TINY)
    assert "label is a column of timestamp[us], which cannot be read here" in refused


@pytest.mark.parametrize("cell", ["1_000 2 3", "1 2 3e1_0"])
def test_an_underscore_is_no_part_of_a_number(cell):
    with pytest.raises(InputError, match="not a number"):
        vector(cell, "line 2: a")


@pytest.mark.parametrize("label", ["1" + "0" * 400, "9" * 5000, "1_0"])
def test_a_label_that_no_column_can_hold_is_named(tmp_path, label):
    path = write_csv(tmp_path / "p.csv", HEADER, [("1 2", "2 1", "1"), ("1 2", "3 1", label)])
    with pytest.raises(InputError, match="line 3: label is"):
        read_table(path).numbers("label")


def test_thousands_of_columns_are_read_at_once(tmp_path):
    """Each name is looked at once, not once for each other one."""
    seen = 0

    class Counted(str):
        def __eq__(self, other):
            nonlocal seen
            seen += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    tables._refuse_repeated(tmp_path, [Counted(f"c{i}") for i in range(2000)])
    assert seen < 20_000
