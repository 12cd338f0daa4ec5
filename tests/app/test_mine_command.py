"""`nearfar mine` against the function, where it was stopped, and what it refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nearfar.app import mine
from nearfar.mine import corpus_negatives

RANDOM = np.random.default_rng(0)
CORPUS = RANDOM.normal(size=(40, 6)).astype(np.float32)
QUERIES = CORPUS[:10] + 0.5 * RANDOM.normal(size=(10, 6)).astype(np.float32)
POSITIVE = np.stack([np.arange(10), np.where(np.arange(10) % 2, np.arange(10, 20), -1)], 1)
TEXTS = np.array([f"document {i}\nof, two lines" for i in range(40)])
QUESTIONS = np.array([f"question {i}?" for i in range(10)])
OUT = "out.parquet"
INPUTS = ("queries.npz", "corpus.npz", "corpus.npy")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with queries and a corpus, of which the tool takes 4 queries at a time."""
    monkeypatch.setattr(mine, "_AT_A_TIME", 4)
    np.savez(tmp_path / "queries.npz", x=QUERIES, positive=POSITIVE, names=QUESTIONS)
    np.savez(tmp_path / "corpus.npz", x=CORPUS, names=TEXTS)
    np.save(tmp_path / "corpus.npy", CORPUS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path="out.parquet"):
    return pq.read_table(path).to_pydict()


def test_a_row_for_each_query_and_positive(nearfar, files):
    done = nearfar("mine", "queries.npz", "corpus.npz", "--k", 3, "--margin", 0.05, "--out", OUT)
    assert done.status == 0, done.err
    found = corpus_negatives(QUERIES, CORPUS, POSITIVE, 3, margin=0.05)
    assert found.n_short == 1  # it is left out
    enough = (found.indices >= 0).all(1)
    rows = [(i, j) for i in range(10) for j in POSITIVE[i] if j >= 0 and enough[i]]
    expected = {"anchor": [QUESTIONS[i] for i, _ in rows], "positive": [TEXTS[j] for _, j in rows]}
    for slot in range(3):
        name = f"negative_{slot + 1}"
        expected[name] = [TEXTS[found.indices[i, slot]] for i, _ in rows]
    assert table() == expected
    assert f"too near   {found.left_out.too_near:5}" in done.out
    assert "wrote out.parquet: 13 rows of anchor, positive, negative_1, negative_2" in done.out
    shown = found.examples(5, queries=QUESTIONS, corpus=TEXTS).plain()
    assert all(line.strip() in done.out for line in shown.splitlines()[2:])
    assert sorted(path.name for path in files.iterdir()) == sorted([*INPUTS, OUT])


def test_a_corpus_without_names_is_written_as_row_numbers(nearfar, files):
    done = nearfar(
        "mine", "queries.npz", "corpus.npy", "--k", 2, "--skip", 1, "--out", OUT, "--json"
    )
    assert done.status == 0, done.err
    found = corpus_negatives(QUERIES, CORPUS, POSITIVE, 2, skip=1)
    rows = table()
    assert rows["positive"][:3] == [0, 1, 11]
    assert rows["negative_2"][:3] == [found.indices[i, 1] for i in (0, 1, 1)]
    said = json.loads(done.out)
    assert said["left_out"] == vars(found.left_out)
    assert (said["n_queries"], said["n_corpus"], said["rows"]) == (10, 40, 15)


def test_queries_with_too_few_negatives_are_left_out_and_counted(nearfar, files):
    done = nearfar("mine", "queries.npz", "corpus.npy", "--k", 38, "--out", OUT)
    assert done.status == 0, done.err
    assert "too few" not in done.out
    assert table()["anchor"] == [*QUESTIONS.repeat(1 + np.arange(10) % 2)]
    done = nearfar("mine", "queries.npz", "corpus.npy", "--k", 39, "--out", OUT, "--overwrite")
    assert "10 queries against 40 rows; too few negatives for 5" in done.out
    assert table()["anchor"] == [*QUESTIONS[::2]]


