"""The report: what its page holds, what it says, and what it needs."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from conftest import make_vectors

from nearfar.app.errors import InputError
from nearfar.app.report import compare_runs, write_comparison, write_report
from nearfar.app.report.study import read_study
from nearfar.app.report.words import decided, percent, verdict
from nearfar.app.train import recorder
from nearfar.app.train.record import RECORD
from nearfar.evaluate import at_threshold, verification

SECTIONS = [
    "Figures",
    "Distances",
    "The threshold",
    "Forces",
    "Training",
    "The hardest pairs",
    "The embedding space",
    "The doctor’s findings",
    "How to repeat the run",
]


class Outline(HTMLParser):
    """Headings, what the page points to, names of elements, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[tuple[int, str]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        self.links += [held[name] for name in ("src", "href", "action", "data") if name in held]
        self.ids += [held["id"]] if "id" in held else []
        if tag == "img":
            self.images.append(held)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, text):
        if not {"script", "style"} & set(self._open):
            self.words.append(text)
        if self._open and re.fullmatch("h[1-6]", self._open[-1]):
            level, before = self.headings[-1]
            self.headings[-1] = (level, before + text.strip())


@pytest.fixture(scope="module")
def page(image_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(image_run, path)
    return path


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page.read_text(encoding="utf-8"))


def test_the_sections_come_in_their_order(outline):
    assert [title for level, title in outline.headings if level == 2] == SECTIONS
    levels = [level for level, _ in outline.headings]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(outline.ids) == len(set(outline.ids))


