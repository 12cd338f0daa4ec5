"""`nearfar enroll`, `search` and `gallery`, against numbers computed in float64."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_vectors

from nearfar.app.gallery import change, graph, store
from nearfar.app.gallery.answers import posterior
from nearfar.app.gallery.store import read_gallery, writing
from nearfar.app.train.run import read_run

N_IDENTITIES = 12


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows: the run embeds in 16 numbers or fewer."""
    monkeypatch.setattr(store.Gallery, "block_rows", 16)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with people of the kind that the run was trained on, some of them in two files."""
    x, y = make_vectors(n_identities=N_IDENTITIES, seed=5)
    names = np.array([f"p{i}" for i in y])
    np.savez(tmp_path / "all.npz", x=x, y=names)
    for part, rows in (("one", y < 7), ("two", y >= 7)):
        np.savez(tmp_path / f"{part}.npz", x=x[rows], y=names[rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def enrolled(nearfar, run, source, *more):
    done = nearfar("enroll", run, source, "--out", "g", *more, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out.splitlines()[-1] if "{" not in done.out else done.out)


def searched(nearfar, run, *words):
    done = nearfar("search", run, "g", *words, "--json")
    assert done.status in (0, 1), done.err
    return done.status, json.loads(done.out)


def embedded(nearfar, run, source):
    assert nearfar("embed", run, source, "--out", "e.npz", "--overwrite").status == 0
    with np.load("e.npz") as held:
        return held["x"].astype(np.float64), held["y"]


def content(path="g"):
    """All rows of a gallery, in any order, and the files it has."""
    found = set()
    gallery = read_gallery(Path(path))
    for block in gallery.blocks:
        rows = block.read()
        for i in range(len(rows)):
            found.add((rows.identity[i].decode(), rows.name[i].decode(), rows.x[i].tobytes()))
    assert len(found) == gallery.n
    assert len({one[0] for one in found}) == gallery.n_identities
    named = set().union(*(block.named() for block in gallery.blocks), {"gallery.json", "lock"})
    assert {file.name for file in Path(path).iterdir()} == named
    return found


def test_the_nearest_identities_are_those_of_every_pair(nearfar, vector_run, here, small_blocks):
    said = enrolled(nearfar, vector_run, "all.npz")
    assert (said["identities"], said["rows"], said["added"]) == (N_IDENTITIES, 96, 96)
    assert len(read_gallery(Path("g")).blocks) == 6
    x, y = embedded(nearfar, vector_run, "all.npz")
    queries = [f"two.npz:{i}" for i in range(0, 40, 7)]
    _, found = searched(nearfar, vector_run, *queries, "--k", 4)
    q, _ = embedded(nearfar, vector_run, "two.npz")
    threshold = found["open_set"]["threshold"]
    for query, row, answer in zip(queries, q[::7], found["answers"], strict=True):
        d = 1 - x @ row / np.linalg.norm(row)
        best = {name: d[y == name].min() for name in set(y)}
        nearest = sorted(best, key=best.get)[:4]
        assert answer["query"] == query
        assert [one["identity"] for one in answer["candidates"]] == nearest
        for one in answer["candidates"]:
            assert one["distance"] == pytest.approx(best[one["identity"]], abs=1e-5)
            assert d[int(one["item"].split(":")[1])] == pytest.approx(one["distance"], abs=1e-5)
        assert answer["found"] == (nearest[0] if best[nearest[0]] <= threshold else None)


def test_an_identity_with_many_near_items_hides_no_other(nearfar, vector_run, here):
    """All of its items are nearer than those of others."""
    x, y = embedded(nearfar, vector_run, "all.npz")
    many = np.concatenate([np.repeat(x[:1], 500, 0), x[8:40]])
    names = np.array(["many"] * 500 + y[8:40].tolist())
    np.savez("many.npz", x=many, y=names)
    enrolled(nearfar, vector_run, "many.npz", "--embeddings")
    _, found = searched(nearfar, vector_run, "all.npz:0", "--k", 5)
    named = [one["identity"] for one in found["answers"][0]["candidates"]]
    assert named[0] == "many"
    assert sorted(named[1:]) == ["p1", "p2", "p3", "p4"]


def test_distance_and_likelihood_ratio_are_those_of_verify(nearfar, vector_run, here):
    """In a gallery with one item of each identity."""
    with np.load("one.npz") as held:
        np.savez("single.npz", x=held["x"][::8], y=held["y"][::8])
    enrolled(nearfar, vector_run, "single.npz")
    _, found = searched(nearfar, vector_run, "two.npz:3")
    for one in found["answers"][0]["candidates"]:
        done = nearfar("verify", vector_run, "two.npz:3", one["item"], "--json")
        pair = json.loads(done.out)
        assert one["distance"] == pytest.approx(pair["distance"], abs=1e-6)
        assert one["likelihood_ratio"] == pytest.approx(pair["likelihood_ratio"], rel=1e-4)


def test_what_is_added_is_as_if_it_had_been_there(nearfar, vector_run, here, small_blocks):
    enrolled(nearfar, vector_run, "all.npz")
    at_once = {(a, c) for a, _, c in content()}
    said = enrolled(nearfar, vector_run, "one.npz", "--overwrite")
    assert said["rows"] == 56
    before = {file: file.read_bytes() for file in Path("g").glob("block-*")}
    said = enrolled(nearfar, vector_run, "two.npz", "--add")
    assert (said["added"], said["identities"]) == (40, N_IDENTITIES)
    assert {(a, c) for a, _, c in content()} == at_once
    kept = [file for file in before if file.exists()]
    assert len(kept) == 6  # all but the last block, which was not full
    assert all(file.read_bytes() == before[file] for file in kept)
    for name in ("again", "once"):  # more items of known identities
        shutil.copy("two.npz", f"{name}.npz")
        enrolled(nearfar, vector_run, f"{name}.npz", "--add")
    gallery = read_gallery(Path("g"))
    assert (gallery.n, gallery.n_identities) == (96 + 2 * 40, N_IDENTITIES)
    assert all(block.n == 16 for block in gallery.blocks[:-1])


def test_no_item_is_added_twice(nearfar, vector_run, here, small_blocks):
    """So that a command can be repeated if nobody knows whether it was done."""
    enrolled(nearfar, vector_run, "one.npz")
    enrolled(nearfar, vector_run, "two.npz", "--add")
    before = content()
    done = nearfar("enroll", vector_run, "two.npz", "--out", "g", "--add")
    assert "left out 40 items, there already" in done.out
    assert content() == before
    with np.load("two.npz") as held:  # another item of the same name is added
        np.savez("two.npz", x=np.concatenate([held["x"][:39], held["x"][:1]]), y=held["y"])
    said = enrolled(nearfar, vector_run, "two.npz", "--add")
    assert (said["known"], said["added"], said["rows"]) == (39, 1, 97)


def test_a_removed_identity_is_in_no_file(nearfar, vector_run, here, small_blocks):
    enrolled(nearfar, vector_run, "all.npz")
    every = content()
    gone = {row for row in every if row[0] in ("p2", "p9")}
    done = nearfar("gallery", "g", "--remove", "p9", "--remove", "p2", "--json")
    said = json.loads(done.out)
    assert (said["removed"], said["rows"], said["identities"]) == (16, 80, N_IDENTITIES - 2)
    assert content() == every - gone
    held = b"".join(file.read_bytes() for file in Path("g").iterdir())
    assert not any(row[2] in held or row[0].encode() + b"\0" in held for row in gone)
    assert enrolled(nearfar, vector_run, "all.npz", "--add")["identities"] == N_IDENTITIES
    names = [f"--remove=p{i}" for i in range(N_IDENTITIES)]
    assert nearfar("gallery", "g", *names).status == 0
    assert content() == set()
    done = nearfar("search", vector_run, "g", "all.npz:0")
    assert (done.status, "g is empty" in done.error) == (2, True)


def test_an_unknown_identity_is_not_removed_nor_are_others(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "all.npz")
    before = content()
    done = nearfar("gallery", "g", "--remove", "p1", "--remove", "p111")
    assert done.status == 2
    assert "g holds no identity 'p111'; did you mean 'p11'? Nothing was removed." in done.error
    assert content() == before


def test_the_answer_is_the_exit_status(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "one.npz")
    done = nearfar("search", vector_run, "g", "one.npz:0", "one.npz:9")
    assert done.status == 0, done.out
    assert "one.npz:9: p1, cosine distance 0.0000 <= threshold" in done.out
    assert "of strangers for one of 7 identities (extrapolated from" in done.out
    far = "-9 9 -9 9 0 0 0 0"
    done = nearfar("search", vector_run, "g", far, "one.npz:0", "--far", 1e-6)
    assert done.status == 1, done.out
    assert f"{far}: nobody known; nearest cosine distance" in done.out
    assert done.err.startswith("note: the threshold is a guess: ")
    _, said = searched(nearfar, vector_run, "one.npz:0", "--far", 1e-6)
    assert f"note: {said['notes'][0]}\n" == done.err
    assert nearfar("search", vector_run, "g", "no-such-item").status == 2


def test_probabilities_are_those_of_the_prior(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "all.npz")
    _, alone = searched(nearfar, vector_run, "two.npz:0", "--k", N_IDENTITIES)
    ratios = [one["likelihood_ratio"] for one in alone["answers"][0]["candidates"]]
    for prior in (1e-4, 0.5, 0.99):
        _, found = searched(nearfar, vector_run, "two.npz:0", "--k", N_IDENTITIES, "--prior", prior)
        (answer,) = found["answers"]
        share = prior * np.array(ratios) / N_IDENTITIES
        total = 1 - prior + share.sum()
        given = [one["probability"] for one in answer["candidates"]]
        np.testing.assert_allclose(given, share / total, rtol=1e-6)
        assert answer["nobody"] == pytest.approx((1 - prior) / total)
        assert sum(given) + answer["nobody"] == pytest.approx(1)
    done = nearfar("search", vector_run, "g", "two.npz:0", "--prior", 0.5)
    assert "probability of nobody known: 0." in done.out
    assert (
        "probabilities hold if 0.5 of the queries show somebody in the gallery; who is found "
        "depends on the threshold alone, so the two may disagree\n"
    ) in done.out


def test_identities_that_are_not_listed_count_at_most_as_the_last_that_is():
    shares, nobody = posterior(np.array([50.0, 3.0]), 10, 0.5)
    total = 0.5 + 0.05 * (50 + 3 + 8 * 1)
    np.testing.assert_allclose(shares, [2.5 / total, 0.15 / total])
    assert nobody == pytest.approx(0.5 / total)
    _, nobody = posterior(np.array([50.0, 0.1]), 10, 0.5)
    assert nobody == pytest.approx(0.5 / (0.5 + 0.05 * (50.1 + 8 * 0.1)))


def test_a_large_gallery_has_graphs(nearfar, vector_run, here, small_blocks, monkeypatch):
    pytest.importorskip("usearch")
    monkeypatch.setattr(change, "_LARGE", 90)
    enrolled(nearfar, vector_run, "one.npz")
    assert enrolled(nearfar, vector_run, "two.npz", "--add")["indexed"] == 96
    gallery = read_gallery(Path("g"))
    assert gallery.recall.recall == 1  # of blocks this small, a graph finds all
    words = ("two.npz:0", "two.npz:9", "--k", 3)
    _, found = searched(nearfar, vector_run, *words)
    _, right = searched(nearfar, vector_run, *words, "--exact")
    assert (found.pop("by_graph"), right.pop("by_graph")) == (True, False)
    assert found == right
    done = nearfar("search", vector_run, "g", "two.npz:0")
    assert "searched by graphs, which find 1.0000 of the 10 nearest (measured for 96" in done.out
    assert "96 items are searched by graphs" in nearfar("gallery", "g").out

    (first, *others) = gallery.blocks
    first.path(store.GRAPH).write_bytes(b"damaged")
    others[0].path(store.GRAPH).unlink()
    assert searched(nearfar, vector_run, *words)[1]["answers"] == right["answers"]
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    _, without = searched(nearfar, vector_run, *words)
    assert (without.pop("by_graph"), without) == (False, right)


def test_a_block_that_lost_rows_lost_its_graph(
    nearfar, vector_run, here, small_blocks, monkeypatch
):
    """Which held them too."""
    pytest.importorskip("usearch")
    monkeypatch.setattr(change, "_LARGE", 90)
    enrolled(nearfar, vector_run, "all.npz")
    assert nearfar("gallery", "g", "--remove", "p0").status == 0
    assert [block.indexed for block in read_gallery(Path("g")).blocks] == [False, *[True] * 5]
    content()
    _, found = searched(nearfar, vector_run, "all.npz:8")
    assert found["answers"][0]["candidates"][0]["identity"] == "p1"
    assert enrolled(nearfar, vector_run, "all.npz", "--add")["rows"] == 96
    indexed = [block.indexed for block in read_gallery(Path("g")).blocks]
    assert indexed == [*[True] * 6, False]  # the last is written again when it is filled
    content()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("one.npz", "--out", "g"), "g exists. Add --add to add to it or --overwrite to"),
        (("one.npz", "--out", "g", "--add", "--overwrite"), "Choose one"),
        (("one.npz", "--out", "new", "--add"), "no such gallery: new. Make one"),
        (("one.npz", "--out", "one.npz"), "--out one.npz is the data"),
        (("one.npz", "--out", "RUN/g"), "lies inside the run"),
        (("two.npz", "--out", "one.npz"), "one.npz is a file"),
        (("one.npz", "--out", "other"), "other is not a gallery, and holds 'mine.txt'"),
        (("one.npz", "--out", "two.npz/g"), "cannot be written"),
        (("none.npz", "--out", "new"), "no such file"),
        (("bare.npz", "--out", "new"), "has no array 'y'"),
        (("long.npz", "--out", "new", "--embeddings"), "long.npz, row 0: x has length 2"),
        (("wide.npz", "--out", "new", "--embeddings"), "the embeddings of this run are rows of"),
        (("bare.npz", "--out", "new", "--embeddings"), "bare.npz has no array 'y'; it has: x"),
        (("damaged.npz", "--out", "new", "--embeddings"), "cannot be read as .npz"),
        (("none.npz", "--out", "new", "--embeddings"), "no such file: none.npz"),
        (("cut.npz", "--out", "g", "--add", "--embeddings"), "y has shape (3,)"),
        (("nan.npz", "--out", "g", "--add", "--embeddings"), "nan.npz, row 90: x has length nan"),
    ],
)
def test_what_cannot_be_enrolled_changes_nothing(nearfar, vector_run, here, words, named):
    enrolled(nearfar, vector_run, "one.npz")
    d = read_run(vector_run).config.embedding_dim
    unit = np.eye(d)[np.zeros(100, int)]
    np.savez("wide.npz", x=np.eye(d + 1), y=np.arange(d + 1))
    np.savez("bare.npz", x=unit)
    np.savez("long.npz", x=2 * unit, y=np.arange(100))
    np.savez("cut.npz", x=unit, y=np.arange(3))
    np.savez("nan.npz", x=np.where(np.arange(100)[:, None] == 90, np.nan, unit), y=np.arange(100))
    Path("damaged.npz").write_bytes(b"PK\3\4 and no more")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    before, files = content(), sorted(here.rglob("*"))
    done = nearfar(
        "enroll", vector_run, *(str(word).replace("RUN", str(vector_run)) for word in words)
    )
    assert (done.status, named in done.error) == (2, True), done.err
    assert "Traceback" not in done.err
    assert (content(), sorted(here.rglob("*"))) == (before, files)


def test_embeddings_that_exist_give_the_same_gallery(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "all.npz")
    right = content()
    embedded(nearfar, vector_run, "all.npz")
    assert enrolled(nearfar, vector_run, "e.npz", "--embeddings", "--overwrite")["added"] == 96
    assert content() == right
    with np.load("e.npz") as held:
        np.savez_compressed("bare.npz", x=held["x"].astype(np.float16), y=np.arange(96))
    said = enrolled(nearfar, vector_run, "bare.npz", "--embeddings", "--overwrite")
    assert said["identities"] == 96
    assert {row[:2] for row in content()} == {(str(i), f"bare.npz:{i}") for i in range(96)}


def test_an_interrupted_enrolment_leaves_nothing(nearfar, vector_run, here, monkeypatch):
    def interrupted(rows, embeddings, items):
        raise KeyboardInterrupt

    enrolled(nearfar, vector_run, "one.npz")
    before = content()
    monkeypatch.setattr(store.Rows, "save", interrupted)
    for more in (["g", "--add"], ["g", "--overwrite"], ["new"]):
        done = nearfar("enroll", vector_run, "two.npz", "--out", *more)
        assert done.status == 130
        assert done.error == "nearfar: error: interrupted; nothing unfinished is left"
    assert content() == before
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("9 requested and 5 written"), "the disk may be full (9 requested and 5 written)"),
    ],
    ids=["system", "numpy"],
)
def test_a_full_disk_leaves_the_gallery_as_it_was(
    nearfar, vector_run, here, monkeypatch, error, reason
):
    def full(*_):
        raise error

    enrolled(nearfar, vector_run, "one.npz")
    before = content()
    for owner, name in ((store.Rows, "save"), (store.Gallery, "as_dict")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, full)
            done = nearfar("enroll", vector_run, "two.npz", "--out", "g", "--add")
        expected = f"g cannot be written: {reason}. The gallery is as it was."
        assert (done.status, done.error) == (2, f"nearfar: error: {expected}")
        assert content() == before


def test_a_second_writer_is_refused_and_a_search_is_not(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "one.npz")
    before = content()
    with writing(Path("g")):
        done = nearfar("enroll", vector_run, "two.npz", "--out", "g", "--add")
        assert (done.status, "g is being written by another process" in done.error) == (2, True)
        assert nearfar("gallery", "g", "--remove", "p0").status == 2
        assert nearfar("search", vector_run, "g", "one.npz:0").status == 0
    assert content() == before
    enrolled(nearfar, vector_run, "two.npz", "--add")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "g exists. Add --add to add to it"),
        (["--add"], "g holds embeddings of another network"),
    ],
)
def test_what_another_process_wrote_meanwhile_is_kept(
    nearfar, vector_run, here, monkeypatch, more, named
):
    from nearfar.app.gallery import enroll

    if more:
        enrolled(nearfar, vector_run, "one.npz")
    embed = enroll.embedded

    def while_another_writes(*given, **options):
        with writing(Path("g")):
            other = store.Gallery(Path("g"), "another network", "cosine", 2)
            rows = store.Rows(
                np.eye(2, dtype=np.float32), np.array([b"a"] * 2), np.array([b"b"] * 2)
            )
            change.add(other, [rows], print)
        return embed(*given, **options)

    monkeypatch.setattr(enroll, "embedded", while_another_writes)
    done = nearfar("enroll", vector_run, "two.npz", "--out", "g", *more)
    assert (done.status, named in done.error) == (2, True), done.err
    assert read_gallery(Path("g")).run == "another network"


def test_files_of_others_are_left_alone(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "one.npz")
    others = ["block-000002 (backup).x.npy", "block-1 copy.txt", "block-7.x.npy", "block-a.usearch"]
    for name in others:
        Path("g", name).write_text("mine")
    Path("g/block-000007.x.npy").write_text("left by a process that was killed")
    enrolled(nearfar, vector_run, "two.npz", "--add")
    assert nearfar("gallery", "g", "--remove", "p0").status == 0
    assert [Path("g", name).read_text() for name in others] == ["mine"] * 4
    assert not Path("g/block-000007.x.npy").exists()
    for name in others:
        Path("g", name).unlink()
    content()


def test_a_search_goes_on_where_another_process_replaced_blocks(
    nearfar, vector_run, here, monkeypatch
):
    from nearfar.app.gallery import answers

    enrolled(nearfar, vector_run, "one.npz")
    of, calls = answers.gallery_of, []

    def changed_after(run, path):
        found = of(run, path)
        if not calls:
            calls.append(path)
            with writing(path):
                change.remove(read_gallery(path), ["p0"])
        return found

    monkeypatch.setattr(answers, "gallery_of", changed_after)
    _, found = searched(nearfar, vector_run, "one.npz:0", "--k", 20)
    assert len(found["answers"][0]["candidates"]) == found["identities"] == 6


def test_a_gallery_of_another_network_is_refused(nearfar, vector_run, here, vectors):
    from conftest import QUICK

    enrolled(nearfar, vector_run, "one.npz")
    assert nearfar("train", vectors, "--out", "other", *QUICK, "--seed", 1).status == 0
    for words in (
        ["search", "other", "g", "one.npz:0"],
        ["enroll", "other", "two.npz", "--out", "g", "--add"],
    ):
        done = nearfar(*words)
        assert done.status == 2
        assert "g holds embeddings of another network than that of other" in done.error


def test_an_older_run_says_what_it_lacks(nearfar, vector_run, here):
    shutil.copytree(vector_run, "old")
    Path("old/calibration.npz").unlink()
    done = nearfar("enroll", "old", "one.npz", "--out", "g")
    assert done.status == 2
    assert "old has no calibration.npz: it was trained by an older nearfar" in done.error
    assert nearfar("verify", "old", "one.npz:0", "one.npz:1").status in (0, 1)
    assert not Path("g").exists()


@pytest.mark.parametrize(
    ("name", "change_of", "named"),
    [
        ("gallery.json", lambda b: b[: len(b) // 2], "gallery.json is damaged"),
        ("gallery.json", lambda b: b"[]", "gallery.json is damaged: it is not an object"),
        ("gallery.json", lambda b: b.replace(b"block-", b"../../"), "is no block"),
        ("gallery.json", lambda b: b.replace(b'"rows": 56', b'"rows": 57', 1), "rows is not"),
        ("gallery.json", lambda b: b.replace(b'"format": 1', b'"format": 2'), "a newer nearfar"),
        ("gallery.json", lambda b: b.replace(b"cosine", b"x"), "distance must be one of"),
        ("block-000001.x.npy", lambda b: b[:-4], "block-000001.x.npy is damaged"),
        ("block-000001.x.npy", lambda b: b"\0" * len(b), "block-000001.x.npy is damaged"),
        ("block-000001.items.npy", lambda b: b + b"\0", "block-000001.items.npy is damaged"),
        ("block-000001.items.npy", None, "block-000001.items.npy is missing"),
        ("gallery.json", None, "g is not a gallery: it has no gallery.json"),
    ],
)
def test_a_damaged_gallery_is_named(nearfar, vector_run, here, name, change_of, named):
    enrolled(nearfar, vector_run, "one.npz")
    file = Path("g") / name
    file.write_bytes(change_of(file.read_bytes())) if change_of else file.unlink()
    for words in (
        ("search", vector_run, "g", "one.npz:0"),
        ("gallery", "g"),
        ("gallery", "g", "--remove", "p0"),
        ("enroll", vector_run, "two.npz", "--out", "g", "--add"),
    ):
        done = nearfar(*words)
        assert (done.status, named in done.error) == (2, True), done.err
    assert nearfar("enroll", vector_run, "one.npz", "--out", "g", "--overwrite").status == 0
    assert nearfar("search", vector_run, "g", "one.npz:0").status == 0


@pytest.mark.parametrize("name", ["block-000001.x.npy", "block-000001.items.npy"])
@pytest.mark.parametrize("by_graph", [False, True])
def test_bytes_that_changed_are_named(
    nearfar, vector_run, here, small_blocks, monkeypatch, name, by_graph
):
    """And not copied to another file."""
    if by_graph:
        pytest.importorskip("usearch")
        monkeypatch.setattr(change, "_LARGE", 50)
    enrolled(nearfar, vector_run, "one.npz")
    file = Path("g") / name
    held = file.read_bytes()
    file.write_bytes(held[:128] + b"\xff" * 100 + held[228:])
    words = [("search", vector_run, "g", "one.npz:0")]
    if name.endswith(".x.npy"):
        words.append(("gallery", "g", "--remove", "p1"))
    for said in (nearfar(*one) for one in words):
        assert (said.status, f"{name} is damaged. Enroll" in said.error) == (2, True), said.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--prior", 0), "--prior must be a share"),
        (("--prior", "nan"), "--prior must be a share"),
        (("--far", 0), "--far must be a rate above 0 and at most 0.5, got 0."),
        (("--far", 1), "--far must be a rate above 0 and at most 0.5, got 1."),
        (("--far", "nan"), "--far must be a rate above 0 and at most 0.5, got nan."),
        (("--k", 0), "--k"),
    ],
)
def test_options_out_of_range_are_refused(nearfar, words, named):
    done = nearfar("search", "run", "g", "a", *words)
    assert (done.status, named in done.error) == (2, True)


def test_vectors_may_begin_with_a_minus(nearfar, vector_run, here):
    enrolled(nearfar, vector_run, "one.npz")
    done = nearfar("search", vector_run, "g", "-1 2 0 0 0 0 0 0", "--k", 2, "--far", 0.2)
    assert done.status in (0, 1), done.err
    assert done.out.startswith("-1 2 0 0 0 0 0 0: ")
