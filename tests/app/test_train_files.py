"""Paths in tables and folders: one file is one item, however it is named."""

import os
from unicodedata import normalize

import numpy as np
import pytest
from conftest import make_images, pair_rows, write_csv
from PIL import Image

from nearfar.app.data.items import read_data
from nearfar.app.train.split import split_pairs

HEADER = ("a", "b", "label")


@pytest.fixture
def photos(tmp_path):
    """6 identities of 3 images each, and their names relative to the folder."""
    names = []
    for i, pixels in enumerate(make_images(n_identities=6, n_items=3)):
        names.append(f"photos/id{i // 3}/{i % 3}.png")
        (tmp_path / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / names[-1])
    return names


def table_of(folder, cells):
    """A table of pairs, in which cells[i] names an item in turn in each of several ways."""
    turns = dict.fromkeys(range(len(cells)), 0)

    def cell(i):
        turns[i] += 1
        return str(cells[i][turns[i] % len(cells[i])])

    pairs = pair_rows(np.arange(len(cells)) // 3, n_dissimilar=60)
    return str(write_csv(folder / "p.csv", HEADER, [(cell(a), cell(b), s) for a, b, s in pairs]))


@pytest.mark.parametrize("way", ["absolute", "roundabout", "link", "folder link", "hard link"])
def test_a_file_under_two_paths_is_one_item(tmp_path, photos, way, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that the table itself has a relative path
    plain = read_data(table_of(tmp_path, [[name] for name in photos]))
    (tmp_path / "all").symlink_to(tmp_path / "photos")
    cells = []
    for i, name in enumerate(photos):
        if way.endswith("link"):
            (tmp_path / f"s{i}.png").symlink_to(tmp_path / name)
            os.link(tmp_path / name, tmp_path / f"h{i}.png")
        other = {
            "absolute": tmp_path / name,
            "roundabout": name.replace("photos/", "photos/../all/./"),
            "link": f"s{i}.png",
            "folder link": name.replace("photos/", "all/"),
            "hard link": f"h{i}.png",
        }[way]
        cells.append([name, other])
    table_of(tmp_path, cells)
    found = read_data("p.csv")
    assert len(found.items.content.x) == len(photos)
    assert len(found.items.identities) == 6
    assert found.digest() == plain.digest()
    split_pairs(found, calibration=0.2, test=0.2, seed=0)


def test_a_file_is_not_dissimilar_to_itself_by_another_name(nearfar, tmp_path, photos):
    rows = [(photos[0], photos[1], "true"), (photos[0], tmp_path / photos[0], "false")]
    done = nearfar("train", write_csv(tmp_path / "p.csv", HEADER, rows), "--out", tmp_path / "run")
    assert f"p.csv, line 3: {photos[0]} and {tmp_path / photos[0]} are the same file" in done.err


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_under_two_identities_is_refused(nearfar, tmp_path, photos, link):
    link(tmp_path / photos[0], tmp_path / "photos" / "id1" / "again.png")
    done = nearfar("train", tmp_path / "photos", "--out", tmp_path / "run")
    assert done.status == 2
    for words in (
        "photos/id0/0.png and ",
        "photos/id1/again.png are the same file",
        "'id0' and 'id1'",
    ):
        assert words in done.err
    assert not (tmp_path / "run").exists()


def test_one_file_twice_in_one_identity_is_one_item(tmp_path, photos):
    before = read_data(str(tmp_path / "photos"))
    (tmp_path / "photos" / "id1" / "again.png").symlink_to(tmp_path / photos[3])
    assert read_data(str(tmp_path / "photos")).digest() == before.digest()


def test_backslashes_are_slashes_where_there_is_no_such_name(tmp_path, photos):
    plain = read_data(table_of(tmp_path, [[name] for name in photos]))
    found = read_data(table_of(tmp_path, [[f".\\{n}".replace("/", "\\")] for n in photos]))
    assert found.digest() == plain.digest()
    Image.new("L", (8, 8), 7).save(tmp_path / "photos\\id0\\0.png")  # a name, though an odd one
    odd = read_data(table_of(tmp_path, [[name.replace("/", "\\")] for name in photos]))
    assert len(odd.items.content.x) == len(photos)
    assert odd.items.content.x[odd.a[0]].unique().tolist() == [7]


@pytest.mark.parametrize(("there", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_in_either_form_of_unicode(tmp_path, photos, there, written):
    accented = [name.replace("photos", "données").replace("id", "é") for name in photos]
    for name, other in zip(photos, accented, strict=True):
        path = tmp_path / normalize(there, other)
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).rename(path)
    cells = [[normalize(written, name), normalize(there, name)] for name in accented]
    found = read_data(table_of(tmp_path, cells))
    assert len(found.items.content.x) == len(photos)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("photos/id0/0.PNG", "photos/id0 has '0.png', not '0.PNG'"),
        ("Photos\\id0\\0.png", "has 'photos', not 'Photos'"),
        ("photos/id0/0.jpg", "photos/id0 has no '0.jpg'"),
        ("pictures/0.jpg", "has no 'pictures'"),
        ("photos/id0/0.png/1.png", "photos/id0/0.png is a file"),
        ("photos/loop.png", "photos/loop.png; it is a folder"),
        ("photos/caf\u00e9.png", "photos has 'Cafe\\u0301.png', not 'caf\\xe9.png'"),
        ("C:\\photos\\0.png", "has no 'C:'"),
    ],
)
def test_a_missing_image_is_told_what_is_there(nearfar, tmp_path, photos, cell, says):
    (tmp_path / "photos" / "loop.png").mkdir()
    (tmp_path / "photos" / "Cafe\u0301.png").touch()
    rows = [(photos[0], photos[1], "true"), (photos[0], cell, "false")]
    table = write_csv(tmp_path / "p.csv", HEADER, rows)
    done = nearfar("train", table, "--out", tmp_path / "run")
    assert done.status == 2
    assert "p.csv, line 3: b: no such image: " in done.err
    assert says in done.err
    assert "(paths start at the table)" in done.err


def test_a_name_that_no_file_can_have_is_missing(nearfar, tmp_path, photos):
    table = write_csv(tmp_path / "p.csv", HEADER, [(photos[0], "n" * 5000 + ".png", "true")])
    done = nearfar("train", table, "--out", tmp_path / "run", "--steps", 1)
    assert "p.csv, line 2: b: no such image" in done.error
    assert len(done.error) < 500