@pytest.mark.parametrize("text", [True, False])
def test_identities_say_what_is_positive(nearfar, files, text):
    y = np.arange(40) // 3
    names = np.array([str(i) for i in range(40)])
    np.savez("items.npz", x=CORPUS, y=y.astype(str) if text else y, names=names)
    done = nearfar("mine", "items.npz", "items.npz", "--k", 2, "--out", OUT)
    assert done.status == 0, done.err
    rows = table()
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j and y[i] == y[j]]
    assert list(zip(map(int, rows["anchor"]), map(int, rows["positive"]), strict=True)) == pairs
    lists = [np.flatnonzero(y == own) for own in y]
    found = corpus_negatives(CORPUS, CORPUS, lists, 2)
    assert [int(j) for j in rows["negative_1"]] == [found.indices[i, 0].item() for i, _ in pairs]


def test_queries_whose_identity_is_not_in_the_corpus_are_counted(nearfar, files):
    np.savez("q.npz", x=QUERIES, y=np.arange(10))
    np.savez("c.npz", x=CORPUS, y=np.arange(40) % 7)
    done = nearfar("mine", "q.npz", "c.npz", "--k", 2, "--out", OUT)
    assert "7 queries against 40 rows; no positive for 3" in done.out
    assert set(table()["anchor"]) == set(range(7))


def test_the_corpus_says_which_rows_are_of_the_item_of_a_positive(nearfar, files):
    y = np.arange(40) % 5
    np.savez("c.npz", x=CORPUS, y=y)
    done = nearfar("mine", "queries.npz", "c.npz", "--k", 2, "--out", OUT)
    found = corpus_negatives(QUERIES, CORPUS, POSITIVE, 2, ids=y)
    assert found.left_out.same_item > 0
    assert f"same item  {found.left_out.same_item:5}" in done.out
    assert [*dict.fromkeys(table()["negative_1"])] == [*dict.fromkeys(found.indices[:, 0].tolist())]


def test_train_reads_the_pairs(nearfar, files):
    """Names that are vectors stand for images here."""
    y = np.arange(40) // 2
    names = np.array([" ".join(map(str, row.tolist())) for row in CORPUS])
    np.savez("items.npz", x=CORPUS, y=y, names=names)
    done = nearfar("mine", "items.npz", "items.npz", "--k", 2, "--pairs", "--out", OUT)
    assert "wrote out.parquet: 100 rows of a, b, label" in done.out
    rows = table()
    place = {name: i for i, name in enumerate(names.tolist())}
    same = [y[place[a]] == y[place[b]] for a, b in zip(rows["a"], rows["b"], strict=True)]
    assert same == rows["label"]
    assert sum(rows["label"]) == 20
    options = ("--steps", 2, "--embedding-dim", 4, "--no-report", "--out", "run")
    done = nearfar("train", OUT, *options)
    assert done.status == 0, done.err


def test_the_trainer_of_sentence_transformers_reads_the_rows(nearfar, files):
    datasets = pytest.importorskip("datasets")
    assert nearfar("mine", "queries.npz", "corpus.npz", "--k", 2, "--out", OUT).status == 0
    read = datasets.Dataset.from_parquet(OUT, cache_dir=str(files / "cache"))
    assert read.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert read[0]["anchor"] == QUESTIONS[0]


MINE = ("mine", "queries.npz", "corpus.npz", "--k", 3, "--out", OUT)


def stop_before(monkeypatch, piece: int) -> list[slice]:
    """Interrupt the search at a piece; returns which queries are searched."""
    searched: list[slice] = []
    search = mine._Task.search

    def interrupted(task, rows):
        if len(searched) == piece:
            raise KeyboardInterrupt
        searched.append(rows)
        return search(task, rows)

    monkeypatch.setattr(mine._Task, "search", interrupted)
    return searched