def test_the_page_is_one_small_file_that_points_nowhere(page, outline):
    assert page.stat().st_size < 6_000_000
    assert all(link.startswith(("#", "data:")) for link in outline.links), outline.links
    for link in outline.links:
        assert not link.startswith("#") or link[1:] in outline.ids, link
    style = re.search("<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_the_gallery_shows_the_images_with_their_names(outline):
    assert len(outline.images) == 48
    for image in outline.images:
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"].startswith("person ")


def test_a_report_of_vectors_shows_rows(vector_run, tmp_path):
    write_report(vector_run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Outline(text).images == []
    assert text.count('<p class="row">') == 48


def test_a_report_needs_only_the_folder_and_is_the_same_each_time(image_run, page, tmp_path):
    shutil.copytree(image_run, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"never read")
    write_report(tmp_path / "elsewhere", tmp_path / "out.html")
    assert (tmp_path / "out.html").read_bytes() == page.read_bytes()
    assert str(image_run).encode() not in page.read_bytes()


def test_train_ends_with_the_verdict_and_the_report(nearfar, vectors, tmp_path):
    out = tmp_path / "run"
    options = ["--steps", 5, "--identities", 8, "--embedding-dim", 4]
    done = nearfar("train", vectors, "--out", out, *options)
    assert done.status == 0, done.err
    study = read_study(out)
    assert verdict(study.test, study.findings) in done.out
    assert f"wrote {out} and its report, {out}/report.html" in done.out
    before = (out / "report.html").read_bytes()
    assert nearfar("report", out).status == 0
    assert (out / "report.html").read_bytes() == before


def test_report_writes_where_it_is_told(nearfar, vector_run, tmp_path):
    page = tmp_path / "deep" / "page.html"
    done = nearfar("report", vector_run, "--out", page)
    assert done.status == 0
    assert done.out.endswith(f"wrote {page}\n")
    assert page.is_file()
    assert "exists" in nearfar("report", vector_run, "--out", page).error
    assert nearfar("report", vector_run, "--out", page, "--overwrite").status == 0
    assert ".html" in nearfar("report", vector_run, "--out", tmp_path / "page.txt").error
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_a_run_without_a_record_cannot_be_reported(nearfar, vector_run, tmp_path):
    shutil.copytree(vector_run, tmp_path / "run")
    (tmp_path / "run" / RECORD).unlink()
    done = nearfar("report", tmp_path / "run")
    assert done.status == 2
    assert "no record.npz" in done.error
    assert "--config" in done.error
    assert "no such run folder" in nearfar("report", tmp_path / "nowhere").error


def test_names_are_text_and_never_markup(nearfar, tmp_path):
    data = tmp_path / "v.npz"
    x, y = make_vectors(n_identities=12, n_items=4)
    evil = "</script><script>alert('x')</script>"
    np.savez(data, x=x, y=np.array([f"{evil}{i}" for i in y]), names=np.array([evil] * len(x)))
    options = ["--steps", 3, "--identities", 4, "--items", 2, "--embedding-dim", 4]
    assert nearfar("train", data, "--out", tmp_path / "run", *options).status == 0
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert evil not in text
    assert "<script>alert" not in text
    assert "&lt;/script&gt;" in text


def test_findings_are_shown(vector_run, tmp_path):
    shutil.copytree(vector_run, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    summary["findings"] = [
        {"name": "dead-batch", "seen": "S <1>.", "means": "M.", "advice": "A.", "step": 7}
    ]
    path.write_text(json.dumps(summary))
    said = write_report(tmp_path / "run", tmp_path / "a.html")
    assert "read the doctor's finding first" in said
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    for part in ("dead-batch", "S &lt;1&gt;.", "M.", "A.", "first seen at step 7"):
        assert part in text
    del summary["findings"]
    path.write_text(json.dumps(summary))
    assert "doctor" not in write_report(tmp_path / "run", tmp_path / "b.html")
    assert "None were recorded" in (tmp_path / "b.html").read_text(encoding="utf-8")


def figures(eer, low=None, high=None, *, far=0.01, tar=0.9):
    intervals = None if low is None else {"level": 0.95, "eer": {"low": low, "high": high}}
    return {"eer": eer, "intervals": intervals, "at_threshold": {"far": far, "tar": tar}}


@pytest.mark.parametrize(
    ("learned", "raw", "says"),
    [
        (
            figures(0.023, 0.019, 0.028),
            figures(0.14, 0.12, 0.16),
            "Verifies unseen identities with an equal error rate of 2.3 % (95 % interval 1.9 to "
            "2.8 %), a sixth of the raw input's 14.0 %; the shipped threshold accepts 90.0 % of "
            "same pairs and 1.0 % of different pairs.",
        ),
        (figures(0.1, 0.05, 0.15), figures(0.2, 0.12, 0.3), "Not clearly better than the raw"),
        (
            figures(0.1, 0.09, 0.11),
            figures(0.15, 0.12, 0.2),
            "compared with the raw input's 15.0 %",
        ),
        (figures(0.1, 0.09, 0.11), figures(0.2, 0.18, 0.2), "half the raw input's 20.0 %"),
        (figures(0.01, 0.009, 0.011), figures(0.2, 0.18, 0.2), "far below the raw input's"),
        (figures(0.0), figures(0.2), "on too few identities for an interval"),
        (figures(0.2, 0.1, 0.3), figures(0.2, 0.1, 0.3), "No better than the raw input"),
        (figures(0.0), figures(0.0), "No better than the raw input"),
    ],
)
def test_the_verdict_is_one_honest_sentence(learned, raw, says):
    said = verdict({"learned": learned, "raw": raw}, []).replace("\N{NO-BREAK SPACE}", " ")
    assert says in said
    assert said.endswith(".")
    assert ". " not in said
    assert "read the doctor's 2 findings first" in verdict({"learned": learned, "raw": raw}, [1, 2])


def test_the_decisions_add_up(vector_run):
    study = read_study(vector_run)
    at = study.test["learned"]["at_threshold"]
    assert at["threshold"] == study.results.thresholds.learned
    said = decided(study.test)
    assert said.startswith(f"{percent(at['far'])} of different pairs are accepted")
    assert f"{percent(1 - at['tar'])} of same pairs are rejected" in said


def test_a_drawn_curve_keeps_its_shape():
    random = np.random.default_rng(0)
    same = np.arange(8000) < 3000
    d = random.normal(size=8000) + ~same
    curve = verification(d, same, higher_is_closer=False).curve
    at = at_threshold(d, same, 0.25, higher_is_closer=False)
    points = recorder.drawn(curve, at)
    assert points.shape[1] < len(curve.far) / 4
    assert (np.diff(points) >= 0).all()
    assert (points[:, -1] == [d.max(), 1, 1]).all()
    assert [0.25, at.far, at.tar] in points.T.tolist()
    for kind in (1, 2):
        every = (curve.threshold, curve.far, curve.tar)[kind]
        assert np.abs(every[:, None] - points[kind]).min(1).max() < 0.01


@pytest.fixture(scope="module")
def another_run(vectors, tmp_path_factory):
    """The same data and test identities, by another loss."""
    from conftest import QUICK

    from nearfar.app.cli import main

    out = tmp_path_factory.mktemp("runs") / "other"
    options = [*QUICK, "--loss", "triplet", "--margin", "0.3", "--steps", "10"]
    assert main(["train", str(vectors), "--out", str(out), *options]) == 0
    return out


def test_compare_sets_runs_side_by_side(nearfar, vector_run, another_run, tmp_path):
    page = tmp_path / "compare.html"
    done = nearfar("compare", vector_run, another_run, "--out", page)
    assert done.status == 0
    assert done.err == ""
    header = next(line for line in done.out.splitlines() if line.startswith("figure"))
    assert header.split()[1:] == ["vectors", "other", "raw", "input"]
    outline = Outline(page.read_text(encoding="utf-8"))
    assert [title for level, title in outline.headings if level == 2] == [
        "Figures",
        "Curves",
        "Settings that differ",
    ]
    assert all(link.startswith(("#", "data:")) for link in outline.links)
    settings = compare_runs([vector_run, another_run]).settings()
    assert [row[0] for row in settings.rows] == [
        "distance",
        "loss",
        "margin",
        "smooth",
        "steps",
        "swap",
        "temperature",
    ]
    found = json.loads(nearfar("compare", vector_run, another_run, "--json").out)
    assert found["comparable"]
    summary = json.loads((another_run / "summary.json").read_text())
    assert found["runs"]["other"] == summary["test"]


def test_runs_measured_on_different_pairs_are_flagged(nearfar, vector_run, image_run, tmp_path):
    done = nearfar("compare", vector_run, image_run, "--json")
    assert done.status == 0
    assert "Measured on other data or other test identities than vectors: images" in done.err
    assert not json.loads(done.out)["comparable"]
    comparison = compare_runs([vector_run, image_run])
    write_comparison(comparison, tmp_path / "page.html")
    assert comparison.warning in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "raw input" not in comparison.table().header


def test_compare_refuses(nearfar, vector_run, tmp_path):
    assert "two runs or more" in nearfar("compare", vector_run).error
    assert "no such run folder" in nearfar("compare", vector_run, tmp_path / "x").error
    with pytest.raises(InputError, match="two runs"):
        compare_runs([vector_run])
    twice = compare_runs([vector_run, vector_run])
    assert twice.labels == ("vectors (1)", "vectors (2)")
    assert twice.settings().rows == []


def test_umap_is_an_extra(nearfar, vector_run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "umap", None)
    done = nearfar("report", vector_run, "--umap", "--out", tmp_path / "a.html")
    assert "pip install 'nearfar[umap]'" in done.error
