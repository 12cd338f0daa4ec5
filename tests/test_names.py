"""Text from outside, in names, labels, columns and paths, at every place that writes."""

import json
import os
import shutil
import sys
from html.parser import HTMLParser
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images, make_vectors
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nearfar.app.cli import main
from nearfar.app.text import printable
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import read_config, to_toml

FEW = ("--steps", "2", "--identities", "8", "--items", "2", "--embedding-dim", "8", "--no-report")
ODD = [
    "caf\udce9",  # é in Latin-1: no UTF-8
    "two\nlines",
    "tab\tand\x1b[31mred\x07",
    "\"quotes\" and 'more'",
    "<b>x<script>alert(1)<∕script>",
    "&lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "[bold]rich[∕bold] [link=x]",
    "עברית عربى",
    "\u202egnp.exe",  # turns what follows round
    "é and e\u0301",
    "𝔘𝔫𝔦 👩‍👩‍👧 🏳️‍🌈",
    "back\\slash %s {0}",
    "-rf",
    " ",
    "x" * 200,
]


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_can_be_written_and_is_else_unchanged(text):
    shown = printable(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_what_is_no_utf_8_is_shown_as_its_bytes():
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
    assert printable("\ud800") == r"\ud800"
    assert printable("a\u202eb\u2028c") == r"a\u202eb\u2028c"


@pytest.fixture
def album(tmp_path) -> Path:
    root = tmp_path / "photos"
    pixels = make_images(len(ODD), 2)
    for i, array in enumerate(pixels):
        name = ODD[i // 2]
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / name / f"{i % 2}{name[:200]}.png")
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
    return root


class Texts(HTMLParser):
    """The words of a page and the names of its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.words += [value for key, value in attrs if key == "alt"]

    def handle_data(self, data):
        self.words.append(data)


def test_photos_of_any_name_are_learned_reported_and_embedded(nearfar, album, tmp_path):
    run = tmp_path / "caf\udce9 <b>[red]"
    options = ("--image-size", 16, "--test-share", 0.6, "--calibration-share", 0.2, *FEW[:-1])
    done = nearfar("train", album, "--out", run, *options)
    assert done.status == 0, done.err
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    split = summary["split"]
    assert sorted([*split["train"], *split["calibration"], *split["test"]]) == sorted(
        map(printable, ODD)
    )
    page = (run / "report.html").read_text(encoding="utf-8")
    texts = Texts(page)
    body = " ".join(texts.words)
    for name in split["test"]:
        assert " ".join(name.split()) in " ".join(body.split()), name
    assert any("<b>" in name for name in split["test"])
    assert texts.tags.count("b") == 0

    for command in (("evaluate", run), ("evaluate", run, album), ("report", run), ("doctor", run)):
        assert nearfar(*command).status in (0, 1), command
    out = tmp_path / "caf\udce9.npz"
    done = nearfar("embed", run, album, "--out", out)
    assert done.status == 0, done.err
    with np.load(out) as arrays:
        assert sorted(set(arrays["y"])) == sorted(map(printable, ODD))
        assert all(printable(name) == name for name in arrays["names"])
        assert any(r"caf\xe9.png" in name for name in arrays["names"])
    first, *_ = (path for path in album.rglob("*.png") if "\udce9" in path.name)
    assert nearfar("verify", run, first, first).status == 0
    other = shutil.copytree(run, tmp_path / "other \udce9")
    page = tmp_path / "c\udce9.html"
    done = nearfar("compare", run, other, "--out", page)
    assert done.status == 0, done.err
    page.read_text(encoding="utf-8")
    json.loads(nearfar("compare", run, other, "--json").out)


def test_labels_and_names_of_an_npz_may_be_anything(nearfar, tmp_path):
    x, y = make_vectors(n_identities=len(ODD), n_items=2)
    labels = np.array(ODD)[y]
    np.savez(tmp_path / "v.npz", x=x, y=labels, names=np.array([f"{a}\n" for a in labels]))
    done = nearfar("train", tmp_path / "v.npz", "--out", tmp_path / "run", *FEW)
    assert done.status == 0, done.err
    assert "\x1b" not in done.out
    assert nearfar("report", tmp_path / "run").status == 0


def test_an_error_is_one_line_without_what_steers_a_terminal(nearfar, album):
    bad = album / ODD[0] / "a\x1b[2Jb\nc.png"
    bad.write_bytes(b"no image")
    said = nearfar("train", album, "--out", album.parent / "run").error
    assert r"caf\xe9/a\x1b[2Jb c.png" in said
    assert "\x1b" not in said


def test_a_path_of_data_that_is_no_utf_8_is_refused_before_training(nearfar, album, tmp_path):
    odd = album.rename(tmp_path / "caf\udce9")
    said = nearfar("train", odd, "--out", tmp_path / "run").error
    assert "rename it" in said
    assert not (tmp_path / "run").exists()


def test_columns_of_any_name_are_told_in_one_line(nearfar, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('"a\x1b[31m","b\nc",[bold]x\n1,2,3\n', encoding="utf-8")
    for command in (
        ("train", table, "--out", tmp_path / "run"),
        ("explain", table, "--loss", "contrastive"),
    ):
        said = nearfar(*command).error
        assert "[bold]x" in said
        assert "\x1b" not in said


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_config_of_any_text_is_read_back(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    config = TrainConfig(data=text, loss="triplet", hyperparameters={"distance": text})
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert read_config(path) == config


def test_a_terminal_of_few_letters_ends_no_command(tmp_path, monkeypatch):
    """One that knows ASCII only, as of an old server."""
    x, y = make_vectors(n_identities=8, n_items=2)
    np.savez(tmp_path / "é.npz", x=x, y=y)
    terminal = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["train", str(tmp_path / "é.npz"), "--out", str(tmp_path / "é"), *FEW]) == 0
    terminal.flush()
    assert rb"\xe9.npz" in terminal.buffer.getvalue()
