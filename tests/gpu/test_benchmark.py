"""benchmarks/gpu.py, tiny and on a CPU: it measures, judges and tunes, and tables are written."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from waits import accelerator

pytest.importorskip("triton", reason="the kernels need Triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, imported without the modules of the tests that have the same names."""
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    yield gpu
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, options)])
    gpu.main()


def test_all_of_it_runs_on_a_cpu(gpu, monkeypatch, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    run(gpu, monkeypatch, "--smoke", "--only", "batch_cosine", "--json", file)
    large, small, bits = json.loads(file.read_text())["results"]
    assert large["left_out"] == {}
    item = next(item for item in gpu.ITEMS if item.case.name == "batch_cosine_loss")
    assert set(large["contenders"]) == set(item.names) >= {"compiled", "sup_con_loss"}
    exact = {name: took["loss"] for name, took in large["contenders"].items() if "float32" in name}
    assert len(exact) == 4
    assert list(exact.values()) == pytest.approx([exact["formula float32"]] * 4, rel=1e-5)
    assert [answer["reached"] for answer in large["answers"]] == [None, None]  # not at this size
    assert small["left_out"] == {"captured": "a CPU has no graphs"}
    assert bits["answers"][0]["found"] == "2 of 2"
    assert "1 of 4 reached" in capsys.readouterr().out


def test_formulas_stay_on_the_device_of_the_rows(gpu):
    # A mask as an index is read on the host.
    indexed = ("nca_loss", "lifted_pair_loss", "proxy_nca_loss")
    for case in gpu.LOSSES:
        if case.textbook is None or case.name in indexed:
            continue
        drawn = case.data(16, 8).to(torch.float32, torch.device("meta"))
        with accelerator():
            loss = case.textbook(*drawn.embeddings, *drawn.labels, **drawn.hyper)
            torch.autograd.grad(loss, drawn.leaves)


def row(**seconds: float) -> dict:
    took = {name: {"median_s": s, "extra_bytes": 5e8} for name, s in seconds.items()}
    return {
        "contenders": took, "left_out": {"memeff": "it needs `pip install memeff`"},
        "floor_s": 0.006, "gradient_bytes": 2e8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "arguments", "found", "reached"),
    [
        ("Share", (0.6,), "60 % (10 ms)", True),
        ("Share", (0.61,), "60 % (10 ms)", False),
        ("Faster", ("compiled", 1.3), "1.40 x (10 ms and 14 ms)", True),
        ("Faster", ("compiled", 1.5), "1.40 x (10 ms and 14 ms)", False),
        ("Faster", ("memeff", 2), "memeff is left out: it needs `pip install memeff`", None),
        ("Memory", (5e8,), "500 MB", True),
        ("Memory", (4e8,), "500 MB", False),
        ("Memory", (3e8, "nearfar", "", False), "300 MB", True),
        ("Within", (0.02, "compiled"), "14 ms", True),
        ("Within", (0.02,), "captured is left out: not measured", False),
    ],
)
def test_what_is_reached(gpu, target, arguments, found, reached):
    import gpu_cases

    given = getattr(gpu_cases, target)(*arguments)
    told = gpu.answer(given, row(nearfar=0.01, compiled=0.014), judged=True)
    assert (told["found"], told["reached"]) == (found, reached)


def test_bits_that_differ_are_named(gpu, monkeypatch):
    calls = iter([{"a": "1", "b": "2", "c": ""}] * 3)
    monkeypatch.setattr(gpu, "digests", lambda *_: next(calls))
    other = SimpleNamespace(stdout=json.dumps({"a": "1", "b": "3", "c": ""}))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: other)
    found = gpu.same_bits([], [], None)
    assert found["differ"] == ["b", "c"]
    assert found["answers"][0]["reached"] is False


def test_the_page_lists_what_is_to_be_measured(gpu):
    import tables

    page = (BENCHMARKS.parent / "docs" / "results.md").read_text(encoding="utf-8")
    for name in ("gpu", "small batches on a GPU"):
        now = page.split(f"<!-- bench: {name} -->")[1].split("<!-- end -->")[0]
        if tables.MACHINE not in now:
            assert tables.BLOCKS[name].text(gpu.unmeasured()).strip() == now.strip()


def test_measured_figures_stay_where_nothing_is_measured(gpu, tmp_path):
    import tables

    page = "<!-- bench: gpu -->\n{}\n<!-- end -->"
    measured = page.format("| 60 % |\n\nMachine: a card.")
    assert tables.page(measured, tmp_path) == measured
    assert "not measured" in tables.page(page.format(""), tmp_path)


