"""Who goes to which side, and which pairs are never measured."""

import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK, make_vectors, pair_rows, write_csv

from nearfar.app.data.groups import connected, merged_groups
from nearfar.app.data.items import Items, Pairs, read_data
from nearfar.app.errors import InputError
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.prepare import split_data
from nearfar.app.train.recorder import moments
from nearfar.app.train.run import read_results
from nearfar.app.train.split import (
    _distribute,
    rows_to_measure,
    rows_within,
    split_items,
    split_pairs,
)

SHARES = {"calibration": 0.2, "test": 0.2}
SIDES = ("train", "calibration", "test")
TINY = ("--steps", "3", "--identities", "8", "--items", "2", "--embedding-dim", "4")


def sides_of(split):
    return [getattr(split, side) for side in SIDES]


def pairs_of(rows, n):
    a, b, similar = (torch.tensor(column) for column in zip(*rows, strict=True))
    identity = connected(n, a, b, similar)
    names = [f"identity {i}" for i in range(int(identity.max()) + 1)]
    items = Items(torch.zeros(n, 2), identity, [""] * n, names)
    return Pairs(items, a, b, similar, [""] * len(a))


def signatures(seed, n_writers=10, *, least=2, most=60):
    """Genuine and forged signatures: dissimilar pairs lie within a writer, genuine against forged.

    Returns the pairs, and the writer of each item.
    """
    random = np.random.default_rng(seed)
    rows, writer = [], []
    for w in range(n_writers):
        n_genuine, n_forged = random.integers(5, 25), random.integers(least, most)
        first, n = len(writer), len(writer) + n_genuine
        rows += [(first, item, True) for item in range(first + 1, n)]
        forged = range(n, n + n_forged)
        rows += [(int(random.integers(first, n)), item, False) for item in forged]
        writer += [w] * (n_genuine + n_forged)
    return pairs_of(rows, len(writer)), np.array(writer)


@pytest.mark.parametrize("n_writers", [3, 4, 10, 40])
def test_no_genuine_or_forged_pair_of_a_writer_is_lost(n_writers):
    for seed in range(20):
        pairs, writer = signatures(seed, n_writers)
        sides = sides_of(split_pairs(pairs, **SHARES, seed=seed))  # none is refused
        rows = [rows_within(pairs, side) for side in sides]
        assert sum(map(len, rows)) == len(pairs.a)  # and no pair is lost
        writers = [set(writer[pairs.a[row]]) for row in rows]
        assert sum(map(len, writers)) == n_writers  # no writer is on two sides
        for row in rows:
            assert set(pairs.similar[row].tolist()) == {True, False}


def test_shares_are_kept_where_writers_allow_it():
    for seed in range(20):
        pairs, _ = signatures(seed, 40)
        split = split_pairs(pairs, **SHARES, seed=seed)
        for side in ("calibration", "test"):
            share = len(getattr(split, side)) / len(pairs.items.identities)
            assert share == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("large", range(4))
def test_a_large_writer_is_trained_on(large):
    """Nine of ten identities are of one writer; whoever comes first, the others are measured on."""
    rows, n = [], 0
    for w in range(4):
        n_forged = 90 if w == large else 3
        rows += [(n, n + 1, True), *((n, n + 2 + k, False) for k in range(n_forged))]
        n += 2 + n_forged
    pairs = pairs_of(rows, n)
    for seed in range(10):
        split = split_pairs(pairs, **SHARES, seed=seed)
        assert len(split.train) >= 90
        assert sum(len(rows_within(pairs, side)) for side in sides_of(split)) == len(rows)


def test_kinds_of_pairs_in_clusters_of_their_own_are_dealt_to_every_side():
    """As in a table of texts, where each pair is of two items that no other pair has."""
    for seed in range(20):
        n = 8
        rows = [(2 * i, 2 * i + 1, i % 2 == 0) for i in range(n)]
        pairs = pairs_of(rows, 2 * n)
        split = split_pairs(pairs, **SHARES, seed=seed)
        for side in sides_of(split):
            assert set(pairs.similar[rows_within(pairs, side)].tolist()) == {True, False}


