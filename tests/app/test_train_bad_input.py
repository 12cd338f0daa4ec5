"""Whatever is wrong with what was given: one line that names it, status 2, nothing written."""

import numpy as np
import pytest
from conftest import make_vectors, pair_rows, write_csv
from PIL import Image

GREY = np.full((8, 8), 200, np.uint8)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def make_folder(root, n_identities=8, n_items=2):
    for identity in range(n_identities):
        (root / f"id{identity}").mkdir(parents=True)
        for item in range(n_items):
            pixels = (GREY + 7 * identity + item).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"id{identity}" / f"{item}.png")
    return root


def vectors(tmp):
    return save(tmp / "v.npz", **dict(zip("xy", make_vectors(), strict=True)))


def truncated_image(tmp):
    root = make_folder(tmp / "photos")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(root / "id3" / "1.png")
    whole = (root / "id3" / "1.png").read_bytes()
    (root / "id3" / "1.png").write_bytes(whole[: len(whole) // 2])
    return [root]


def not_an_image(tmp):
    root = make_folder(tmp / "photos")
    (root / "id3" / "1.png").write_text("<html>not found</html>")
    return [root]


def empty_folder(tmp):
    (tmp / "photos").mkdir()
    return [tmp / "photos"]


def no_subfolders(tmp):
    return [make_folder(tmp / "photos") / "id0"]


def empty_subfolder(tmp):
    root = make_folder(tmp / "photos")
    (root / "nobody").mkdir()
    return [root]


def single_item(tmp):
    root = make_folder(tmp / "photos")
    (root / "id5" / "1.png").unlink()
    return [root]


def single_row(tmp):
    x, y = make_vectors()
    y[17] = 99
    return [save(tmp / "v.npz", x=x, y=y)]


def one_class(tmp):
    x, y = make_vectors()
    return [save(tmp / "v.npz", x=x, y=y * 0)]


def few_identities(tmp):
    x, y = make_vectors(n_identities=5)
    return [save(tmp / "v.npz", x=x, y=y)]


def nan_vector(tmp):
    x, y = make_vectors()
    x[17, 2] = np.nan
    return [save(tmp / "v.npz", x=x, y=y)]


def infinite_image(tmp):
    x = np.zeros((16, 8, 8))
    x[3, 0, 0] = np.inf
    return [save(tmp / "v.npz", x=x, y=np.arange(16) // 2)]


def mismatched_lengths(tmp):
    x, y = make_vectors()
    return [save(tmp / "v.npz", x=x, y=y[:-3])]


def objects(tmp):
    ragged = np.array([[1.0], [1.0, 2.0]], dtype=object)
    return [save(tmp / "v.npz", x=ragged, y=np.arange(2))]


def no_x(tmp):
    return [save(tmp / "v.npz", embeddings=np.eye(3), y=np.arange(3))]


def no_y(tmp):
    return [save(tmp / "v.npz", x=np.eye(3))]


def float_y(tmp):
    return [save(tmp / "v.npz", x=np.eye(3), y=np.array([0.5, 1, 2]))]


def channels_last(tmp):
    return [save(tmp / "v.npz", x=np.zeros((16, 8, 8, 3)), y=np.arange(16) // 2)]


def not_an_npz(tmp):
    (tmp / "v.npz").write_text("hello")
    return [tmp / "v.npz"]


def csv(tmp, rows, header=("a", "b", "label")):
    return write_csv(tmp / "pairs.csv", header, rows)


def good_rows():
    x, y = make_vectors(n_items=3)
    cells = [" ".join(f"{value:.4f}" for value in row) for row in x]
    return [[cells[a], cells[b], str(same).lower()] for a, b, same in pair_rows(y, 200)]


def no_label(tmp):
    rows = [[*row[:2], "x"] for row in good_rows()]
    return [csv(tmp, rows, ("a", "b", "note"))]


def numeric_labels(tmp):
    return [csv(tmp, [[a, b, int(label == "true")] for a, b, label in good_rows()])]


def label_of_two(tmp):
    rows = [[a, b, int(label == "true")] for a, b, label in good_rows()]
    rows[5][2] = 2
    return [csv(tmp, rows), "--similar-label", 1]


def label_yes(tmp):
    rows = good_rows()
    rows[5][2] = "yes"
    return [csv(tmp, rows)]


def all_similar(tmp):
    return [csv(tmp, [[a, b, "true"] for a, b, _ in good_rows()])]


def both_labels(tmp):
    (a, b, _), *rows = good_rows()
    return [csv(tmp, [[a, b, "true"], *rows, [b, a, "false"], [a, b, "false"]])]


def unlike_itself(tmp):
    rows = good_rows()
    rows[5] = [rows[5][0], rows[5][0], "false"]
    return [csv(tmp, rows)]


def turned_round(tmp):
    rows = [[a, b, int(label == "true")] for a, b, label in good_rows()]
    return [csv(tmp, rows), "--similar-label", 0]


def turned_round_within_groups(tmp):
    """One crowd that wrong labels connect, beside identities enough for a split."""
    crowd = [[f"{i} 0", f"{i + 1} 0", 0] for i in range(60)]
    others = [[f"0 {i}", f"0 {i + 0.5}", 0] for i in range(1, 9)]
    return [csv(tmp, [*crowd, *others, ["0 1", "0 2", 1]]), "--similar-label", 0]


def no_number(tmp):
    rows = good_rows()
    rows[5][1] = "0.1 zero 0.3"
    return [csv(tmp, rows)]


def nan_cell(tmp):
    rows = good_rows()
    rows[5][1] = rows[5][1].replace(" ", " nan ", 1)
    return [csv(tmp, rows)]


def short_vector(tmp):
    rows = good_rows()
    rows[5][1] = "0.1 0.2"
    return [csv(tmp, rows)]


def missing_image(tmp):
    rows = [["a.png", "b.png", "true"]]
    Image.fromarray(GREY).save(tmp / "a.png")
    return [csv(tmp, rows)]


def mixed_cells(tmp):
    Image.fromarray(GREY).save(tmp / "a.png")
    return [csv(tmp, [["a.png", "0.1 0.2", "true"]])]


def ragged_csv(tmp):
    rows = good_rows()
    rows[5] = rows[5][:2]
    return [csv(tmp, rows)]


def header_only(tmp):
    return [csv(tmp, [])]


def not_parquet(tmp):
    (tmp / "pairs.parquet").write_text("hello")
    return [tmp / "pairs.parquet"]


CASES = [
    (truncated_image, ["photos/id3/1.png", "cut off", "Repair or remove"]),
    (not_an_image, ["photos/id3/1.png", "it is text", "not an image"]),
    (empty_folder, ["photos is empty", "one subfolder per identity"]),
    (no_subfolders, ["no subfolders", "one subfolder per identity"]),
    (empty_subfolder, ["nobody holds no images"]),
    (single_item, ["'id5'", "single item", "id5/0.png", "1 of 8"]),
    (single_row, ["'99'", "single item", "v.npz:17"]),
    (one_class, ["1 identities are too few", "at least 6"]),
    (few_identities, ["5 identities are too few", "at least 6"]),
    (nan_vector, ["v.npz, row 17: x holds nan", "1 of 320"]),
    (infinite_image, ["v.npz, row 3: x holds inf"]),
    (mismatched_lengths, ["320 items and y 317"]),
    (objects, ["v.npz", "dtype object"]),
    (no_x, ["no array 'x'", "embeddings, y"]),
    (no_y, ["no array 'y'"]),
    (float_y, ["float64", "integers or text"]),
    (channels_last, ["channels last", "transpose(0, 3, 1, 2)"]),
    (not_an_npz, ["v.npz cannot be read"]),
    (lambda tmp: [tmp / "none.npz"], ["no such file", "none.npz"]),
    (lambda tmp: [tmp / "none"], ["no such file or folder", "none"]),
    (lambda tmp: [tmp / "none.csv"], ["no such file", "none.csv"]),
    (lambda tmp: [__file__], ["not a known kind of data", ".parquet"]),
    (lambda tmp: [], ["train needs DATA"]),
    (no_label, ["no column 'label'", "a, b, note"]),
    (numeric_labels, ["--similar-label 1", "--similar-label 0"]),
    (label_of_two, ["pairs.csv, line 7: label is 2", "between 0 and 1"]),
    (label_yes, ["pairs.csv, line 7: label is 'yes'"]),
    (all_similar, ["every pair is labelled similar"]),
    (both_labels, ["pairs.csv, line 2 and ", "pairs.csv, line 282: the same pair", "(1 pairs of"]),
    (unlike_itself, ["pairs.csv, line 7: an item is labelled dissimilar to itself", "(1 of 280"]),
    (turned_round, ["too few to split", "of 120 items into one identity", "check --similar-label"]),
    (turned_round_within_groups, ["left without a", "61 of 77 items", "check --similar-label"]),
    (no_number, ["pairs.csv, line 7: b holds 'zero'", "not a number"]),
    (nan_cell, ["pairs.csv, line 7: b holds nan"]),
    (short_vector, ["pairs.csv, line 7: b has 2 numbers", "has 8"]),
    (missing_image, ["pairs.csv, line 2: b: no such image", "b.png"]),
    (mixed_cells, ["line 2: b is a vector, but", "is an image"]),
    (ragged_csv, ["pairs.csv, line 7: 2 cells under 3 headers"]),
    (header_only, ["pairs.csv has no rows"]),
    (not_parquet, ["pairs.parquet cannot be read as Parquet"]),
    (lambda tmp: [vectors(tmp), "--loss", "foo"], ["unknown loss 'foo'", "contrastive, cosine"]),
    (lambda tmp: [vectors(tmp), "--loss", "softmax", "--margin", 1], ["no 'margin'", "triplet"]),
    (lambda tmp: [vectors(tmp), "--loss", "triplet", "--margin", -1], ["margin must be", "got -1"]),
    (lambda tmp: [vectors(tmp), "--margin", "wide"], ["--margin", "number"]),
    (lambda tmp: [vectors(tmp), "--loss", "triplet", "--distance", "L1"], ["'euclidean'", "'L1'"]),
    (
        lambda tmp: [vectors(tmp), "--loss", "triplet", "--distance", "snr"],
        ["'cosine', by which the tool compares embeddings", "'snr'"],
    ),
    (lambda tmp: [vectors(tmp), "--similar-label", 1], ["--similar-label is for tables of pairs"]),
    (lambda tmp: [vectors(tmp), "--image-size", 64], ["--image-size is for image files"]),
    (lambda tmp: [vectors(tmp), "--encoder", "mlp"], ["package.module:factory", "'mlp'"]),
    (lambda tmp: [vectors(tmp), "--encoder", "no_such:make"], ["cannot import 'no_such'"]),
    (lambda tmp: [vectors(tmp), "--encoder", "torch:no_such"], ["has no 'no_such'"]),
    (lambda tmp: [vectors(tmp), "--encoder", "torch.nn:Flatten"], ["torch.nn:Flatten", "failed"]),
    (lambda tmp: [vectors(tmp), "--encoder", "torch.nn:Identity"], ["into (2, 8)", "(2, 128)"]),
    (lambda tmp: [vectors(tmp), "--far", 2], ["far must lie between 0 and 0.5"]),
    (lambda tmp: [vectors(tmp), "--items", 1], ["items must lie between 2"]),
    (lambda tmp: [vectors(tmp), "--accelerator", "abacus"], ["abacus"]),
    (lambda tmp: [vectors(tmp), "--no-such-option"], ["--no-such-option", "--help"]),
    (lambda tmp: ["--config", tmp / "none.toml"], ["no such file", "none.toml"]),
    (lambda tmp: [csv(tmp, good_rows()), "--loss", "triplet"], ["--loss triplet", "info_nce"]),
    (lambda tmp: [csv(tmp, good_rows()), "--image-size", 8], ["--image-size is for images"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "named"), CASES, ids=[f"{case[0].__name__} {case[1][0]}" for case in CASES]
)
def test_train_refuses(nearfar, tmp_path, given, named):
    arguments = given(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = nearfar("train", *arguments, "--out", tmp_path / "runs" / "new", "--steps", 2)
    assert done.error.startswith("nearfar: error: ")
    for name in named:
        assert name in done.error
    assert done.status == 2
    assert sorted(tmp_path.rglob("*")) == before


CONFIGS = [
    ("format = 1\ndata = 'glyphs'\nloss = 'triplet'\nstep = 3", ["unknown key 'step'", "steps"]),
    (
        "format = 1\ndata = 'glyphs'\nloss = 'triplet'\nsteps = 'many'",
        ["steps must be an integer", "'many'"],
    ),
    ("format = 1\ndata = 'glyphs'\nloss = 'triplet'\nsteps = true", ["steps must be an integer"]),
    ("format = 1\ndata = 'glyphs'\nloss = 'triplet'\nsteps = 0", ["steps must lie between 1"]),
    (
        "format = 1\ndata = 'glyphs'\nloss = 'triplet'\ntest_share = 0.9",
        ["leave identities to train on"],
    ),
    ("format = 1\nloss = 'triplet'", ["no key 'data'"]),
    ("format = 1\ndata = 'glyphs'", ["no key 'loss'"]),
    ("format = 7\ndata = 'glyphs'\nloss = 'triplet'", ["run format 7", "reads format 1"]),
    ("data = 'glyphs'\nloss = 'triplet'", ["run format None"]),
    (
        f"format = 1\ndata = 'glyphs'\nloss = 'triplet'\nlearning_rate = 1{'0' * 400}",
        ["learning_rate must lie between 1e-12 and 1,000", "far beyond"],
    ),
    (f"format = 1\nseed = {'9' * 5000}", ["not valid TOML", "5000 digits"]),
    ("format = " + "[" * 5000, ["not valid TOML", "brackets"]),
    ("format = = 1", ["not valid TOML"]),
    (
        "format = 1\ndata = 'glyphs'\nloss = 'triplet'\n[hyperparameters]\nmagrin = 1",
        ["no 'magrin'", "margin"],
    ),
]


@pytest.mark.parametrize(("text", "named"), CONFIGS)
def test_config_refuses(nearfar, tmp_path, text, named):
    (tmp_path / "config.toml").write_text(text)
    done = nearfar("train", "--config", tmp_path / "config.toml", "--out", tmp_path / "run")
    assert done.status == 2
    for name in named:
        assert name in done.error
    assert not (tmp_path / "run").exists()


USES = [
    (["verify", "RUN", "1 2 3", "VECTOR"], ["'1 2 3' has shape (3,)", "(8,)"]),
    (["verify", "RUN", "1 2 x", "VECTOR"], ["'x'", "not a number"]),
    (["verify", "RUN", "nan 2 3", "VECTOR"], ["nan"]),
    (["verify", "RUN", "none.png", "VECTOR"], ["none.png", "trained on vectors"]),
    (["verify", "RUN", "none.npy", "VECTOR"], ["no such file", "none.npy"]),
    (["verify", "RUN", "someone", "VECTOR"], ["no such item: 'someone'", "DATA:row"]),
    (["verify", "RUN", "DATA:9999", "VECTOR"], ["rows", "0 to 319"]),
    (["verify", "RUN", "none.npz:1", "VECTOR"], ["no such file", "none.npz"]),
    (["verify", "RUN", "pairs.csv:1", "VECTOR"], ["pairs.csv:1", "npz"]),
    (["verify", "NOWHERE", "VECTOR", "VECTOR"], ["no such run folder"]),
    (["verify", "RUN", "VECTOR"], ["Missing argument", "verify --help"]),
    (["evaluate", "RUN", "OTHER"], ["(3,)", "(8,)"]),
    (["evaluate", "RUN", "ONE"], ["no dissimilar pairs"]),
    (["evaluate", "RUN", "ALONE"], ["no similar pairs"]),
    (["evaluate", "RUN", "none.npz"], ["no such file"]),
    (["embed", "RUN", "OTHER", "--out", "e.npz"], ["(3,)", "(8,)"]),
    (["embed", "RUN", "DATA", "--out", "e.txt"], ["must end in .npz"]),
]


@pytest.mark.parametrize(("arguments", "named"), USES)
def test_using_a_run_refuses(nearfar, vector_run, vectors, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    x, y = make_vectors()
    places = {
        "RUN": vector_run,
        "DATA": vectors,
        "DATA:9999": f"{vectors}:9999",
        "NOWHERE": tmp_path / "nowhere",
        "VECTOR": "1 2 3 4 5 6 7 8",
        "OTHER": save(tmp_path / "other.npz", x=x[:, :3], y=y),
        "ONE": save(tmp_path / "one.npz", x=x, y=0 * y),
        "ALONE": save(tmp_path / "alone.npz", x=x, y=np.arange(len(x))),
    }
    before = sorted(tmp_path.rglob("*"))
    done = nearfar(*(places.get(argument, argument) for argument in arguments))
    assert done.status == 2
    for name in named:
        assert name in done.error
    assert done.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_image_in_verify(nearfar, image_run, folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes((folder / "person 00" / "0.jpg").read_bytes()[:200])
    done = nearfar("verify", image_run, tmp_path / "broken.jpg", folder / "person 00" / "0.jpg")
    assert done.status == 2
    assert "broken.jpg cannot be read" in done.error


@pytest.mark.parametrize("loss", ["quadruplet", "batch_quadruplet"])
def test_a_batch_must_hold_the_identities_that_a_loss_compares(nearfar, vectors, tmp_path, loss):
    options = ("--loss", loss, "--identities", 2)
    done = nearfar("train", vectors, "--out", tmp_path / "run", *options)
    assert done.status == 2
    assert f"--loss {loss} needs 3 identities in a batch, but --identities is 2" in done.error
    assert list(tmp_path.iterdir()) == []


def test_out_exists(nearfar, vectors, vector_run):
    done = nearfar("train", vectors, "--out", vector_run, "--steps", 2)
    assert done.status == 2
    assert "exists. Choose another --out, or add --overwrite" in done.error
