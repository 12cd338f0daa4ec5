"""`nearfar audit` finds what was planted, and little where nothing was; `train --drop` obeys."""

import csv
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK, make_images
from PIL import Image

from nearfar.app.audit import audit, spaces
from nearfar.app.audit.findings import Audit, Finding
from nearfar.app.audit.judge import judge
from nearfar.app.data.drop import read_drop
from nearfar.app.data.items import read_data

N, ITEMS = 30, 8


def planted(seed=0, dim=32):
    """Identities that are well apart."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(N, 1, dim)) + 0.5 * random.normal(size=(N, ITEMS, dim))
    return x.reshape(-1, dim).astype(np.float32), np.arange(N).repeat(ITEMS)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Save vectors as data.npz in the current folder; each item is named after its row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spaces, "STEPS", 30)

    def save(x, y):
        names = np.array([f"item {row}" for row in range(len(x))])
        np.savez("data.npz", x=x, y=np.array([f"p{i:02}" for i in y]), names=names)
        return "data.npz"

    return save


def looked(source, **how):
    return audit(str(source), say=lambda text: None, **how)


def of_kind(found, what):
    return [finding for finding in found.findings if finding.what == what]


@pytest.mark.parametrize("seed", range(3))
def test_clean_data_gives_next_to_nothing(data, seed):
    """At most 1 % of the items are doubted, and no other kind of finding is made."""
    found = looked(data(*planted(seed)))
    assert len(of_kind(found, "label")) <= 0.01 * N * ITEMS
    assert {finding.what for finding in found.findings} <= {"label"}


def test_changed_labels_are_found_with_the_identity_they_belong_to(data):
    x, y = planted()
    rows = np.random.default_rng(1).permutation(len(y))[:12]
    wrong = y.copy()
    wrong[rows] = (y[rows] + 1 + np.arange(12)) % N
    found = of_kind(looked(data(x, wrong)), "label")
    assert {f.name for f in found[:12]} == {f"item {row}" for row in rows}
    for finding in found[:12]:
        row = int(finding.name.split()[1])
        assert finding.identity == f"p{wrong[row]:02}"
        assert finding.suggested == f"p{y[row]:02}"
        assert y[int(finding.other.split()[1])] == y[row]
        assert finding.drop
    assert [f.confidence for f in found] == sorted((f.confidence for f in found), reverse=True)


def test_an_item_alone_in_its_identity_is_not_judged(data):
    x, y = planted()
    y[0] = N
    assert "item 0" not in {f.name for f in of_kind(looked(data(x, y)), "label")}


def test_copies_within_an_identity_and_across_two(data):
    x, y = planted()
    x[3] = x[1]
    x[ITEMS] = x[5]
    x[2 * ITEMS] = x[6] + 1e-3
    found = looked(data(x, y))
    (within,) = of_kind(found, "duplicate")
    assert (within.name, within.other, within.drop) == ("item 3", "item 1", True)
    shared = {frozenset((f.name, f.other)): f for f in of_kind(found, "shared")}
    exact, near = (frozenset(("item 5", "item 8")), frozenset(("item 6", "item 16")))
    assert shared.keys() == {exact, near}
    assert shared[exact].detail == "equal"
    assert shared[near].detail.startswith("cosine distance")
    assert not shared[exact].drop
    assert not shared[near].drop


def test_one_identity_under_two_names_and_two_under_one(data):
    x, y = planted()
    y[: ITEMS // 2] = N  # half of identity 0
    y[y == 3] = 2
    found = looked(data(x, y))
    (one,) = of_kind(found, "merge")
    assert {one.identity, one.suggested} == {"p00", f"p{N}"}
    (two,) = of_kind(found, "split")
    assert two.identity == "p02"
    assert {int(name.split()[1]) // ITEMS for name in (two.name, two.other)} == {2, 3}
    assert "8 + 8 items" in two.detail
    assert not one.drop
    assert not two.drop
    assert not [f for f in of_kind(found, "label") if f.identity in ("p00", f"p{N}")]


def test_two_in_one_is_found_beside_wrong_labels_and_identities_that_are_one(data):
    """Errors of other kinds do not count against how well identities are told apart."""
    x, y = planted()
    rows = np.random.default_rng(1).permutation(np.arange(10 * ITEMS, len(y)))[:16]
    wrong = y.copy()
    wrong[rows] = (y[rows] + 1 + np.arange(16)) % N
    wrong[: 4 * ITEMS : 2] = N + y[: 4 * ITEMS : 2]  # four identities under two names each
    wrong[y == 9] = 8
    assert judge(torch.from_numpy(x - x.mean(0)), torch.from_numpy(wrong)).agreement() < 0.88
    found = looked(data(x, wrong))
    assert [two.identity for two in of_kind(found, "split")] == ["p08"]
    assert len(of_kind(found, "merge")) >= 3
    assert found.notes == ()


def test_a_check_that_is_not_made_is_said(nearfar, data):
    x, y = planted()
    x += 2 * np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    source = data(x, y)
    says = (
        r"not checked for identities that are two: as they are, only \d+ % of the items are likest "
        r"their own \(90 % are needed\)"
    )
    done = nearfar("audit", source)
    assert re.match(says, done.out.splitlines()[-1])
    assert done.out.endswith("Correct what was found and audit again, or add --run RUN.\n")
    done = nearfar("audit", source, "--json")
    (note,) = json.loads(done.out)["notes"]
    assert re.match(says, note)
    done = nearfar("train", source, "--out", "run", *QUICK, "--steps", 2)
    assert done.status == 0, done.err
    (note,) = json.loads(nearfar("audit", source, "--run", "run", "--json").out)["notes"]
    assert re.match(says.replace("as they are", "by run"), note)


def test_rows_that_cannot_be_used(data):
    x, y = planted()
    x[4, 2], x[5] = np.nan, 0
    found = of_kind(looked(data(x, y)), "broken")
    assert [(f.name, f.detail, f.drop) for f in found] == [
        ("item 4", "it holds NaN or infinity.", True),
        ("item 5", "all of its numbers are equal.", True),
    ]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of 12 identities with 4 images each, and a broken file of each kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spaces, "STEPS", 5)
    for row, image in enumerate(make_images()):
        place = tmp_path / "photos" / f"p{row // 4:02}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{row % 4}.png")
    place = tmp_path / "photos" / "p00"
    (place / "empty.png").write_bytes(b"")
    (place / "zeros.png").write_bytes(bytes(100))
    (place / "text.png").write_text("<html>")
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:-60])
    Image.new("L", (16, 16), 77).save(place / "grey.png")
    return tmp_path / "photos"


def test_all_broken_files_are_listed_and_train_leaves_them_out(nearfar, photos):
    done = nearfar("audit", "photos", "--out", "audit.csv", "--json")
    assert done.status == 0, done.err
    said = json.loads(done.out)
    broken = {f["name"]: f["detail"] for f in said["findings"] if f["what"] == "broken"}
    assert broken.keys() == {f"p00/{n}.png" for n in ("cut", "empty", "grey", "text", "zeros")}
    assert broken["p00/empty.png"].startswith("it is empty")
    assert broken["p00/grey.png"] == "it is of one colour."
    assert all("photos" not in detail for detail in broken.values())
    assert said["n_items"] == 48 + 5
    assert broken.keys() <= read_drop(photos.parent / "audit.csv")
    assert nearfar("train", "photos", "--out", "run", *QUICK).status == 2
    done = nearfar("train", "photos", "--drop", "audit.csv", "--out", "run", *QUICK)
    assert done.status == 0, done.err
    assert 'drop = "audit.csv"' in (photos.parent / "run/config.toml").read_text()
    again = nearfar("train", "--config", "run/config.toml", "--out", "again")
    assert again.status == 0, again.err
    for name in ("model.safetensors", "threshold.json"):
        first, second = (photos.parent / folder / name for folder in ("run", "again"))
        assert first.read_bytes() == second.read_bytes()
    assert nearfar("evaluate", "run").status == 0


def test_the_table_is_the_same_in_both_forms_and_in_json(nearfar, data):
    x, y = planted()
    x[3] = x[1]
    source = data(x, y)
    done = nearfar("audit", source, "--out", "audit.csv")
    assert done.status == 0, done.err
    assert "\n1 copy within an identity:" in done.out
    assert "nearfar train data.npz --drop audit.csv --out RUN" in done.out
    assert nearfar("audit", source, "--out", "audit.csv").status == 2
    done = nearfar("audit", source, "--out", "audit.parquet", "--json")
    said = json.loads(done.out)["findings"]
    assert pq.read_table("audit.parquet").to_pylist() == said
    with open("audit.csv", newline="", encoding="utf-8-sig") as file:  # noqa: PTH123
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one["name"] for one in said]
    assert [row["drop"] for row in rows] == [str(one["drop"]).lower() for one in said]


def test_a_spreadsheet_reads_the_letters_of_a_table(tmp_path):
    found = Audit("data.npz", 2, 2, [Finding("label", "Zoë", "p1", drop=True)])
    found.write(tmp_path / "audit.csv")
    assert (tmp_path / "audit.csv").read_bytes().startswith(b"\xef\xbb\xbfwhat,name,")
    assert read_drop(tmp_path / "audit.csv") == {"Zoë"}


def test_what_is_printed_next_can_be_pasted(nearfar, data, tmp_path):
    x, y = planted()
    x[3] = x[1]
    (tmp_path / data(x, y)).rename("my data.npz")
    done = nearfar("audit", "my data.npz", "--out", "my audit.csv")
    assert done.out.endswith(
        "look at them, then: nearfar train 'my data.npz' --drop 'my audit.csv' --out RUN\n"
    )


def test_an_audit_that_finds_nothing_proposes_nothing(nearfar, data):
    x = np.eye(N, dtype=np.float32).repeat(ITEMS, 0)
    x += 0.01 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    done = nearfar("audit", data(x, np.arange(N).repeat(ITEMS)), "--out", "audit.csv")
    assert done.out.endswith("\nwrote audit.csv: 0 findings\n")


def test_dropped_identities_vanish_with_a_note(data, tmp_path):
    source = data(*planted())
    items = read_data(source, drop={f"item {row}" for row in range(ITEMS + 1)})
    assert len(items.names) == N * ITEMS - ITEMS - 1
    assert items.identities[0] == "p01"
    assert items.identity.bincount().tolist() == [ITEMS - 1, *[ITEMS] * (N - 2)]
    assert items.notes[-1].endswith("and with them all of 1 identities: p00")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name\nitem 1\nnobody\n", "--drop names 1 of 2 items that data.npz does not hold: 'nob"),
        ("other\nitem 1\n", "drop.csv has no column 'name'"),
        ("name,drop\nitem 1,7\n", "drop must be true or false in every row"),
        ("name,drop\n,true\n", "name is empty"),
    ],
)
def test_a_drop_list_that_cannot_be_used(nearfar, data, tmp_path, text, says):
    source = data(*planted())
    (tmp_path / "drop.csv").write_text(text)
    done = nearfar("train", source, "--drop", "drop.csv", "--out", "run", *QUICK)
    assert done.status == 2
    assert says in done.error
    assert not (tmp_path / "run").exists()


def test_only_rows_marked_in_the_table_are_dropped(tmp_path):
    (tmp_path / "a.csv").write_text("what,name,drop\nlabel,one,true\nsplit,two,false\n")
    assert read_drop(tmp_path / "a.csv") == {"one"}
    (tmp_path / "b.csv").write_text("what,name,drop\n")
    assert read_drop(tmp_path / "b.csv") == set()


def test_what_cannot_be_audited(nearfar, data, tmp_path):
    (tmp_path / "pairs.csv").write_text("a,b,label\n0 1,1 0,true\n")
    assert "is a table of pairs" in nearfar("audit", "pairs.csv").err
    assert "does not exist" not in nearfar("audit", "pairs.csv").err
    source = data(*planted())
    assert "must end in .csv" in nearfar("audit", source, "--out", "a.txt").error
    assert "no such run folder" in nearfar("audit", source, "--run", "none").err
    x, _ = planted()
    assert "a single identity" in nearfar("audit", data(x, np.zeros(len(x), int))).err
