"""Tables of texts, read without an encoder: what is refused, and what an item is."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK, write_csv

from nearfar.app.data.items import Items, Pairs, read_data
from nearfar.app.data.reads import Reads
from nearfar.app.data.texts import CHARACTERS, Texts, checked_text
from nearfar.app.errors import InputError
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import default_loss
from nearfar.app.train.text_evidence import cut_off, text_facts

TEXTS = Reads(shape=(), texts=True)
HEADER = ("text", "identity")


def read(path: Path, **more):
    return read_data(str(path), TEXTS, **more)


def table(tmp_path: Path, *rows, header=HEADER) -> Path:
    return write_csv(tmp_path / "texts.csv", header, rows)


# -- texts with identities ------------------------------------------------------------------------


def test_a_table_of_texts_with_identities(tmp_path):
    path = table(tmp_path, ("b c", "two"), (" a", "one"), ("0.5 0.5", "two"), ("x.png", "one"))
    items = read(path)
    assert isinstance(items, Items)
    assert items.content.texts == ["b c", " a", "0.5 0.5", "x.png"]
    assert [items.identities[i] for i in items.identity] == ["two", "one", "two", "one"]
    assert items.names[1] == f"{path}, line 3"
    assert items.content.shape == ()
    assert default_loss(str(path)) == default_loss("glyphs")


def test_names_and_groups_are_columns(tmp_path):
    header = (*HEADER, "names", "groups", "split_groups")
    rows = [("a", "1", "first", "x", "p"), ("b", "1", "", "", "p"), ("c", "2", "third", "x", "")]
    items = read(table(tmp_path, *rows, header=header))
    assert items.names[0] == "first"
    assert items.names[1].endswith("line 3")
    assert items.comparable(torch.tensor([0, 0]), torch.tensor([1, 2])).tolist() == [True, False]
    assert items.split_groups == ["p", ""]


def test_a_repeated_text_counts_once(tmp_path):
    items = read(table(tmp_path, ("a", "1"), ("a", "1"), ("b", "2")))
    assert items.content.texts == ["a", "b"]
    assert "1 of 3 rows of" in items.notes[0]


def test_parquet_holds_whole_numbers_as_identities(tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "identity": [7, 8]}), path)
    assert list(read(path).identities) == ["7", "8"]
    pq.write_table(pa.table({"text": [1, 2], "identity": [7, 8]}), path)
    with pytest.raises(InputError, match="row 0: text is 1, of type int; it must be a text"):
        read(path)
    pq.write_table(pa.table({"text": ["a", None], "identity": [7, 8]}), path)
    with pytest.raises(InputError, match="row 1: text is empty"):
        read(path)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", "1"), ("", "1")], "line 3: text is empty"),
        ([("a", "1"), ("b", " ")], "line 3: identity is empty"),
        ([("a", "1"), ("b", "1"), ("a", "2")], "line 2 and .*line 4: the same text has two"),
    ],
)
def test_bad_cells_are_refused_with_their_line(tmp_path, rows, says):
    with pytest.raises(InputError, match=says):
        read(table(tmp_path, *rows))


def test_a_column_called_label_is_not_taken_for_identities(tmp_path):
    path = table(tmp_path, ("a", "1"), header=("text", "label"))
    with pytest.raises(InputError, match="A column 'label' says which pairs"):
        read(path)
    with pytest.raises(InputError, match="has no column 'identity'; its columns are"):
        read(table(tmp_path, ("a", "1"), header=("text", "topic")))
    with pytest.raises(InputError, match="--similar-label is for tables of pairs"):
        read(table(tmp_path, ("a", "1")), similar_label=1)


def test_embedding_keeps_every_row(tmp_path):
    path = table(tmp_path, ("a",), ("a",), header=("text",))
    items = read(path, labelled=False)
    assert items.content.texts == ["a", "a"]
    assert items.identity.tolist() == [-1, -1]


# -- pairs ----------------------------------------------------------------------------------------


def test_cells_of_pairs_are_texts_whatever_they_look_like(tmp_path):
    rows = [("a.png", "0.5 0.5", "true"), ("a.png", "glyphs:1", "false"), ("0,5", "a", "true")]
    pairs = read(table(tmp_path, *rows, header=("a", "b", "label")))
    assert isinstance(pairs, Pairs)
    assert pairs.items.content.texts == ["a.png", "0,5", "0.5 0.5", "glyphs:1", "a"]
    assert pairs.a.tolist() == [0, 0, 1]
    assert pairs.b.tolist() == [2, 3, 4]
    assert pairs.items.names[2].endswith("line 2: b")


def test_pairs_are_checked_as_those_of_images_are(tmp_path):
    header = ("a", "b", "label")
    with pytest.raises(InputError, match="line 3: b is empty; it must be a text"):
        read(table(tmp_path, ("x", "y", "true"), ("x", "", "false"), header=header))
    with pytest.raises(InputError, match="labelled similar and dissimilar"):
        read(table(tmp_path, ("x", "y", "true"), ("y", "x", "false"), header=header))
    with pytest.raises(InputError, match="labelled dissimilar to itself"):
        read(table(tmp_path, ("5 x", "5 x", "false"), header=header))


def test_without_an_encoder_of_texts_the_error_names_one(tmp_path, nearfar):
    pairs = table(tmp_path, ("some text", "another", "true"), header=("a", "b", "label"))
    says = nearfar("train", pairs, "--out", tmp_path / "run", *QUICK).error
    assert "For texts, add --encoder sentence-transformers:NAME" in says
    says = nearfar("train", table(tmp_path, ("a", "1")), "--out", tmp_path / "run", *QUICK).error
    assert "--encoder sentence-transformers:NAME" in says
    says = nearfar("evaluate", tmp_path / "run", pairs).error
    assert "no such run folder" in says


def test_an_option_for_texts_is_for_nothing_else():
    with pytest.raises(InputError, match="--chunk-tokens is for training an encoder of texts"):
        TrainConfig(data="glyphs", loss="sup_con", chunk_tokens=5)
    assert TrainConfig(data="glyphs", loss="sup_con").steps == 450
    of_texts = TrainConfig(data="x.csv", loss="sup_con", encoder="sentence-transformers:x")
    assert (of_texts.steps, of_texts.chunk_tokens) == (100, 1024)


# -- what texts hold ------------------------------------------------------------------------------


def test_texts_of_one_length_are_embedded_together():
    content = Texts(["ccc", "a", "bb", "d"])
    assert content.alike(torch.tensor([0, 1, 2, 3])).tolist() == [1, 3, 2, 0]
    assert content.read(torch.tensor([2, 0]))() == ["bb", "ccc"]


def test_what_a_report_shows_of_a_text():
    shown = Texts(["a\nb\u202e", "x" * 1000]).shown(torch.tensor([0, 1]))
    assert shown[0] == "a\\nb\\u202e"
    assert (len(shown[1]), shown[1][-1]) == (CHARACTERS, "…")
    assert Texts(["a"]).shown(torch.tensor([], dtype=torch.long)).dtype.kind == "U"


def test_the_raw_input_counts_sequences_of_characters():
    raw = Texts(["Österreich", "osterreich", "Österreich!", "12"]).raw(torch.arange(4))
    assert raw.shape == (4, 1024)
    assert raw.dtype is torch.float32
    assert raw[3].sum() == 6  # " 1", "12", "2 ", " 12", "12 " and " 12 "
    unit = raw / raw.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    assert cosines[0, 2] > cosines[0, 1] > cosines[0, 3]


def test_equal_texts_have_equal_fingerprints():
    one = Texts(["a", "b", "a"]).fingerprints()
    assert one[0] == one[2] != one[1]
    assert {len(print_) for print_ in one} == {16}


def test_text_of_invalid_bytes_is_refused():
    with pytest.raises(InputError, match=r"it is not valid text: 'caf"):
        checked_text("caf\udce9", "it")


# -- for the doctor -------------------------------------------------------------------------------


def test_what_the_doctor_is_told_of_texts(tmp_path, nearfar):
    rows = [("A b", "1"), ("a", "1"), ("a-b!", "2"), ("б", "2"), ("...", "1"), ("!", "2")]
    path = table(tmp_path, *rows)
    facts = text_facts(read(path), None)
    (copies,) = facts.copies
    assert (copies.n, copies.total, copies.example) == (2, 6, ["A b", "a-b!"])
    assert (facts.crossing.n_similar, facts.crossing.similar) == (2, 1)
    done = nearfar("doctor", path)
    assert done.status == 1
    assert "! copied-texts: 2 of 6 texts are also under another identity, but for case" in done.out
    assert "not checked, without an encoder: cut-off-texts" in done.out
    assert "exploding-norms" not in done.out


def test_dissimilar_pairs_of_one_text_are_counted(tmp_path, nearfar):
    rows = [("a", "A!", "0"), ("a", "b", "0"), ("b", "c", "1")]
    path = table(tmp_path, *rows, header=("a", "b", "label"))
    assert "--similar-label" in nearfar("doctor", path).error
    done = nearfar("doctor", path, "--similar-label", "1", "--json")
    assert "1 of 2 dissimilar pairs are of one text" in done.out


def test_texts_are_cut_off_where_they_have_more_tokens_than_the_limit():
    class Words:
        prompt = ""
        limit = 10

        def lengths(self, texts):
            return [len(text.split()) for text in texts]

    texts = ["w " * 10, "w " * 11, "w", "x " * 30]
    found = cut_off(texts, Words())
    assert (found.n, found.total, found.tokens, found.longest) == (2, 4, 30, texts[3])
    Words.limit = None
    assert cut_off(texts, Words()).n == 0


def test_a_record_may_hold_texts(vector_run, tmp_path):
    import shutil

    from nearfar.app.train.record import RECORD, read_record

    run = Path(shutil.copytree(vector_run, tmp_path / "run"))
    with np.load(run / RECORD) as file:
        arrays = {name: file[name] for name in file.files}
    n = len(arrays["outcome.shown"])
    arrays["outcome.inputs"] = np.array(["text"] * n)
    np.savez(run / RECORD, **arrays)
    assert read_record(run).outcome.inputs.tolist() == ["text"] * n
    np.savez(run / RECORD, **{**arrays, "outcome.inputs": np.array([["text"]] * n)})
    with pytest.raises(InputError, match="is damaged"):
        read_record(run)
