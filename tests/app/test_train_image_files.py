"""Image files that are decoded when they are needed hold what they would hold in memory."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from image_files import png16
from PIL import Image

from nearfar.app.data import image_files
from nearfar.app.data.content import Arrays, read_ahead
from nearfar.app.data.fit import Fit
from nearfar.app.data.image_files import ImageFiles, examined, read_files
from nearfar.app.data.images import read_images
from nearfar.app.data.items import items_of, read_data
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError

SIDE = 40
RANDOM = np.random.default_rng(0)


def photo(*shape) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, shape).astype(np.uint8))


def grey(path: Path) -> None:
    photo(50, 60).save(path.with_suffix(".png"))


def colour(path: Path) -> None:
    photo(50, 60, 3).save(path.with_suffix(".jpg"))


def deep(path: Path) -> None:
    path.with_suffix(".png").write_bytes(png16(RANDOM.integers(0, 2**16, (9, 9)).astype("u2"), 0))


# Each kind of folder, by what is in it: the first file decides what is guessed of the others.
FOLDERS = {
    "colour": [colour] * 7,
    "grey": [grey] * 7,
    "grey first": [grey, grey, colour, grey, colour],
    "colour first": [colour, grey, grey],
    "deep last": [grey, grey, deep],
    "deep first": [deep, colour, grey],
}
FITS = {
    "square": Fit(SIDE, SIDE),
    "wide": Fit(SIDE, 20),
    "grey": Fit(SIDE, SIDE, 1),
    "colour": Fit(SIDE, SIDE, 3),
    "cropped": Fit(SIDE, SIDE, 3, "bicubic", 45, keeps_shape=True),
}


def written(folder: Path, kinds) -> list[Path]:
    for number, kind in enumerate(kinds):
        kind(folder / f"{number}")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kinds", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_files_hold_what_they_hold_in_memory(tmp_path, kinds, fit):
    files = written(tmp_path, kinds)
    x, notes = read_images(files, fit)
    arrays = Arrays(x)
    content, same_notes = examined(files, fit)
    assert content.shape == arrays.shape
    assert len(content) == len(arrays)
    assert same_notes == notes
    rows = torch.tensor([2, 0, 2, 1])
    read = content.read(rows)()
    assert read.dtype is x.dtype
    assert torch.equal(read, x[rows])
    assert content.fingerprints() == arrays.fingerprints()
    assert content.hash().digest() == arrays.hash().digest()
    for one, other in zip(content.moments(rows), arrays.moments(rows), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_the_hash_is_that_of_the_pixels(tmp_path):
    files = written(tmp_path, [colour] * 3)
    x, _ = read_images(files, Fit(8, 6))
    expected = hashlib.sha256(b"((3, 3, 6, 8), torch.uint8)" + x.numpy().tobytes())
    content, _ = examined(files, Fit(8, 6))
    assert content.hash().digest() == expected.digest()
    content.hash().update(b"more")  # of a copy
    assert content.hash().digest() == expected.digest()


def test_only_what_is_large_stays_on_disk(tmp_path, monkeypatch):
    files = written(tmp_path, [colour] * 4)
    monkeypatch.setattr(image_files, "IN_MEMORY", 4 * 3 * 10 * 10)
    assert isinstance(read_files(files, Fit(10, 10))[0], Arrays)
    assert isinstance(read_files(files, Fit(11, 10))[0], ImageFiles)


def test_large_images_are_shrunk_to_be_shown_and_compared(tmp_path):
    content, _ = examined(written(tmp_path, [colour] * 3), Fit(200, 100))
    rows = torch.tensor([0, 2])
    assert content.raw(rows).shape == (2, 3, 16, 32)
    assert content.shown(rows).shape == (2, 3, 48, 96)
    assert content.shown(rows).dtype == np.uint8
    small, _ = examined(content.files, Fit(32, 32))
    x, _ = read_images(content.files, Fit(32, 32))
    torch.testing.assert_close(small.raw(rows), Arrays(x).raw(rows))
    assert np.array_equal(small.shown(rows), Arrays(x).shown(rows))


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_unreadable_file_is_found_before_training(tmp_path, place):
    files = written(tmp_path, [colour] * 7)
    for broken in (files[place], files[6]):
        broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(InputError, match=f"{place}.jpg cannot be read"):
        examined(files, Fit(8, 8))


def test_a_file_that_is_gone_is_named(tmp_path):
    files = written(tmp_path, [colour] * 3)
    content, _ = examined(files, Fit(8, 8))
    files[1].unlink()
    with pytest.raises(InputError, match=r"no such image: .*1\.jpg"):
        content.read(torch.arange(3))()


def test_batches_are_read_ahead_in_order(tmp_path):
    content, _ = examined(written(tmp_path, [colour] * 6), Fit(8, 8))
    drawn = [torch.tensor([row, 5 - row]) for row in range(6)]
    found = list(read_ahead(content, iter(drawn)))
    assert [rows.tolist() for rows, _ in found] == [rows.tolist() for rows in drawn]
    for rows, x in found:
        assert torch.equal(x, content.read(rows)())
    assert content.pace.decoded == 24
    assert content.pace.seconds > 0


def test_what_nobody_waits_for_is_not_decoded(tmp_path, monkeypatch):
    content, _ = examined(written(tmp_path, [colour] * 2), Fit(8, 8))
    begun, go_on, read = [], Event(), image_files.read_picture

    def held_up(file, fit):
        begun.append(file)
        assert go_on.wait(60)
        return read(file, fit)

    monkeypatch.setattr(image_files, "read_picture", held_up)
    reading = content.read(torch.zeros(100, dtype=torch.long))
    del reading
    go_on.set()
    content.read(torch.tensor([1]))()  # after all that is still to be done
    assert len(begun) <= image_files.n_threads() + 1


@pytest.fixture
def on_demand(monkeypatch):
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)


def folder_of_identities(tmp_path: Path) -> Path:
    for identity in range(8):
        below = tmp_path / "photos" / f"{identity}"
        below.mkdir(parents=True)
        for number in range(3):
            colour(below / f"{number}")
    return tmp_path / "photos"


def test_folders_and_tables_are_read_on_demand(tmp_path, on_demand, monkeypatch):
    folder = folder_of_identities(tmp_path)
    table = tmp_path / "pairs.csv"
    table.write_text(
        "a,b,label\nphotos/0/0.jpg,photos/0/1.jpg,true\nphotos/0/0.jpg,photos/1/0.jpg,false\n"
    )
    for source in (folder, table):
        data = read_data(str(source), Reads(image_size=16))
        assert isinstance(items_of(data).content, ImageFiles)
        monkeypatch.setattr(image_files, "IN_MEMORY", 2**28)
        in_memory = read_data(str(source), Reads(image_size=16))
        assert isinstance(items_of(in_memory).content, Arrays)
        assert data.digest() == in_memory.digest()
        assert items_of(data).names == items_of(in_memory).names
        monkeypatch.setattr(image_files, "IN_MEMORY", 0)


def test_a_run_on_files_is_read_again(tmp_path, on_demand, nearfar):
    folder, out = folder_of_identities(tmp_path), tmp_path / "run"
    asked = ("--image-size", "16", "--steps", "2", "--identities", "2", "--items", "2")
    split = ("--far", "0.2", "--no-report")
    ran = nearfar("train", folder, "--out", out, *asked, *split)
    assert ran.status == 0, ran
    assert "decoding: " in ran.out
    assert "network: " in ran.out
    assert "decoded when they are needed" in ran.out
    assert nearfar("evaluate", out).status == 0
    assert nearfar("embed", out, folder, "--out", tmp_path / "x.npz").status == 0


def held(**changed) -> dict:
    return {**asdict(Fit(8, 6, 3, "bicubic", 9, keeps_shape=True)), **changed}


def test_a_fit_is_read_as_it_was_written():
    assert Fit.read(held()) == Fit(8, 6, 3, "bicubic", 9, keeps_shape=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"width": 0},
        {"height": 2**40},
        {"channels": None},
        {"resample": "best"},
        {"resized": 1.5},
        {"keeps_shape": 1},
        {"more": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_damaged_fit_is_refused(changed):
    with pytest.raises((ValueError, TypeError)):
        Fit.read(held(**changed))


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_missing_library_is_named(nearfar, tmp_path):
    ran = nearfar("train", "glyphs", "--out", tmp_path / "run", "--encoder", "timm:resnet18")
    assert ran.status == 2
    assert (
        "--encoder timm:resnet18: timm is not installed: pip install 'nearfar[vision]'" in ran.err
    )


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from nearfar.app.cli import main
from nearfar.app.data import image_files
image_files.IN_MEMORY = 0
read = image_files.read_picture
def slowly(file, fit):
    print("reading", flush=True)
    time.sleep(0.2)
    return read(file, fit)
image_files.read_picture = slowly
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_does_not_wait_for_all_files(tmp_path):
    folder = tmp_path / "photos"
    for identity in range(4):
        (folder / f"{identity}").mkdir(parents=True)
        for number in range(60):
            Image.new("RGB", (8, 8), (identity, number, 0)).save(
                folder / f"{identity}/{number}.png"
            )
    command = [sys.executable, "-c", SLOW, "train", str(folder), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        while running.stdout.readline().strip() != b"reading":
            pass
        time.sleep(0.5)
        os.kill(running.pid, signal.SIGINT)
        out, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.decode() == "nearfar: error: interrupted; nothing unfinished is left\n"
    assert out.count(b"reading") < 120  # of 240
    assert sorted(tmp_path.iterdir()) == [folder]


MEMORY = """
import sys
from pathlib import Path
import torch
from nearfar.app.data.content import read_ahead
from nearfar.app.data.fit import Fit
from nearfar.app.data.image_files import examined

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

files = 900 * [Path(sys.argv[1])]
examined(files[:20], Fit(224, 224))[0].raw(torch.arange(20))
before = resident()
content, _ = examined(files, Fit(224, 224))
rows = torch.arange(900)
content.moments(rows)
content.raw(rows)
content.shown(rows[:50])
for _ in read_ahead(content, rows.split(32)):
    pass
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_files(tmp_path):
    photo(256, 256, 3).save(tmp_path / "x.jpg")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 900 images take 135 MB as bytes and 542 MB as numbers.
    assert int(done.stdout) < 120_000