def test_sides_are_filled_wherever_bundles_can_fill_them():
    """Each side needs a bundle that brings both of two things, or one for each of them."""
    random, filled = np.random.default_rng(0), 0
    for seed in range(1500):
        n = random.integers(3, 9)
        brings, sizes = random.integers(0, 2, (n, 2)).astype(bool), random.integers(1, 12, n)
        both, (first, second) = brings.all(1).sum(), brings.sum(0)
        if both + min(first - both, second - both) < 3:
            continue
        bundles, filled = np.repeat([f"{i}" for i in range(n)], sizes), filled + 1
        brought = np.repeat(brings, sizes, 0)
        sides = _distribute(bundles, brought, {"test": 0.2, "calibration": 0.2}, seed, fewest=1)
        assert all(len(set(sides[bundles == bundle])) == 1 for bundle in bundles)
        assert all(brought[sides == side].any(0).all() for side in SIDES)
    assert filled > 300


def test_random_pairs_of_many_identities_do_not_all_go_to_one_side():
    """Nearly all are one cluster then, and the few small ones would leave little to measure on."""
    random = np.random.default_rng(0)
    near = [(2 * i, 2 * i + 1, True) for i in range(500)]
    far = [(2 * a, 2 * b, False) for a, b in random.integers(0, 500, (750, 2)).tolist() if a != b]
    pairs = pairs_of(near + far, 1000)
    split = split_pairs(pairs, **SHARES, seed=0)
    assert len(split.test) == len(split.calibration) == 100
    n = sum(len(rows_within(pairs, side)) for side in sides_of(split))
    assert len(near) < n < len(near) + len(far)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def table(path, columns):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return str(path)
    return str(write_csv(path, columns, zip(*columns.values(), strict=True)))


def cells_of(x):
    return [" ".join(f"{value:.4f}" for value in row) for row in x]


def pair_columns(n_identities=24, n_items=4, **named):
    """Columns of a table of pairs, and with each name columns for a and b from (n,) of the items.

    Dissimilar pairs lie within four identities that follow one another.
    """
    x, y = make_vectors(n_identities, n_items)
    block = y // 4
    pairs = [row for row in pair_rows(y, 4000) if block[row[0]] == block[row[1]]]
    a, b, similar = (np.array(column) for column in zip(*dict.fromkeys(pairs), strict=True))
    cells = np.array(cells_of(x))
    columns = {"a": cells[a].tolist(), "b": cells[b].tolist(), "label": similar.tolist()}
    for name, of_item in named.items():
        columns[f"{name}_a"], columns[f"{name}_b"] = of_item[a].tolist(), of_item[b].tolist()
    return columns


@pytest.mark.parametrize("kind", ["whole numbers", "text", "bytes"])
def test_split_groups_of_arrays_stay_on_one_side(tmp_path, kind):
    x, y = make_vectors(n_identities=40, n_items=4)
    site = y % 8
    of = {
        "whole numbers": site - 3,
        "text": np.array([f"site {s}" for s in site]),
        "bytes": np.array([b"site %d" % s for s in site]),
    }[kind]
    items = read_data(npz(tmp_path / "v.npz", x=x, y=y, split_groups=of))
    for seed in range(10):
        sides = sides_of(split_items(items, **SHARES, seed=seed))
        sites = [{int(i) % 8 for i in side} for side in sides]
        assert sum(map(len, sides)) == 40
        assert sum(map(len, sites)) == 8


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("columns", ["one", "two"])
def test_split_groups_of_tables_stay_on_one_side(tmp_path, suffix, columns):
    """Two blocks of dissimilar pairs are of one site, which no pair says."""
    _, y = make_vectors(24, 4)
    site = y // 8
    held = pair_columns(split_groups=np.array([f"site {s}" for s in site]))
    if columns == "one":
        held["split_groups"] = held.pop("split_groups_a")
        del held["split_groups_b"]
    pairs = read_data(table(tmp_path / f"p{suffix}", held))
    of_item = defaultdict(set)
    names = held["split_groups" if columns == "one" else "split_groups_a"]
    for item, name in zip(pairs.a.tolist(), names, strict=True):
        of_item[int(pairs.items.identity[item])].add(name)
    for seed in range(10):
        sides = sides_of(split_pairs(pairs, **SHARES, seed=seed))
        sites = [set().union(*(of_item[int(i)] for i in side)) for side in sides]
        assert [len(names) for names in sites] == [1, 1, 1]


