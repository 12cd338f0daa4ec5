"""The figures of the benchmarks have their places in the pages, and are written into them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = {
    "cpu": "a processor",
    "instructions": "AVX2",
    "cores": 2,
    "threads": 1,
    "torch": "2.13.0",
    "pytorch-metric-learning": "2.9.0",
    "sentence-transformers": None,
    "scikit-learn": "1.9.1",
    "commit": "0123456789abcdef+",
    "date": "2026-11-27",
}
TRIPLETS = {
    "function": "batch_triplet_loss",
    "select": "all",
    "n": 1024,
    "d": 128,
    "differs": "",
    "contenders": {
        "nearfar": {"median_s": 0.02, "min_s": 0.01, "extra_bytes": 15e6},
        "pytorch-metric-learning": {"median_s": 1.6, "min_s": 1.5, "extra_bytes": 1.26e9},
    },
}
RETRIEVAL = {"queries": 10, "references": 100, "d": 128, "contenders": {}}
SMALL = [
    {"case": "cosine_loss", "n": 64, "d": 128, "ratio": ratio, "ratio_of_min": 1.1}
    for ratio in (0.94, 1.46)
]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    yield tables
    for name in ("tables", "measure", "passive"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """Saved runs: of triplets, of retrieval without its peer, of small batches."""
    for name, results in (
        ("tuples", [TRIPLETS]),
        ("retrieval", [RETRIEVAL]),
        ("small_batches", SMALL),
    ):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"machine": MACHINE, "results": results}), encoding="utf-8"
        )
    return tmp_path


def test_every_table_has_its_place_and_every_place_its_table(tables):
    pages = "".join(path.read_text(encoding="utf-8") for path in tables.PAGES)
    assert set(re.findall(r"<!-- bench: (.*?) -->", pages)) == set(tables.BLOCKS)


def test_every_file_that_a_table_reads_is_written_by_make_bench(tables):
    bench = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in tables.BLOCKS.values():
        assert f"--json runs/bench/{block.file}.json" in bench


def test_a_table_is_replaced_together_with_its_machine(tables, folder):
    page = "before <!-- bench: tuples -->\nold\n<!-- end --> after"
    assert tables.page(page, folder) == (
        "before <!-- bench: tuples -->\n\n"
        "| loss | batch | times as fast | time | extra MB | extra MB of the other |\n"
        "|---|---|---|---|---|---|\n"
        "| `batch_triplet_loss`, all | 1,024 x 128 | 80 (150) | 20 ms | 15 | 1,260 |\n\n"
        "Machine: a processor, AVX2, 2 cores, 1 thread. Versions: torch 2.13.0, "
        "pytorch-metric-learning 2.9.0. Commit 0123456 with changes, 2026-11-27.\n\n"
        "<!-- end --> after"
    )
    assert tables.page(tables.page(page, folder), folder) == tables.page(page, folder)


def test_a_figure_inside_a_sentence_is_replaced(tables, folder):
    page = "takes <!-- bench: range of small batches -->?<!-- end --> times as long"
    expected = page.replace("?", "0.9 to 1.5")
    assert tables.page(page, folder) == expected


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("glyphs", "glyphs.json is missing"),
        ("retrieval", "retrieval.json was saved without sentence-transformers"),
    ],
)
def test_a_table_without_figures_stays(tables, folder, capsys, name, why):
    page = f"<!-- bench: {name} -->\nold\n<!-- end -->"
    assert tables.page(page, folder) == page
    assert f"{name}: left as it was, since {why}" in capsys.readouterr().out


def test_an_unknown_table_is_refused(tables, folder):
    with pytest.raises(SystemExit, match=r"bench: speeds: no such table\. There are: speed, "):
        tables.page("<!-- bench: speeds --><!-- end -->", folder)


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.934, "0.93"), (1.999, "2.00"), (2.04, "2.0"), (10.6, "11"), (1143.2, "1,143")],
)
def test_figures_are_rounded(tables, x, text):
    assert tables.figure(x) == text


@pytest.mark.slow
def test_losses_over_several_processes_are_compared(tables, tmp_path):
    file = tmp_path / "distributed.json"
    options = ("--quick", "--only", "clip_loss", "--processes", "2", "--repeats", "1")
    script = ROOT / "benchmarks" / "distributed.py"
    command = [sys.executable, str(script), *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, (row,) = tables.load(file)
    alone = [found[0]["alone_equal"] for found in row["gradients"].values()]
    assert alone == pytest.approx([alone[0]] * len(alone), rel=1e-9)
    lines = tables.distributed([row]).splitlines()
    assert "| `clip_loss` | nearfar | right | right | right | right |" in lines
    assert any(
        line.startswith("| `clip_loss` | textbook | right | right | right |") for line in lines
    )
    costs = tables.distributed_costs([row])
    assert "| `clip_loss` | 32 x 256 | textbook |" in costs
    assert costs.count("1.00 (1.00)") == 1


def test_wrong_gradients_are_told_by_their_multiple(tables):
    def found(world):
        said = {"text": f"x {world}", "error": world - 1}
        value = {**said, "own": True}
        equal = {"value": value, "encoder": {"text": "right", "error": 0.0}, "learned": said}
        return {"processes": world, "equal": equal, "unequal": {"failed": "raises", "why": ""}}

    row = {"case": "clip_loss", "gradients": {"other": [found(2), found(4)]}}
    line = tables.distributed([row]).splitlines()[-1]
    assert line == "| `clip_loss` | other | its own; mean x 2, x 4 | right | x 2, x 4 | raises |"