def test_the_figures_of_a_card_are_written(gpu, tmp_path):
    import tables

    machine = {
        "gpu": "a card", "cuda": "13.0", "torch": "2.13.0", "triton": "3.9.0", "memeff": "0.3.1",
        "siglip-kernel": None, "inf-cl": None, "commit": None, "date": "2026-11-28",
    }  # fmt: skip
    rows = gpu.unmeasured()
    rows[0]["answers"][0].update(found="70 % (8 ms)", reached=True)
    small = next(row for row in rows if row["small"])
    small["contenders"] = {"captured": {"median_s": 3e-5}, "nearfar": {"median_s": 2e-3}}
    saved = json.dumps({"machine": machine, "results": rows})
    (tmp_path / "gpu.json").write_text(saved, encoding="utf-8")
    page = "".join(
        f"<!-- bench: {name} -->\n<!-- end -->" for name in ("gpu", "small batches on a GPU")
    )
    text = tables.page(page, tmp_path)
    assert "| 70 % (8 ms) | yes |" in text
    assert "| 0.030, -, - | 2.000, -, - | |" in text
    assert "Machine: a card, CUDA 13.0. Versions: torch 2.13.0, triton 3.9.0, memeff 0.3.1." in text


def test_tuning_writes_the_shapes_of_this_card_beside_those_of_others(gpu, monkeypatch, tmp_path):
    import tune
    from cases import CASES

    from nearfar.engine.gpu.shapes import Shape

    file = tmp_path / "shapes.json"
    file.write_text(tune.written({"another": {"pull float32 16": [64, 64, 4, 2]}}))
    monkeypatch.setattr(tune, "LOSSES", [CASES["sup_con_loss"]])
    monkeypatch.setattr(tune, "tiles", lambda default: [default])
    monkeypatch.setattr(tune, "compilations", lambda tile: [tile, Shape(16, 16, 4, 1)])
    run(gpu, monkeypatch, "--smoke", "--tune", file, "--only", "collect")
    found = json.loads(file.read_text())
    assert found["another"] == {"pull float32 16": [64, 64, 4, 2]}
    assert set(found["cpu"]) == {"collect float32 16"}
    assert list(found) == ["another", "cpu"]


def test_shapes_that_fail_or_spill_are_dropped(gpu, monkeypatch, capsys):
    import tune

    from nearfar.engine.gpu.shapes import Shape

    fails, spilling, slow, fast = (Shape(16, 16 << k, 4, 2) for k in range(4))
    counts = {fails: None, spilling: 8, slow: 0, fast: 0}
    seconds = {"0": 2.0, "1": 1.0}
    monkeypatch.setattr(tune, "spills", lambda run, shape, device: counts[shape])

    def in_turns(calls, *_):
        assert set(calls) == set(seconds)
        return {name: SimpleNamespace(median=seconds[name]) for name in calls}

    monkeypatch.setattr(tune, "in_turns", in_turns)
    assert tune.fastest(list(counts), print, tune.TINY, CPU) == fast
    seconds["0"] = 1.0
    assert tune.fastest(list(counts), print, tune.TINY, CPU) == slow  # the first of equals
    assert tune.fastest([fails], print, tune.TINY, CPU) is None


def test_a_shape_that_fails_is_named_and_not_taken(gpu, capsys):
    import tune

    from nearfar.engine.gpu.shapes import Shape

    def refuses(shape: Shape) -> None:
        raise RuntimeError("out of resources")

    assert tune.spills(refuses, Shape(16, 32, 4, 2), CPU) is None
    assert "(16, 32, 4, 2): RuntimeError" in capsys.readouterr().out


class Card:
    """What of `torch.cuda` a capture uses; a step reads a value by `read`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.mode = "default"

    def read(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def Stream(self) -> "Card":  # noqa: N802
        return self

    current_stream = Stream

    def wait_stream(self, other: object) -> None:
        self.done.append("wait")

    def set_stream(self, stream: object) -> None:
        self.done.append("back")

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.done.append("replay"))

    @contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.done.append("capture")
        yield


def test_a_step_that_reads_a_value_is_not_captured(gpu, monkeypatch):
    import device

    card = Card()
    monkeypatch.setattr(torch, "cuda", card)
    with pytest.raises(device.NotCapturedError, match=r"^called a synchronizing CUDA operation$"):
        device.captured(lambda: (card.read(),), torch.device("cuda"))
    assert (card.mode, card.done) == ("default", ["wait", "wait"])


def test_a_captured_step_is_replayed(gpu, monkeypatch):
    import device

    card = Card()
    monkeypatch.setattr(torch, "cuda", card)
    replay = device.captured(lambda: (card.done.append("step"),), torch.device("cuda"))
    steps = ["step"] * 3
    assert card.done == ["wait", *steps, "wait", "step", "capture", "step", "back"]
    replay()
    assert card.done[-1] == "replay"