def test_an_identity_of_two_groups_binds_them():
    identity = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    names = ["b", "a", "a", "b", "c", "", ""]
    assert merged_groups(identity, names, 6) == ["a + b", "a + b", "a + b", "c", "", ""]


def test_too_few_split_groups_are_refused(tmp_path):
    x, y = make_vectors(n_identities=40, n_items=4)
    items = read_data(npz(tmp_path / "v.npz", x=x, y=y, split_groups=y % 2))
    with pytest.raises(InputError, match="40 identities in groups that stay together are too few"):
        split_items(items, **SHARES, seed=0)
    three = read_data(npz(tmp_path / "v.npz", x=x, y=y, split_groups=y % 3))
    for seed in range(10):  # each larger than a fifth, and yet each side gets one
        assert {len(side) for side in sides_of(split_items(three, **SHARES, seed=seed))} <= {13, 14}


def test_writing_systems_are_named_and_so_are_groups(nearfar, tmp_path):
    x, y = make_vectors(n_identities=40, n_items=4)
    data = npz(tmp_path / "v.npz", x=x, y=y, split_groups=np.array([f"site {i % 8}" for i in y]))
    done = nearfar("train", data, "--out", tmp_path / "run", *TINY, "--no-report")
    assert done.status == 0, done.err
    assert "(test: site " in done.out


