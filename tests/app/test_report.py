"""The report: what its page holds, what it says, and what it needs."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from conftest import make_vectors

from nearfar.app.errors import InputError
from nearfar.app.report import compare_runs, write_comparison, write_report
from nearfar.app.report.probability import probabilities
from nearfar.app.report.study import read_study
from nearfar.app.report.words import decided, percent, verdict
from nearfar.app.train import recorder
from nearfar.app.train.record import RECORD
from nearfar.evaluate import at_threshold, verification

SECTIONS = [
    "Figures",
    "Distances",
    "The threshold",
    "The probability",
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


def test_the_probability_is_shown_as_the_run_says_it(vector_run):
    study = read_study(vector_run)
    found, bins = probabilities(study), study.test["reliability"]["bins"]
    assert found.said.startswith("Too few test identities to tell")
    diagram, ratios = found.figures
    rows = diagram.spec["datasets"]["rows"]
    assert [row["claimed"] for row in rows] == [one["claimed"] for one in bins]
    for row, one in zip(rows, bins, strict=True):
        if 0.001 < one["claimed"] < 0.999:
            odds = one["claimed"] / (1 - one["claimed"])
            assert row["x"] == pytest.approx(math.log(odds), rel=1e-3)
        assert -8 <= row["y"] <= 8
        assert ("low" in row) == (one["interval"] is not None)
    counts = [(line[1], line[2]) for line in diagram.table.rows]
    assert counts == [(f"{one['n_similar']:,}", f"{one['n_dissimilar']:,}") for one in bins]
    drawn = ratios.spec["datasets"]["rows"]
    for kind in ("same", "different"):
        assert sum(row["share"] for row in drawn if row["kind"] == kind) == pytest.approx(1, 1e-3)


def test_the_average_error_hides_no_group_in_which_the_probability_is_wrong(vector_run):
    study = read_study(vector_run)
    rows = (
        (1 / 10, 1 / 3, 0.159, 0.299, (0.227, 0.382)),
        (1 / 3, 1.0, 0.367, 0.549, (0.457, 0.637)),
        (1.0, 3.0, 0.7, 0.71, (0.68, 0.73)),
        (3.0, 10.0, 0.1, 0.9, None),  # of too few identities to say anything
    )
    study.test["reliability"] |= {"calibration_error": 0.011, "log_loss": 0.25} | {
        "bins": [
            {"least": least, "most": most, "n_similar": 1, "n_dissimilar": 2, "share": 0.25}
            | {"claimed": claimed, "seen": seen}
            | {"interval": ends and dict(zip(("low", "high"), ends, strict=True))}
            for least, most, claimed, seen, ends in rows
        ]
    }
    said = probabilities(study).said.replace("\N{NO-BREAK SPACE}", " ")
    assert "wrong by 1.1 percentage points on average" in said
    assert "outside the interval in 2 of the 3 groups" in said
    assert "most wrong at likelihood ratios 1/3 to 1: 36.7 % claimed, 54.9 % seen" in said


def test_bins_are_named_by_their_ratios(vector_run):
    study = read_study(vector_run)
    bins = [
        {"least": least, "most": most, "n_similar": 1, "n_dissimilar": 2, "share": 0.25}
        | {"claimed": claimed, "seen": seen, "interval": {"low": 0.1, "high": 0.9}}
        for least, most, claimed, seen in (
            (0.0, 0.001, 0.0001, 0.0),
            (1 / 3, 1.0, 0.4, 0.5),
            (100.0, 1000.0, 0.995, 1.0),
            (1000.0, None, 0.9999, 1.0),
        )
    ]
    study.test["reliability"]["bins"] = bins
    diagram, ratios = probabilities(study).figures
    names = ["below 1/1,000", "1/3 to 1", "100 to 1,000", "above 1,000"]
    assert [line[0] for line in diagram.table.rows] == names
    assert [row["y"] for row in diagram.spec["datasets"]["rows"]] == [-8, 0, 8, 8]
    ends = [(row["from"], row["to"]) for row in ratios.spec["datasets"]["rows"]][:4]
    assert ends == [(-4, -3), (-0.4771, 0), (2, 3), (3, 4)]
    assert "claimed 40.0" in diagram.description


def test_the_prior_table_holds_what_verify_says(nearfar, vector_run):
    study = read_study(vector_run)
    fitted, table = study.results.probability, probabilities(study).priors
    assert len(table.header) == 6
    distances = [float(line[0].split(",")[0]) for line in table.rows]
    assert distances == sorted(distances)
    assert sum("the threshold" in line[0] for line in table.rows) == 1
    others = [line[1] for line in table.rows if "the threshold" not in line[0]]
    assert others == ["10", "1"]  # all that 8 identities, 28 pairs of them, can show
    for line, distance in zip(table.rows, distances, strict=True):
        ratio = fitted.likelihood_ratio([distance]).item()
        told = line[1].split("/")
        shown = 1 / float(told[1]) if len(told) == 2 else float(line[1].replace(",", ""))
        assert shown == pytest.approx(ratio, rel=0.06)
        at_one_percent = ratio / (ratio + 99)
        if at_one_percent > 0.001:
            cell = float(line[4].replace("\N{NO-BREAK SPACE}%", "")) / 100
            assert cell == pytest.approx(at_one_percent, abs=2e-3)
    silent = replace(fitted, slope=0.0, intercept=0.0, share=0.5)
    results = replace(study.results, probability=silent)
    (only,) = probabilities(replace(study, results=results)).priors.rows
    assert only[1:] == ("1", *map(percent, (0.5, 0.1, 0.01, 0.001)))


def test_a_run_without_a_probability_says_so(vector_run, tmp_path):
    run = shutil.copytree(vector_run, tmp_path / "run")
    content = json.loads((run / "threshold.json").read_text())
    del content["probability"]
    (run / "threshold.json").write_text(json.dumps(content))
    write_report(run, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "None was fitted: this run was trained by an older nearfar." in text
    assert "reliability-figure" not in text


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
