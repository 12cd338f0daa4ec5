"""The page of `nearfar serve` in a browser: items are compared, the prior moves, errors show."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser, needs_chromium
from PIL import Image
from serve_requests import opened
from test_serve import verified

from nearfar.app.data.items import read_glyphs
from nearfar.app.gallery.answers import searchable
from nearfar.app.serve import Answers
from nearfar.app.train.run import read_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(needs_chromium() is not None, reason=str(needs_chromium())),
]
ANSWERED = "return !document.querySelector('#answer').hidden"
REFUSED = "return document.querySelector('.error').textContent !== ''"
A, NEAR, FAR = 0, 1, 40  # rows of the built-in letters: two of A, one of C


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("letters")
    items = read_glyphs()
    for row in (A, NEAR, FAR):
        Image.fromarray(items.content.read(torch.tensor([row]))()[0, 0].numpy()).save(
            folder / f"letter {row}.png"
        )
    return {row: folder / f"letter {row}.png" for row in (A, NEAR, FAR)}


@pytest.fixture(scope="module")
def images_page(glyphs_run):
    with opened(Answers(read_run(glyphs_run))) as found:
        yield found.url


@pytest.fixture(scope="module")
def vectors_page(vector_run):
    with opened(Answers(read_run(vector_run))) as found:
        yield found.url


@pytest.fixture(scope="module")
def gallery_page(vector_run, vector_gallery):
    run = read_run(vector_run)
    with opened(Answers(run, searchable(run, vector_gallery, None))) as found:
        yield found.url


@pytest.fixture(scope="module")
def page():
    with browser() as found:
        yield found


def choose(page, letters, a, b) -> None:
    for name, row in (("a", a), ("b", b)):
        page.driver.find_element("id", name).send_keys(str(letters[row]))
    page.wait(ANSWERED)


def write(page, a: str, b: str) -> None:
    for name, text in (("a", a), ("b", b)):
        field = page.driver.find_element("id", name)
        field.clear()
        field.send_keys(text)
    page.driver.find_element("css selector", "button[type=submit]").click()


NOT_MOVED = "Move the slider to the share you expect."


def probability(page) -> str:
    return page.text("#probability").removeprefix("Probability of “same”: ")


@pytest.mark.parametrize("other", [NEAR, FAR])
def test_two_letters_are_compared_as_verify_does(
    page, images_page, letters, nearfar, glyphs_run, other
):
    page.open(images_page)
    choose(page, letters, A, other)
    found = verified(nearfar, glyphs_run, letters[A], letters[other])
    assert page.text(".decision") == ("Same" if found["same"] else "Different")
    said = f"{found['measure']} distance {found['distance']:.4f}"
    assert said in page.text(".detail").lower()
    assert f"threshold {found['threshold']:.4f}" in page.text(".axis")
    assert "times as likely" in page.text(".evidence")
    assert page.errors() == []

    assert (page.text("#prior-said"), page.text("#probability")) == ("not given", NOT_MOVED)
    values = page.script("return document.querySelector('#prior').dataset.values").split()
    for place in range(0, len(values), 3):
        prior = float(values[place])
        page.move("#prior", place)
        assert page.text("#prior-said") == f"{prior:g} of all pairs"
        held = verified(nearfar, glyphs_run, letters[A], letters[other], "--prior", prior)
        shown = probability(page)
        if 0.0001 <= held["probability"] <= 0.9999:
            assert float(shown) == pytest.approx(held["probability"], rel=1e-3)
        else:
            assert shown == ("below 0.0001" if held["probability"] < 0.5 else "above 0.9999")


def test_nothing_but_the_own_server_is_asked(page, images_page, letters):
    page.open(images_page)
    choose(page, letters, A, NEAR)
    asked = [one for one in page.requests() if not one.startswith("blob:")]
    paths = {one.removeprefix(images_page) for one in asked}
    assert paths == {"style.css", "page.js", "about", "compare"}


LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.mark.parametrize(("width", "dark"), LOOKS)
@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_the_page_fits_and_is_accessible(
    page, images_page, vectors_page, letters, kind, width, dark
):
    page.open({"images": images_page, "vectors": vectors_page}[kind], width=width, dark=dark)
    if kind == "images":
        choose(page, letters, A, FAR)
    else:
        write(page, "-0.5 0.2 1 1 1 1 1 1", "0.5 0.2 1 1 1 1 1 1")
        page.wait(ANSWERED)
    assert page.script("return document.documentElement.scrollWidth") == width
    look = f"serve-{kind}-{width}-{'dark' if dark else 'light'}"
    assert page.screenshot(look).stat().st_size > 20_000
    assert page.errors() == []
    # Its rules are put into the page by the browser, which the page's own policy does not forbid.
    serious, n_passes = page.faults()
    assert serious == []
    assert n_passes > 15


def test_vectors_are_compared_and_errors_shown(page, vectors_page, nearfar, vector_run):
    page.open(vectors_page)
    a, b = "-0.5 0.2 1 1 1 1 1 1", "0.5 0.2 1 1 1 1 1 1"
    write(page, a, b)
    page.wait(ANSWERED)
    found = verified(nearfar, vector_run, a, b)
    assert f"distance {found['distance']:.4f}" in page.text("#answer")

    write(page, a, "1 2 3")
    page.wait(REFUSED)
    assert "b.vector must be a list of 8 numbers" in page.text(".error")
    assert not page.script(ANSWERED)
    write(page, a, b)
    page.wait(ANSWERED)
    assert page.text(".error") == ""
    page.driver.find_element("id", "a").send_keys(" 1")  # the answer is not about this
    assert not page.script(ANSWERED)


FOUND = "return !document.querySelector('#found').hidden"


def move_known(page, place):
    page.move("#known", place)
    page.script("document.querySelector('#known').dispatchEvent(new Event('change'))")


def test_a_gallery_is_searched(page, gallery_page, nearfar, vector_run, vector_gallery, vectors):
    query = " ".join(map(repr, np.load(vectors)["x"][9].tolist()))
    for text, width in ((query, 1280), ("-9 9 -9 9 9 -9 0 0", 390)):
        page.open(gallery_page, width=width)
        page.driver.find_element("id", "query").send_keys(text)
        page.script("document.querySelector('#query-form').requestSubmit()")
        page.wait(FOUND)
        assert page.text("#nobody") == NOT_MOVED
        cells = page.script("return [...document.querySelectorAll('#found tbody td:last-child')]"
                            ".map(cell => cell.textContent)")  # fmt: skip
        assert set(cells) == {"–"}
        move_known(page, 9)
        page.wait(f"return document.querySelector('#nobody').textContent !== {NOT_MOVED!r}")
        done = nearfar("search", vector_run, vector_gallery, text, "--prior", 0.1, "--json")
        (found,) = json.loads(done.out)["answers"]
        assert page.text("#found .decision") == (found["found"] or "Nobody known")
        rows = page.script(
            "return [...document.querySelectorAll('#found tbody tr')].map("
            "row => [...row.children].map(cell => cell.textContent))"
        )
        for row, one in zip(rows, found["candidates"], strict=True):
            assert row[:3] == [one["identity"], one["item"], f"{one['distance']:.4f}"]
            assert float(row[4]) == pytest.approx(one["probability"], rel=1e-3)
        assert page.script("return document.documentElement.scrollWidth") == width
        assert page.screenshot(f"serve-search-{width}").stat().st_size > 20_000
        assert page.errors() == []
        serious, _ = page.faults()
        assert serious == []

    before = page.text("#nobody")
    move_known(page, 0)
    page.wait(f"return document.querySelector('#nobody').textContent !== {before!r}")
    assert page.text("#known-said") == "0.0001 of all searches"


def test_a_file_that_is_no_image_is_told(page, images_page, letters, tmp_path):
    (tmp_path / "no.png").write_bytes(b"nothing")
    page.open(images_page)
    page.driver.find_element("id", "a").send_keys(str(letters[A]))
    page.driver.find_element("id", "b").send_keys(str(tmp_path / "no.png"))
    page.wait(REFUSED)
    assert page.text(".error").startswith("image b cannot be read")
    page.driver.find_element("css selector", "button[type=reset]").click()
    assert page.text(".error") == ""
    choose(page, letters, A, NEAR)


def test_images_may_be_dropped(page, images_page, letters):
    page.open(images_page)
    content = letters[A].read_bytes()
    for name in ("a", "b"):
        page.script(
            "const data = new DataTransfer();"
            "data.items.add(new File([new Uint8Array(arguments[1])], 'dropped.png'));"
            "document.querySelector(`[data-item=${arguments[0]}] .drop`).dispatchEvent("
            "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))",
            name,
            list(content),
        )
    page.wait(ANSWERED)
    assert page.text(".decision") == "Same"
    assert "0.0000" in page.text(".detail")


def test_the_keyboard_is_enough(page, vectors_page):
    from selenium.webdriver.common.keys import Keys

    page.open(vectors_page)
    field = page.driver.find_element("id", "a")
    field.send_keys("1 2 3 4 5 6 7 8", Keys.TAB)
    page.driver.switch_to.active_element.send_keys("1 2 3 4 5 6 7 8", Keys.TAB)
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait(ANSWERED)
    slider = page.driver.find_element("id", "prior")
    assert (before := probability(page)) == NOT_MOVED
    slider.send_keys(Keys.ARROW_LEFT)
    assert probability(page) != before
    assert slider.get_attribute("aria-valuetext") == page.text("#prior-said")


def test_a_stopped_server_is_told_of(page, vector_run):
    with opened(Answers(read_run(vector_run))) as door:
        page.open(door.url)
    write(page, "1 2 3 4 5 6 7 8", "1 2 3 4 5 6 7 8")
    page.wait(REFUSED)
    assert "is nearfar serve still running?" in page.text(".error")


def test_another_page_cannot_ask(page, vectors_page, tmp_path):
    (tmp_path / "other.html").write_text("<title>another site</title>", encoding="utf-8")
    page.open(tmp_path / "other.html")
    question = json.dumps({"a": {"vector": [1] * 8}, "b": {"vector": [1] * 8}})
    tried = page.driver.execute_async_script(
        "const [address, body, done] = arguments;"
        "fetch(address + 'compare', {method: 'POST', mode: 'no-cors', body})"
        ".then(answer => done(answer.type), error => done(String(error)))",
        vectors_page,
        question,
    )
    assert tried == "opaque" or "TypeError" in tried  # refused, and its words are not shown either