def test_it_goes_on_where_it_was_stopped(nearfar, files, monkeypatch):
    assert nearfar(*MINE).status == 0
    whole = pq.read_table(OUT)
    Path(OUT).unlink()
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        assert nearfar(*MINE).status == 130
    assert not Path(OUT).exists()
    searched = stop_before(monkeypatch, 9)
    done = nearfar(*MINE)
    assert done.status == 0, done.err
    assert searched == [slice(8, 10)]
    assert pq.read_table(OUT).equals(whole, check_metadata=True)
    assert "10 queries against 40 rows" in done.out
    assert sorted(path.name for path in files.iterdir()) == sorted([*INPUTS, OUT])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--k", 2), "k 3, not 2"),
        (("--margin", 0.1), "margin None, not 0.1"),
        (("--distance", "euclidean"), "distance 'cosine', not 'euclidean'"),
        (("--pairs",), "pairs False, not True"),
    ],
)
def test_settings_are_not_mixed(nearfar, files, monkeypatch, change, said):
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        nearfar(*MINE)
    other = nearfar(*MINE, *change)
    assert other.status == 2
    assert f"out.parquet.parts holds pieces made with {said}. Repeat the first" in other.error
    done = nearfar(*MINE, *change, "--overwrite")
    assert done.status == 0, done.err
    assert not Path(f"{OUT}.parts").exists()
    rows = pq.read_table(OUT)
    again = nearfar(*MINE, *change, "--overwrite")
    assert again.status == 0
    assert pq.read_table(OUT).equals(rows)


