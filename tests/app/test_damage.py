"""Hundreds of damaged and odd inputs: each read rightly, or answered by one line."""

import json
import re
from collections import Counter
from pathlib import Path

import damage_arrays
import damage_images
import damage_names
import damage_runs
import damage_tables
import numpy as np
import pytest
from damage import EITHER, LINE, SAME, Shelf

GENERATORS = (damage_images, damage_arrays, damage_tables, damage_runs, damage_names)
INPUTS = [given for generator in GENERATORS for given in generator.inputs()]
CLOSE = 1e-3  # of embeddings, which have length 1
# Besides 0: these say no in this way.
STATUS = {"verify": (0, 1), "doctor": (0, 1)}
PAGE = Path(__file__).parents[2] / "docs" / "results.md"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]  # the first input waits for two runs
lines, read = Counter(), Counter()  # by kind, of the inputs that this process has tried


@pytest.fixture(scope="session")
def shelf(folder, vectors, pairs_csv, image_run, vector_run) -> Shelf:
    return Shelf(folder, vectors, pairs_csv, image_run, vector_run)


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_damage(nearfar, shelf, tmp_path, given):
    command = given.write(tmp_path, shelf)
    before = content(tmp_path)
    done = nearfar(*command)
    after = content(tmp_path)
    assert "Traceback" not in done.out + done.err, done.err
    assert "bug in nearfar" not in done.err
    assert {path: after.get(path) for path in before} == before
    if done.status == 2:
        lines[given.kind] += 1
        assert given.answer in (LINE, EITHER), done.err
        assert done.error.startswith("nearfar: error: ")
        assert done.error.isprintable()
        assert given.culprit in done.error
        assert after == before
        return
    read[given.kind] += 1
    assert given.answer != LINE, done.out
    assert done.status in STATUS.get(command[0], (0,))
    assert not [path for path in after if re.search(r"\.unfinished|\.replaced", path.name)]
    check(nearfar, command, done, tmp_path, alike=given.answer == SAME)


def content(folder: Path) -> dict[Path, bytes | None]:
    """All that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(nearfar, command, done, folder, *, alike) -> None:
    """What was read gives finite numbers: those of a plain input where one is beside it."""
    if "--json" in command:
        found = json.loads(done.out, parse_constant=pytest.fail)
        if command[0] == "verify" and alike:
            assert found["distance"] < CLOSE
    if command[0] == "embed":
        x = embedded(command[-1])
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=CLOSE)
        if alike:
            (plain,) = folder.glob("plain.*")
            other = folder / "plain-embedded.npz"
            again = nearfar("embed", command[1], plain, "--out", other)
            assert again.status == 0, again.err
            np.testing.assert_allclose(x, embedded(other), atol=CLOSE)
    if command[0] == "train":
        out = command[command.index("--out") + 1]
        assert nearfar("doctor", out).status in (0, 1)


def embedded(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["x"]


def test_the_page_counts_them():
    """The answers to flipped bits may differ a little between versions of the libraries."""
    kinds = Counter(given.kind for given in INPUTS)
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    page = {kind: tuple(map(int, numbers)) for kind, *numbers in rows if kind in kinds}
    found = {kind: (n, lines[kind], read[kind]) for kind, n in kinds.items()}
    assert {kind: row[0] for kind, row in page.items()} == kinds
    if lines.total() + read.total() < len(INPUTS):
        pytest.skip("other processes tried some of them")
    table = "\n".join(f"| {kind} | {n} | {a} | {b} |" for kind, (n, a, b) in found.items())
    for kind, row in found.items():
        assert abs(row[1] - page[kind][1]) <= 2 + row[0] / 10, table
