"""Reports in a browser: silent, offline, accessible, and alive; with screenshots to look at."""

import re
from pathlib import Path

import pytest
from browser import browser, needs_chromium

from nearfar.app.report import compare_runs, write_comparison, write_report
from nearfar.app.report.study import read_study
from nearfar.app.report.words import decided, percent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(needs_chromium() is not None, reason=str(needs_chromium())),
]


@pytest.fixture(scope="module")
def pages(glyphs_run, image_run, vector_run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {"glyphs": glyphs_run, "images": image_run, "vectors": vector_run}
    for name, run in runs.items():
        write_report(run, folder / f"{name}.html")
    write_comparison(compare_runs([glyphs_run, image_run]), folder / "compare.html")
    return {name: folder / f"{name}.html" for name in (*runs, "compare")}


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


LOOKS = [
    ("glyphs", 1280, False),
    ("glyphs", 1280, True),
    ("glyphs", 390, False),
    ("glyphs", 390, True),
    ("images", 1280, False),
    ("images", 390, True),
    ("vectors", 390, False),
    ("compare", 1280, True),
    ("compare", 390, False),
]


@pytest.mark.parametrize(("name", "width", "dark"), LOOKS)
def test_a_page_is_silent_offline_and_fits(page, pages, name, width, dark):
    page.open(pages[name], width=width, dark=dark)
    assert page.errors() == []
    assert page.requests() == []
    assert page.script("return document.documentElement.scrollWidth") == width
    outside = "return [...document.querySelectorAll('.chart')].filter(chart => {"
    outside += "const svg = chart.querySelector('svg').getBoundingClientRect();"
    outside += "return svg.width < 200 || svg.right > innerWidth}).map(chart => chart.dataset.spec)"
    assert page.script(outside) == []
    screenshot = page.screenshot(f"{name}-{width}-{'dark' if dark else 'light'}")
    assert screenshot.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("name", "dark"),
    [("glyphs", False), ("glyphs", True), ("vectors", False), ("compare", True)],
)
def test_a_page_is_accessible(page, pages, name, dark):
    """The charts themselves are left out: they are images, which their places describe."""
    page.open(pages[name], dark=dark)
    page.script("document.querySelectorAll('details').forEach(part => { part.open = true })")
    serious, n_passes = page.faults(without=".chart svg")
    assert serious == []
    assert n_passes > 15


def drawn(page, name: str) -> str:
    """A chart as it is on the screen."""
    return page.script(f"return document.querySelector('#{name}-figure svg').outerHTML")


def test_the_threshold_slider_changes_the_figures(page, pages, glyphs_run):
    page.open(pages["glyphs"])
    study = read_study(glyphs_run)
    assert page.text("#decided") == decided(study.test)  # as the run says it
    before = {name: drawn(page, name) for name in ("roc", "det", "distances")}
    marks = page.text(".gallery")

    page.move("#threshold-slider", 0)
    rates = re.findall(r"([\d.]+)\s% of", page.text("#decided"))
    assert rates == ["0", "100"]
    page.script("return new Promise(requestAnimationFrame)")
    for name, svg in before.items():
        assert drawn(page, name) != svg, name
    assert page.text(".gallery") != marks

    largest = float(page.script("return document.querySelector('#threshold-slider').max"))
    page.move("#threshold-slider", largest)
    rates = re.findall(r"([\d.]+)\s% of", page.text("#decided"))
    assert rates == ["100", "0"]

    threshold, far, tar = study.outcome.learned_curve
    place = len(threshold) // 2
    page.move("#threshold-slider", float(threshold[place : place + 2].mean()))
    assert page.text("#decided").startswith(f"{percent(far[place])} of different pairs")
    assert f"{percent(1 - tar[place])} of same pairs" in page.text("#decided")

    page.script("document.querySelector('#reset').click()")
    assert page.text("#decided") == decided(study.test)
    assert page.errors() == []


def test_the_threshold_moves_by_the_keyboard_in_small_steps(page, pages):
    from selenium.webdriver.common.keys import Keys

    page.open(pages["glyphs"])
    slider = page.driver.find_element("id", "threshold-slider")
    before, largest = (float(slider.get_attribute(name)) for name in ("value", "max"))
    slider.send_keys(Keys.ARROW_RIGHT)
    moved = float(slider.get_attribute("value")) - before
    assert moved == pytest.approx(largest / 500)
    assert slider.get_attribute("aria-valuetext") == page.text("[data-says='threshold']")


def test_the_step_slider_changes_the_charts_and_its_copies(page, pages):
    page.open(pages["glyphs"])
    charts = ("distances", "forces", "path")
    before = {name: drawn(page, name) for name in charts}
    page.move("#moment-forces", 0)
    page.script("return new Promise(requestAnimationFrame)")
    for name in charts:
        assert drawn(page, name) != before[name], name
    values = "return [...document.querySelectorAll('[data-moves=moment]')].map(one => one.value)"
    assert page.script(values) == ["0", "0", "0"]
    assert page.text("[data-says='moment']").startswith("Step 0 of 12")


def test_a_report_prints(page, pages):
    page.open(pages["glyphs"])
    assert page.print("glyphs").read_bytes().startswith(b"%PDF")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "return getComputedStyle(document.querySelector('nav')).display"
    assert page.script(hidden) == "none"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