def test_files_that_changed_are_not_mixed(nearfar, files, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        nearfar(*MINE)
    os.utime("corpus.npz", ns=(1, 1))
    assert "holds pieces made with corpus [" in nearfar(*MINE).error


def test_an_error_before_the_first_piece_leaves_nothing(nearfar, files):
    assert nearfar(*MINE, "--distance", "dot").status == 2
    assert sorted(path.name for path in files.iterdir()) == sorted(INPUTS)
    assert nearfar(*MINE).status == 0
    assert "out.parquet exists" in nearfar(*MINE).error


def test_a_foreign_folder_is_left_alone(nearfar, files):
    Path(f"{OUT}.parts").mkdir()
    (Path(f"{OUT}.parts") / "diary.txt").touch()
    assert "holds no pieces of out.parquet" in nearfar(*MINE).error
    assert (Path(f"{OUT}.parts") / "diary.txt").exists()


def test_a_damaged_piece_is_searched_again(nearfar, files, monkeypatch):
    assert nearfar(*MINE).status == 0
    whole = pq.read_table(OUT)
    Path(OUT).unlink()
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        nearfar(*MINE)
    piece = Path(f"{OUT}.parts/000001.parquet")
    piece.write_bytes(piece.read_bytes()[:-9])
    searched = stop_before(monkeypatch, 9)
    assert nearfar(*MINE).status == 0
    assert searched == [slice(4, 8), slice(8, 10)]
    assert pq.read_table(OUT).equals(whole)


def test_a_piece_whose_columns_are_damaged_is_named(nearfar, files, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        nearfar(*MINE)
    piece = Path(f"{OUT}.parts/000001.parquet")
    held = piece.read_bytes()
    piece.write_bytes(held[:4] + b"\xff" * 40 + held[44:])
    assert "000001.parquet cannot be read" in nearfar(*MINE).error
    piece.unlink()
    assert nearfar(*MINE).status == 0


def test_what_a_killed_process_left_does_not_stay(nearfar, files, monkeypatch):
    parts = Path(f"{OUT}.parts")
    parts.mkdir()
    (parts / ".settings.json.abc").touch()
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        assert nearfar(*MINE).status == 130
    (parts / ".000001.parquet.abc").touch()
    done = nearfar(*MINE)
    assert done.status == 0, done.err
    assert not parts.exists()


def test_pieces_in_a_folder_with_other_files_are_gone_on_with(nearfar, files, monkeypatch):
    for settings in (MINE, (*MINE, "--skip", 1, "--overwrite")):
        with monkeypatch.context() as patch:
            stop_before(patch, 1)
            nearfar(*settings)
        (Path(f"{OUT}.parts") / "diary.txt").touch()
    done = nearfar(*settings)
    assert done.status == 0, done.err
    assert [path.name for path in Path(f"{OUT}.parts").iterdir()] == ["diary.txt"]


def test_a_stopped_command_with_overwrite_goes_on_too(nearfar, files, monkeypatch):
    Path(OUT).touch()
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        nearfar(*MINE, "--overwrite")
    searched = stop_before(monkeypatch, 9)
    assert nearfar(*MINE, "--overwrite").status == 0
    assert searched == [slice(8, 10)]


def saved(**arrays):
    def save():
        np.savez("other.npz", **arrays)
        return "other.npz"

    return save


WRONG = {
    "no file": (lambda: "none.npz", "no such file: none.npz"),
    "no table": (
        lambda: Path("t.npy").write_bytes(b"x") and "t.npy",
        "t.npy cannot be read as .npy",
    ),
    "no x": (saved(y=POSITIVE), "has no array 'x'; it has: y"),
    "images": (saved(x=CORPUS[:, :, None]), r"other.npz: x has shape (40, 6, 1)"),
    "text": (saved(x=np.array([["a"]])), "it must be (n, d) numbers"),
    "other width": (saved(x=CORPUS[:, :3]), "Embed both with one network"),
    "NaN": (saved(x=CORPUS * np.nan), "corpus[0] is not finite"),
    "few names": (saved(x=CORPUS, names=TEXTS[:3]), "names has shape (3,)"),
    "table of y": (saved(x=CORPUS, y=np.zeros((40, 2), int)), "y has shape (40, 2)"),
    "no names": (saved(x=CORPUS, names=np.arange(40)), "it must be 40 texts"),
    "too few rows": (saved(x=CORPUS[:5]), "positives must be rows of the corpus, 0 to 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_the_corpus(nearfar, files, name):
    make, message = WRONG[name]
    done = nearfar("mine", "queries.npz", make(), "--out", OUT)
    assert done.status == 2
    assert message in done.error
    assert not Path(f"{OUT}.parts").exists()


def test_what_else_is_refused(nearfar, files):
    np.savez("unlabelled.npz", x=QUERIES)
    np.savez("texts.npz", x=QUERIES, y=QUESTIONS)
    np.savez("numbers.npz", x=CORPUS, y=np.arange(40))
    for arguments, message in [
        (("queries.npz", "corpus.npz", "--out", "out.csv"), "--out out.csv must end in .parquet."),
        (("unlabelled.npz", "corpus.npz", "--out", OUT), "unlabelled.npz has no array 'y'"),
        (("texts.npz", "corpus.npz", "--out", OUT), "corpus.npz has no array 'y'"),
        (("texts.npz", "numbers.npz", "--out", OUT), "y is text in one of the two files"),
        (("queries.npz", "corpus.npy", "--pairs", "--out", OUT), "corpus.npy has no array 'names'"),
        ((*MINE[1:], "--margin", "nan"), "margin must be a finite number"),
    ]:
        done = nearfar("mine", *arguments)
        assert done.status == 2
        assert message in done.error


def test_a_row_of_the_file_is_neither_its_own_positive_nor_its_own_negative(nearfar, files):
    y = np.where(np.arange(40) < 20, np.arange(40) // 2, -1)
    np.savez("items.npz", x=CORPUS, positive=np.arange(40) ^ 1, y=y)
    done = nearfar("mine", "items.npz", "items.npz", "--k", 3, "--out", OUT)
    assert done.status == 0, done.err
    rows = table()
    lists = [[i, i ^ 1] for i in range(40)]
    found = corpus_negatives(CORPUS, CORPUS, lists, 3, ids=y)
    assert rows["anchor"] == list(range(40))
    assert rows["positive"] == [i ^ 1 for i in range(40)]
    for slot in range(3):
        assert rows[f"negative_{slot + 1}"] == found.indices[:, slot].tolist()


def test_a_query_whose_only_positive_is_itself_has_none(nearfar, files):
    np.savez("items.npz", x=CORPUS, positive=np.where(np.arange(40) < 5, 39, np.arange(40)))
    done = nearfar("mine", "items.npz", "items.npz", "--k", 3, "--out", OUT)
    assert "5 queries against 40 rows; no positive for 35" in done.out
    assert table()["anchor"] == list(range(5))


def test_minus_one_is_no_identity(nearfar, files):
    y = np.where(np.arange(40) < 10, np.arange(40) // 2, -1)
    np.savez("items.npz", x=CORPUS, y=y)
    done = nearfar("mine", "items.npz", "items.npz", "--k", 3, "--out", OUT)
    assert "10 queries against 40 rows; no positive for 30" in done.out
    rows = table()
    assert rows["positive"] == [i ^ 1 for i in range(10)]
    found = corpus_negatives(CORPUS[:10], CORPUS, [[i, i ^ 1] for i in range(10)], 3)
    assert rows["negative_1"] == found.indices[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", np.nan, "x[8] is not finite"),
        ("positive", 40, "positive[8, 0] is 40; positives must be rows of the corpus, 0 to 39"),
        ("positive", -2, "positive[8, 0] is -2"),
    ],
)
def test_a_bad_query_is_found_before_the_first_piece(nearfar, files, name, value, said):
    arrays = {"x": QUERIES.copy(), "positive": POSITIVE.copy()}
    arrays[name][8, 0] = value
    np.savez("queries.npz", **arrays)
    done = nearfar(*MINE)
    assert done.status == 2
    assert f"queries.npz: {said}" in done.error
    assert "queries" not in done.out
    assert not Path(f"{OUT}.parts").exists()


def test_numbers_that_torch_does_not_have_are_refused(nearfar, files):
    np.savez("corpus.npz", x=CORPUS.astype(np.longdouble))
    done = nearfar(*MINE)
    assert done.status == 2
    assert "corpus" in done.error


def test_a_pair_of_positives_is_written_once(nearfar, files):
    """0 and 1 list each other; 2 lists 1, and 3 lists 0 and 5, which do not list them."""
    positive = np.full((40, 2), -1)
    positive[:4] = [[1, -1], [0, -1], [1, -1], [0, 5]]
    np.savez("items.npz", x=CORPUS, positive=positive, names=np.arange(40).astype(str))
    done = nearfar("mine", "items.npz", "items.npz", "--k", 1, "--pairs", "--out", OUT)
    assert done.status == 0, done.err
    rows = table()
    pairs = [pair for *pair, same in zip(rows["a"], rows["b"], rows["label"], strict=True) if same]
    assert pairs == [["0", "1"], ["2", "1"], ["3", "0"], ["3", "5"]]


def test_pairs_of_embedded_images_are_found_beside_their_table(nearfar, files):
    random = np.random.default_rng(0)
    for name in (f"photos/{who}/{i}.png" for who in "abcdefgh" for i in range(3)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 8), np.uint8)).save(name)
    options = ("--steps", 2, "--embedding-dim", 4, "--image-size", 8, "--no-report")
    for arguments in (
        ("train", "photos", *options, "--out", "run"),
        ("embed", "run", "photos", "--out", "photos.npz"),
        ("mine", "photos.npz", "photos.npz", "--pairs", "--out", "photos/pairs.parquet"),
        ("train", "photos/pairs.parquet", *options, "--out", "run-of-pairs"),
    ):
        done = nearfar(*arguments)
        assert done.status == 0, done.err


def test_a_number_is_the_p_of_a_p_norm(nearfar, files):
    done = nearfar(*MINE, "--distance", 3)
    assert done.status == 0, done.err
    found = corpus_negatives(QUERIES, CORPUS, POSITIVE, 3, distance=3)
    assert table()["negative_1"][0] == TEXTS[found.indices[0, 0]]
    assert "got 0.5" in nearfar(*MINE, "--distance", 0.5, "--overwrite").error


@pytest.mark.parametrize("positive", [POSITIVE, np.full(10, -1)])
def test_that_nothing_could_be_written_is_said(nearfar, files, positive):
    np.savez("queries.npz", x=QUERIES, positive=positive)
    done = nearfar("mine", "queries.npz", "corpus.npz", "--k", 300, "--out", OUT)
    assert done.status == 0, done.err
    assert "no query has a positive and enough negatives" in done.out.replace("\n", " ")
    names = "anchor, positive, negative_1, negative_2, ..., negative_300"
    assert f"0 rows of {names}" in done.out.replace("\n", " ")