def camera_of(n_identities, n_items):
    """(n,) the camera of each item: the first half of an identity's items are of one."""
    item = np.tile(np.arange(n_items), n_identities)
    return np.where(item < n_items // 2, "left", "right")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_pairs_within_a_group_are_not_measured(nearfar, tmp_path, suffix):
    camera = camera_of(24, 4)
    held = pair_columns(groups=camera)
    data = table(tmp_path / f"p{suffix}", held)
    pairs = read_data(data)
    across = torch.tensor([a != b for a, b in zip(held["groups_a"], held["groups_b"], strict=True)])
    split = split_pairs(pairs, **SHARES, seed=0)
    assert rows_to_measure(pairs, split.test).tolist() == [
        row for row in rows_within(pairs, split.test).tolist() if across[row]
    ]
    done = nearfar("train", data, "--out", tmp_path / "run", *TINY, "--no-report")
    assert done.status == 0, done.err
    assert f"; {int((~across).sum()):,} pairs within one group" in done.out
    tested = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    measured = across[rows_within(pairs, split.test)].sum()
    assert tested["n_similar"] + tested["n_dissimilar"] == measured
    found = json.loads(nearfar("evaluate", tmp_path / "run", data, "--json").out)
    assert found["n_similar"] + found["n_dissimilar"] == across.sum()


def test_one_column_of_groups_is_of_both_items(nearfar, tmp_path):
    held = pair_columns()
    here = [index % 3 == 0 for index in range(len(held["a"]))]
    lone = ["", "session 1"]
    rows = {**held, "groups": [lone[same] for same in here]}
    rows["a"] = [f"{a} {row}" for row, a in enumerate(held["a"])]  # each item in one pair only
    rows["b"] = [f"{b} {-row}" for row, b in enumerate(held["b"])]
    pairs = read_data(table(tmp_path / "p.csv", rows))
    measured = rows_to_measure(pairs, torch.arange(len(pairs.items.identities)))
    assert measured.tolist() == [row for row, same in enumerate(here) if not same]
    every = table(tmp_path / "q.csv", {**held, "groups": ["session 1"] * len(held["a"])})
    done = nearfar("train", every, "--out", tmp_path / "run", *TINY)
    assert "those within one group are not measured" in done.err


def test_an_empty_group_is_no_group(tmp_path):
    held = pair_columns(groups=np.full(96, " "))
    assert read_data(table(tmp_path / "p.csv", held)).items.groups.unique().shape == (96,)
    pairs = read_data(table(tmp_path / "p.csv", held))
    assert pairs.items.comparable(pairs.a, pairs.b).all()


def test_groups_of_arrays(tmp_path):
    x, y = make_vectors(10, 4)
    for camera in (camera_of(10, 4), (camera_of(10, 4) == "left").astype(np.int8)):
        items = read_data(npz(tmp_path / "v.npz", x=x, y=y, groups=camera))
        a, b = torch.combinations(torch.arange(40)).T
        across = torch.from_numpy(camera[a] != camera[b])
        assert torch.equal(items.comparable(a, b), across)
        assert items.can_be_similar().all()
    lone = np.where(y < 4, "left", camera_of(10, 4))
    items = read_data(npz(tmp_path / "v.npz", x=x, y=y, groups=lone))
    assert items.can_be_similar().tolist() == [False] * 4 + [True] * 6


def test_every_side_can_show_what_is_the_same_across_groups(nearfar, tmp_path):
    """Of most identities there are items of one camera only."""
    x, y = make_vectors(40, 12)
    camera = np.where((y >= 6) | (np.tile(np.arange(12), 40) < 11), "left", "right")
    data = npz(tmp_path / "v.npz", x=x, y=y, groups=camera)
    items = read_data(data)
    able = items.can_be_similar()
    assert int(able.sum()) == 6
    for seed in range(20):
        for side in sides_of(split_items(items, **SHARES, seed=seed)):
            assert able[side].any()
    done = nearfar("train", data, "--out", tmp_path / "run", *TINY)
    assert done.status == 0, done.err
    none = npz(tmp_path / "none.npz", x=x, y=y, groups=y)
    done = nearfar("train", none, "--out", tmp_path / "none", *TINY)
    assert "no identity with two items of different groups" in done.err


def test_the_recorder_measures_no_pair_within_a_group(tmp_path, nearfar, monkeypatch):
    from nearfar.app.train import recorder

    x, y = make_vectors(20, 20)
    camera = camera_of(20, 20)  # the first eight items of an identity are of one camera
    data = npz(tmp_path / "v.npz", x=x, y=y, groups=camera)
    seen = []
    monkeypatch.setattr(recorder, "_sample", keeping(recorder._sample, seen))
    assert nearfar("train", data, "--out", tmp_path / "run", *TINY, "--no-report").status == 0
    (pairs, similar), *_ = seen
    assert (camera[pairs[:, 0]] != camera[pairs[:, 1]]).all()
    assert set(similar.tolist()) == {True, False}
    assert moments(3)


def keeping(function, results):
    def kept(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return kept


@pytest.mark.parametrize("name", ["groups", "split_groups"])
def test_groups_that_cannot_be_read_are_refused(nearfar, tmp_path, name):
    x, y = make_vectors(10, 4)
    for array in (np.zeros(7, int), np.zeros(40), np.zeros((40, 1), int)):
        done = nearfar(
            "train", npz(tmp_path / "v.npz", x=x, y=y, **{name: array}), "--out", tmp_path / "r"
        )
        assert done.status == 2
        assert f"v.npz: {name} has shape {array.shape} and dtype {array.dtype}" in done.err
    rows = {"a": ["1 2", "1 2"], "b": ["3 4", "5 6"], "label": [True, False]}
    for more, words in (
        ({f"{name}_a": "xy", f"{name}_b": "zz"}, ["line 2 and ", "line 3: an item", "'x'", "'y'"]),
        ({name: "xy"}, ["line 2 and ", "in two columns", f"{name}_a and {name}_b"]),
        ({f"{name}_a": "xx"}, [f"no column '{name}_b'"]),
        ({name: "xx", f"{name}_a": "xx"}, [f"has '{name}' and '{name}_a'"]),
    ):
        held = rows | {column: list(values) for column, values in more.items()}
        done = nearfar("train", table(tmp_path / "p.csv", held), "--out", tmp_path / "r")
        assert done.status == 2
        for word in words:
            assert word in done.err


def test_groups_are_part_of_the_data_and_a_split_is_kept(nearfar, tmp_path, monkeypatch):
    """A run is measured on the identities that it recorded, whatever this version would choose."""
    x, y = make_vectors(40, 8)
    data = npz(tmp_path / "v.npz", x=x, y=y)
    run = tmp_path / "run"
    assert nearfar("train", data, "--out", run, *QUICK).status == 0
    before = nearfar("evaluate", run, "--json").out
    config = read_results(run).config
    other = split_data(read_data(data), TrainConfig(data, config.loss, seed=7))
    monkeypatch.setattr("nearfar.app.train.use.split_data", lambda *_: other)
    assert nearfar("evaluate", run, "--json").out == before
    npz(tmp_path / "v.npz", x=x, y=y, groups=camera_of(40, 8))
    assert "has changed since" in nearfar("evaluate", run).error
